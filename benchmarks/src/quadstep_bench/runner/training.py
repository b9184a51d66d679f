"""One run: from a configuration to its record, to be stopped and taken up at any point."""

# Torch is not typed throughout.
# pyright: reportUnknownMemberType=false

import io
import math
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional
from torch.optim import Optimizer

from quadstep import LQA
from quadstep_bench.optimizers import PEERS, builders, check_optimizer
from quadstep_bench.optimizers.peers import Loss, Peer
from quadstep_bench.runner.environment import Environment, environment
from quadstep_bench.runner.files import replacing
from quadstep_bench.runner.precision import computing_in
from quadstep_bench.runner.records import Collection, Config, Epoch, Outcome, Record
from quadstep_bench.tasks import TASKS, LossName, check_task, models
from quadstep_bench.tasks import data as data_sets
from quadstep_bench.tasks.data import Data, batches

EVALUATION_BATCH = 100
"""Few enough for the activations of a convolution to stay in the processor's cache."""

ACCELERATOR_BATCH = 1000
"""The same on an accelerator, which fewer would leave idle."""

DIVERGED_RATIO = 10.0
"""A run whose training loss is so many times the first one for `DIVERGED_EPOCHS` has diverged."""

DIVERGED_EPOCHS = 3

LOSSES: dict[LossName, Callable[..., Tensor]] = {
    "cross-entropy": functional.cross_entropy,
    "squared error": functional.mse_loss,
}

QUANTILES = {"min": 0.0, "q10": 0.1, "median": 0.5, "q90": 0.9, "max": 1.0}


def run(
    config: Config,
    collection: Collection,
    *,
    data_root: Path | None = None,
    device: str = "cpu",
    on_epoch: Callable[[Epoch], object] | None = None,
) -> Record:
    """Trains what is missing of a run and returns its record.

    After each epoch a checkpoint is written, from which the run goes on bit for bit until it has
    ended and its record is in the collection. A finished run of fewer epochs stays in its place
    until the longer one has finished.

    Args:
        config: The run.
        collection: Where its record belongs.
        data_root: The folder of the data sets, see `quadstep_bench.tasks.data.load`.
        device: Where to train, in torch's words.
        on_epoch: Called with the last epoch known at the start, then with every new one.

    Raises:
        ValueError: The task or the optimizer is unknown, its package is not installed, or the data
            set or record is unusable.
        OSError: A file cannot be written; what was written before is kept.
    """
    check_task(config.task)
    check_optimizer(config.optimizer)
    checkpoint = collection.checkpoint(config)
    present = collection.find(config)
    if present is not None and present.satisfies(config.epochs):
        checkpoint.unlink(missing_ok=True)
        return present
    data = data_sets.load_for(config, data_root).to(device)
    trial = _resume(checkpoint, config, device)
    if trial is None:
        trial = Trial(config, device)
        trial.data = data.digest()
        trial.evaluate(data)
    while True:
        trial.save(checkpoint)
        record = trial.record()
        if on_epoch is not None:
            on_epoch(record.epochs[-1])
        if record.status != "unfinished":
            collection.add(record)
            checkpoint.unlink(missing_ok=True)
            return record
        trial.train(data)


def shuffle(size: int, seed: int, epoch: int) -> Tensor:
    """Orders the training set for an epoch, the same for all optimizers."""
    # Torch seeds its generator by the lower 32 bits alone.
    generator = torch.Generator().manual_seed((seed << 16) + epoch)
    return torch.randperm(size, generator=generator)


_OTHER_ORDER = 1 << 15
"""Added to a seed, gives the independent order of an epoch's batches that a peer may ask for."""


def step(
    optimizer: Optimizer | Peer,
    model: Callable[[Tensor], Tensor],
    inputs: Tensor,
    labels: Tensor,
    criterion: Loss = functional.cross_entropy,
) -> Tensor:
    """Takes a step on a batch and returns the loss before it, detached."""
    return take_step(optimizer, lambda: criterion(model(inputs), labels))


def take_step(optimizer: Optimizer | Peer, forward: Callable[[], Tensor]) -> Tensor:
    """Takes a step to lower the loss that a function computes, and returns it as it was before."""

    def closure() -> Tensor:
        loss = forward()
        if not isinstance(optimizer, (LQA, Peer)):
            optimizer.zero_grad()
            loss.backward()
        return loss

    # Torch declares closures that return floats, and passes on whatever they return.
    take: Any = optimizer.step
    return take(closure).detach()


def passes_of(optimizer: Optimizer | Peer) -> tuple[int, int]:
    """The forward and backward passes of the last step."""
    if isinstance(optimizer, LQA):
        report = optimizer.report
        return report.forwards, report.backwards
    return optimizer.forwards if isinstance(optimizer, Peer) else 1, 1


class Trial:
    """A run between two epochs."""

    def __init__(self, config: Config, device: str) -> None:
        torch.manual_seed(config.seed)
        self.config = config
        self.device = device
        self.model = models.build(config.task).to(device)
        self.optimizer = builders.build(config.optimizer, self.model, self.loss)
        self.environment = environment(
            threads=torch.get_num_threads(),
            device=device,
            packages=[PEERS[config.optimizer]] if config.optimizer in PEERS else [],
        )
        self.data: str | None = None
        self.resumed: list[tuple[int, Environment]] = []
        self.epochs: list[Epoch] = []
        self.seconds = 0.0
        self.forwards = 0
        self.backwards = 0
        self.lost = False
        """Whether no batch of the last epoch had a finite loss."""

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """The loss that is trained: the mean, times the scale that the task gives it."""
        task = TASKS[self.config.task]
        return task.loss_scale * LOSSES[task.loss](outputs, labels)

    def train(self, data: Data) -> None:
        """Trains for an epoch and evaluates."""
        if isinstance(self.optimizer, Peer):
            self.optimizer.begin(self._batches(data, self.config.seed + _OTHER_ORDER))
        losses: list[Tensor] = []
        rates: list[float] = []
        reasons: Counter[str] = Counter()
        started = time.perf_counter()
        size, seen = len(data.train_labels), 0
        for inputs, labels in self._batches(data, self.config.seed):
            # In the middle of the step, so that neither the first nor the last is lost.
            passes = len(self.epochs) - 1 + (seen + len(labels) / 2) / size
            builders.schedule(self.config.optimizer, self.optimizer, passes, self.config.epochs)
            seen += len(labels)
            losses.append(self._step(inputs, labels))
            rates.append(self.optimizer.param_groups[0].get("lr", math.nan))
            if isinstance(self.optimizer, LQA):
                reasons[self.optimizer.report.reason.value] += 1
            forwards, backwards = passes_of(self.optimizer)
            self.forwards += forwards
            self.backwards += backwards
        # The device is waited for here alone, within the time measured.
        self.lost = not torch.stack(losses).isfinite().any().item()
        self.seconds += time.perf_counter() - started
        levels = torch.tensor(list(QUANTILES.values()), dtype=torch.float64)
        quantiles = torch.tensor(rates, dtype=torch.float64).quantile(levels)
        rate = {name: float(value) for name, value in zip(QUANTILES, quantiles, strict=True)}
        self.evaluate(data, rate, reasons)

    def _batches(self, data: Data, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        order = shuffle(len(data.train_labels), seed, len(self.epochs)).to(self.device)
        return batches(data.train_inputs, data.train_labels, self.config.batch_size, order)

    def _step(self, inputs: Tensor, labels: Tensor) -> Tensor:
        return step(self.optimizer, self._outputs, inputs, labels, self.loss)

    def _outputs(self, inputs: Tensor) -> Tensor:
        """Runs the model in the run's precision; losses are made in float32."""
        with computing_in(self.config.precision, self.device):
            return self.model(inputs).float()

    def evaluate(
        self,
        data: Data,
        rate: dict[str, float] | None = None,
        reasons: Mapping[str, int] | None = None,
    ) -> None:
        """Adds the state after an epoch, which saw these rates and reasons."""
        if isinstance(self.optimizer, (LQA, Peer)):
            self.optimizer.eval()
        self.model.eval()
        train_loss, _ = self._measure(data.train_inputs, data.train_labels)
        test_loss, test_accuracy = self._measure(data.test_inputs, data.test_labels)
        self.model.train()
        if isinstance(self.optimizer, (LQA, Peer)):
            self.optimizer.train()
        self.epochs.append(
            Epoch(
                epoch=len(self.epochs),
                train_loss=train_loss,
                test_loss=test_loss,
                test_accuracy=test_accuracy,
                seconds=self.seconds,
                forwards=self.forwards,
                backwards=self.backwards,
                rate=rate,
                reasons=dict(reasons or {}),
            )
        )

    @torch.no_grad()
    def _measure(self, inputs: Tensor, labels: Tensor) -> tuple[float, float]:
        """Returns the mean loss, without scale, and the accuracy, nan if nothing is classified."""
        name = TASKS[self.config.task].loss
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        right = torch.zeros((), dtype=torch.float64, device=self.device)
        size = EVALUATION_BATCH if inputs.is_cpu else ACCELERATOR_BATCH
        for some, truth in batches(inputs, labels, size):
            output = self._outputs(some)
            loss += LOSSES[name](output, truth, reduction="sum")
            right += (output.argmax(1) == truth).sum() if name == "cross-entropy" else math.nan
        return loss.item() / labels.numel(), right.item() / labels.numel()

    def record(self) -> Record:
        """Describes the run as far as it came."""
        config = replace(self.config, epochs=max(self.config.epochs, self.epochs[-1].epoch))
        return Record(
            config,
            tuple(self.epochs),
            self._status(),
            self.environment,
            self.data,
            tuple(self.resumed),
        )

    def _status(self) -> Outcome | Literal["unfinished"]:
        limit = DIVERGED_RATIO * self.epochs[0].train_loss
        recent = self.epochs[1:][-DIVERGED_EPOCHS:]
        risen = len(recent) == DIVERGED_EPOCHS and all(row.train_loss > limit for row in recent)
        if self.lost or risen or not math.isfinite(self.epochs[-1].train_loss):
            return "diverged"
        return "finished" if self.epochs[-1].epoch >= self.config.epochs else "unfinished"

    def save(self, path: Path) -> None:
        """Writes all that the run needs to go on from here."""
        state = {
            "config": asdict(self.config),
            "environment": self.environment,
            "data": self.data,
            "resumed": self.resumed,
            "epochs": [asdict(epoch) for epoch in self.epochs],
            "lost": self.lost,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        }
        # By way of memory: when the disk is full, torch's own writer hides the reason.
        buffer = io.BytesIO()
        torch.save(state, buffer)
        with replacing(path) as file:
            file.write(buffer.getbuffer())

    def load(self, path: Path) -> None:
        """Takes up the state that was written to `path`."""
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        before = Config(**state["config"])
        if not self.config.extends(before):
            raise ValueError(f"it belongs to {before}")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"])
        torch.cuda.set_rng_state_all(state["random_cuda"])
        self.epochs = [Epoch(**row) for row in state["epochs"]]
        self.lost = state["lost"]
        last = self.epochs[-1]
        self.seconds, self.forwards, self.backwards = last.seconds, last.forwards, last.backwards
        now, self.environment, self.data = self.environment, state["environment"], state["data"]
        self.resumed = [(epoch, environment) for epoch, environment in state["resumed"]]
        before = self.resumed[-1][1] if self.resumed else self.environment
        if now != before:
            self.resumed.append((last.epoch, now))


def _resume(checkpoint: Path, config: Config, device: str) -> Trial | None:
    if not checkpoint.exists():
        return None
    trial = Trial(config, device)
    try:
        trial.load(checkpoint)
    except Exception as error:  # Whatever a damaged file raises, the run can start anew.
        reason = f"{type(error).__name__}: {error}"
        warnings.warn(f"{checkpoint} is damaged, {config} starts anew: {reason}", stacklevel=3)
        return None
    return trial
