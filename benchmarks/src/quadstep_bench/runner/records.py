"""Records: one file of JSON lines for each run, which figures and claims are drawn from.

The first line is the header (configuration, source revision, versions, machine), then comes one
line an epoch from 0 (before training), and last the outcome. A file without that last line belongs
to a run that has not ended. Numbers that are not finite are written as null and read as nan.
"""

import json
import math
import os
import platform
import subprocess
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast, get_args

from quadstep_bench.optimizers import PEERS, SCHEDULED
from quadstep_bench.tasks import Precision, check_name

FORMAT = 1

Outcome = Literal["finished", "diverged"]


class RecordError(ValueError):
    """A record file that cannot be read: says which, where, and what to do about it."""


@dataclass(frozen=True)
class Config:
    """What determines a run.

    Attributes:
        task: A name of `quadstep_bench.tasks.TASKS`.
        optimizer: A name of `quadstep_bench.optimizers.settings` or `suite_settings`.
        seed: Determines the first weights and the order of the batches, for all optimizers alike.
        epochs: Passes over the training set.
        batch_size: Examples a step.
        subset: How many examples to keep of the training set; all of them if `None`.
        precision: What the model computes in, by torch's autocast where that is not float32.
    """

    task: str
    optimizer: str
    seed: int
    epochs: int
    batch_size: int = 64
    subset: int | None = None
    precision: Precision = "float32"

    def __post_init__(self) -> None:
        check_name("precision", self.precision, get_args(Precision))
        for name, least in (("seed", 0), ("epochs", 1), ("batch_size", 1), ("subset", 1)):
            value = getattr(self, name)
            if value is None and name == "subset":
                continue
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be a whole number of at least {least}: got {value}")

    def __str__(self) -> str:
        return f"{self.folder} {self.optimizer} seed {self.seed}"

    @property
    def folder(self) -> str:
        """The name of the folder that holds the records of this task."""
        name = self.task if self.subset is None else f"{self.task}-subset{self.subset}"
        return name if self.precision == "float32" else f"{name}-{self.precision}"

    def extends(self, other: "Config") -> bool:
        """Whether a run goes on from another: it has but a number of epochs of its own.

        Where a schedule is stretched over the run, that number makes it another run.
        """
        return self == (
            other if self.optimizer in SCHEDULED else replace(other, epochs=self.epochs)
        )

    def path(self, root: Path) -> Path:
        """Where the record of this run lies in the folder of records `root`."""
        return root / self.folder / f"{self.optimizer}-seed{self.seed}.jsonl"


@dataclass(frozen=True)
class Epoch:
    """The state of a run after an epoch.

    Attributes:
        epoch: How many epochs have been trained.
        train_loss: Loss over the whole training set.
        test_loss: Loss over the test set.
        test_accuracy: Share of the test set classified rightly; nan where nothing is classified.
        seconds: Time spent training so far, evaluation excluded.
        forwards: Forward passes so far.
        backwards: Backward passes so far.
        rate: The rates of this epoch's steps: min, q10, median, q90 and max, nan for an optimizer
            that shows none; `None` at epoch 0.
        reasons: How many of this epoch's steps ended for each reason; empty where none is given.
    """

    epoch: int
    train_loss: float
    test_loss: float
    test_accuracy: float
    seconds: float
    forwards: int
    backwards: int
    rate: dict[str, float] | None
    reasons: dict[str, int]


@dataclass(frozen=True)
class Record:
    """A run as far as it came."""

    config: Config
    header: dict[str, Any]
    epochs: tuple[Epoch, ...]
    status: Outcome | Literal["unfinished"]

    def satisfies(self, epochs: int) -> bool:
        """Whether nothing is left to do for a run of so many epochs.

        A longer run serves for a shorter one, and a diverged run would not go on.
        """
        if not replace(self.config, epochs=epochs).extends(self.config):
            return False
        return self.status == "diverged" or (
            self.status == "finished" and self.config.epochs >= epochs
        )


def header(config: Config, *, threads: int, device: str) -> dict[str, Any]:
    """Describes a run about to start: its configuration, source revision, versions and machine."""
    surroundings = environment(threads=threads, device=device)
    if config.optimizer in PEERS:
        peer = PEERS[config.optimizer]
        surroundings["versions"][peer] = _version(peer)
    return {"kind": "header", "format": FORMAT, "config": asdict(config), **surroundings}


def resumed(header: dict[str, Any], now: dict[str, Any], epoch: int) -> dict[str, Any]:
    """Adds to a header what the run went on under after `epoch`, if that is another environment."""
    changes = header.get("resumed", [])
    before = changes[-1] if changes else header
    here = {key: now[key] for key in ("revision", "dirty", "versions", "machine")}
    if all(before[key] == here[key] for key in here):
        return header
    return header | {"resumed": [*changes, {"epoch": epoch, **here}]}


def environment(*, threads: int, device: str) -> dict[str, Any]:
    """Describes what a measurement depends on beside its configuration."""
    source = Path(__file__)
    # Only a revision that tracks this very file says what ran: an installed copy may happen to lie
    # inside the checkout of some other project.
    tracked = _git(source.parent, "ls-files", source.name)
    package = source.parents[1]
    return {
        "revision": _git(package, "rev-parse", "HEAD") if tracked else None,
        "dirty": bool(tracked and _git(package, "status", "--porcelain", ".")),
        "versions": {"python": platform.python_version()}
        | {name: _version(name) for name in ("quadstep", "torch", "numpy")},
        "machine": {
            "processor": _processor(),
            "cores": os.cpu_count(),
            "threads": threads,
            "device": device,
        },
    }


def check_installed(optimizers: Iterable[str]) -> None:
    """Raises a `ValueError` that says what to install unless the packages of all peers are there.

    Args:
        optimizers: Names of settings; all but peers come with what is installed anyway.
    """
    missing = {name: PEERS[name] for name in optimizers if name in PEERS}
    missing = {name: package for name, package in missing.items() if _version(package) is None}
    if missing:
        raise ValueError(
            f"{', '.join(sorted(set(missing.values())))} not installed: run pip install "
            f'"quadstep-bench[peers]", or leave out {", ".join(sorted(missing))}'
        )


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip() or None


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    # `platform.processor` names the model on most systems but not on Linux.
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def read(path: Path) -> Record:
    """Reads a record; a last line cut short counts as not yet written.

    Raises:
        RecordError: The file is not a record; names the line and the mend.
    """
    *lines, cut = path.read_text(encoding="utf-8", errors="replace").split("\n")
    header: dict[str, Any] = {}
    config = None
    epochs: list[Epoch] = []
    status = "unfinished"
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line, parse_constant=_refuse)
            if config is None:
                header, config = row, _parse_header(row)
            elif status != "unfinished":
                raise ValueError("a line after the end")
            elif row["kind"] == "end":
                status = _parse_end(row, len(epochs) - 1)
            else:
                epochs.append(_parse_epoch(row, len(epochs)))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise _broken(path, number, f"{type(error).__name__}: {error}") from error
    if config is None:
        raise _broken(path, 1, f"no header but {cut!r}")
    return Record(config, header, tuple(epochs), status)


def read_all(root: Path) -> list[Record]:
    """Reads every record in the folder of records `root`, in the order of their paths."""
    return [read(path) for path in sorted(root.glob("*/*.jsonl"))]


def find(config: Config, root: Path) -> Record | None:
    """Reads the record of a run, whatever its number of epochs, if the folder `root` has one.

    Raises:
        RecordError: The file is not a record, or that of another configuration.
    """
    path = config.path(root)
    if not path.exists():
        return None
    record = read(path)
    if replace(record.config, epochs=config.epochs) != config:
        raise RecordError(
            f"{path} is the record of another configuration, {record.config!r}: "
            "choose another folder for the results with --out"
        )
    return record


def write(record: Record, root: Path) -> None:
    """Writes a record to its place in `root`, whole or not at all."""
    rows = [record.header | {"config": asdict(record.config)}]
    rows += [{"kind": "epoch", **asdict(epoch)} for epoch in record.epochs]
    if record.status != "unfinished":
        rows.append({"kind": "end", "status": record.status, "epoch": record.epochs[-1].epoch})
    write_rows(rows, record.config.path(root))


def write_rows(rows: Iterable[dict[str, Any]], path: Path) -> None:
    """Writes a line of JSON a row, whole or not at all."""
    with replacing(path) as file:
        for row in rows:
            file.write(json.dumps(finite(row), allow_nan=False).encode() + b"\n")


def write_json(value: Any, path: Path) -> None:
    """Writes a value as JSON to be read by people too, whole or not at all."""
    with replacing(path) as file:
        file.write((json.dumps(value, indent=1, allow_nan=False) + "\n").encode())


def finite(value: Any) -> Any:
    """Replaces the numbers that JSON does not have by null, however deep in dicts and lists."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in cast(dict[str, Any], value).items()}
    if isinstance(value, list):
        return [finite(item) for item in cast(list[Any], value)]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lays out a table in Markdown, a line a row."""
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


@contextmanager
def replacing(path: Path) -> Generator[BinaryIO]:
    """Opens a file to be written whole or not at all: what lay at `path` stays until then."""
    # The process's number keeps two processes that write the same file out of each other's way.
    draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with draft.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)
    except OSError as error:
        raise OSError(
            error.errno,
            f"cannot write {path}: {error.strerror}. What was there before is untouched; mend that "
            "and run the same command again to go on from there",
        ) from error


def _broken(path: Path, line: int, problem: str) -> RecordError:
    return RecordError(
        f"{path}, line {line}: {problem}. Restore the file, or delete it to run it again"
    )


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is not a number")


def _parse_header(row: dict[str, Any]) -> Config:
    if row["kind"] != "header" or row["format"] != FORMAT:
        raise ValueError(f"not a header of format {FORMAT}")
    return Config(**row["config"])


def _parse_epoch(row: dict[str, Any], expected: int) -> Epoch:
    if row["kind"] != "epoch" or row["epoch"] != expected:
        raise ValueError(f"not the line of epoch {expected}")
    rate = row["rate"]
    return Epoch(
        epoch=expected,
        train_loss=_number(row["train_loss"]),
        test_loss=_number(row["test_loss"]),
        test_accuracy=_number(row["test_accuracy"]),
        seconds=float(row["seconds"]),
        forwards=int(row["forwards"]),
        backwards=int(row["backwards"]),
        rate=None if rate is None else {name: _number(rate[name]) for name in rate},
        reasons={str(reason): int(count) for reason, count in row["reasons"].items()},
    )


def _parse_end(row: dict[str, Any], last: int) -> Outcome:
    if row["status"] not in get_args(Outcome):
        raise ValueError(f"unknown status {row['status']!r}")
    if row["epoch"] != last:
        raise ValueError(f"the end at epoch {row['epoch']} follows the line of epoch {last}")
    return row["status"]


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
