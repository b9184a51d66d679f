"""Each example says how to run it, and runs."""

import ast
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def run(name: str, *options: str, cwd: Path) -> str:
    """Runs an example as its docstring says, warnings as errors; returns what it printed."""
    command = [sys.executable, "-W", "error", ROOT / "examples" / name, *options]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_the_docstring_names_the_command(path):
    assert f"\n    python examples/{path.name}" in ast.get_docstring(ast.parse(path.read_text()))


@pytest.mark.slow
@pytest.mark.skipif(find_spec("rich") is None, reason="rich is not installed")
def test_live(tmp_path):
    printed = run("live.py", "5", cwd=tmp_path)
    accuracy = re.search(r"accuracy on held-out digits: ([\d.]+)", printed)
    assert float(accuracy[1]) > 0.9
    line = r"epoch  4  loss \d\.\d+  rate \d\.\d+e-\d+  \w+ +forward passes a step 1\.\d+"
    assert re.search(line, printed)
    assert max(map(len, printed.splitlines())) < 80


def test_torch_loop(tmp_path):
    printed = run("torch_loop.py", cwd=tmp_path)
    assert float(re.findall(r"accuracy (\d\.\d+)", printed)[-1]) > 0.9
