"""What checks on several processes share: models in parallel, parts of batches, agreement."""

from functools import cache

import torch
import torch.distributed as dist
from problems import classification
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional

from quadstep import LQA

STEPS = 30
BATCH = 32

# First rates so large that what is measured decides from the first steps on, and rounding in the
# differences of losses does not.
CONFIGURATIONS = {
    "lqa-paper": LQA.paper,
    "lqa": lambda params, **own: LQA(
        params, direction="gradient", averaging=None, delta0=2.5, **own
    ),
    "lqa(adamw)": lambda params, **own: LQA(torch.optim.AdamW(params, lr=0.3), **own),
    "lqa(momentum)": lambda params, **own: LQA(
        torch.optim.SGD(params, lr=0.5, momentum=0.9), averaging="schedule-free", **own
    ),
    "lqa-auto": lambda params, **own: LQA(params, delta0=0.03, weight_decay=0.1, **own),
}

THREE = ("lqa-paper", "lqa(adamw)", "lqa-auto")


def rank():
    return dist.get_rank()


def size():
    return dist.get_world_size()


@cache
def this_process():
    """The group of this process alone."""
    return dist.new_subgroups(group_size=1)[0]


def share(task, step, parts=None, part=None):
    """The closure's data: this rank's part of the batch that one process takes alone."""
    picked = torch.arange(step * BATCH, (step + 1) * BATCH) % len(task.inputs)
    picked = picked[(rank() if part is None else part) :: parts or size()]
    return task.inputs[picked], task.labels[picked]


def train_on_shares(opt, model, task, steps, parts=None, part=None):
    """Steps on this rank's parts of the batches of these numbers; returns the rates."""
    rates = []
    for step in steps:
        inputs, labels = share(task, step, parts, part)
        opt.step(lambda x=inputs, y=labels: functional.cross_entropy(model(x), y))
        rates.append(opt.rate)
    return rates


def full(model):
    """Copies of the parameters, gathered from all ranks."""
    return gathered(dict(model.named_parameters()))


def gathered(state_dict):
    """Copies of the tensors of a state dict, gathered from all ranks."""
    return [
        (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()
        for tensor in state_dict.values()
    ]


@cache
def in_one_process(name, steps=STEPS):
    """Parameters, averaged parameters and rates of a run on the joined batches."""
    task = classification(dtype=torch.float64)
    opt = CONFIGURATIONS[name](task.model.parameters(), process_group=this_process())
    rates = train_on_shares(opt, task.model, task, range(steps), 1, 0)
    parameters = full(task.model)
    opt.eval()
    return parameters, full(task.model), rates


def agree(value):
    """Asserts that all ranks have the same value, bit for bit."""
    gathered = [None] * size()
    dist.all_gather_object(gathered, value)
    assert all(other == gathered[0] for other in gathered), gathered


def sharded(model, mesh=None, **options):
    """The last layer by itself and the others with the root, which FSDP leaves gathered."""
    fully_shard(model[-1], mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def split(model, mesh=None):
    """Tensor parallel: each rank has some of the units of the hidden layer."""
    mesh = mesh or init_device_mesh("cpu", (size(),))
    return parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})


def begun(name, parallelise=sharded):
    """A task, its model in parallel, and its optimizer."""
    task = classification(dtype=torch.float64)
    model = parallelise(task.model)
    return task, model, CONFIGURATIONS[name](task.model.parameters())
