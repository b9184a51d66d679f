"""The steps that ordinary training takes, recorded: run as `python tests/golden.py` to record anew.

The network and the batches are such that a relative change of 1e-15 in the first parameters changes
no loss by more than 1e-10: what a processor rounds differently does not show.
"""

import json
from pathlib import Path

import torch
from problems import classification
from torch import nn

from quadstep import LQA

RECORD = Path(__file__).with_name("golden.json")

CONFIGURATIONS = {
    "LQA(params)": LQA,
    'LQA(params, direction="gradient")': lambda params: LQA(params, direction="gradient"),
    "LQA(AdamW)": lambda params: LQA(torch.optim.AdamW(params)),
    "LQA.paper(params)": LQA.paper,
}


def train(name: str, steps: int = 300) -> dict[str, list[float]]:
    """Returns the loss before each step and the rate after it."""
    layers = nn.Linear(8, 16), nn.Softplus(), nn.Linear(16, 3)
    task = classification(*layers, dtype=torch.float64, seed=1)
    opt = CONFIGURATIONS[name](task.model.parameters())
    losses, rates = [], []
    for step in range(steps):
        losses.append(opt.step(task.closure(step, size=64)).item())
        rates.append(opt.rate)
    return {"losses": losses, "rates": rates}


if __name__ == "__main__":
    torch.set_num_threads(1)
    rows = [f'"{json.dumps(name)[1:-1]}": {json.dumps(train(name))}' for name in CONFIGURATIONS]
    RECORD.write_text("{\n" + ",\n".join(rows) + "\n}\n")
