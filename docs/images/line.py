"""Draws `line.svg`: the loss along the gradient, measured, and the parabola through three points.

Run `python docs/images/line.py`; the data are the digits that scikit-learn ships.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy
from torch.nn.utils import parameters_to_vector, vector_to_parameters

DELTA0 = 0.1
STEPS = (0, 20, 200)
"""The steps of a run at a constant rate at which the line is measured."""

torch.set_num_threads(1)
torch.manual_seed(0)
digits = load_digits()
x = torch.tensor(digits.data / 16, dtype=torch.float32)
y = torch.tensor(digits.target)
model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))


def gradient(batch: torch.Tensor) -> torch.Tensor:
    """The gradient of the loss of a batch, as one vector."""
    loss = cross_entropy(model(x[batch]), y[batch])
    grads = torch.autograd.grad(loss, list(model.parameters()))
    return torch.cat([grad.flatten() for grad in grads])


@torch.no_grad()
def losses(batch: torch.Tensor, direction: torch.Tensor, rates: np.ndarray) -> np.ndarray:
    """The losses of a batch at some rates along a direction; the parameters stay."""
    start = parameters_to_vector(model.parameters())
    found = []
    for rate in rates:
        vector_to_parameters(start - float(rate) * direction, model.parameters())
        found.append(float(cross_entropy(model(x[batch]), y[batch])))
    vector_to_parameters(start, model.parameters())
    return np.array(found)


plt.rcParams |= {
    "svg.hashsalt": "quadstep",
    "font.size": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
figure, panels = plt.subplots(1, len(STEPS), figsize=(11, 3.6), layout="constrained")
batches = torch.randint(len(x), (max(STEPS) + 1, 64))
for step, batch in enumerate(batches):
    direction = gradient(batch)
    if step in STEPS:
        panel = panels[STEPS.index(step)]
        probes = np.array([-DELTA0, 0.0, DELTA0])
        behind, before, ahead = losses(batch, direction, probes)
        a = (behind - ahead) / (2 * DELTA0)
        b = (ahead + behind - 2 * before) / (2 * DELTA0**2)
        vertex = a / (2 * b)
        rates = np.linspace(-1.5 * DELTA0, 2 * vertex, 200)
        parabola = before - a * rates + b * rates**2
        panel.plot(rates, losses(batch, direction, rates), color="#0072B2", label="measured loss")
        panel.plot(rates, parabola, "--", color="#D55E00", label="parabola (2)")
        panel.plot(probes, [behind, before, ahead], "o", color="black", label="three evaluations")
        panel.plot(vertex, *losses(batch, direction, np.array([vertex])), "*", color="#009E73",
                   markersize=13, label="loss at the vertex (3)")  # fmt: skip
        panel.set_title(f"step {step}: vertex at {vertex:.2g}")
        panel.set_xlabel("rate")
    with torch.no_grad():
        moved = parameters_to_vector(model.parameters()) - DELTA0 * direction
        vector_to_parameters(moved, model.parameters())
panels[0].set_ylabel("loss of the mini-batch")
figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4,
              frameon=False)  # fmt: skip
figure.savefig(Path(__file__).with_suffix(".svg"), metadata={"Date": None})
