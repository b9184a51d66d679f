import re
from pathlib import Path

import torch

README = Path(__file__).parents[1] / "README.md"


def test_the_example_runs_as_printed(capsys):
    torch.manual_seed(0)
    example = re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert example is not None
    exec(example[1], {})
    rate, accuracy = capsys.readouterr().out.split(maxsplit=1)
    assert float(rate) > 0.0
    assert float(accuracy.removeprefix("tensor(").removesuffix(")\n")) > 0.9
