import json
import math

import pytest
from rich.console import Console
from synthetic import results_in

from quadstep_bench import soak
from quadstep_bench.optimizers import CONFIGURATIONS


@pytest.fixture
def console(tmp_path):
    with (tmp_path / "output").open("w") as file:
        yield Console(file=file, width=200)


@pytest.mark.slow
def test_a_thousand_steps_under_faults(tmp_path, console, monkeypatch):
    """A twentieth of the recorded run, with faults ten times as often."""
    monkeypatch.setattr(soak, "ODDS", 0.2)
    path = soak.soak(results_in(tmp_path), console, steps=1000, seeds=1, names=("lqa-auto",))
    (row,) = json.loads(path.read_text())["rows"]
    assert row["traces"] == 0
    assert set(row["faults"]) == set(soak.KINDS)
    assert min(row["faults"].values()) > 5
    assert row["loss"] < 2.0 * max(row["fault_free"]) + 0.01
    assert row["memory"][-1] - row["memory"][1] < 16.0


@pytest.mark.parametrize("name", CONFIGURATIONS)
@pytest.mark.parametrize("kind", soak.KINDS)
@pytest.mark.parametrize("call", [1, 2, 3])
def test_each_fault_on_each_call(name, kind, call):
    job = soak.Job(name, seed=0)
    for _ in range(20):
        job.optimizer.step(job.closure())
    # Not every step measures, and not every measurement calls the closure three times.
    outcomes = [soak.survive(job, kind, call) for _ in range(40)]
    # Probes have no gradients.
    never = kind == "gradient" and call > 1
    assert set(outcomes) - {None} == (set() if never else {True})
    for _ in range(20):
        job.optimizer.step(job.closure())
    assert math.isfinite(job.loss())


def test_what_repeats_a_loss_gives_no_rate():
    """With two probes that is the third call of four, with one the last of three."""
    job = soak.Job("lqa", seed=0)
    assert soak.survive(job, "nan", call=3) is None
    assert job.optimizer.report.forwards == 4
    for _ in range(98):
        job.optimizer.step(job.closure())
    # Puts the measurements that repeat the loss and those that take both probes out of step.
    assert soak.survive(job, "nan", call=1) is True
    unharmed = {
        job.optimizer.report.forwards
        for _ in range(300)
        if soak.survive(job, "nan", call=3) is None
    }
    assert {1, 2, 3} <= unharmed


def test_a_trace_would_be_seen(monkeypatch):
    job = soak.Job("lqa", seed=0)

    def step(closure):
        job.model[0].bias.data.add_(1.0)
        closure()

    monkeypatch.setattr(job.optimizer, "step", step)
    assert soak.survive(job, "exception", call=1) is False
