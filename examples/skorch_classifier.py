"""Trains a classifier of skorch on handwritten digits.

    pip install quadstep skorch
    python examples/skorch_classifier.py

With validation, clipping and the best checkpoint.
"""

import torch
from sklearn.datasets import load_digits
from skorch import NeuralNetClassifier
from skorch.callbacks import Checkpoint, GradientNormClipping
from torch import nn

from quadstep.integrations.skorch import LQA, LQACallback


class Net(nn.Sequential):
    """A small network for images of 8 by 8."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 10))


torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)
images = images.astype("float32") / 16.0

best = Checkpoint(monitor="valid_acc_best", dirname="skorch_classifier", load_best=True)
net = NeuralNetClassifier(
    Net,
    criterion=nn.CrossEntropyLoss,
    max_epochs=10,
    batch_size=32,
    optimizer=LQA,
    lr=None,
    callbacks=[LQACallback(), GradientNormClipping(1.0), best],
)
net.fit(images[:1500], labels[:1500])
print(f"accuracy {net.score(images[1500:], labels[1500:]):.3f}")
