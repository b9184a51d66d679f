"""Records: what training runs gave, a line of JSON a finished run in one file a task.

    results/<collection>/<task>.jsonl   the runs, sorted by optimizer and seed
    results/environments.json           what they ran in, by hash
    runs/<collection>/*.ckpt            the checkpoints of runs that have not ended

A line holds the configuration, the outcome, the hash of the environment and the epochs as columns
from 0 (before training) on. Numbers that are not finite are written as null and read as nan.
"""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from filelock import FileLock

from quadstep_bench.optimizers import SCHEDULED
from quadstep_bench.runner.environment import Environment, key
from quadstep_bench.runner.files import (
    Row,
    damaged,
    delete_drafts,
    number,
    read_json,
    read_rows,
    write_json,
    write_rows,
)
from quadstep_bench.tasks import Precision, check_name

Outcome = Literal["finished", "diverged"]


@dataclass(frozen=True)
class Config:
    """What determines a run.

    Attributes:
        task: A name of `quadstep_bench.tasks.TASKS`.
        optimizer: A name of `quadstep_bench.optimizers.settings` or `suite_settings`.
        seed: Determines the first weights and the order of the batches, for all optimizers.
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
        return f"{self.title} {self.optimizer} seed {self.seed}"

    @property
    def title(self) -> str:
        """The task, with the part of the training set and the precision where they matter."""
        name = self.task if self.subset is None else f"{self.task}-subset{self.subset}"
        return name if self.precision == "float32" else f"{name}-{self.precision}"

    def extends(self, other: "Config") -> bool:
        """Whether a run goes on from another: they differ in the number of epochs alone.

        Where a schedule is stretched over the run, that number makes it another run.
        """
        return self == (
            other if self.optimizer in SCHEDULED else replace(other, epochs=self.epochs)
        )

    @property
    def identity(self) -> tuple[Any, ...]:
        """What tells the run from others of its task, and sorts them.

        The number of epochs does so only where a schedule is stretched over the run.
        """
        length = self.epochs if self.optimizer in SCHEDULED else 0
        subset = self.subset or 0
        return (self.optimizer, self.seed, subset, self.precision, self.batch_size, length)


@dataclass(frozen=True)
class Epoch:
    """The state of a run after an epoch.

    Attributes:
        epoch: How many epochs have been trained.
        train_loss: Loss over the full training set.
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


COLUMNS = ("train_loss", "test_loss", "test_accuracy", "seconds", "forwards", "backwards")
"""The attributes of epochs that are numbers."""


@dataclass(frozen=True)
class Record:
    """A run as far as it came.

    Attributes:
        config: What determines it.
        epochs: Its states, the first before training.
        status: How it ended.
        environment: What it ran in.
        data: The digest of the data set; `None` where it was not recorded.
        resumed: The epochs after which it went on in another environment, and which.
    """

    config: Config
    epochs: tuple[Epoch, ...]
    status: Outcome | Literal["unfinished"]
    environment: Environment
    data: str | None = None
    resumed: tuple[tuple[int, Environment], ...] = ()

    @property
    def environments(self) -> list[Environment]:
        """All that it ran in, the first first."""
        return [self.environment, *(environment for _, environment in self.resumed)]

    def satisfies(self, epochs: int) -> bool:
        """Whether nothing is left to do for a run of so many epochs.

        A longer run serves for a shorter one, and a diverged run would not go on.
        """
        if not replace(self.config, epochs=epochs).extends(self.config):
            return False
        return self.status == "diverged" or (
            self.status == "finished" and self.config.epochs >= epochs
        )

    def row(self) -> Row:
        """The line of the record, with hashes in place of environments."""
        trained = self.epochs[1:]
        rates = [epoch.rate for epoch in trained if epoch.rate is not None]
        reasons = sorted({reason for epoch in trained for reason in epoch.reasons})
        return {
            **asdict(self.config),
            "status": self.status,
            "environment": key(self.environment),
            "resumed": [[epoch, key(environment)] for epoch, environment in self.resumed],
            "data": self.data,
            **{name: [getattr(epoch, name) for epoch in self.epochs] for name in COLUMNS},
            "rate": {name: [rate[name] for rate in rates] for name in (rates[0] if rates else ())},
            "reasons": {
                reason: [epoch.reasons.get(reason, 0) for epoch in trained] for reason in reasons
            },
        }

    @classmethod
    def from_row(cls, row: Row, environments: dict[str, Environment]) -> "Record":
        """Reads the line of a record.

        Raises:
            KeyError, TypeError, ValueError: It is not that of a record.
        """
        if row["status"] not in get_args(Outcome):
            raise ValueError(f"unknown status {row['status']!r}")
        names = [row["environment"], *(name for _, name in row["resumed"])]
        if unknown := [name for name in names if name not in environments]:
            raise ValueError(f"environment {unknown[0]} is not in environments.json; restore that")
        length = len(row["train_loss"])
        columns = [*row["rate"].values(), *row["reasons"].values()]
        if {len(row[name]) for name in COLUMNS} != {length} or any(
            len(column) != length - 1 for column in columns
        ):
            raise ValueError("columns of different lengths")
        return cls(
            config=parse_config(row),
            epochs=tuple(_epoch(row, index) for index in range(length)),
            status=row["status"],
            environment=environments[row["environment"]],
            data=row["data"],
            resumed=tuple((epoch, environments[name]) for epoch, name in row["resumed"]),
        )


def parse_config(row: Row) -> Config:
    """Reads the configuration in the row of a run."""
    return Config(**{field.name: row[field.name] for field in fields(Config)})


def identify(row: Row) -> tuple[Any, ...]:
    """What tells the row of a run from those of others, and sorts them."""
    config = parse_config(row)
    return (config.task, *config.identity)


def _epoch(row: Row, index: int) -> Epoch:
    def reasons() -> Iterable[tuple[str, int]]:
        for reason, counts in row["reasons"].items():
            if index and counts[index - 1]:
                yield str(reason), int(counts[index - 1])

    return Epoch(
        epoch=index,
        train_loss=number(row["train_loss"][index]),
        test_loss=number(row["test_loss"][index]),
        test_accuracy=number(row["test_accuracy"][index]),
        seconds=float(row["seconds"][index]),
        forwards=int(row["forwards"][index]),
        backwards=int(row["backwards"][index]),
        rate={name: number(values[index - 1]) for name, values in row["rate"].items()}
        if index
        else None,
        reasons=dict(reasons()),
    )


@dataclass(frozen=True)
class Results:
    """A folder of results, and where the runs are that have not ended.

    Attributes:
        root: The folder of results.
        runs: The folder of checkpoints. It holds a lock, too: only one process at a time writes
            into the results.
    """

    root: Path
    runs: Path

    def collection(self, name: str) -> "Collection":
        """The training runs that belong together under a name."""
        return Collection(self, name)

    def environments(self) -> dict[str, Environment]:
        """Reads the environments by their hashes."""
        path = self.root / "environments.json"
        return read_json(path) if path.exists() else {}

    def merge(
        self,
        row: Row,
        path: Path,
        environments: Iterable[Environment],
        identify: Callable[[Row], tuple[Any, ...]] = identify,
    ) -> None:
        """Adds the row of a run to a file of rows, one a run, sorted by what identifies runs.

        Of two rows of a run that with more epochs stays. A process that is killed meanwhile leaves
        the file as it was or as it is to be.

        Args:
            row: The row.
            path: The file.
            environments: What its hashes stand for.
            identify: Tells from a row which run it is of.

        Raises:
            RecordError: What is there already cannot be read; it stays as it is.
            OSError: The file cannot be written; what is there already stays.
        """
        with self._lock():
            delete_drafts(path)
            rows: dict[Any, Row] = {}
            for line, present in enumerate(read_rows(path), start=1):
                try:
                    rows[identify(present)] = present
                except (KeyError, TypeError, ValueError) as error:
                    raise damaged(path, line, error) from error
            place = identify(row)
            if place in rows and rows[place].get("epochs", 0) > row.get("epochs", 0):
                return
            # Before the row that refers to them.
            self._remember(environments)
            rows[place] = row
            write_rows((rows[name] for name in sorted(rows)), path)

    def remember(self, environment: Environment) -> str:
        """Adds an environment, and returns the hash that stands for it."""
        with self._lock():
            self._remember([environment])
        return key(environment)

    def _lock(self) -> FileLock:
        self.runs.mkdir(parents=True, exist_ok=True)
        return FileLock(self.runs / "lock")

    def _remember(self, environments: Iterable[Environment]) -> None:
        path, known = self.root / "environments.json", self.environments()
        delete_drafts(path)
        together = known | {key(environment): environment for environment in environments}
        if together != known:
            write_json(dict(sorted(together.items())), path)


@dataclass(frozen=True)
class Collection:
    """Training runs that belong together, as those of the suite."""

    results: Results
    name: str

    @property
    def folder(self) -> Path:
        """The folder of the records."""
        return self.results.root / self.name

    def path(self, task: str) -> Path:
        """The file of the records of a task."""
        return self.folder / f"{task}.jsonl"

    def checkpoint(self, config: Config) -> Path:
        """Where the checkpoint of a run lies until the run has ended."""
        name = f"{config.title}-{config.optimizer}-seed{config.seed}.ckpt"
        return self.results.runs / self.name / name

    def read(self, task: str) -> list[Record]:
        """Reads the records of a task.

        Raises:
            RecordError: The file holds something else; names the line and how to fix it.
        """
        path, environments = self.path(task), self.results.environments()
        records: dict[tuple[Any, ...], Record] = {}
        for line, row in enumerate(read_rows(path), start=1):
            try:
                record = Record.from_row(row, environments)
                if record.config.task != task or record.config.identity in records:
                    raise ValueError("a record that belongs elsewhere, or a second one of a run")
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise damaged(path, line, error) from error
            records[record.config.identity] = record
        return list(records.values())

    def read_all(self) -> list[Record]:
        """Reads all records, in the order of tasks' names, optimizers and seeds."""
        tasks = sorted(path.stem for path in self.folder.glob("*.jsonl"))
        return [record for task in tasks for record in self.read(task)]

    def find(self, config: Config) -> Record | None:
        """Reads the record of a run, whatever its number of epochs, if there is one."""
        found = (each for each in self.read(config.task) if each.config.identity == config.identity)
        return next(found, None)

    def missing(self, wanted: Iterable[Config]) -> list[Config]:
        """Lists the runs that have no record of as many epochs, each once."""
        wanted = dict.fromkeys(wanted)
        tasks = {config.task for config in wanted}
        records = {(task, each.config.identity): each for task in tasks for each in self.read(task)}
        found = {config: records.get((config.task, config.identity)) for config in wanted}
        return [
            config
            for config, record in found.items()
            if record is None or not record.satisfies(config.epochs)
        ]

    def add(self, record: Record) -> None:
        """Adds the record of a run that has ended, see `Results.merge`."""
        path = self.path(record.config.task)
        self.results.merge(record.row(), path, record.environments)
