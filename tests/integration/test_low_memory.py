"""State of another type, and probes without a copy of the parameters."""

import copy
import io
import pickle
from functools import partial

import pytest
import torch
from problems import classification, identical, noisy_classification, values
from seams import pin_rate
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from training import (
    about_to_measure,
    full_loss,
    raising,
    same_state,
    saved_and_loaded,
    train,
    with_fault,
)

from quadstep import LQA

BF16 = torch.bfloat16
DTYPES = [(torch.float32, BF16), (BF16, BF16), (BF16, torch.float32), (torch.float64, BF16)]
BUILDERS = {
    "default": LQA,
    "rms": lambda params, **own: LQA(params, averaging=None, **own),
    "adamw": lambda params, **own: LQA(
        torch.optim.AdamW(params, lr=1e-3, betas=(0.0, 0.999)), averaging="schedule-free", **own
    ),
}
RESTORED = {
    "lqa-auto": LQA,
    "lqa": lambda params, **own: LQA(params, direction="gradient", averaging=None, **own),
}


def dtypes(opt: LQA) -> set[torch.dtype]:
    """The types of the state that is the optimizer's own."""
    return {
        own[key].dtype for own in opt.state.values() for key in ("z", "square_avg") if key in own
    }


@pytest.mark.parametrize(
    ("builder", "dtype", "state_dtype"),
    [
        *(("default", *pair) for pair in DTYPES),
        *(("rms", *pair) for pair in DTYPES[::3]),
        *(("adamw", *pair) for pair in DTYPES[:3]),
    ],
    ids=str,
)
class TestStateDtype:
    def make(self, builder, dtype, state_dtype):
        task = noisy_classification(dtype)
        return task, BUILDERS[builder](task.model.parameters(), state_dtype=state_dtype)

    def test_is_that_of_all_state_at_all_times(self, builder, dtype, state_dtype):
        task, opt = self.make(builder, dtype, state_dtype)
        before = full_loss(task)
        train(task, opt, range(60))
        assert dtypes(opt) == {state_dtype}
        assert {param.dtype for param in task.model.parameters()} == {dtype}
        opt.eval()
        # Without averaging the rate rises slowly.
        assert full_loss(task) < (1.0 if builder == "rms" else 0.8) * before
        opt.train()
        for other in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
            assert dtypes(other) == {state_dtype}
        _, state = saved_and_loaded(task.model, opt)
        opt.load_state_dict(state)
        assert dtypes(opt) == {state_dtype}
        assert same_state(opt.state_dict()["state"], state["state"])

    @pytest.mark.parametrize("mode", ["train", "eval"])
    def test_resumes_bit_for_bit(self, builder, dtype, state_dtype, mode):
        task, opt = self.make(builder, dtype, state_dtype)
        train(task, opt, range(25))
        getattr(opt, mode)()
        model_state, state = saved_and_loaded(task.model, opt, weights_only=True)
        random_state = torch.get_rng_state()
        other, resumed = self.make(builder, dtype, state_dtype)
        other.model.load_state_dict(model_state)
        resumed.load_state_dict(state)
        for each, optimizer in ((task, opt), (other, resumed)):
            torch.set_rng_state(random_state)
            optimizer.train()
            train(each, optimizer, range(25, 50))
        assert identical(values(task.model), values(other.model))

    def test_survives_flattened_distributed_checkpoints(self, builder, dtype, state_dtype):
        task, opt = self.make(builder, dtype, state_dtype)
        train(task, opt, range(12))
        options = StateDictOptions(flatten_optimizer_state_dict=True)
        flat = get_optimizer_state_dict(task.model, opt, options=options)
        file = io.BytesIO()
        torch.save(flat, file)
        file.seek(0)
        other, fresh = self.make(builder, dtype, state_dtype)
        other.model.load_state_dict(task.model.state_dict())
        set_optimizer_state_dict(other.model, fresh, torch.load(file), options=options)
        assert dtypes(fresh) == {state_dtype}
        assert same_state(fresh.state_dict()["state"], opt.state_dict()["state"])

    def test_leaves_the_random_numbers_of_the_user_alone(self, builder, dtype, state_dtype):
        task, opt = self.make(builder, dtype, state_dtype)
        train(task, opt, range(10))
        after = torch.get_rng_state()
        plain = noisy_classification(dtype)
        for step in range(10):
            plain.closure(step)()
        assert torch.equal(after, torch.get_rng_state())


def test_a_changed_type_converts_the_state():
    task = classification()
    opt = LQA(task.model.parameters())
    train(task, opt, range(5))
    low = LQA(task.model.parameters(), state_dtype=BF16)
    low.load_state_dict(opt.state_dict())
    assert dtypes(low) == {BF16}
    train(task, low, range(5, 10))
    opt.load_state_dict(low.state_dict())
    assert dtypes(opt) == {torch.float32}


@pytest.mark.parametrize("state_dtype", [BF16, torch.float32])
def test_steps_in_bfloat16_are_unbiased(state_dtype, monkeypatch):
    """Steps of a tenth of what separates numbers near one, along a loss without curvature."""
    pin_rate(monkeypatch)

    def descend(dtype, **own):
        theta = nn.Parameter(torch.ones(4096, dtype=dtype))
        opt = LQA([theta], weight_decay=0.0, delta0=1e-4, **own)
        for _ in range(300):
            opt.step(lambda: theta.float().mean())
        opt.eval()
        return theta.double().mean().item()

    exact, nearest = descend(torch.float64), descend(BF16)
    assert exact < 0.95 < nearest == 1.0
    # The standard error is 0.0005.
    assert descend(BF16, state_dtype=state_dtype) == pytest.approx(exact, abs=0.0025)


@pytest.mark.parametrize("state_dtype", [BF16, torch.float32])
def test_a_quadratic_is_minimized_in_bfloat16(state_dtype, monkeypatch):
    """Rounded to nearest, no step leaves the start."""
    pin_rate(monkeypatch)

    def final_loss(steps, **own):
        theta = nn.Parameter(torch.ones(256, dtype=BF16))
        opt = LQA([theta], weight_decay=0.0, delta0=4e-4, **own)
        for _ in range(steps):
            loss = opt.step(lambda: theta.float().square().mean())
        return loss.item()

    assert final_loss(100) == 1.0
    assert final_loss(800, state_dtype=state_dtype) < 0.05


@pytest.mark.parametrize(("dtype", "state_dtype"), DTYPES, ids=str)
def test_a_mask_holds_in_what_eval_shows(dtype, state_dtype):
    task = classification(dtype=dtype)
    opt = LQA(task.model.parameters(), state_dtype=state_dtype)
    weight = task.model[0].weight
    mask = torch.rand(weight.shape) > 0.5

    def prune(task):
        with torch.no_grad():
            weight.mul_(mask)

    train(task, opt, range(150), prune)
    assert dtypes(opt) == {state_dtype}
    opt.eval()
    assert weight[~mask].eq(0.0).all()
    assert weight[mask].ne(0.0).any()
    assert full_loss(task) < 0.5


@pytest.mark.parametrize("name", RESTORED)
class TestSubtraction:
    def make(self, name, **own):
        task = noisy_classification()
        return task, RESTORED[name](task.model.parameters(), **own)

    def test_trains_bit_for_bit_as_with_copies(self, name):
        ends = []
        for restore in ("copy", "subtract"):
            task, opt = self.make(name, restore=restore)
            train(task, opt, range(40))
            ends.append([*values(task.model), opt.rate])
        assert ends[0][-1] == ends[1].pop() == ends[0].pop()
        assert identical(*ends)

    @pytest.mark.parametrize("call", [1, 2])
    def test_an_exception_undoes_the_step(self, name, call):
        task, opt = about_to_measure(partial(RESTORED[name], restore="subtract"))
        before = values(task.model)
        with pytest.raises(KeyboardInterrupt, match="injected"):
            opt.step(with_fault(task.closure(), call, raising(KeyboardInterrupt)))
        assert identical(before, values(task.model))

    def test_a_preview_moves_nothing(self, name):
        task, opt = self.make(name, restore="subtract")
        train(task, opt, range(3))
        before = values(task.model)
        line = opt.preview(task.closure())
        losses = line.losses([0.0, line.rate, 3.0 * line.rate])
        assert len(set(losses)) == 3
        assert identical(before, values(task.model))


def test_an_embedding_that_renormalises_itself_trains_without_copies():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(20, 8, max_norm=0.5), nn.Flatten(), nn.Linear(32, 2))
    inputs, labels = torch.randint(20, (64, 4)), torch.randint(2, (64,))
    opt = LQA(model.parameters(), restore="subtract")
    losses = [
        opt.step(lambda: nn.functional.cross_entropy(model(inputs), labels)) for _ in range(100)
    ]
    assert losses[-1] < 0.5 * losses[0]
