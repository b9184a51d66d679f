"""The paper's models, in their original sizes, and the small ones of the suite."""

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import convert_conv2d_weight_memory_format

from quadstep_bench.tasks import CHARACTERS, CLASSES, CONTEXT, SHAPES, TASKS, check_task

Shape = tuple[int, ...]


def build(task: str) -> nn.Module:
    """Builds the model of a task with fresh weights from torch's random state."""
    check_task(task)
    row = TASKS[task]
    model = MODELS[row.model](SHAPES[row.data])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(row.weight_scale)
    # Together with images of the same layout, saves a quarter of the time of a convolution.
    return convert_conv2d_weight_memory_format(model, torch.channels_last)


def logistic(shape: Shape) -> nn.Module:
    """Builds multinomial logistic regression, started at zero as in the paper."""
    linear = nn.Linear(math.prod(shape), CLASSES)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return nn.Sequential(nn.Flatten(), linear)


def mlp(shape: Shape, *, width: int, outputs: int = CLASSES, dropout: float = 0.0) -> nn.Module:
    """Builds a perceptron with two hidden layers, parts of which may drop out."""
    widths = math.prod(shape), width, width, outputs
    return nn.Sequential(nn.Flatten(), *_layers(*widths, dropout=dropout))


def autoencoder(shape: Shape) -> nn.Module:
    """Builds a perceptron that returns its inputs by way of 32 numbers."""
    size = math.prod(shape)
    return nn.Sequential(
        nn.Flatten(), *_layers(size, 128, 32, 128, size), nn.Unflatten(1, torch.Size(shape))
    )


def _layers(*widths: int, dropout: float = 0.0) -> list[nn.Module]:
    """Builds linear layers with rectifiers between them."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        if layers:
            layers.append(nn.ReLU())
            if dropout:
                layers.append(nn.Dropout(dropout))
        layers.append(nn.Linear(inputs, outputs))
    return layers


def gru(shape: Shape) -> nn.Module:
    """Builds a recurrent network that reads a grey image row by row and then names its class."""
    _, _, width = shape
    return _Recurrent(width, 64)


class _Recurrent(nn.Module):
    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.body = nn.GRU(inputs, width, batch_first=True)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        states, _ = self.body(images.squeeze(1))
        return self.head(states[:, -1])


def lenet(shape: Shape) -> nn.Module:
    """Builds LeNet-5 with rectifiers and max-pooling; it reads 32x32, smaller images are padded."""
    channels, height, _ = shape
    return nn.Sequential(
        nn.Conv2d(channels, 6, 5, padding=(32 - height) // 2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * 5 * 5, 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, CLASSES),
    )


def augmented_lenet(shape: Shape) -> nn.Module:
    """Builds LeNet-5 that hardly ever sees an image twice while it trains."""
    return nn.Sequential(_Jitter(4), lenet(shape))


class _Jitter(nn.Module):
    """Mirrors images and shifts them by a few pixels, each by chance, while training."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most

    def forward(self, images: Tensor) -> Tensor:
        if not self.training:
            return images
        number, _, height, width = images.shape
        draw = partial(torch.randint, size=(number, 1), device=images.device)
        count = partial(torch.arange, device=images.device)
        rows = draw(2 * self.most + 1) + count(height)
        columns = draw(2 * self.most + 1) + count(width)
        columns = torch.where(draw(2) == 0, columns, columns.flip(1))
        padded = functional.pad(images, [self.most] * 4).permute(0, 2, 3, 1)
        examples = count(number).view(-1, 1, 1)
        return padded[examples, rows.unsqueeze(2), columns.unsqueeze(1)].permute(0, 3, 1, 2)


def resnet18(shape: Shape) -> nn.Module:
    """Builds ResNet-18 for small images: a 3x3 stem, and no pooling after it."""
    return _resnet(shape, widths=(64, 128, 256, 512), blocks=2)


def resnet8(shape: Shape) -> nn.Module:
    """Builds ResNet-8: three narrow stages of a single block."""
    return _resnet(shape, widths=(16, 32, 64), blocks=1)


def _resnet(shape: Shape, *, widths: tuple[int, ...], blocks: int) -> nn.Module:
    channels, _, _ = shape
    width = widths[0]
    layers: list[nn.Module] = [_convolution(channels, width, 3, 1), nn.ReLU()]
    for stage, outputs in enumerate(widths):
        for block in range(blocks):
            stride = 2 if stage > 0 and block == 0 else 1
            layers.append(_Residual(width, outputs, stride))
            width = outputs
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, CLASSES)]
    return nn.Sequential(*layers)


class _Residual(nn.Module):
    """Two convolutions beside a shortcut, which is projected where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            _convolution(inputs, outputs, 3, stride),
            nn.ReLU(),
            _convolution(outputs, outputs, 3, 1),
        )
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else _convolution(inputs, outputs, 1, stride)

    def forward(self, inputs: Tensor) -> Tensor:
        return functional.relu(self.body(inputs) + self.shortcut(inputs))


def _convolution(inputs: int, outputs: int, size: int, stride: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False),
        nn.BatchNorm2d(outputs),
    )


def transformer(
    shape: Shape = (CONTEXT,), *, width: int = 128, heads: int = 4, layers: int = 3
) -> nn.Module:
    """Builds a small transformer that predicts each next character from those before it."""
    (context,) = shape
    return _Transformer(context, width, heads, layers)


class _Transformer(nn.Module):
    """Reads (example, place) and returns (example, character, place), as cross-entropy has it."""

    def __init__(self, context: int, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.characters = nn.Embedding(CHARACTERS, width)
        self.places = nn.Embedding(context, width)
        self.body = nn.Sequential(
            *(_Attention(width, heads) for _ in range(layers)),
            nn.LayerNorm(width),
            nn.Linear(width, CHARACTERS),
        )

    def forward(self, inputs: Tensor) -> Tensor:
        vectors = self.characters(inputs) + self.places.weight[: inputs.shape[1]]
        return self.body(vectors).transpose(1, 2)


class _Attention(nn.Module):
    """Attention to what came before, then a perceptron, each normalised and beside a shortcut."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.project = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 3 * width))
        self.join = nn.Linear(width, width)
        self.perceptron = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, inputs: Tensor) -> Tensor:
        # (example, place, 3 * width) to three of (example, head, place, width / heads).
        parts = self.project(inputs).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(*parts, is_causal=True)
        inputs = inputs + self.join(mixed.transpose(1, 2).flatten(2))
        return inputs + self.perceptron(inputs)


MODELS: dict[str, Callable[[Shape], nn.Module]] = {
    "logistic": logistic,
    "mlp": partial(mlp, width=1000),
    "small-mlp": partial(mlp, width=100),
    "dropout-mlp": partial(mlp, width=100, dropout=0.5),
    "lenet": lenet,
    "augmented-lenet": augmented_lenet,
    "resnet18": resnet18,
    "resnet8": resnet8,
    "transformer": transformer,
    "gru": gru,
    "autoencoder": autoencoder,
    "regressor": partial(mlp, width=64, outputs=1),
    "classifier": partial(mlp, width=64, outputs=2),
}
