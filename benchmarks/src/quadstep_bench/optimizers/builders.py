"""The optimizers of the comparisons: competitors, the configurations of LQA, and peers."""

import math
from collections.abc import Callable, Iterable
from functools import partial

from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop

from quadstep import LQA
from quadstep.directions import Gradient
from quadstep_bench.optimizers import (
    CONSTANT_RATES,
    HAND_TUNED,
    PEERS,
    SCHEDULED,
    WARM_UP,
    check_optimizer,
    peers,
)
from quadstep_bench.optimizers.controllers import AuthorsController, ConstantRateController
from quadstep_bench.optimizers.peers import Loss, Peer

# What the paper leaves open is torch's default.
_FAMILIES: dict[str, Callable[..., Optimizer]] = {
    "sgd": SGD,
    "sgd-m": partial(SGD, momentum=0.9),
    "sgd-nag": partial(SGD, momentum=0.9, nesterov=True),
    "adagrad": Adagrad,
    "rmsprop": RMSprop,
    "adam": Adam,
    "adamw": AdamW,
}


def _constant(rate: float, params: Iterable[Tensor]) -> Optimizer:
    return LQA(params, delta0=rate, controller=ConstantRateController())


BUILDERS: dict[str, Callable[[Iterable[Tensor]], Optimizer]] = {
    **{
        name: partial(_FAMILIES[row.family], lr=row.rate)
        for name, row in (HAND_TUNED | SCHEDULED).items()
    },
    "lqa-paper": LQA.paper,
    "lqa": partial(LQA, direction="gradient"),
    "lqa-authors": lambda params: LQA(
        params, direction=Gradient(), averaging=None, controller=AuthorsController()
    ),
    **{name: partial(_constant, rate) for name, rate in CONSTANT_RATES.items()},
    "lqa-adamw": lambda params: LQA(AdamW(params)),
    "lqa-sgdm": lambda params: LQA(SGD(params, lr=0.01, momentum=0.9)),
    "lqa-auto": LQA,
    "lqa-auto-decay": partial(LQA, weight_decay=0.1),
}


def build(name: str, model: nn.Module, loss: Loss = functional.cross_entropy) -> Optimizer | Peer:
    """Builds the optimizer of a setting for a model that is trained to lower a loss.

    Raises:
        ValueError: The name is unknown, or it is that of a peer whose package is not installed.
    """
    check_optimizer(name)
    if name in PEERS:
        return peers.build(name, model, loss)
    return BUILDERS[name](model.parameters())


def schedule(name: str, optimizer: Optimizer | Peer, epochs: float, total: int) -> None:
    """Sets what depends on how far a run is, before a step.

    The rate of a scheduled setting rises linearly and then falls to zero by half a cosine.

    Args:
        name: Of the setting; nothing is done for one that depends on nothing.
        optimizer: What `build` made of it.
        epochs: How many epochs the run has behind it, with the part of the present one.
        total: How many it has in all.
    """
    if isinstance(optimizer, LQA):
        controller = optimizer.strategies.controller
        if isinstance(controller, AuthorsController):
            controller.epoch = int(epochs)
    if name not in SCHEDULED:
        return
    progress = epochs / total
    fallen = max(0.0, progress - WARM_UP) / (1.0 - WARM_UP)
    share = min(progress / WARM_UP, 1.0) * 0.5 * (1.0 + math.cos(math.pi * fallen))
    for group in optimizer.param_groups:
        group["lr"] = share * SCHEDULED[name].rate
