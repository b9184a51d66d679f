"""Benchmarks: the time and memory that measured rates cost, and how probes had best return.

Everything is measured side by side in one process: the subjects take turns, a block of steps each,
and ratios are taken within a round of turns, so that whatever else the machine does affects them
equally. Inputs are random numbers in the shapes of the data sets: what is learned makes no
difference to memory and little to time (rectifiers that a runaway rate has set to zero are faster).
Torch runs with as many threads as it is set to.
"""

# Torch is not typed throughout, and its foreach operations are private in name alone.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportPrivateUsage=false, reportPrivateImportUsage=false

import copy
import random
import time
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD, AdamW, Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from quadstep import LQA, Reason
from quadstep.line import Displacement
from quadstep.rounding import chunks
from quadstep_bench.curves import Array
from quadstep_bench.optimizers import BASES, CONFIGURATIONS, builders
from quadstep_bench.runner import training
from quadstep_bench.runner.environment import environment
from quadstep_bench.runner.files import Row, write_json
from quadstep_bench.runner.records import Results
from quadstep_bench.tasks import CLASSES, SHAPES, TASKS, check_name, models

BATCH = 64

BLOCK = 10
"""How many steps make a turn: the interval between two measurements, at times one more."""

TIME_LIMIT = 300.0
"""After so many seconds on one model no round begins, but for the first `MIN_ROUNDS`."""

MIN_ROUNDS = 3

Batch = tuple[Tensor, Tensor]


def images(task: str) -> tuple[nn.Module, list[Batch]]:
    """Builds the model of a task, and batches of random images."""
    shape = SHAPES[TASKS[task].data]
    return models.build(task), [
        (torch.rand(BATCH, *shape), torch.randint(CLASSES, (BATCH,))) for _ in range(BLOCK)
    ]


def text() -> tuple[nn.Module, list[Batch]]:
    """Builds a transformer, and batches of random characters."""
    characters = partial(torch.randint, models.CHARACTERS, (BATCH, models.CONTEXT))
    return models.transformer(), [(characters(), characters()) for _ in range(BLOCK)]


WORKLOADS: dict[str, Callable[[], tuple[nn.Module, list[Batch]]]] = {
    "logistic": partial(images, "logistic-mnist"),
    "mlp": partial(images, "mlp-mnist"),
    "lenet": partial(images, "lenet-mnist"),
    "resnet18": partial(images, "resnet18-cifar10"),
    "transformer": text,
}
"""Models, and the batches of a turn."""


# What measured rates cost -------------------------------------------------------------------------

BUILDERS: dict[str, Callable[[Iterable[Tensor]], Optimizer]] = {
    "sgd": SGD,
    "adamw": partial(AdamW, foreach=True),
    **{name: builders.BUILDERS[name] for name in CONFIGURATIONS},
    "lqa-sgd": lambda params: LQA(SGD(params, lr=0.1)),
    "lqa-adamw": lambda params: LQA(AdamW(params, foreach=True)),
}

PROBES = {
    "sgd": 0.0,
    "adamw": 0.0,
    "lqa-auto": 0.1,
    "lqa": 0.1,
    "lqa-paper": 2.0,
    "lqa-sgd": 1.1,
    "lqa-adamw": 1.1,
}
"""Forward passes a step beyond the first.

Of ten measurements one takes two probes, nine take one; `lqa-auto` and `lqa` measure in one step of
ten, where the second probe, in one step of a hundred, is left out.
"""

PAIRS = (
    *BASES.items(),
    ("lqa", "adamw"),
    ("lqa-auto", "sgd"),
    ("lqa-sgd", "sgd"),
    ("lqa-adamw", "adamw"),
)
"""Optimizers, and the bases that their steps are compared with."""

WARM_UP_BLOCKS = 100
"""How many blocks an optimizer is given to settle down."""

MEMORY_STEPS = 40
"""Enough to reuse a rate and to measure it again."""


def measure(
    results: Results,
    console: Console,
    *,
    names: Sequence[str],
    rounds: int,
    device: str = "cpu",
    label: str = "",
) -> Path:
    """Measures time and memory of each configuration beside those of the base optimizers.

    Args:
        results: The folder for `bench/cost.json`.
        console: Where to print.
        names: The models, of `WORKLOADS`.
        rounds: How many rounds of turns to take on each model.
        device: Where to train, in torch's words.
        label: Added to the name of the file, so that those of several machines lie side by side.

    Returns:
        The file. Its `rows` hold the median `ratio` of the time a step to that of the `base`, the
        quartiles `low` and `high`, and the `floor`: what the forward passes of the probes cost
        alone. Its `memory` is in copies of the parameters, beyond them and their gradients:
        the persistent `state` and the `transient` peak within a `step` of each kind.

    Raises:
        ValueError: A model is unknown, or an optimizer does not settle down on it.
        OSError: The file cannot be written.
    """
    for name in names:
        check_name("model", name, WORKLOADS)
    path = results.root / "bench" / f"{'-'.join(filter(None, ('cost', label)))}.json"
    conditions = _conditions(results, device)
    rows: list[Row] = []
    memory: list[Row] = []
    for name in names:
        torch.manual_seed(0)
        model, batches = WORKLOADS[name]()
        model = model.to(device)
        batches = [(inputs.to(device), labels.to(device)) for inputs, labels in batches]
        subjects: dict[str, Callable[[], float]] = {
            "forward": partial(_time_forward, model, batches)
        }
        for optimizer in BUILDERS:
            subjects[optimizer] = Subject(optimizer, model, batches).turn
        seconds = _take_turns(subjects, rounds, f"time on {name}", console)
        rows += [{"model": name} | _cost(optimizer, base, seconds) for optimizer, base in PAIRS]
        memory += [
            {"model": name, "optimizer": optimizer} | row
            for optimizer in ("adamw", "lqa-auto", "lqa")
            for row in _memory(optimizer, model)
        ]
        # After each model, so that an interruption loses no more than one.
        write_json(conditions | {"rows": rows, "memory": memory}, path)
    console.print(_table("Time a step, as a ratio to the base optimizer's own", rows))
    console.print(_table("Memory beyond parameters and gradients, in copies of either", memory))
    return path


class Subject:
    """An optimizer with a separate copy of the model, which takes the same steps at each turn.

    They start from where it has settled down: no turn does other work than the one before.
    """

    def __init__(self, name: str, model: nn.Module, batches: Sequence[Batch]) -> None:
        self.model = copy.deepcopy(model)
        self.optimizer = BUILDERS[name](self.model.parameters())
        self.batches = batches
        self._train()
        settled = BLOCK * (1.0 + PROBES[name])
        for _ in range(WARM_UP_BLOCKS):
            self._start = copy.deepcopy((self.model.state_dict(), self.optimizer.state_dict()))
            before = self._faults()
            if self._count_forwards() == settled and self._faults() == before:
                return
        raise ValueError(
            f"{name} did not settle within {WARM_UP_BLOCKS * BLOCK} steps: measure other models"
        )

    def turn(self) -> float:
        """Takes the steps again and returns how many seconds they took."""
        model, optimizer = copy.deepcopy(self._start)
        self.model.load_state_dict(model)
        self.optimizer.load_state_dict(optimizer)
        return _time(self._train, self.batches[0][0].device)

    def _train(self) -> None:
        for inputs, labels in self.batches:
            training.step(self.optimizer, self.model, inputs, labels)

    def _count_forwards(self) -> int:
        calls: list[nn.Module] = []

        def note(module: nn.Module, *_: object) -> None:
            calls.append(module)

        with self.model.register_forward_hook(note):
            self._train()
        return len(calls)

    def _faults(self) -> int:
        if not isinstance(self.optimizer, LQA):
            return 0
        return self.optimizer.report.counts.get(Reason.NON_FINITE, 0)


def _cost(optimizer: str, base: str, seconds: Mapping[str, Array]) -> Row:
    forward = float(np.median(seconds["forward"] / seconds[base]))
    return {
        "optimizer": optimizer,
        "base": base,
        **_compare(seconds[optimizer], seconds[base]),
        "floor": 1.0 + PROBES[optimizer] * forward,
        "step_ms": _milliseconds(seconds[optimizer]),
    }


def _time_forward(model: nn.Module, batches: Sequence[Batch]) -> float:
    @torch.no_grad()
    def evaluate() -> None:
        for inputs, labels in batches:
            functional.cross_entropy(model(inputs), labels)

    return _time(evaluate, batches[0][0].device)


def _memory(name: str, model: nn.Module) -> list[Row]:
    """Measures the memory of an optimizer of a model's parameters.

    The gradients are there before the steps, and the loss, the norm of the parameters, has no
    activations: all memory is the optimizer's.
    """
    params = [nn.Parameter(torch.randn_like(param)) for param in model.parameters()]
    optimizer = BUILDERS[name](params)

    def closure() -> Tensor:
        return torch.stack([torch.linalg.vector_norm(param) for param in params]).norm()

    transient: dict[str, int] = {}
    for _ in range(MEMORY_STEPS):
        optimizer.zero_grad()
        loss = closure()
        loss.backward()
        with Storages() as storages:
            if isinstance(optimizer, LQA):
                optimizer.step(closure, loss=loss)
                step = "reusing" if optimizer.report.reason is Reason.REUSED else "measuring"
            else:
                optimizer.step()
                step = "plain"
        transient[step] = storages.peak
    states: Iterable[Mapping[str, Any]] = optimizer.state.values()
    state = [value for own in states for value in own.values() if isinstance(value, Tensor)]
    copies = size_of(params)
    return [
        {"step": step, "state": size_of(state) / copies, "transient": transient[step] / copies}
        for step in transient
    ]


class Storages(TorchDispatchMode):
    """Follows what the tensors that are made meanwhile take up.

    Attributes:
        peak: the most bytes at any time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._held = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {storage.data_ptr() for storage in _storages((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            if storage.data_ptr() not in given:
                self._held += storage.nbytes()
                weakref.finalize(storage, self._free, storage.nbytes())
        self.peak = max(self.peak, self._held)
        return result

    def _free(self, size: int) -> None:
        self._held -= size


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def size_of(tensors: Iterable[Tensor]) -> int:
    """Sums the bytes of tensors."""
    return sum(tensor.nbytes for tensor in tensors)


# How probes had best return -----------------------------------------------------------------------

RATE = 1e-3
"""How far out the probes are, along a direction of unit variance."""

TRIPS = (1, 100, 10_000)


class Snapshot:
    """Moves from a copy of the start, and returns to it bit for bit, as the library does."""

    def __init__(self, params: list[Tensor], direction: list[Tensor]) -> None:
        self.params, self.direction = params, direction
        self._start = [param.clone() for param in params]

    def move(self, rate: float) -> None:
        """Takes the parameters to a rate."""
        self.restore()
        torch._foreach_add_(self.params, self.direction, alpha=-rate)

    def restore(self) -> None:
        """Returns the parameters to rate zero."""
        torch._foreach_copy_(self.params, self._start)


class Subtraction:
    """Moves by differences, back to the start too: that needs no copy, and rounds."""

    def __init__(self, params: list[Tensor], direction: list[Tensor]) -> None:
        self.params, self.direction = params, direction
        self._rate = 0.0

    def move(self, rate: float) -> None:
        """Takes the parameters straight from one rate to another."""
        torch._foreach_add_(self.params, self.direction, alpha=self._rate - rate)
        self._rate = rate

    def restore(self) -> None:
        """Takes the displacement back."""
        self.move(0.0)


class Compensation(Subtraction):
    """The same, with the entries kept that this would not return, as `restore="subtract"` does."""

    def __init__(self, params: list[Tensor], direction: list[Tensor]) -> None:
        super().__init__(params, direction)
        self._displacements: list[Displacement] = []

    def move(self, rate: float) -> None:
        """Takes the parameters to a rate, by way of the start."""
        while self._displacements:
            self._displacements.pop().undo()
        for tensors in zip(self.params, self.direction, strict=True) if rate else ():
            for param, direction in zip(*map(chunks, tensors), strict=True):
                displacement = Displacement(param, direction, -rate)
                displacement.move()
                self._displacements.append(displacement)


Method = Callable[[list[Tensor], list[Tensor]], Snapshot | Subtraction]

METHODS: dict[str, Method] = {
    "snapshot": Snapshot,
    "subtraction": Subtraction,
    "compensation": Compensation,
}


def measure_restore(results: Results, console: Console, *, rounds: int) -> Path:
    """Measures what it takes to return from probes: a snapshot, subtraction, compensated too.

    Args:
        results: The folder for `bench/restore.json`.
        console: Where to print.
        rounds: How many rounds of turns to take.

    Returns:
        The file. Its `rows` hold the median `ratio` of the time of two probes and the return,
        without their forward passes, to that by subtraction, the quartiles `low` and `high`, the
        extra `memory` in copies of the parameters, and the `drift` after so many round trips: the
        largest change of a parameter, relative to the largest one of its tensor.

    Raises:
        OSError: The file cannot be written.
    """
    path = results.root / "bench" / "restore.json"
    conditions = _conditions(results, "cpu")
    title = "Returning from probes, as a ratio to doing so by subtraction"
    rows = [
        {"model": name, "dtype": str(dtype).removeprefix("torch.")} | row
        for name in ("mlp", "lenet")
        for dtype in (torch.float32, torch.bfloat16)
        for row in _returns(name, dtype, rounds, console)
    ]
    console.print(_table(title, rows, hidden=("low", "high", "rounds", "probes_ms")))
    write_json(conditions | {"rows": rows}, path)
    return path


def _returns(name: str, dtype: torch.dtype, rounds: int, console: Console) -> list[Row]:
    torch.manual_seed(0)
    model, _ = WORKLOADS[name]()
    params = [param.detach().to(dtype) for param in model.parameters()]
    direction = [torch.randn_like(param) for param in params]
    turns = {
        method: partial(_time_probes, METHODS[method], params, direction) for method in METHODS
    }
    seconds = _take_turns(turns, rounds, f"time on {name}", console)
    return [
        {"method": method}
        | _compare(seconds[method], seconds["subtraction"])
        | {"probes_ms": _milliseconds(seconds[method])}
        | {"memory": _peak(METHODS[method], params, direction) / size_of(params)}
        | _drift(METHODS[method], params)
        for method in METHODS
    ]


def _probe(line: Snapshot | Subtraction, rate: float = RATE) -> None:
    """Goes both ways and returns, without evaluating any loss."""
    line.move(rate)
    line.move(-rate)
    line.restore()


def _time_probes(method: Method, params: list[Tensor], direction: list[Tensor]) -> float:
    def probe() -> None:
        for _ in range(BLOCK):
            _probe(method(params, direction))

    return _time(probe, params[0].device)


def _peak(method: Method, params: list[Tensor], direction: list[Tensor]) -> int:
    with Storages() as storages:
        _probe(method(params, direction))
    return storages.peak


def _drift(method: Method, params: list[Tensor]) -> Row:
    """Measures how far the parameters are from where they were, after many round trips."""
    start = [param.clone() for param in params]
    size = max(param.numel() for param in params)
    noise = torch.randn(2 * size, dtype=params[0].dtype)
    # As in training, no two directions and no two rates are the same.
    dice = random.Random(0)
    drift: Row = {}
    for trip in range(1, max(TRIPS) + 1):
        offsets = [dice.randrange(size) for _ in params]
        direction = [
            noise[offset : offset + param.numel()].view_as(param)
            for offset, param in zip(offsets, params, strict=True)
        ]
        _probe(method(params, direction), RATE * dice.uniform(0.5, 1.5))
        if trip in TRIPS:
            drift[f"drift_{trip}"] = max(
                float((param - origin).abs().max() / origin.abs().max())
                for param, origin in zip(params, start, strict=True)
            )
    return drift


# Turns, ratios and tables -------------------------------------------------------------------------


def _time(work: Callable[[], object], device: torch.device) -> float:
    """Times work in seconds, the device waited for."""
    _wait(device)
    started = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _take_turns(
    turns: Mapping[str, Callable[[], float]], rounds: int, label: str, console: Console
) -> dict[str, Array]:
    """Goes round the turns and returns the seconds that each took, round by round."""
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    started = time.perf_counter()
    # Drawn between rounds alone: a thread that draws would take time from what is measured.
    for done in track(range(rounds), label, console=console, transient=True, auto_refresh=False):
        if done >= MIN_ROUNDS and time.perf_counter() - started > TIME_LIMIT:
            break
        for name, turn in turns.items():
            seconds[name].append(turn())
    return {name: np.array(values) for name, values in seconds.items()}


def _compare(seconds: Array, base: Array) -> Row:
    low, ratio, high = np.quantile(seconds / base, (0.25, 0.5, 0.75)).tolist()
    return {"ratio": ratio, "low": low, "high": high, "rounds": len(seconds)}


def _milliseconds(seconds: Array) -> float:
    """The median time of one step of a block."""
    return 1e3 * float(np.median(seconds)) / BLOCK


def _table(title: str, rows: Sequence[Row], hidden: Collection[str] = ()) -> Table:
    # Without lines, so that all columns fit into a terminal.
    table = Table(title=title, box=None, pad_edge=False)
    keys = [key for key in rows[0] if key not in hidden]
    for key in keys:
        justify = "left" if isinstance(rows[0][key], str) else "right"
        table.add_column(key.replace("_", " "), justify=justify)
    for row in rows:
        table.add_row(
            *(f"{row[key]:.3g}" if isinstance(row[key], float) else str(row[key]) for key in keys)
        )
    return table


def _conditions(results: Results, device: str) -> Row:
    """Describes what is about to run; its source may change before the end."""
    here = environment(threads=torch.get_num_threads(), device=device)
    return {"environment": results.remember(here), "batch_size": BATCH}
