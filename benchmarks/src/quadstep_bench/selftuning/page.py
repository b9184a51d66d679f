"""The report of the self-tuning benchmark: a page for people, numbers for programs."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from quadstep_bench.constant_rates import MEASURED, format_section
from quadstep_bench.curves import Losses
from quadstep_bench.markdown import format_ratio, format_table
from quadstep_bench.optimizers import CONSTANT_RATES
from quadstep_bench.runner.files import write_json, write_text
from quadstep_bench.selftuning.entrants import (
    CONSTANTS,
    ENTRANTS,
    SETTINGS,
    SPACE,
    TRIALS,
    WARM_UPS,
)
from quadstep_bench.selftuning.problem import GROUPS, TRAINING_EXAMPLES
from quadstep_bench.selftuning.runs import EVALUATIONS, SEEDS, TRIAL_SEED
from quadstep_bench.selftuning.score import (
    CAP,
    EARLIEST,
    FLOORS,
    HORIZON,
    MEASURES,
    RESAMPLES,
    Comparison,
    Measure,
    Runs,
    Score,
    TaskScores,
    compare,
)
from quadstep_bench.selftuning.tasks import TASKS

StepTimes = Mapping[str, Mapping[str, float]]
"""For each setting the time of its step over that of AdamW's, by task."""


def write(
    scores: Sequence[TaskScores],
    out: Path,
    step_times: StepTimes | None = None,
    provenance: str = "",
) -> list[Path]:
    """Writes the results for people and for programs, and returns the files.

    Args:
        scores: What `gather` found.
        out: The folder for `SELFTUNING.md` and `selftuning.json`.
        step_times: What `quadstep_bench.selftuning.timing` measured, if it has.
        provenance: A section that the page ends with.

    Raises:
        OSError: A file cannot be written.
    """
    if not scores:
        return []
    compared = compare(scores, [*ENTRANTS, *CONSTANTS])
    times = step_times or {}
    tables = {name: _EntrantScores(each, times.get(name, {})) for name, each in compared.items()}
    page, values = out / "SELFTUNING.md", out / "selftuning.json"
    write_text("\n".join(_page(scores, tables)) + provenance, page)
    write_json(_values(scores, tables), values)
    return [page, values]


class _EntrantScores:
    """An entrant's scores by every measure, computed once."""

    def __init__(self, comparison: Comparison, step_times: Mapping[str, float]) -> None:
        self.comparison = comparison
        self.step_times = step_times
        self.scores: dict[Measure, Score] = {
            measure: comparison.score(measure) for measure in MEASURES
        }
        timed = [each for each in comparison.scores if each.task in step_times]
        self.timed = (
            Comparison(comparison.setting, timed).score("validation_loss", step_times)
            if timed
            else None
        )
        self.groups = {
            name: Comparison(comparison.setting, part).score("validation_loss")
            for name, part in _parts(comparison.scores).items()
            if part
        }

    @property
    def rank(self) -> tuple[float, float]:
        """What the tables are sorted by: targets reached, then the last validation loss."""
        score = self.scores["validation_loss"]
        return -score.reached.value, score.final.value


def _parts(scores: Sequence[TaskScores]) -> dict[str, list[TaskScores]]:
    """The tasks by group, and those that decisions may rest on beside those to confirm them."""
    named = {
        group: [each for each in scores if TASKS[each.task].group == group] for group in GROUPS
    }
    confirm = {each.task for each in scores if TASKS[each.task].confirm}
    return {
        **named,
        "decide": [each for each in scores if each.task not in confirm],
        "confirm": [each for each in scores if each.task in confirm],
    }


def _page(scores: Sequence[TaskScores], tables: Mapping[str, _EntrantScores]) -> list[str]:
    entrants = sorted((name for name in tables if name in ENTRANTS), key=lambda n: tables[n].rank)
    return [
        "# Self-tuning",
        "",
        "Written by `quadstep-bench report` from the records in `selftuning`. Each setting is the "
        f"same on all tasks; the baseline, AdamW, is tuned on each: the best of {TRIALS} random "
        f"settings by the final validation loss, run {SEEDS} more times. Every run of a task takes "
        "the same number of steps.",
        "",
        f"Recorded: {len(scores)} of {len(TASKS)} tasks.{_left_out(tables)}",
        "",
        "## Validation loss",
        "",
        *_measure_table(entrants, tables, "validation_loss"),
        "",
        "## Validation error",
        "",
        *_measure_table(entrants, tables, "validation_error"),
        "",
        "## Training loss",
        "",
        "Not what the baseline was tuned for.",
        "",
        *_measure_table(entrants, tables, "train_loss"),
        "",
        "## Groups",
        "",
        "Validation loss, final and lowest, as multiples of the baseline's, "
        "geometric means. No decision may rest on the tasks to confirm.",
        "",
        *format_table(
            ["setting", *(_heading(part, scores) for part in _parts(scores))],
            [
                [f"`{name}`", *(_pair(tables[name].groups.get(part)) for part in _parts(scores))]
                for name in entrants
            ],
        ),
        "",
        *_time_lines(entrants, tables),
        "## Test",
        "",
        "As multiples of the baseline's, geometric means; *best*: where the validation loss was "
        "lowest.",
        "",
        *format_table(
            ["setting", "loss", "loss, best", "error", "error, best"],
            [
                [
                    f"`{name}`",
                    *(
                        str(tables[name].comparison.test(what, kind))
                        for kind in ("loss", "error")
                        for what in ("final", "best")
                    ),
                ]
                for name in entrants
            ],
        ),
        "",
        *format_section({each.task: constant_losses(each) for each in scores}),
        "",
        "## Tasks",
        "",
        "Final validation loss as a multiple of the baseline's (the median run), in brackets the "
        "same of the lowest after any evaluation.",
        "",
        *format_table(
            ["task", "baseline", *entrants],
            [
                [
                    each.task,
                    f"{np.median(each.baseline.final('validation_loss')):.4g}",
                    *(_task_ratios(each, name) for name in entrants),
                ]
                for each in scores
            ],
        ),
        "",
        *format_table(
            ["task", "group", "", "steps", "the baseline's setting", "target: loss", "error"],
            [
                [
                    each.task,
                    TASKS[each.task].group + ", to confirm" * TASKS[each.task].confirm,
                    TASKS[each.task].text,
                    f"{TASKS[each.task].steps:,}",
                    SETTINGS[each.trial].text,
                    f"{each.target('validation_loss'):.4g}",
                    _error(each.target("validation_error")),
                ]
                for each in scores
            ],
        ),
        "",
        "## Settings",
        "",
        *format_table(["setting", ""], [[f"`{name}`", SETTINGS[name].text] for name in entrants]),
        "",
        _NOTES,
    ]


def constant_losses(each: TaskScores) -> dict[str, Losses]:
    """The losses of the default and of its direction at constant rates, at the seeds of all."""
    names = (MEASURED, *CONSTANT_RATES)
    if not each.runs.keys() >= set(names):
        return {}
    present = [{int(row["seed"]) for row in each.runs[name].rows} for name in names]
    seeds = {seed for seed in present[0] if all(seed in other for other in present)}
    if not seeds:
        return {}

    def losses(name: str) -> Losses:
        runs = Runs(tuple(row for row in each.runs[name].rows if row["seed"] in seeds))
        training, held_out = runs.final("train_loss"), runs.final("validation_loss")
        values = (training, held_out, runs.best("validation_loss"))
        return Losses(*(float(np.median(value)) for value in values), seeds=len(runs.rows))

    return {name: losses(name) for name in names}


def _heading(part: str, scores: Sequence[TaskScores]) -> str:
    return f"{part} ({len(_parts(scores)[part])})"


def _pair(score: Score | None) -> str:
    return "" if score is None else f"{score.final}, {score.best.value:.3g}"


def _measure_table(
    entrants: Iterable[str], tables: Mapping[str, _EntrantScores], measure: Measure
) -> list[str]:
    return format_table(
        ["setting", "targets reached", "profile", "speed-up", "final", "lowest"],
        [
            [
                f"`{name}`",
                f"{score.reached.value:.0f} of {score.tasks} "
                f"({score.reached.low:.0f} to {score.reached.high:.0f})",
                str(score.profile),
                str(score.speed_up),
                str(score.final),
                str(score.best),
            ]
            for name in entrants
            for score in [tables[name].scores[measure]]
        ],
    )


def _time_lines(entrants: Iterable[str], tables: Mapping[str, _EntrantScores]) -> list[str]:
    """Writes what entrants cost; the times are there only if they were measured."""
    rows: list[list[str]] = []
    for name in entrants:
        table, row = tables[name], [f"`{name}`", f"{tables[name].comparison.passes():.2f}"]
        if table.timed is not None:
            ratios = list(table.step_times.values())
            row += [
                f"{np.exp(np.mean(np.log(ratios))):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
                str(table.timed.profile),
                str(table.timed.speed_up),
            ]
        rows.append(row + [""] * (5 - len(row)))
    return [
        "## Cost",
        "",
        "Forward passes of a run over the baseline's, a backward pass counting two; and "
        "the time of a step over one of AdamW's (geometric mean, lowest and highest of the tasks; "
        "medians of interleaved rounds, one thread), with what becomes of the targets of the "
        "validation loss if wall-clock counts. The tasks are so small that an optimizer's own "
        "operations take much of a step. Where few weights are trained a backward pass takes less "
        "than two forward passes, so that probes cost more than they count.",
        "",
        *format_table(
            ["setting", "passes", "time of a step", "profile by time", "speed-up by time"], rows
        ),
        "",
    ]


def _left_out(tables: Mapping[str, _EntrantScores]) -> str:
    missing = [f"`{name}`" for name in ENTRANTS if name not in tables]
    return f" Left out, since runs are missing: {', '.join(missing)}." if missing else ""


def _task_ratios(each: TaskScores, name: str) -> str:
    runs, baseline = each.runs[name], each.baseline
    final, lowest = (
        float(np.median(own)) / float(np.median(other))
        for own, other in (
            (runs.final("validation_loss"), baseline.final("validation_loss")),
            (runs.best("validation_loss"), baseline.best("validation_loss")),
        )
    )
    return f"{format_ratio(final)} ({format_ratio(lowest)})"


def _error(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else ""


def _values(scores: Sequence[TaskScores], tables: Mapping[str, _EntrantScores]) -> dict[str, Any]:
    return {
        "tasks": [each.task for each in scores],
        "rules": {
            "floors": dict(FLOORS),
            "cap": CAP,
            "horizon": HORIZON,
            "resamples": RESAMPLES,
            "evaluations": EVALUATIONS,
            "trials": TRIALS,
            "trial_seed": TRIAL_SEED,
        },
        "settings": {
            name: {
                **{measure: asdict(score) for measure, score in table.scores.items()},
                "groups": {part: asdict(score) for part, score in table.groups.items()},
                "passes": table.comparison.passes(),
                "step_times": dict(table.step_times),
            }
            for name, table in tables.items()
        },
        "baseline": {each.task: each.trial for each in scores},
    }


_RANGES = ", ".join(f"{name} from {low:g} to {high:g}" for name, (low, high) in SPACE.items())

_SHARES = ", ".join(f"{share:.0%}" for share in WARM_UPS)

_NOTES = f"""## How to read it

- *baseline*: {TRIALS} trials draw, always the same ones, {_RANGES}
  (logarithmic) and a warm-up of {_SHARES} of the run; half of them go on with half a cosine, half
  at a constant rate, each half a Latin hypercube. They have a separate seed; the winner has the
  lowest final validation loss.
- *target*: the median over the baseline's reruns of the lowest validation loss, or error, after any
  of {EVALUATIONS} evaluations. A setting reaches it if its median run does, at any evaluation: one
  that is exactly as good as the baseline reaches about half of the targets.
- *profile*: the share of the targets that are reached within so many budgets, averaged from 0 to
  {HORIZON:g} budgets; a budget is what the baseline's run takes. AlgoPerf's is relative to the
  fastest submission. No run has more steps than the baseline's: a target that is not reached in
  these is never reached.
- *speed-up*: the time that the baseline takes to its target over that of the setting, geometric
  mean; a target that is not reached counts as {HORIZON:g} budgets. Times are interpolated between
  evaluations; one below {EARLIEST:g} budgets counts as that.
- *final*, *lowest*: geometric means over the tasks of the median over that of the baseline, at the
  end and at the lowest value after any evaluation. Training losses below {FLOORS["train_loss"]:g}
  count as that, errors below {FLOORS["error"]:g} too, ratios and their inverses as {CAP:g} at most.
  A run that has diverged counts as an infinite loss.
- Training losses are those of up to {TRAINING_EXAMPLES} training examples in evaluation mode,
  without dropout, augmentation or noise; of the digits that are generated, of all. On the heat
  equation and the bandit they are of the same kind as the validation losses: the error of the
  solution and the regret.
- In brackets: the interval that holds 95% of {RESAMPLES:,} resamples of tasks and seeds.
"""
