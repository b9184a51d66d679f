"""Reports: what is committed is what the records give, and where its numbers come from."""

from dataclasses import replace
from pathlib import Path

import pytest
from synthetic import ENVIRONMENT, record, results_in

from quadstep_bench import report
from quadstep_bench.markdown import read_table
from quadstep_bench.optimizers import CONSTANT_RATES
from quadstep_bench.runner.environment import SOURCES
from quadstep_bench.runner.files import write_json
from quadstep_bench.runner.records import Results

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "results"


@pytest.mark.slow
def test_the_committed_reports_are_those_of_the_records(tmp_path: Path) -> None:
    assert report.check(Results(RESULTS, tmp_path)) == []


def test_evidence_lies_in_few_files() -> None:
    assert sum(path.is_file() for path in RESULTS.rglob("*")) <= 80


def test_the_headline_numbers_are_those_of_the_report() -> None:
    found = report.numbers(RESULTS)
    page = (RESULTS / "SUITE.md").read_text()
    cells = read_table(page, "## One setting for all tasks")["lqa-auto"]
    means = (f"{mean:.3g}" for mean in found.suite.means)
    assert cells == [*means, *map(str, found.suite.won)]
    assert found.tasks == len(read_table(page, "## Training loss"))
    assert set(found.figures) == {1, 2, 3, 4, 5}
    assert all(each.loss < each.best for each in found.figures.values())
    assert {"", "avx2", "cuda", "small"} <= set(found.costs)
    assert set(found.costs[""]) == {"logistic", "mlp", "lenet", "resnet18", "transformer"}


def test_constant_rates_are_drawn_once_they_are_recorded(tmp_path: Path) -> None:
    results = results_in(tmp_path)
    *names, last = ("lqa-auto", "sgd-0.1", *CONSTANT_RATES)
    for name in names:
        results.collection("suite").add(record("mlp-digits", name, [1.0, *[0.5] * 20]))
    written = report.write(results, tmp_path / "out").files
    assert [path.name for path in written[-2:]] == ["suite.png", "suite.svg"]
    results.collection("suite").add(record("mlp-digits", last, [1.0, *[0.5] * 20]))
    written = report.write(results, tmp_path / "out").files
    assert [path.name for path in written[-2:]] == ["constant-rates.png", "constant-rates.svg"]
    assert all(path.stat().st_size > 1000 for path in written[-2:])


def test_the_numbers_are_those_of_the_records(tmp_path: Path) -> None:
    results = results_in(tmp_path)
    for name, loss in {"lqa-auto": 0.2, "sgd-0.1": 0.4, "adam-0.1": 0.8}.items():
        results.collection("suite").add(record("mlp-digits", name, [1.0, *[loss] * 20]))
        results.collection("records").add(record("mlp-mnist", name, [1.0, loss / 2]))
    row = {"model": "mlp", "optimizer": "lqa-auto", "base": "adamw", "ratio": 1.07}
    for label in ("", "-cuda"):
        rows = [row, row | {"base": "sgd"}]
        write_json({"rows": rows}, results.root / "bench" / f"cost{label}.json")
    found = report.numbers(results.root)
    assert found.suite.means == pytest.approx((0.5, 0.5, 0.5))
    assert found.suite.won == (1, 1, 1)
    assert found.tasks == 1
    assert found.figures == {2: report.FinalLosses(1, 0.1, 0.2, "sgd-0.1")}
    assert found.costs == {"": {"mlp": 1.07}, "cuda": {"mlp": 1.07}}


def test_provenance_tells_present_sources_from_others() -> None:
    present = ENVIRONMENT | {"sources": SOURCES, "revision": "f" * 40}
    changed = present | {"dirty": True, "sources": None}
    uses = [
        ("runs of LQA", [ENVIRONMENT]),
        ("runs of LQA", [present]),
        ("runs of LQA", [ENVIRONMENT, present]),
        (report.OTHERS, [changed]),
    ]
    section = report.provenance(uses)
    assert section.startswith(report.PROVENANCE)
    assert "Measured with them: 1 of 3 runs of LQA. " in section
    rows = read_table(section, report.PROVENANCE)
    assert [*rows.items()] == [
        (f"`{SOURCES}` (present)", ["fffffff", "1", ""]),
        ("`0123456789ab`", ["none", "1", ""]),
        (f"`0123456789ab` then `{SOURCES}`", ["fffffff, none", "1", ""]),
        ("unknown", ["fffffff (changed)", "", "1"]),
    ]
    assert report.provenance([]) == ""


def test_a_change_of_the_present_sources_alone_leaves_reports_up_to_date(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = results_in(tmp_path)
    run = record("mlp-mnist", "lqa", [1.0, 0.5])
    results.collection("records").add(run)
    report.write(results, results.root)
    monkeypatch.setattr(report, "SOURCES", "f" * 12)
    assert report.check(results) == []
    other = replace(run, environment=ENVIRONMENT | {"sources": "e" * 12})
    results.collection("records").add(other)
    assert [path.name for path in report.check(results)] == ["CLAIMS.md"]
    results.collection("records").add(record("mlp-mnist", "lqa", [1.0, 0.4]))
    names = {path.name for path in report.check(results)}
    assert {"figure-2.png", "figure-2.svg"} <= names
