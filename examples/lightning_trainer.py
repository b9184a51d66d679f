"""Trains with Lightning's automatic optimization.

    pip install quadstep lightning
    python examples/lightning_trainer.py

With accumulation, clipping, checkpoints and early stopping, all of which are the trainer's.
"""

import lightning
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from quadstep.integrations.lightning import LQA, LQACallback


class Classifier(lightning.LightningModule):
    """A small network; nothing in it but the optimizer is of LQA."""

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Linear(10, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 3)]
        self.layers = nn.Sequential(*layers)

    def configure_optimizers(self):
        return LQA(self.parameters())

    def training_step(self, batch, _):
        x, y = batch
        loss = cross_entropy(self.layers(x), y)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, _):
        x, y = batch
        self.log("accuracy", (self.layers(x).argmax(1) == y).float().mean())


torch.manual_seed(0)
inputs = torch.randn(1024, 10)
labels = inputs[:, :3].argmax(1)
training = DataLoader(TensorDataset(inputs[:768], labels[:768]), 16, shuffle=True)
held_out = DataLoader(TensorDataset(inputs[768:], labels[768:]), 256)

best = ModelCheckpoint("lightning_trainer", monitor="accuracy", mode="max")
trainer = lightning.Trainer(
    max_epochs=10,
    accelerator="cpu",
    accumulate_grad_batches=2,
    gradient_clip_val=1.0,
    logger=False,
    callbacks=[LQACallback(), best, EarlyStopping("accuracy", mode="max")],
)
trainer.fit(Classifier(), training, held_out)
trainer.validate(ckpt_path="best", dataloaders=held_out)  # the averaged weights, which it holds
