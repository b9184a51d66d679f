"""Splits: what goes where, and that nothing of the held-out parts is used before its time."""

import argparse
import random
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from quadstep_bench.selftuning import data
from quadstep_bench.selftuning.problem import SPLITS
from quadstep_bench.tasks import CONTEXT
from quadstep_bench.tasks.data import Data, DataError, characters

ALPHABET = [*map(chr, range(32, 127)), "\n"]
WINDOW = CONTEXT + 1


def text_of(codes: Tensor) -> str:
    return "".join(ALPHABET[code] for code in codes.tolist())


def windows(splits: dict[str, tuple[Tensor, ...]]) -> list[str]:
    """All windows with the last of their next characters, in the order of the splits."""
    return [
        text_of(torch.cat([inputs, labels[-1:]]))
        for name in SPLITS
        for inputs, labels in zip(*splits[name], strict=True)
    ]


def test_a_split_deals_out_each_example_once_and_keeps_columns_together() -> None:
    numbers = torch.arange(103)
    splits = data.split_fifths((numbers, numbers + 1000))
    assert [len(splits[name][0]) for name in SPLITS] == [63, 20, 20]
    assert sorted(torch.cat([splits[name][0] for name in SPLITS]).tolist()) == numbers.tolist()
    assert all(torch.equal(second, first + 1000) for first, second in splits.values())
    assert splits["train"][0].tolist() != sorted(splits["train"][0].tolist())
    again = data.split((numbers,), (63, 20, 20))
    assert all(torch.equal(again[name][0], splits[name][0]) for name in SPLITS)
    some = data.split((numbers,), (5, 3, 2))
    assert len(set(torch.cat([some[name][0] for name in SPLITS]).tolist())) == 10


def test_standardising_takes_nothing_from_the_held_out_parts() -> None:
    table = torch.randn(100, 3, generator=torch.Generator().manual_seed(0)) * 7.0 + 5.0
    splits, shifted = (
        data.split_fifths((table, table[:, :1])),
        data.split_fifths((table, table[:, :1])),
    )
    for name in ("validation", "test"):
        shifted[name] = tuple(column + 1e3 for column in shifted[name])
    mean, deviation = splits["train"][0].mean(0), splits["train"][0].std(0, correction=0)
    raw = splits["test"][0]
    data.standardise(splits)
    data.standardise(shifted, (0, 1))
    for column in shifted["train"]:
        assert column.mean(0).abs().max() < 1e-6
        assert column.std(0, correction=0).allclose(torch.ones(column.shape[1]))
    assert torch.equal(splits["train"][0], shifted["train"][0])
    assert torch.equal(splits["train"][1], data.split_fifths((table[:, :1],))["train"][0])
    assert splits["test"][0].allclose((raw - mean) / deviation)


def test_images_of_some_classes_are_numbered_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = torch.arange(40) % 10
    pixels = torch.arange(40, dtype=torch.uint8).view(40, 1, 1, 1)
    monkeypatch.setattr(data.data, "load", lambda *_: Data(pixels, labels, pixels + 100, labels))
    splits = data.images("mnist", None, (4, 3, 2), (7, 3))
    numbers = {name: (255 * splits[name][0]).flatten().round().tolist() for name in SPLITS}
    assert numbers == {"train": [3, 7, 13, 17], "validation": [103, 107, 113], "test": [117, 123]}
    assert {name: splits[name][1].tolist() for name in SPLITS} == {
        "train": [1, 0, 1, 0],
        "validation": [1, 0, 1],
        "test": [0, 1],
    }


def test_windows_lie_apart_and_in_the_part_of_their_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In a random text each window is found in one place.
    written = "".join(random.Random(0).choices("abcdefgh\n", k=5000))
    (tmp_path / "first.py").write_text(written[:3000])
    (tmp_path / "second.py").write_text(written[3000:])
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    sizes = 50, 15, 10
    splits = data.text(("first", "second"), sizes)
    assert [len(splits[name][0]) for name in SPLITS] == list(sizes)
    for inputs, labels in splits.values():
        assert inputs.shape[1] == labels.shape[1] == CONTEXT
        assert torch.equal(inputs[:, 1:], labels[:, :-1])
    starts = [written.index(window) for window in windows(splits)]
    assert all(second - first >= WINDOW for first, second in pairwise(starts))
    borders = [0, 5000 * 50 // 75, 5000 * 65 // 75, 5000]
    for count, (first, last) in zip(sizes, pairwise(borders), strict=True):
        part, starts = starts[:count], starts[count:]
        assert part[0] == first
        assert part[-1] + WINDOW <= last


@pytest.mark.parametrize(
    ("modules", "sizes"), [(data.CODE, (8000, 250, 250)), ([data.PROSE], (2400, 250, 250))]
)
def test_windows_of_the_tasks_do_not_overlap(
    modules: tuple[str, ...], sizes: tuple[int, int, int]
) -> None:
    folder = Path(argparse.__file__).parent
    written = text_of(
        characters("".join((folder / f"{name}.py").read_text("utf-8") for name in modules))
    )
    place = 0
    for window in windows(data.text(modules, sizes)):
        place = written.index(window, place) + WINDOW


def test_lines_have_four_words_and_the_module_that_they_are_from() -> None:
    folder = Path(argparse.__file__).parent
    sources = [(folder / f"{name}.py").read_text("utf-8") for name in data.MODULES]
    found = data.lines((100, 50, 30))
    assert [len(found[name][0]) for name in SPLITS] == [100, 50, 30]
    for texts, labels in found.values():
        assert all(len(data.words(text)) >= 4 for text in texts)
        assert all(text in sources[label] for text, label in zip(texts, labels, strict=True))
    assert len(set(found["train"][1].tolist())) == len(data.MODULES)


def test_words_are_letters_in_lower_case() -> None:
    assert data.words("def Find_it(self, x2): # The 3rd") == [
        *("def", "find", "it", "self", "x", "the", "rd")
    ]


def test_sources_that_are_missing_are_named_with_the_mend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(DataError, match=r"inspect\.py.*use a Python that has them as files"):
        data.text(data.CODE, (1, 1, 1))
