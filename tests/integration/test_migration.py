"""The table of docs/migrating.md counts the lines that differ from the version with AdamW."""

import re
from difflib import SequenceMatcher
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "migrating.md"
ROW = re.compile(
    r"\| (?P<loop>[^|]+) \| (?P<lines>\d+) \| \[[^]]+\]\((?P<recipe>[^)]+)\) "
    r"\| \[(?P<example>\w+\.py)\]"
    r"\(https://github.com/quadstep/quadstep/blob/main/examples/(?P=example)\) \|"
)
MOST = {
    "plain torch": 2,
    "Transformers": 3,
    "PEFT": 3,
    "TRL": 4,
    "Accelerate": 2,
    "Lightning": 3,
    "Fabric": 2,
    "skorch": 4,
    "Keras": 2,
}
ROWS = [match.groupdict() for match in ROW.finditer(PAGE.read_text())]


def lines_of(block: str) -> list[str]:
    """The lines of a block but its first and blank ones."""
    return [line for line in block.splitlines()[1:] if line.strip()]


def number_of_changes(page: str) -> int:
    """The lines of the first block "after" that its block "before" does not have."""
    before, after = (
        lines_of(re.search(rf"```python\n(# {name}\n.*?)```", page, re.DOTALL)[1])
        for name in ("before", "after")
    )
    matcher = SequenceMatcher(None, before, after, autojunk=False)
    return len(after) - sum(block.size for block in matcher.get_matching_blocks())


def test_the_table_has_all_training_loops():
    assert [row["loop"] for row in ROWS] == list(MOST)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["loop"])
def test_the_lines_that_differ_are_as_many_as_the_table_says(row):
    page = (
        (PAGE.parent / row["recipe"]).read_text() if row["recipe"][0] != "#" else PAGE.read_text()
    )
    assert number_of_changes(page) == int(row["lines"]) <= MOST[row["loop"]]
    assert (ROOT / "examples" / row["example"]).is_file()


def test_changed_added_and_moved_lines_count_and_others_do_not():
    page = "```python\n# before\na\nb\n\nc\n```\n\n```python\n# after\na\nb2\nc\nd\n```"
    assert number_of_changes(page) == 2
    assert number_of_changes(page.replace("b2", "b").replace("d\n", "")) == 0
