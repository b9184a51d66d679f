"""A long run under faults: what goes wrong now and then must have no side effects, at any time."""

# Neither torch nor its loader is typed throughout.
# pyright: reportUnknownMemberType=false

import gc
import io
import math
import os
import random
import statistics
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional

from quadstep import LQA, Reason
from quadstep_bench.optimizers import CONFIGURATIONS, builders, check_configuration
from quadstep_bench.runner.environment import environment
from quadstep_bench.runner.files import Row, write_json
from quadstep_bench.runner.records import Results
from quadstep_bench.tasks import SHAPES, data

BATCH = 32

ODDS = 0.02
"""The share of steps in which something goes wrong."""

KINDS = ("exception", "interrupt", "nan", "inf", "gradient", "reload")

SAMPLES = 10
"""How often the memory is read during a run."""


class _Exception(Exception):
    """What a closure raises when it is told to."""


class _Interrupt(KeyboardInterrupt):
    """An interrupt that nobody typed."""


class Job:
    """A perceptron with batch normalisation and dropout on the digits."""

    def __init__(self, name: str, seed: int) -> None:
        digits = data.load("digits")
        self.inputs = digits.train_inputs.float().flatten(1) / 255
        self.labels = digits.train_labels
        self.name = name
        torch.manual_seed(seed)
        self.model, self.optimizer = self._fresh()

    def _fresh(self) -> tuple[nn.Sequential, LQA]:
        pixels = math.prod(SHAPES["digits"])
        model = nn.Sequential(
            nn.Linear(pixels, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 10)
        )
        optimizer = builders.build(self.name, model)
        assert isinstance(optimizer, LQA)
        return model, optimizer

    def closure(self) -> Callable[[], Tensor]:
        """Draws a batch and returns what evaluates the loss on it."""
        batch = torch.randint(len(self.inputs), (BATCH,))
        inputs, labels = self.inputs[batch], self.labels[batch]
        return lambda: functional.cross_entropy(self.model(inputs), labels)

    def reload(self) -> None:
        """Goes on as a new process would: from what a file holds, with new objects."""
        file = io.BytesIO()
        torch.save((self.model.state_dict(), self.optimizer.state_dict()), file)
        file.seek(0)
        model, optimizer = torch.load(file)
        drawn = torch.get_rng_state()
        self.model, self.optimizer = self._fresh()
        torch.set_rng_state(drawn)
        self.model.load_state_dict(model)
        self.optimizer.load_state_dict(optimizer)

    def tensors(self) -> list[Tensor]:
        """Copies of the parameters and buffers."""
        return [value.clone() for value in self.model.state_dict().values()]

    def parameters(self) -> list[Tensor]:
        """Copies of the parameters."""
        return [param.detach().clone() for param in self.model.parameters()]

    def loss(self) -> float:
        """The loss over the full training set, of the averaged weights where there are any."""
        self.optimizer.eval()
        self.model.eval()
        with torch.no_grad():
            return float(functional.cross_entropy(self.model(self.inputs), self.labels))


def soak(
    results: Results,
    console: Console,
    *,
    steps: int,
    seeds: int,
    names: tuple[str, ...] = CONFIGURATIONS,
) -> Path:
    """Trains each configuration under faults, and beside that without any.

    Args:
        results: The folder for `bench/soak.json`.
        console: Where to print.
        steps: How many steps a run takes.
        seeds: How many runs without faults to compare with.
        names: The configurations.

    Returns:
        The file. Its `rows` hold the `faults` of each kind that struck, after how many anything was
        not as before (`traces`), the final `loss` over the training set beside those of the runs
        without faults (`fault_free`), and the `memory` of the process in MiB, read at equal
        intervals of the run under faults.

    Raises:
        ValueError: A configuration is unknown.
        OSError: The file cannot be written.
    """
    for name in names:
        check_configuration(name)
    # More threads than that only wait for each other in a model as small as this.
    torch.set_num_threads(1)
    here = results.remember(environment(threads=1, device="cpu"))
    rows: list[Row] = []
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("", total=len(names) * (seeds + 1) * SAMPLES)
        for name in names:
            progress.update(bar, description=name)

            def advance() -> None:
                progress.advance(bar)

            clean = [_train(Job(name, seed), steps, None, advance)["loss"] for seed in range(seeds)]
            row = _train(Job(name, seed=0), steps, random.Random(0), advance)
            rows.append({"optimizer": name, "steps": steps} | row | {"fault_free": clean})
    console.print(_table(rows))
    path = results.root / "bench" / "soak.json"
    write_json({"environment": here, "batch_size": BATCH, "odds": ODDS, "rows": rows}, path)
    return path


def _train(job: Job, steps: int, dice: random.Random | None, advance: Callable[[], None]) -> Row:
    faults: Counter[str] = Counter(dict.fromkeys(KINDS, 0))
    traces = 0
    memory: list[float] = []
    for step in range(steps):
        if dice is not None and dice.random() < ODDS:
            kind = dice.choice(KINDS)
            survived = survive(job, kind, call=dice.choice((1, 2, 3)))
            faults[kind] += survived is not None
            traces += survived is False
        else:
            job.optimizer.step(job.closure())
        if (step + 1) % max(1, steps // SAMPLES) == 0:
            memory.append(_resident())
            advance()
    return {"faults": dict(faults), "traces": traces, "memory": memory, "loss": job.loss()}


def survive(job: Job, kind: str, call: int) -> bool | None:
    """Takes a step in which something goes wrong in one of the calls of the closure.

    Returns:
        Whether that left everything as it was; `None` if nothing went wrong: a step that holds the
        rate calls once, a probe has no gradients, and no rate comes from the call that looks
        whether the closure repeats itself.
    """
    if kind == "reload":
        before = job.tensors()
        job.reload()
        return _same(before, job.tensors())
    loss, calls = job.closure(), 0
    struck = repeats = False
    start = job.parameters()

    def closure() -> Tensor:
        nonlocal calls, struck, repeats
        calls += 1
        value = loss()
        if calls != call:
            return value
        struck, repeats = True, calls > 1 and _same(start, job.parameters())
        if kind == "exception":
            raise _Exception
        if kind == "interrupt":
            raise _Interrupt
        if kind == "gradient":
            # Finite itself, with an infinite derivative.
            return value + 0.0 * (value - value.detach()).sqrt()
        return value * (math.nan if kind == "nan" else math.inf)

    before = job.tensors()
    try:
        job.optimizer.step(closure)
    except (_Exception, _Interrupt):
        return _same(before, job.tensors())
    if not struck or repeats or (kind == "gradient" and call > 1):
        return None
    undone = job.optimizer.report.reason is Reason.NON_FINITE
    return undone and _same(before, job.tensors())


def _same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(map(torch.equal, one, other))


def _resident() -> float:
    """The memory of this process in MiB; 0 where the system does not tell."""
    gc.collect()
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def _table(rows: list[Row]) -> Table:
    table = Table(title="Runs under faults")
    for heading in ("optimizer", "faults", "traces", "loss", "without faults", "memory, MiB"):
        table.add_column(heading)
    for row in rows:
        clean = sorted(row["fault_free"])
        table.add_row(
            row["optimizer"],
            str(sum(row["faults"].values())),
            str(row["traces"]),
            f"{row['loss']:.3g}",
            f"{statistics.median(clean):.3g} ({clean[0]:.3g} to {clean[-1]:.3g})",
            f"{row['memory'][0]:.1f} to {row['memory'][-1]:.1f}",
        )
    return table
