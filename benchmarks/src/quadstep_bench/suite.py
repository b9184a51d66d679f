"""The suite: the default without a rate, judged against hand-tuned optimizers and peers.

The runs are listed here and trained by `quadstep_bench.runner.parallel`. The verdict rests on their
records alone; the goals that decide it were fixed before the runs.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from quadstep_bench import constant_rates
from quadstep_bench.curves import Array, Curve, Losses, display, title
from quadstep_bench.markdown import format_loss, format_ratio, format_table
from quadstep_bench.optimizers import (
    HAND_TUNED,
    PEERS,
    SCHEDULED,
    VARIANTS,
    WARM_UP,
    suite_settings,
)
from quadstep_bench.ratios import CAP, FLOOR, geometric_mean, ratio
from quadstep_bench.runner.files import RecordError, write_json, write_text
from quadstep_bench.runner.records import Config, Epoch, Record
from quadstep_bench.tasks import CLASSES, STRESS, SUITE, TASKS, check_name

SUBJECT = "lqa-auto"
"""Whom the goals are set for."""

MOST = 0.9
"""The share of the tasks that a goal asks for."""

WORST = 1.05
"""The greatest loss allowed on any task, as a multiple of the best hand-tuned one."""

FASTER = 0.5
"""The share of its steps within which to reach what the best hand-tuned run ends at."""

STALLED = 0.9
"""A run has stalled that has not got below this share of its first loss, or of the loss of guessing
among the classes where that is lower, nor below this share of the loss halfway."""


# The runs -----------------------------------------------------------------------------------------


def configs(
    *,
    tasks: Sequence[str] | None = None,
    optimizers: Sequence[str] | None = None,
    seeds: int = 1,
) -> list[Config]:
    """Lists the runs of the suite, all tasks and optimizers for one seed before the next seed.

    Args:
        tasks: Names of `SUITE`; all by default.
        optimizers: Names of `suite_settings`; all by default.
        seeds: How many seeds from 0 on.

    Raises:
        ValueError: A task or an optimizer is not of the suite, or there are no seeds.
    """
    for name in tasks or ():
        check_name("task", name, SUITE)
    for name in optimizers or ():
        check_name("optimizer", name, suite_settings())
    if seeds < 1:
        raise ValueError(f"seeds must be at least 1: got {seeds}")
    return [
        _config(task, optimizer, seed)
        for seed in range(seeds)
        for task in tasks or SUITE
        for optimizer in optimizers or suite_settings()
    ]


def _config(task: str, optimizer: str, seed: int) -> Config:
    part = SUITE[task]
    epochs = part.epochs or TASKS[task].epochs
    return Config(task, optimizer, seed, epochs, part.batch_size, part.subset)


# What the records say -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Score:
    """How the runs of an optimizer on a task ended.

    Attributes:
        train_loss: The median over the seeds of the last training loss; inf if diverged.
        test_loss: The same of the held-out loss.
        test_accuracy: The same of the held-out accuracy; nan if nothing is classified.
        train_ratio: The training loss over that of the hand-tuned optimizer with the lowest one.
        test_ratio: The held-out loss over that of the hand-tuned optimizer with the lowest one.
        checkpoint_ratio: The same of the held-out losses after the epochs where these are lowest.
        seconds: The median time that training took.
        seeds: How many runs there are.
        diverged: How many of them have diverged.
        stalled: How many of them have stalled; counted on stress tasks.
    """

    train_loss: float
    test_loss: float
    test_accuracy: float
    train_ratio: float
    test_ratio: float
    checkpoint_ratio: float
    seconds: float
    seeds: int
    diverged: int
    stalled: int


@dataclass(frozen=True)
class Outcome:
    """What the records say about a task.

    Attributes:
        task: Its name.
        scores: A score for each optimizer recorded.
        best: The hand-tuned optimizer with the lowest training loss.
        best_held_out: The hand-tuned optimizer with the lowest held-out loss.
        steps: How many steps a run takes.
        reached: After which share of the steps `SUBJECT` has come down to where the best hand-tuned
            run ends, inf if never; interpolated between epochs on the logarithm of the loss.
        matched: The held-out loss of `SUBJECT` after the first epoch at which it is there, over
            that of `best` at the end; inf if never.
        joint: The lowest held-out loss of any optimizer recorded, after any epoch at which it is
            there, over that of `best_held_out` at the end: whether both goals can be met at once.
        by_rate: The losses of `SUBJECT` and of every constant rate, see
            `quadstep_bench.constant_rates.final_losses`.
    """

    task: str
    scores: Mapping[str, Score]
    best: str
    best_held_out: str
    steps: int
    reached: float
    matched: float
    joint: float
    by_rate: Mapping[str, Losses]

    @property
    def score(self) -> Score:
        """That of `SUBJECT`."""
        return self.scores[SUBJECT]

    @property
    def complete(self) -> bool:
        """Whether no hand-tuned optimizer is missing, and nobody has fewer seeds than `SUBJECT`."""
        return all(
            name in self.scores and self.scores[name].seeds >= self.score.seeds
            for name in HAND_TUNED
        )


def judge(records: Iterable[Record]) -> list[Outcome]:
    """Judges every task that has ended runs of `SUBJECT` and of a hand-tuned optimizer.

    Raises:
        RecordError: Runs of one task were trained on different data.
    """
    runs: defaultdict[str, defaultdict[str, list[Record]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        config = record.config
        if config.task not in SUITE or config.optimizer not in suite_settings():
            continue
        wanted = _config(config.task, config.optimizer, config.seed)
        if replace(config, epochs=wanted.epochs) == wanted and record.satisfies(wanted.epochs):
            # Of a longer run counts what the suite asks for.
            epochs = record.epochs[: wanted.epochs + 1]
            runs[config.task][config.optimizer].append(
                replace(record, config=wanted, epochs=epochs)
            )
    for task in runs:
        _check_data(task, [run for own in runs[task].values() for run in own])
    return [
        _outcome(task, {name: Curve(name, tuple(own)) for name, own in runs[task].items()})
        for task in SUITE
        if SUBJECT in runs[task] and not HAND_TUNED.keys().isdisjoint(runs[task])
    ]


@dataclass(frozen=True)
class Comparison:
    """How a setting compares with the best hand-tuned one, which is another one on each task.

    Attributes:
        training: The geometric mean over the tasks of the ratios of final training losses.
        held_out: The same of final held-out losses.
        best_checkpoint: The same of held-out losses after the epochs where these are lowest.
        won_training: On how many tasks the ratio of final training losses is at most 1.
        won_held_out: The same of final held-out losses.
        won_best_checkpoint: The same of held-out losses after the epochs where these are lowest.
    """

    training: float
    held_out: float
    best_checkpoint: float
    won_training: int
    won_held_out: int
    won_best_checkpoint: int

    @property
    def means(self) -> tuple[float, float, float]:
        """The three means."""
        return self.training, self.held_out, self.best_checkpoint

    @property
    def won(self) -> tuple[int, int, int]:
        """The three numbers of tasks."""
        return self.won_training, self.won_held_out, self.won_best_checkpoint


def compare(outcomes: Sequence[Outcome]) -> dict[str, Comparison]:
    """Compares every setting that is recorded on all of the tasks with the best hand-tuned ones."""
    found: dict[str, Comparison] = {}
    for name in suite_settings():
        scores = [outcome.scores[name] for outcome in outcomes if name in outcome.scores]
        if not scores or len(scores) < len(outcomes):
            continue
        columns = [
            [score.train_ratio for score in scores],
            [score.test_ratio for score in scores],
            [score.checkpoint_ratio for score in scores],
        ]
        training, held_out, best_checkpoint = map(geometric_mean, columns)
        won = (sum(value <= 1.0 for value in ratios) for ratios in columns)
        found[name] = Comparison(training, held_out, best_checkpoint, *won)
    return found


def _check_data(task: str, runs: Collection[Record]) -> None:
    digests = {run.data for run in runs}
    if len(digests) > 1:
        raise RecordError(
            f"the records of {task} rest on different data, {', '.join(map(str, digests))}: "
            f"delete those of one from {task}.jsonl to run them again"
        )


def _outcome(task: str, curves: Mapping[str, Curve]) -> Outcome:
    tuned = [name for name in HAND_TUNED if name in curves]
    final = {name: curve.final for name, curve in curves.items()}
    train = {name: losses.training for name, losses in final.items()}
    test = {name: losses.held_out for name, losses in final.items()}
    lowest = {name: losses.best_checkpoint for name, losses in final.items()}
    best, best_held_out = min(tuned, key=train.__getitem__), min(tuned, key=test.__getitem__)
    subject = curves[SUBJECT]
    steps = max(run.epochs[-1].backwards // (len(run.epochs) - 1) for run in subject.runs)
    epochs = subject.runs[0].config.epochs
    return Outcome(
        task=task,
        scores={
            name: Score(
                train_loss=train[name],
                test_loss=test[name],
                test_accuracy=_at_end(curve, lambda epoch: epoch.test_accuracy),
                train_ratio=ratio(train[name], train[best]),
                test_ratio=ratio(test[name], test[best_held_out]),
                checkpoint_ratio=ratio(lowest[name], min(map(lowest.__getitem__, tuned))),
                seconds=_at_end(curve, lambda epoch: epoch.seconds),
                seeds=len(curve.runs),
                diverged=sum(run.status == "diverged" for run in curve.runs),
                stalled=sum(map(_stalled, curve.runs)) if SUITE[task].group == STRESS else 0,
            )
            for name, curve in curves.items()
        },
        best=best,
        best_held_out=best_held_out,
        steps=steps * epochs,
        reached=max(_reached(subject.median, train[best]) / epochs, 1 / (steps * epochs)),
        matched=_matched(subject, train[best], test[best]),
        joint=_joint(curves.values(), train[best], test[best_held_out]),
        by_rate=constant_rates.final_losses(curves),
    )


def _at_end(curve: Curve, value: Callable[[Epoch], float]) -> float:
    """The median over the seeds of what their last epochs hold."""
    return float(np.median([value(run.epochs[-1]) for run in curve.runs]))


def _reached(losses: Array, level: float) -> float:
    """The epoch, with its fraction, at which the losses first come down to a level."""
    losses, level = np.maximum(losses, FLOOR), max(level, FLOOR)
    below = np.flatnonzero(losses <= level)
    if not len(below):
        return math.inf
    after = int(below[0])
    if after == 0 or not np.isfinite(losses[after - 1]):
        return float(after)
    start, end = math.log(losses[after - 1]), math.log(losses[after])
    return after - 1 + (start - math.log(level)) / (start - end)


def _matched(curve: Curve, train_loss: float, test_loss: float) -> float:
    """The held-out loss over `test_loss` where the training loss is first down to `train_loss`."""
    reached = np.flatnonzero(curve.median <= max(train_loss, FLOOR))
    if not len(reached):
        return math.inf
    return ratio(float(np.median(curve.held_out[:, reached[0]])), test_loss)


def _joint(curves: Iterable[Curve], train_loss: float, test_loss: float) -> float:
    """The lowest held-out loss over `test_loss` where a training loss is down to `train_loss`."""
    return min(
        (
            ratio(float(held_out), test_loss)
            for curve in curves
            for loss, held_out in zip(curve.median, np.median(curve.held_out, axis=0), strict=True)
            if loss <= max(train_loss, FLOOR) and not math.isnan(held_out)
        ),
        default=math.inf,
    )


def _stalled(run: Record) -> bool:
    first, half, last = (run.epochs[index].train_loss for index in (0, len(run.epochs) // 2, -1))
    # Still to fall is not to have stalled: from badly scaled weights the way is long.
    limit = STALLED * max(min(first, math.log(CLASSES)), min(first, half))
    return run.status != "diverged" and not last <= limit


# The goals ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Goal:
    """A goal and what became of it.

    Attributes:
        id: A letter.
        text: What is asked for.
        verdict: Whether it is met on the tasks recorded; "not run" without any.
        measured: The numbers that decide it.
        complete: Whether every task of the suite is recorded in full.
    """

    id: str
    text: str
    verdict: Literal["holds", "fails", "not run"]
    measured: str
    complete: bool


def goals(outcomes: Sequence[Outcome]) -> list[Goal]:
    """Decides the goals."""
    stress = [outcome for outcome in outcomes if SUITE[outcome.task].group == STRESS]
    shares = ahead(outcomes)
    every = len(outcomes) == len(SUITE)
    tuned = every and all(outcome.complete for outcome in outcomes)
    peers = every and all(PEERS.keys() <= outcome.scores.keys() for outcome in outcomes)

    def goal(
        id: str, text: str, seen: Collection[Any], complete: bool, decide: Callable[[], Any]
    ) -> Goal:
        if not seen:
            return Goal(id, text, "not run", "", complete=False)
        holds, measured = decide()
        return Goal(id, text, "holds" if holds else "fails", measured, complete)

    level = (
        f"at or below the best hand-tuned optimizer on at least {MOST:.0%} of the tasks, and never "
        f"above {WORST} times it"
    )
    return [
        goal(
            "a1",
            f"final training loss {level}",
            outcomes,
            tuned,
            lambda: _level([outcome.score.train_ratio for outcome in outcomes]),
        ),
        goal(
            "a2",
            f"final held-out loss {level}",
            outcomes,
            tuned,
            lambda: _level([outcome.score.test_ratio for outcome in outcomes]),
        ),
        goal(
            "b",
            "the final training loss of the best hand-tuned optimizer is reached within "
            f"{FASTER:g} of the steps, as a geometric mean over the tasks",
            outcomes,
            tuned,
            lambda: _speed([outcome.reached for outcome in outcomes]),
        ),
        goal(
            "c",
            f"final training loss at or below each peer's on at least {MOST:.0%} of the tasks",
            shares,
            peers,
            lambda: _ahead(shares),
        ),
        goal(
            "d",
            "no run diverges or stalls on a stress task",
            stress,
            every,
            lambda: _survived(stress),
        ),
    ]


def ahead(outcomes: Sequence[Outcome]) -> dict[str, tuple[int, int]]:
    """Counts for each peer the tasks on which `SUBJECT` is not behind, and those recorded."""
    counts: dict[str, tuple[int, int]] = {}
    for peer in PEERS:
        levels = [
            ratio(outcome.score.train_loss, outcome.scores[peer].train_loss) <= 1.0
            for outcome in outcomes
            if peer in outcome.scores
        ]
        if levels:
            counts[peer] = (sum(levels), len(levels))
    return counts


def _level(ratios: Sequence[float]) -> tuple[bool, str]:
    share = sum(value <= 1.0 for value in ratios) / len(ratios)
    holds = share >= MOST and max(ratios) <= WORST
    return holds, f"{share:.0%} of {len(ratios)} tasks, at worst {format_ratio(max(ratios))}"


def _speed(reached: Sequence[float]) -> tuple[bool, str]:
    known = [value for value in reached if math.isfinite(value)]
    mean = float(np.exp(np.mean(np.log(known)))) if known else math.inf
    words = f"{_share(mean)} of the steps where it is reached, on {len(known)} of {len(reached)}"
    return len(known) == len(reached) and mean <= FASTER, f"{words} tasks"


def _ahead(shares: Mapping[str, tuple[int, int]]) -> tuple[bool, str]:
    worst = min(shares, key=lambda peer: shares[peer][0] / shares[peer][1])
    won, of = shares[worst]
    return won / of >= MOST, f"at worst {won} of {of} tasks, against {worst}"


def _survived(outcomes: Sequence[Outcome]) -> tuple[bool, str]:
    lost = [
        f"{outcome.task} ({outcome.score.diverged} diverged, {outcome.score.stalled} stalled)"
        for outcome in outcomes
        if outcome.score.diverged or outcome.score.stalled
    ]
    return not lost, ", ".join(lost) or f"all runs of {len(outcomes)} tasks went through"


# The report ---------------------------------------------------------------------------------------


def write(outcomes: Sequence[Outcome], out: Path, provenance: str = "") -> list[Path]:
    """Writes the verdict for people and for programs, and returns the files.

    Args:
        outcomes: What `judge` found.
        out: The folder for `SUITE.md` and `suite.json`.
        provenance: A section that the page ends with.

    Raises:
        OSError: A file cannot be written.
    """
    page, values = out / "SUITE.md", out / "suite.json"
    write_text(_report(outcomes) + provenance, page)
    rules = {
        "floor": FLOOR,
        "most": MOST,
        "worst": WORST,
        "faster": FASTER,
        "cap": CAP,
        "stalled": STALLED,
    }
    rows = {
        "rules": rules,
        "goals": [asdict(goal) for goal in goals(outcomes)],
        "tasks": [asdict(outcome) for outcome in outcomes],
        "constant_rates": {
            measure: asdict(found)
            for measure, found in constant_rates.compare(_by_rate(outcomes)).items()
        },
    }
    write_json(rows, values)
    return [page, values]


def _report(outcomes: Sequence[Outcome]) -> str:
    lines = [
        "# The suite",
        "",
        f"Written by `quadstep-bench report` from the records in `suite`. `{SUBJECT}` has no rate; "
        f"the hand-tuned optimizers are the best, on each task anew, of {len(HAND_TUNED)}: the "
        "paper's 18 competitors and AdamW at five rates. The peers run at their defaults.",
        "",
        f"Recorded: {len(outcomes)} of {len(SUITE)} tasks, "
        f"{sum(outcome.complete for outcome in outcomes)} of them with every hand-tuned optimizer.",
        "",
        *format_table(
            ["goal", "", "verdict", "measured"],
            [
                [goal.id, goal.text, f"**{_verdict(goal)}**", goal.measured]
                for goal in goals(outcomes)
            ],
        ),
        "",
        "## Training loss",
        "",
        *format_table(
            [
                "task",
                "best hand-tuned",
                "its loss",
                SUBJECT,
                "ratio",
                *VARIANTS,
                "steps",
                "seconds",
            ],
            [_training_row(outcome) for outcome in outcomes],
        ),
        "",
        "## Held-out loss",
        "",
        *format_table(
            [
                "task",
                "best hand-tuned",
                "its loss",
                SUBJECT,
                "ratio",
                *VARIANTS,
                "matched",
                "joint",
                "accuracy",
            ],
            [_held_out_row(outcome) for outcome in outcomes],
        ),
        *_matched_lines(outcomes),
        *_scheduled_lines(outcomes),
        *_peer_lines(outcomes),
        *_untuned_lines(outcomes),
        *constant_rates.format_section(_by_rate(outcomes)),
        "",
        "## The tasks",
        "",
        *format_table(
            ["task", "group", "", "loss", "batch", "epochs", "n"],
            [_task_row(task, outcomes) for task in SUITE],
        ),
    ]
    return "\n".join([*lines, "", _READING])


def _training_row(outcome: Outcome) -> list[str]:
    best = outcome.scores[outcome.best]
    return [
        outcome.task,
        display(outcome.best),
        format_loss(best.train_loss),
        format_loss(outcome.score.train_loss) + _casualties(outcome.score),
        *_ratios(outcome, [SUBJECT, *VARIANTS], lambda score: score.train_ratio),
        _steps(outcome),
        f"{outcome.score.seconds:.1f} ({best.seconds:.1f})",
    ]


def _held_out_row(outcome: Outcome) -> list[str]:
    return [
        outcome.task,
        display(outcome.best_held_out),
        format_loss(outcome.scores[outcome.best_held_out].test_loss),
        format_loss(outcome.score.test_loss),
        *_ratios(outcome, [SUBJECT, *VARIANTS], lambda score: score.test_ratio),
        format_ratio(outcome.matched),
        format_ratio(outcome.joint),
        _accuracy(outcome, HAND_TUNED),
    ]


def _matched_lines(outcomes: Sequence[Outcome]) -> list[str]:
    if not outcomes:
        return []
    ratios = [outcome.matched for outcome in outcomes]
    mean = format_ratio(geometric_mean(ratios))
    return [
        "",
        f"Where the training loss of `{SUBJECT}` is first down to where the run with the lowest "
        f"one ends, its held-out loss is {mean} times the one of that run "
        f"(geometric mean, a ratio and its inverse count as {CAP:g} at most), and at or below it "
        f"on {_level(ratios)[1]}.",
        "",
        "Some setting of all those recorded, chosen afterwards on each task together with the "
        "epoch to stop at, is at or below the best hand-tuned optimizer in both losses at once on "
        f"{_level([outcome.joint for outcome in outcomes])[1]}.",
    ]


def _scheduled_lines(outcomes: Sequence[Outcome]) -> list[str]:
    rows: list[list[str]] = []
    train: list[float] = []
    held_out: list[float] = []
    for outcome in outcomes:
        scores = {name: outcome.scores[name] for name in SCHEDULED if name in outcome.scores}
        if not scores:
            continue
        best = min(scores, key=lambda name: scores[name].train_loss)
        best_held_out = min(scores, key=lambda name: scores[name].test_loss)
        train.append(ratio(outcome.score.train_loss, scores[best].train_loss))
        held_out.append(ratio(outcome.score.test_loss, scores[best_held_out].test_loss))
        rows.append(
            [
                outcome.task,
                display(best),
                format_loss(scores[best].train_loss),
                format_ratio(train[-1]),
                display(best_held_out),
                format_loss(scores[best_held_out].test_loss),
                format_ratio(held_out[-1]),
                _accuracy(outcome, scores),
            ]
        )
    if not rows:
        return ["", "No setting with a schedule is recorded."]
    return [
        "",
        "## With a schedule",
        "",
        f"AdamW with a linear warm-up over {WARM_UP:.0%} of the run and then half a cosine down to "
        f"zero, the best of {len(SCHEDULED)} highest rates; unlike `{SUBJECT}` it has to know "
        "beforehand how long the run is. No goal is set here.",
        "",
        *format_table(
            [
                "task",
                "best for training",
                "its loss",
                "ratio",
                "best for held-out",
                "its loss",
                "ratio",
                "accuracy",
            ],
            rows,
        ),
        "",
        f"In training `{SUBJECT}` is at or below the best of them on {_level(train)[1]}; held out, "
        f"on {_level(held_out)[1]}.",
    ]


def _peer_lines(outcomes: Sequence[Outcome]) -> list[str]:
    shares = ahead(outcomes)
    if not shares:
        return ["", "No peer is recorded."]
    rows = [
        [outcome.task, *_ratios(outcome, [SUBJECT, *shares], lambda score: score.train_ratio)]
        for outcome in outcomes
    ]
    total = [f"{won} of {of}" for won, of in shares.values()]
    return [
        "",
        "## Peers",
        "",
        "Final training loss, as a multiple of the best hand-tuned one; below, on how many tasks "
        f"`{SUBJECT}` is not behind.",
        "",
        *format_table(
            ["task", SUBJECT, *shares], [*rows, [f"{SUBJECT} level or ahead", "", *total]]
        ),
    ]


def _untuned_lines(outcomes: Sequence[Outcome]) -> list[str]:
    """Compares what every setting does that is recorded on all of the tasks."""
    found = compare(outcomes)
    if not found:
        return []
    rows = [
        [display(name), *map(format_ratio, each.means), *map(str, each.won)]
        for name, each in sorted(found.items(), key=lambda pair: pair[1].means)
    ]
    return [
        "",
        "## One setting for all tasks",
        "",
        "What a user gets who tunes nothing: final losses as multiples of those of the best "
        f"hand-tuned optimizer, which is another one on each task, as geometric means over "
        f"{len(outcomes)} tasks (a ratio and its inverse count as {CAP:g} at most), and on how "
        "many tasks they are at or below it; *best checkpoint*: the held-out loss of the epoch "
        "where it is lowest, as one has it who validates after each and keeps the best, over the "
        "lowest such loss of any hand-tuned optimizer.",
        "",
        *format_table(
            [
                *("setting", "training", "held-out", "best checkpoint"),
                *("tasks, training", "tasks, held-out", "tasks, best checkpoint"),
            ],
            rows,
        ),
    ]


def _by_rate(outcomes: Iterable[Outcome]) -> dict[str, Mapping[str, Losses]]:
    return {outcome.task: outcome.by_rate for outcome in outcomes}


def _ratios(
    outcome: Outcome, names: Iterable[str], ratio: Callable[[Score], float]
) -> Iterator[str]:
    for name in names:
        yield format_ratio(ratio(outcome.scores[name])) if name in outcome.scores else ""


def _task_row(task: str, outcomes: Iterable[Outcome]) -> list[str]:
    config = _config(task, SUBJECT, 0)
    subset = "" if config.subset is None else f", {config.subset:,} examples"
    seeds = [outcome.score.seeds for outcome in outcomes if outcome.task == task]
    return [
        task,
        SUITE[task].group,
        title(task) + subset,
        TASKS[task].loss,
        str(config.batch_size),
        str(config.epochs),
        str(*seeds) if seeds else "not run",
    ]


def _verdict(goal: Goal) -> str:
    return goal.verdict if goal.complete or goal.verdict == "not run" else f"{goal.verdict} so far"


def _casualties(score: Score) -> str:
    lost = [f"{score.diverged} diverged"] * bool(score.diverged)
    lost += [f"{score.stalled} stalled"] * bool(score.stalled)
    return f" ({', '.join(lost)})" if lost else ""


def _steps(outcome: Outcome) -> str:
    if math.isinf(outcome.reached):
        return "not reached"
    return f"{_share(outcome.reached)} of {outcome.steps:,}"


def _accuracy(outcome: Outcome, others: Iterable[str]) -> str:
    if math.isnan(outcome.score.test_accuracy):
        return ""
    known = [outcome.scores[name].test_accuracy for name in others if name in outcome.scores]
    return f"{outcome.score.test_accuracy:.1%} ({np.nanmax(known):.1%})"


def _share(value: float) -> str:
    return f"{value:.2f}" if math.isfinite(value) else "∞"


_READING = f"""
## How to read it

- Losses are those at the end of a run, over the full training set and the held-out set, in
  evaluation mode; medians over n seeds. A run that has diverged counts as an infinite loss.
- A loss below {FLOOR:g} counts as {FLOOR:g}, in ratios and in steps: two models that fit
  their data are level, and rounding does not decide between them.
- The best hand-tuned optimizer is chosen on each task by the very loss that it is compared by, for
  training and held-out loss separately, with the same seeds: the choice is in its favour.
- *ratio*: the loss over that of the best hand-tuned optimizer; *lqa*: the same for `lqa`;
  *lqa-adamw*: the same for `LQA(torch.optim.AdamW(params))`; *lqa-sgdm*: the same for
  `LQA(torch.optim.SGD(params, lr=0.01, momentum=0.9))`; *lqa-auto-decay*: the same for
  `LQA(params, weight_decay=0.1)`.
- *steps*: after which share of its steps `{SUBJECT}` has come down to where the best hand-tuned run
  ends, between epochs on the logarithm of the loss. A task on which it is not reached makes goal b
  fail.
- *matched*: the held-out loss of `{SUBJECT}` after the first epoch at which its training loss is
  at or below that of the best hand-tuned optimizer for training, over the held-out loss of that
  one.
- *joint*: the lowest held-out loss of any setting recorded, after any epoch at which its training
  loss is at or below that of the best hand-tuned optimizer for training, over the held-out loss of
  the best one for that: where it is above 1 no setting has met both goals at any time.
- *accuracy*: of `{SUBJECT}` on the held-out set, beside the highest of any hand-tuned optimizer,
  or of any with a schedule.
- *seconds*: training alone, beside that of the best hand-tuned optimizer; runs that share a
  machine slow each other down.
- *stalled*: a stress run that ends above {STALLED:g} times its first loss, or above {STALLED:g}
  times the loss of guessing, log {CLASSES}, where that is lower, and is not falling any more: it
  also ends above {STALLED:g} times its own loss halfway.
- On a task whose loss is scaled, what is trained is scaled and what is recorded is not.
- The text is that of the Python that ran it: records of one task hold the digest of their data,
  and records with different digests are not compared.
"""
