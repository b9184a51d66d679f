"""What tests read of the optimizer's state by name, or replace in the library: all in one place."""

from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import pytest
import torch

from quadstep import LQA, Reason, optimizer, schedule
from quadstep.averaging import WATCHED_STEPS, ScheduleFree
from quadstep.controllers import Decision, TrustRegionController, VertexController, VertexState
from quadstep.directions import STEPPING_RATE
from quadstep.statistics import SlopeCheck


def is_due(opt: LQA) -> bool:
    """Whether the next step measures."""
    return opt.param_groups[0]["lqa.wait"] == 0


def momentum_scale(opt: LQA) -> float:
    """How many times as far the fast iterate steps as it does where losses are noisy."""
    return opt.param_groups[0]["lqa.momentum_scale"]


def noise_estimate(opt: LQA) -> dict:
    """What is known of the noise in the losses."""
    prefix = "lqa.controller.noise."
    return {key: value for key, value in opt.param_groups[0].items() if key.startswith(prefix)}


def stepping_rate(opt: LQA) -> float:
    """The rate that a wrapped optimizer steps at."""
    return opt.param_groups[0][STEPPING_RATE]


def watched(opt: LQA) -> set:
    """The parameters of which a copy is kept, because the caller has changed them."""
    states = opt.state.items()
    return {
        param for param, own in states if own.get("unchanged_steps", WATCHED_STEPS) < WATCHED_STEPS
    }


def pin_rate(monkeypatch: pytest.MonkeyPatch, moves: bool = True) -> None:
    """Makes controllers leave the rate alone: a wrapped optimizer must then be itself."""

    def update(self, state, rate, samples):
        return state, Decision(rate, rate if moves else 0.0, Reason.MINIMUM)

    for controller in (TrustRegionController, VertexController):
        monkeypatch.setattr(controller, "update", update)


@dataclass(frozen=True)
class Scripted:
    """A controller that multiplies the rate by one factor after the other."""

    factors: tuple[float, ...]
    state_type: ClassVar[type] = VertexState
    needs_slope: ClassVar[bool] = False

    def probe_distance(self, state, rate):
        return rate

    def update(self, state, rate, samples):
        rate *= self.factors[state.fits]
        decision = Decision(rate, rate, Reason.MINIMUM, settled=True)
        return replace(state, fits=state.fits + 1), decision


def take_two_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes each measurement take two probes, whatever the gradients show."""
    monkeypatch.setattr(SlopeCheck, "passes", False)


def keep_momentum(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the fast iterate step no further where losses are free of noise."""
    monkeypatch.setattr(optimizer, "ScheduleFree", partial(ScheduleFree, max_momentum_scale=1.0))


def audit_every(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Has the loss evaluated twice at the same parameters once in so many steps."""
    monkeypatch.setattr(schedule, "AUDIT_INTERVAL", steps)


def run_as_on_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the library take the ways that it takes where reading a value waits for a device."""
    monkeypatch.setattr(torch.Tensor, "is_cpu", False)
