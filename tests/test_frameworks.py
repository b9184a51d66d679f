"""The examples of docs/frameworks.md, each run as printed in a process of its own."""

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[1] / "docs" / "frameworks.md").read_text()
TASK, *_ = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
EXAMPLES = re.findall(r"^## (\w+)\n.*?```python\n(.*?)```", PAGE, re.DOTALL | re.MULTILINE)
OUTCOME = """
own = getattr(optimizer, "optimizer", optimizer)
assert accuracy > 0.95, accuracy
assert own.report.counts["held"] > 80, own.report
assert own.rate > 1e-3, own.rate
"""


def test_every_framework_has_an_example():
    assert [name for name, _ in EXAMPLES] == ["Lightning", "Accelerate", "Transformers"]


@pytest.mark.parametrize(("name", "example"), EXAMPLES)
def test_the_example_trains(name, example, tmp_path):
    if find_spec(name.lower()) is None:
        pytest.skip(f"{name} is not installed")
    program = TASK + example + OUTCOME
    ran = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
