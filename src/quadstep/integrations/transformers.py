"""A callback for the Trainer of Transformers, and for trainers that inherit from it."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from quadstep.optimizer import LQA


class LQACallback(TrainerCallback):
    """Logs what LQA measures, and shows the averaged weights in checkpoints and after training.

    The trainer works without it, but logs the rate of its scheduler, which is not in force, and
    saves the averaged weights only right after an evaluation. The callback logs the measured rate
    as `learning_rate`, and adds `LQA.metrics()`. A reporter sees the latter if it comes later in
    `callbacks`; those of `report_to` come first. Without an LQA it does nothing.

    Example:
        >>> Trainer(model, args, optimizers=(opt, None), callbacks=[LQACallback()])
    """

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        optimizer: Any,
        lr_scheduler: Any,
        **kwargs: Any,
    ) -> None:
        """Lets the scheduler report the rate of the step, which the trainer logs next."""
        if _lqa(optimizer) is not None:
            lr_scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        logs: dict[str, float],
        optimizer: Any,
        **kwargs: Any,
    ) -> None:
        """Adds the metrics to the logs of training."""
        lqa = _lqa(optimizer)
        if lqa is not None and "learning_rate" in logs:
            metrics = lqa.metrics()
            logs.update(metrics)
            state.log_history[-1].update(metrics)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        optimizer: Any,
        **kwargs: Any,
    ) -> None:
        """Shows the averaged weights if a checkpoint follows; the trainer calls `train()` again."""
        lqa = _lqa(optimizer)
        if lqa is not None and control.should_save:
            lqa.eval()

    on_epoch_end = on_step_end

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        optimizer: Any,
        **kwargs: Any,
    ) -> None:
        """Shows the averaged weights."""
        lqa = _lqa(optimizer)
        if lqa is not None:
            lqa.eval()


def _lqa(optimizer: Any) -> LQA | None:
    """The optimizer, which Accelerate has wrapped; None if it is another."""
    inner = getattr(optimizer, "optimizer", optimizer)
    return inner if isinstance(inner, LQA) else None
