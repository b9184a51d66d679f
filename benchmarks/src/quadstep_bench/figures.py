"""Figures: the pictures of the paper, of the rates measured and of the suite, from records."""

# The types that matplotlib declares leave keyword arguments open.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from quadstep_bench.constant_rates import MEASURED, MEASURES
from quadstep_bench.curves import (
    FIGURES,
    Array,
    Curve,
    Losses,
    best,
    describe,
    display,
    gather,
    title,
)
from quadstep_bench.optimizers import CONSTANT_RATES, FAMILIES, HAND_TUNED, RATES, SCHEDULED
from quadstep_bench.ratios import ratio
from quadstep_bench.runner.records import Record
from quadstep_bench.suite import Outcome, Score


@dataclass(frozen=True)
class Style:
    """How a curve is drawn."""

    color: str
    dashes: Any
    width: float = 1.6

    @property
    def line(self) -> dict[str, Any]:
        """The arguments of a line of matplotlib's."""
        return {"color": self.color, "linestyle": self.dashes, "linewidth": self.width}


# The colours of Okabe and Ito, which colour-blind readers can tell apart, a wine red and two greys.
# Curves that meet in a panel never share their dashes either, unless one of them is grey.
LQA = {
    "lqa-paper": Style("#000000", (0, (4, 1, 1, 1, 1, 1))),
    "lqa": Style("#0072B2", (0, (7, 1.5))),
    "lqa-auto": Style("#D55E00", "solid", 2.4),
    "lqa-authors": Style("#882255", (0, (2, 1, 7, 1))),
}
_BY_RATE = {
    0.1: Style("#56B4E9", "dashed"),
    0.01: Style("#009E73", "dashdot"),
    0.001: Style("#E69F00", "dotted", 2.2),
}
_BY_FAMILY = {
    "sgd": Style("#56B4E9", "dashed"),
    "sgd-m": Style("#009E73", "dashdot"),
    "sgd-nag": Style("#E69F00", "dotted", 2.2),
    "adagrad": Style("#999999", "dashed"),
    "rmsprop": Style("#CC79A7", (0, (3, 1, 1, 1))),
    "adam": Style("#666666", "dotted", 2.2),
}

SETTINGS: Any = {
    "font.size": 10.5,
    "figure.titlesize": 12,
    "axes.titlesize": 11.5,
    "axes.grid": True,
    "grid.color": "#E5E5E5",
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.handlelength": 3.2,
    # Without this the names of the elements of an SVG file are random.
    "svg.hashsalt": "quadstep",
}
"""The settings of matplotlib that all pictures are drawn with."""

Curves = Mapping[str, Curve]


def draw(records: Sequence[Record], out: Path) -> list[Path]:
    """Draws each figure of the paper that has records, and the rates measured.

    Args:
        records: The runs, ended or not.
        out: The folder for the pictures, each as PNG and as SVG.

    Returns:
        The files written.
    """
    tasks = {task: curves for task in FIGURES.values() if (curves := gather(records, task))}
    measured = {task: curves for task, curves in tasks.items() if not LQA.keys().isdisjoint(curves)}
    with matplotlib.rc_context(SETTINGS):
        pictures = {
            f"figure-{figure}": _losses(f"Figure {figure}: {title(task)}", tasks[task])
            for figure, task in FIGURES.items()
            if task in tasks
        }
        if measured:
            pictures["rates"] = _rates(measured)
        return [
            save(picture, out / f"{name}.{suffix}")
            for name, picture in pictures.items()
            for suffix in ("png", "svg")
        ]


def summarise(records: Sequence[Record], task: str, path: Path) -> Path:
    """Draws a task: LQA beside the best rate of each family, and the rates measured."""
    curves = gather(records, task)
    families = {family: _members(curves, family) for family in FAMILIES}
    styles = {
        best(members).optimizer: _BY_FAMILY[family]
        for family, members in families.items()
        if members
    }
    styles |= {name: style for name, style in LQA.items() if name in curves}
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(11, 5.6), layout="constrained")
        figure.suptitle(f"{title(task)}\n{_caption(curves)}")
        losses, rates = figure.subplots(1, 2)
        losses.set_title("Training loss, each family at its best rate", pad=12)
        losses.set(xlabel="epoch")
        _scale(losses, _limits(curves))
        _plot_losses(losses, curves, styles)
        rates.set_title("Rates in force, median and middle 80% of each epoch", pad=12)
        rates.set(xlabel="epoch")
        _plot_rates(rates, curves)
        named = {display(name): style for name, style in styles.items()}
        _legend(figure, "outside lower center", named)
        return save(figure, path)


_ROLES: dict[str, Any] = {
    "hand-tuned": {"marker": "o", "color": "#999999", "markersize": 5, "alpha": 0.7},
    "scheduled": {"marker": "o", "color": "#009E73", "markersize": 5, "fillstyle": "none"},
    "peers": {"marker": "^", "color": "#56B4E9", "markersize": 6},
    "lqa": {"marker": "s", "color": "#0072B2", "markersize": 7},
    "lqa-adamw": {"marker": "s", "color": "#0072B2", "markersize": 7, "fillstyle": "none"},
    "lqa-sgdm": {"marker": "s", "color": "#009E73", "markersize": 7, "fillstyle": "none"},
    "lqa-auto-decay": {"marker": "D", "color": "#D55E00", "markersize": 7, "fillstyle": "none"},
    "lqa-auto": {"marker": "D", "color": "#D55E00", "markersize": 9, "markeredgecolor": "black"},
}
"""How the dots of the suite are drawn, the later above the earlier."""

_SPAN = (1e-2, 1e2)
"""The ratios that the pictures of the suite show; those beyond lie on their edges."""


def draw_suite(outcomes: Sequence[Outcome], out: Path) -> list[Path]:
    """Draws how every optimizer of the suite ended, beside the best hand-tuned one of its task.

    Args:
        outcomes: What the records say about each task.
        out: The folder for the picture, as PNG and as SVG.

    Returns:
        The files written.
    """
    panels = {
        "training loss": [
            _by_role(outcome, lambda score: score.train_ratio) for outcome in outcomes
        ],
        "held-out loss": [
            _by_role(outcome, lambda score: score.test_ratio) for outcome in outcomes
        ],
    }
    heading = "The suite: final losses relative to the best hand-tuned optimizer"
    names = [outcome.task for outcome in outcomes]
    return _save_ratios(heading, names, panels, _ROLES, out / "suite")


def draw_constant_rates(outcomes: Sequence[Outcome], out: Path) -> list[Path]:
    """Draws how the default ends at constant rates, beside itself with the measured one.

    Args:
        outcomes: What the records say about each task; those without constant rates are left out.
        out: The folder for the picture, as PNG and as SVG.

    Returns:
        The files written: none if no task has constant rates.
    """
    tasks = {outcome.task: outcome.by_rate for outcome in outcomes if outcome.by_rate}
    if not tasks:
        return []
    panels = {
        words: [_by_rate(losses, measure) for losses in tasks.values()]
        for measure, words in MEASURES.items()
        if measure != "held_out"
    }
    colors = matplotlib.colormaps["viridis"](np.linspace(0.0, 0.95, len(CONSTANT_RATES)))
    styles = {
        f"{rate:g}": {"marker": "o", "color": color, "markersize": 7, "alpha": 0.85}
        for rate, color in zip(CONSTANT_RATES.values(), colors, strict=True)
    }
    heading = f"Constant rates: losses relative to those of {MEASURED}, which measures its rate"
    return _save_ratios(heading, [*tasks], panels, styles, out / "constant-rates")


Dots = Sequence[tuple[str, float]]
"""The ratios of a task, each with the name of its style."""


def _by_role(outcome: Outcome, ratio: Callable[[Score], float]) -> Dots:
    return [
        (_role(name), ratio(score))
        for name, score in outcome.scores.items()
        # Another picture shows them, relative to the default.
        if name not in CONSTANT_RATES
    ]


def _by_rate(losses: Mapping[str, Losses], measure: str) -> Dots:
    measured = getattr(losses[MEASURED], measure)
    return [
        (f"{rate:g}", ratio(getattr(losses[name], measure), measured))
        for name, rate in CONSTANT_RATES.items()
    ]


def _save_ratios(
    heading: str,
    tasks: Sequence[str],
    panels: Mapping[str, Sequence[Dots]],
    styles: Mapping[str, Any],
    path: Path,
) -> list[Path]:
    """Draws two panels of ratios, a row a task, and the later styles above the earlier."""
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(11, 2.2 + 0.32 * len(tasks)), layout="constrained")
        figure.suptitle(heading)
        axes = figure.subplots(1, 2, sharey=True)
        for each, (words, rows) in zip(axes, panels.items(), strict=True):
            _plot_ratios(each, words, rows, styles)
        axes[0].set_yticks(range(len(tasks)), tasks)
        axes[0].invert_yaxis()
        handles = [Line2D([], [], linestyle="", label=name, **styles[name]) for name in styles]
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
        return [save(figure, path.with_suffix(suffix)) for suffix in (".png", ".svg")]


def _plot_ratios(axes: Axes, heading: str, rows: Sequence[Dots], styles: Mapping[str, Any]) -> None:
    axes.set(title=heading, xlabel="ratio", xscale="log", xlim=_SPAN)
    axes.axvline(1.0, color="black", linewidth=1)
    for name, style in styles.items():
        places = [
            (value, row) for row, dots in enumerate(rows) for other, value in dots if other == name
        ]
        if places:
            ratios, at = np.array(places).T
            # At the edges dots are not cut, and all that has diverged is there to be seen.
            axes.plot(np.clip(ratios, *_SPAN), at, linestyle="", clip_on=False, **style)


def _role(optimizer: str) -> str:
    if optimizer in HAND_TUNED:
        return "hand-tuned"
    if optimizer in SCHEDULED:
        return "scheduled"
    return optimizer if optimizer in _ROLES else "peers"


def _losses(heading: str, curves: Curves) -> Figure:
    figure = Figure(figsize=(11, 7.6), layout="constrained")
    figure.suptitle(f"{heading}\n{_caption(curves)}")
    panels = figure.subplots(2, 3, sharex=True, sharey=True)
    _scale(panels[0, 0], _limits(curves))
    for axes, family in zip(panels.flat, FAMILIES, strict=True):
        axes.set(title=FAMILIES[family])
        styles = {f"{family}-{rate}": style for rate, style in _BY_RATE.items()}
        _plot_losses(axes, curves, styles | LQA)
    for axes in panels[-1]:
        axes.set(xlabel="epoch")
    figure.supylabel("training loss")
    drawn = {name: style for name, style in LQA.items() if name in curves}
    _legend(figure, "outside lower left", drawn, "LQA (the same curves in every panel)")
    _legend(figure, "outside lower right", _BY_RATE, "the family's learning rate")
    return figure


def _rates(tasks: Mapping[str, Curves]) -> Figure:
    figure = Figure(figsize=(11, 7.6), layout="constrained")
    figure.suptitle("The rates that LQA measured\nmedian and middle 80% of the steps of each epoch")
    panels = figure.subplots(2, 3).flat
    # The tasks come first: `zip` would take a panel too many before it finds no task left.
    for (task, curves), axes in zip(tasks.items(), panels, strict=False):
        axes.set(title=title(task), xlabel="epoch")
        _plot_rates(axes, curves)
    for axes in panels:
        axes.remove()
    figure.supylabel("rate")
    _legend(figure, "outside lower center", LQA)
    return figure


def _plot_losses(axes: Axes, curves: Curves, styles: Mapping[str, Style]) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10], integer=True))
    for name, style in styles.items():
        if name not in curves:
            continue
        curve = curves[name]
        losses = np.where(np.isfinite(curve.losses), curve.losses, np.nan)
        epochs = np.arange(losses.shape[1])
        if len(losses) > 1:
            _band(axes, epochs, np.fmin.reduce(losses), np.fmax.reduce(losses), style)
        axes.plot(epochs, curve.median, **style.line)
        for row in losses[np.isinf(curve.losses).any(axis=1)]:
            _cross(axes, row[np.isfinite(row)], style)


def _plot_rates(axes: Axes, curves: Curves) -> None:
    shown = {name: curves[name] for name in LQA if name in curves}
    _scale(axes, _rate_limits(shown.values()))
    axes.xaxis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10], integer=True))
    for name, curve in shown.items():
        low, median, high = (curve.rates(level) for level in ("q10", "median", "q90"))
        epochs = np.arange(1, len(median) + 1)
        _band(axes, epochs, low, high, LQA[name])
        axes.plot(epochs, median, **LQA[name].line)


def _band(axes: Axes, epochs: Any, low: Any, high: Any, style: Style) -> None:
    axes.fill_between(epochs, low, high, color=style.color, alpha=0.2, linewidth=0)


def _cross(axes: Axes, losses: Array, style: Style) -> None:
    """Marks the end of a run that diverged, at the edge where its loss has left the picture."""
    axes.plot(
        len(losses) - 1,
        min(losses[-1], axes.get_ylim()[1]),
        "x",
        color=style.color,
        markersize=9,
        markeredgewidth=2.2,
        clip_on=False,
    )


def _scale(axes: Axes, limits: tuple[float, float]) -> None:
    low, high = limits
    axes.set(yscale="log", ylim=limits)
    # A short axis has too few powers of ten to be read by them alone.
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def _rate_limits(curves: Collection[Curve]) -> tuple[float, float]:
    """The range of the rates of the runs that did not diverge, with room for their bands."""
    settled = [curve.rates("median") for curve in curves if np.isfinite(curve.tail())]
    seen = np.concatenate([np.empty(0), *settled])
    seen = seen[seen > 0]
    return (0.1 * float(seen.min()), 10 * float(seen.max())) if len(seen) else (1e-3, 1.0)


def _limits(curves: Curves) -> tuple[float, float]:
    """From below the lowest loss to above the first: what runs away further leaves the picture."""
    medians = [curve.median for curve in curves.values()]
    seen = np.concatenate(medians)
    lowest = seen[np.isfinite(seen) & (seen > 0)].min()
    return 0.8 * float(lowest), 1.3 * float(max(median[0] for median in medians))


def _caption(curves: Curves) -> str:
    several = any(len(curve.runs) > 1 for curve in curves.values())
    lines = " (lines: median, bands: range)" if several else ""
    diverged = any(run.status == "diverged" for curve in curves.values() for run in curve.runs)
    return f"{describe(curves)}{lines}{'; crosses: diverged' if diverged else ''}"


def _legend(figure: Figure, place: Any, styles: Mapping[Any, Style], heading: str = "") -> None:
    handles = [Line2D([], [], label=str(name), **style.line) for name, style in styles.items()]
    columns = min(5, len(handles))
    figure.legend(handles=handles, title=heading, loc=place, ncols=columns)


def _members(curves: Curves, family: str) -> list[Curve]:
    names = (f"{family}-{rate}" for rate in RATES)
    return [curves[name] for name in names if name in curves]


def save(figure: Figure, path: Path) -> Path:
    """Writes a picture such that the same picture is the same file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # A date would make every drawing of the same records a new file.
    figure.savefig(path, dpi=120, metadata={"Date": None} if path.suffix == ".svg" else None)
    return path
