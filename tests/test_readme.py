import re
from pathlib import Path

import torch

README = Path(__file__).parents[1] / "README.md"


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
