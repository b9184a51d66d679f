"""Memory: the peak of a training step beside AdamW's, and what states in bfloat16 cost in loss.

Bytes are counted as torch allocates tensors, which repeats exactly and needs no accelerator; what
the allocator itself and Python take is left out.
"""

# Torch is not typed throughout.
# pyright: reportUnknownMemberType=false

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from quadstep import LQA
from quadstep_bench import suite
from quadstep_bench.cost import Storages, size_of
from quadstep_bench.runner import training
from quadstep_bench.runner.environment import environment
from quadstep_bench.runner.files import Row, write_json
from quadstep_bench.runner.records import Config, Results
from quadstep_bench.tasks import CHARACTERS, data, models

LENGTH = 128
"""How many characters a sequence has."""

SEQUENCES = (1, 16)
"""Few activations, where the optimizer decides the peak, and many."""

STEPS = 3
"""The first makes the state, and all measure."""

LOW = torch.bfloat16

SETTINGS: dict[str, Callable[[Iterable[Tensor]], Optimizer]] = {
    "AdamW(params)": partial(AdamW, foreach=True),
    "LQA(params)": LQA,
    "LQA(params, state_dtype=torch.bfloat16)": partial(LQA, state_dtype=LOW),
    'LQA(params, restore="subtract")': partial(LQA, restore="subtract"),
    'LQA(params, state_dtype=torch.bfloat16, restore="subtract")': partial(
        LQA, state_dtype=LOW, restore="subtract"
    ),
    'LQA(params, direction="gradient")': partial(LQA, direction="gradient"),
    'LQA(params, direction="gradient", state_dtype=torch.bfloat16, restore="subtract")': partial(
        LQA, direction="gradient", state_dtype=LOW, restore="subtract"
    ),
    "LQA(AdamW(params))": lambda params: LQA(AdamW(params, foreach=True)),
}

TASKS = ("gru-digits", "autoencoder-digits", "mlp-digits")

DTYPES: tuple[tuple[torch.dtype, torch.dtype | None], ...] = (
    (torch.float32, None),
    (torch.float32, LOW),
    (LOW, None),
    (LOW, LOW),
    (LOW, torch.float32),
)
"""Types of the parameters, and what `state_dtype` is."""


def transformer() -> nn.Module:
    """Builds a transformer of 20 million parameters."""
    return models.transformer((LENGTH,), width=528, heads=8, layers=6)


def measure(results: Results, console: Console, *, seeds: int) -> Path:
    """Measures the memory of each setting, and the losses of each pair of types.

    Args:
        results: The folder for `bench/memory.json`.
        console: Where to print.
        seeds: How many runs of each setting of the tasks.

    Returns:
        The file. Its `peaks` hold, in copies of the parameters, the `state` that lasts and the
        `peak` of a step: parameters, gradients, state, activations and all that is transient. Its
        `losses` hold the final training loss of each run.

    Raises:
        OSError: The file cannot be written.
    """
    path = results.root / "bench" / "memory.json"
    here = environment(threads=torch.get_num_threads(), device="cpu")
    wanted = [(setting, sequences) for setting in SETTINGS for sequences in SEQUENCES]
    configs = suite.configs(tasks=TASKS, optimizers=["lqa-auto"], seeds=seeds)
    runs = [(config, *dtypes) for config in configs for dtypes in DTYPES]
    record: Row = {
        "environment": results.remember(here),
        "parameters": sum(param.numel() for param in transformer().parameters()),
        "peaks": [_peak(*each) for each in track(wanted, "peaks", console=console, transient=True)],
        "losses": [_loss(*each) for each in track(runs, "losses", console=console, transient=True)],
    }
    write_json(record, path)
    return path


def _peak(setting: str, sequences: int) -> Row:
    torch.manual_seed(0)
    model = transformer()
    inputs, labels = torch.randint(CHARACTERS, (2, sequences, LENGTH))
    optimizer = SETTINGS[setting](model.parameters())
    with Storages() as storages:
        for _ in range(STEPS):
            training.step(optimizer, model, inputs, labels)
            optimizer.zero_grad()
    params = size_of(model.parameters())
    states: Iterable[dict[str, Any]] = optimizer.state.values()
    state = [value for own in states for value in own.values() if isinstance(value, Tensor)]
    return {
        "setting": setting,
        "sequences": sequences,
        "state": size_of(state) / params,
        "peak": 1.0 + storages.peak / params,
    }


def _loss(config: Config, dtype: torch.dtype, state_dtype: torch.dtype | None) -> Row:
    trial = training.Trial(config, "cpu")
    trial.model.to(dtype)
    trial.model.register_forward_pre_hook(lambda _, inputs: (inputs[0].to(dtype),))
    trial.optimizer = LQA(trial.model.parameters(), state_dtype=state_dtype)
    examples = data.load_for(config)
    trial.evaluate(examples)
    for _ in range(config.epochs):
        trial.train(examples)
    return {
        "task": config.task,
        "seed": config.seed,
        "parameters": str(dtype).removeprefix("torch."),
        "state_dtype": state_dtype and str(state_dtype).removeprefix("torch."),
        "loss": trial.epochs[-1].train_loss,
    }
