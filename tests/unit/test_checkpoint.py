"""State dicts, copies and pickles."""

import copy
import pickle

import numpy
import pytest
import torch
from configurations import CONFIGURATIONS
from problems import classification, identical, noisy_classification, values
from seams import momentum_scale
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.nn import functional
from training import same_state, saved_and_loaded, train, train_seeded

from quadstep import LQA


class TestState:
    @pytest.mark.parametrize("stop", range(1, 25, 4))
    def test_resumes_bit_for_bit(self, configuration, stop):
        """Also between measurements and with averaging."""
        task, stopped, resumed = (noisy_classification() for _ in range(3))
        opts = [configuration(each.model.parameters()) for each in (task, stopped, resumed)]
        train_seeded(task, opts[0], range(30))
        train_seeded(stopped, opts[1], range(stop))
        model, state = saved_and_loaded(stopped.model, opts[1])
        resumed.model.load_state_dict(model)
        opts[2].load_state_dict(state)
        train_seeded(resumed, opts[2], range(stop, 30))
        assert identical(values(task.model), values(resumed.model))
        assert opts[2].report == opts[0].report

    @pytest.mark.parametrize(
        "clone",
        [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))],
        ids=["copy", "pickle"],
    )
    def test_copies_go_their_own_way(self, configuration, clone):
        task = classification()
        opt = configuration(task.model.parameters())
        train(task, opt, range(12))
        other, copied = clone((task.model, opt))
        before = values(task.model)
        for step in range(12, 20):
            batch = torch.arange(step * 32, (step + 1) * 32) % 256
            copied.step(
                lambda batch=batch: functional.cross_entropy(
                    other(task.inputs[batch]), task.labels[batch]
                )
            )
        assert identical(before, values(task.model))
        train(task, opt, range(12, 20))
        assert identical(values(other), values(task.model))


class TestNoise:
    """Where losses are free of noise, the fast iterate of the default steps further."""

    @pytest.mark.parametrize("stop", [245, 253, 260])
    def test_resumes_bit_for_bit(self, stop):
        task, resumed = classification(), classification()
        opt, other = LQA(task.model.parameters()), LQA(resumed.model.parameters())
        for _ in range(stop):
            opt.step(task.closure(size=256))
        assert momentum_scale(opt) > 1.0
        model, state = saved_and_loaded(task.model, opt)
        resumed.model.load_state_dict(model)
        other.load_state_dict(state)
        for _ in range(60):
            opt.step(task.closure(size=256))
            other.step(resumed.closure(size=256))
        opt.eval()
        other.eval()
        assert identical(values(task.model), values(resumed.model))


class TestRefusedStates:
    @pytest.mark.parametrize("saving", CONFIGURATIONS)
    @pytest.mark.parametrize("loading", CONFIGURATIONS)
    def test_each_configuration_loads_its_own_and_names_the_difference(self, saving, loading):
        task = classification()
        params = list(task.model.parameters())
        state = CONFIGURATIONS[saving](params).state_dict()
        opt = CONFIGURATIONS[loading](params)
        if saving == loading:
            opt.load_state_dict(state)
            return
        own, other = opt.param_groups[0], state["param_groups"][0]
        names = ("direction", "controller", "update")
        name = next(name for name in names if own[f"lqa.{name}"] != other[f"lqa.{name}"])
        before = copy.deepcopy(opt.state_dict())
        with pytest.raises(ValueError, match="state_dict was saved with") as caught:
            opt.load_state_dict(state)
        assert str(caught.value) == (
            f"state_dict was saved with {name} = {other[f'lqa.{name}']!r}, this optimizer has "
            f"{name} = {own[f'lqa.{name}']!r}; construct LQA as it was when it was saved"
        )
        assert same_state(opt.state_dict(), before)

    @pytest.mark.parametrize(
        ("saved", "message"),
        [
            (
                lambda params: torch.optim.SGD(params).state_dict(),
                "state_dict was not saved by LQA: its first param group has no entry "
                "'lqa.version'; load it into the optimizer that saved it",
            ),
            (
                lambda params: LQA.paper(params).state_dict(),
                "state_dict was saved with direction = 'Gradient', this optimizer has direction = "
                "'RMSNormalized'; construct LQA as it was when it was saved",
            ),
        ],
    )
    def test_loading_what_another_optimizer_saved(self, saved, message):
        params = list(classification().model.parameters())
        opt = LQA(params)
        with pytest.raises(ValueError, match="state_dict") as caught:
            opt.load_state_dict(saved(params))
        assert str(caught.value) == message

    def test_loading_another_version(self):
        opt = LQA(classification().model.parameters())
        state = opt.state_dict()
        state["param_groups"][0]["lqa.version"] = 99
        message = (
            r"^state_dict has version 99, and this quadstep reads version 6; load it with the "
            r"quadstep that saved it$"
        )
        with pytest.raises(ValueError, match=message):
            opt.load_state_dict(state)


class TestNumbersOfNumpy:
    @pytest.mark.parametrize(
        "build",
        [
            lambda p: LQA(
                p, delta0=numpy.float32(1e-4), every=numpy.int64(5), weight_decay=numpy.float64(0)
            ),
            lambda p: LQA(
                [{"params": p, "lr": numpy.float64(1e-4), "weight_decay": numpy.int8(0)}]
            ),
            lambda p: LQA(
                torch.optim.AdamW(
                    p,
                    lr=numpy.float64(1e-3),
                    betas=(numpy.float64(0.9), numpy.float64(0.99)),
                    weight_decay=numpy.float64(0.1),
                )
            ),
            lambda p: LQA.paper(p, delta0=numpy.float64(0.1)),
        ],
    )
    @pytest.mark.parametrize("steps", [0, 3])
    def test_are_pythons_in_checkpoints(self, build, steps):
        task = classification()
        first, *others = task.model.parameters()
        opt = build([first])
        opt.add_param_group({"params": others, "lr": numpy.float64(1e-4)})
        train(task, opt, range(steps))
        _, state = saved_and_loaded(task.model, opt, weights_only=True)
        assert state["param_groups"][1]["lr"] > 0.0


def test_numbers_of_numpy_that_are_written_later_are_pythons_in_checkpoints():
    model = classification().model
    opt = LQA(model.parameters())
    opt.param_groups[0]["weight_decay"] = numpy.float64(0.1)
    decays = numpy.linspace(0.0, 1.0, 3)
    opt.param_groups[0]["schedule"] = {"decays": decays, "at": [numpy.int64(3)]}
    _, state = saved_and_loaded(model, opt, weights_only=True)
    group = state["param_groups"][0]
    assert group["schedule"] == {"decays": [0.0, 0.5, 1.0], "at": [3]}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("stop", [4, 13, 25])
def test_a_distributed_checkpoint_resumes_bit_for_bit(configuration, flatten, stop, tmp_path):
    """Into a fresh optimizer, of which it loads only the keys that are there."""
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    task, resumed = noisy_classification(), noisy_classification()
    opt, other = configuration(task.model.parameters()), configuration(resumed.model.parameters())
    train_seeded(task, opt, range(stop))
    model, state = get_state_dict(task.model, opt, options=options)
    dcp.save({"model": model, "optimizer": state}, checkpoint_id=tmp_path, no_dist=True)
    model, state = get_state_dict(resumed.model, other, options=options)
    dcp.load({"model": model, "optimizer": state}, checkpoint_id=tmp_path, no_dist=True)
    set_state_dict(
        resumed.model, other, model_state_dict=model, optim_state_dict=state, options=options
    )
    for each, optimizer in ((task, opt), (resumed, other)):
        train_seeded(each, optimizer, range(stop, 40))
    assert identical(values(task.model), values(resumed.model))
    assert other.report == opt.report


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_the_state_around_an_optimizer_without_its_own_is_found_after_steps():
    """Torch initializes it by a step at rate zero, which must not move anything."""
    task = noisy_classification()
    opt = LQA(torch.optim.SGD(task.model.parameters(), lr=0.5))
    train_seeded(task, opt, range(8))
    opt.zero_grad()
    before, rate = values(task.model), opt.rate
    state = get_optimizer_state_dict(task.model, opt)
    assert state["param_groups"][0]["lqa.stepping_rate"] >= rate
    assert identical(values(task.model), before)
    assert opt.rate == rate
