"""The code blocks of the documents run, the tests that they name exist, and the site builds."""

import ast
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

from quadstep import LQA

ROOT = Path(__file__).parents[2]
PAGES = [
    page
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    if "```python\n" in page.read_text()
]
SYBIL = Sybil([PythonCodeBlockParser(), SkipParser()])
FRAMEWORKS = ("lightning", "accelerate", "transformers")


def defined() -> set[str]:
    """The functions under the folders of tests, with and without their class."""
    names = set()
    for folder in ("tests", "benchmarks/tests"):
        for path in (ROOT / folder).rglob("*.py"):
            tree = ast.parse(path.read_text())
            names.update(node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))
            for node in tree.body:
                if isinstance(node, ast.ClassDef):
                    methods = (part for part in node.body if isinstance(part, ast.FunctionDef))
                    names.update(f"{node.name}::{method.name}" for method in methods)
    return names


def is_trained(optimizer: LQA, accuracy: torch.Tensor) -> bool:
    return accuracy > 0.95 and optimizer.rate > 1e-3 and sum(optimizer.report.counts.values()) > 100


@pytest.mark.filterwarnings("ignore::Warning:lightning")
@pytest.mark.filterwarnings("ignore::FutureWarning:transformers")
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Keras
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
@pytest.mark.usefixtures("offline")
def test_the_code_blocks_of_a_page_run(page, subtests):
    torch.manual_seed(0)
    document = SYBIL.parse(page)
    names = document.namespace
    names.update(find_spec=find_spec, LQA=LQA)
    for example in document.examples():
        with subtests.test(line=example.line):
            example.evaluate()
    if page.stem in FRAMEWORKS and find_spec(page.stem):
        assert is_trained(
            getattr(names["optimizer"], "optimizer", names["optimizer"]), names["accuracy"]
        )


def test_each_guarantee_names_tests_and_they_exist():
    page = (ROOT / "docs" / "guarantees.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| ")]
    guarantees = [row for row in rows if row != "| guarantee | tests |"]
    name = r"`((?:\w+::)?(?:test|check)_\w+)`"
    assert len(guarantees) > 80
    assert [row for row in guarantees if not re.search(name, row)] == []
    if not (ROOT / "benchmarks").exists():
        pytest.skip("the source distribution has no experiments, whose tests are named too")
    assert sorted(set(re.findall(name, page)) - defined()) == []


def test_the_site_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path]
    quiet = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=quiet, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    # Nothing is loaded from elsewhere, and nothing is left of a snippet that was not found.
    for page in tmp_path.rglob("*.html"):
        text = page.read_text()
        assert not re.search(r'(?:src|rel="stylesheet" href)="https?://', text), page
        assert "--8&lt;--" not in text, page
    reference = (tmp_path / "api" / "index.html").read_text()
    inherited = "averaged averaged_state_dict eval train state_dict load_state_dict add_param_group"
    public = {name for name in vars(LQA) if name[0] != "_"} | {*inherited.split()}
    assert {name for name in public if f'id="quadstep.LQA.{name}"' not in reference} == set()


def test_the_citation_is_complete():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors", "version", "license"} <= citation.keys()
    project = (ROOT / "pyproject.toml").read_text()
    assert f'version = "{citation["version"]}"' in project
    articles = [citation["preferred-citation"], *citation["references"]]
    assert all({"type", "title", "authors", "year"} <= article.keys() for article in articles)
    assert any(article.get("doi") == "10.1016/j.neunet.2021.03.025" for article in articles)
