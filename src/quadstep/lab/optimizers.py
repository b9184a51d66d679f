"""The optimizers of the comparison: the paper's competitors and the configurations of LQA."""

from collections.abc import Callable, Iterable
from functools import partial

from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, Optimizer, RMSprop

from quadstep import LQA
from quadstep.lab.settings import COMPETITORS, check_optimizer

# What the paper leaves open is torch's default.
_FAMILIES: dict[str, Callable[..., Optimizer]] = {
    "sgd": SGD,
    "sgd-m": partial(SGD, momentum=0.9),
    "sgd-nag": partial(SGD, momentum=0.9, nesterov=True),
    "adagrad": Adagrad,
    "rmsprop": RMSprop,
    "adam": Adam,
}

BUILDERS: dict[str, Callable[[Iterable[Tensor]], Optimizer]] = {
    **{name: partial(_FAMILIES[row.family], lr=row.rate) for name, row in COMPETITORS.items()},
    "lqa-paper": LQA.paper,
    "lqa": partial(LQA, direction="sgd", averaging=None),
    "lqa-auto": LQA,
}


def build(name: str, params: Iterable[Tensor]) -> Optimizer:
    """Builds the optimizer of a setting for `params`."""
    check_optimizer(name)
    return BUILDERS[name](params)
