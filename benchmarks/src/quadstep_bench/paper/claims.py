"""Claims: what section 4 of the paper says, and the verdicts on it.

A claim is a row of `CLAIMS`: what the paper says and the rule that decides it. The rules were fixed
before the runs.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from quadstep_bench.curves import FIGURES, describe, title
from quadstep_bench.markdown import format_table
from quadstep_bench.optimizers import FAMILIES, PAPER_CONFIGURATIONS
from quadstep_bench.paper.rules import (
    EVERY,
    LAST_QUARTER,
    SHARE,
    SIMILAR,
    UNSTABLE,
    Check,
    Evidence,
    NotRunError,
    Rule,
    after,
    against,
    at,
    below,
    best_rates,
    calmer_late,
    costs,
    falling_rates,
    first,
    lower,
    nearly_greatest,
    only,
    share,
    similar,
    smooth_late,
    takes,
    unconverged,
    unstable,
    within,
)
from quadstep_bench.runner.files import read_json, read_rows, write_json, write_text
from quadstep_bench.runner.records import Results
from quadstep_bench.tasks import TASKS

Verdict = Literal["holds", "fails", "not run"]


@dataclass(frozen=True)
class Result:
    """The outcome of a claim for one configuration."""

    verdict: Verdict
    checks: Sequence[Check] = ()
    n: int = 0


@dataclass(frozen=True)
class Claim:
    """A claim of the paper.

    Attributes:
        id: The number of its figure and a letter; `m` and a number for those on the method.
        paper: Where the paper makes it.
        text: What the paper says.
        rule: What decides it.
    """

    id: str
    paper: str
    text: str
    rule: Rule

    def decide(self, evidence: Evidence, configuration: str) -> Result:
        """Applies the rule for one configuration."""
        try:
            measured = self.rule.measure(evidence, configuration)
        except NotRunError:
            return Result("not run")
        holds = all(check.passed for check in measured.checks)
        return Result("holds" if holds else "fails", measured.checks, measured.n)


# The claims ---------------------------------------------------------------------------------------

LOGISTIC, MLP, LENET_MNIST, LENET_CIFAR10, RESNET = (FIGURES[figure] for figure in range(1, 6))

SGD_FAMILY = ("sgd", "sgd-m", "sgd-nag")
MOMENTUM_OR_ADAPTIVE = ("sgd-m", "sgd-nag", "rmsprop", "adam")


def _lenet(figure: int, task: str) -> tuple[Claim, Claim]:
    return (
        Claim(
            f"{figure}a",
            "section 4.3",
            "LQA stays below standard SGD and AdaGrad throughout",
            against(task, ("sgd", "adagrad"), below(EVERY)),
        ),
        Claim(
            f"{figure}b",
            "section 4.3",
            "LQA is like SGD-M, SGD-NAG, RMSProp and Adam for about 20 epochs, and lower later",
            against(task, MOMENTUM_OR_ADAPTIVE, similar(first(20)), lower(LAST_QUARTER)),
        ),
    )


CLAIMS = (
    Claim(
        "1a",
        "section 4.1",
        "The best rate is 0.01 for SGD, SGD-M, SGD-NAG and AdaGrad, 0.001 for RMSProp and Adam",
        best_rates(LOGISTIC, {0.01: (*SGD_FAMILY, "adagrad"), 0.001: ("rmsprop", "adam")}),
    ),
    Claim(
        "1b",
        "section 4.1",
        "RMSProp and Adam can fail to converge at 0.1",
        unconverged(LOGISTIC, 0.1, ("rmsprop", "adam")),
    ),
    Claim(
        "1c",
        "section 4.1",
        "LQA stays below the SGD family throughout the run",
        against(LOGISTIC, SGD_FAMILY, below(EVERY)),
    ),
    Claim(
        "1d",
        "section 4.1",
        "LQA reduces the loss to 0.256 within 10 epochs",
        against(LOGISTIC, (), within(10, 0.256)),
    ),
    Claim(
        "1e",
        "section 4.1",
        "SGD at 0.1 takes 40 epochs to reach the same level",
        takes(LOGISTIC, "sgd-0.1", 40, 0.256),
    ),
    Claim(
        "1f",
        "section 4.1",
        "AdaGrad and RMSProp at 0.1 are slightly lower for about 5 epochs, LQA is lower later",
        against(LOGISTIC, ("adagrad-0.1", "rmsprop-0.1"), similar(first(5)), lower(LAST_QUARTER)),
    ),
    Claim(
        "1g",
        "section 4.1",
        "Adam at 0.001 is similar, LQA is lower early",
        against(LOGISTIC, ("adam-0.001",), similar(EVERY), lower(first(5))),
    ),
    Claim(
        "2a",
        "section 4.2",
        "The best rate is 0.1 for SGD, 0.01 for SGD-M, SGD-NAG and AdaGrad, 0.001 for RMSProp and "
        "Adam",
        best_rates(
            MLP,
            {0.1: ("sgd",), 0.01: ("sgd-m", "sgd-nag", "adagrad"), 0.001: ("rmsprop", "adam")},
        ),
    ),
    Claim("2b", "section 4.2", "LQA is below standard SGD", against(MLP, ("sgd",), below(EVERY))),
    Claim(
        "2c",
        "section 4.2",
        "LQA is comparable to the best SGD-M, SGD-NAG, RMSProp and Adam for 5 epochs, lower later",
        against(MLP, MOMENTUM_OR_ADAPTIVE, similar(first(5)), lower(LAST_QUARTER)),
    ),
    Claim(
        "2d",
        "section 4.2",
        "At epoch 20 the loss of Adam is 0.011, that of LQA 0.002",
        against(MLP, ("adam",), at(20, 0.002), lower(only(20))),
    ),
    Claim(
        "2e",
        "section 4.2",
        "AdaGrad at 0.01 is faster early, LQA slightly better after epoch 12",
        against(MLP, ("adagrad-0.01",), below(after(12))),
    ),
    *_lenet(3, LENET_MNIST),
    *_lenet(4, LENET_CIFAR10),
    Claim(
        "4c",
        "section 4.3",
        "SGD at 0.1 is unstable; LQA is unstable early and smooth later",
        against(LENET_CIFAR10, ("sgd-0.1",), unstable(), smooth_late()),
    ),
    Claim(
        "5a",
        "section 4.3",
        "LQA is like the others for about 15 epochs and faster later, below RMSProp and Adam",
        against(RESNET, tuple(FAMILIES), similar(first(15, out_of=50)), lower(LAST_QUARTER)),
    ),
    Claim(
        "5b",
        "section 4.3",
        "The SGD family and AdaGrad are unstable; LQA is more stable late than early",
        against(RESNET, (*SGD_FAMILY, "adagrad"), unstable(), calmer_late()),
    ),
    Claim("m1", "section 3", "The cost of finding the rate is ignorable", costs()),
    Claim("m2", "section 1", "Rates are larger early and smaller later", falling_rates()),
    Claim(
        "m3",
        "section 1",
        "With the direction fixed the rate gives nearly the greatest reduction of the loss",
        nearly_greatest(),
    ),
)


# Verdicts -----------------------------------------------------------------------------------------

Verdicts = list[tuple[Claim, dict[str, Result]]]


def gather_evidence(results: Results) -> Evidence:
    """Reads the records of the paper's runs, and the measurements beside them, if any."""
    cost = results.root / "bench" / "cost.json"
    return Evidence(
        records=results.collection("records").read_all(),
        costs=read_json(cost)["rows"] if cost.exists() else [],
        lines=[
            {"task": row["task"], "optimizer": row["optimizer"], "ratio": share(*numbers)}
            for row in read_rows(results.root / "lines.jsonl")
            for numbers in zip(row["reduction"], row["greatest"], strict=True)
        ],
    )


def measure(evidence: Evidence) -> Verdicts:
    """Decides every claim for every configuration."""
    return [
        (claim, {name: claim.decide(evidence, name) for name in PAPER_CONFIGURATIONS})
        for claim in CLAIMS
    ]


def write(evidence: Evidence, verdicts: Verdicts, out: Path, provenance: str = "") -> list[Path]:
    """Writes the verdicts as a page, `CLAIMS.md`, and as `claims.json`.

    Args:
        evidence: What they rest on.
        verdicts: What `measure` found.
        out: The folder.
        provenance: A section that the page ends with.
    """
    page, data = out / "CLAIMS.md", out / "claims.json"
    write_json([_row(*verdict) for verdict in verdicts], data)
    write_text(_page(evidence, verdicts) + provenance, page)
    return [page, data]


def _row(claim: Claim, results: Mapping[str, Result]) -> dict[str, Any]:
    return {
        "id": claim.id,
        "paper": claim.paper,
        "text": claim.text,
        "rule": claim.rule.words,
        "competitors_only": claim.rule.competitors,
    } | {
        name: {
            "value": {check.name: dict(check.values) for check in result.checks},
            "n": result.n,
            "verdict": result.verdict,
        }
        for name, result in results.items()
    }


def _page(evidence: Evidence, verdicts: Verdicts) -> str:
    lines = [
        "# The paper's claims, measured",
        "",
        "Written by `quadstep-bench report` from the records in this folder. Each claim of "
        "section 4 of Zhu et al. (2020) is decided by a rule that was fixed before the runs, once "
        "for each configuration of LQA; claims on the competitors alone are decided once.",
        "",
        *format_table(["configuration", "holds", "fails", "not run"], _totals(verdicts)),
    ]
    for section, heading in _SECTIONS.items():
        rows = [verdict for verdict in verdicts if verdict[0].id.startswith(section)]
        lines += ["", f"## {heading}", ""]
        if section.isdigit():
            task = FIGURES[int(section)]
            curves = evidence.curves(task)
            recorded = f"Recorded: {describe(curves)}" if curves else "Nothing is recorded yet"
            lines += [f"{recorded}. The paper: {TASKS[task].epochs} epochs.", ""]
        lines += format_table(
            ["claim", "the paper", "competitors", *PAPER_CONFIGURATIONS],
            [[claim.id, claim.text, *_cells(claim, results)] for claim, results in rows],
        )
        lines += ["", "Rules:", ""]
        lines += [f"- {claim.id}: {claim.rule.words}" for claim, _ in rows]
    return "\n".join([*lines, "", _READING, _DIFFERENCES])


def _totals(verdicts: Verdicts) -> list[list[str]]:
    def row(name: str, results: Iterable[Result]) -> list[str]:
        counts = Counter(result.verdict for result in results)
        return [name, *(str(counts[verdict]) for verdict in get_args(Verdict))]

    ours = [results for claim, results in verdicts if not claim.rule.competitors]
    alone = [results for claim, results in verdicts if claim.rule.competitors]
    return [
        *(row(name, (results[name] for results in ours)) for name in PAPER_CONFIGURATIONS),
        row("competitors", (results[PAPER_CONFIGURATIONS[0]] for results in alone)),
    ]


def _cells(claim: Claim, results: Mapping[str, Result]) -> list[str]:
    def cell(result: Result) -> str:
        if result.verdict == "not run":
            return "not run"
        return f"**{result.verdict}**, n = {result.n}: {', '.join(map(str, result.checks))}"

    if claim.rule.competitors:
        return [cell(results[PAPER_CONFIGURATIONS[0]]), *[""] * len(PAPER_CONFIGURATIONS)]
    return ["", *(cell(results[name]) for name in PAPER_CONFIGURATIONS)]


_SECTIONS = {
    **{str(figure): f"Figure {figure}: {title(task)}" for figure, task in FIGURES.items()},
    "m": "The method",
}

_READING = f"""
## How to read the verdicts

- n is the smallest number of seeds among the runs compared; losses are medians over the seeds.
- A family of competitors enters at its best rate: the one whose mean training loss over the last
  quarter of the epochs is the lowest. Runs of different lengths are compared over the epochs that
  all of them have. Where several competitors or models are compared, all must pass; the number
  shown is that of the one that passes by least, or fails by most.
- *share*: how many of the epochs find LQA lower; at least {SHARE:.0%} counts as throughout.
- *similar*: LQA's loss over the other's; at most {SIMILAR} counts as similar, lower is no fault.
- *lower*: the ratio of the mean losses; below 1 counts as lower.
- *rise*: how much the loss rises from an epoch to the next on average, epochs at which it falls
  counting as 0; {UNSTABLE} separates unstable runs from smooth ones.
- *reduction*: the median over the steps of the share of the greatest reduction along the line; the
  quantiles beside it are those of the same model.
- ∞: the run has diverged, or the level was never reached. A diverged run counts as an infinite
  loss from the epoch at which it was given up.
- What the paper grants to others, or says of its unsteady start, is no condition: LQA may do
  better than that.
"""

_DIFFERENCES = """
## What differs from the paper

The paper says that all parameters start at zero. That holds here for logistic regression alone: a
multilayer perceptron or a convolutional network whose weights are all zero gives every hidden unit
the same zero gradient and never trains, so these start from torch's default initialisation. The
paper's "iteration" is an epoch here. The training loss is measured over the full training set
after each epoch, in evaluation mode, and for `lqa-auto` at the averaged weights. Hyperparameters
that the paper leaves open are torch's defaults. Figure 5 may rest on a part of the training set,
fewer epochs and a coarser precision, as its section says, and there on one rate a family, which is
the paper's best for the perceptron of figure 2. Algorithm 1 as printed has no safeguard of any
kind, and `lqa-paper` has none either; `lqa` and `lqa-auto` add what the paper leaves out.
`lqa-authors` has the rules of the code that the authors published, which the paper does not print:
a probe distance that falls with the epochs, and rates that the epoch determines in place of a
vertex that is not between 0 and 1.
"""
