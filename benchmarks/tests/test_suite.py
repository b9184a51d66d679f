"""The suite: its runs, and what it makes of their records."""

import json
import math
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from synthetic import record

from quadstep_bench import figures
from quadstep_bench.markdown import read_table
from quadstep_bench.optimizers import CONSTANT_RATES, HAND_TUNED, PEERS, suite_settings
from quadstep_bench.ratios import FLOOR, ratio
from quadstep_bench.runner.files import RecordError
from quadstep_bench.runner.records import Epoch, Outcome, Record
from quadstep_bench.suite import SUBJECT, configs, goals, judge, write
from quadstep_bench.tasks import STRESS, SUITE, TASKS

TASK = "mlp-diabetes"
STRESSED = "mlp-digits-noisy"


def ended(
    task: str,
    optimizer: str,
    losses: Sequence[float],
    *,
    test: float | None = None,
    accuracy: float = 0.5,
    seed: int = 0,
    status: Outcome = "finished",
    data: str = "same",
) -> Record:
    """A run of the suite that stays at its last loss, with ten steps an epoch."""
    (config,) = configs(tasks=[task], optimizers=[optimizer])
    rest = config.epochs + 1 - len(losses)
    losses = [*losses, *[losses[-1]] * (rest if status == "finished" else 0)]
    made = record(task, optimizer, losses, status=status)

    def row(epoch: Epoch) -> Epoch:
        held_out = epoch.train_loss if test is None else test
        return replace(
            epoch, test_loss=held_out, test_accuracy=accuracy, backwards=10 * epoch.epoch
        )

    return replace(
        made,
        config=replace(config, seed=seed),
        data=data,
        epochs=tuple(map(row, made.epochs)),
    )


def with_held_out(run: Record, losses: Sequence[float]) -> Record:
    """The run with these held-out losses, the last of which stays."""
    losses = [*losses, *[losses[-1]] * (len(run.epochs) - len(losses))]
    rows = zip(run.epochs, losses, strict=True)
    return replace(run, epochs=tuple(replace(row, test_loss=loss) for row, loss in rows))


def complete(ours: float, best: float, peer: float) -> Iterator[Record]:
    """The complete suite, recorded with these final losses of 2 at first."""
    for task in SUITE:
        for name in suite_settings():
            tuned = best if name == "adam-0.001" else 2 * best
            end = ours if name == SUBJECT else peer if name in PEERS else tuned
            yield ended(task, name, [2.0, end])


def at_constant_rates(task: str, ends: Sequence[float], **options: Any) -> list[Record]:
    """Runs that end at these training losses, a constant rate each; one of inf has diverged."""
    return [
        ended(task, name, [1.0, math.nan], status="diverged", **options)
        if end == math.inf
        else ended(task, name, [1.0, end], **options)
        for name, end in zip(CONSTANT_RATES, ends, strict=True)
    ]


def beside_constant_rates() -> list[Record]:
    """Three tasks, of which the last lacks a constant, with another best for each loss."""
    digits = "mlp-digits"
    first = at_constant_rates(TASK, [0.8, 0.2, 0.1, 0.4, math.inf])
    held_out = [[0.8, 0.05, 0.8], [0.8], [0.8], [0.2], [math.nan]]
    second = at_constant_rates(digits, [0.4, 0.1, 0.4, 0.2, 0.8], test=0.6)
    second[3] = with_held_out(second[3], [0.3])
    return [
        *map(with_held_out, first, [[1.0, *losses] for losses in held_out]),
        *second,
        *at_constant_rates(STRESSED, [0.1] * 5)[:-1],
        ended(TASK, SUBJECT, [1.0, 0.2], test=0.4),
        ended(digits, SUBJECT, [1.0, 0.1], test=0.3),
        ended(STRESSED, SUBJECT, [1.0, 0.1]),
        *(ended(task, "sgd-0.1", [1.0, 0.5]) for task in (TASK, digits, STRESSED)),
    ]


def verdicts(records: Sequence[Record]) -> dict[str, str]:
    return {goal.id: goal.verdict for goal in goals(judge(records))}


def test_the_runs_are_those_of_the_tasks() -> None:
    runs = configs(seeds=2)
    assert len(runs) == 2 * len(SUITE) * len(suite_settings())
    assert len({(run.task, *run.identity) for run in runs}) == len(runs)
    (run,) = configs(tasks=["lenet-cifar10"], optimizers=["adamw-0.003"])
    assert (run.subset, run.batch_size) == (10_000, 64)
    assert run.epochs == SUITE["lenet-cifar10"].epochs != TASKS["lenet-cifar10"].epochs
    assert len(HAND_TUNED) == 18 + 5


def test_what_is_not_of_the_suite_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown task 'resnet18-cifar10': choose from logistic"):
        configs(tasks=["resnet18-cifar10"])
    with pytest.raises(ValueError, match="unknown optimizer 'lqa-paper': choose from lqa-auto"):
        configs(optimizers=["lqa-paper"])
    with pytest.raises(ValueError, match="seeds must be at least 1: got 0"):
        configs(seeds=0)


def test_the_accuracy_stands_beside_the_highest_of_any_hand_tuned_optimizer(tmp_path: Path) -> None:
    report, _ = write(
        judge(
            [
                ended("mlp-digits", SUBJECT, [1.0, 0.3], accuracy=0.9),
                ended("mlp-digits", "sgd-0.1", [1.0, 0.2], accuracy=0.8),
                ended("mlp-digits", "adamw-0.003", [1.0, 0.4], accuracy=0.95),
                ended("mlp-digits", "adam-0.1", [1.0, 0.4], accuracy=math.nan),
                ended("autoencoder-digits", SUBJECT, [1.0, 0.3], accuracy=math.nan),
                ended("autoencoder-digits", "sgd-0.1", [1.0, 0.2], accuracy=math.nan),
            ]
        ),
        tmp_path,
    )
    held_out = read_table(report.read_text(), "## Held-out loss")
    assert held_out["mlp-digits"][-1] == "90.0% (95.0%)"
    assert held_out["autoencoder-digits"][-1] == ""


def test_the_best_is_chosen_by_the_loss_that_it_is_compared_by() -> None:
    (outcome,) = judge(
        [
            ended(TASK, SUBJECT, [1.0, 0.3], test=0.6),
            ended(TASK, "sgd-0.1", [1.0, 0.2], test=0.9),
            ended(TASK, "adamw-0.003", [1.0, 0.4], test=0.5),
            ended(TASK, "prodigy", [1.0, 0.1], test=0.1),
        ]
    )
    assert (outcome.best, outcome.best_held_out) == ("sgd-0.1", "adamw-0.003")
    assert outcome.score.train_ratio == pytest.approx(1.5)
    assert outcome.score.test_ratio == pytest.approx(1.2)
    assert outcome.scores["prodigy"].train_ratio == pytest.approx(0.5)
    assert outcome.reached == math.inf
    assert not outcome.complete


def test_losses_are_medians_over_the_seeds_and_infinite_once_diverged() -> None:
    ends = [0.1, 0.3, 0.4]
    runs = [ended(TASK, SUBJECT, [1.0, end], seed=seed) for seed, end in enumerate(ends)]
    lost = ended(TASK, SUBJECT, [1.0, 50.0, math.nan], seed=3, status="diverged")
    tuned = ended(TASK, "sgd-0.1", [1.0, 0.1])
    (outcome,) = judge([*runs, tuned])
    assert outcome.score.train_loss == 0.3
    assert (outcome.score.seeds, outcome.score.diverged) == (3, 0)
    (outcome,) = judge([*runs[:1], lost, tuned])
    assert outcome.score.train_ratio == math.inf
    assert (outcome.score.seeds, outcome.score.diverged) == (2, 1)


def test_what_fits_its_data_is_level() -> None:
    assert ratio(1e-9, 1e-5) == ratio(1e-5, 1e-9) == 1.0
    assert ratio(2 * FLOOR, 1e-9) == pytest.approx(2.0)
    assert ratio(math.inf, math.inf) == 1.0
    assert ratio(1.0, math.inf) == 0.0
    assert ratio(math.inf, 1.0) == math.inf


@pytest.mark.parametrize(
    ("losses", "level", "epochs"),
    [
        pytest.param([1.0, 0.1, 0.001], 0.1, 1.0, id="at an epoch"),
        pytest.param([1.0, 0.1, 0.001], 0.01, 1.5, id="halfway on the logarithm"),
        pytest.param([1.0, 1e-2, 1e-8], 1e-6, 2.0, id="no further than the floor"),
        pytest.param([1.0, 0.5], 0.4, math.inf, id="never"),
        pytest.param([1.0, 0.5], 2.0, 0.1, id="at once, which is one step"),
    ],
)
def test_steps_are_counted_to_where_the_best_run_ends(
    losses: list[float], level: float, epochs: float
) -> None:
    (outcome,) = judge([ended(TASK, SUBJECT, losses), ended(TASK, "sgd-0.1", [1.0, level])])
    assert outcome.steps == 10 * TASKS[TASK].epochs
    assert outcome.reached == pytest.approx(epochs / TASKS[TASK].epochs)


def test_held_out_losses_are_compared_at_equal_training_losses(tmp_path: Path) -> None:
    mine = with_held_out(ended(TASK, SUBJECT, [1.0, 0.4, 0.2, 0.1]), [1.0, 0.5, 0.3, 0.9])
    tuned = ended(TASK, "sgd-0.1", [1.0, 0.3], test=0.6)
    early = ended(TASK, "adam-0.001", [1.0, 0.8], test=0.4)
    (outcome,) = judge([mine, tuned, early])
    assert outcome.score.test_ratio == pytest.approx(0.9 / 0.4)
    assert outcome.matched == pytest.approx(0.3 / 0.6)
    report, _ = write([outcome], tmp_path)
    assert read_table(report.read_text(), "## Held-out loss")[TASK][-3] == "0.5"
    assert "its held-out loss is 0.5 times the one of that run" in report.read_text()
    (outcome,) = judge([mine, ended(TASK, "sgd-0.1", [1.0, 0.05])])
    assert outcome.matched == math.inf


def test_both_losses_count_at_one_time_of_any_run(tmp_path: Path) -> None:
    mine = with_held_out(ended(TASK, SUBJECT, [1.0, 0.2, 0.1]), [1.0, 0.7, 0.9])
    tuned = ended(TASK, "sgd-0.1", [1.0, 0.3], test=0.8)
    early = ended(TASK, "adam-0.001", [1.0, 0.4], test=0.5)
    peer = with_held_out(ended(TASK, "momo", [1.0, 0.5, 0.3, 0.6]), [1.0, 0.1, 0.4, 0.2])
    lost = ended(TASK, "dog", [1.0, 0.1, math.nan], test=math.nan, status="diverged")
    (outcome,) = judge([mine, tuned, early, lost])
    assert outcome.joint == pytest.approx(0.7 / 0.5)
    (outcome,) = judge([mine, tuned, early, peer])
    assert outcome.joint == pytest.approx(0.4 / 0.5)
    report, _ = write([outcome], tmp_path)
    assert read_table(report.read_text(), "## Held-out loss")[TASK][-2] == "0.8"
    assert "in both losses at once on 100% of 1 tasks, at worst 0.8." in report.read_text()


def test_only_runs_of_the_suite_that_have_ended_count() -> None:
    mine, tuned = ended(TASK, SUBJECT, [1.0, 0.3]), ended(TASK, "sgd-0.1", [1.0, 0.2])
    assert judge([mine]) == judge([tuned]) == []
    (outcome,) = judge(
        [
            mine,
            tuned,
            replace(ended(TASK, "adam-0.1", [1.0, 0.0]), status="unfinished"),
            replace(ended(TASK, "adam-0.01", [1.0, 0.0]), config=replace(mine.config, subset=50)),
            record(TASK, "sgd-m-0.1", [1.0, 0.0]),
            record("resnet18-cifar10", SUBJECT, [1.0, 0.0]),
            record(TASK, "lqa-paper", [1.0, 0.0]),
        ]
    )
    assert set(outcome.scores) == {SUBJECT, "sgd-0.1"}


def test_of_a_longer_run_counts_what_the_suite_asks_for() -> None:
    mine, tuned = ended(TASK, SUBJECT, [1.0, 0.3]), ended(TASK, "sgd-0.1", [1.0, 0.2])
    further = replace(mine.epochs[-1], epoch=len(mine.epochs), train_loss=0.0)
    longer = replace(
        mine,
        config=replace(mine.config, epochs=mine.config.epochs + 1),
        epochs=(*mine.epochs, further),
    )
    assert judge([longer, tuned]) == judge([mine, tuned])


def test_runs_on_different_data_are_not_compared() -> None:
    runs = [ended(TASK, SUBJECT, [1.0]), ended(TASK, "sgd-0.1", [1.0], data="other")]
    with pytest.raises(RecordError, match=r"mlp-diabetes rest on different data, .*: delete those"):
        judge(runs)


@pytest.mark.parametrize(
    ("ours", "best", "peer", "failing"),
    [
        (0.02, 0.5, 0.5, set()),
        (0.52, 0.5, 0.6, {"a1", "a2", "b"}),
        (0.4, 0.5, 0.3, {"c"}),
        # The first loss is 2: these have stalled.
        (1.95, 1.9, 1.96, {"a1", "a2", "b", "d"}),
    ],
)
def test_the_goals(ours: float, best: float, peer: float, failing: set[str]) -> None:
    outcomes = judge(complete(ours, best, peer))
    assert {goal.id for goal in goals(outcomes) if goal.verdict == "fails"} == failing
    assert all(goal.verdict != "not run" and goal.complete for goal in goals(outcomes))


def test_one_task_far_behind_is_enough_to_fail() -> None:
    records = list(complete(0.1, 0.5, 0.5))
    index = next(i for i, run in enumerate(records) if run.config.optimizer == SUBJECT)
    records[index] = ended(records[index].config.task, SUBJECT, [2.0, 0.53])
    assert verdicts(records) == {"a1": "fails", "a2": "fails", "b": "fails", "c": "holds"} | {
        "d": "holds"
    }


@pytest.mark.parametrize(
    ("losses", "status", "survived"),
    [
        ([2.3, 2.0], "finished", True),
        ([2.3, 2.2], "finished", False),
        ([6e4, 2.2], "finished", False),
        ([6e4, 1.0], "finished", True),
        ([6e4 / 1.2**epoch for epoch in range(21)], "finished", True),
        ([6e4, *[90.0] * 10, *[85.0] * 10], "finished", False),
        ([2.3, *[9.0] * 10, *[3.0] * 10], "finished", False),
        ([2.3, 90.0, 90.0], "diverged", False),
    ],
)
def test_stress_must_be_survived(losses: list[float], status: Outcome, survived: bool) -> None:
    assert SUITE[STRESSED].group == STRESS
    runs = [ended(STRESSED, SUBJECT, losses, status=status), ended(STRESSED, "sgd-0.1", [2.3, 2])]
    assert verdicts(runs)["d"] == ("holds" if survived else "fails")
    assert verdicts(runs)["c"] == "not run"


def test_without_records_nothing_is_decided(tmp_path: Path) -> None:
    assert set(verdicts([]).values()) == {"not run"}
    report, _ = write([], tmp_path)
    assert f"Recorded: 0 of {len(SUITE)} tasks" in report.read_text()


def test_the_report(tmp_path: Path) -> None:
    outcomes = judge(
        [
            ended(TASK, SUBJECT, [1.0, 0.1]),
            ended(TASK, "adamw-0.003", [1.0, 0.2]),
            ended(TASK, "momo", [1.0, math.nan], status="diverged"),
            ended(STRESSED, SUBJECT, [2.3, 2.3]),
            ended(STRESSED, "adamw-0.003", [2.3, 2.3]),
        ]
    )
    report, values = write(outcomes, tmp_path)
    text = report.read_text()
    assert f"| {TASK} | AdamW 0.003 | 0.2 | 0.1 | 0.5 |" in text
    assert "| **fails so far** | mlp-digits-noisy (0 diverged, 1 stalled) |" in text
    assert "| 0.5 | ∞ |" in text
    assert "| lqa-auto level or ahead |  | 1 of 1 |" in text
    assert "(1 stalled)" in text

    def refuse(constant: str) -> Any:
        raise AssertionError(constant)

    found = json.loads(values.read_text(), parse_constant=refuse)
    assert [task["task"] for task in found["tasks"]] == [TASK, STRESSED]
    assert found["tasks"][0]["scores"]["momo"]["train_loss"] is None
    assert found["rules"]["floor"] == FLOOR
    before = report.read_bytes(), values.read_bytes()
    write(outcomes, tmp_path)
    assert (report.read_bytes(), values.read_bytes()) == before


def test_settings_with_a_schedule_stand_apart(tmp_path: Path) -> None:
    runs = [
        ended(TASK, SUBJECT, [1.0, 0.2], test=0.4),
        ended(TASK, "sgd-0.1", [1.0, 0.3], test=0.3),
        ended(TASK, "adamw-cosine-0.01", [1.0, 0.1], test=0.8),
        ended(TASK, "adamw-cosine-0.001", [1.0, 0.4], test=0.5),
    ]
    (outcome,) = judge(runs)
    assert (outcome.best, outcome.best_held_out) == ("sgd-0.1", "sgd-0.1")
    report, _ = write([outcome], tmp_path)
    text = report.read_text()
    assert read_table(text, "## With a schedule")[TASK] == [
        *("AdamW, cosine 0.01", "0.1", "2", "AdamW, cosine 0.001", "0.5", "0.8", "50.0% (50.0%)")
    ]
    assert "at or below the best of them on 0% of 1 tasks, at worst 2; held out, on 100%" in text
    write(judge(runs[:2]), tmp_path)
    assert "No setting with a schedule is recorded." in report.read_text()


def test_a_longer_run_with_a_schedule_is_another_one() -> None:
    mine, tuned = ended(TASK, SUBJECT, [1.0, 0.3]), ended(TASK, "sgd-0.1", [1.0, 0.2])
    cosine = ended(TASK, "adamw-cosine-0.01", [1.0, 0.1])
    longer = replace(cosine, config=replace(cosine.config, epochs=cosine.config.epochs + 1))
    assert "adamw-cosine-0.01" in judge([mine, tuned, cosine])[0].scores
    assert "adamw-cosine-0.01" not in judge([mine, tuned, longer])[0].scores


def test_one_setting_for_all_tasks(tmp_path: Path) -> None:
    ends = {SUBJECT: (0.1, 0.4), "sgd-0.1": (0.2, 0.2), "adam-0.01": (0.4, 1e9)}
    runs = [
        ended(task, name, [1.0, end], test=2 * end)
        for name, both in ends.items()
        for task, end in zip((TASK, "mlp-digits"), both, strict=True)
    ]
    report, _ = write(judge([*runs, ended(TASK, "momo", [1.0, 0.1])]), tmp_path)
    settings = read_table(report.read_text(), "## One setting for all tasks")
    # Both ratios of adam-0.01 to the best are 2 and more than a hundred, which counts as that.
    assert settings == {
        SUBJECT: ["1", "1", "1", "1", "1", "1"],
        "SGD 0.1": ["1", "1", "1", "2", "2", "2"],
        "Adam 0.01": [*[f"{200**0.5:.3g}"] * 3, "0", "0", "0"],
    }


def test_the_best_checkpoint_is_that_of_the_lowest_held_out_loss() -> None:
    mine = with_held_out(ended(TASK, SUBJECT, [1.0, 0.4]), [0.1, 0.5, 0.3, 0.9])
    (outcome,) = judge([mine, ended(TASK, "sgd-0.1", [1.0, 0.6]), ended(TASK, "dog", [1.0, 0.7])])
    # Before the first epoch nothing has been trained.
    assert outcome.score.checkpoint_ratio == pytest.approx(0.3 / 0.6)
    assert outcome.scores["dog"].checkpoint_ratio == pytest.approx(0.7 / 0.6)


def test_the_measured_rate_beside_constant_ones(tmp_path: Path) -> None:
    report, values = write(judge(beside_constant_rates()), tmp_path)
    text = report.read_text()
    assert read_table(text, "## What the measured rate adds") == {
        TASK: ["1", "0.001", "0.1", "0.2", "2", "2", "8", "1", "2", "8"],
        "mlp-digits": ["1", "0.0003", "0.1", "0.1", "1", "1", "1", "1", "1", "0.5"],
    }
    root, twice = f"{2**0.5:.3g}", f"{8**0.5:.3g}"
    assert read_table(text, "The geometric means of these ratios over 2 tasks") == {
        "final training loss": [root, "1 of 2", "0.0003", root, "1", "2 of 2"],
        "final held-out loss": [root, "1 of 2", "0.003", "1", root, "1 of 2"],
        "held-out loss of the best checkpoint": [twice, "1 of 2", "0.0001", root, "2", "1 of 2"],
    }
    found = json.loads(values.read_text())["constant_rates"]
    assert found["training"]["best"] == {
        TASK: "lqa-constant-0.001",
        "mlp-digits": "lqa-constant-0.0003",
    }
    assert found["held_out"]["single"] == "lqa-constant-0.003"
    assert found["best_checkpoint"]["to_single"]["by_task"][TASK] == pytest.approx(8.0)


def test_constant_rates_are_compared_over_the_seeds_that_all_have() -> None:
    def runs(seed: int, measured: float, constant: float) -> list[Record]:
        own = ended(TASK, SUBJECT, [1.0, measured], seed=seed)
        runs = [own, *at_constant_rates(TASK, [constant] * 5)]
        return [replace(run, config=replace(run.config, seed=seed)) for run in runs]

    tuned = ended(TASK, "sgd-0.1", [1.0, 0.5])
    both = [*runs(0, 0.1, 0.2), *runs(1, 0.3, 0.4)]
    # The last constant lacks seed 1, which ended higher.
    (outcome,) = judge([tuned, *both[:-1]])
    assert {losses.seeds for losses in outcome.by_rate.values()} == {1}
    assert outcome.by_rate[SUBJECT].training == 0.1
    assert outcome.by_rate["lqa-constant-0.0001"].training == 0.2
    assert outcome.score.train_loss == pytest.approx(0.2)
    (outcome,) = judge([tuned, *both])
    assert outcome.by_rate[SUBJECT].training == pytest.approx(0.2)
    # Each has a seed, but not the same one.
    (outcome,) = judge([tuned, *both[:5], both[-1]])
    assert outcome.by_rate == {}


def test_without_constant_rates_the_report_is_silent_about_them(tmp_path: Path) -> None:
    lacking = [run for run in beside_constant_rates() if run.config.task == STRESSED]
    outcomes = judge(lacking)
    report, values = write(outcomes, tmp_path)
    assert "What the measured rate adds" not in report.read_text()
    assert json.loads(values.read_text())["constant_rates"] == {}
    assert figures.draw_constant_rates(outcomes, tmp_path) == []


def test_constant_rates_change_no_goal() -> None:
    records = beside_constant_rates()
    others = [run for run in records if run.config.optimizer not in CONSTANT_RATES]
    assert goals(judge(records)) == goals(judge(others))


@pytest.fixture
def pictures(monkeypatch: pytest.MonkeyPatch) -> dict[str, Figure]:
    """The figures drawn, by the stem of the file, kept from being rendered."""
    kept: dict[str, Figure] = {}
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: kept.update({path.stem: self}))
    return kept


def test_the_picture_of_constant_rates(pictures: dict[str, Figure], tmp_path: Path) -> None:
    written = figures.draw_constant_rates(judge(beside_constant_rates()), tmp_path)
    assert [path.name for path in written] == ["constant-rates.png", "constant-rates.svg"]
    picture = pictures["constant-rates"]
    (legend,) = picture.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        f"{rate:g}" for rate in CONSTANT_RATES.values()
    ]
    training, best_checkpoint = picture.axes
    assert training.get_xscale() == "log"
    assert [label.get_text() for label in training.get_yticklabels()] == [TASK, "mlp-digits"]
    line, *dots = training.lines
    np.testing.assert_array_equal(line.get_xdata(), [1.0, 1.0])
    # The run that diverged lies on the edge.
    ratios = [[4.0, 4.0], [1.0, 1.0], [0.5, 4.0], [2.0, 2.0], [100.0, 8.0]]
    np.testing.assert_allclose([line.get_xdata() for line in dots], ratios)
    assert len({tuple(line.get_color()) for line in dots}) == len(CONSTANT_RATES)
    ratios = [[0.125, 2.0], [2.0, 2.0], [2.0, 2.0], [0.5, 1.0], [100.0, 2.0]]
    np.testing.assert_allclose([line.get_xdata() for line in best_checkpoint.lines[1:]], ratios)


def test_the_picture_of_the_suite_leaves_constant_rates_out(
    pictures: dict[str, Figure], tmp_path: Path
) -> None:
    figures.draw_suite(judge(beside_constant_rates()), tmp_path)
    for axes in pictures["suite"].axes:
        # Those of the hand-tuned setting and of the default, on three tasks.
        assert [len(line.get_xdata()) for line in axes.lines[1:]] == [3, 3]


def test_the_picture(tmp_path: Path) -> None:
    outcomes = judge(
        [
            ended(TASK, SUBJECT, [1.0, 0.1]),
            ended(TASK, "adamw-0.003", [1.0, 0.2]),
            ended(TASK, "lqa", [1.0, math.nan], status="diverged"),
            ended(TASK, "momo", [1.0, 0.3]),
        ]
    )
    written = figures.draw_suite(outcomes, tmp_path)
    assert [path.name for path in written] == ["suite.png", "suite.svg"]
    assert all(path.stat().st_size > 1000 for path in written)


def test_the_verdict_needs_no_torch() -> None:
    code = (
        "import sys, quadstep_bench.suite, quadstep_bench.figures; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
