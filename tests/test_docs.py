import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
PROMISES = (TESTS.parent / "docs" / "promises.md").read_text()
NAMED = sorted(set(re.findall(r"`(test_\w+\.py)::([\w:]+)`", PROMISES)))


def names(path: Path) -> set[str]:
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.ClassDef):
            parts = (part for part in node.body if isinstance(part, ast.FunctionDef))
            found.update(f"{node.name}::{part.name}" for part in parts)
    return found


@pytest.mark.parametrize(("file", "test"), NAMED, ids=lambda part: part)
def test_each_test_that_a_promise_names_exists(file, test):
    assert test in names(TESTS / file)


def test_each_promise_names_a_test():
    rows = [line for line in PROMISES.splitlines() if line.startswith("| ")]
    promises = [row for row in rows if row != "| promise | test |"]
    assert len(promises) > 30
    assert all(re.search(r"::test_\w+`", row) for row in promises)
