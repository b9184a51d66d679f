"""Settings: the entrants, each one row that is the same on all tasks, and the baseline's trials."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.optim import AdamW, NAdam, Optimizer

from quadstep_bench.optimizers import CONSTANT_RATES, builders
from quadstep_bench.optimizers.peers import MomoPeer, Peer, ScheduleFreePeer, drive


def constant(progress: float) -> float:
    """Leaves the rate as it is."""
    return 1.0


def cosine(progress: float, warm_up: float = 0.0) -> float:
    """Rises linearly over the first part of a run, then falls to zero by half a cosine."""
    if progress < warm_up:
        return progress / warm_up
    return 0.5 * (1.0 + math.cos(math.pi * (progress - warm_up) / (1.0 - warm_up)))


def warmed_up(progress: float, warm_up: float) -> float:
    """Rises linearly over the first part of a run, then stays."""
    return min(progress / warm_up, 1.0) if warm_up else 1.0


@dataclass(frozen=True)
class Setting:
    """An optimizer with all that is to be chosen about it.

    Attributes:
        text: What it is, in a line.
        build: Makes it for a model that is trained for so many steps.
        schedule: By what the rate is multiplied, given where in the run a step is, from 0 to 1.
        package: The distribution that it comes with, where that is not torch or quadstep.
    """

    text: str
    build: Callable[[nn.Module, int], Optimizer | Peer]
    schedule: Callable[[float], float] = constant
    package: str | None = None

    @property
    def needs(self) -> tuple[str, ...]:
        """The distributions that must be installed."""
        return () if self.package is None else (self.package,)


def _torch(kind: Callable[..., Optimizer], **options: Any) -> Callable[[nn.Module, int], Optimizer]:
    def build(model: nn.Module, steps: int) -> Optimizer:
        return kind([param for param in model.parameters() if param.requires_grad], **options)

    return build


def _peer(
    driver: type[Peer], module: str, name: str, warm_up: float = 0.0, **options: Any
) -> Callable[[nn.Module, int], Peer]:
    """Builds a peer; one with a warm-up is told for how many steps."""

    def build(model: nn.Module, steps: int) -> Peer:
        timed = {"warmup_steps": round(warm_up * steps)} if warm_up else {}
        return drive(driver, module, name, model, _unused, **options, **timed)

    return build


def _unused(outputs: Tensor, labels: Tensor) -> Tensor:
    raise NotImplementedError("no entrant evaluates the loss itself")


ENTRANTS: dict[str, Setting] = {
    "lqa-auto": Setting("`LQA(params)`", _torch(builders.BUILDERS["lqa-auto"])),
    "lqa-auto-decay": Setting(
        "`LQA(params, weight_decay=0.1)`", _torch(builders.BUILDERS["lqa-auto-decay"])
    ),
    "lqa": Setting('`LQA(params, direction="gradient")`', _torch(builders.BUILDERS["lqa"])),
    "lqa-adamw": Setting("`LQA(AdamW(params))`", _torch(builders.BUILDERS["lqa-adamw"])),
    "lqa-sgdm": Setting(
        "`LQA(SGD(params, lr=0.01, momentum=0.9))`", _torch(builders.BUILDERS["lqa-sgdm"])
    ),
    "adamw": Setting(
        "AdamW at 0.003, the best on the suite by final held-out loss", _torch(AdamW, lr=0.003)
    ),
    "adamw-cosine": Setting(
        "AdamW at 0.01 with warm-up and cosine, the best on the suite by final held-out loss",
        _torch(AdamW, lr=0.01),
        partial(cosine, warm_up=0.05),
    ),
    "nadamw-algoperf": Setting(
        "NadamW with the values of its AlgoPerf submission",
        _torch(
            NAdam,
            lr=0.0019083,
            betas=(0.9090935, 0.9988983),
            weight_decay=0.0812162,
            decoupled_weight_decay=True,
            # The submission has a constant momentum; torch's rises to it, here at once. What is
            # left is the bias correction of the momentum, which in torch is a step ahead.
            momentum_decay=1e6,
        ),
        partial(cosine, warm_up=0.1),
    ),
    "schedulefree-algoperf": Setting(
        "schedule-free AdamW with the values of its AlgoPerf submission",
        _peer(
            ScheduleFreePeer,
            "schedulefree",
            "AdamWScheduleFree",
            warm_up=0.02,
            lr=0.0025,
            betas=(0.9, 0.9955160),
            weight_decay=0.0812162,
        ),
        package="schedulefree",
    ),
    "schedulefree-adamw": Setting(
        "schedule-free AdamW at its defaults",
        _peer(ScheduleFreePeer, "schedulefree", "AdamWScheduleFree"),
        package="schedulefree",
    ),
    "schedulefree-radam": Setting(
        "schedule-free RAdam at its defaults",
        _peer(ScheduleFreePeer, "schedulefree", "RAdamScheduleFree"),
        package="schedulefree",
    ),
    "prodigy": Setting(
        "Prodigy with what its README recommends for diffusion models, and cosine",
        _peer(
            Peer,
            "prodigyopt",
            "Prodigy",
            weight_decay=0.01,
            safeguard_warmup=True,
            use_bias_correction=True,
        ),
        cosine,
        package="prodigyopt",
    ),
    "prodigy-schedulefree": Setting(
        "Prodigy with schedule-free averaging, at its defaults",
        _peer(ScheduleFreePeer, "prodigyplus", "ProdigyPlusScheduleFree"),
        package="prodigy-plus-schedule-free",
    ),
    "momo-adam": Setting(
        "MoMo-Adam at its defaults, which assume losses above zero",
        _peer(MomoPeer, "momo", "MomoAdam"),
        package="momo-opt",
    ),
}
"""Those that are compared: nothing about them depends on the task."""

CONSTANTS: dict[str, Setting] = {
    name: Setting(
        f"the direction and averaging of lqa-auto at {rate}", _torch(builders.BUILDERS[name])
    )
    for name, rate in CONSTANT_RATES.items()
}
"""The default's direction and averaging without a measured rate."""

TRIALS = 24
"""How many settings of AdamW the baseline tries on each task."""

SPACE: Mapping[str, tuple[float, float]] = {
    "rate": (3e-5, 3e-2),
    "weight decay": (1e-4, 1.0),
    "1 - beta2": (1e-3, 1e-1),
}
"""What the trials draw from, on a logarithmic scale."""

WARM_UPS = (0.0, 0.02, 0.05, 0.1)
"""The shares of a run that a trial may warm up for, equally often."""

SHAPES: Mapping[str, Callable[..., float]] = {"cosine": cosine, "constant": warmed_up}
"""What the rate does after the warm-up, equally often."""


def _trials() -> dict[str, Setting]:
    """Draws the trials, always the same.

    Each shape has a separate Latin hypercube: one trial in each twelfth of every range, so that
    no part of a range is left out by chance.
    """
    dice = np.random.default_rng(0)
    size, dimensions = TRIALS // len(SHAPES), len(SPACE) + 1
    found: dict[str, Setting] = {}
    for name, shape in SHAPES.items():
        strata = np.stack([dice.permutation(size) for _ in range(dimensions)], axis=1)
        for point in (strata + dice.random((size, dimensions))) / size:
            rate, decay, rest = (
                low * (high / low) ** float(share)
                for share, (low, high) in zip(point, SPACE.values(), strict=False)
            )
            warm_up = WARM_UPS[int(len(WARM_UPS) * point[-1])]
            found[f"trial-{len(found):02}"] = Setting(
                f"AdamW at {rate:.2g}, weight decay {decay:.2g}, beta2 {1.0 - rest:.3g}, warm-up "
                f"{warm_up:.0%}, {name}",
                _torch(AdamW, lr=rate, weight_decay=decay, betas=(0.9, 1.0 - rest)),
                partial(shape, warm_up=warm_up),
            )
    return found


BASELINE: dict[str, Setting] = _trials()
"""The trials of the baseline, the same ones on each task."""

SETTINGS: dict[str, Setting] = {**ENTRANTS, **CONSTANTS, **BASELINE}
"""All that is trained."""
