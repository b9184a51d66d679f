"""The picture of the self-tuning benchmark."""

# matplotlib is not typed throughout.
# pyright: reportUnknownMemberType=false

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from quadstep_bench.figures import SETTINGS, save
from quadstep_bench.selftuning.entrants import ENTRANTS
from quadstep_bench.selftuning.problem import GROUPS
from quadstep_bench.selftuning.score import Comparison, TaskScores, compare
from quadstep_bench.selftuning.tasks import TASKS

_STYLES: dict[str, Any] = {
    "lqa-auto": {"color": "#D55E00", "linestyle": "solid", "linewidth": 2.6},
    "lqa-auto-decay": {"color": "#D55E00", "linestyle": (0, (4, 1.5)), "linewidth": 2.0},
    "lqa-adamw": {"color": "#0072B2", "linestyle": "solid", "linewidth": 1.8},
    "lqa-sgdm": {"color": "#0072B2", "linestyle": (0, (1, 1.5)), "linewidth": 1.8},
    "lqa": {"color": "#0072B2", "linestyle": (0, (4, 1.5)), "linewidth": 1.8},
    "adamw": {"color": "#000000", "linestyle": "dashed", "linewidth": 1.6},
    "adamw-cosine": {"color": "#000000", "linestyle": "solid", "linewidth": 1.6},
}
_SHOWN = 1.5
"""The time up to which profiles are drawn, in budgets."""

_PEERS = ("#009E73", "#56B4E9", "#CC79A7", "#E69F00", "#882255", "#666666", "#999999")
_GROUPS: dict[str, Any] = {
    group: {"marker": marker, "color": color, "linestyle": "", "fillstyle": "none"}
    for group, marker, color in zip(
        GROUPS, ("o", "s", "^"), ("#009E73", "#CC79A7", "#56B4E9"), strict=True
    )
}


def draw(scores: Sequence[TaskScores], out: Path) -> list[Path]:
    """Draws which targets are reached when, and how final validation losses compare.

    Args:
        scores: What `gather` found.
        out: The folder for the picture, as PNG and as SVG.

    Returns:
        The files written.
    """
    compared = compare(scores, ENTRANTS)
    if not compared:
        return []
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(11, 5.2), layout="constrained")
        figure.suptitle("Self-tuning: one setting for all tasks, against AdamW tuned on each")
        profile, ratios = figure.subplots(1, 2)
        _plot_profiles(profile, compared)
        _plot_ratios(ratios, compared)
        return [save(figure, out / f"selftuning.{suffix}") for suffix in ("png", "svg")]


def _plot_profiles(axes: Axes, compared: dict[str, Comparison]) -> None:
    axes.set(
        title="targets of the validation loss reached",
        xlabel="time, in budgets of the baseline",
        ylabel="share of the tasks",
        ylim=(0.0, 1.0),
    )
    peers = cycle(_PEERS)
    for name, comparison in compared.items():
        times = np.sort(comparison.times("validation_loss"))
        shares = np.arange(1, len(times) + 1) / len(times)
        style: dict[str, Any] = _STYLES.get(name) or {"color": next(peers), "linewidth": 1.2}
        known = times <= _SHOWN
        end = np.append(times[known], _SHOWN)
        heights = np.append(shares[known], shares[known][-1:] if known.any() else [0.0])
        axes.step(np.append(0.0, end), np.append(0.0, heights), where="post", label=name, **style)
    axes.set_xlim(0.0, _SHOWN)
    axes.legend(fontsize=8.5, ncols=2, loc="upper left")


def _plot_ratios(axes: Axes, compared: dict[str, Comparison]) -> None:
    finals = {name: each.score("validation_loss").final for name, each in compared.items()}
    names = sorted(finals, key=lambda name: finals[name].value)
    axes.set(title="final validation loss", xlabel="ratio to the baseline's", xscale="log")
    axes.axvline(1.0, color="black", linewidth=1)
    for row, name in enumerate(names):
        estimate = finals[name]
        axes.plot([estimate.low, estimate.high], [row, row], color="#D55E00", linewidth=1.4)
        axes.plot(estimate.value, row, "D", color="#D55E00", markersize=7)
        for group in GROUPS:
            part = [each for each in compared[name].scores if TASKS[each.task].group == group]
            if part:
                value = Comparison(name, part).score("validation_loss").final.value
                axes.plot(value, row, **_GROUPS[group])
    for group, style in _GROUPS.items():
        axes.plot([], [], label=group, **style)
    axes.plot([], [], "D", color="#D55E00", markersize=7, label="all, 95% interval")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.legend(fontsize=8.5, loc="upper right")
