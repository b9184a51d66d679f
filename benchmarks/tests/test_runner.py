"""Runs and grids of runs: what they record, and that they go on from wherever they were stopped."""

import errno
import math
import multiprocessing
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from synthetic import collection_in

from quadstep import Reason
from quadstep_bench.optimizers import builders, settings
from quadstep_bench.paper import runs
from quadstep_bench.runner import parallel
from quadstep_bench.runner.files import RecordError
from quadstep_bench.runner.records import Config, Epoch, Record
from quadstep_bench.runner.training import Trial, run, shuffle
from quadstep_bench.tasks import data
from quadstep_bench.tasks.data import DataError

CONFIG = Config("mlp-digits", "sgd-m-0.1", seed=0, epochs=3, subset=100)
STEPS = 2
"""Steps an epoch: a batch of 64 and one of the 36 examples left."""

WORKERS = 2

CONFIGURATIONS = ("sgd-0.1", "adam-0.01", "adamw-cosine-0.01", "lqa-paper", "lqa", "lqa-auto")


@pytest.fixture(scope="module", autouse=True)
def threads() -> Iterator[None]:
    """Computes as a worker does, since the number of threads may show in the last bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, before // WORKERS))
    yield
    torch.set_num_threads(before)


def rows(record: Record) -> list[str]:
    """All that a run gives, but the time it took; as text, since nan is not equal to itself."""
    return [record.status, *(str(asdict(replace(row, seconds=0.0))) for row in record.epochs)]


def forbid(*_: Any, **__: Any) -> Any:
    raise AssertionError("trained again")


# One run ----------------------------------------------------------------------------------------


def test_a_run_records_every_epoch(tmp_path: Path) -> None:
    seen: list[Epoch] = []
    record = run(CONFIG, collection_in(tmp_path), on_epoch=seen.append)
    assert collection_in(tmp_path).read_all() == [record]
    assert record.status == "finished"
    assert record.config == CONFIG
    assert record.epochs == tuple(seen)
    assert [row.epoch for row in seen] == [0, 1, 2, 3]
    assert [row.forwards for row in seen] == [row.backwards for row in seen]
    assert [row.forwards for row in seen] == [STEPS * number for number in range(4)]
    assert seen[0].rate is None
    assert seen[3].rate == dict.fromkeys(("min", "q10", "median", "q90", "max"), 0.1)
    assert seen[3].train_loss < seen[0].train_loss
    assert 0.0 == seen[0].seconds < seen[1].seconds < seen[2].seconds
    assert not list((tmp_path / "runs").rglob("*.ckpt"))


@pytest.mark.parametrize("name", ["lqa-paper", "lqa", "lqa-auto"])
def test_lqa_records_its_rates_reasons_and_passes(tmp_path: Path, name: str) -> None:
    last = run(replace(CONFIG, optimizer=name), collection_in(tmp_path)).epochs[-1]
    assert sum(last.reasons.values()) == STEPS
    assert set(last.reasons) <= {*map(str, Reason)}
    assert last.rate is not None
    assert last.rate["min"] <= last.rate["median"] <= last.rate["max"]
    assert last.backwards == 3 * STEPS
    if name == "lqa-paper":
        # The first measurement looks twice whether the closure repeats itself.
        assert last.forwards == 3 * last.backwards + 1


def test_nothing_is_classified_where_numbers_are_predicted(tmp_path: Path) -> None:
    config = Config("mlp-diabetes", "adam-0.01", seed=0, epochs=2, batch_size=16)
    record = run(config, collection_in(tmp_path))
    (again,) = collection_in(tmp_path).read_all()
    assert rows(again) == rows(record)
    assert all(math.isnan(row.test_accuracy) for row in again.epochs)
    # Of standardised targets the variance is 1.
    assert record.epochs[0].train_loss == pytest.approx(1.0, abs=0.2)
    assert record.epochs[2].train_loss < 0.7
    assert again.data == data.load("diabetes").digest()


def test_a_scaled_loss_is_trained_and_not_recorded(tmp_path: Path) -> None:
    plain, scaled = (
        run(Config(task, "sgd-0.1", seed=0, epochs=2), collection_in(tmp_path)).epochs
        for task in ("mlp-digits", "mlp-digits-small-loss")
    )
    assert scaled[0].train_loss == plain[0].train_loss
    moved = [rows[0].train_loss - rows[2].train_loss for rows in (plain, scaled)]
    assert 0.0 < moved[1] < 0.01 * moved[0]


def test_bfloat16_computes_the_model_alone(tmp_path: Path) -> None:
    """The losses show the coarser arithmetic and are made in float32, as the weights are kept."""
    exact = run(CONFIG, collection_in(tmp_path)).epochs
    coarse = run(replace(CONFIG, precision="bfloat16"), collection_in(tmp_path)).epochs
    for rough, fine in zip(coarse, exact, strict=True):
        assert rough.train_loss != fine.train_loss
        assert rough.train_loss == pytest.approx(fine.train_loss, rel=0.02)


def test_all_optimizers_start_from_the_same_weights(tmp_path: Path) -> None:
    def start(name: str, seed: int) -> float:
        config = replace(CONFIG, optimizer=name, seed=seed, epochs=1)
        torch.rand(seed + len(name))  # What was drawn before must not matter.
        return run(config, collection_in(tmp_path)).epochs[0].train_loss

    assert len({start(name, 0) for name in CONFIGURATIONS}) == 1
    assert len({start("sgd-0.1", seed) for seed in range(3)}) == 3


def test_every_epoch_of_every_seed_has_its_own_order() -> None:
    orders = [shuffle(100, seed, epoch) for seed in range(20) for epoch in range(1, 20)]
    assert len({tuple(order.tolist()) for order in orders}) == len(orders)
    assert all(order.sort().values.equal(torch.arange(100)) for order in orders)
    torch.manual_seed(7)
    assert shuffle(100, 0, 1).equal(orders[0])


class Stop(BaseException):
    """Stands for whatever ends a process."""


def stop(at: int, row: Epoch) -> None:
    if row.epoch == at:
        raise Stop


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_run_goes_on_bit_for_bit(tmp_path: Path, name: str) -> None:
    config = replace(CONFIG, optimizer=name, epochs=12)
    full = run(config, collection_in(tmp_path / "full"))
    out = tmp_path / "parts"
    for at in (0, 1, 2, 7, 8, 11):
        with pytest.raises(Stop):
            run(config, collection_in(out), on_epoch=partial(stop, at))
        assert not collection_in(out).read_all()
        torch.rand(at + 1)
    assert rows(run(config, collection_in(out))) == rows(full)
    assert not collection_in(out).checkpoint(config).exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", ["sgd-m-0.1", "lqa-auto"])
def test_a_run_goes_on_bit_for_bit_on_an_accelerator(tmp_path: Path, name: str) -> None:
    config = replace(CONFIG, optimizer=name)
    full = run(config, collection_in(tmp_path / "full"), device="cuda")
    with pytest.raises(Stop):
        run(config, collection_in(tmp_path / "parts"), device="cuda", on_epoch=partial(stop, 1))
    parts = run(config, collection_in(tmp_path / "parts"), device="cuda")
    assert full.environment["machine"]["device"] == "cuda"
    assert rows(parts) == rows(full)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_run_killed_while_it_is_collected_is_there_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: bool
) -> None:
    collection = collection_in(tmp_path)
    other = run(replace(CONFIG, seed=1), collection)
    expected = run(CONFIG, collection_in(tmp_path / "fresh"))
    replace_file = Path.replace

    def die(draft: Path, target: Path) -> Path:
        if target.suffix != ".jsonl":
            return replace_file(draft, target)
        if after:
            replace_file(draft, target)
        raise Stop

    monkeypatch.setattr(Path, "replace", die)
    with pytest.raises(Stop):
        run(CONFIG, collection)
    monkeypatch.undo()
    assert collection.checkpoint(CONFIG).exists()
    # Nothing is trained again, and no epoch is lost.
    monkeypatch.setattr(Trial, "train", forbid)
    assert rows(run(CONFIG, collection)) == rows(expected)
    assert not collection.checkpoint(CONFIG).exists()
    assert [rows(each) for each in collection.read_all()] == [rows(expected), rows(other)]


def test_a_finished_run_is_not_trained_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = run(CONFIG, collection_in(tmp_path))
    monkeypatch.setattr(data, "load", forbid)
    assert run(CONFIG, collection_in(tmp_path)) == record
    assert run(replace(CONFIG, epochs=2), collection_in(tmp_path)) == record


def test_a_finished_run_stays_until_a_longer_one_has_finished(tmp_path: Path) -> None:
    short, longer = CONFIG, replace(CONFIG, epochs=6)
    path = collection_in(tmp_path).path(CONFIG.task)
    run(short, collection_in(tmp_path))
    before = path.read_bytes()
    for at in (0, 4):
        with pytest.raises(Stop):
            run(longer, collection_in(tmp_path), on_epoch=partial(stop, at))
        assert path.read_bytes() == before
    again = run(longer, collection_in(tmp_path), on_epoch=lambda row: row.epoch >= 4 or forbid())
    assert rows(again) == rows(run(longer, collection_in(tmp_path / "fresh")))
    assert collection_in(tmp_path).read_all() == [again]
    assert again.config.epochs == 6


def test_a_schedule_is_stretched_over_the_run(tmp_path: Path) -> None:
    config = replace(CONFIG, optimizer="adamw-cosine-0.01")
    rates = [
        row.rate for row in run(config, collection_in(tmp_path)).epochs[1:] if row.rate is not None
    ]
    # By examples in the middle of each step, of which an epoch has one of 64 and one of 36.
    middles = [(epoch + seen) / 3 for epoch in range(3) for seen in (0.32, 0.82)]
    shares = [0.5 + 0.5 * math.cos(math.pi * (middle - 0.05) / 0.95) for middle in middles]
    assert [rate[end] for rate in rates for end in ("max", "min")] == pytest.approx(
        [0.01 * share for share in shares]
    )


def test_a_run_with_a_schedule_serves_and_goes_on_for_its_own_length_alone(tmp_path: Path) -> None:
    config = replace(CONFIG, optimizer="adamw-cosine-0.01")
    shorter, longer = replace(config, epochs=2), replace(config, epochs=5)
    run(config, collection_in(tmp_path))
    record = run(shorter, collection_in(tmp_path))
    assert rows(record) == rows(run(shorter, collection_in(tmp_path / "fresh")))
    with pytest.raises(Stop):
        run(replace(config, epochs=6), collection_in(tmp_path), on_epoch=partial(stop, 1))
    with pytest.warns(UserWarning, match=r"cosine-0\.01-seed0\.ckpt is damaged, .* starts anew"):
        again = run(longer, collection_in(tmp_path))
    assert rows(again) == rows(run(longer, collection_in(tmp_path / "fresh")))
    assert len(collection_in(tmp_path).read_all()) == 3


def test_a_run_stopped_beyond_the_epochs_asked_for_ends_where_it_is(tmp_path: Path) -> None:
    with pytest.raises(Stop):
        run(replace(CONFIG, epochs=9), collection_in(tmp_path), on_epoch=partial(stop, 6))
    record = run(CONFIG, collection_in(tmp_path))
    assert (record.status, record.config.epochs, len(record.epochs)) == ("finished", 6, 7)


@pytest.mark.parametrize("damage", ["truncated", "of another configuration"])
def test_a_useless_checkpoint_is_told_and_the_run_starts_anew(tmp_path: Path, damage: str) -> None:
    with pytest.raises(Stop):
        run(CONFIG, collection_in(tmp_path), on_epoch=partial(stop, 2))
    checkpoint = collection_in(tmp_path).checkpoint(CONFIG)
    config = CONFIG
    if damage == "truncated":
        checkpoint.write_bytes(checkpoint.read_bytes()[:-1000])
    else:
        config = replace(CONFIG, batch_size=32)
    with pytest.warns(UserWarning, match=r"sgd-m-0\.1-seed0\.ckpt is damaged, .* starts anew"):
        record = run(config, collection_in(tmp_path))
    assert rows(record) == rows(run(config, collection_in(tmp_path / "fresh")))


def test_a_damaged_record_is_not_overwritten(tmp_path: Path) -> None:
    run(CONFIG, collection_in(tmp_path))
    path = collection_in(tmp_path).path(CONFIG.task)
    path.write_text(path.read_text().replace('"train_loss":[', '"train_loss":[0,', 1))
    before = path.read_bytes()
    with pytest.raises(RecordError, match=r"line 1: .*delete the line to run it again"):
        run(CONFIG, collection_in(tmp_path))
    assert path.read_bytes() == before


def test_a_disk_that_fills_up_costs_one_epoch_at_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync, left = os.fsync, 2

    def fsync(descriptor: int) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match=r"cannot write .*: No space left .* same command again"):
        run(CONFIG, collection_in(tmp_path))
    monkeypatch.undo()
    again = run(CONFIG, collection_in(tmp_path), on_epoch=lambda row: row.epoch >= 1 or forbid())
    assert rows(again) == rows(run(CONFIG, collection_in(tmp_path / "fresh")))


@pytest.mark.parametrize(
    ("rate", "epochs"),
    [
        pytest.param(float("inf"), 1, id="no finite loss"),
        pytest.param(50.0, 3, id="far above the start"),
    ],
)
def test_a_diverged_run_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rate: float, epochs: int
) -> None:
    builder = partial(torch.optim.SGD, lr=rate)
    monkeypatch.setitem(builders.BUILDERS, "sgd-0.1", builder)
    config = replace(CONFIG, optimizer="sgd-0.1", epochs=20)
    record = run(config, collection_in(tmp_path))
    assert (record.status, record.epochs[-1].epoch) == ("diverged", epochs)
    monkeypatch.setattr(data, "load", forbid)
    assert rows(run(config, collection_in(tmp_path))) == rows(record)


def test_unknown_names_and_data_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown optimizer 'adam': choose from sgd-0\.1"):
        run(replace(CONFIG, optimizer="adam"), collection_in(tmp_path))
    with pytest.raises(ValueError, match="unknown task 'mlp': choose from logistic-mnist"):
        run(replace(CONFIG, task="mlp"), collection_in(tmp_path))
    with pytest.raises(DataError, match="--data"):
        run(replace(CONFIG, task="lenet-mnist"), collection_in(tmp_path), data_root=tmp_path)
    with pytest.raises(ValueError, match="subset must be between 10 and 1352"):
        run(replace(CONFIG, subset=5), collection_in(tmp_path))
    assert not list(tmp_path.rglob("*.*"))


# Grids ------------------------------------------------------------------------------------------


def test_a_figure_needs_every_optimizer_for_every_seed() -> None:
    configs = runs.configs(1, seeds=2)
    assert len(configs) == 2 * len(settings()) == 44
    assert configs[0] == Config("logistic-mnist", "sgd-0.1", 0, epochs=50)
    assert [config.seed for config in configs] == [0] * 22 + [1] * 22
    chosen = runs.configs(5, epochs=15, seeds=[3, 1], subset=5000, optimizers=["lqa-auto"])
    assert chosen == [
        Config("resnet18-cifar10", "lqa-auto", seed, epochs=15, subset=5000) for seed in (3, 1)
    ]


def test_wrong_wishes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown figure 6: choose from 1, 2, 3, 4, 5"):
        runs.configs(6)
    with pytest.raises(ValueError, match="unknown optimizer 'adam': choose from"):
        runs.configs(1, optimizers=["adam"])
    with pytest.raises(ValueError, match="epochs must be a whole number of at least 1: got 0"):
        runs.configs(1, epochs=0)
    with pytest.raises(ValueError, match="seeds must be at least 1: got 0"):
        runs.configs(1, seeds=0)
    with pytest.raises(ValueError, match="workers must be at least 1: got 0"):
        parallel.execute([CONFIG], collection_in(tmp_path), workers=0)


def test_what_is_missing_is_what_has_not_ended(tmp_path: Path) -> None:
    done, half, none = (replace(CONFIG, seed=seed) for seed in range(3))
    run(done, collection_in(tmp_path))
    with pytest.raises(Stop):
        run(half, collection_in(tmp_path), on_epoch=partial(stop, 2))
    assert collection_in(tmp_path).missing([done, half, none, none]) == [half, none]
    assert collection_in(tmp_path).missing([replace(done, epochs=2)]) == []
    longer = replace(done, epochs=4)
    assert collection_in(tmp_path).missing([longer]) == [longer]


def test_missing_data_stops_a_grid_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "ProcessPoolExecutor", forbid)
    with pytest.raises(DataError, match="--data"):
        parallel.execute(runs.configs(1), collection_in(tmp_path), data_root=tmp_path)


def test_a_grid_that_has_all_its_records_starts_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(CONFIG, collection_in(tmp_path))
    monkeypatch.setattr(parallel, "ProcessPoolExecutor", forbid)
    assert parallel.execute([CONFIG], collection_in(tmp_path)) == 0


GRID = [Config("mlp-digits", name, seed=0, epochs=30, subset=200) for name in CONFIGURATIONS]


def wait_for_epochs(out: Path, epochs: int) -> None:
    for _ in range(6000):
        seen = 30 * len(collection_in(out).read_all())
        for path in (out / "runs").rglob("*.ckpt"):
            # A file may be gone between the moments when it is found and read.
            with suppress(FileNotFoundError):
                seen += len(torch.load(path)["epochs"])
        if seen >= epochs:
            return
        time.sleep(0.01)
    raise TimeoutError


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Can be interrupted, which jobs in the background of a script are started without."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.slow
@pytest.mark.usefixtures("interruptible")
def test_a_grid_goes_on_wherever_it_was_ended(tmp_path: Path) -> None:
    full = {config: rows(run(config, collection_in(tmp_path / "full"))) for config in GRID}
    out = tmp_path / "parts"
    killed, interrupted = random.randrange(2, 30), random.randrange(40, 80)

    process = multiprocessing.get_context("spawn").Process(
        target=parallel.execute, args=(GRID, collection_in(out)), kwargs={"workers": WORKERS}
    )
    process.start()
    wait_for_epochs(out, killed)
    process.kill()
    process.join()
    # The workers end too: left alone for so long they would have finished what they were at.
    time.sleep(2)
    assert list(out.rglob("*.ckpt"))

    def interrupt() -> None:
        wait_for_epochs(out, interrupted)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        parallel.execute(GRID, collection_in(out), workers=WORKERS)
    assert not multiprocessing.active_children()
    assert collection_in(out).missing(GRID)

    for config in GRID:
        assert rows(run(config, collection_in(out))) == full[config], (killed, interrupted)
    assert not list(out.rglob("*.ckpt"))


@pytest.mark.slow
def test_a_run_that_fails_is_shown_and_the_others_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    failing, other = CONFIG, replace(CONFIG, optimizer="adam-0.01")
    collection_in(tmp_path).checkpoint(failing).mkdir(parents=True)
    assert parallel.execute([failing, other], collection_in(tmp_path)) == 1
    shown = capsys.readouterr().out
    assert "mlp-digits-subset100 sgd-m-0.1 seed 0: failed: " in shown
    assert "cannot write" in shown
    assert "mlp-digits-subset100 adam-0.01 seed 0: finished at epoch 3" in shown
    assert collection_in(tmp_path).missing([failing, other]) == [failing]
