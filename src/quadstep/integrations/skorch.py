"""skorch: averaged weights at validation and after `fit`, and probes without a backward pass."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, cast

from skorch import NeuralNet
from skorch.callbacks import Callback

from quadstep import LQA
from quadstep.integrations.methods import replaced

__all__ = ["LQA", "LQACallback"]


class LQACallback(Callback):
    """Trains a net whose `optimizer` is LQA; `lr=None`, since skorch passes one to every optimizer.

    The parameters hold the averaged weights in validation, from the end of an epoch to the next,
    and after `fit`. List callbacks that save the net, as `Checkpoint`, after this one. The rate at
    the end of each epoch is in the history as "rate".

    Example:
        >>> net = NeuralNetClassifier(Net, optimizer=LQA, lr=None, callbacks=[LQACallback()])
        >>> net.fit(inputs, labels)
    """

    def initialize(self) -> LQACallback:
        """Starts with the methods of the net as they are."""
        self.recording_ = ExitStack()
        return self

    def on_epoch_begin(self, net: NeuralNet, *_: Any, **__: Any) -> None:
        """Puts the weights back from which training continues, and records what is trained on."""
        optimizer = _optimizer(net)
        optimizer.train()
        for name in ("infer", "get_loss"):
            recorded = optimizer.recorded(getattr(net, name))
            self.recording_.enter_context(replaced(net, name, recorded))

    def on_batch_begin(
        self, net: NeuralNet, batch: Any = None, training: bool | None = None, **_: Any
    ) -> None:
        """Puts the averaged weights into the parameters before validation."""
        if not training:
            self._eval(net)

    def on_epoch_end(self, net: NeuralNet, *_: Any, **__: Any) -> None:
        """Puts the averaged weights into the parameters."""
        self._eval(net)
        cast(Any, net).history.record("rate", _optimizer(net).rate)

    def on_train_end(self, net: NeuralNet, *_: Any, **__: Any) -> None:
        """Leaves the averaged weights in the parameters, also where `fit` was interrupted."""
        self._eval(net)

    def _eval(self, net: NeuralNet) -> None:
        # A net with replaced methods could not be pickled.
        self.recording_.close()
        _optimizer(net).eval()


def _optimizer(net: NeuralNet) -> LQA:
    """The optimizer of a net, which accelerate may have wrapped.

    Raises:
        TypeError: it is another.
    """
    optimizer = getattr(net.optimizer_, "optimizer", net.optimizer_)
    if not isinstance(optimizer, LQA):
        raise TypeError(
            f"LQACallback needs a net with optimizer=LQA, not {type(optimizer).__name__}; "
            "pass optimizer=LQA, lr=None, or remove the callback"
        )
    return optimizer
