import re
from pathlib import Path

import torch

from quadstep_bench.markdown import read_table

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"


def test_the_examples_run_as_printed(capsys):
    torch.manual_seed(0)
    names = {}
    for example in re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL):
        exec(example, names)
    assert names["scaler"].get_scale() > 0.0
    assert names["loss"] < 0.5
    rate, accuracy = capsys.readouterr().out.split(maxsplit=1)
    assert float(rate) > 0.0
    assert float(accuracy.removeprefix("tensor(").removesuffix(")\n")) > 0.9


def test_the_suite_is_shown_as_it_was_recorded():
    report = (ROOT / "results" / "SUITE.md").read_text()
    training, held_out = (
        read_table(report, "## Training loss"),
        read_table(report, "## Held-out loss"),
    )
    assert read_table(README.read_text(), "## The suite") == {
        task: [*training[task][:4], held_out[task][3], held_out[task][-1]] for task in training
    }
    every = read_table(report, "## One setting for all tasks")
    shown = read_table(README.read_text(), "### One setting for all tasks")
    assert shown == {setting: every[setting][:3] for setting in shown}
    assert [*shown][:2] == [*every][:2]
