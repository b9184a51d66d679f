"""LQA on several processes: each check runs on all ranks of one launch for each world size."""

import itertools
import math
import multiprocessing
import os
import re
import subprocess
import sys
import time
import traceback
import warnings
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from problems import (
    RecordingDropout,
    classification,
    identical,
    noisy_classification,
    values,
)
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from quadstep import LQA, Reason
from quadstep.direction import gather
from quadstep.parabola import Decision

SECONDS = 120
"""After this long a launch has hung, even beside other work."""
STEPS = 30
BATCH = 32

# First rates so large that what is measured decides from the first steps on, and rounding in the
# differences of losses does not.
CONFIGURATIONS = {
    "lqa-paper": LQA.paper,
    "lqa": lambda params, **own: LQA(params, direction="sgd", averaging=None, delta0=2.5, **own),
    "lqa(adamw)": lambda params, **own: LQA(torch.optim.AdamW(params, lr=0.3), **own),
    "lqa(momentum)": lambda params, **own: LQA(
        torch.optim.SGD(params, lr=0.5, momentum=0.9), averaging="schedule-free", **own
    ),
    "lqa-auto": lambda params, **own: LQA(params, delta0=0.03, weight_decay=0.1, **own),
}

THREE = ("lqa-paper", "lqa(adamw)", "lqa-auto")
MOVED = ("lqa(adamw)", "lqa-auto")

# What is run, on all ranks -------------------------------------------------------------------


def rank():
    return dist.get_rank()


def size():
    return dist.get_world_size()


@cache
def myself():
    """A group of this process alone."""
    return dist.new_subgroups(group_size=1)[0]


def share(task, step, parts=None, part=None):
    """The closure's data: this rank's part of the batch that one process takes whole."""
    picked = torch.arange(step * BATCH, (step + 1) * BATCH) % len(task.inputs)
    picked = picked[(rank() if part is None else part) :: parts or size()]
    return task.inputs[picked], task.labels[picked]


def train(opt, model, task, steps, parts=None, part=None):
    rates = []
    for step in steps:
        inputs, labels = share(task, step, parts, part)
        opt.step(lambda x=inputs, y=labels: functional.cross_entropy(model(x), y))
        rates.append(opt.rate)
    return rates


def whole(model):
    return [
        (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()
        for tensor in model.parameters()
    ]


@cache
def in_one_process(name, steps=STEPS):
    """Parameters, averaged parameters and rates of a run on the joined batches."""
    task = classification(dtype=torch.float64)
    opt = CONFIGURATIONS[name](task.model.parameters(), process_group=myself())
    rates = train(opt, task.model, task, range(steps), 1, 0)
    parameters = whole(task.model)
    opt.eval()
    return parameters, whole(task.model), rates


def agree(value):
    """Asserts that all ranks have the same value, bit for bit."""
    gathered = [None] * size()
    dist.all_gather_object(gathered, value)
    assert all(other == gathered[0] for other in gathered), gathered


def equals_one_process(parallelise, parts=None, part=None, names=None):
    for name in names or (CONFIGURATIONS if size() == 2 else THREE):
        task, model, opt = begun(name, parallelise)
        rates = train(opt, model, task, range(STEPS), parts, part)
        agree((rates, opt.report.forwards, opt.report.reason, opt.report.counts))
        parameters, averaged, expected = in_one_process(name)
        assert rates == pytest.approx(expected, rel=1e-9), name
        torch.testing.assert_close(whole(task.model), parameters, rtol=1e-9, atol=1e-9)
        opt.eval()
        torch.testing.assert_close(whole(task.model), averaged, rtol=1e-9, atol=1e-9)
        # Validation leaves parameters gathered; training must go on from its own.
        with torch.no_grad():
            model(task.inputs)
        opt.train()
        torch.testing.assert_close(whole(task.model), parameters, rtol=1e-9, atol=1e-9)
        train(opt, model, task, range(STEPS, STEPS + 3), parts, part)
        parameters, _, expected = in_one_process(name, STEPS + 3)
        assert opt.rate == pytest.approx(expected[-1], rel=1e-9), name
        torch.testing.assert_close(whole(task.model), parameters, rtol=1e-9, atol=1e-9)


def sharded(model, mesh=None, **options):
    """The last layer by itself and the others with the root, which FSDP leaves gathered."""
    fully_shard(model[-1], mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def split(model, mesh=None):
    mesh = mesh or init_device_mesh("cpu", (size(),))
    return parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})


def begun(name, parallelise=sharded):
    task = classification(dtype=torch.float64)
    model = parallelise(task.model)
    return task, model, CONFIGURATIONS[name](task.model.parameters())


def check_ddp_equals_one_process(_):
    equals_one_process(DistributedDataParallel)


def check_ddp_of_a_static_graph_and_of_bucket_views_equals_one_process(_):
    equals_one_process(
        lambda model: DistributedDataParallel(
            model, static_graph=True, gradient_as_bucket_view=True
        ),
        names=["lqa-auto"],
    )


def check_fsdp_equals_one_process(_):
    equals_one_process(sharded)


def check_fsdp_that_stays_gathered_equals_one_process(_):
    equals_one_process(
        lambda model: sharded(model, reshard_after_forward=False), names=["lqa", "lqa-auto"]
    )


def check_tensor_parallel_equals_one_process(_):
    equals_one_process(split, 1, 0, THREE if size() == 2 else ["lqa-auto"])


def check_partly_tensor_parallel_equals_one_process(_):
    """DTensors and plain tensors in one param group."""
    mesh = init_device_mesh("cpu", (size(),))
    plan = {"0": ColwiseParallel(output_layouts=Replicate())}
    equals_one_process(lambda model: parallelize_module(model, mesh, plan), 1, 0, THREE)


def check_two_dimensions_equal_one_process(_):
    """Data parallel by FSDP across, tensor parallel within: two meshes in one param group."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    plan = {"0": ColwiseParallel(output_layouts=Replicate())}
    equals_one_process(
        lambda model: sharded(parallelize_module(model, mesh["tensor"], plan), mesh["data"]),
        2,
        mesh["data"].get_local_rank(),
        ["lqa-auto"],
    )


def check_sequence_parallel_gradients_are_partial_sums(_):
    def build():
        torch.manual_seed(0)
        return nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 1)).double()

    x = torch.linspace(-1.0, 2.0, size() * 24, dtype=torch.float64).sin().reshape(1, -1, 8)
    mesh = init_device_mesh("cpu", (size(),))
    for name in THREE:
        configuration = CONFIGURATIONS[name]
        plain, model = build(), build()
        parallelize_module(model, mesh, {"0": SequenceParallel()})
        reference = configuration(plain.parameters(), process_group=myself())
        opt = configuration(model.parameters())
        for _step in range(12):
            reference.step(lambda m=plain: (m(x) - 1.0).square().mean())

            def loss(m=model):
                normed = m[0](x)
                return (m[1](normed.full_tensor()) - 1.0).square().mean()

            opt.step(loss)
        assert model[0].weight.grad.placements != model[0].weight.placements
        for block in gather(opt.param_groups, opt.rate):
            for param, direction in zip(block.params, block.direction, strict=True):
                assert not isinstance(param, DTensor) or direction.placements == param.placements
        assert opt.rate == pytest.approx(reference.rate, rel=1e-9)
        torch.testing.assert_close(whole(model), whole(plain), rtol=1e-9, atol=1e-9)


def check_a_loss_that_is_a_dtensor(_):
    mesh = init_device_mesh("cpu", (size(),))
    task = classification(dtype=torch.float64)
    model = split(task.model, mesh)
    opt = CONFIGURATIONS["lqa-auto"](model.parameters())
    for step in range(STEPS):
        inputs, labels = share(task, step, 1, 0)
        opt.step(
            lambda x=inputs, y=labels: DTensor.from_local(
                functional.cross_entropy(model(x), y), mesh, [Replicate()]
            )
        )
    parameters, _, rates = in_one_process("lqa-auto")
    assert opt.rate == pytest.approx(rates[-1], rel=1e-9)
    torch.testing.assert_close(whole(model), parameters, rtol=1e-9, atol=1e-9)


@contextmanager
def counted():
    """Counts what LQA itself sends; DDP and FSDP do not go through this function."""
    sent, original = [], dist.all_reduce

    def all_reduce(tensor, *args, **kwargs):
        sent.append(tensor.numel())
        return original(tensor, *args, **kwargs)

    dist.all_reduce = all_reduce
    try:
        yield sent
    finally:
        dist.all_reduce = original


def check_steps_stretch_alike_where_losses_are_free_of_noise(_):
    """The same batch at every step; the average, too, is drawn along with the shards."""
    alone = classification(dtype=torch.float64)
    expected = CONFIGURATIONS["lqa-auto"](alone.model.parameters(), process_group=myself())
    train(expected, alone.model, alone, [0] * 250, 1, 0)
    assert expected._averaging.stretch > 1.0
    expected.eval()
    for parallelise in (DistributedDataParallel, sharded):
        task, model, opt = begun("lqa-auto", parallelise)
        train(opt, model, task, [0] * 250)
        assert opt._averaging.stretch == pytest.approx(expected._averaging.stretch, rel=1e-6)
        opt.eval()
        torch.testing.assert_close(whole(model), whole(alone.model), rtol=1e-6, atol=1e-9)


def check_what_is_sent(_):
    """On the CPU two flags at every step, and all numbers together where it measures.

    They are two losses, three where the slope is checked and four at the first measurement, which
    evaluates the centre twice, the slope and the losses of the last ten steps.
    """
    for parallelise in (DistributedDataParallel, sharded):
        task = classification()
        model = parallelise(task.model)
        opt = LQA(task.model.parameters())
        for step in range(20):
            due, checked = opt._wait == 0, opt._search.agreement.due
            with counted() as sent:
                train(opt, model, task, [step])
            losses = 2 + checked + (step == 0)
            assert sent == ([2, losses + 11] if due else [2])
            assert opt.report.forwards == (losses if due else 1)
        assert not checked, "once the slopes have agreed"


class Fixed:
    """A search that leaves the rate alone: LQA must then be the plain optimizer."""

    parabola = agreement = None

    def radius(self, rate):
        return rate

    def decide(self, rate, points):
        return self, Decision(rate, rate, Reason.MINIMUM)


def check_only_some_ranks_draw_random_numbers(_):
    """As where only some have what to sample: all take as many passes all the same."""
    for two_phases in (False, True):
        task = classification()
        layers = (*task.model[:2], nn.Dropout(0.5 if rank() == 0 else 0.0), task.model[2])
        model = DistributedDataParallel(nn.Sequential(*layers))
        opt = LQA(model.parameters())
        for step in range(12):
            inputs, labels = share(task, step, None, None)

            def closure(inputs=inputs, labels=labels, model=model):
                return functional.cross_entropy(model(inputs), labels)

            loss = None
            if two_phases:
                opt.zero_grad()
                loss = closure()
                loss.backward()
            opt.step(closure, loss=loss)
        agree(opt.rate)


def check_ddp_probes_leave_no_trace(_):
    """Buffers, which DDP broadcasts, dropout and generators are those of plain DDP."""
    for options in ({}, {"find_unused_parameters": True}, {"static_graph": True}):
        for two_phase in (False, True):
            plain, probed = (noisy_classification(torch.float64) for _ in range(2))
            plain.ddp, probed.ddp = (
                DistributedDataParallel(task.model, **options) for task in (plain, probed)
            )
            base = torch.optim.SGD(plain.model.parameters(), lr=0.05)
            opt = LQA(torch.optim.SGD(probed.model.parameters(), lr=0.05))
            opt._search = Fixed()
            for step in range(6):
                inputs, labels = share(plain, step)

                def loss(task, x=inputs, y=labels):
                    return functional.cross_entropy(task.ddp(x), y)

                torch.manual_seed(100 * step + rank())
                base.zero_grad()
                loss(plain).backward()
                base.step()
                drawn = torch.rand(())
                torch.manual_seed(100 * step + rank())
                if two_phase:
                    opt.zero_grad()
                    first = loss(probed)
                    first.backward()
                    opt.step(lambda loss=loss, probed=probed: loss(probed), loss=first)
                else:
                    opt.step(lambda loss=loss, probed=probed: loss(probed))
                assert torch.equal(torch.rand(()), drawn)
                torch.testing.assert_close(
                    values(probed.model), values(plain.model), rtol=0, atol=1e-12
                )


def check_one_dropout_mask_for_each_rank(_):
    for parallelise in (DistributedDataParallel, sharded):
        dropout = RecordingDropout()
        masks = dropout.masks
        task = classification(nn.Linear(8, 16), nn.Softplus(), dropout, nn.Linear(16, 3))
        model = parallelise(task.model)
        opt = LQA(task.model.parameters(), direction="sgd")
        torch.manual_seed(rank())
        for step in range(3):
            masks.clear()
            train(opt, model, task, [step])
            assert len(masks) == opt.report.forwards >= 3
            assert all(torch.equal(masks[0], mask) for mask in masks)
        gathered = [torch.empty_like(masks[0]) for _ in range(size())]
        dist.all_gather(gathered, masks[0])
        assert not torch.equal(gathered[0], gathered[1])


def check_an_unused_parameter_on_some_ranks(_):
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.one, self.other = nn.Linear(4, 1), nn.Linear(4, 1)

        def forward(self, x, first):
            return self.one(x) + (self.other(x) if first else 0.0)

    model = Branching()
    ddp = DistributedDataParallel(model, find_unused_parameters=True)
    opt = LQA(model.parameters())
    torch.manual_seed(rank())
    for _step in range(12):
        x = torch.randn(16, 4)
        opt.step(lambda x=x: (ddp(x, rank() == 0) - x.sum(1, keepdim=True)).square().mean())
    agree((opt.rate, [param.tolist() for param in model.parameters()]))


def check_a_non_finite_loss_on_one_rank(_):
    """Whether it spreads to the gradients or not, all ranks undo the step, and none waits."""
    places = [("lqa", False, 1), ("lqa", False, 2), ("lqa-auto", False, 1), ("lqa-auto", True, 1)]
    bads = (lambda loss: loss * math.nan, lambda loss: loss + math.inf)
    for (name, held, failing), bad in itertools.product(places, bads):
        for parallelise in (DistributedDataParallel, sharded):
            task, model, opt = begun(name, parallelise)
            train(opt, model, task, range(3))
            opt._wait = int(held)
            before, calls = whole(task.model), []
            inputs, labels = share(task, 3)

            def closure(x=inputs, y=labels, m=model, c=calls, f=failing, bad=bad):
                c.append(1)
                loss = functional.cross_entropy(m(x), y)
                return bad(loss) if len(c) == f and rank() == size() - 1 else loss

            opt.step(closure)
            assert opt.report.reason is Reason.NON_FINITE, (name, held, failing)
            assert identical(before, whole(task.model))
            agree((opt.rate, len(calls)))
            train(opt, model, task, range(4, 6))
            agree(opt.rate)
            assert all(param.isfinite().all() for param in whole(task.model))


def check_an_exception_on_all_ranks_undoes_the_step(_):
    for parallelise in (DistributedDataParallel, sharded):
        task, model, opt = begun("lqa-auto", parallelise)
        train(opt, model, task, range(3))
        opt._wait = 0
        before, calls = whole(task.model), []
        with torch.no_grad():
            expected = model(task.inputs)

        def closure(task=task, model=model, calls=calls):
            calls.append(1)
            loss = functional.cross_entropy(model(task.inputs), task.labels)
            if len(calls) == 2:
                raise RuntimeError("injected")
            return loss

        with pytest.raises(RuntimeError, match="injected"):
            opt.step(closure)
        assert identical(before, whole(task.model))
        with torch.no_grad():
            assert torch.equal(model(task.inputs), expected)


def check_a_gradient_in_one_shard_moves_all_ranks(_):
    for name in ("lqa", "lqa-auto"):
        task, model, opt = begun(name)
        for _step in range(3):
            # The first row of each weight lives on the first rank.
            opt.step(lambda m=model, x=task.inputs: (m(x)[:, 0] - 1.0).square().mean())
            assert opt.report.reason is not Reason.HELD, name
        agree((opt.rate, opt.report.counts))
        before = whole(task.model)
        opt.step(lambda m=model, x=task.inputs: 0.0 * m(x).sum())
        assert opt.report.reason is Reason.HELD, name
        assert identical(whole(task.model), before), name


def check_uneven_data_through_a_sampler(_):
    """A distributed sampler gives all ranks the same number of batches, the last ones smaller."""
    task = classification(dtype=torch.float64)
    data = TensorDataset(task.inputs[:51], task.labels[:51])
    loader = DataLoader(data, batch_size=8, sampler=DistributedSampler(data, shuffle=False))
    ddp = DistributedDataParallel(task.model)
    opt = LQA(task.model.parameters(), direction="sgd")
    for _epoch in range(2):
        for x, y in loader:
            opt.step(lambda x=x, y=y: functional.cross_entropy(ddp(x), y))
    agree((opt.rate, [param.tolist() for param in task.model.parameters()]))


def check_a_rank_without_data_steps_on_a_loss_of_zero(_):
    """The rate minimises what DDP takes the gradient of: the mean of all ranks' losses."""
    task, reference = classification(dtype=torch.float64), classification(dtype=torch.float64)
    ddp = DistributedDataParallel(task.model)
    opt = LQA(task.model.parameters(), direction="sgd")
    alone = LQA(reference.model.parameters(), direction="sgd", process_group=myself())
    others = size() - 1
    for step in range(10):
        x, y = share(task, step)
        if rank() == others:
            opt.step(lambda: 0.0 * ddp(task.inputs[:1]).sum())
        else:
            opt.step(lambda x=x, y=y: functional.cross_entropy(ddp(x), y))
        parts = [share(task, step, part=part) for part in range(others)]
        alone.step(
            lambda parts=parts: (
                sum(functional.cross_entropy(reference.model(x), y) for x, y in parts) / size()
            )
        )
    assert opt.rate == pytest.approx(alone.rate, rel=1e-9)
    torch.testing.assert_close(values(task.model), values(reference.model), rtol=1e-9, atol=1e-9)


def check_joining_stops_all_ranks_together(_):
    task = classification()
    ddp = DistributedDataParallel(task.model)
    opt = LQA(task.model.parameters())
    taken = 0
    with (  # noqa: PT012
        pytest.raises(RuntimeError, match="exhausted"),
        ddp.join(throw_on_early_termination=True),
    ):
        for step in range(13 + rank()):
            train(opt, ddp, task, [step])
            taken += 1
    assert taken == 13
    agree((opt.rate, opt.report.counts, [param.tolist() for param in task.model.parameters()]))


def check_joining_without_the_others_is_refused(_):
    for taken in (0, 1):
        task = classification()
        ddp = DistributedDataParallel(task.model)
        opt = LQA(task.model.parameters())
        train(opt, ddp, task, range(taken))
        before = values(task.model)
        with (
            pytest.raises(RuntimeError, match=r"use ddp.join\(throw_on_early_termination=True\)"),
            ddp.join(),
        ):
            train(opt, ddp, task, [0])
        assert identical(before, values(task.model))


def check_groups_train_by_themselves(_):
    group, _ = dist.new_subgroups(group_size=2)
    task = classification(dtype=torch.float64)
    ddp = DistributedDataParallel(task.model, process_group=group)
    opt = LQA(task.model.parameters(), process_group=group)
    train(opt, ddp, task, range(12 if rank() < 2 else 15))
    gathered = [None] * size()
    dist.all_gather_object(gathered, opt.rate)
    assert gathered[0] == gathered[1] != gathered[2] == gathered[3]


def check_state_is_laid_out_as_the_parameters(_):
    for parallelise in (sharded, split):
        task = classification()
        model = parallelise(task.model)
        opt = LQA(model.parameters())
        train(opt, model, task, range(3), 1, 0)
        for param, state in opt.state.items():
            for key in ("square", "z"):
                assert state[key].placements == param.placements
                assert state[key].device_mesh == param.device_mesh


def check_two_phases_with_clipping_equal_one_process(_):
    def two_phases(parallelise, parts, part, **own):
        task = classification(dtype=torch.float64)
        model = parallelise(task.model)
        opt = CONFIGURATIONS["lqa-auto"](task.model.parameters(), **own)
        for step in range(15):
            x, y = share(task, step, parts, part)
            opt.zero_grad()
            loss = functional.cross_entropy(model(x), y)
            loss.backward()
            nn.utils.clip_grad_norm_(task.model.parameters(), 0.1)
            opt.step(lambda m=model, x=x, y=y: functional.cross_entropy(m(x), y), loss=loss)
        return whole(task.model), opt.rate

    expected, rate = two_phases(lambda model: model, 1, 0, process_group=myself())
    for parallelise in (DistributedDataParallel, sharded):
        parameters, measured = two_phases(parallelise, None, None)
        assert measured == pytest.approx(rate, rel=1e-9)
        torch.testing.assert_close(parameters, expected, rtol=1e-9, atol=1e-9)


# Checkpoints ---------------------------------------------------------------------------------


def load(path, model, opt, **options):
    options = StateDictOptions(**options)
    weights, state = get_state_dict(model, opt, options=options)
    dcp.load({"model": weights, "optim": state}, checkpoint_id=path)
    set_state_dict(model, opt, model_state_dict=weights, optim_state_dict=state, options=options)


def save(path, model, opt, **options):
    weights, state = get_state_dict(model, opt, options=StateDictOptions(**options))
    dcp.save({"model": weights, "optim": state}, checkpoint_id=path)


def check_checkpoints_resume_bit_for_bit(folder):
    runs = [(sharded, name) for name in THREE]
    for parallelise, name in [*runs, (split, "lqa-auto"), (DistributedDataParallel, "lqa-auto")]:
        data = (1, 0) if parallelise is split else (None, None)
        path = folder / f"same-{size()}-{parallelise.__name__}-{name}"
        task, model, opt = begun(name, parallelise)
        train(opt, model, task, range(13), *data)
        save(path, model, opt)
        train(opt, model, task, range(13, STEPS), *data)
        _, resumed, other = begun(name, parallelise)
        load(path, resumed, other)
        train(other, resumed, task, range(13, STEPS), *data)
        assert identical(whole(resumed), whole(model))
        assert other.report == opt.report


def check_whole_checkpoints_on_rank_0(folder):
    """The options with which the first rank alone holds everything, in the memory of the CPU."""
    options = {"full_state_dict": True, "cpu_offload": True}
    task, model, opt = begun("lqa-auto")
    train(opt, model, task, range(13))
    weights, state = get_state_dict(model, opt, options=StateDictOptions(**options))
    if rank() == 0:
        torch.save((weights, state), folder / f"whole-{size()}")
    train(opt, model, task, range(13, STEPS))
    _, resumed, other = begun("lqa-auto")
    weights, state = torch.load(folder / f"whole-{size()}") if rank() == 0 else ({}, {})
    broadcast = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(resumed, weights, options=broadcast)
    set_optimizer_state_dict(resumed, other, state, options=broadcast)
    train(other, resumed, task, range(13, STEPS))
    assert identical(whole(resumed), whole(model))
    assert other.report == opt.report


def check_full_checkpoints_load_where_parameters_were_changed(folder):
    for parallelise in (sharded, DistributedDataParallel):
        task, model, opt = begun("lqa-auto", parallelise)
        _, other, loaded = begun("lqa-auto", parallelise)
        for step in range(13):
            train(opt, model, task, [step])
            with torch.no_grad():
                next(model.parameters()).clamp_(-0.1, 0.1)
        path = folder / f"changed-{size()}-{parallelise.__name__}"
        save(path, model, opt, full_state_dict=True)
        load(path, other, loaded, full_state_dict=True)
        for each, owner in ((opt, model), (loaded, other)):
            train(each, owner, task, range(13, 20))
        torch.testing.assert_close(whole(other), whole(model), rtol=1e-6, atol=1e-6)


def check_reading_the_state_of_a_fresh_optimizer_changes_nothing(_):
    for name in THREE:
        task, model, opt = begun(name)
        _, other, asked = begun(name)
        get_state_dict(other, asked)
        train(opt, model, task, range(8))
        train(asked, other, task, range(8))
        assert identical(whole(model), whole(other))
        assert opt.report == asked.report


def check_a_loaded_average_is_validated_and_trained_on(folder):
    """What FSDP gathered to validate must not be what the first step after it sees."""
    task, model, opt = begun("lqa-auto")
    train(opt, model, task, range(13))
    opt.eval()
    save(folder / f"average-{size()}", model, opt)
    for optimizer, owner, exact in [(opt, model, True), *map(in_mode, (True, False))]:
        if optimizer is not opt:
            load(folder / f"average-{size()}", owner, optimizer)
        with torch.no_grad():
            owner(task.inputs)
        optimizer.train()
        train(optimizer, owner, task, range(13, 16))
        if exact:
            assert identical(whole(owner), whole(model))
        else:
            torch.testing.assert_close(whole(owner), whole(model), rtol=1e-9, atol=1e-9)


def in_mode(evaluating):
    """Something to load an average into: bit for bit in the mode that it was saved in."""
    _, model, opt = begun("lqa-auto")
    if evaluating:
        opt.eval()
    return opt, model, evaluating


def check_what_is_enforced_after_each_step_holds_in_the_average(_):
    def enforce(model):
        with torch.no_grad():
            for param in model.parameters():
                param.clamp_(-0.25, 0.25)

    alone = classification(dtype=torch.float64)
    expected = CONFIGURATIONS["lqa-auto"](alone.model.parameters(), process_group=myself())
    for step in range(STEPS):
        train(expected, alone.model, alone, [step], 1, 0)
        enforce(alone.model)
    training = whole(alone.model)
    expected.eval()
    for parallelise in (DistributedDataParallel, sharded, split):
        data = (1, 0) if parallelise is split else (None, None)
        task, model, opt = begun("lqa-auto", parallelise)
        for step in range(STEPS):
            train(opt, model, task, [step], *data)
            enforce(model)
        agree([sorted(own) for own in opt.state.values()])
        assert any("left" in own for own in opt.state.values())
        torch.testing.assert_close(whole(model), training, rtol=1e-9, atol=1e-9)
        opt.eval()
        torch.testing.assert_close(whole(model), whole(alone.model), rtol=1e-9, atol=1e-9)
        assert max(param.abs().max() for param in whole(model)) == 0.25
        opt.train()
        torch.testing.assert_close(whole(model), training, rtol=1e-9, atol=1e-9)


def save_for_others(folder):
    for name in MOVED:
        task, model, opt = begun(name)
        train(opt, model, task, range(13))
        save(folder / f"from-{size()}-{name}", model, opt)


def check_a_checkpoint_moves_to_another_number_of_ranks(folder):
    for name in MOVED:
        task, model, opt = begun(name)
        load(folder / f"from-{6 - size()}-{name}", model, opt)
        train(opt, model, task, range(13, STEPS))
        parameters, _, rates = in_one_process(name)
        assert opt.rate == pytest.approx(rates[-1], rel=1e-9)
        torch.testing.assert_close(whole(model), parameters, rtol=1e-9, atol=1e-9)


# How it is run -------------------------------------------------------------------------------

MOVES = check_a_checkpoint_moves_to_another_number_of_ranks
FOUR_ALONE = {check_two_dimensions_equal_one_process, check_groups_train_by_themselves}
FOUR = FOUR_ALONE | {
    check_ddp_equals_one_process,
    check_fsdp_equals_one_process,
    check_tensor_parallel_equals_one_process,
    check_what_is_sent,
    check_a_non_finite_loss_on_one_rank,
    check_a_gradient_in_one_shard_moves_all_ranks,
    check_uneven_data_through_a_sampler,
    check_a_rank_without_data_steps_on_a_loss_of_zero,
    check_joining_stops_all_ranks_together,
}
CHECKS = {
    name.removeprefix("check_"): function
    for name, function in list(globals().items())
    if name.startswith("check_")
}
LAUNCHES = {
    "2": (2, {name: run for name, run in CHECKS.items() if run not in FOUR_ALONE | {MOVES}}),
    "4": (4, {name: run for name, run in CHECKS.items() if run in FOUR | {MOVES}}),
    "2 from 4": (2, {name: run for name, run in CHECKS.items() if run is MOVES}),
}


def work(index, ranks, launch, folder):
    """One process of a launch: writes down what went wrong, check by check."""
    torch.set_num_threads(1)
    warnings.filterwarnings("error", module="quadstep")
    outcomes = {}
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/{launch}",
        rank=index,
        world_size=ranks,
        timeout=timedelta(seconds=60),
    )
    # The other numbers of ranks go on from these.
    saving = {"saves": save_for_others} if launch in ("2", "4") else {}
    for name, check in (saving | LAUNCHES[launch][1]).items():
        began = time.monotonic()
        try:
            check(folder)
            outcomes[name] = ""
        except BaseException:
            outcomes[name] = traceback.format_exc()
        if "QUADSTEP_TIMES" in os.environ and not index:
            print(f"{launch} {name} {time.monotonic() - began:.1f}", flush=True)
        torch.save(outcomes, folder / f"outcomes-{launch}-{index}")
        if outcomes[name]:
            # The ranks are out of step now, nothing that follows would mean anything.
            os._exit(1)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """The outcomes of all launches: rank by rank, what each check raised."""
    folder = tmp_path_factory.mktemp("distributed")
    context = multiprocessing.get_context("forkserver")
    # What takes seconds to import is imported once for all processes.
    context.set_forkserver_preload(["test_distributed", "torch._dynamo"])
    found = {}
    for launch, (ranks, _) in LAUNCHES.items():
        processes = [
            context.Process(target=work, args=(index, ranks, launch, folder), daemon=True)
            for index in range(ranks)
        ]
        for process in processes:
            process.start()
        deadline = time.monotonic() + SECONDS
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
        for process in processes:
            process.kill()
        files = [folder / f"outcomes-{launch}-{index}" for index in range(ranks)]
        found[launch] = [torch.load(file) if file.exists() else {} for file in files]
    return found


@pytest.mark.parametrize(
    ("launch", "check"), [(launch, check) for launch in LAUNCHES for check in LAUNCHES[launch][1]]
)
def test_on_ranks(outcomes, launch, check):
    failures = [
        outcome.get(check, "did not finish: " + next(filter(None, outcome.values()), ""))
        for outcome in outcomes[launch]
    ]
    assert not any(failures), "\n".join(
        f"rank {index}: {failure}" for index, failure in enumerate(failures)
    )


def test_the_page_on_distributed_training_runs_as_it_stands(tmp_path):
    page = (Path(__file__).parents[1] / "docs" / "recipes" / "distributed.md").read_text()
    script = tmp_path / "train.py"
    script.write_text(page.split("```python\n")[1].split("```")[0])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*torchrun, "--nproc-per-node", "2", script],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    # Processes may write into each other's lines.
    rates = re.findall(r"rate ([\d.e-]+)", done.stdout)
    assert len(rates) == 2
    assert rates[0] == rates[1]
