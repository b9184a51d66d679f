"""Stand-ins for what the self-tuning tasks need that the tests do not have."""

from itertools import islice
from pathlib import Path

import pytest
import torch

from quadstep_bench.runner.environment import version
from quadstep_bench.selftuning.tasks import TASKS, finetuning
from quadstep_bench.tasks import SHAPES
from quadstep_bench.tasks import data as data_sets
from quadstep_bench.tasks.data import Data


def stand_in(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """Puts noise in the place of images, and pretrains for three steps."""
    found: dict[str, Data] = {}

    def load(name: str, *_: object) -> Data:
        if name not in found:
            dice = torch.Generator().manual_seed(len(name))
            train, test = (
                torch.randint(0, 256, (size, *SHAPES[name]), generator=dice, dtype=torch.uint8)
                for size in (10_000, 3_000)
            )
            found[name] = Data(train, torch.arange(10_000) % 10, test, torch.arange(3_000) % 10)
        return found[name]

    monkeypatch.setenv("QUADSTEP_CACHE", str(cache))
    monkeypatch.setattr(data_sets, "load", load)
    monkeypatch.setattr(finetuning, "islice", lambda batches, steps: islice(batches, 3))


def skip_without_packages(task: str) -> None:
    """Skips a test of a task whose packages are not installed."""
    for package in TASKS[task].needs:
        if version(package) is None:
            pytest.skip(f"{package} is not installed")
