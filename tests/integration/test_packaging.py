"""Builds the wheel and the sdist, and uses both as someone does who has nothing else."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from packaging.metadata import Metadata
from readme_renderer import markdown

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
LIBRARY = ROOT / "src" / "quadstep"

EVERY_MODULE = """
import importlib, importlib.util, pkgutil, sys
import quadstep
assert importlib.util.find_spec("numpy") is None, "the environment is not empty: it holds numpy"
assert quadstep.__file__.startswith(sys.prefix), quadstep.__file__
for module in pkgutil.walk_packages(quadstep.__path__, "quadstep."):
    if not module.name.startswith("quadstep.integrations."):  # each needs its framework
        importlib.import_module(module.name)
for name in quadstep.__all__:
    getattr(quadstep, name)
"""

USER_PROGRAM = """
from typing import Any, assert_type

import torch
from torch import Tensor

import quadstep
from quadstep import LQA, Reason, Report

inputs, weights = torch.randn(8, 4), torch.zeros(4, requires_grad=True)


def closure() -> Tensor:
    return (inputs @ weights).square().mean()


opt = LQA([weights])
assert_type(opt, LQA)
assert_type(LQA(torch.optim.AdamW([weights])), LQA)
assert_type(LQA.paper([weights], delta0=0.1), LQA)
assert_type(opt.step(closure), Tensor)
assert_type(opt.step(lambda: (inputs @ weights).sum()), Tensor)
assert_type(opt.report, Report)
assert_type(opt.report.rate, float)
assert_type(opt.report.reason, Reason)
assert_type(opt.metrics(), dict[str, float])
assert_type(opt.averaged_state_dict(torch.nn.Linear(1, 1)), dict[str, Any])
with opt.averaged() as nothing:
    assert_type(nothing, None)
optimizer: torch.optim.Optimizer = opt

assert_type(opt.report.rate, str)  # error
LQA([weights], 0.1)  # error
LQA([weights], delta0="0.1")  # error
LQA([weights], direction="uphill")  # error
opt.step(3)  # error
opt.averaged_state_dict([torch.nn.Linear(1, 1)])  # error
opt.report.rate = 0.1  # error
opt.report.rates  # error
quadstep.LBA  # error
"""


# torch itself warns where there is no numpy.
STRICT = ("-I", "-W", "error", "-W", "ignore:Failed to initialize NumPy")


def run(*command: str | Path, cwd: Path, status: int = 0, hint: str = "", **variables: str) -> str:
    """Runs a command that must not see this checkout and returns its standard output."""
    inherited = {k: v for k, v in os.environ.items() if k not in {"PYTHONPATH", "MYPYPATH"}}
    done = subprocess.run(
        command, cwd=cwd, env=inherited | variables, capture_output=True, text=True, timeout=600
    )
    if done.returncode != status:
        pytest.fail(
            f"{hint}\n{shlex.join(map(str, command))}\n"
            f"ends with status {done.returncode}, not {status}\n{done.stdout}\n{done.stderr}",
            pytrace=False,
        )
    return done.stdout


@pytest.fixture(scope="session")
def distributions(tmp_path_factory):
    """The folder of the sdist and of the wheel, which is built from the sdist."""
    folder = tmp_path_factory.mktemp("distributions")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    return folder


@pytest.fixture(scope="session")
def wheel(distributions):
    (wheel,) = distributions.glob("*.whl")
    return wheel


@pytest.fixture(scope="session")
def sdist(distributions, tmp_path_factory):
    """The unpacked sdist."""
    (archive,) = distributions.glob("*.tar.gz")
    folder = tmp_path_factory.mktemp("sdist")
    with tarfile.open(archive) as packed:
        packed.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


@pytest.fixture(scope="session")
def python(wheel, tmp_path_factory):
    """The interpreter of an environment that holds the wheel and its hard dependencies alone.

    They come from the package index or the cache of pip: without either the tests fail.
    """
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    python = folder / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python)
    packages = ("--constraint", ROOT / "constraints.txt", wheel)
    hint = "The wheel and torch could not be installed: check that a package index is reachable."
    run(*pip, "install", "--no-compile", *packages, cwd=folder, hint=hint)
    yield python
    shutil.rmtree(folder)  # torch is large, and pytest keeps the folders of three sessions


def metadata(wheel: Path) -> Metadata:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return Metadata.from_email(archive.read(name), validate=True)


def example() -> str:
    """The examples of the README up to the first that uses the library."""
    examples = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    first = next(i for i, code in enumerate(examples) if "quadstep" in code)
    return "\n".join(examples[: first + 1])


def pyright_errors(python: Path, program: Path) -> dict[int, str]:
    (program.parent / "pyrightconfig.json").write_text('{"typeCheckingMode": "strict"}')
    command = (sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", python, program)
    found = json.loads(run(*command, cwd=program.parent, status=1))["generalDiagnostics"]
    return {error["range"]["start"]["line"] + 1: error["message"] for error in found}


def mypy_errors(python: Path, program: Path) -> dict[int, str]:
    options = ("--strict", "--output", "json", "--cache-dir", os.devnull)
    command = (sys.executable, "-m", "mypy", *options, "--python-executable", python, program)
    found = map(json.loads, run(*command, cwd=program.parent, status=1).splitlines())
    return {error["line"]: error["message"] for error in found}


class TestWheel:
    def test_it_holds_the_library_and_nothing_else(self, wheel):
        with zipfile.ZipFile(wheel) as archive:
            names = set(archive.namelist())
        sources = [path for path in LIBRARY.rglob("*") if path.suffix in {".py", ".typed"}]
        about = f"{'-'.join(wheel.name.split('-')[:2])}.dist-info"
        assert names == {str(path.relative_to(LIBRARY.parent)) for path in sources} | {
            f"{about}/{name}" for name in ("METADATA", "RECORD", "WHEEL", "licenses/LICENSE")
        }
        assert "quadstep/py.typed" in names

    def test_torch_is_its_only_dependency(self, wheel):
        required = metadata(wheel).requires_dist or []
        always = [r.name for r in required if r.marker is None or "extra" not in str(r.marker)]
        assert always == ["torch"]

    def test_an_index_shows_all_of_the_readme(self, wheel):
        described = metadata(wheel)
        assert described.description_content_type == "text/markdown"
        page = markdown.render(described.description)
        assert page is not None
        links = re.findall(r'(?:href|src)="([^"]*)"', page)
        assert [link for link in links if not link.startswith(("https://", "#"))] == []

    def test_every_module_imports_with_torch_alone(self, python, tmp_path):
        run(python, *STRICT, "-c", EVERY_MODULE, cwd=tmp_path)

    def test_the_example_of_the_readme_runs_with_torch_alone(self, python, tmp_path):
        (tmp_path / "example.py").write_text(example())
        run(python, *STRICT, "example.py", cwd=tmp_path)

    @pytest.mark.parametrize("errors", [pyright_errors, mypy_errors])
    def test_a_type_checker_rejects_wrong_uses_alone(self, errors, python, tmp_path):
        program = tmp_path / "program.py"
        program.write_text(USER_PROGRAM)
        found = errors(python, program)
        lines = [*enumerate(USER_PROGRAM.splitlines(), start=1)]
        wrong = {number for number, line in lines if line.endswith("# error")}
        accepted = [line for number, line in lines if number in wrong - set(found)]
        rejected = {line: found[number] for number, line in lines if number in set(found) - wrong}
        assert accepted == []
        assert rejected == {}


class TestSdist:
    @pytest.fixture
    def pytest_in_sdist(self, sdist):
        def run_pytest(*options: str) -> str:
            # Ahead of the checkout, which the development environment holds as editable.
            command = (sys.executable, "-m", "pytest", "-m", "not slow", "-q", *options)
            return run(*command, cwd=sdist, PYTHONPATH=str(sdist / "src"))

        return run_pytest

    def test_it_leaves_the_experiments_out(self, sdist):
        assert {"src", "tests", "docs", "examples"} <= {path.name for path in sdist.iterdir()}
        assert not (sdist / "benchmarks").exists()
        assert not [*(sdist / "results").rglob("*.jsonl")]

    def test_all_of_its_tests_are_found(self, pytest_in_sdist):
        pytest_in_sdist("--collect-only")

    def test_tests_of_its_modules_and_of_its_documents_pass(self, pytest_in_sdist):
        chosen = ("unit/test_averaging", "integration/test_readme", "integration/test_docs")
        pytest_in_sdist(*(f"tests/{name}.py" for name in chosen))
