import json
import math
from functools import partial

import pytest
from rich.console import Console
from synthetic import results_in
from torch.nn import functional

from quadstep_bench import cost
from quadstep_bench.optimizers import BASES
from quadstep_bench.paper.claims import CLAIMS, gather_evidence


@pytest.fixture
def console(tmp_path):
    with (tmp_path / "output").open("w") as file:
        yield Console(file=file, width=200)


@pytest.mark.parametrize("name", cost.WORKLOADS)
def test_each_model_can_be_trained_on_its_batches(name):
    model, batches = cost.WORKLOADS[name]()
    assert len(batches) == cost.BLOCK
    assert {len(tensor) for batch in batches for tensor in batch} == {cost.BATCH}
    inputs, labels = batches[0]
    functional.cross_entropy(model(inputs[:2]), labels[:2]).backward()
    assert all(param.grad.isfinite().all() for param in model.parameters())


def test_cost(tmp_path, console, monkeypatch):
    monkeypatch.setitem(cost.WORKLOADS, "digits", partial(cost.images, "mlp-digits"))
    names = ["logistic", "digits"]
    path = cost.measure(results_in(tmp_path), console, names=names, rounds=2)
    measured = json.loads(path.read_text())
    here = results_in(tmp_path).environments()[measured["environment"]]
    assert here["machine"]["device"] == "cpu"
    rows = measured["rows"]
    assert [(row["model"], row["optimizer"], row["base"]) for row in rows] == [
        (name, *pair) for name in names for pair in cost.PAIRS
    ]
    for row in rows:
        assert 0.0 < row["low"] <= row["ratio"] <= row["high"] < math.inf
        assert 0.0 < row["step_ms"] < math.inf
        assert row["rounds"] == 2
    floors = {(row["model"], row["optimizer"], row["base"]): row["floor"] for row in rows}
    for name in names:
        auto = floors[name, "lqa-auto", "sgd"]
        assert auto > 1.0
        for optimizer, probes in (("lqa", 1.0), ("lqa-sgd", 11.0), ("lqa-paper", 20.0)):
            assert floors[name, optimizer, "sgd"] - 1.0 == pytest.approx(probes * (auto - 1.0))
    (cheap,) = [claim for claim in CLAIMS if claim.id == "m1"]
    evidence = gather_evidence(results_in(tmp_path))
    assert {cheap.decide(evidence, configuration).n for configuration in BASES} == {2}


def test_memory(tmp_path, console):
    path = cost.measure(results_in(tmp_path), console, names=["logistic"], rounds=1)
    memory = json.loads(path.read_text())["memory"]
    assert {(row["model"], row["optimizer"], row["step"]) for row in memory} == {
        ("logistic", "adamw", "plain"),
        *(
            ("logistic", name, step)
            for name in ("lqa-auto", "lqa")
            for step in ("reusing", "measuring")
        ),
    }
    for row in memory:
        # The running mean squares are two numbers for each tensor.
        assert row["state"] == pytest.approx(1.0 if row["optimizer"] == "lqa" else 2.0, abs=0.01)
        assert 0.0 < row["transient"] < math.inf
    (plain,) = [row for row in memory if row["step"] == "plain"]
    assert plain["transient"] == pytest.approx(1.0, abs=0.01)


def test_a_table_shows_what_was_measured(tmp_path, console):
    path = cost.measure(results_in(tmp_path), console, names=["logistic"], rounds=1)
    console.file.flush()
    output = (tmp_path / "output").read_text()
    for row in json.loads(path.read_text())["rows"]:
        assert f"{row['ratio']:.3g}" in output


def test_all_turns_end_where_the_first_ended():
    model, batches = cost.WORKLOADS["logistic"]()
    for name in cost.BUILDERS:
        subject = cost.Subject(name, model, batches)
        ends = []
        for _ in range(2):
            subject.turn()
            ends.append([param.tolist() for param in subject.model.parameters()])
        assert ends[0] == ends[1]


def test_the_time_limit_ends_the_rounds(tmp_path, console, monkeypatch):
    monkeypatch.setattr(cost, "TIME_LIMIT", 0.0)
    path = cost.measure(results_in(tmp_path), console, names=["logistic"], rounds=9)
    assert {row["rounds"] for row in json.loads(path.read_text())["rows"]} == {cost.MIN_ROUNDS}


def test_an_unknown_model_is_refused_before_anything_is_measured(tmp_path, console):
    with pytest.raises(ValueError, match="unknown model 'mpl': choose from logistic, mlp, lenet"):
        cost.measure(results_in(tmp_path), console, names=["resnet18", "mpl"], rounds=1)


def test_an_optimizer_that_does_not_settle_down_is_refused(tmp_path, console, monkeypatch):
    monkeypatch.setattr(cost, "WARM_UP_BLOCKS", 2)
    monkeypatch.setitem(cost.PROBES, "lqa-paper", 0.2)
    with pytest.raises(ValueError, match="lqa-paper did not settle within 20 steps"):
        cost.measure(results_in(tmp_path), console, names=["logistic"], rounds=1)


def test_restore(tmp_path, console, monkeypatch):
    monkeypatch.setattr(cost, "TRIPS", (1, 10))
    path = cost.measure_restore(results_in(tmp_path), console, rounds=1)
    measured = json.loads(path.read_text())
    assert measured["environment"] in results_in(tmp_path).environments()
    rows = measured["rows"]
    assert [(row["model"], row["dtype"], row["method"]) for row in rows] == [
        (name, dtype, method)
        for name in ("mlp", "lenet")
        for dtype in ("float32", "bfloat16")
        for method in cost.METHODS
    ]
    for row in rows:
        assert 0.0 < row["ratio"] < math.inf
        assert 0.0 < row["probes_ms"] < math.inf
        if row["method"] == "snapshot":
            assert row["memory"] == 1.0
            assert row["drift_1"] == row["drift_10"] == 0.0
        elif row["method"] == "compensation":
            assert row["drift_1"] == row["drift_10"] == 0.0
        else:
            assert row["memory"] == 0.0
            assert row["ratio"] == 1.0
            assert row["drift_10"] > 0.0
