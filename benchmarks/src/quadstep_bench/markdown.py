"""Tables in Markdown."""

import math
from collections.abc import Iterable, Sequence


def format_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lays out a table, a line a row."""
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def read_table(text: str, heading: str) -> dict[str, list[str]]:
    """Reads the first table after a heading: the other cells of each row by its first."""
    lines = text[text.index(heading) :].split("\n")
    first = next(index for index, line in enumerate(lines) if line.startswith("|"))
    cells: dict[str, list[str]] = {}
    for line in lines[first + 2 :]:
        if not line.startswith("|"):
            break
        name, *rest = (cell.strip() for cell in line.strip("|").split("|"))
        cells[name] = rest
    return cells


def format_loss(value: float) -> str:
    """Writes a loss with four digits; one that is not finite has diverged."""
    return f"{value:.4g}" if math.isfinite(value) else "diverged"


def format_ratio(value: float) -> str:
    """Writes a ratio with three digits."""
    return f"{value:.3g}" if math.isfinite(value) else "∞"
