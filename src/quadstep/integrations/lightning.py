"""Lightning: averaged weights wherever the model is evaluated or saved, and the measured rate."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from functools import wraps
from types import MethodType
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from quadstep import LQA
from quadstep.integrations.methods import replaced

__all__ = ["LQA", "LQACallback"]


class LQACallback(Callback):
    """Trains a `LightningModule` whose `configure_optimizers` returns `LQA(self.parameters())`.

    - The parameters hold the averaged weights in validation, from the end of an epoch to the next
      batch, and after `fit`, in test and prediction. Every checkpoint holds them.
    - With automatic optimization, probes repeat `training_step` without a backward pass; `self.log`
      and the metrics of the module count it once. Whatever else `training_step` does beside
      computing the loss, as to print or to call a logger, is repeated.
    - The rate and the metrics of the last step are logged at the trainer's `log_every_n_steps`.

    Without an LQA among the trainer's optimizers it does nothing.

    Example:
        >>> trainer = lightning.Trainer(callbacks=[LQACallback()])
        >>> trainer.fit(module, batches)
    """

    def __init__(self) -> None:
        self._replaced = ExitStack()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Records the calls of `training_step`, and has checkpoints hold the averaged weights."""
        optimizers = _optimizers(trainer)
        if not optimizers:
            return
        if pl_module.automatic_optimization:
            (optimizer,) = optimizers
            step = wraps(pl_module.training_step)(optimizer.recorded(_without_traces(pl_module)))
            self._replaced.enter_context(replaced(pl_module, "training_step", step))
        save = pl_module.on_save_checkpoint

        @wraps(save)
        def save_averages(checkpoint: dict[str, Any]) -> None:
            _eval(trainer)
            # What was collected before is a copy where parameters are sharded.
            checkpoint["state_dict"] = trainer.strategy.lightning_module_state_dict()
            if "optimizer_states" in checkpoint:
                checkpoint["optimizer_states"] = [
                    trainer.strategy.optimizer_state(optimizer) for optimizer in trainer.optimizers
                ]
            save(checkpoint)

        self._replaced.enter_context(replaced(pl_module, "on_save_checkpoint", save_averages))

    def on_train_batch_start(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        """Puts the weights back from which training continues."""
        for optimizer in _optimizers(trainer):
            optimizer.train()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any
    ) -> None:
        """Logs what the last step measured."""
        step, interval = trainer.global_step, cast(Any, trainer).log_every_n_steps
        if step and interval and step % interval == 0:
            for number, optimizer in enumerate(_optimizers(trainer)):
                suffix = f"-{number}" if number else ""
                metrics = optimizer.metrics().items()
                pl_module.log_dict({name + suffix: value for name, value in metrics})

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Puts the averaged weights into the parameters."""
        _eval(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Puts the averaged weights into the parameters."""
        _eval(trainer)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Puts the averaged weights into the parameters, also where `fit` was interrupted."""
        _eval(trainer)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Puts the averaged weights into the parameters, also where `fit` was interrupted."""
        _eval(trainer)

    def on_exception(self, *_: Any, **__: Any) -> None:
        """Gives the module its own methods back."""
        self._replaced.close()

    def teardown(self, *_: Any, **__: Any) -> None:
        """Gives the module its own methods back."""
        self._replaced.close()


def _optimizers(trainer: Trainer) -> list[LQA]:
    return [optimizer for optimizer in trainer.optimizers if isinstance(optimizer, LQA)]


def _eval(trainer: Trainer) -> None:
    for optimizer in _optimizers(trainer):
        optimizer.eval()


def _without_traces(module: LightningModule) -> MethodType:
    """The training step; it neither logs nor updates metrics where it is repeated as a probe."""
    training_step = module.training_step

    def step(module: LightningModule, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            return training_step(*args, **kwargs)
        with replaced(module, "log", _ignore), _metrics_restored(module):
            return training_step(*args, **kwargs)

    return MethodType(step, module)


def _ignore(*_: Any, **__: Any) -> None:
    pass


@contextmanager
def _metrics_restored(module: nn.Module) -> Generator[None]:
    """Undoes what is done to the metrics among the submodules."""
    metrics = [part for part in module.modules() if isinstance(part, Metric | MetricCollection)]
    attributes = [{name: _copy(value) for name, value in vars(part).items()} for part in metrics]
    try:
        yield
    finally:
        for metric, saved in zip(metrics, attributes, strict=True):
            vars(metric).update(saved)


def _copy(value: Any) -> Any:
    """A copy of a state, which `update` may write into."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    return cast(list[Any], value).copy() if isinstance(value, list) else value
