"""What tests read of the optimizer's state by name, or replace in the library: all in one place."""

import sys
from functools import partial

import pytest

from quadstep import LQA, Reason, optimizer
from quadstep.averaging import ScheduleFree
from quadstep.parabola import Agreement, Decision, Exact, Safeguarded


def saved(opt: LQA) -> dict:
    """The scalars of the state."""
    return opt.state_dict()["param_groups"][0]["lqa"]


def is_due(opt: LQA) -> bool:
    """Whether the next step measures."""
    return saved(opt)["wait"] == 0


def momentum_scale(opt: LQA) -> float:
    """How many times as far the fast iterate steps as it does where losses are noisy."""
    return saved(opt)["stretch"]


def noise_estimate(opt: LQA) -> dict:
    """What is known of the noise in the losses."""
    return saved(opt)["search"]["noise"]


def watched(opt: LQA) -> set:
    """The parameters of which a copy is kept, because the caller has changed them."""
    return {param for param, own in opt.state.items() if "left" in own}


def pin_rate(monkeypatch: pytest.MonkeyPatch, moves: bool = True) -> None:
    """Makes controllers leave the rate alone: a wrapped optimizer must then be itself."""

    def decide(self, rate, points):
        return self, Decision(rate, rate if moves else 0.0, Reason.MINIMUM)

    for controller in (Safeguarded, Exact):
        monkeypatch.setattr(controller, "decide", decide)


def take_two_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes each measurement take two probes, whatever the gradients show."""
    monkeypatch.setattr(Agreement, "holds", False)


def keep_momentum(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the fast iterate step no further where losses are free of noise."""
    monkeypatch.setattr(optimizer, "ScheduleFree", partial(ScheduleFree, furthest=1.0))


def audit_every(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Has the loss evaluated twice at the same parameters once in so many steps."""
    monkeypatch.setattr(optimizer, "AUDIT", steps)


def run_as_on_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the library take the ways that it takes where reading a value waits for a device."""
    for name, module in [*sys.modules.items()]:
        if name.startswith("quadstep.") and hasattr(module, "at_hand"):
            monkeypatch.setattr(module, "at_hand", lambda tensor: False)
