"""Reports: every figure, table and verdict, written from the records in `results/` alone."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from quadstep_bench import figures, suite
from quadstep_bench.curves import FIGURES, gather
from quadstep_bench.markdown import format_table
from quadstep_bench.optimizers import BASES, COMPETITORS, LQA_SETTINGS
from quadstep_bench.paper import claims
from quadstep_bench.runner.environment import SOURCES, Environment
from quadstep_bench.runner.files import number, read_json, read_rows, write_text
from quadstep_bench.runner.records import Record, Results

PROVENANCE = "\n## Provenance\n"
"""The heading of the section that says what the numbers of a report were measured with."""

OTHERS = "runs of other optimizers"

PLATEAU = 0.4
"""The small BERT begins on a plateau above this loss: that of guessing, 0.68."""

KINDS = ("runs of LQA", "line searches", "cost measurements", OTHERS)

Uses = Iterable[tuple[str, Iterable[Environment]]]
"""Measurements: of which of `KINDS`, and all environments of each."""


@dataclass(frozen=True)
class Report:
    """All that is decided from the records, and the files it was written to."""

    verdicts: claims.Verdicts
    outcomes: list[suite.Outcome]
    files: list[Path]


def write(results: Results, out: Path) -> Report:
    """Writes every figure, table and verdict.

    Args:
        results: Where the records are.
        out: The folder for the pages, and for `figures`.

    Raises:
        RecordError: A record cannot be read.
        OSError: A file cannot be written.
    """
    evidence = claims.gather_evidence(results)
    verdicts = claims.measure(evidence)
    runs = results.collection("suite").read_all()
    outcomes = suite.judge(runs)
    of_paper = [*_trained(evidence.records), *_measured(results)]
    files = [
        *claims.write(evidence, verdicts, out, provenance(of_paper)),
        *suite.write(outcomes, out, provenance(_trained(runs))),
        *figures.draw(evidence.records, out / "figures"),
        *_write_trainer(results, out),
        *_write_memory(results, out),
        *_write_selftuning(results, out),
    ]
    if outcomes:
        files += figures.draw_suite(outcomes, out / "figures")
    files += figures.draw_constant_rates(outcomes, out / "figures")
    return Report(verdicts, outcomes, files)


def check(results: Results) -> list[Path]:
    """Lists the files in the folder of results that differ from what the records give.

    Pictures are compared by their pixels. What a report says of the present sources is left out,
    since each change to the library would make it differ. A record that no report shows, as one of
    three whose median stays, is not found out.
    """
    with TemporaryDirectory() as folder:
        out = Path(folder)
        fresh = write(results, out).files
        return [
            present
            for path in fresh
            if not _same(path, present := results.root / path.relative_to(out))
        ]


def _same(fresh: Path, present: Path) -> bool:
    if not present.exists():
        return False
    if fresh.suffix == ".png":
        from matplotlib.image import imread

        return np.array_equal(imread(fresh), imread(present))
    return len({_without_present(path.read_text()) for path in (fresh, present)}) == 1


def _without_present(text: str) -> str:
    """A report without what it says of the present sources, its table of sources in any order."""
    body, _, provenance = text.partition(PROVENANCE)
    rows = [line.replace(" (present)", "") for line in provenance.splitlines() if line[:1] == "|"]
    return "\n".join([body, *sorted(rows)])


def _write_memory(results: Results, out: Path) -> list[Path]:
    """Writes the tables of `quadstep-bench memory`, if it was run."""
    record, page = results.root / "bench" / "memory.json", out / "MEMORY.md"
    if not record.exists():
        return []
    measured = read_json(record)
    peaks = {(row["setting"], row["sequences"]): row for row in measured["peaks"]}
    settings, sizes = map(dict.fromkeys, zip(*peaks, strict=True))
    shown = [
        [f"`{name}`", *(f"{peaks[name, size]['peak']:.2f}" for size in sizes)] for name in settings
    ]
    losses: defaultdict[str, defaultdict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in measured["losses"]:
        state = f", state_dtype {row['state_dtype']}" if row["state_dtype"] else ""
        losses[row["task"]][row["parameters"] + state].append(row["loss"])
    dtypes = list(dict.fromkeys(key for task in losses.values() for key in task))
    medians = [
        [task, *(f"{np.median(of_task[dtype]):.2g}" for dtype in dtypes)]
        for task, of_task in losses.items()
    ]
    seeds = len({row["seed"] for row in measured["losses"]})
    environment = results.environments()[measured["environment"]]
    lines = [
        "# Memory",
        "",
        "Written by `quadstep-bench report` from `bench/memory.json`. The peak of a training step "
        f"of a transformer with {measured['parameters'] / 1e6:.1f} million parameters, everything "
        "included, in copies of the parameters:",
        "",
        *format_table(["setting", *(f"sequences: {size}" for size in sizes)], shown),
        "",
        f"Final training losses, medians of {seeds} seeds, by the type of the parameters:",
        "",
        *format_table(["task", *dtypes], medians),
        "",
    ]
    write_text("\n".join(lines) + provenance([("cost measurements", [environment])]), page)
    return [page]


def _write_selftuning(results: Results, out: Path) -> list[Path]:
    """Writes the report of the self-tuning benchmark, if it was run."""
    # Its tasks are built with torch, which the other reports do without.
    if not (results.root / "selftuning").exists():
        return []
    from quadstep_bench.selftuning import page, timing
    from quadstep_bench.selftuning.figures import draw as draw_selftuning
    from quadstep_bench.selftuning.runs import Records
    from quadstep_bench.selftuning.score import gather

    records, environments = Records(results).read(), results.environments()
    uses = [
        (
            "runs of LQA" if run.setting in LQA_SETTINGS else OTHERS,
            [environments[row["environment"]]],
        )
        for run, row in records.items()
    ]
    if timing.path(results).exists():
        environment = read_json(timing.path(results))["environment"]
        uses += [("cost measurements", [environments[environment]])]
    scores = gather(records)
    return [
        *page.write(scores, out, timing.read(results), provenance(uses)),
        *draw_selftuning(scores, out / "figures"),
    ]


def _write_trainer(results: Results, out: Path) -> list[Path]:
    """Writes the table of `quadstep-bench trainer`, if it was run."""
    record, page = results.root / "bench" / "trainer.json", out / "TRAINER.md"
    if not record.exists():
        return []
    measured = read_json(record)
    losses: defaultdict[str, list[float]] = defaultdict(list)
    for run in measured["runs"]:
        losses[run["setting"]].append(number(run["loss"]))
    rows = [
        [
            setting,
            f"{np.median(of_setting):.2g}",
            f"{np.max(of_setting):.2g}",
            # One that is not a number counts too.
            f"{sum(not loss <= PLATEAU for loss in of_setting)} of {len(of_setting)}",
        ]
        for setting, of_setting in losses.items()
    ]
    environment = results.environments()[measured["environment"]]
    uses = [
        ("runs of LQA" if run["setting"].startswith("LQA") else OTHERS, [environment])
        for run in measured["runs"]
    ]
    lines = [
        "# Trainer",
        "",
        "Written by `quadstep-bench report` from `bench/trainer.json`. Final training losses of a "
        f"small BERT after {measured['epochs']} epochs, and how many runs end on the first "
        f"plateau, above {PLATEAU}:",
        "",
        *format_table(["setting", "median", "maximum", "on the plateau"], rows),
        "",
    ]
    write_text("\n".join(lines) + provenance(uses), page)
    return [page]


# Provenance ---------------------------------------------------------------------------------------


def provenance(uses: Uses) -> str:
    """Writes with which sources of the library the numbers of a report were measured.

    Args:
        uses: The measurements. One that went on under other sources than it began with counts in
            the row of both together.
    """
    counts: defaultdict[tuple[str | None, ...], Counter[str]] = defaultdict(Counter)
    revisions: defaultdict[tuple[str | None, ...], set[str]] = defaultdict(set)
    for kind, environments in uses:
        sources = tuple(dict.fromkeys(each["sources"] for each in environments))
        counts[sources][kind] += 1
        for each in environments:
            revision = (each["revision"] or "none")[:7]
            revisions[sources].add(f"{revision} (changed)" if each["dirty"] else revision)
    totals = sum(counts.values(), Counter[str]())
    kinds = [kind for kind in KINDS if totals[kind]]
    if not kinds:
        return ""

    def order(sources: tuple[str | None, ...]) -> tuple[bool, list[int], int, str]:
        row = [-counts[sources][kind] for kind in kinds]
        return sources != (SOURCES,), row, len(sources), str(sources)

    present = counts.get((SOURCES,), Counter[str]())
    shares = [f"{present[kind]} of {totals[kind]} {kind}" for kind in kinds if kind != OTHERS]
    rows = [
        [
            " then ".join(f"`{name}`" if name else "unknown" for name in sources)
            + " (present)" * (sources == (SOURCES,)),
            ", ".join(sorted(revisions[sources])),
            *(str(counts[sources][kind] or "") for kind in kinds),
        ]
        for sources in sorted(counts, key=order)
    ]
    return "\n".join(
        [
            PROVENANCE,
            "A hash identifies the sources of the library, which decide its steps. The present "
            f"ones, as of this report, are `{SOURCES}`. Measured with them: "
            f"{', '.join(shares) or 'nothing'}. Other optimizers do not depend on them.",
            "",
            *format_table(["sources", "revisions", *kinds], rows),
            "",
        ]
    )


def _trained(records: Iterable[Record]) -> Uses:
    for record in records:
        ours = record.config.optimizer in LQA_SETTINGS
        yield "runs of LQA" if ours else OTHERS, record.environments


def _measured(results: Results) -> Uses:
    environments = results.environments()
    for row in read_rows(results.root / "lines.jsonl"):
        yield "line searches", [environments[row["environment"]]]
    path = results.root / "bench" / "cost.json"
    if path.exists():
        yield "cost measurements", [environments[read_json(path)["environment"]]]


# Headline numbers ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class FinalLosses:
    """Training losses at the end of the runs of a figure, medians over the seeds.

    Attributes:
        epochs: After how many epochs: as many as all seeds of the setting have.
        loss: That of the setting; infinite if diverged.
        best: The lowest of a competitor that was trained for as long.
        competitor: Which one that is.
    """

    epochs: int
    loss: float
    best: float
    competitor: str


@dataclass(frozen=True)
class Numbers:
    """The headline numbers of a setting.

    Attributes:
        setting: Its name.
        tasks: How many tasks of the suite it is recorded on.
        suite: How it compares with the best hand-tuned setting on each task, see
            `quadstep_bench.suite.Comparison`.
        figures: Its final training losses beside those of the competitors, by figure of the paper.
        costs: The time a step over that of the base optimizer, by model, for each measurement in
            `results/bench` by its label: "" is that of `cost.json`, "cuda" that of
            `cost-cuda.json`.
    """

    setting: str
    tasks: int
    suite: suite.Comparison
    figures: Mapping[int, FinalLosses]
    costs: Mapping[str, Mapping[str, float]]


def numbers(root: Path = Path("results"), setting: str = suite.SUBJECT) -> Numbers:
    """Computes the headline numbers of a setting from the records.

    Args:
        root: The folder of results.
        setting: One of `quadstep_bench.optimizers.CONFIGURATIONS` that the suite has.

    Example:
        >>> found = numbers()
        >>> f"{found.suite.training:.2f}", found.suite.won_training, found.tasks
        >>> f"{found.costs['']['resnet18']:.2f}"
    """
    results = Results(root, root)
    outcomes = suite.judge(results.collection("suite").read_all())
    return Numbers(
        setting,
        len(outcomes),
        suite.compare(outcomes)[setting],
        _final_losses(results.collection("records").read_all(), setting),
        {
            path.stem.removeprefix("cost").removeprefix("-"): {
                row["model"]: row["ratio"]
                for row in read_json(path)["rows"]
                if (row["optimizer"], row["base"]) == (setting, BASES[setting])
            }
            for path in sorted((root / "bench").glob("cost*.json"))
        },
    )


def _final_losses(records: Iterable[Record], setting: str) -> dict[int, FinalLosses]:
    records = list(records)
    found: dict[int, FinalLosses] = {}
    for figure, task in FIGURES.items():
        curves = gather(records, task)
        if setting not in curves:
            continue
        epochs = curves[setting].length
        losses = {
            name: float(curve.trained[epochs - 1])
            for name, curve in curves.items()
            if curve.length >= epochs > 0
        }
        best = min(sorted(losses.keys() & COMPETITORS), key=losses.__getitem__, default=None)
        if best is not None:
            found[figure] = FinalLosses(epochs, losses[setting], losses[best], best)
    return found
