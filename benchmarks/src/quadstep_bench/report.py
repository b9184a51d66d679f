"""Reports: what is written from the records in `results/`."""


def table(text: str, heading: str) -> dict[str, list[str]]:
    """Reads the first Markdown table after a heading: the other cells of each row by its first."""
    lines = text[text.index(heading) :].split("\n")
    first = next(index for index, line in enumerate(lines) if line.startswith("|"))
    cells: dict[str, list[str]] = {}
    for line in lines[first + 2 :]:
        if not line.startswith("|"):
            break
        name, *rest = (cell.strip() for cell in line.strip("|").split("|"))
        cells[name] = rest
    return cells
