"""The tasks, by name; each is a function in the file of its group."""

from quadstep_bench.selftuning.problem import TASKS
from quadstep_bench.selftuning.tasks import awkward, finetuning, scratch

__all__ = ["TASKS", "awkward", "finetuning", "scratch"]
