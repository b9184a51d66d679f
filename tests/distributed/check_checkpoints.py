"""Distributed checkpoints."""

import pytest
import torch
import torch.distributed.checkpoint as dcp
from problems import classification, identical
from ranks import (
    STEPS,
    THREE,
    agree,
    begun,
    full,
    gathered,
    in_one_process,
    rank,
    sharded,
    size,
    split,
    train_on_shares,
)
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.nn.parallel import DistributedDataParallel

from quadstep import LQA

MOVED = ("lqa(adamw)", "lqa-auto")


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
        train_on_shares(opt, model, task, range(13), *data)
        save(path, model, opt)
        train_on_shares(opt, model, task, range(13, STEPS), *data)
        _, resumed, other = begun(name, parallelise)
        load(path, resumed, other)
        train_on_shares(other, resumed, task, range(13, STEPS), *data)
        assert identical(full(resumed), full(model))
        assert other.report == opt.report


def check_state_of_low_precision_is_equal_on_all_ranks(folder):
    """With parameters and state rounded stochastically, and probes without copies."""

    def begin(parallelise):
        task = classification(dtype=torch.bfloat16)
        model = parallelise(task.model)
        own = {"state_dtype": torch.bfloat16, "restore": "subtract"}
        return task, model, LQA(task.model.parameters(), delta0=0.03, **own)

    for parallelise in (DistributedDataParallel, sharded, split):
        data = (1, 0) if parallelise is split else (None, None)
        task, model, opt = begin(parallelise)
        train_on_shares(opt, model, task, range(13), *data)
        assert {own["z"].dtype for own in opt.state.values()} == {torch.bfloat16}
        agree([param.tolist() for param in full(model)])
        path = folder / f"low-{size()}-{parallelise.__name__}"
        save(path, model, opt)
        rates = train_on_shares(opt, model, task, range(13, STEPS), *data)
        agree((rates, [param.tolist() for param in full(model)]))
        _, resumed, other = begin(parallelise)
        load(path, resumed, other)
        train_on_shares(other, resumed, task, range(13, STEPS), *data)
        assert identical(full(resumed), full(model))
        assert other.report == opt.report


def check_full_checkpoints_on_rank_0(folder):
    """The options with which the first rank alone holds everything, in the memory of the CPU."""
    options = {"full_state_dict": True, "cpu_offload": True}
    task, model, opt = begun("lqa-auto")
    train_on_shares(opt, model, task, range(13))
    weights, state = get_state_dict(model, opt, options=StateDictOptions(**options))
    if rank() == 0:
        torch.save((weights, state), folder / f"full-{size()}")
    train_on_shares(opt, model, task, range(13, STEPS))
    _, resumed, other = begun("lqa-auto")
    weights, state = torch.load(folder / f"full-{size()}") if rank() == 0 else ({}, {})
    broadcast = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(resumed, weights, options=broadcast)
    set_optimizer_state_dict(resumed, other, state, options=broadcast)
    train_on_shares(other, resumed, task, range(13, STEPS))
    assert identical(full(resumed), full(model))
    assert other.report == opt.report


def check_full_checkpoints_load_where_parameters_were_changed(folder):
    for parallelise in (sharded, DistributedDataParallel):
        task, model, opt = begun("lqa-auto", parallelise)
        _, other, loaded = begun("lqa-auto", parallelise)
        for step in range(13):
            train_on_shares(opt, model, task, [step])
            with torch.no_grad():
                next(model.parameters()).clamp_(-0.1, 0.1)
        path = folder / f"changed-{size()}-{parallelise.__name__}"
        save(path, model, opt, full_state_dict=True)
        load(path, other, loaded, full_state_dict=True)
        for each, owner in ((opt, model), (loaded, other)):
            train_on_shares(each, owner, task, range(13, 20))
        torch.testing.assert_close(full(other), full(model), rtol=1e-6, atol=1e-6)


def check_reading_the_state_of_a_fresh_optimizer_changes_nothing(_):
    for name in THREE:
        task, model, opt = begun(name)
        _, other, asked = begun(name)
        get_state_dict(other, asked)
        train_on_shares(opt, model, task, range(8))
        train_on_shares(asked, other, task, range(8))
        assert identical(full(model), full(other))
        assert opt.report == asked.report


def check_a_loaded_average_is_validated_and_trained_on(folder):
    """What FSDP gathered to validate must not be what the first step after it sees."""
    task, model, opt = begun("lqa-auto")
    train_on_shares(opt, model, task, range(13))
    opt.eval()
    save(folder / f"average-{size()}", model, opt)
    for optimizer, owner, exact in [(opt, model, True), *map(in_mode, (True, False))]:
        if optimizer is not opt:
            load(folder / f"average-{size()}", owner, optimizer)
        with torch.no_grad():
            owner(task.inputs)
        optimizer.train()
        train_on_shares(optimizer, owner, task, range(13, 16))
        if exact:
            assert identical(full(owner), full(model))
        else:
            torch.testing.assert_close(full(owner), full(model), rtol=1e-9, atol=1e-9)


def check_an_exported_average_changes_nothing(_):
    """Also where FSDP has kept what it gathered to validate."""
    for parallelise in (sharded, split, DistributedDataParallel):
        data = (1, 0) if parallelise is split else (None, None)
        (task, model, opt), (_, twin, other) = (begun("lqa-auto", parallelise) for _ in range(2))
        for each, owner in ((opt, model), (other, twin)):
            train_on_shares(each, owner, task, range(13), *data)
        other.eval()
        averaged = full(twin)
        other.train()
        with torch.no_grad():
            model(task.inputs)
        exported = opt.averaged_state_dict(model)
        assert [*exported] == [*model.state_dict()]
        for each, owner in ((opt, model), (other, twin)):
            train_on_shares(each, owner, task, range(13, 20), *data)
        assert identical(full(model), full(twin))
        # Training has not changed the copies, which are sharded as the parameters are.
        assert identical(gathered(exported), averaged)
        assert [*map(type, exported.values())] == [*map(type, model.state_dict().values())]


def in_mode(evaluating):
    """Something to load an average into: bit for bit in the mode that it was saved in."""
    _, model, opt = begun("lqa-auto")
    if evaluating:
        opt.eval()
    return opt, model, evaluating


def save_for_others(folder):
    for name in MOVED:
        task, model, opt = begun(name)
        train_on_shares(opt, model, task, range(13))
        save(folder / f"from-{size()}-{name}", model, opt)


def check_a_checkpoint_moves_to_another_number_of_ranks(folder):
    for name in MOVED:
        task, model, opt = begun(name)
        load(folder / f"from-{6 - size()}-{name}", model, opt)
        train_on_shares(opt, model, task, range(13, STEPS))
        parameters, _, rates = in_one_process(name)
        assert opt.rate == pytest.approx(rates[-1], rel=1e-9)
        torch.testing.assert_close(full(model), parameters, rtol=1e-9, atol=1e-9)
