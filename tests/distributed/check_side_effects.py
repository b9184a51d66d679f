"""What is sent, how often closures run, and that probes are free of side effects."""

from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from problems import RecordingDropout, classification, noisy_classification, values
from ranks import agree, rank, sharded, share, size, train_on_shares
from seams import pin_rate
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from training import backward_of, step_in_two_phases

from quadstep import LQA, Reason


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


def check_what_is_sent(_):
    """On the CPU two flags at every step, and all numbers together where it measures.

    They are two losses, three where the slope is checked and four at the first measurement, which
    evaluates the centre twice, the slope and the losses of the last ten steps.
    """
    for parallelise in (DistributedDataParallel, sharded):
        task = classification()
        model = parallelise(task.model)
        opt = LQA(task.model.parameters())
        measured = []
        for step in range(20):
            with counted() as sent:
                train_on_shares(opt, model, task, [step])
            losses = opt.report.forwards
            if opt.report.reason is Reason.REUSED:
                assert (sent, losses) == ([2], 1)
            else:
                assert sent == [2, losses + 11]
                measured.append(losses)
        first, *others, last = measured
        assert first == 4
        assert set(others) == {2, 3}
        assert last == 2, "once the slopes have agreed"


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
                loss = backward_of(opt, closure)
            opt.step(closure, loss=loss)
        agree(opt.rate)


def check_ddp_probes_are_free_of_side_effects(_):
    """Buffers, which DDP broadcasts, dropout and generators are those of plain DDP."""
    with pytest.MonkeyPatch.context() as patch:
        pin_rate(patch)
        for options in ({}, {"find_unused_parameters": True}, {"static_graph": True}):
            for two_phases in (False, True):
                compare_with_plain_ddp(options, two_phases)


def compare_with_plain_ddp(options, two_phases):
    plain, probed = (noisy_classification(torch.float64) for _ in range(2))
    plain.ddp, probed.ddp = (
        DistributedDataParallel(task.model, **options) for task in (plain, probed)
    )
    base = torch.optim.SGD(plain.model.parameters(), lr=0.05)
    opt = LQA(torch.optim.SGD(probed.model.parameters(), lr=0.05))
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
        step_once = step_in_two_phases if two_phases else LQA.step
        step_once(opt, lambda loss=loss: loss(probed))
        assert torch.equal(torch.rand(()), drawn)
        torch.testing.assert_close(values(probed.model), values(plain.model), rtol=0, atol=1e-12)


def check_one_dropout_mask_for_each_rank(_):
    for parallelise in (DistributedDataParallel, sharded):
        dropout = RecordingDropout()
        masks = dropout.masks
        task = classification(nn.Linear(8, 16), nn.Softplus(), dropout, nn.Linear(16, 3))
        model = parallelise(task.model)
        opt = LQA(task.model.parameters(), direction="gradient", averaging=None)
        torch.manual_seed(rank())
        for step in range(3):
            masks.clear()
            train_on_shares(opt, model, task, [step])
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
