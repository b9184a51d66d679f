"""Splits of the data sets: train, validation and test, the same for all seeds."""

# Neither torch nor scikit-learn is typed throughout.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from quadstep_bench.selftuning.problem import SPLITS, Columns, Splits
from quadstep_bench.tasks import CLASSES, CONTEXT, data
from quadstep_bench.tasks.data import DataName

MODULES = (
    "argparse",
    "ast",
    "datetime",
    "difflib",
    "doctest",
    "mailbox",
    "pickletools",
    "subprocess",
    "tarfile",
    "turtle",
)
"""The modules of Python's standard library that lines are classified by."""

CODE = ("inspect", "typing", "pydoc", "zipfile", "enum", "locale", "ipaddress", "pickle", "pdb")
"""The modules whose sources are text to be read."""

PROSE = "pydoc_data/topics"
"""The documentation of the language: English, where the others are Python."""


def split(columns: Sequence[Tensor], sizes: Sequence[int]) -> Splits:
    """Splits examples by a fixed permutation, so many to each of the three splits."""
    order = torch.randperm(len(columns[0]), generator=torch.Generator().manual_seed(0))
    parts = order[: sum(sizes)].split(list(sizes))
    return {
        name: tuple(column[part] for column in columns)
        for name, part in zip(SPLITS, parts, strict=True)
    }


def split_fifths(columns: Sequence[Tensor]) -> Splits:
    """Splits all examples, three fifths to train with and one for each other split."""
    size = len(columns[0])
    return split(columns, (size - 2 * (size // 5), size // 5, size // 5))


def standardise(splits: Splits, columns: Sequence[int] = (0,)) -> None:
    """Takes the mean and the deviation of the training part out of some columns, in place."""
    for index in columns:
        train = splits["train"][index]
        mean, deviation = train.mean(0), train.std(0, correction=0)
        for name, part in splits.items():
            changed = (part[index] - mean) / deviation
            splits[name] = (*part[:index], changed, *part[index + 1 :])


def digits() -> tuple[Tensor, Tensor]:
    """The digits of scikit-learn: pixels from 0 to 1 (example, 64), and classes."""
    from sklearn.datasets import load_digits

    inputs, labels = cast(Any, load_digits(return_X_y=True))
    return torch.from_numpy(inputs).float() / 16, torch.from_numpy(labels).long()


def breast_cancer() -> tuple[Tensor, Tensor]:
    """Measurements of 569 tumours as they are, up to thousands, and whether they are benign."""
    from sklearn.datasets import load_breast_cancer

    inputs, labels = cast(Any, load_breast_cancer(return_X_y=True))
    return torch.from_numpy(inputs).float(), torch.from_numpy(labels).long()


def diabetes() -> tuple[Tensor, Tensor]:
    """Measurements of 442 patients, and how far their disease has come after a year."""
    from sklearn.datasets import load_diabetes

    inputs, targets = cast(Any, load_diabetes(return_X_y=True, scaled=False))
    return torch.from_numpy(inputs).float(), torch.from_numpy(targets).float().unsqueeze(1)


def images(
    name: DataName,
    root: Path | None,
    sizes: Sequence[int],
    classes: Sequence[int] = range(CLASSES),
) -> Splits:
    """Images from 0 to 1 of some classes, which are numbered anew.

    The training split is of the training set, the other two are of the test set.
    """
    loaded = data.load(name, root)
    train, validation, test = sizes

    def choose(pixels: Tensor, labels: Tensor, first: int, last: int) -> Columns:
        numbers = torch.full((CLASSES,), -1)
        numbers[torch.tensor(classes)] = torch.arange(len(classes))
        kept = numbers[labels]
        chosen = torch.nonzero(kept >= 0).squeeze(1)[first:last]
        return pixels[chosen].float() / 255, kept[chosen]

    held_out = (loaded.test_inputs, loaded.test_labels)
    return {
        "train": choose(loaded.train_inputs, loaded.train_labels, 0, train),
        "validation": choose(*held_out, 0, validation),
        "test": choose(*held_out, validation, validation + test),
    }


def text(modules: Sequence[str], sizes: Sequence[int]) -> Splits:
    """Windows of sources of Python's standard library, each with its next characters.

    The splits are parts of the text, one after the other. Windows to train with do not overlap
    where the text is long enough.
    """
    codes = data.characters("".join(data.source(name) for name in modules))
    shares = torch.tensor([0, *sizes], dtype=torch.float64).cumsum(0) / sum(sizes)
    borders = (shares * len(codes)).long().tolist()
    found: Splits = {}
    for name, size, first, last in zip(SPLITS, sizes, borders, borders[1:], strict=False):
        starts = torch.linspace(first, last - CONTEXT - 2, size, dtype=torch.float64).long()
        windows = codes[starts.unsqueeze(1) + torch.arange(CONTEXT + 1)]
        found[name] = windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
    return found


def lines(sizes: Sequence[int]) -> dict[str, tuple[list[str], Tensor]]:
    """Lines of `MODULES` with at least four words, and which module each is from."""
    chosen: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(MODULES):
        found = dict.fromkeys(line.strip() for line in data.source(name).splitlines())
        long = [line for line in found if len(words(line)) >= 4]
        chosen += long
        labels += [label] * len(long)
    parts = split([torch.arange(len(chosen)), torch.tensor(labels)], sizes)
    return {
        name: ([chosen[index] for index in indices.tolist()], truth)
        for name, (indices, truth) in parts.items()
    }


def words(line: str) -> list[str]:
    """The words of a line, in lower case."""
    return re.findall(r"[a-z]+", line.lower())
