"""Scores of the self-tuning benchmark, from records with known answers."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quadstep_bench.runner.files import RecordError, Row
from quadstep_bench.runner.records import Results
from quadstep_bench.selftuning import figures, page
from quadstep_bench.selftuning.entrants import BASELINE, CONSTANTS, ENTRANTS
from quadstep_bench.selftuning.runs import TRIAL_SEED, Records, Run, winner
from quadstep_bench.selftuning.score import (
    CAP,
    EARLIEST,
    HORIZON,
    Comparison,
    Runs,
    TaskScores,
    compare,
    gather,
    log_ratio,
)
from quadstep_bench.selftuning.tasks import TASKS

TASK, OTHER = "few-data", "rare-words"


def row(
    losses: list[float], *, task: str = TASK, setting: str = "adamw", seed: int = 0, **other: Any
) -> Row:
    """A record of a run with these validation losses, four steps apart."""
    steps = [4 * index for index in range(len(losses))]
    return {
        "task": task,
        "setting": setting,
        "seed": seed,
        "steps": TASKS[task].steps,
        "status": "finished",
        "data": "digest",
        "environment": "here",
        "step": steps,
        "forwards": steps,
        "backwards": steps,
        "seconds": [0.5 * step for step in steps],
        "train_loss": losses,
        "validation_loss": losses,
        "validation_error": [0.1 * loss for loss in losses],
        "test": {"final": [losses[-1], 0.5], "best": [min(losses), 0.25]},
    } | other


def task_scores(
    baseline: list[list[float]], entrant: list[list[float]], **other: Any
) -> TaskScores:
    return TaskScores(
        TASK,
        "trial-00",
        Runs(tuple(row(losses) for losses in baseline)),
        {"adamw": Runs(tuple(row(losses, **other) for losses in entrant))},
    )


def test_the_time_to_a_target_is_interpolated() -> None:
    runs = Runs((row([4.0, 2.0, 1.0]), row([4.0, 3.0, 2.5]), row([0.5, 0.4, 0.3])))
    # A step counts three passes, and evaluations are four steps apart.
    assert runs.time("validation_loss", 1.5, "passes") == pytest.approx([12 * 1.5, math.inf, 0.0])
    assert runs.time("validation_loss", 2.0, "steps") == pytest.approx([4.0, math.inf, 0.0])
    assert runs.total("passes").tolist() == [24.0] * 3


def test_a_run_that_rises_again_has_reached_its_target() -> None:
    runs = Runs((row([4.0, 1.0, 3.0]),))
    assert runs.time("validation_loss", 1.0, "passes") == pytest.approx([12.0])
    assert runs.final("validation_loss").tolist() == [3.0]
    assert runs.best("validation_loss").tolist() == [1.0]


def test_a_run_that_diverged_ends_at_infinity() -> None:
    lost = row([4.0, 2.0, 1.5], status="diverged")
    lost["validation_loss"] = [4.0, 2.0, None]
    runs = Runs((lost, row([4.0, 3.0, 2.0, 1.0])))
    assert runs.final("validation_loss").tolist() == [math.inf, 1.0]
    assert runs.best("validation_loss").tolist() == [2.0, 1.0]
    assert runs.test("final", "loss").tolist() == [math.inf, 1.0]
    assert runs.test("best", "loss").tolist() == [1.5, 1.0]


def test_a_score_by_hand() -> None:
    # The baseline's lowest losses are 1, 2 and 3: the target is 2, which its median run reaches at
    # its end, after one budget. The entrant reaches it halfway in two runs of three.
    scores = [
        task_scores(
            [[8.0, 4.0, 1.0], [8.0, 4.0, 2.0], [8.0, 4.0, 3.0]],
            [[8.0, 2.0, 6.0], [8.0, 2.0, 4.0], [8.0, 4.0, 3.0]],
        )
    ]
    score = Comparison("adamw", scores).score("validation_loss")
    assert score.tasks == score.reached.value == 1
    assert score.profile.value == pytest.approx((HORIZON - 0.5) / HORIZON)
    assert score.speed_up.value == pytest.approx(2.0)
    assert score.final.value == pytest.approx(4.0 / 2.0)
    assert score.best.value == pytest.approx(2.0 / 2.0)
    # A step that takes twice as long takes away what half the steps gain.
    timed = Comparison("adamw", scores).score("validation_loss", {TASK: 2.0})
    assert timed.speed_up.value == pytest.approx(1.0)
    assert Comparison("adamw", scores).passes() == 1.0


def test_a_target_that_is_not_reached_counts_as_four_budgets() -> None:
    scores = [task_scores([[8.0, 4.0, 2.0]] * 3, [[8.0, 4.0, 3.0]] * 3)]
    score = Comparison("adamw", scores).score("validation_loss")
    assert score.reached.value == score.profile.value == 0.0
    assert score.speed_up.value == pytest.approx(1 / HORIZON)


def test_a_target_that_is_reached_late_counts_as_much_as_one_that_never_is() -> None:
    scores = [task_scores([[8.0, 4.0, 2.0]] * 3, [[8.0, 4.0, 2.0]] * 3)]
    late = Comparison("adamw", scores).score("validation_loss", {TASK: 2 * HORIZON})
    assert (late.reached.value, late.profile.value) == (1.0, 0.0)
    assert late.speed_up.value == pytest.approx(1 / HORIZON)


def test_a_target_that_is_met_before_the_first_step_is_no_infinite_speed() -> None:
    scores = [task_scores([[8.0, 4.0, 2.0]] * 3, [[1.0, 1.0, 1.0]] * 3)]
    score = Comparison("adamw", scores).score("validation_loss")
    assert score.speed_up.value == pytest.approx(1 / EARLIEST)
    assert score.profile.value == pytest.approx(1 - EARLIEST / HORIZON)


def test_intervals_hold_their_number() -> None:
    """The target of a resample is that of the resampled baseline, which always reaches it."""
    # Baselines whose lowest losses differ, on the way to which they take the same time.
    baseline = [[8.0, 4.0, low] for low in (1.9, 2.0, 2.1)]
    entrant = [[8.0, 3.0, low] for low in (1.8, 1.9, 2.0)]
    score = Comparison("adamw", [task_scores(baseline, entrant)] * 8).score("validation_loss")
    for estimate in (score.profile, score.speed_up, score.final, score.best, score.reached):
        assert estimate.low <= estimate.value <= estimate.high


def test_a_setting_with_fewer_runs_than_the_baseline_is_left_out() -> None:
    scores = task_scores([[8.0, 2.0]] * 3, [[8.0, 2.0]] * 2)
    assert compare([scores], ["adamw"]) == {}
    assert compare([task_scores([[8.0, 2.0]] * 2, [[8.0, 2.0]] * 3)], ["adamw", "lqa"]).keys() == {
        "adamw"
    }


def test_where_no_task_has_an_error_there_is_no_score() -> None:
    scores = task_scores([[8.0, 2.0]] * 3, [[8.0, 2.0]] * 3)
    for each in scores.baseline.rows + scores.runs["adamw"].rows:
        each["validation_error"] = [None, None]
        each["test"] = {"final": [2.0, None], "best": [2.0, None]}
    comparison = Comparison("adamw", [scores])
    score = comparison.score("validation_error")
    assert (score.tasks, str(score.final)) == (0, "")
    assert str(comparison.test("final", "error")) == ""
    assert comparison.test("final", "loss").value == pytest.approx(1.0)


def test_the_interval_of_equal_runs_on_equal_tasks_is_their_number() -> None:
    scores = [task_scores([[8.0, 4.0, 2.0]] * 3, [[8.0, 4.0, 3.0]] * 3)] * 5
    final = Comparison("adamw", scores).score("validation_loss").final
    assert final.value == pytest.approx(1.5)
    assert (final.low, final.high) == pytest.approx((1.5, 1.5))


def test_the_interval_has_the_spread_of_tasks_and_of_seeds() -> None:
    base = [[8.0, 4.0, 2.0]] * 3
    equal = task_scores(base, [[8.0, 4.0, 2.0]] * 3)
    double = task_scores(base, [[8.0, 4.0, 4.0]] * 3)
    tasks = Comparison("adamw", [equal, double] * 8).score("validation_loss").final
    assert tasks.value == pytest.approx(math.sqrt(2))
    # Of 16 tasks, each with a logarithm of 0 or log 2.
    deviation = 0.5 * math.log(2) / math.sqrt(16)
    assert math.log(tasks.high / tasks.low) == pytest.approx(2 * 1.96 * deviation, rel=0.15)
    seeds = Comparison("adamw", [task_scores(base, [[8.0, 4.0, x] for x in (1.0, 2.0, 4.0)])])
    final = seeds.score("validation_loss").final
    assert (final.low, final.value, final.high) == pytest.approx((0.5, 1.0, 2.0))


def test_tasks_without_an_error_do_not_count() -> None:
    scores = task_scores([[8.0, 2.0]] * 3, [[8.0, 2.0]] * 3)
    missing = task_scores([[8.0, 2.0]] * 3, [[8.0, 2.0]] * 3)
    for each in missing.baseline.rows + missing.runs["adamw"].rows:
        each["validation_error"] = [None, None]
    comparison = Comparison("adamw", [scores, missing])
    assert comparison.score("validation_error").tasks == 1
    assert comparison.score("validation_loss").tasks == 2


@pytest.mark.parametrize(
    ("loss", "other", "ratio"),
    [
        (2.0, 1.0, 2.0),
        (1e-9, 1e-8, 1.0),
        (1e-9, 1e-6, 0.1),
        (math.nan, 1.0, CAP),
        (1e9, 1.0, CAP),
        (math.inf, 1.0, CAP),
        (1.0, math.inf, 1 / CAP),
        (math.inf, math.inf, 1.0),
    ],
)
def test_ratios_have_floors_and_caps(loss: float, other: float, ratio: float) -> None:
    logs = log_ratio(np.array([loss]), np.array([other]), "loss")
    assert np.exp(logs) == pytest.approx([ratio])


def trials(task: str = TASK, best: int = 3) -> dict[Run, Row]:
    """The trials of a task, of which one is lower at the end than the others."""
    found: dict[Run, Row] = {}
    for index, name in enumerate(BASELINE):
        final = 0.5 if index == best else 1.0 + index
        # The lowest loss on the way is another trial's.
        values = [8.0, 0.1 if index == 7 else 4.0, final]
        found[Run(task, name, TRIAL_SEED)] = row(values, task=task, setting=name, seed=TRIAL_SEED)
    return found


def test_the_winner_of_the_trials_ends_lowest() -> None:
    records = trials()
    assert winner(records, TASK) == "trial-03"
    lost = records[Run(TASK, "trial-03", TRIAL_SEED)]
    lost["status"] = "diverged"
    assert winner(records, TASK) == "trial-00"
    del records[Run(TASK, "trial-00", TRIAL_SEED)]
    assert winner(records, TASK) is None


def test_the_baseline_is_the_reruns_of_the_winner() -> None:
    records = trials()
    assert gather(records) == []
    for seed in range(3):
        for setting, loss in (("trial-03", 1.0 + seed), ("adamw", 2.0)):
            run = Run(TASK, setting, seed)
            records[run] = row([8.0, 4.0, loss], setting=setting, seed=seed)
    (scores,) = gather(records)
    assert (scores.task, scores.trial) == (TASK, "trial-03")
    # Not the trial itself, which was chosen by its result.
    assert scores.baseline.final("validation_loss").tolist() == [1.0, 2.0, 3.0]
    assert scores.target("validation_loss") == 2.0
    assert scores.budget("passes") == 24.0


def test_runs_on_different_data_are_not_compared() -> None:
    records = trials()
    records[Run(TASK, "adamw", 0)] = row([8.0, 4.0, 2.0], data="other")
    with pytest.raises(RecordError, match="the records of few-data rest on different data, digest"):
        gather(records)


@pytest.fixture
def complete() -> dict[Run, Row]:
    """The records of two tasks, on one of which a setting diverges."""
    records: dict[Run, Row] = {}
    for task in (TASK, OTHER):
        records |= trials(task)
        for index, setting in enumerate(("trial-03", *ENTRANTS, *CONSTANTS)):
            for seed in range(3):
                losses = [8.0, 4.0, 2.0 + 0.1 * index + 0.01 * seed]
                records[Run(task, setting, seed)] = row(
                    losses, task=task, setting=setting, seed=seed
                )
    lost = records[Run(TASK, "momo-adam", 1)]
    lost["status"], lost["validation_loss"] = "diverged", [8.0, None, None]
    return records


def test_the_report(complete: dict[Run, Row], tmp_path: Path) -> None:
    pace = {name: {TASK: 1.5} for name in ENTRANTS}
    files = page.write(gather(complete), tmp_path, pace, "\n## Provenance\n")
    assert [file.name for file in files] == ["SELFTUNING.md", "selftuning.json"]
    text = files[0].read_text()
    headings = [line[3:] for line in text.splitlines() if line.startswith("## ")]
    assert headings[:3] == ["Validation loss", "Validation error", "Training loss"]
    assert "What the measured rate adds" in headings
    assert headings[-1] == "Provenance"
    # The first entrant is the first of the settings above, 0.1 above the baseline.
    assert f"| `lqa-auto` | 0 of 2 (0 to 0) | 0 (0 to 0) | {1 / HORIZON:g} (" in text
    assert "| few-data | 2.01 | 1.05 (1.05) |" in text
    assert "Recorded: 2 of 24 tasks." in text
    assert "| `lqa-auto` | 1.00 | 1.50 (1.50 to 1.50) | " in text
    values = json.loads(files[1].read_text())
    assert values["baseline"] == {TASK: "trial-03", OTHER: "trial-03"}
    assert values["settings"]["lqa-auto"]["validation_loss"]["final"]["value"] == pytest.approx(
        2.11 / 2.01
    )


def test_constant_rates_are_compared_at_the_seeds_of_all(complete: dict[Run, Row]) -> None:
    del complete[Run(TASK, "lqa-constant-0.001", 0)]
    few, rare = gather(complete)
    found = page.constant_losses(few)
    assert {losses.seeds for losses in found.values()} == {2}
    # The median of the two seeds left, 1 and 2.
    assert found["lqa-auto"].held_out == pytest.approx(2.115)
    assert {losses.seeds for losses in page.constant_losses(rare).values()} == {3}
    for seed in (1, 2):
        del complete[Run(TASK, "lqa-constant-0.001", seed)]
    assert page.constant_losses(gather(complete)[0]) == {}


def test_without_times_the_report_has_none(complete: dict[Run, Row], tmp_path: Path) -> None:
    text = page.write(gather(complete), tmp_path)[0].read_text()
    assert "| `lqa-auto` | 1.00 |  |  |  |" in text


def test_without_records_there_is_no_report(tmp_path: Path) -> None:
    assert page.write([], tmp_path) == []
    assert figures.draw([], tmp_path) == []


def test_the_picture(complete: dict[Run, Row], tmp_path: Path) -> None:
    files = figures.draw(gather(complete), tmp_path)
    assert [file.name for file in files] == ["selftuning.png", "selftuning.svg"]
    texts = files[1].read_text()
    assert all(f"<!-- {name} -->" in texts for name in ENTRANTS)


def test_records_are_read_as_they_were_written(complete: dict[Run, Row], tmp_path: Path) -> None:
    records = Records(Results(tmp_path / "results", tmp_path / "runs"))
    some = dict(list(complete.items())[:5])
    for each in some.values():
        records.add(each, {"machine": "here"})
    assert records.read() == some
    # A record of another length is that of another task.
    changed = next(iter(some.values())) | {"steps": 1}
    records.add(changed, {"machine": "here"})
    assert len(records.read()) == 4
