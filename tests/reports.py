"""Reads the tables of reports."""


def rows(text: str, start: str) -> dict[str, list[str]]:
    """The rows of the first table after `start`, by their first cells."""
    lines = text[text.index(start) :].split("\n")
    first = next(index for index, line in enumerate(lines) if line.startswith("|"))
    cells: dict[str, list[str]] = {}
    for line in lines[first + 2 :]:
        if not line.startswith("|"):
            break
        name, *rest = (cell.strip() for cell in line.strip("|").split("|"))
        cells[name] = rest
    return cells
