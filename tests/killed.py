"""A job that is killed again and again: run as `python killed.py DIR KILLS SEED`.

One process imports torch and forks the lives of the job, so that twenty of them take seconds. It
prints, for each configuration, how many lives were killed in mid-run and the digests of the final
parameters with and without kills.
"""

import hashlib
import json
import os
import random
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import torch
from configurations import CONFIGURATIONS
from problems import noisy_classification, values
from torch.nn import functional

from quadstep import LQA

STEPS, EVERY = 121, 3
"""The last step comes after the last checkpoint: its report is compared too, and is not saved."""


def live(name: str, folder: Path) -> None:
    """Trains to the end, from the last checkpoint on if there is one."""
    task = noisy_classification()
    opt = CONFIGURATIONS[name](task.model.parameters())
    torch.manual_seed(0)
    checkpoint, done = folder / "checkpoint.pt", 0
    if checkpoint.exists():
        state = torch.load(checkpoint)
        task.model.load_state_dict(state["model"])
        opt.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"])
        done = state["done"]
    for step in range(done, STEPS):
        batch = torch.randint(256, (32,))
        opt.step(
            lambda batch=batch: functional.cross_entropy(
                task.model(task.inputs[batch]), task.labels[batch]
            )
        )
        if (step + 1) % EVERY == 0:
            partial = folder / "partial.pt"
            state = {
                "model": task.model.state_dict(),
                "optimizer": opt.state_dict(),
                "random": torch.get_rng_state(),
                "done": step + 1,
            }
            torch.save(state, partial)
            os.replace(partial, checkpoint)
    digest = hashlib.sha256()
    for tensor in values(task.model):
        digest.update(tensor.numpy().tobytes())
    digest.update(repr(opt.report).encode())
    (folder / "digest").write_text(digest.hexdigest())


def spawn(name: str, folder: Path) -> int:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            live(name, folder)
            code = 0
        finally:
            os._exit(code)
    return child


def finish(name: str, folder: Path) -> str:
    folder.mkdir(exist_ok=True)
    _, status = os.waitpid(spawn(name, folder), 0)
    assert os.waitstatus_to_exitcode(status) == 0
    return (folder / "digest").read_text()


def main(folder: Path, kills: int, seed: int) -> None:
    torch.set_num_threads(1)
    # What the first step of a process imports and sets up; autograd would not survive a fork.
    with suppress(TypeError), torch.compiler.set_stance("force_eager"):
        LQA([torch.zeros(())]).step()
    dice = random.Random(seed)
    results = {}
    for name in CONFIGURATIONS:
        uninterrupted, parts = folder / f"{name}-uninterrupted", folder / f"{name}-parts"
        started = time.perf_counter()
        expected = finish(name, uninterrupted)
        # Lives begin with loading: together they get through some part of the run.
        longest = 3.0 * (time.perf_counter() - started) / kills
        parts.mkdir()
        killed = 0
        for _ in range(kills):
            child = spawn(name, parts)
            time.sleep(dice.uniform(0.0, longest))
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            killed += os.waitstatus_to_exitcode(status) == -signal.SIGKILL
        checkpoint = parts / "checkpoint.pt"
        done = torch.load(checkpoint)["done"] if checkpoint.exists() else 0
        results[name] = {
            "killed": killed,
            "done": done,
            "expected": expected,
            "digest": finish(name, parts),
        }
    print(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
