"""What the measured rate adds: the default beside its direction and averaging at constant rates."""

from collections.abc import Mapping

from quadstep_bench import hindsight
from quadstep_bench.curves import Curve, Losses
from quadstep_bench.hindsight import Hindsight
from quadstep_bench.markdown import format_loss, format_ratio, format_table
from quadstep_bench.optimizers import CONSTANT_RATES
from quadstep_bench.ratios import CAP, FLOOR

MEASURED = "lqa-auto"
"""The setting that measures the rate which `CONSTANT_RATES` are given."""

MEASURES = {
    "training": "final training loss",
    "held_out": "final held-out loss",
    "best_checkpoint": "held-out loss of the best checkpoint",
}
"""The losses that are compared, fields of `quadstep_bench.curves.Losses`, in words."""

Tasks = Mapping[str, Mapping[str, Losses]]
"""What `final_losses` found on each task."""


def final_losses(curves: Mapping[str, Curve]) -> dict[str, Losses]:
    """The losses of `MEASURED` and of every constant rate over the seeds that all of them have.

    It is empty if there is no such seed.
    """
    names = (MEASURED, *CONSTANT_RATES)
    if not curves.keys() >= set(names):
        return {}
    seeds = {
        seed
        for seed in curves[MEASURED].seeds
        if all(seed in curves[name].seeds for name in CONSTANT_RATES)
    }
    return {name: curves[name].of(seeds).final for name in names} if seeds else {}


def compare(tasks: Tasks) -> dict[str, Hindsight]:
    """Compares by each of `MEASURES`, over the tasks recorded; it is empty if there are none."""
    recorded = {task: losses for task, losses in tasks.items() if losses}
    if not recorded:
        return {}
    return {
        measure: hindsight.compare(
            MEASURED,
            tuple(CONSTANT_RATES),
            {
                task: {name: getattr(each, measure) for name, each in losses.items()}
                for task, losses in recorded.items()
            },
        )
        for measure in MEASURES
    }


def format_section(tasks: Tasks) -> list[str]:
    """Writes the section of the report, line by line; none if there are no such records."""
    found = compare(tasks)
    if not found:
        return []
    training = found["training"]
    rates = [f"{rate:g}" for rate in CONSTANT_RATES.values()]
    rows = [
        [
            task,
            str(tasks[task][MEASURED].seeds),
            _rate(best),
            format_loss(tasks[task][best].training),
            format_loss(tasks[task][MEASURED].training),
            *(format_ratio(each.to_best.by_task[task]) for each in found.values()),
            *(format_ratio(each.to_single.by_task[task]) for each in found.values()),
        ]
        for task, best in training.best.items()
    ]
    totals = [
        [
            MEASURES[measure],
            format_ratio(each.to_best.mean),
            f"{each.to_best.level} of {len(rows)}",
            _rate(each.single),
            format_ratio(each.means[each.single]),
            format_ratio(each.to_single.mean),
            f"{each.to_single.level} of {len(rows)}",
        ]
        for measure, each in found.items()
    ]
    return [
        "",
        "## What the measured rate adds",
        "",
        f"`{MEASURED}` is compared with itself at {len(rates)} constant rates, "
        f"{', '.join(rates[:-1])} and {rates[-1]}: nothing differs but where the rate comes from.",
        "",
        "*Best*: the constant with the lowest loss in hindsight, chosen on each task and for each "
        "of the three losses anew. *Single*: the one constant for all tasks whose ratios to the "
        "best have the lowest geometric mean, chosen for each of the three losses. Both are chosen "
        "by the very losses that they are compared by, which is in their favour. The losses are "
        f"medians over the n seeds that {MEASURED} and all constants have; tasks without such a "
        "seed do not count.",
        "",
        *format_table(
            [
                *("task", "n", "best constant for training", "its loss", MEASURED),
                *("training / best", "held-out / best", "best checkpoint / best"),
                *("training / single", "held-out / single", "best checkpoint / single"),
            ],
            rows,
        ),
        "",
        f"The geometric means of these ratios over {len(rows)} tasks (a loss below {FLOOR:g} "
        f"counts as {FLOOR:g}, a ratio and its inverse as {CAP:g} at most), and on how many tasks "
        f"`{MEASURED}` is at or below the constant:",
        "",
        *format_table(
            [
                *("loss", f"{MEASURED} / best", "at or below it"),
                *("single", "single / best", f"{MEASURED} / single", "at or below it"),
            ],
            totals,
        ),
    ]


def _rate(name: str) -> str:
    return f"{CONSTANT_RATES[name]:g}"
