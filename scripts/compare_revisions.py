"""Compares the steps of two revisions of the library to the last bit, on this machine.

    python scripts/compare_revisions.py OLD [NEW]

NEW is the working tree unless it is given. Either trains each configuration on each job, in one
thread; the loss, the rate, the parameters and the buffers after each step must be the same bits,
and so must the averaged weights at the end. Exits with 1 where any are not.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn, optim
from torch.nn.functional import cross_entropy

ROOT = Path(__file__).resolve().parent.parent
STEPS = 300


@dataclass(frozen=True)
class Job:
    """A small training job.

    Attributes:
        batch: rows a step; None takes all.
        noisy: whether the network has dropout and batch normalisation.
        two_phases: whether the caller runs backward, and clips.
    """

    batch: int | None = 32
    noisy: bool = False
    two_phases: bool = False


JOBS = {
    "batches": Job(),
    "batches of 4": Job(batch=4),
    "full batches": Job(batch=None),
    "dropout": Job(noisy=True),
    "two phases": Job(two_phases=True),
}


def configurations() -> dict[str, Callable[[Any], Any]]:
    """What is trained, by the public interface that both revisions have."""
    from quadstep import LQA

    def gradient(params: Any) -> LQA:
        try:
            return LQA(params, direction="gradient")
        except ValueError:
            # What older revisions call their gradient.
            return LQA(params, direction="sgd")

    return {
        "LQA(params)": LQA,
        'LQA(params, direction="gradient")': gradient,
        "LQA(AdamW)": lambda params: LQA(optim.AdamW(params)),
        "LQA(SGD)": lambda params: LQA(optim.SGD(params, lr=0.01, momentum=0.9)),
        "LQA(AdamW), averaged": lambda params: LQA(
            optim.AdamW(params, betas=(0.0, 0.999)), averaging="schedule-free"
        ),
        "LQA.paper(params)": LQA.paper,
    }


def digests(build: Callable[[Any], Any], job: Job) -> Iterator[str]:
    """Yields a digest of each step, and one of the averaged weights."""
    torch.manual_seed(0)
    inputs = torch.randn(512, 20)
    labels = inputs[:, :4].argmax(1)
    noise = [nn.BatchNorm1d(48), nn.Dropout(0.2)] if job.noisy else []
    model = nn.Sequential(nn.Linear(20, 48), *noise, nn.ReLU(), nn.Linear(48, 4))
    opt = build(model.parameters())

    def digest(*values: float) -> str:
        tensors = (*model.parameters(), *model.buffers())
        state = b"".join(tensor.detach().numpy().tobytes() for tensor in tensors)
        return hashlib.sha256(repr(values).encode() + state).hexdigest()[:16]

    for _ in range(STEPS):
        rows = slice(None) if job.batch is None else torch.randint(512, (job.batch,))

        def closure(rows: Any = rows) -> torch.Tensor:
            return cross_entropy(model(inputs[rows]), labels[rows])

        if job.two_phases:
            opt.zero_grad()
            loss = closure()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            opt.step(closure, loss=loss)
        else:
            loss = opt.step(closure)
        yield digest(loss.item(), opt.rate)
    opt.eval()
    yield digest()


def train() -> dict[str, list[str]]:
    """Trains all configurations on all jobs with the library that is imported."""
    torch.set_num_threads(1)
    return {
        f"{name} on {title}": list(digests(build, job))
        for name, build in configurations().items()
        for title, job in JOBS.items()
    }


def run(source: Path) -> dict[str, list[str]]:
    """Trains with the library in a folder, in a separate process."""
    done = subprocess.run(
        [sys.executable, __file__, "--train", source],
        env=os.environ | {"PYTHONPATH": str(source)},
        check=True,
        stdout=subprocess.PIPE,
    )
    return json.loads(done.stdout)


def check_out(revision: str, folder: Path) -> Path:
    """Unpacks the library of a revision into a new folder."""
    folder.mkdir()
    archive = ["git", "archive", revision, "src/quadstep"]
    packed = subprocess.run(archive, cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout
    subprocess.run(["tar", "-x", "-C", folder], input=packed, check=True)
    return folder / "src"


def compare(old: str, new: str | None = None) -> int:
    """Prints a line for each configuration and job; returns the exit status."""
    with tempfile.TemporaryDirectory() as folder:
        before = run(check_out(old, Path(folder, "old")))
        after = run(ROOT / "src" if new is None else check_out(new, Path(folder, "new")))
    differ = False
    for name, steps in before.items():
        pairs = zip(steps, after[name], strict=True)
        first = next((step for step, (one, other) in enumerate(pairs, 1) if one != other), None)
        differ = differ or first is not None
        print(f"{name:50} {'same bits' if first is None else f'differs from step {first} on'}")
    return int(differ)


if __name__ == "__main__":
    if sys.argv[1] == "--train":
        import quadstep

        assert Path(quadstep.__file__).is_relative_to(sys.argv[2]), quadstep.__file__
        print(json.dumps(train()))
    else:
        sys.exit(compare(*sys.argv[1:]))
