"""Data sets as tensors: decoded once, kept on the device, cut into batches by index."""

# Neither torch nor datasets nor scikit-learn is typed throughout.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false

import hashlib
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from quadstep.lab.records import replacing
from quadstep.lab.settings import CLASSES, SHAPES, DataName


class DataError(ValueError):
    """A data set that cannot be had: says why, and what to do about it."""


@dataclass(frozen=True)
class Data:
    """A data set: images as uint8 (example, channel, height, width) and labels as int64."""

    train_inputs: Tensor
    train_labels: Tensor
    test_inputs: Tensor
    test_labels: Tensor

    def to(self, device: torch.device | str) -> "Data":
        """Moves the data set to a device, its images in the layout of `quadstep.lab.models`."""
        layout = torch.channels_last
        return Data(
            self.train_inputs.to(device, memory_format=layout),
            self.train_labels.to(device),
            self.test_inputs.to(device, memory_format=layout),
            self.test_labels.to(device),
        )

    def digest(self) -> str:
        """Identifies the contents by their SHA-256."""
        digest = hashlib.sha256()
        for tensor in self._tensors():
            digest.update(str(tuple(tensor.shape)).encode())
            digest.update(tensor.cpu().contiguous().numpy().data)
        return digest.hexdigest()

    def _tensors(self) -> list[Tensor]:
        return [getattr(self, field.name) for field in fields(self)]


def batches(
    inputs: Tensor, labels: Tensor, size: int, order: Tensor | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields batches of pixels in [0, 1] with their labels; the last may be smaller.

    The pixels are divided by 255 and nothing else: no mean or deviation is taken out.
    """
    for start in range(0, len(inputs), size):
        chosen = slice(start, start + size) if order is None else order[start : start + size]
        yield inputs[chosen].float() / 255, labels[chosen]


@dataclass(frozen=True)
class _Source:
    hub: str
    digest: str


_SOURCES: dict[DataName, _Source] = {
    "mnist": _Source(
        "ylecun/mnist", "35914650c8beaeed4429263376775b71ac05b224ab7d958a603bb5feac95afaf"
    ),
    "cifar10": _Source(
        "uoft-cs/cifar10", "ad1a54dfad01caa9ded6376715754acc6cff75cfd4035deecefc743f754ce5bb"
    ),
}
"""Where a data set comes from without a folder, and what its decoded tensors must be."""


def load(name: DataName, root: Path | None = None, subset: int | None = None) -> Data:
    """Loads a data set.

    Decoded tensors are cached in the folder QUADSTEP_CACHE (by default ~/.cache/quadstep). They are
    checked against the known contents of the data set each time, so a damaged cache is made anew.

    Args:
        name: "mnist", "cifar10", or "digits" (which scikit-learn ships).
        root: The folder that holds the data sets as dataset folders by their names; by default
            QUADSTEP_DATA, and the hub where that is not set either.
        subset: How many examples to keep of the training set: the first of each class, as many of
            one class as of another. The test set stays whole.

    Raises:
        DataError: The data set cannot be found, or is not what it should be.
        ValueError: `name` or `subset` is out of range.
    """
    if name not in get_args(DataName):
        raise ValueError(f"unknown data set {name!r}: choose from {', '.join(get_args(DataName))}")
    if root is None and "QUADSTEP_DATA" in os.environ:
        root = Path(os.environ["QUADSTEP_DATA"])
    data = _digits() if name == "digits" else _cached(name, root)
    return data if subset is None else _first(data, subset)


def _cached(name: DataName, root: Path | None) -> Data:
    source = _SOURCES[name]
    folder = None if root is None else root / name
    if folder is not None and not folder.is_dir():
        raise DataError(_unavailable(name, f"there is no folder {folder}"))
    cache = Path(os.environ.get("QUADSTEP_CACHE", Path.home() / ".cache" / "quadstep"))
    # Named by contents: what is found under this name is right wherever it came from.
    path = cache / f"{name}-{source.digest[:16]}.pt"
    # Whatever a missing or damaged file raises, the data set is decoded again.
    with suppress(Exception):
        data = Data(**torch.load(path, weights_only=True))
        if data.digest() == source.digest:
            return data
    data = _decode(name, str(folder) if folder else source.hub)
    if data.digest() != source.digest:
        raise DataError(
            f"{folder or source.hub} is not the {name} data set, or not in its published order: "
            f"put the original images there, or point --data (or QUADSTEP_DATA) elsewhere"
        )
    # Without a cache the next load merely takes longer.
    with suppress(OSError, RuntimeError), replacing(path) as file:
        torch.save({field.name: getattr(data, field.name) for field in fields(data)}, file)
    return data


def _decode(name: DataName, source: str) -> Data:
    # Takes a second to import, which a cached or embedded data set need not pay.
    import datasets

    try:
        splits: Any = datasets.load_dataset(source)
        tensors: list[Tensor] = []
        for split in (splits["train"], splits["test"]):
            image = next(
                column
                for column, feature in split.features.items()
                if isinstance(feature, datasets.Image)
            )
            pixels = np.stack([np.asarray(picture) for picture in split[image]])
            # Grey images come without a channel, coloured ones with theirs last.
            channels, height, width = SHAPES[name]
            pixels = pixels.reshape(-1, height, width, channels).transpose(0, 3, 1, 2)
            tensors.append(torch.from_numpy(np.ascontiguousarray(pixels)))
            tensors.append(torch.tensor(split["label"][:], dtype=torch.int64))
    except (OSError, LookupError, StopIteration, ValueError) as error:
        raise DataError(_unavailable(name, f"{source}: {error}")) from error
    return Data(*tensors)


def _unavailable(name: DataName, reason: str) -> str:
    return (
        f"cannot load {name}: {reason}. Name a folder that holds {name}/ as a dataset folder with "
        f"train and test files by --data or QUADSTEP_DATA, or allow the network to be reached for "
        f"{_SOURCES[name].hub}"
    )


def _digits() -> Data:
    from sklearn.datasets import load_digits

    digits = cast(Any, load_digits())
    # Sixteen shades become the 256 of the other data sets.
    inputs = torch.from_numpy(digits.images).mul(255 / 16).round().to(torch.uint8).unsqueeze(1)
    labels = torch.from_numpy(digits.target).long()
    test = _ranks(labels) % 4 == 3
    return Data(inputs[~test], labels[~test], inputs[test], labels[test])


def _first(data: Data, subset: int) -> Data:
    size = len(data.train_labels)
    if not CLASSES <= subset <= size:
        raise ValueError(f"subset must be between {CLASSES} and {size}: got {subset}")
    # First the first example of every class, then every second one, and so on.
    turns = _ranks(data.train_labels) * CLASSES + data.train_labels
    kept = turns.argsort()[:subset].sort().values
    return Data(
        data.train_inputs[kept], data.train_labels[kept], data.test_inputs, data.test_labels
    )


def _ranks(labels: Tensor) -> Tensor:
    """Numbers the examples of each class from 0 in the order they come."""
    counts = functional.one_hot(labels, CLASSES).cumsum(0)
    return counts.gather(1, labels.unsqueeze(1)).squeeze(1) - 1
