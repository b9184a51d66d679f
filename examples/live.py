"""Shows loss, rate, reason and forward passes in one line of the terminal while it trains.

    pip install quadstep rich scikit-learn
    python examples/live.py

It trains a small network on the handwritten digits that scikit-learn ships, for 20 epochs or for as
many as are given: `python examples/live.py 5`.
"""

import sys

import torch
from rich.live import Live
from rich.text import Text
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from quadstep import LQA, Report


def digits() -> tuple[TensorDataset, TensorDataset]:
    """Images of 8 by 8 and their labels, for training and for validation."""
    images, labels = load_digits(return_X_y=True)
    inputs = torch.tensor(images, dtype=torch.float32) / 16.0
    order = torch.randperm(len(inputs))
    data = TensorDataset(inputs[order], torch.tensor(labels)[order])
    return TensorDataset(*data[:1500]), TensorDataset(*data[1500:])


def line(report: Report, epoch: int, forwards: float) -> Text:
    """The last step, in less than 80 columns; `forwards` are the forward passes a step."""
    return Text(
        f"epoch {epoch:2d}  loss {report.loss:.5f}  rate {report.rate:.2e}  {report.reason:<10}  "
        f"forward passes a step {forwards:.2f}"
    )


def accuracy(model: nn.Module, held_out: TensorDataset) -> float:
    """The part of the held-out images that the model classifies correctly."""
    inputs, labels = held_out.tensors
    with torch.no_grad():
        correct: Tensor = model(inputs).argmax(1) == labels
    return correct.float().mean().item()


def main(epochs: int) -> None:
    """Trains, and prints the accuracy of the averaged weights."""
    torch.manual_seed(0)
    training, held_out = digits()
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    opt = LQA(model.parameters())
    step = forwards = 0
    # It draws the line a few times a second, whatever the steps take.
    with Live() as live:
        for epoch in range(epochs):
            for x, y in DataLoader(training, 64, shuffle=True):
                opt.step(lambda x=x, y=y: cross_entropy(model(x), y))
                step += 1
                forwards += opt.report.forwards
                live.update(line(opt.report, epoch, forwards / step))
        with opt.averaged():
            live.console.print(f"accuracy on held-out digits: {accuracy(model, held_out):.3f}")


if __name__ == "__main__":
    main(epochs=int(sys.argv[1]) if len(sys.argv) > 1 else 20)
