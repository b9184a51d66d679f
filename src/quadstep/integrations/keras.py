"""Keras 3 on torch: a callback that trains the model with LQA."""

from __future__ import annotations

import operator
from contextlib import ExitStack
from typing import Any, NamedTuple, cast

import keras
import torch
from torch import Tensor

from quadstep import LQA
from quadstep.integrations.methods import replaced

__all__ = ["LQA", "LQACallback"]


class LQACallback(keras.callbacks.Callback):
    """Trains a Keras model with LQA, in place of the optimizer that it was compiled with.

    The variables hold the averaged weights in validation, from the end of an epoch to the next
    batch, and after `fit`. List callbacks that save the model after this one. The history has the
    rate at the end of each epoch as "rate". To go on, fit again with the same callback.

    Args:
        options: arguments of `LQA`, as `weight_decay`.

    Attributes:
        optimizer: the LQA; None before the first `fit`.

    Raises:
        RuntimeError: Keras runs on another backend than torch.
        ValueError: the model was compiled with `optimizer=None` or `jit_compile=True`.

    Example:
        >>> model.compile(loss="sparse_categorical_crossentropy")
        >>> model.fit(inputs, labels, callbacks=[LQACallback()])
    """

    def __init__(self, **options: Any) -> None:
        super().__init__()
        if keras.backend.backend() != "torch":
            raise RuntimeError(
                f"LQA trains on torch, but Keras runs on {keras.backend.backend()}; set "
                "KERAS_BACKEND=torch in the environment before keras is imported"
            )
        self.optimizer: LQA | None = None
        self._options = options
        self._replaced = ExitStack()

    def on_train_begin(self, logs: Any = None) -> None:
        """Takes the place of the model's optimizer."""
        model = cast(Any, self).model
        if model.optimizer is None:
            raise ValueError(
                "LQACallback takes the place of the model's optimizer, but the model was compiled "
                "with optimizer=None; leave optimizer out of compile()"
            )
        if model.jit_compile:
            raise ValueError(
                "LQACallback repeats forward passes, which a compiled train step does not allow; "
                "leave jit_compile out of compile()"
            )
        self._replaced.close()  # after an interrupt nothing has
        parameters = _tensors(model.trainable_variables)
        if self.optimizer is None or not _holds(self.optimizer, parameters):
            self.optimizer = LQA(parameters, model=model, **self._options)
        step = _Step(self.optimizer, _tensors(model.non_trainable_variables))
        for owner, name, method in (
            (model, "compute_loss", self.optimizer.recorded(model.compute_loss)),
            (model.optimizer, "apply", step.apply),
            (model.optimizer, "scale_loss", _unscaled),
        ):
            self._replaced.enter_context(replaced(owner, name, method))
        self._replaced.callback(model.register_forward_pre_hook(step.before_forward).remove)

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Puts the weights back from which training continues."""
        if self.optimizer is not None:
            self.optimizer.train()

    def on_test_begin(self, logs: Any = None) -> None:
        """Puts the averaged weights into the variables."""
        if self.optimizer is not None:
            self.optimizer.eval()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Puts the averaged weights into the variables."""
        if self.optimizer is not None:
            self.optimizer.eval()
            if logs is not None:
                logs["rate"] = self.optimizer.rate

    def on_train_end(self, logs: Any = None) -> None:
        """Leaves the averaged weights in the variables, and the model as it was compiled."""
        self._replaced.close()


class _Saved(NamedTuple):
    tensor: Tensor
    version: int
    value: Tensor


class _Step:
    """Steps of LQA in place of those of the model's optimizer.

    Keras keeps what forward passes change, running means and the states of generators, in
    variables, which are no buffers of torch. They are rewound before each probe.
    """

    def __init__(self, optimizer: LQA, state: list[Tensor]) -> None:
        self._optimizer = optimizer
        self._before = [_save(tensor) for tensor in state]
        self._rewound: list[_Saved] | None = None  # a list while probes run

    def before_forward(self, *_: Any) -> None:
        """Rewinds the state before a probe, and saves it before other passes of training."""
        if self._rewound is not None:
            _write(self._rewound)
        elif torch.is_grad_enabled():
            # What has not changed, as frozen weights, is not copied again.
            self._before = [
                _save(saved.tensor) if _has_changed(saved) else saved for saved in self._before
            ]

    def apply(self, gradients: Any, variables: Any) -> None:
        """Takes a step; the gradients are those of the parameters."""
        self._rewound = [saved for saved in self._before if _has_changed(saved)]
        after = [_save(saved.tensor) for saved in self._rewound]
        try:
            self._optimizer.step()
        finally:
            self._rewound = None
            _write(after)


def _holds(optimizer: LQA, parameters: list[Tensor]) -> bool:
    """Whether an optimizer has these parameters; layers may have been frozen since."""
    own = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return len(own) == len(parameters) and all(map(operator.is_, own, parameters))


def _unscaled(loss: Tensor) -> Tensor:
    return loss


def _tensors(variables: Any) -> list[Tensor]:
    return [variable.value for variable in variables]


def _save(tensor: Tensor) -> _Saved:
    return _Saved(tensor, tensor._version, tensor.detach().clone())


def _has_changed(saved: _Saved) -> bool:
    return saved.tensor._version != saved.version


def _write(state: list[_Saved]) -> None:
    with torch.no_grad():
        for saved in state:
            saved.tensor.copy_(saved.value)
