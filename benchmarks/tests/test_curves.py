import math
from dataclasses import replace

import numpy as np
import pytest
from synthetic import record

from quadstep_bench import curves
from quadstep_bench.curves import Curve

TASK = "mlp-mnist"


def test_the_median_is_taken_over_the_seeds_and_ends_with_the_shortest_run():
    runs = (
        record(TASK, "lqa", [2.0, 1.0, 0.5, 0.2]),
        record(TASK, "lqa", [2.0, 1.2, 0.7, 0.4], seed=1),
        record(TASK, "lqa", [2.0, 1.1], seed=2, epochs=3, status=None),
    )
    median = Curve("lqa", runs).median
    np.testing.assert_allclose(median[:2], [2.0, 1.1])
    assert np.isnan(median[2:]).all()


def test_a_diverged_run_counts_as_an_infinite_loss_up_to_the_last_epoch():
    runs = (
        record(TASK, "lqa", [2.0, 1.0, 0.5, 0.2]),
        record(TASK, "lqa", [2.0, 9.0, math.nan], seed=1, epochs=3, status="diverged"),
        record(TASK, "lqa", [2.0, 1.5, 0.8, 0.5], seed=2),
    )
    curve = Curve("lqa", runs)
    np.testing.assert_array_equal(curve.losses[1], [2.0, 9.0, math.inf, math.inf])
    np.testing.assert_array_equal(curve.median, [2.0, 1.5, 0.8, 0.5])


def test_the_tail_is_the_mean_over_the_last_quarter_of_the_epochs():
    assert Curve("lqa", (record(TASK, "lqa", [9, 8, 7, 6, 5, 4, 3, 2, 1]),)).tail() == 1.5
    assert Curve("lqa", (record(TASK, "lqa", [9, 8, 7]),)).tail() == 7
    assert Curve("lqa", (record(TASK, "lqa", [9], epochs=3, status=None),)).tail() == math.inf


def test_the_best_of_runs_of_different_lengths_is_that_over_the_epochs_all_have():
    short = Curve("sgd-0.1", (record(TASK, "sgd-0.1", [9, 4, 4]),))
    long = Curve("sgd-0.01", (record(TASK, "sgd-0.01", [9, 5, 3, 7, 8]),))
    unstarted = Curve("sgd-0.001", (record(TASK, "sgd-0.001", [9], epochs=3, status=None),))
    assert (short.length, long.length, unstarted.length) == (2, 4, 0)
    assert curves.best([short, long, unstarted]) is long


def test_rates_are_medians_over_the_seeds_that_have_one():
    runs = (
        record(TASK, "lqa", [2.0, 1.0, 0.5], rates=[0.4, 0.1]),
        record(TASK, "lqa", [2.0, 1.0, 0.5], seed=1, rates=[0.2, math.nan]),
    )
    curve = Curve("lqa", runs)
    np.testing.assert_allclose(curve.rates("median"), [0.3, 0.1])
    np.testing.assert_allclose(curve.rates("q90"), [0.6, 0.2])


@pytest.mark.parametrize(
    ("subsets", "chosen"),
    [
        ((None, 1000, 1000), 1000),
        ((None, 1000), None),
        ((500, 1000), 1000),
    ],
)
def test_of_several_training_sets_the_one_with_most_runs_is_taken(subsets, chosen):
    records = [
        record(TASK, "lqa", [2.0, 1.0], seed=seed, subset=subset)
        for seed, subset in enumerate(subsets)
    ]
    gathered = curves.gather(records, TASK)
    assert {run.config.subset for run in gathered["lqa"].runs} == {chosen}


def test_runs_in_other_precisions_are_kept_apart():
    plain = [record(TASK, "lqa", [2.0, 1.0], seed=seed) for seed in (0, 1)]
    reduced = replace(plain[0], config=replace(plain[0].config, precision="bfloat16"))
    assert curves.gather([reduced, *plain], TASK)["lqa"].runs == tuple(plain)


def test_runs_without_an_epoch_and_of_other_tasks_are_left_out():
    records = [
        record(TASK, "lqa", [], epochs=3, status=None),
        record("lenet-mnist", "lqa", [2.0, 1.0]),
    ]
    assert curves.gather(records, TASK) == {}


def test_words_of_runs_of_different_lengths_and_numbers():
    runs = [record(TASK, "lqa", [2.0, 1.0]), record(TASK, "lqa", [2.0, 1.0, 0.5], seed=1)]
    gathered = curves.gather([*runs, record(TASK, "sgd-0.1", [2.0, 1.0])], TASK)
    assert curves.describe(gathered) == "the full training set, 1 to 2 epochs, 1 to 2 seeds"


def test_words():
    gathered = curves.gather([record(TASK, "lqa", [2.0, 1.0], subset=5000)], TASK)
    assert curves.describe(gathered) == "5,000 of the training images, 1 epoch, 1 seed"
    reduced = record(TASK, "lqa", [2.0, 1.0])
    reduced = replace(reduced, config=replace(reduced.config, precision="bfloat16"))
    assert curves.describe(curves.gather([reduced], TASK)).startswith(
        "the full training set in bfloat16, 1 epoch"
    )
    assert curves.title(TASK) == "Multilayer perceptron on MNIST"
    names = ("sgd-nag-0.01", "sgd-m", "adamw-0.001", "adamw-cosine-0.001", "lqa-auto")
    assert [curves.display(name) for name in names] == [
        "SGD-NAG 0.01",
        "SGD-M",
        "AdamW 0.001",
        "AdamW, cosine 0.001",
        "lqa-auto",
    ]
