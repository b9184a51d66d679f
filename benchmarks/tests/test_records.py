"""Records: what is written comes back, and nothing else is taken for a record."""

import errno
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quadstep_bench.runner import records
from quadstep_bench.runner.records import Config, Epoch, Record, RecordError, read

CONFIG = Config("mlp-digits", "adam-0.01", seed=1, epochs=2, subset=100)
HEADER = records.header(CONFIG, threads=1, device="cpu")


def epoch(number: int, train_loss: float = 0.5) -> Epoch:
    rate = None if number == 0 else dict.fromkeys(("min", "q10", "median", "q90", "max"), 0.01)
    return Epoch(number, train_loss, 0.6, 0.9, 0.1 * number, number, number, rate, {})


def record(**changes: Any) -> Record:
    whole = Record(CONFIG, HEADER, (epoch(0), epoch(1), epoch(2)), "finished")
    return replace(whole, **changes)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """The file of a finished record."""
    records.write(record(), tmp_path)
    return CONFIG.path(tmp_path)


def test_each_run_has_its_place(tmp_path: Path) -> None:
    folder = tmp_path / "mlp-digits-subset100"
    assert CONFIG.path(tmp_path) == folder / "adam-0.01-seed1.jsonl"
    assert replace(CONFIG, subset=None).path(tmp_path).parent == tmp_path / "mlp-digits"
    reduced: Any = "bfloat16"
    assert replace(CONFIG, precision=reduced).folder == "mlp-digits-subset100-bfloat16"


def test_a_record_comes_back(tmp_path: Path, path: Path) -> None:
    assert read(path) == record()
    assert records.find(CONFIG, tmp_path) == record()
    assert records.read_all(tmp_path) == [record()]
    assert records.find(replace(CONFIG, seed=2), tmp_path) is None


losses = st.floats(allow_nan=False, allow_infinity=False)


@settings(deadline=None, max_examples=50)
@given(
    rows=st.lists(
        st.builds(
            Epoch,
            epoch=st.just(0),
            train_loss=losses,
            test_loss=losses,
            test_accuracy=st.floats(0, 1),
            seconds=st.floats(0, 1e6),
            forwards=st.integers(0),
            backwards=st.integers(0),
            rate=st.none() | st.dictionaries(st.text(), losses),
            reasons=st.dictionaries(st.text(), st.integers(0)),
        ),
        min_size=1,
    ),
    status=st.sampled_from(["finished", "diverged", "unfinished"]),
)
def test_any_record_comes_back_to_the_last_bit(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Epoch], status: Any
) -> None:
    root = tmp_path_factory.mktemp("records")
    epochs = tuple(replace(row, epoch=number) for number, row in enumerate(rows))
    records.write(record(epochs=epochs, status=status), root)
    assert read(CONFIG.path(root)) == record(epochs=epochs, status=status)


def test_numbers_that_are_not_finite_are_written_as_null(tmp_path: Path) -> None:
    last = replace(epoch(1), train_loss=math.nan, test_loss=math.inf, rate={"max": -math.inf})
    records.write(record(epochs=(epoch(0), last), status="diverged"), tmp_path)
    row = json.loads(CONFIG.path(tmp_path).read_text().splitlines()[2])
    assert row["train_loss"] is row["test_loss"] is row["rate"]["max"] is None
    back = read(CONFIG.path(tmp_path)).epochs[1]
    assert math.isnan(back.train_loss)
    assert math.isnan(back.test_loss)
    assert back.rate is not None
    assert math.isnan(back.rate["max"])


def test_a_file_cut_short_anywhere_is_a_run_that_has_not_ended(path: Path) -> None:
    whole = path.read_bytes()
    head = whole.index(b"\n") + 1
    for size in range(0, len(whole), 3):
        path.write_bytes(whole[:size])
        if size < head:
            with pytest.raises(RecordError, match="line 1: no header"):
                read(path)
        else:
            cut = read(path)
            assert cut.status == "unfinished"
            assert cut.epochs == record().epochs[: whole[:size].count(b"\n") - 1]


@pytest.mark.parametrize(
    ("line", "old", "new", "problem"),
    [
        (1, '"format": 1', '"format": 2', "not a header of format 1"),
        (1, '"kind": "header"', '"kind": "end"', "not a header"),
        (1, '"optimizer"', '"optimiser"', "optimiser"),
        (1, '"epochs": 2', '"epochs": 0', "epochs must be a whole number of at least 1: got 0"),
        (2, '"epoch": 0', '"epoch": 1', "not the line of epoch 0"),
        (3, '"train_loss": 0.5', '"train_loss": NaN', "NaN is not a number"),
        (3, '"train_loss": 0.5', '"train_loss": "x"', "could not convert"),
        (3, '"train_loss"', '"loss"', "KeyError: 'train_loss'"),
        (3, '{"kind"', '"kind"', "JSONDecodeError"),
        (3, '"kind": "epoch"', '"kind": "end"', "KeyError: 'status'"),
        (5, '"finished"', '"fine"', "unknown status 'fine'"),
        (5, '"epoch": 2', '"epoch": 3', "the end at epoch 3 follows the line of epoch 2"),
    ],
)
def test_a_damaged_record_is_named_with_its_line_and_the_mend(
    path: Path, line: int, old: str, new: str, problem: str
) -> None:
    lines = path.read_text().splitlines(keepends=True)
    assert old in lines[line - 1]
    lines[line - 1] = lines[line - 1].replace(old, new)
    path.write_text("".join(lines))
    with pytest.raises(RecordError) as caught:
        read(path)
    message = str(caught.value)
    assert message.startswith(f"{path}, line {line}: ")
    assert problem in message
    assert message.endswith("Restore the file, or delete it to run it again")


def test_lines_after_the_end_and_other_files_are_refused(path: Path) -> None:
    whole = path.read_text()
    path.write_text(whole + whole.splitlines()[-1] + "\n")
    with pytest.raises(RecordError, match="line 6: ValueError: a line after the end"):
        read(path)
    for content in (b"\xff\xfe\n", b"[]\n", b"1\n"):
        path.write_bytes(content)
        with pytest.raises(RecordError, match="line 1"):
            read(path)


def test_the_record_of_another_configuration_is_not_taken_for_this_one(
    tmp_path: Path, path: Path
) -> None:
    with pytest.raises(RecordError, match=r"batch_size=64.*another folder .* with --out"):
        records.find(replace(CONFIG, batch_size=32), tmp_path)
    assert records.find(replace(CONFIG, epochs=9), tmp_path) is not None


@pytest.mark.parametrize(
    ("status", "epochs", "satisfied"),
    [
        ("finished", 1, True),
        ("finished", 2, True),
        ("finished", 3, False),
        ("diverged", 3, True),
        ("unfinished", 1, False),
    ],
)
def test_what_a_record_satisfies(status: Any, epochs: int, satisfied: bool) -> None:
    assert record(status=status).satisfies(epochs) == satisfied


@pytest.mark.parametrize("status", ["finished", "diverged"])
def test_a_record_with_a_schedule_satisfies_no_other_length(status: Any) -> None:
    made = record(status=status)
    made = replace(made, config=replace(made.config, optimizer="adamw-cosine-0.01"))
    assert [made.satisfies(epochs) for epochs in (1, 2, 3)] == [False, True, False]


def full(_: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_named_and_leaves_the_old_file(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = path.read_bytes()
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"cannot write .*seed1\.jsonl: No space left") as caught:
        records.write(record(status="diverged"), tmp_path)
    assert caught.value.errno == errno.ENOSPC
    assert "run the same command again" in str(caught.value)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert path.read_bytes() == before


def interrupt(path: Path) -> None:
    with records.replacing(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt


def test_a_file_is_replaced_whole_or_not_at_all(path: Path) -> None:
    before = path.read_bytes()
    with pytest.raises(KeyboardInterrupt):
        interrupt(path)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("name", "value"),
    [("seed", -1), ("epochs", 0), ("batch_size", 0), ("subset", 0), ("epochs", 1.5)],
)
def test_a_number_out_of_range_is_named(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{name} must be a whole number of at least"):
        replace(CONFIG, **{name: value})


def test_an_unknown_precision_is_named() -> None:
    unknown: Any = "half"
    with pytest.raises(ValueError, match=r"^unknown precision 'half': choose from float32"):
        replace(CONFIG, precision=unknown)


def test_the_header_tells_what_the_run_depended_on() -> None:
    assert HEADER["config"] == {
        "task": "mlp-digits",
        "optimizer": "adam-0.01",
        "seed": 1,
        "epochs": 2,
        "batch_size": 64,
        "subset": 100,
        "precision": "float32",
    }
    assert HEADER["revision"] is None or len(HEADER["revision"]) == 40
    assert isinstance(HEADER["dirty"], bool)
    assert {"python", "torch", "quadstep"} <= set(HEADER["versions"])
    assert HEADER["machine"] == HEADER["machine"] | {"threads": 1, "device": "cpu"}
    assert HEADER["machine"]["processor"]


def test_the_header_tells_under_what_else_the_run_went_on() -> None:
    first = HEADER
    other = first | {"revision": "f" * 40}
    assert records.resumed(first, first, 1) == first
    once = records.resumed(first, other, 1)
    assert once["revision"] == first["revision"]
    assert [(row["epoch"], row["revision"]) for row in once["resumed"]] == [(1, "f" * 40)]
    assert records.resumed(once, other, 2) == once
    assert [row["epoch"] for row in records.resumed(once, first, 2)["resumed"]] == [1, 2]


def test_records_are_read_without_torch() -> None:
    code = "import sys, quadstep_bench.runner.records; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
