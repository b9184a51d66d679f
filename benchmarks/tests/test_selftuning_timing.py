"""The time of a step of each entrant beside one of AdamW."""

from pathlib import Path

import pytest
from rich.console import Console

from quadstep_bench.runner.files import read_json
from quadstep_bench.runner.records import Results
from quadstep_bench.selftuning import timing
from quadstep_bench.selftuning.entrants import ENTRANTS


def test_all_entrants_are_timed_on_each_task(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(timing, "WARM_UP", 1)
    monkeypatch.setattr(timing, "ROUND", 2)
    some = {name: ENTRANTS[name] for name in ("lqa-auto", "adamw", "nadamw-algoperf")}
    monkeypatch.setattr(timing, "ENTRANTS", some)
    results = Results(tmp_path / "results", tmp_path / "runs")
    quiet = Console(quiet=True)
    file = timing.measure(results, quiet, tasks=["table-diabetes"], rounds=3)
    assert file == timing.path(results)
    rows = read_json(file)["rows"]
    assert {row["setting"]: row["task"] for row in rows} == dict.fromkeys(some, "table-diabetes")
    assert all(row["milliseconds"] > 0 for row in rows)
    assert [row["ratio"] for row in rows if row["setting"] == timing.BASE] == [1.0]
    # What is there is not measured again; another number of rounds is another record.
    timing.measure(results, quiet, tasks=["table-diabetes", "bandit-digits"], rounds=3)
    both = read_json(file)["rows"]
    assert both[: len(rows)] == rows
    assert {row["task"] for row in both} == {"table-diabetes", "bandit-digits"}
    timing.measure(results, quiet, tasks=["bandit-digits"], rounds=2)
    assert {row["task"] for row in read_json(file)["rows"]} == {"bandit-digits"}
    with pytest.raises(ValueError, match="unknown task 'digits'"):
        timing.measure(results, quiet, tasks=["digits"])
