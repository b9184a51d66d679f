"""Faults on some ranks, and ranks that have less data than others."""

import itertools
import math

import pytest
import torch
from problems import classification, identical, values
from ranks import agree, begun, full, rank, sharded, share, size, this_process, train_on_shares
from seams import is_due
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from training import raising, with_fault

from quadstep import LQA, Reason


def check_a_non_finite_loss_on_one_rank(_):
    """Whether it spreads to the gradients or not, all ranks undo the step, and none waits."""
    places = [("lqa", False, 1), ("lqa", False, 2), ("lqa-auto", False, 1), ("lqa-auto", True, 1)]
    bads = (lambda loss: loss * math.nan, lambda loss: loss + math.inf)
    for (name, reused, failing), bad in itertools.product(places, bads):
        for parallelise in (DistributedDataParallel, sharded):
            task, model, opt = begun(name, parallelise)
            train_on_shares(opt, model, task, range(3))
            while is_due(opt) == reused:
                train_on_shares(opt, model, task, [3])
            before = full(task.model)
            inputs, labels = share(task, 3)

            def closure(x=inputs, y=labels, m=model):
                return functional.cross_entropy(m(x), y)

            if rank() == size() - 1:
                closure = with_fault(closure, failing, bad)
            opt.step(closure)
            assert opt.report.reason is Reason.NON_FINITE, (name, reused, failing)
            assert identical(before, full(task.model))
            agree((opt.rate, opt.report.forwards))
            train_on_shares(opt, model, task, range(4, 6))
            agree(opt.rate)
            assert all(param.isfinite().all() for param in full(task.model))


def check_an_exception_on_all_ranks_undoes_the_step(_):
    for parallelise in (DistributedDataParallel, sharded):
        task, model, opt = begun("lqa-auto", parallelise)
        train_on_shares(opt, model, task, range(3))
        while not is_due(opt):
            train_on_shares(opt, model, task, [3])
        before = full(task.model)
        with torch.no_grad():
            expected = model(task.inputs)

        def closure(task=task, model=model):
            return functional.cross_entropy(model(task.inputs), task.labels)

        with pytest.raises(RuntimeError, match="injected"):
            opt.step(with_fault(closure, 2, raising(RuntimeError)))
        assert identical(before, full(task.model))
        with torch.no_grad():
            assert torch.equal(model(task.inputs), expected)


def check_a_gradient_in_one_shard_moves_all_ranks(_):
    for name in ("lqa", "lqa-auto"):
        task, model, opt = begun(name)
        for _step in range(3):
            # The first row of each weight lives on the first rank.
            opt.step(lambda m=model, x=task.inputs: (m(x)[:, 0] - 1.0).square().mean())
            assert opt.report.reason is not Reason.REUSED, name
        agree((opt.rate, opt.report.counts))
        before = full(task.model)
        opt.step(lambda m=model, x=task.inputs: 0.0 * m(x).sum())
        assert opt.report.reason is Reason.REUSED, name
        assert identical(full(task.model), before), name


def check_uneven_data_through_a_sampler(_):
    """A distributed sampler gives all ranks the same number of batches, the last ones smaller."""
    task = classification(dtype=torch.float64)
    data = TensorDataset(task.inputs[:51], task.labels[:51])
    loader = DataLoader(data, batch_size=8, sampler=DistributedSampler(data, shuffle=False))
    ddp = DistributedDataParallel(task.model)
    opt = LQA(task.model.parameters(), direction="gradient", averaging=None)
    for _epoch in range(2):
        for x, y in loader:
            opt.step(lambda x=x, y=y: functional.cross_entropy(ddp(x), y))
    agree((opt.rate, [param.tolist() for param in task.model.parameters()]))


def check_a_rank_without_data_steps_on_a_loss_of_zero(_):
    """The rate minimizes what DDP takes the gradient of: the mean of all ranks' losses."""
    task, reference = classification(dtype=torch.float64), classification(dtype=torch.float64)
    ddp = DistributedDataParallel(task.model)
    opt = LQA(task.model.parameters(), direction="gradient", averaging=None)
    alone = LQA(
        reference.model.parameters(),
        direction="gradient",
        averaging=None,
        process_group=this_process(),
    )
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
            train_on_shares(opt, ddp, task, [step])
            taken += 1
    assert taken == 13
    agree((opt.rate, opt.report.counts, [param.tolist() for param in task.model.parameters()]))


def check_joining_without_the_others_is_refused(_):
    for taken in (0, 1):
        task = classification()
        ddp = DistributedDataParallel(task.model)
        opt = LQA(task.model.parameters())
        train_on_shares(opt, ddp, task, range(taken))
        before = values(task.model)
        with (
            pytest.raises(RuntimeError, match=r"use ddp.join\(throw_on_early_termination=True\)"),
            ddp.join(),
        ):
            train_on_shares(opt, ddp, task, [0])
        assert identical(before, values(task.model))
