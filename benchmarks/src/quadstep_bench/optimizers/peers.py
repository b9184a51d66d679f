"""Peers: optimizers of other packages that want no rate, at their defaults.

Each is driven as its own documentation says. What that takes beyond `step()` is kept here, so that
a run drives them all in one way.
"""

# The packages are optional and not typed.
# pyright: reportUnknownMemberType=false

import copy
import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from functools import partial
from importlib import import_module
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from quadstep_bench.optimizers import PEERS
from quadstep_bench.runner.environment import check_installed
from quadstep_bench.tasks import check_name

Loss = Callable[[Tensor, Tensor], Tensor]
"""Compares the outputs of a model with labels."""

Batches = Iterator[tuple[Tensor, Tensor]]


class Peer:
    """Drives an optimizer that wants nothing but `step()` after backward.

    Attributes:
        optimizer: The optimizer.
        forwards: Forward passes of the last step.
    """

    hidden: tuple[str, ...] = ()
    """Attributes of the optimizer that its own `state_dict` leaves out."""

    def __init__(self, optimizer: Any, model: nn.Module, loss: Loss) -> None:
        self.optimizer = optimizer
        self.forwards = 1
        self._model = model
        self._loss = loss
        self._others: Batches = iter(())

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of the optimizer, with the rates that it shows."""
        return self.optimizer.param_groups

    def begin(self, others: Batches) -> None:
        """Begins an epoch: `others` are its batches in an independent order."""
        self._others = others

    def step(self, closure: Callable[[], Tensor]) -> Tensor:
        """Takes a step and returns the loss before it; the closure runs the model forward alone."""
        self.optimizer.zero_grad()
        loss = closure()
        loss.backward()
        self.forwards = 1
        self._update(loss)
        return loss

    def _update(self, loss: Tensor) -> None:
        self.optimizer.step()

    def eval(self) -> None:
        """Puts the model into the state to be evaluated."""

    def train(self) -> None:
        """Puts the model into the state to go on from."""

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on, in training."""
        # Some are not there before the first step.
        hidden = {name: getattr(self.optimizer, name, None) for name in self.hidden}
        return {"optimizer": self.optimizer.state_dict(), "hidden": hidden}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up what `state_dict` returned."""
        self.optimizer.load_state_dict(state["optimizer"])
        for name in self.hidden:
            setattr(self.optimizer, name, state["hidden"][name])


class ScheduleFreePeer(Peer):
    """Evaluates at the average, where batch normalisation needs separate statistics."""

    def __init__(self, optimizer: Any, model: nn.Module, loss: Loss) -> None:
        super().__init__(optimizer, model, loss)
        self.train()

    @torch.no_grad()
    def eval(self) -> None:
        """Shows the average, and measures its statistics for batch normalisation."""
        self.optimizer.eval()
        if _has_batch_norm(self._model):
            self._model.train()
            for inputs, _ in islice(self._others, 50):
                self._model(inputs)

    def train(self) -> None:
        """Goes back to where gradients are taken."""
        self.optimizer.train()


class MomoPeer(Peer):
    """Is told the loss."""

    hidden = ("loss_avg", "lb", "_number_steps")

    def _update(self, loss: Tensor) -> None:
        self.optimizer.step(loss=loss)


class _Averaged(Peer):
    """Evaluates at the polynomial average that its package keeps beside the model."""

    def __init__(self, optimizer: Any, model: nn.Module, loss: Loss) -> None:
        super().__init__(optimizer, model, loss)
        self._averager = import_module("dog").PolynomialDecayAverager(model)
        self._kept: dict[str, Any] = {}

    def _update(self, loss: Tensor) -> None:
        self.optimizer.step()
        self._averager.step()

    def eval(self) -> None:
        self._kept = copy.deepcopy(self._model.state_dict())
        self._model.load_state_dict(self._averager.averaged_model.state_dict())

    def train(self) -> None:
        self._model.load_state_dict(self._kept)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"averager": self._averager.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._averager.load_state_dict(state["averager"])


class _GeN(Peer):
    """Fits a parabola on another batch at every fourth step, the laziness that it recommends."""

    laziness = 4

    def __init__(self, optimizer: Optimizer, model: nn.Module, loss: Loss) -> None:
        super().__init__(optimizer, model, loss)
        self._steps = 0
        self._measure = import_module("GeN").lr_parabola

    def _update(self, loss: Tensor) -> None:
        self._steps += 1
        if self._steps % self.laziness == 0:
            # It prints why a fit has failed, and scipy warns at each that three points are few.
            with redirect_stdout(io.StringIO()), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._measure(
                    self._model,
                    self.optimizer,
                    self._loss,
                    tr_iter=self._others,
                    device=loss.device,
                    task="image_cls",
                )
            for group in self.param_groups:
                # It leaves a number of NumPy's, which a checkpoint may not hold.
                group["lr"] = float(group["lr"])
            self.forwards += 3
        self.optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"steps": self._steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._steps = state["steps"]


def _has_batch_norm(model: nn.Module) -> bool:
    return any(name.endswith("running_mean") for name, _ in model.named_buffers())


def drive(
    driver: type[Peer], module: str, name: str, model: nn.Module, loss: Loss, **options: Any
) -> Peer:
    """Builds the optimizer of a module for a model, and what drives it."""
    params = [param for param in model.parameters() if param.requires_grad]
    # Some print what they are.
    with redirect_stdout(io.StringIO()):
        optimizer = getattr(import_module(module), name)(params, **options)
    return driver(optimizer, model, loss)


def _dog(name: str, model: nn.Module, loss: Loss) -> Peer:
    # What its documentation suggests, with and without batch normalisation.
    first = 1e-4 if _has_batch_norm(model) else 1e-6
    optimizer = getattr(import_module("dog"), name)(model.parameters(), reps_rel=first)
    return _Averaged(optimizer, model, loss)


def _gen(model: nn.Module, loss: Loss) -> Peer:
    # The base optimizer and the first rate of its quick start.
    return _GeN(AdamW(model.parameters(), lr=1e-4), model, loss)


_BUILDERS: dict[str, Callable[[nn.Module, Loss], Peer]] = {
    "schedulefree-adamw": partial(drive, ScheduleFreePeer, "schedulefree", "AdamWScheduleFree"),
    "schedulefree-radam": partial(drive, ScheduleFreePeer, "schedulefree", "RAdamScheduleFree"),
    "prodigy": partial(drive, Peer, "prodigyopt", "Prodigy"),
    "dadapt-adam": partial(drive, Peer, "dadaptation", "DAdaptAdam"),
    "gen": _gen,
    "momo": partial(drive, MomoPeer, "momo", "Momo"),
    "momo-adam": partial(drive, MomoPeer, "momo", "MomoAdam"),
    "dog": partial(_dog, "DoG"),
    "ldog": partial(_dog, "LDoG"),
    "cocob": partial(drive, Peer, "parameterfree", "COCOB"),
}


def build(name: str, model: nn.Module, loss: Loss) -> Peer:
    """Builds a peer for a model.

    Args:
        name: A name of `quadstep_bench.optimizers.PEERS`.
        model: The model to train.
        loss: What it is trained to lower.

    Raises:
        ValueError: The name is unknown, or its package is not installed.
    """
    check_name("peer", name, PEERS)
    check_installed([name])
    return _BUILDERS[name](model, loss)
