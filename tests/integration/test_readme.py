"""Every number of the README is in the records, and what it shows survives on PyPI."""

import json
import re
import statistics
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "results"
README = (ROOT / "README.md").read_text()
COSTS = (ROOT / "docs" / "benchmarks" / "index.md").read_text()
MODELS = ("transformer", "resnet18", "mlp", "lenet", "logistic")

SETTINGS = {
    "`LQA(params)`": "lqa-auto",
    "`LQA(params, weight_decay=0.1)`": "lqa-auto-decay",
    "`LQA(AdamW(params))`": "lqa-adamw",
    "AdamW 0.003": "adamw",
    "AdamW 0.01, warm-up and cosine": "adamw-cosine",
    "Prodigy, cosine": "prodigy",
    "Prodigy, schedule-free averaging": "prodigy-schedulefree",
}
BETTER = {
    "prodigy": "Prodigy",
    "adamw-cosine": "AdamW with cosine",
    "adamw": "AdamW",
    "nadamw-algoperf": "NadamW",
    "schedulefree-algoperf": "schedule-free AdamW",
}
"""Entrants with a lower final validation loss than the default, best first."""

COST_RECORDS = {
    "processor": "cost.json",
    "the same, second measurement": "cost-small.json",
    "processor with AVX2 only, earlier": "cost-avx2.json",
    "H100, earlier": "cost-cuda.json",
}

SENTENCES = (
    "on {jobs} tasks that nobody tuned it for, beside AdamW tuned on each task with {trials} "
    "trials",
    "its final validation loss is {final} times that of the tuned AdamW, above {losers}.",
    "awkward tasks ({awkward} times), less in fine-tuning ({finetuning}) and from scratch "
    "({scratch})",
    "on the {tasks} tasks of [the suite][suite] {training} times that of the best of {hand_tuned} "
    "hand-tuned",
    "at or below it on {training_wins} of {tasks} tasks, and there in {steps} of the steps",
    "Its held-out loss there: {held_out} times the best, {best_checkpoint} at the best checkpoint.",
    "{cpu_least} to {cpu_most} times the time of a step of AdamW on a processor ({small_cost} on "
    "average on the {jobs} small tasks)",
    "the default takes {h100_least} to {h100_most} times a step of AdamW there",
    "with dropout: {trainer_plateau} of a small BERT end on the first plateau",
    "Of the paper's {claims} claims on the method",
    "the default meets {auto_holds}, `lqa` {lqa_holds} (not run on figure 2), the rules of the "
    "authors' own code {authors_holds} (they ran on figures 1 to 4) and Algorithm 1 as printed "
    "{paper_holds};",
)
"""The sentences of the README that state results, with the names of `recorded()`."""

ADVICE = (
    "the final validation loss is {finetuning} times that of AdamW tuned on each task, and "
    "{finetuning_lowest} times at the best checkpoint",
    "`weight_decay=0.1` ({finetuning_decayed} times at the end)",
    "at or below that of the best hand-tuned setting on {held_out_wins} of {tasks} tasks",
    "{held_out} times it in the geometric mean",
    "keep the best checkpoint ({best_checkpoint} times)",
)
"""The sentences of the page on choosing a configuration that state results."""

NO_RESULTS = (
    "below 1 is better",
    "below 1e-4 counts as 1e-4",
    "Python 3.11",
    "Zhu et al., 2020",
    "Algorithm 1",
)
"""Numbers of the README that state no result."""


def table(text: str, after: str) -> dict[str, list[str]]:
    """The rows of the first table after some words, by their first cell, which may be a link."""
    lines = text[text.index(after) :].split("\n")
    first = next(index for index, line in enumerate(lines) if line.startswith("|"))
    rows: dict[str, list[str]] = {}
    for line in lines[first + 2 :]:
        if not line.startswith("|"):
            break
        name, *rest = (cell.strip() for cell in line[1:-1].split("|"))
        rows[re.sub(r"\[(.*)\]\(.*\)", r"\1", name)] = rest
    return rows


def costs(record: str, optimizer: str) -> dict[str, str]:
    """The time of a step relative to AdamW's, for each model that a record has."""
    rows = json.loads((RESULTS / "bench" / record).read_text())["rows"]
    return {
        row["model"]: f"{row['ratio']:.2f}"
        for row in rows
        if (row["optimizer"], row["base"]) == (optimizer, "adamw")
    }


def recorded() -> dict[str, Any]:
    """The headline numbers, as the reports written from the records have them."""
    suite = (RESULTS / "SUITE.md").read_text()
    verdicts = table((RESULTS / "CLAIMS.md").read_text(), "| configuration |")
    settings = table(suite, "## One setting for all tasks")
    tasks = len(table(suite, "## The tasks"))
    training, held_out = table(suite, "## Training loss"), table(suite, "## Held-out loss")
    ratios = sorted((float(row[3]) for row in held_out.values()), reverse=True)
    tuning = json.loads((RESULTS / "selftuning.json").read_text())
    groups = tuning["settings"]["lqa-auto"]["groups"]
    decayed = tuning["settings"]["lqa-auto-decay"]["groups"]
    step_times = tuning["settings"]["lqa-auto"]["step_times"]
    losses = {
        name: setting["validation_loss"]["final"]["value"]
        for name, setting in tuning["settings"].items()
    }
    trainer = table((RESULTS / "TRAINER.md").read_text(), "# Trainer")
    cpu, h100 = (
        sorted(costs(f"{name}.json", "lqa-auto").values()) for name in ("cost", "cost-cuda")
    )
    wins = sum(float(row[3]) <= 1.0 for row in training.values())
    assert [wins, sum(ratio <= 1.0 for ratio in ratios)] == [
        int(count) for count in settings["lqa-auto"][3:5]
    ]
    return {
        "jobs": len(tuning["tasks"]),
        "trials": tuning["rules"]["trials"],
        "final": f"{losses['lqa-auto']:.3g}",
        "losers": ", ".join(f"{label} ({losses[name]:.3g})" for name, label in BETTER.items()),
        **{
            key: f"{groups[group]['final']['value']:.3g}"
            for key, group in (
                ("awkward", "awkward"),
                ("finetuning", "fine-tuning"),
                ("scratch", "from scratch"),
            )
        },
        "finetuning_lowest": f"{groups['fine-tuning']['best']['value']:.3g}",
        "finetuning_decayed": f"{decayed['fine-tuning']['final']['value']:.3g}",
        "tasks": tasks,
        "training": settings["lqa-auto"][0],
        "hand_tuned": re.search(r"are the best, on each task anew, of (\d+)", suite)[1],
        "settings": settings,
        "training_wins": wins,
        "held_out_wins": settings["lqa-auto"][4],
        "held_out": settings["lqa-auto"][1],
        "best_checkpoint": settings["lqa-auto"][2],
        "steps": re.search(r"([\d.]+) of the steps where it is reached", suite)[1],
        "trainer_plateau": trainer["LQA, `Trainer`"][2],
        "small_cost": f"{statistics.geometric_mean(step_times.values()):.2f}",
        "cpu_least": cpu[0],
        "cpu_most": cpu[-1],
        "h100_least": h100[0],
        "h100_most": h100[-1],
        "claims": sum(int(count) for count in verdicts["lqa-auto"]),
        "auto_holds": verdicts["lqa-auto"][0],
        "lqa_holds": verdicts["lqa"][0],
        "authors_holds": verdicts["lqa-authors"][0],
        "paper_holds": verdicts["lqa-paper"][0],
    }


def prose(text: str) -> str:
    """The words of a document: no code, tables, images, links or citation, in one line."""
    text = text.split("\n## Citation")[0]
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    text = re.sub(r"^\|.*$|!\[.*?\]\(.*?\)|`[^`]*=[^`]*`", "", text, flags=re.MULTILINE)
    return " ".join(re.sub(r"\]\([^)]*\)", "]", text).replace("**", "").split())


def test_it_is_short():
    assert len(README.splitlines()) <= 150


@pytest.mark.parametrize("sentence", SENTENCES)
def test_its_sentences_state_what_was_recorded(sentence):
    assert sentence.format(**recorded()) in prose(README)


@pytest.mark.parametrize("sentence", ADVICE)
def test_the_advice_to_choose_states_what_was_recorded(sentence):
    page = " ".join((ROOT / "docs" / "choosing.md").read_text().split())
    assert sentence.format(**recorded()) in page


def test_its_prose_has_no_other_number():
    words = prose(README)
    for known in [sentence.format(**recorded()) for sentence in SENTENCES] + [*NO_RESULTS]:
        words = words.replace(known, "")
    names = r"\b(?:FSDP2|H100|ResNet-18|LeNet-5|CIFAR-10)\b"
    assert re.findall(r"\S*\d\S*", re.sub(names, "", words)) == []


def test_its_table_of_settings_is_that_of_the_self_tuning_benchmark():
    settings = json.loads((RESULTS / "selftuning.json").read_text())["settings"]
    rows = {}
    for label, name in SETTINGS.items():
        loss, error = (settings[name][f"validation_{kind}"] for kind in ("loss", "error"))
        rows[label] = [
            f"{loss['reached']['value']:.0f} of {loss['tasks']}",
            *(f"{value:.3g}" for value in (loss["final"]["value"], loss["best"]["value"])),
            f"{error['final']['value']:.3g}",
        ]
    assert table(README, "What one setting gives") == rows
    # It names all that are better than the default in the end, and none that reaches more targets
    # is left out.
    finals = {name: row["validation_loss"]["final"]["value"] for name, row in settings.items()}
    entrants = {name for name in finals if "constant" not in name}
    better = {name for name in entrants if finals[name] < finals["lqa-auto"]}
    assert better == {*BETTER, "lqa-auto-decay"}
    reached = {name: settings[name]["validation_loss"]["reached"]["value"] for name in entrants}
    assert sorted(reached, key=reached.__getitem__)[-2:] == ["lqa-auto", "lqa-auto-decay"]


def test_its_costs_are_those_recorded():
    shown = table(README, "## What it costs")
    for label, optimizer in (("`LQA(params)`", "lqa-auto"), ("`LQA(AdamW(params))`", "lqa-adamw")):
        ratios = costs("cost.json", optimizer)
        assert shown[label] == [ratios[model] for model in MODELS]


def test_the_costs_of_the_benchmarks_page_are_those_recorded():
    shown = table(COSTS, "## Cost")
    assert shown.keys() == COST_RECORDS.keys()
    for label, record in COST_RECORDS.items():
        ratios = costs(record, "lqa-auto")
        assert shown[label] == [ratios.get(model, "") for model in MODELS]


def test_the_memory_of_the_page_to_choose_is_that_recorded():
    page = (ROOT / "docs" / "choosing.md").read_text()
    recorded = (RESULTS / "MEMORY.md").read_text()
    assert table(page, "## Memory") == table(recorded, "# Memory")
    rows = json.loads((RESULTS / "bench" / "memory.json").read_text())["losses"]

    def medians(parameters: str, state_dtype: str | None) -> list[float]:
        losses: dict[str, list[float]] = {}
        for row in rows:
            if (row["parameters"], row["state_dtype"]) == (parameters, state_dtype):
                losses.setdefault(row["task"], []).append(row["loss"])
        return [statistics.median(of_task) for of_task in losses.values()]

    for parameters, state_dtype in [
        ("float32", "bfloat16"),
        ("bfloat16", "bfloat16"),
        ("bfloat16", "float32"),
    ]:
        pairs = zip(medians(parameters, state_dtype), medians(parameters, None), strict=True)
        first, second, third = (f"{low / high:.2f}" for low, high in pairs)
        assert f"{first}, {second} and {third} times" in " ".join(page.split())


def test_the_losses_of_the_page_on_transformers_are_those_recorded():
    page = (ROOT / "docs" / "recipes" / "transformers.md").read_text()
    recorded = table((RESULTS / "TRAINER.md").read_text(), "# Trainer")
    assert table(page, "## What to expect") == recorded
    clipped, unclipped = (
        recorded[f"LQA, `Trainer`{rest}"][2] for rest in ("", ", `max_grad_norm=0`")
    )
    sentence = f"{unclipped.split()[0]} instead of {clipped} runs ends on the plateau"
    assert sentence in " ".join(page.split())


def test_the_ways_to_return_from_probes_are_those_recorded():
    rows = json.loads((RESULTS / "bench" / "restore.json").read_text())["rows"]
    found = {(row["method"], row["dtype"]): row for row in rows if row["model"] == "mlp"}
    types = ("float32", "bfloat16")
    assert table(COSTS, "## Snapshot or subtraction") == {
        method: [
            *(f"{found[method, dtype]['ratio']:.1f}" for dtype in types),
            *(f"{found[method, dtype]['memory']:.2f}" for dtype in types),
        ]
        for method in ("snapshot", "subtraction", "compensation")
    }


def test_it_links_to_nothing_that_pypi_does_not_have():
    targets = re.findall(r"\]\(([^)]+)\)|^\[\w+\]: (\S+)", README, re.MULTILINE)
    links = [inline or reference for inline, reference in targets]
    assert len(links) > 10
    assert [link for link in links if not link.startswith(("https://", "#"))] == []
    assert sorted(set(re.findall(r"\]\[(\w+)\]", README))) == sorted(
        re.findall(r"^\[(\w+)\]: ", README, re.MULTILINE)
    )


def test_its_links_to_the_site_and_the_repository_exist():
    site, repository = "https://quadstep.github.io/quadstep/", "/quadstep/quadstep/blob/main/"
    for path in re.findall(rf"{site}([\w/-]*)", README):
        page = ROOT / "docs" / f"{path.rstrip('/') or 'index'}.md"
        assert page.exists() or (page.with_suffix("") / "index.md").exists(), path
    for path in re.findall(rf"{repository}(\S+)", README):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"githubusercontent\.com/quadstep/quadstep/main/([^\s)]+)", README):
        assert (ROOT / path).exists(), path
