"""Trainer: a small BERT trained by the Trainer of Transformers, and by a closure.

Its dropout makes losses noisy, and it begins on a plateau that some runs do not leave.
"""

# Neither torch nor transformers is typed throughout.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from accelerate.utils import set_seed
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.utils.data import StackDataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

from quadstep import LQA
from quadstep_bench.runner.environment import environment, version
from quadstep_bench.runner.files import Row, read_json, write_json
from quadstep_bench.runner.records import Results

EXAMPLES = 1000

LENGTH = 16
"""How many tokens a sequence has."""

EPOCHS = 8

BATCH = 32

PARTS = 2
"""In how many micro-batches the trainer divides a batch."""

CLIP = 1.0
"""The trainer's default, the greatest norm of the gradient."""


def data() -> tuple[Tensor, Tensor]:
    """Draws sequences, each labelled by which of two kinds of token is more frequent."""
    ids = torch.randint(5, 60, (EXAMPLES, LENGTH), generator=torch.Generator().manual_seed(0))
    first, second = ((ids >= start) & (ids < start + 10) for start in (7, 17))
    return ids, (first.sum(1) > second.sum(1)).long()


def bert() -> BertForSequenceClassification:
    """Builds a BERT of two layers, 48 wide, with dropout 0.1; always with the same weights."""
    set_seed(0)
    config = BertConfig(
        vocab_size=60,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
        max_position_embeddings=32,
    )
    return BertForSequenceClassification(config)


def _train_by_closure(seed: int, *, clip: float | None = None) -> nn.Module:
    """Trains in one phase; in two phases where gradients are clipped."""
    model, (ids, labels) = bert(), data()
    opt = LQA(model.parameters())
    set_seed(seed)
    model.train()
    for _ in range(EPOCHS):
        for batch in torch.randperm(EXAMPLES).split(BATCH):

            def closure(batch: Tensor = batch) -> Tensor:
                return model(input_ids=ids[batch], labels=labels[batch]).loss

            if clip is None:
                opt.step(closure)
            else:
                opt.zero_grad()
                loss = closure()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), clip)
                opt.step(closure, loss=loss)
    opt.eval()
    return model


def _train_by_trainer(
    seed: int, *, learning_rate: float | None = None, clip: float = CLIP
) -> nn.Module:
    """Trains with LQA, or with the trainer's own AdamW at a rate that falls linearly to zero."""
    model, (ids, labels) = bert(), data()
    opt = LQA(model.parameters(), model=model) if learning_rate is None else None
    with TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            num_train_epochs=EPOCHS,
            per_device_train_batch_size=BATCH // PARTS,
            gradient_accumulation_steps=PARTS,
            learning_rate=learning_rate or 0.0,
            max_grad_norm=clip,
            seed=seed,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        trainer = Trainer(
            model,
            arguments,
            # Anything that has a length and is indexed serves, a tensor too.
            train_dataset=StackDataset(input_ids=ids, labels=labels),  # pyright: ignore[reportArgumentType]
            optimizers=(opt, None),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    if opt is not None:
        opt.eval()
    return model


SETTINGS: dict[str, Callable[[int], nn.Module]] = {
    "LQA, closure": _train_by_closure,
    "LQA, closure in two phases, clipping": partial(_train_by_closure, clip=CLIP),
    "LQA, `Trainer`": _train_by_trainer,
    "LQA, `Trainer`, `max_grad_norm=0`": partial(_train_by_trainer, clip=0.0),
    "AdamW 1e-3, `Trainer`": partial(_train_by_trainer, learning_rate=1e-3),
    "AdamW 3e-4, `Trainer`": partial(_train_by_trainer, learning_rate=3e-4),
}
"""Each trains the model, its batches and dropout masks drawn from a seed."""


def measure(results: Results, console: Console, *, seeds: int) -> Path:
    """Trains with each setting.

    Args:
        results: The folder for `bench/trainer.json`. What it has of the same environment is not
            trained again.
        console: Where to print.
        seeds: How many runs of each setting.

    Returns:
        The file. Its `runs` hold the final training `loss` of each run: of the averaged weights,
        without dropout, over all examples.

    Raises:
        RecordError: What is there already cannot be read.
        OSError: The file cannot be written.
    """
    # The model is too small to compute in more threads.
    torch.set_num_threads(1)
    path = results.root / "bench" / "trainer.json"
    here = environment(threads=1, device="cpu")
    here["versions"]["transformers"] = version("transformers")
    record: Row = {"environment": results.remember(here), "epochs": EPOCHS, "runs": []}
    present: Row = read_json(path) if path.exists() else record
    same = present | {"runs": []} == record
    runs: list[Row] = present["runs"] if same else []
    done = {(run["setting"], run["seed"]) for run in runs}
    wanted = [(setting, seed) for seed in range(seeds) for setting in SETTINGS]
    missing = [run for run in wanted if run not in done]
    for setting, seed in track(missing, "runs", console=console, transient=True):
        loss = _loss(SETTINGS[setting](seed))
        runs.append({"setting": setting, "seed": seed, "loss": loss})
        write_json(record | {"runs": runs}, path)
    return path


@torch.no_grad()
def _loss(model: nn.Module) -> float:
    ids, labels = data()
    model.eval()
    return model(input_ids=ids, labels=labels).loss.item()
