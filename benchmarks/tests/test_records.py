"""Records: what is written comes back, and nothing else is taken for a record."""

import errno
import json
import math
import multiprocessing
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import ENVIRONMENT, collection_in, results_in

from quadstep_bench.runner import files
from quadstep_bench.runner.environment import SOURCES, environment, hash_sources, key
from quadstep_bench.runner.files import RecordError
from quadstep_bench.runner.records import Config, Epoch, Record

CONFIG = Config("mlp-digits", "adam-0.01", seed=1, epochs=2, subset=100)
QUANTILES = ("min", "q10", "median", "q90", "max")


def epoch(number: int, train_loss: float = 0.5) -> Epoch:
    rate = None if number == 0 else dict.fromkeys(QUANTILES, 0.01)
    return Epoch(number, train_loss, 0.6, 0.9, 0.1 * number, number, number, rate, {})


def record(**changes: Any) -> Record:
    run = Record(CONFIG, (epoch(0), epoch(1), epoch(2)), "finished", ENVIRONMENT)
    return replace(run, **changes)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """The file of a finished record."""
    collection_in(tmp_path).add(record())
    return collection_in(tmp_path).path(CONFIG.task)


def test_the_runs_of_a_task_are_lines_of_one_file(tmp_path: Path) -> None:
    collection = collection_in(tmp_path)
    reduced: Any = "bfloat16"
    configs = [
        replace(CONFIG, optimizer="sgd-0.1"),
        replace(CONFIG, seed=10),
        replace(CONFIG, seed=2),
        replace(CONFIG, precision=reduced),
        replace(CONFIG, subset=None),
        CONFIG,
    ]
    for config in configs:
        collection.add(record(config=config))
    assert collection.path("mlp-digits") == tmp_path / "results" / "records" / "mlp-digits.jsonl"
    assert [each.config for each in collection.read_all()] == [
        *(configs[index] for index in (4, 3, 5, 2, 1, 0))
    ]
    assert str(configs[3]) == "mlp-digits-subset100-bfloat16 adam-0.01 seed 1"


def test_a_record_comes_back(tmp_path: Path) -> None:
    collection = collection_in(tmp_path)
    other = ENVIRONMENT | {"revision": "f" * 40}
    made = record(data="digest", resumed=((1, other),))
    collection.add(made)
    assert collection.read_all() == [made]
    assert collection.find(CONFIG) == made
    assert collection.find(replace(CONFIG, epochs=9)) == made
    assert collection.find(replace(CONFIG, seed=2)) is None
    assert collection.find(replace(CONFIG, batch_size=32)) is None
    assert made.environments == [ENVIRONMENT, other]
    assert results_in(tmp_path).environments() == {key(each): each for each in (ENVIRONMENT, other)}


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
            rate=st.fixed_dictionaries(dict.fromkeys(QUANTILES, losses)),
            reasons=st.dictionaries(st.text(), st.integers(1)),
        ),
        min_size=1,
    ),
    status=st.sampled_from(["finished", "diverged"]),
)
def test_any_record_comes_back_to_the_last_bit(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Epoch], status: Any
) -> None:
    collection = collection_in(tmp_path_factory.mktemp("records"))
    rows[0] = replace(rows[0], rate=None, reasons={})
    epochs = tuple(replace(row, epoch=number) for number, row in enumerate(rows))
    collection.add(record(epochs=epochs, status=status))
    assert collection.read_all() == [record(epochs=epochs, status=status)]


def test_numbers_that_are_not_finite_are_written_as_null(tmp_path: Path) -> None:
    rate = dict.fromkeys(QUANTILES, -math.inf)
    last = replace(epoch(1), train_loss=math.nan, test_loss=math.inf, rate=rate)
    collection = collection_in(tmp_path)
    collection.add(record(epochs=(epoch(0), last), status="diverged"))
    row = json.loads(collection.path(CONFIG.task).read_text())
    assert row["train_loss"][1] is row["test_loss"][1] is row["rate"]["max"][0] is None
    (back,) = collection.read_all()
    assert math.isnan(back.epochs[1].train_loss)
    assert math.isnan(back.epochs[1].test_loss)
    assert back.epochs[1].rate is not None
    assert math.isnan(back.epochs[1].rate["max"])


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ('"optimizer"', '"optimiser"', "KeyError: 'optimizer'"),
        ('"epochs":2', '"epochs":0', "epochs must be a whole number of at least 1: got 0"),
        ('"train_loss":[0.5', '"train_loss":[NaN', "NaN is not a number"),
        ('"train_loss":[0.5', '"train_loss":["x"', "could not convert"),
        ('"train_loss":[0.5,', '"train_loss":[', "columns of different lengths"),
        ('"train_loss"', '"loss"', "KeyError: 'train_loss'"),
        ('{"task"', '"task"', "JSONDecodeError"),
        ('"finished"', '"fine"', "unknown status 'fine'"),
        ('"environment":"', '"environment":"0', "is not in environments.json; restore that"),
        ('"mlp-digits"', '"mlp-mnist"', "a record that belongs elsewhere"),
    ],
)
def test_a_damaged_record_is_named_with_its_line_and_the_fix(
    tmp_path: Path, path: Path, old: str, new: str, problem: str
) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace("adam", "adagrad") + text.replace(old, new, 1))
    with pytest.raises(RecordError) as caught:
        collection_in(tmp_path).read_all()
    message = str(caught.value)
    assert message.startswith(f"{path}, line 2: ")
    assert problem in message
    assert message.endswith("Restore the file, or delete the line to run it again")


def test_second_records_and_other_files_are_refused(tmp_path: Path, path: Path) -> None:
    path.write_text(2 * path.read_text())
    with pytest.raises(RecordError, match=r"line 2: ValueError: .* a second one of a run"):
        collection_in(tmp_path).read_all()
    for content in (b"\xff\xfe\n", b"[]\n", b"1\n"):
        path.write_bytes(content)
        with pytest.raises(RecordError, match="line 1"):
            collection_in(tmp_path).read_all()
        with pytest.raises(RecordError, match="line 1"):
            collection_in(tmp_path).add(record())
        assert path.read_bytes() == content


def test_a_run_has_one_record_that_of_most_epochs(tmp_path: Path) -> None:
    collection = collection_in(tmp_path)
    longer = record(
        config=replace(CONFIG, epochs=3), epochs=tuple(map(epoch, range(4))), status="finished"
    )
    for run, left in ((record(), record()), (longer, longer), (record(), longer)):
        collection.add(run)
        assert collection.read_all() == [left]
    scheduled = replace(CONFIG, optimizer="adamw-cosine-0.01")
    for epochs in (2, 3):
        collection.add(record(config=replace(scheduled, epochs=epochs)))
    assert len(collection.read_all()) == 3


def add(root: Path, seeds: range) -> None:
    for seed in seeds:
        collection_in(root).add(record(config=replace(CONFIG, seed=seed)))


def test_processes_that_write_at_once_lose_nothing(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ranges = (range(20), range(20, 40))
    processes = [context.Process(target=add, args=(tmp_path, seeds)) for seeds in ranges]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [each.config.seed for each in collection_in(tmp_path).read_all()] == list(range(40))


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
    with pytest.raises(OSError, match=r"cannot write .*digits\.jsonl: No space left") as caught:
        collection_in(tmp_path).add(record(status="diverged"))
    assert caught.value.errno == errno.ENOSPC
    assert "run the same command again" in str(caught.value)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert path.read_bytes() == before


def interrupt(path: Path) -> None:
    with files.replacing(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt


def test_a_file_is_replaced_in_full_or_not_at_all(path: Path) -> None:
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


def test_the_environment_tells_what_a_run_depends_on() -> None:
    here = environment(threads=1, device="cpu")
    assert here["revision"] is None or len(here["revision"]) == 40
    assert isinstance(here["dirty"], bool)
    assert here["sources"] == SOURCES
    assert {"python", "torch", "quadstep"} <= set(here["versions"])
    assert here["machine"] == here["machine"] | {"threads": 1, "device": "cpu"}
    assert here["machine"]["processor"]
    assert "prodigyopt" in environment(threads=1, device="cpu", packages=["prodigyopt"])["versions"]
    assert key(here) != key(here | {"dirty": not here["dirty"]})


def test_sources_are_told_apart_by_names_and_contents() -> None:
    sources = {"a.py": b"1", "b.py": b"2"}
    others = ({"a.py": b"1"}, {"a.py": b"2", "b.py": b"1"}, {"a.py": b"12", "b.py": b""})
    assert len({hash_sources(each) for each in (sources, *others)}) == 4
    assert hash_sources(sources) == hash_sources(dict(reversed(sources.items())))


def test_records_are_read_without_torch() -> None:
    code = "import sys, quadstep_bench.runner.records; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
