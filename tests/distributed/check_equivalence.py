"""Training on several processes takes the steps of one process on the joined batches."""

from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from problems import classification
from ranks import (
    CONFIGURATIONS,
    STEPS,
    THREE,
    agree,
    begun,
    full,
    in_one_process,
    rank,
    sharded,
    share,
    size,
    split,
    this_process,
    train_on_shares,
)
from seams import momentum_scale, watched
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, SequenceParallel, parallelize_module
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from quadstep import LQA


def equals_one_process(parallelise, parts=None, part=None, names=None):
    for name in names or (CONFIGURATIONS if size() == 2 else THREE):
        task, model, opt = begun(name, parallelise)
        rates = train_on_shares(opt, model, task, range(STEPS), parts, part)
        agree((rates, opt.report.forwards, opt.report.reason, opt.report.counts))
        parameters, averaged, expected = in_one_process(name)
        assert rates == pytest.approx(expected, rel=1e-9), name
        torch.testing.assert_close(full(task.model), parameters, rtol=1e-9, atol=1e-9)
        opt.eval()
        torch.testing.assert_close(full(task.model), averaged, rtol=1e-9, atol=1e-9)
        # Validation leaves parameters gathered; training must go on from its own.
        with torch.no_grad():
            model(task.inputs)
        opt.train()
        torch.testing.assert_close(full(task.model), parameters, rtol=1e-9, atol=1e-9)
        train_on_shares(opt, model, task, range(STEPS, STEPS + 3), parts, part)
        parameters, _, expected = in_one_process(name, STEPS + 3)
        assert opt.rate == pytest.approx(expected[-1], rel=1e-9), name
        torch.testing.assert_close(full(task.model), parameters, rtol=1e-9, atol=1e-9)


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


@contextmanager
def unsynchronized(model):
    """Accumulates gradients on each rank alone."""
    if isinstance(model, DistributedDataParallel):
        with model.no_sync():
            yield
    else:
        model.set_requires_gradient_sync(False)
        yield
        model.set_requires_gradient_sync(True)


def check_recorded_calls_equal_closures(_):
    """Also of accumulated parts, of which the last alone synchronizes."""
    for parallelise, name, inner in [
        (DistributedDataParallel, "lqa-auto", True),
        (DistributedDataParallel, "lqa-auto", False),
        (DistributedDataParallel, "lqa(adamw)", False),
        (sharded, "lqa-auto", False),
        (sharded, "lqa-paper", False),
    ]:
        _, reference_model, reference = begun(name, parallelise)
        task = classification(dtype=torch.float64)
        model = parallelise(task.model)
        criterion = nn.CrossEntropyLoss()
        recorded = {"model": task.model if inner else model, "criterion": criterion}
        opt = CONFIGURATIONS[name](model.parameters(), **recorded)
        rates = []
        for step in range(STEPS):
            inputs, labels = share(task, step)
            opt.zero_grad()
            with unsynchronized(model):
                (criterion(model(inputs[::2]), labels[::2]) / 2.0).backward()
            (criterion(model(inputs[1::2]), labels[1::2]) / 2.0).backward()
            opt.step()
            rates.append(opt.rate)
        agree((rates, opt.report.forwards, opt.report.reason, opt.report.counts))
        expected = train_on_shares(reference, reference_model, task, range(STEPS))
        assert rates == pytest.approx(expected, rel=1e-6), (name, inner)
        torch.testing.assert_close(full(task.model), full(reference_model), rtol=1e-6, atol=1e-9)


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
        reference = configuration(plain.parameters(), process_group=this_process())
        opt = configuration(model.parameters())
        for _step in range(12):
            reference.step(lambda m=plain: (m(x) - 1.0).square().mean())

            def loss(m=model):
                normed = m[0](x)
                return (m[1](normed.full_tensor()) - 1.0).square().mean()

            opt.step(loss)
        assert model[0].weight.grad.placements != model[0].weight.placements
        assert opt.rate == pytest.approx(reference.rate, rel=1e-9)
        torch.testing.assert_close(full(model), full(plain), rtol=1e-9, atol=1e-9)


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
    torch.testing.assert_close(full(model), parameters, rtol=1e-9, atol=1e-9)


def check_momentum_scales_are_equal_where_losses_are_deterministic(_):
    """The same batch at every step; the average, too, is drawn along with the shards."""
    alone = classification(dtype=torch.float64)
    expected = CONFIGURATIONS["lqa-auto"](alone.model.parameters(), process_group=this_process())
    train_on_shares(expected, alone.model, alone, [0] * 250, 1, 0)
    assert momentum_scale(expected) > 1.0
    expected.eval()
    for parallelise in (DistributedDataParallel, sharded):
        task, model, opt = begun("lqa-auto", parallelise)
        train_on_shares(opt, model, task, [0] * 250)
        assert momentum_scale(opt) == pytest.approx(momentum_scale(expected), rel=1e-6)
        opt.eval()
        torch.testing.assert_close(full(model), full(alone.model), rtol=1e-6, atol=1e-9)


def check_groups_train_by_themselves(_):
    group, _ = dist.new_subgroups(group_size=2)
    task = classification(dtype=torch.float64)
    ddp = DistributedDataParallel(task.model, process_group=group)
    opt = LQA(task.model.parameters(), process_group=group)
    train_on_shares(opt, ddp, task, range(12 if rank() < 2 else 15))
    gathered = [None] * size()
    dist.all_gather_object(gathered, opt.rate)
    assert gathered[0] == gathered[1] != gathered[2] == gathered[3]


def check_state_is_laid_out_as_the_parameters(_):
    for parallelise in (sharded, split):
        task = classification()
        model = parallelise(task.model)
        opt = LQA(model.parameters())
        train_on_shares(opt, model, task, range(3), 1, 0)
        for param, state in opt.state.items():
            tensors = [value for value in state.values() if isinstance(value, torch.Tensor)]
            assert len(tensors) == 2
            for tensor in tensors:
                assert tensor.placements == param.placements
                assert tensor.device_mesh == param.device_mesh


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
        return full(task.model), opt.rate

    expected, rate = two_phases(lambda model: model, 1, 0, process_group=this_process())
    for parallelise in (DistributedDataParallel, sharded):
        parameters, measured = two_phases(parallelise, None, None)
        assert measured == pytest.approx(rate, rel=1e-9)
        torch.testing.assert_close(parameters, expected, rtol=1e-9, atol=1e-9)


def check_what_is_enforced_after_each_step_holds_in_the_average(_):
    def enforce(model):
        with torch.no_grad():
            for param in model.parameters():
                param.clamp_(-0.25, 0.25)

    alone = classification(dtype=torch.float64)
    expected = CONFIGURATIONS["lqa-auto"](alone.model.parameters(), process_group=this_process())
    for step in range(STEPS):
        train_on_shares(expected, alone.model, alone, [step], 1, 0)
        enforce(alone.model)
    training = full(alone.model)
    expected.eval()
    for parallelise in (DistributedDataParallel, sharded, split):
        data = (1, 0) if parallelise is split else (None, None)
        task, model, opt = begun("lqa-auto", parallelise)
        for step in range(STEPS):
            train_on_shares(opt, model, task, [step], *data)
            enforce(model)
        agree([sorted(own) for own in opt.state.values()])
        assert watched(opt)
        torch.testing.assert_close(full(model), training, rtol=1e-9, atol=1e-9)
        opt.eval()
        torch.testing.assert_close(full(model), full(alone.model), rtol=1e-9, atol=1e-9)
        assert max(param.abs().max() for param in full(model)) == 0.25
        opt.train()
        torch.testing.assert_close(full(model), training, rtol=1e-9, atol=1e-9)
