"""Data sets: decoding, the cache and its repair, subsets, batches, and what goes wrong."""

import argparse
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch

from quadstep_bench.runner.records import Config
from quadstep_bench.tasks import CHARACTERS, data
from quadstep_bench.tasks.data import Data, DataError, batches, load

SOURCE = os.environ.get("QUADSTEP_DATA")


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QUADSTEP_DATA", raising=False)
    monkeypatch.setenv("QUADSTEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "arrow")
    datasets.disable_progress_bars()


def write(folder: Path, column: str, pixels: np.ndarray) -> Path:
    """Writes a dataset folder with the first two thirds for training and the rest for testing."""
    folder.mkdir(parents=True)
    cut = len(pixels) * 2 // 3
    features = datasets.Features({column: datasets.Image(), "label": datasets.Value("int64")})
    for split, part in (("train", pixels[:cut]), ("test", pixels[cut:])):
        columns = {column: list(part), "label": [i % 10 for i in range(len(part))]}
        split_file = folder / f"{split}-00000-of-00001.parquet"
        datasets.Dataset.from_dict(columns, features=features).to_parquet(split_file)
    return folder.parent


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (30, 28, 28), dtype=np.uint8)


@pytest.fixture
def root(tmp_path: Path, pixels: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a small data set that passes for MNIST."""
    root = write(tmp_path / "data" / "mnist", "image", pixels)
    labels = torch.arange(20) % 10
    inputs = torch.from_numpy(pixels).unsqueeze(1)
    expected = Data(inputs[:20], labels, inputs[20:], labels[:10])
    source = replace(data._SOURCES["mnist"], digest=expected.digest())
    monkeypatch.setitem(data._SOURCES, "mnist", source)
    return root


def test_decodes_grey_images(root: Path, pixels: np.ndarray) -> None:
    loaded = load("mnist", root)
    assert loaded.train_inputs.dtype == loaded.test_inputs.dtype == torch.uint8
    assert loaded.train_labels.dtype == loaded.test_labels.dtype == torch.int64
    assert torch.equal(loaded.train_inputs[:, 0], torch.from_numpy(pixels[:20]))
    assert torch.equal(loaded.test_inputs[:, 0], torch.from_numpy(pixels[20:]))
    assert loaded.train_labels.tolist() == [*range(10), *range(10)]


def test_decodes_coloured_images_channels_first(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 32, 32, 3), dtype=np.uint8)
    root = write(tmp_path / "data" / "cifar10", "img", pixels)
    decoded = data._decode("cifar10", str(root / "cifar10"))
    assert decoded.train_inputs.shape == (20, 3, 32, 32)
    assert torch.equal(decoded.train_inputs[:, 2], torch.from_numpy(pixels[:20, :, :, 2]))


def test_the_folder_may_come_from_the_environment(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUADSTEP_DATA", str(root))
    assert len(load("mnist").train_labels) == 20


def forbid(*_: Any) -> Any:
    raise AssertionError("decoded again")


def test_decodes_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load("mnist", root)
    monkeypatch.setattr(data, "_decode", forbid)
    assert load("mnist", root).digest() == first.digest()


def empty(path: Path) -> None:
    path.write_bytes(b"")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def exchange(path: Path) -> None:
    torch.save({"train_inputs": torch.zeros(1)}, path)


@pytest.mark.parametrize("damage", [empty, truncate, flip, exchange])
def test_a_damaged_cache_is_made_anew(
    root: Path, tmp_path: Path, damage: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load("mnist", root)
    (cache,) = (tmp_path / "cache").iterdir()
    sound = cache.read_bytes()
    damage(cache)
    assert load("mnist", root).digest() == first.digest()
    assert cache.read_bytes() == sound
    monkeypatch.setattr(data, "_decode", forbid)
    load("mnist", root)


def test_does_without_a_cache_that_cannot_be_written(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("QUADSTEP_CACHE", str(tmp_path / "file"))
    assert len(load("mnist", root).train_labels) == 20


def test_other_contents_are_refused(tmp_path: Path, pixels: np.ndarray) -> None:
    root = write(tmp_path / "data" / "mnist", "image", pixels)
    with pytest.raises(DataError, match=r"data/mnist is not the mnist data set.* --data .*"):
        load("mnist", root)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("kind", ["missing", "empty", "no test split"])
def test_an_unusable_folder_is_named_with_the_mend(
    tmp_path: Path, pixels: np.ndarray, kind: str
) -> None:
    folder = tmp_path / "data" / "mnist"
    if kind == "empty":
        folder.mkdir(parents=True)
    if kind == "no test split":
        write(folder, "image", pixels)
        (folder / "test-00000-of-00001.parquet").unlink()
    with pytest.raises(DataError, match=r"data/mnist.* --data or QUADSTEP_DATA"):
        load("mnist", tmp_path / "data")


def test_a_network_out_of_reach_is_named_with_the_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any) -> Any:
        raise ConnectionError("couldn't reach the hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(DataError, match=r"reach the hub.* --data or QUADSTEP_DATA.*ylecun/mnist"):
        load("mnist")


def test_an_unknown_data_set_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown data set 'svhn': choose from mnist, cifar10"):
        load("svhn")  # pyright: ignore[reportArgumentType]


@pytest.mark.skipif(SOURCE is None, reason="QUADSTEP_DATA names no folder of data sets")
def test_the_real_mnist_has_its_published_contents() -> None:
    loaded = load("mnist", Path(str(SOURCE)))
    assert loaded.train_inputs.shape == (60000, 1, 28, 28)
    assert loaded.test_inputs.shape == (10000, 1, 28, 28)
    assert loaded.train_labels[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert loaded.train_labels.bincount().tolist() == [
        *(5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949)
    ]


def test_the_digits_are_split_by_class() -> None:
    digits = load("digits")
    assert digits.train_inputs.shape == (1352, 1, 8, 8)
    assert digits.test_inputs.shape == (445, 1, 8, 8)
    assert int(digits.train_inputs.max()) == 255
    share = digits.test_labels.bincount() / digits.train_labels.bincount()
    assert share.min() > 0.31
    assert share.max() < 0.34
    expected = "da3defb7f425b3fa6f7747cf328b22e5de31c1a6e9d5ce84925293eddceecb06"
    assert digits.digest() == expected


@pytest.mark.parametrize("size", [10, 11, 126, 1351])
def test_a_subset_is_balanced_and_keeps_the_order(size: int) -> None:
    full, part = load("digits"), load("digits", subset=size)
    assert len(part.train_labels) == size
    counts, most = part.train_labels.bincount(minlength=10), full.train_labels.bincount()
    assert torch.all((counts >= counts.max() - 1) | (counts == most))
    assert torch.equal(part.test_inputs, full.test_inputs)
    of_class = full.train_labels == 3
    kept = part.train_inputs[part.train_labels == 3]
    assert torch.equal(kept, full.train_inputs[of_class][: len(kept)])


def test_a_subset_of_all_is_all() -> None:
    assert load("digits", subset=1352).digest() == load("digits").digest()


@pytest.mark.parametrize("subset", [0, 9, 1353])
def test_a_subset_out_of_range_is_refused(subset: int) -> None:
    with pytest.raises(ValueError, match=f"subset must be between 10 and 1352: got {subset}"):
        load("digits", subset=subset)


def test_held_out_examples_are_chosen_as_those_of_a_subset() -> None:
    full, part = load("digits"), load("digits", held_out=50)
    assert part.test_labels.bincount().tolist() == [5] * 10
    assert torch.equal(part.train_inputs, full.train_inputs)
    with pytest.raises(ValueError, match="held_out must be between 10 and 445: got 446"):
        load("digits", held_out=446)


def test_a_run_is_trained_on_what_its_task_and_configuration_say(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(data, "load", lambda *arguments: asked.append(arguments))
    data.load_for(Config("resnet8-cifar10", "sgd-0.1", 0, 1, subset=500), Path("data"))
    assert asked == [("cifar10", Path("data"), 500, 1000)]


def test_variants_of_the_digits() -> None:
    plain, noisy = load("digits"), load("digits-noisy")
    wrong = (noisy.train_labels != plain.train_labels).float().mean()
    assert float(wrong) == pytest.approx(0.2, abs=1e-3)
    assert sorted(noisy.train_labels.unique().tolist()) == list(range(10))
    assert noisy.digest() == load("digits-noisy").digest()
    assert torch.equal(noisy.test_labels, plain.test_labels)
    inputs, _ = next(batches(*_training(load("digits-unscaled")), 2000))
    assert float(inputs.max()) == 255.0
    inputs, targets = next(batches(*_training(load("digits-pixels")), 2000))
    assert torch.equal(inputs, targets)
    assert float(targets.max()) == 1.0


def _training(loaded: Data) -> tuple[torch.Tensor, torch.Tensor]:
    return loaded.train_inputs, loaded.train_labels


@pytest.mark.parametrize(
    ("name", "sizes"), [("diabetes", (332, 110)), ("breast-cancer", (427, 142))]
)
def test_tables_are_standardised_by_their_training_part(name: Any, sizes: tuple[int, int]) -> None:
    table = load(name)
    assert (len(table.train_labels), len(table.test_labels)) == sizes
    standardised = [table.train_inputs]
    if name == "diabetes":
        standardised.append(table.train_labels)
        assert table.train_labels.shape == (332, 1)
    for columns in standardised:
        assert columns.dtype == torch.float32
        assert columns.mean(0).abs().max() < 1e-6
        assert columns.std(0, correction=0).allclose(torch.ones(columns.shape[1]))


def test_text_is_labelled_by_its_next_characters() -> None:
    text = load("text")
    assert text.train_inputs.shape == text.train_labels.shape == (4800, 64)
    assert text.test_inputs.shape == text.test_labels.shape == (1000, 64)
    assert torch.equal(text.train_inputs[:, 1:], text.train_labels[:, :-1])
    assert 0 <= int(text.train_inputs.min()) < int(text.train_inputs.max()) == CHARACTERS - 1
    characters = [*map(chr, range(32, 127)), "\n"]
    first = "".join(characters[code] for code in text.train_inputs[0].tolist())
    assert first == Path(argparse.__file__).read_text("utf-8")[:64]
    assert text.digest() == load("text").digest()


def test_text_without_sources_is_named_with_the_mend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(DataError, match=r"argparse\.py.*use a Python that has them as files"):
        load("text")


def test_batches_follow_the_order_and_keep_the_rest() -> None:
    inputs, labels = torch.tensor([[0], [51], [255]], dtype=torch.uint8), torch.arange(3)
    got = list(batches(inputs, labels, 2, order=torch.tensor([2, 0, 1])))
    assert [y.tolist() for _, y in got] == [[2, 0], [1]]
    assert [x.tolist() for x, _ in got] == [[[1.0], [0.0]], [[pytest.approx(0.2)]]]
    assert [y.tolist() for _, y in batches(inputs, labels, 2)] == [[0, 1], [2]]
