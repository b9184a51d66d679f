"""Trains with a `Learner` of fastai.

    pip install quadstep fastai
    python examples/fastai_learner.py

Its `opt_func` makes LQA; a callback shows the averaged weights at validation.
"""

import torch
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.optimizer import OptimWrapper
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from quadstep import LQA


class Averaged(Callback):
    """Shows the averaged weights at validation and after `fit`."""

    def before_train(self):
        self.opt.opt.train()

    def before_validate(self):
        self.opt.opt.eval()


def lqa(params, lr=None):
    """Makes LQA where fastai makes its optimizer; the rate that it passes is not used."""
    return OptimWrapper(params, LQA, model=model, criterion=criterion)


torch.manual_seed(0)
inputs = torch.randn(1024, 10)
labels = inputs[:, :3].argmax(1)
training = TensorDataset(inputs[:768], labels[:768])
held_out = TensorDataset(inputs[768:], labels[768:])

model = nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 3))
criterion = nn.CrossEntropyLoss()
loaders = DataLoaders(DataLoader(training, 32, shuffle=True), DataLoader(held_out, 256))
learner = Learner(loaders, model, loss_func=criterion, opt_func=lqa, cbs=[Averaged()])
learner.fit(10)  # fit_one_cycle's rates would be ignored
(loss,) = learner.validate()
print(f"held-out loss {loss:.3f}")
