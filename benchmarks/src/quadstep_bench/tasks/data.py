"""Data sets as tensors: decoded once, kept on the device, cut into batches by index."""

# Neither torch nor datasets nor scikit-learn is typed throughout.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false

import hashlib
import os
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from quadstep_bench.runner.files import replacing
from quadstep_bench.runner.records import Config
from quadstep_bench.tasks import CHARACTERS, CLASSES, CONTEXT, SHAPES, TASKS, DataName


class DataError(ValueError):
    """A data set that cannot be had: says why, and what to do about it."""


@dataclass(frozen=True)
class Data:
    """A data set: inputs, and what the loss compares the outputs of a model with, as labels.

    Both have the examples along their first axis. Images are uint8 (example, channel, height,
    width), classes int64 (example), characters int64 (example, place), measurements float32.
    """

    train_inputs: Tensor
    train_labels: Tensor
    test_inputs: Tensor
    test_labels: Tensor

    def to(self, device: torch.device | str) -> "Data":
        """Moves the data set to a device, images in the layout of `quadstep_bench.tasks.models`."""

        def move(tensor: Tensor) -> Tensor:
            images = tensor.dim() == 4
            return tensor.to(
                device, memory_format=torch.channels_last if images else torch.preserve_format
            )

        return Data(*map(move, self._tensors()))

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
    """Yields batches of inputs with their labels; the last may be smaller.

    Images come as pixels in [0, 1], divided by 255 and nothing else: no mean or deviation is taken
    out. All else comes as it is.
    """
    for start in range(0, len(inputs), size):
        chosen = slice(start, start + size) if order is None else order[start : start + size]
        yield _pixels(inputs[chosen]), _pixels(labels[chosen])


def _pixels(tensor: Tensor) -> Tensor:
    return tensor.float() / 255 if tensor.dtype == torch.uint8 else tensor


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


def load_for(config: Config, root: Path | None = None) -> Data:
    """Loads what a run is trained on, see `load`."""
    task = TASKS[config.task]
    return load(task.data, root, config.subset, task.held_out)


def load(
    name: DataName,
    root: Path | None = None,
    subset: int | None = None,
    held_out: int | None = None,
) -> Data:
    """Loads a data set.

    Decoded tensors are cached in the folder QUADSTEP_CACHE (by default ~/.cache/quadstep). They are
    checked against the known contents of the data set each time, so a damaged cache is made anew.

    Args:
        name: "mnist", "cifar10", or one that needs no folder: "digits" and its variants,
            "diabetes" and "breast-cancer" (which scikit-learn ships), or "text" (the sources of
            Python's standard library, which differ between versions of Python).
        root: The folder that holds the data sets as dataset folders by their names; by default
            QUADSTEP_DATA, and the hub where that is not set either.
        subset: How many examples to keep of the training set: the first of each class, as many of
            one class as of another.
        held_out: How many examples to keep of the test set, chosen in the same way.

    Raises:
        DataError: The data set cannot be found, or is not what it should be.
        ValueError: `name`, `subset` or `held_out` is out of range.
    """
    if name not in get_args(DataName):
        raise ValueError(f"unknown data set {name!r}: choose from {', '.join(get_args(DataName))}")
    if root is None and "QUADSTEP_DATA" in os.environ:
        root = Path(os.environ["QUADSTEP_DATA"])
    data = _EMBEDDED[name]() if name in _EMBEDDED else _cached(name, root)
    train, test = (
        inputs_and_labels if size is None else _first(*inputs_and_labels, what, size)
        for what, size, inputs_and_labels in (
            ("subset", subset, (data.train_inputs, data.train_labels)),
            ("held_out", held_out, (data.test_inputs, data.test_labels)),
        )
    )
    return Data(*train, *test)


def _cached(name: DataName, root: Path | None) -> Data:
    source = _SOURCES[name]
    folder = None if root is None else root / name
    if folder is not None and not folder.is_dir():
        raise DataError(_unavailable(name, f"there is no folder {folder}"))
    # Named by contents: what is found under this name is right wherever it came from.
    path = cache() / f"{name}-{source.digest[:16]}.pt"
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


def cache() -> Path:
    """The folder of what takes long to make: QUADSTEP_CACHE, by default ~/.cache/quadstep."""
    return Path(os.environ.get("QUADSTEP_CACHE", Path.home() / ".cache" / "quadstep"))


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
    return _split(inputs, labels)


def _split(inputs: Tensor, labels: Tensor) -> Data:
    """Holds out every fourth example, or every fourth one of each class."""
    test = (_ranks(labels) if _are_classes(labels) else torch.arange(len(labels))) % 4 == 3
    return Data(inputs[~test], labels[~test], inputs[test], labels[test])


def _unscaled_digits() -> Data:
    """The digits with pixels that stay between 0 and 255."""
    digits = _digits()
    return replace(
        digits, train_inputs=digits.train_inputs.float(), test_inputs=digits.test_inputs.float()
    )


def _noisy_digits() -> Data:
    """The digits with a fifth of the training labels wrong, always the same ones."""
    digits = _digits()
    size = len(digits.train_labels)
    dice = torch.Generator().manual_seed(0)
    wrong = torch.randperm(size, generator=dice)[: size // 5]
    labels = digits.train_labels.clone()
    labels[wrong] += torch.randint(1, CLASSES, (len(wrong),), generator=dice)
    return replace(digits, train_labels=labels % CLASSES)


def _digit_pixels() -> Data:
    """The digits with their own pixels in place of labels."""
    digits = _digits()
    return replace(digits, train_labels=digits.train_inputs, test_labels=digits.test_inputs)


def _diabetes() -> Data:
    from sklearn.datasets import load_diabetes

    inputs, targets = cast(Any, load_diabetes(return_X_y=True, scaled=False))
    data = _split(torch.from_numpy(inputs), torch.from_numpy(targets).unsqueeze(1))
    train_labels, test_labels = _standardise(data.train_labels, data.test_labels)
    return _standardised(replace(data, train_labels=train_labels, test_labels=test_labels))


def _breast_cancer() -> Data:
    from sklearn.datasets import load_breast_cancer

    inputs, labels = cast(Any, load_breast_cancer(return_X_y=True))
    return _standardised(_split(torch.from_numpy(inputs), torch.from_numpy(labels).long()))


def _standardised(data: Data) -> Data:
    train_inputs, test_inputs = _standardise(data.train_inputs, data.test_inputs)
    return replace(data, train_inputs=train_inputs, test_inputs=test_inputs)


def _standardise(train: Tensor, test: Tensor) -> list[Tensor]:
    """Takes out the mean and the deviation of each column of the training part, from both."""
    mean, deviation = train.mean(0), train.std(0, correction=0)
    return [((part - mean) / deviation).float() for part in (train, test)]


_TRAINING_MODULES = ("argparse", "inspect", "subprocess", "tarfile", "typing")
_TEST_MODULES = ("doctest", "pickle")


def _text() -> Data:
    """Windows of the sources of Python's standard library, each labelled by its next characters.

    Those held out are of other modules. The text is the same wherever the version of Python is: the
    record of a run holds the digest of what was trained on.
    """
    train, test = _windows(_TRAINING_MODULES, 4800), _windows(_TEST_MODULES, 1000)
    return Data(train[:, :-1], train[:, 1:], test[:, :-1], test[:, 1:])


def _windows(modules: Sequence[str], number: int) -> Tensor:
    codes = characters("".join(source(name) for name in modules))
    starts = torch.linspace(0, len(codes) - CONTEXT - 1, number, dtype=torch.float64).long()
    return codes[starts.unsqueeze(1) + torch.arange(CONTEXT + 1)]


def source(module: str) -> str:
    """Reads the source of a module of Python's standard library.

    Raises:
        DataError: This Python does not have it as a file.
    """
    path = Path(sysconfig.get_path("stdlib")) / f"{module}.py"
    try:
        return path.read_text("utf-8")
    except OSError as error:
        raise DataError(
            f"cannot load text: {error}. It is taken from the sources of Python's standard "
            "library: use a Python that has them as files"
        ) from error


def characters(text: str) -> Tensor:
    """Numbers the characters of a text, one dimension, below `CHARACTERS`."""
    # Space is 0 and the other printable characters follow; what is none of them becomes a question
    # mark, and the end of a line comes last.
    values = torch.frombuffer(bytearray(text.encode("ascii", "replace")), dtype=torch.uint8)
    codes = torch.full((256,), ord("?") - 32)
    codes[32:127] = torch.arange(CHARACTERS - 1)
    codes[ord("\n")] = CHARACTERS - 1
    return codes[values.long()]


_EMBEDDED: dict[DataName, Callable[[], Data]] = {
    "digits": _digits,
    "digits-unscaled": _unscaled_digits,
    "digits-noisy": _noisy_digits,
    "digits-pixels": _digit_pixels,
    "text": _text,
    "diabetes": _diabetes,
    "breast-cancer": _breast_cancer,
}
"""The data sets that need neither a folder nor the network."""


def _first(inputs: Tensor, labels: Tensor, what: str, size: int) -> tuple[Tensor, Tensor]:
    if not CLASSES <= size <= len(labels):
        raise ValueError(f"{what} must be between {CLASSES} and {len(labels)}: got {size}")
    # First the first example of every class, then every second one, and so on.
    classes = _are_classes(labels)
    turns = _ranks(labels) * CLASSES + labels if classes else torch.arange(len(labels))
    kept = turns.argsort()[:size].sort().values
    return inputs[kept], labels[kept]


def _are_classes(labels: Tensor) -> bool:
    return labels.dim() == 1 and labels.dtype == torch.int64


def _ranks(labels: Tensor) -> Tensor:
    """Numbers the examples of each class from 0 in the order they come."""
    counts = functional.one_hot(labels, CLASSES).cumsum(0)
    return counts.gather(1, labels.unsqueeze(1)).squeeze(1) - 1
