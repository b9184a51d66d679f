import math
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.figure import Figure
from synthetic import grid, record

from quadstep_bench import figures
from quadstep_bench.optimizers import COMPETITORS, FAMILIES


def falling(optimizer: str, epoch: int) -> float:
    return 2.3 * math.exp(-epoch * (1.0 if optimizer.startswith("lqa") else 0.5))


@pytest.fixture
def pictures(monkeypatch):
    """The figures drawn, by the stem of the file, kept from being rendered."""
    kept = {}
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: kept.update({path.stem: self}))
    return kept


def colours(axes) -> list[str]:
    return [line.get_color() for line in axes.lines]


def test_every_figure_recorded_is_drawn_with_a_panel_for_each_family(pictures, tmp_path):
    records = [*grid(1, falling, epochs=4), *grid(3, falling, epochs=4, subset=1000)]
    figures.draw(records, tmp_path)
    assert set(pictures) == {"figure-1", "figure-3", "rates"}
    panels = pictures["figure-3"].axes
    assert [axes.get_title() for axes in panels] == list(FAMILIES.values())
    assert pictures["figure-3"].get_suptitle().startswith("Figure 3: LeNet-5 on MNIST\n1,000 of")
    for axes in panels:
        assert axes.get_yscale() == "log"
        assert len(set(colours(axes))) == len(axes.lines) == 6
        assert axes.get_ylim() == panels[0].get_ylim()
    assert [axes.get_title() for axes in pictures["rates"].axes] == [
        "Logistic regression on MNIST",
        "LeNet-5 on MNIST",
    ]


def test_seeds_are_a_median_in_a_band(pictures, tmp_path):
    losses = [[2.0, 1.0, 0.5], [2.0, 1.2, 0.6], [2.0, 1.6, 0.9]]
    figures.draw(
        [record("mlp-mnist", "lqa", row, seed=seed) for seed, row in enumerate(losses)], tmp_path
    )
    axes = pictures["figure-2"].axes[0]
    np.testing.assert_array_equal(axes.lines[0].get_ydata(), [2.0, 1.2, 0.6])
    band = axes.collections[0].get_paths()[0].get_extents()
    assert (band.ymin, band.ymax) == (0.5, 2.0)


def test_a_diverged_run_ends_with_a_cross_within_the_picture(pictures, tmp_path):
    records = [
        record("mlp-mnist", "lqa", [2.0, 1.0, 0.5, 0.2]),
        record("mlp-mnist", "sgd-0.1", [2.0, 1e9, math.nan], epochs=3, status="diverged"),
        record("mlp-mnist", "lqa-paper", [2.0, math.nan], epochs=3, status="diverged"),
    ]
    figures.draw(records, tmp_path)
    sgd, momentum = pictures["figure-2"].axes[:2]
    top = sgd.get_ylim()[1]
    assert top < 10
    crosses = [line.get_xydata().tolist() for line in sgd.lines if line.get_marker() == "x"]
    assert crosses == [[[1, top]], [[0, 2.0]]]
    assert [line.get_marker() for line in momentum.lines].count("x") == 1


def test_rates_of_runs_that_diverged_do_not_set_the_scale(pictures, tmp_path):
    records = [
        record("mlp-mnist", "lqa", [2.0, 1.0, 0.5], rates=[0.3, 0.1]),
        record(
            "mlp-mnist", "lqa-paper", [2.0, 1e9, math.nan], rates=[-1e20, 1e20], status="diverged"
        ),
    ]
    figures.draw(records, tmp_path)
    low, high = pictures["rates"].axes[0].get_ylim()
    assert 0.001 < low < 0.1
    assert 0.3 < high < 100


@pytest.mark.parametrize(
    "records",
    [
        [],
        [record("mlp-digits", "lqa", [2.0, 1.0])],
        [record("mlp-mnist", "lqa", [], epochs=3, status=None)],
    ],
    ids=["none", "another task", "no epoch"],
)
def test_nothing_to_draw(records, tmp_path):
    assert figures.draw(records, tmp_path / "out") == []


@pytest.mark.parametrize(
    "records",
    [
        [record("mlp-mnist", "lqa", [2.0], epochs=3, status=None)],
        [record("mlp-mnist", "adam-0.1", [2.0, math.nan], epochs=3, status="diverged")],
        [record("mlp-mnist", "lqa-paper", [2.0, 0.0], rates=[-0.5])],
    ],
    ids=["before the first epoch", "diverged at once", "a loss of zero and a negative rate"],
)
def test_scarce_records_are_drawn(records, tmp_path):
    assert tmp_path / "figure-2.svg" in figures.draw(records, tmp_path)


def test_the_same_records_make_the_same_files(tmp_path):
    records = [run for run in grid(2, falling, epochs=2) if run.config.optimizer in COMPETITORS]
    first, second = (figures.draw(records, tmp_path / name) for name in ("first", "second"))
    assert [path.name for path in first] == ["figure-2.png", "figure-2.svg"]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_a_summary_shows_each_family_at_its_best_rate(pictures, tmp_path):
    def shape(optimizer: str, epoch: int) -> float:
        return falling(optimizer, epoch) * (0.5 if optimizer.endswith("0.01") else 1.0)

    figures.summarise(list(grid(2, shape, epochs=3)), "mlp-mnist", tmp_path / "summary.png")
    (legend,) = pictures["summary"].legends
    assert [text.get_text() for text in legend.get_texts()] == [
        *(f"{family} 0.01" for family in FAMILIES.values()),
        "lqa-paper",
        "lqa",
        "lqa-auto",
    ]


def test_drawing_and_deciding_do_without_torch():
    modules = "quadstep_bench.figures, quadstep_bench.paper.claims, quadstep_bench.cli"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
