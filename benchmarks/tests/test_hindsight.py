"""Hindsight: ratios to the best of several candidates, with known answers."""

import math

import pytest

from quadstep_bench.hindsight import compare
from quadstep_bench.ratios import CAP, FLOOR

LOSSES = {
    "first": {"own": 0.2, "low": 0.1, "high": 0.4},
    "second": {"own": 0.1, "low": 0.8, "high": 0.1},
}


def test_the_best_is_another_one_on_each_task_and_the_single_one_is_best_on_all() -> None:
    found = compare("own", ["low", "high"], LOSSES)
    assert found.best == {"first": "low", "second": "high"}
    assert found.to_best.by_task == pytest.approx({"first": 2.0, "second": 1.0})
    assert found.to_best.mean == pytest.approx(2**0.5)
    assert found.to_best.level == 1
    assert found.means == pytest.approx({"low": 8**0.5, "high": 2.0})
    assert found.single == "high"
    assert found.to_single.by_task == pytest.approx({"first": 0.5, "second": 1.0})
    assert found.to_single.mean == pytest.approx(0.5**0.5)
    assert found.to_single.level == 2


def test_only_tasks_with_all_settings_count_and_no_other_setting() -> None:
    others = LOSSES["second"] | {"other": 0.0}
    lacking = {"own": 0.1, "low": 0.1}
    found = compare("own", ["low", "high"], {"second": others, "third": lacking})
    assert found.best == {"second": "high"}
    with pytest.raises(ValueError, match="losses must have a task with all of own, low, high"):
        compare("own", ["low", "high"], {"third": lacking})


@pytest.mark.parametrize("lost", [math.inf, math.nan])
def test_what_has_diverged_is_never_the_best(lost: float) -> None:
    losses = {"task": {"own": 0.2, "low": lost, "high": 0.4}}
    found = compare("own", ["low", "high"], losses)
    assert (found.best["task"], found.single) == ("high", "high")
    assert found.means["low"] == pytest.approx(CAP)
    found = compare("low", ["own", "high"], losses)
    assert found.to_best.by_task == {"task": math.inf}
    assert found.to_best.mean == pytest.approx(CAP)
    assert compare("own", ["low"], losses).to_best.by_task == {"task": 0.0}


def test_below_the_floor_losses_are_level() -> None:
    found = compare("own", ["low"], {"task": {"own": FLOOR / 2, "low": FLOOR / 9}})
    assert found.to_best.by_task == {"task": 1.0}
    assert found.to_best.level == 1
