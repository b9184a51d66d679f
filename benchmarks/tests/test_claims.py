import json
import math

import pytest
from synthetic import grid, record, results_in

from quadstep_bench.optimizers import CONFIGURATIONS
from quadstep_bench.paper import claims
from quadstep_bench.paper.rules import Evidence
from quadstep_bench.runner.files import write_json, write_rows, write_text


def verdict(claim: str, records, configuration="lqa", **measurements) -> str:
    return decide(claim, records, configuration, **measurements).verdict


def decide(claim: str, records, configuration="lqa", **measurements):
    (row,) = [row for row in claims.CLAIMS if row.id == claim]
    return row.decide(Evidence(list(records), **measurements), configuration)


def figure(number: int, ours, others=lambda optimizer, epoch: 1.0, *, epochs=20, **options):
    """A figure's grid with one loss for LQA by epoch, and one for the others by name and epoch."""

    def shape(optimizer: str, epoch: int) -> float:
        if optimizer.startswith("lqa"):
            return ours(epoch)
        return others(optimizer, epoch)

    return grid(number, shape, epochs=epochs, **options)


def levels(**best: str):
    """Losses that are 1 at the rates given for each family and 2 at the others."""

    def loss(optimizer: str, epoch: int) -> float:
        family, rate = optimizer.rsplit("-", 1)
        return 1.0 if best[family.replace("-", "_")] == rate else 2.0

    return loss


PAPER_1A = {
    "sgd": "0.01",
    "sgd_m": "0.01",
    "sgd_nag": "0.01",
    "adagrad": "0.01",
    "rmsprop": "0.001",
    "adam": "0.001",
}


def test_nothing_recorded_is_not_run():
    for _, results in claims.measure(Evidence([])):
        assert {result.verdict for result in results.values()} == {"not run"}


@pytest.mark.parametrize(
    ("claim", "number", "best"),
    [("1a", 1, PAPER_1A), ("2a", 2, PAPER_1A | {"sgd": "0.1"})],
)
def test_best_rates(claim, number, best):
    assert verdict(claim, figure(number, lambda epoch: 1.0, levels(**best))) == "holds"
    other = best | {"adam": "0.01"}
    result = decide(claim, figure(number, lambda epoch: 1.0, levels(**other)), "lqa-paper")
    assert result.verdict == "fails"
    assert [str(check) for check in result.checks if not check.passed] == ["Adam 0.01"]


def test_failure_to_converge():
    def losses(adam, rmsprop):
        at = {"adam-0.1": adam, "rmsprop-0.1": rmsprop}
        return figure(1, lambda epoch: 1.0, lambda name, epoch: at.get(name, 1.0 / (epoch + 1)))

    assert verdict("1b", losses(math.inf, 0.5)) == "holds"
    assert verdict("1b", losses(math.inf, 0.06)) == "fails"


@pytest.mark.parametrize(("above", "expected"), [(0, "holds"), (1, "holds"), (2, "fails")])
@pytest.mark.parametrize(("claim", "number"), [("1c", 1), ("2b", 2), ("3a", 3), ("4a", 4)])
def test_below_throughout(claim, number, above, expected):
    records = figure(number, lambda epoch: 1.5 if 1 <= epoch <= above else 0.5)
    assert verdict(claim, records) == expected


def test_an_equal_loss_is_not_below():
    assert verdict("1c", figure(1, lambda epoch: 1.0)) == "fails"


def test_families_enter_at_their_best_rate():
    def others(optimizer, epoch):
        return {"sgd-m-0.001": 0.3}.get(optimizer, 1.0)

    result = decide("1c", figure(1, lambda epoch: 0.5, others))
    assert result.verdict == "fails"
    assert str(result.checks[0]) == "share 0 (SGD-M 0.001)"


@pytest.mark.parametrize(
    ("reached", "epochs", "expected"),
    [(10, 50, "holds"), (11, 50, "fails"), (3, 5, "holds"), (9, 5, "not run"), (99, 50, "fails")],
)
def test_a_level_within_some_epochs(reached, epochs, expected):
    records = figure(1, lambda epoch: 0.256 if epoch >= reached else 0.3, epochs=epochs)
    assert verdict("1d", records) == expected


@pytest.mark.parametrize(
    ("reached", "epochs", "expected"),
    [
        (40, 50, "holds"),
        (32, 50, "holds"),
        (31, 50, "fails"),
        (49, 50, "fails"),
        (99, 50, "fails"),
        (99, 40, "not run"),
    ],
)
def test_the_epochs_that_a_competitor_takes(reached, epochs, expected):
    def others(optimizer, epoch):
        return 0.256 if epoch >= reached else 0.3

    assert verdict("1e", figure(1, lambda epoch: 1.0, others, epochs=epochs)) == expected


@pytest.mark.parametrize(
    ("claim", "number", "until"), [("1f", 1, 5), ("2c", 2, 5), ("3b", 3, 20), ("4b", 4, 20)]
)
def test_similar_early_and_lower_late(claim, number, until):
    def losses(early, late):
        return figure(number, lambda epoch: early if epoch <= until else late, epochs=2 * until)

    assert verdict(claim, losses(1.19, 0.99)) == "holds"
    assert verdict(claim, losses(0.5, 0.99)) == "holds"
    assert verdict(claim, losses(1.21, 0.99)) == "fails"
    assert verdict(claim, losses(1.19, 1.0)) == "fails"
    assert verdict(claim, figure(number, lambda epoch: 0.9, epochs=until - 1)) == "not run"


def test_similar_and_lower_early():
    assert verdict("1g", figure(1, lambda epoch: 0.9 if epoch <= 5 else 1.1)) == "holds"
    assert verdict("1g", figure(1, lambda epoch: 0.9 if epoch <= 5 else 1.3)) == "fails"
    assert verdict("1g", figure(1, lambda epoch: 1.0 if epoch <= 5 else 0.9)) == "fails"


def test_a_loss_at_an_epoch():
    def losses(ours, adam=0.011):
        return figure(2, lambda epoch: ours if epoch == 20 else 9.0, lambda *_: adam, epochs=25)

    assert verdict("2d", losses(0.0024)) == "holds"
    assert verdict("2d", losses(0.0025)) == "fails"
    assert verdict("2d", losses(0.0024, adam=0.002)) == "fails"
    assert verdict("2d", figure(2, lambda epoch: 0.001, epochs=19)) == "not run"


def test_below_after_an_epoch():
    assert verdict("2e", figure(2, lambda epoch: 2.0 if epoch <= 12 else 0.9)) == "holds"
    assert verdict("2e", figure(2, lambda epoch: 2.0 if epoch <= 13 else 0.9)) == "fails"
    assert verdict("2e", figure(2, lambda epoch: 0.9, epochs=12)) == "not run"


def test_instability_of_sgd_and_of_lqa():
    def bumpy(size, start=0):
        return lambda epoch: 1.0 + size * (epoch % 2) * (epoch >= start)

    def losses(ours, size):
        return figure(4, ours, lambda optimizer, epoch: bumpy(size)(epoch))

    assert verdict("4c", losses(lambda epoch: bumpy(0.1)(min(epoch, 10)), 0.1)) == "holds"
    assert verdict("4c", losses(bumpy(0.1), 0.1)) == "fails"
    assert verdict("4c", losses(bumpy(0.0), 0.01)) == "fails"
    assert verdict("4c", losses(lambda epoch: math.inf if epoch > 12 else 1.0, 0.1)) == "fails"
    smooth = figure(5, lambda epoch: bumpy(0.1)(min(epoch, 10)), lambda _, epoch: bumpy(0.1)(epoch))
    assert verdict("5b", smooth) == "holds"
    wild = figure(5, bumpy(0.1, start=10), lambda _, epoch: bumpy(0.1)(epoch))
    assert verdict("5b", wild) == "fails"


def test_a_reduced_figure_is_judged_in_proportion():
    def losses(until):
        return figure(5, lambda epoch: 1.3 if epoch > until else 1.1, epochs=15, subset=5000)

    early = decide("5a", losses(5))
    assert early.checks[0].name == "similar"
    assert early.checks[0].passed
    assert not decide("5a", losses(2)).checks[0].passed


def test_a_diverged_run_fails_every_comparison():
    records = list(figure(1, lambda epoch: 0.1 if epoch < 15 else math.inf))
    assert {verdict(claim, records) for claim in ("1c", "1f", "1g")} == {"fails"}
    rival = figure(1, lambda epoch: 0.9, lambda name, epoch: 1.0 if epoch < 5 else math.inf)
    assert verdict("1c", rival) == "holds"


def test_runs_that_have_not_ended_do_not_count():
    records = [*figure(1, lambda epoch: 0.5)]
    lqa = next(run for run in records if run.config.optimizer == "lqa")
    records.remove(lqa)
    assert verdict("1c", records) == "not run"
    halfway = record(
        lqa.config.task, "lqa", [epoch.train_loss for epoch in lqa.epochs], status=None
    )
    assert verdict("1c", [*records, halfway]) == "not run"
    assert verdict("1c", [*records, lqa]) == "holds"


def test_a_family_needs_all_its_rates():
    records = [run for run in figure(1, lambda epoch: 0.5) if run.config.optimizer != "sgd-0.001"]
    assert verdict("1c", records) == "not run"


def test_a_part_of_the_training_set_needs_one_rate_of_a_family():
    def losses(**options):
        runs = figure(
            5, lambda epoch: 1.3, lambda name, _: 1.0 if "0.001" in name else 2.0, **options
        )
        return [run for run in runs if "0.001" not in run.config.optimizer]

    assert verdict("5a", losses()) == "not run"
    assert verdict("5a", losses(subset=1000)) == "holds"
    without = [run for run in losses(subset=1000) if "adagrad" not in run.config.optimizer]
    assert verdict("5a", without) == "not run"


def test_seeds_are_counted_where_they_are_fewest():
    records = list(figure(1, lambda epoch: 0.5, seeds=3))
    assert decide("1c", records).n == 3
    fewer = [run for run in records if run.config.optimizer != "sgd-0.1" or run.config.seed == 0]
    assert decide("1c", fewer).n == 1


@pytest.mark.parametrize(
    ("ratios", "expected"), [([1.04, 1.1], "holds"), ([1.04, 1.11], "fails"), ([], "not run")]
)
def test_cost(ratios, expected):
    costs = [
        {"model": f"model {number}", "optimizer": "lqa", "base": "sgd", "ratio": ratio}
        for number, ratio in enumerate(ratios)
    ]
    costs.append({"model": "model 0", "optimizer": "lqa", "base": "adamw", "ratio": 9.0})
    assert verdict("m1", [], costs=costs) == expected
    assert verdict("m1", [], "lqa-auto", costs=costs) == "not run"


def test_falling_rates():
    def run(task, rates, **options):
        return record(task, "lqa", [1.0] * (len(rates) + 1), rates=rates, **options)

    falling = run("mlp-mnist", [0.2, *[0.15] * 18, 0.1])
    assert verdict("m2", [falling]) == "holds"
    assert verdict("m2", [falling, run("lenet-mnist", [0.1] * 20)]) == "fails"
    lost = record("lenet-mnist", "lqa", [1.0, math.nan], epochs=9, rates=[0.1], status="diverged")
    assert verdict("m2", [falling, lost]) == "fails"


def test_reduction_along_the_line():
    def lines(*ratios, task="mlp-mnist"):
        return [{"kind": "line", "task": task, "optimizer": "lqa", "ratio": r} for r in ratios]

    assert verdict("m3", [], lines=lines(0.2, 0.9, 0.95)) == "holds"
    assert verdict("m3", [], lines=lines(0.2, 0.89, 0.95)) == "fails"
    assert verdict("m3", [], lines=lines(0.9) + lines(0.8, task="lenet-mnist")) == "fails"
    assert decide("m3", [], lines=lines(0.9, 0.9) + lines(0.9, task="lenet-mnist")).n == 1
    assert verdict("m3", [], lines=lines(None)) == "not run"
    result = decide("m3", [], lines=lines(1.0, None) + lines(0.5, 0.7, 0.9, task="lenet-mnist"))
    assert result.n == 1
    assert [str(check) for check in result.checks] == [
        "reduction 0.7 (lenet-mnist)",
        "10% quantile 0.54 (lenet-mnist)",
        "90% quantile 0.86 (lenet-mnist)",
    ]


def test_pages(tmp_path):
    results = results_in(tmp_path)
    costs = [{"model": "mlp", "optimizer": "lqa-auto", "base": "adamw", "ratio": 1.08}]
    write_json({"rows": costs}, results.root / "bench" / "cost.json")
    lines = {"task": "mlp-mnist", "optimizer": "lqa", "reduction": [0.97], "greatest": [1.0]}
    write_rows([lines], results.root / "lines.jsonl")
    for run in figure(1, lambda epoch: 0.1 if epoch < 15 else math.inf, epochs=50, seeds=2):
        results.collection("records").add(run)
    evidence = claims.gather_evidence(results)
    page, data = claims.write(evidence, claims.measure(evidence), tmp_path)
    rows = json.loads(data.read_text(), parse_constant=lambda name: pytest.fail(name))
    assert [row["id"] for row in rows] == [claim.id for claim in claims.CLAIMS]
    for row in rows:
        assert {"paper", "text", "rule"} < row.keys()
        for name in CONFIGURATIONS:
            assert row[name].keys() == {"value", "n", "verdict"}
            assert row[name]["verdict"] in ("holds", "fails", "not run")
            assert (row[name]["verdict"] == "not run") == (row[name]["value"] == {})
    by_id = {row["id"]: row for row in rows}
    assert by_id["m1"]["lqa-auto"] == {
        "value": {"time ratio": {"mlp": 1.08}},
        "n": 1,
        "verdict": "holds",
    }
    assert by_id["m3"]["lqa"]["verdict"] == "holds"
    assert by_id["1f"]["lqa"]["value"]["lower"]["adagrad-0.1"] is None
    text = page.read_text()
    assert "Recorded: the full training set, 50 epochs, 2 seeds." in text
    assert text.count("Nothing is recorded yet.") == 4
    for claim in claims.CLAIMS:
        assert f"- {claim.id}: {claim.rule.words}" in text


def test_a_damaged_measurement_is_named(tmp_path):
    results = results_in(tmp_path)
    write_text("{", results.root / "bench" / "cost.json")
    with pytest.raises(ValueError, match=r"cost\.json.*Restore the file"):
        claims.gather_evidence(results)
    write_text("{", results.root / "lines.jsonl")
    (results.root / "bench" / "cost.json").unlink()
    with pytest.raises(ValueError, match=r"lines\.jsonl, line 1: .*Restore the file"):
        claims.gather_evidence(results)


def test_rules_are_sentences():
    for claim in claims.CLAIMS:
        assert claim.rule.words[0].isupper()
        assert claim.rule.words.endswith(".")
        assert claim.rule.words.count(". ") == 0
