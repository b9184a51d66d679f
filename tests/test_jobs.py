"""What training jobs do, in one process: precision, accumulation, faults, odd closures."""

import copy
import math
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from configurations import CONFIGURATIONS
from problems import (
    Task,
    about_to_measure,
    classification,
    identical,
    noisy_classification,
    trains_without_a_trace,
    values,
)
from sklearn.datasets import load_breast_cancer
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.nn import functional

from quadstep import LQA, Reason, direction, line, optimizer


@pytest.fixture(params=CONFIGURATIONS)
def configuration(request):
    return CONFIGURATIONS[request.param]


def full_loss(task: Task) -> float:
    with torch.no_grad():
        logits = task.model(task.inputs)
    return functional.cross_entropy(logits.float(), task.labels).item()


def same(one, other) -> bool:
    """Whether two states are equal, tensors bit for bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def in_autocast(closure, dtype):
    def run():
        with torch.autocast("cpu", dtype=dtype):
            return closure()

    return run


def backward_of(opt, closure):
    """The caller's part of a two-phase step."""
    opt.zero_grad()
    loss = closure()
    loss.backward()
    return loss


class TestMixedPrecision:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_autocast_trains(self, configuration, dtype):
        task = classification()
        first = full_loss(task)
        opt = configuration(task.model.parameters())
        for step in range(150):
            loss = opt.step(in_autocast(task.closure(step), dtype))
        opt.eval()
        assert loss.dtype is torch.float32
        assert full_loss(task) < 0.6 * first

    def test_a_scaler_skips_the_step_at_an_overflow_and_training_goes_on(self, configuration):
        task = noisy_classification()
        opt = configuration(task.model.parameters())
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        first = full_loss(task)
        for step in range(150):
            closure = in_autocast(task.closure(step), torch.float16)
            opt.zero_grad()
            loss = closure()
            scaler.scale(loss).backward()
            if step == 20:
                next(task.model.parameters()).grad[0, 0] = math.inf
                scale, before = scaler.get_scale(), copy.deepcopy(opt.state_dict())
                weights = [param.clone() for param in task.model.parameters()]
            scaler.unscale_(opt)
            nn.utils.clip_grad_norm_(task.model.parameters(), 1.0)
            taken = scaler.step(opt, closure, loss=loss)
            scaler.update()
            if step == 20:
                assert taken is None
                assert scaler.get_scale() < scale
                assert identical(weights, list(task.model.parameters()))
                assert same(opt.state_dict(), before)
        opt.eval()
        assert opt.report.backwards == 0
        assert sum(opt.report.counts.values()) == 149
        task.model.eval()
        assert full_loss(task) < 0.7 * first

    def test_an_overflow_of_the_scale_itself(self):
        """Gradients of a loss scaled beyond float16: nothing moves until the scale is fit."""
        task = classification()
        opt = LQA(task.model.parameters())
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
        start, skipped = values(task.model), 0
        for step in range(60):
            closure = in_autocast(task.closure(step), torch.float16)
            opt.zero_grad()
            loss = closure()
            scaler.scale(loss).backward()
            if scaler.step(opt, closure, loss=loss) is None:
                skipped += 1
                assert identical(start, values(task.model))
            scaler.update()
            if opt.report.counts:
                break
        assert 5 < skipped < 40

    @pytest.mark.parametrize("inside", [True, False])
    def test_the_resolution_is_that_of_the_arithmetic_not_of_the_last_cast(self, inside):
        """Autocast gives a float32 loss whose differences are those of bfloat16."""
        task = classification()
        opt = LQA(task.model.parameters(), direction="sgd", delta0=1e-4)
        closure = task.closure()
        if inside:
            opt.step(in_autocast(closure, torch.bfloat16))
        else:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                opt.step(closure)
        assert opt.report.reason is Reason.NOISE
        exact = classification()
        other = LQA(exact.model.parameters(), direction="sgd", delta0=1e-2)
        other.step(exact.closure())
        assert other.report.reason is not Reason.NOISE

    def test_two_phases_know_the_resolution(self):
        task = classification()
        opt = LQA(task.model.parameters(), direction="sgd", delta0=1e-4)
        closure = in_autocast(task.closure(), torch.bfloat16)
        opt.step(closure, loss=backward_of(opt, closure))
        assert opt.report.reason is Reason.NOISE

    @pytest.mark.parametrize("upcast", [True, False])
    def test_probes_too_near_to_move_bfloat16_parameters_are_noise(self, upcast):
        task = classification(dtype=torch.bfloat16)
        # Parameters of one binade: a step of 1e-6 is far below their spacing.
        with torch.no_grad():
            for param in task.model.parameters():
                param.copy_(torch.where(param < 0, -0.75, 0.75))
        opt = LQA(task.model.parameters(), delta0=1e-6)

        def closure():
            logits = task.model(task.inputs)
            return functional.cross_entropy(logits.float() if upcast else logits, task.labels)

        opt.step(closure)
        assert opt.report.reason is Reason.NOISE
        assert opt.rate == 1e-6
        radius = opt._search.radius(opt.rate)
        assert radius > 1e-6
        while opt.report.reason is Reason.NOISE:
            opt.step(closure)
        assert 1e-4 < opt._search.radius(opt.rate) < 10.0

    def test_pure_bfloat16_makes_progress(self, configuration):
        task = classification(dtype=torch.bfloat16)
        first = full_loss(task)
        opt = configuration(task.model.parameters())
        for step in range(200):
            picked = torch.arange(step * 32, (step + 1) * 32) % 256
            opt.step(
                lambda picked=picked: functional.cross_entropy(
                    task.model(task.inputs[picked]).float(), task.labels[picked]
                )
            )
        opt.eval()
        assert full_loss(task) < 0.6 * first

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_parameters_without_a_slope_stay_in_half_precision(self, dtype):
        """The mean square of a small gradient is zero in float16, and so is 1e-8."""
        torch.manual_seed(0)
        table = nn.Embedding(6, 4, dtype=dtype)
        opt = LQA(table.parameters(), weight_decay=0)
        unused = table.weight[5].clone()
        for _ in range(30):
            opt.step(lambda: 1.0 + table(torch.arange(5)).float().square().mean() / 100)
            assert table.weight.isfinite().all()
        assert torch.equal(unused, table.weight[5])


class TestTwoPhases:
    def test_buffers_are_updated_once_without_any_step_in_one_phase(self, configuration):
        trains_without_a_trace(
            configuration,
            lambda opt, closure: opt.step(closure, loss=backward_of(opt, closure)),
        )

    @pytest.mark.parametrize("failing", [1, 2, 3])
    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
    def test_an_exception_undoes_the_step(self, configuration, failing, error):
        task = noisy_classification()
        opt = configuration(task.model.parameters())
        loss = backward_of(opt, task.closure())
        before, random, calls = values(task.model), torch.get_rng_state(), []

        def closure():
            calls.append(task.closure()())
            if len(calls) == failing:
                raise error("injected")
            return calls[-1]

        with pytest.raises(error, match="injected"):
            opt.step(closure, loss=loss)
        assert identical(before, values(task.model))
        assert torch.equal(random, torch.get_rng_state())
        assert all(param.grad is not None for param in task.model.parameters())

    @pytest.mark.parametrize("failing", [1, 2, 3])
    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_a_non_finite_probe_undoes_the_step(self, configuration, failing, bad):
        task = noisy_classification()
        opt = configuration(task.model.parameters())
        loss = backward_of(opt, task.closure())
        before, calls = values(task.model), []

        def closure():
            calls.append(task.closure()())
            return calls[-1] * bad if len(calls) == failing else calls[-1]

        opt.step(closure, loss=loss)
        assert opt.report.reason is Reason.NON_FINITE
        assert identical(before, values(task.model))

    @pytest.mark.parametrize("parts", [4, 1])
    def test_accumulation(self, configuration, parts):
        """The closure sees every micro-batch, or a chosen one: the loss given is of the same."""
        task = classification()
        first = full_loss(task)
        opt = configuration(task.model.parameters())
        for step in range(60):
            micro = [task.closure(4 * step + part, size=8) for part in range(4)]
            opt.zero_grad()
            losses = []
            for closure in micro:
                losses.append(closure())
                (losses[-1] / 4).backward()

            def probe(micro=micro):
                return sum(closure() for closure in micro[:parts]) / parts

            opt.step(probe, loss=sum(losses[:parts]).detach() / parts)
        opt.eval()
        assert full_loss(task) < 0.8 * first

    def test_accumulation_equals_the_whole_batch(self, configuration):
        whole, parted = classification(dtype=torch.float64), classification(dtype=torch.float64)
        one, other = (configuration(task.model.parameters()) for task in (whole, parted))
        for step in range(12):
            one.step(whole.closure(step, size=32))
            micro = [parted.closure(4 * step + part, size=8) for part in range(4)]
            other.zero_grad()
            losses = [closure() for closure in micro]
            for loss in losses:
                (loss / 4).backward()
            other.step(
                lambda micro=micro: torch.stack([closure() for closure in micro]).mean(),
                loss=torch.stack(losses).mean(),
            )
        torch.testing.assert_close(values(whole.model), values(parted.model), rtol=1e-7, atol=1e-9)

    @pytest.mark.parametrize("name", ["lqa-paper", "lqa"])
    def test_the_direction_probed_is_the_clipped_one(self, name):
        task = classification(dtype=torch.float64)
        opt = CONFIGURATIONS[name](task.model.parameters())
        seen = []

        def closure():
            seen.append(values(task.model))
            return task.closure()()

        start = values(task.model)
        loss = backward_of(opt, task.closure())
        nn.utils.clip_grad_norm_(task.model.parameters(), 1e-3)
        grads = [param.grad.clone() for param in task.model.parameters()]
        opt.step(closure, loss=loss)
        clipped = [p - 0.1 * g for p, g in zip(start, grads, strict=True)]
        torch.testing.assert_close(seen[0], clipped, rtol=0, atol=1e-15)
        # The slope along a direction is its product with the gradient, clipped or not.
        assert opt.report.slope < 1e-2


class TestParameters:
    def test_frozen_and_unfrozen_in_mid_run(self, configuration):
        task = classification()
        first, head = task.model[0], task.model[2]
        first.requires_grad_(False)
        opt = configuration(task.model.parameters())
        frozen, start = first.weight.clone(), full_loss(task)
        for step in range(25):
            opt.step(task.closure(step))
        assert torch.equal(frozen, first.weight)
        first.requires_grad_(True)
        for step in range(25, 50):
            opt.step(task.closure(step))
        assert not torch.equal(frozen, first.weight)
        head.requires_grad_(False)
        opt.zero_grad()
        kept = head.weight.clone()
        for step in range(50, 75):
            opt.step(task.closure(step))
        assert torch.equal(kept, head.weight)
        opt.eval()
        assert torch.equal(kept, head.weight) or opt._averaging
        assert full_loss(task) < 0.8 * start

    def test_tied_weights_move_as_one(self, configuration):
        def build():
            torch.manual_seed(0)
            model = nn.Sequential(nn.Embedding(12, 6), nn.Linear(6, 12, bias=False))
            model[1].weight = model[0].weight
            return model

        tokens = torch.arange(12)
        model = build()
        opt = configuration(model.parameters())
        first = functional.cross_entropy(model(tokens), tokens.roll(1)).item()
        for _ in range(120):
            opt.step(lambda: functional.cross_entropy(model(tokens), tokens.roll(1)))
        opt.eval()
        assert model[0].weight is model[1].weight
        assert len(list(model.parameters())) == 1
        assert functional.cross_entropy(model(tokens), tokens.roll(1)).item() < first

    def test_group_ratios_and_weight_decay_of_a_wrapped_optimizer(self):
        task = classification()
        groups = [
            {"params": task.model[0].parameters(), "lr": 1e-3, "weight_decay": 0.1},
            {"params": task.model[2].parameters(), "lr": 4e-3, "weight_decay": 0.0},
        ]
        opt = LQA(torch.optim.AdamW(groups))
        start = full_loss(task)
        for step in range(60):
            opt.step(task.closure(step))
        rates = [group["lr"] for group in opt.param_groups]
        assert rates[1] == pytest.approx(4.0 * rates[0], rel=1e-9)
        assert rates[0] != 1e-3
        assert [group["weight_decay"] for group in opt.param_groups] == [0.1, 0.0]
        assert full_loss(task) < start

    @pytest.mark.parametrize(
        ("own", "decay"), [({}, 0.01), ({"averaging": None}, 0.01), ({"direction": "sgd"}, 0.0)]
    )
    def test_weights_decay_by_default_along_the_normalised_gradient(self, own, decay):
        opt = LQA(nn.Linear(2, 1).parameters(), **own)
        assert opt.param_groups[0]["weight_decay"] == decay

    def test_weight_decay_shrinks_the_groups_that_ask_for_it(self):
        def sizes(**options):
            task = classification()
            bodies = [task.model[0].parameters(), task.model[2].parameters()]
            opt = LQA([{"params": bodies[0]} | options, {"params": bodies[1]}])
            for step in range(60):
                opt.step(task.closure(step))
            opt.eval()
            assert full_loss(task) < 1.0
            return [task.model[layer].weight.norm().item() for layer in (0, 2)]

        plain, decayed = sizes(), sizes(weight_decay=1.0)
        assert decayed[0] < 0.9 * plain[0]
        assert decayed[1] > 0.9 * plain[1]

    def test_low_rank_adapters_train_beside_a_frozen_body(self, configuration):
        task = classification()
        task.model.requires_grad_(False)
        body = values(task.model)
        torch.manual_seed(1)
        down, up = nn.Parameter(0.3 * torch.randn(2, 8)), nn.Parameter(torch.zeros(16, 2))
        opt = configuration([{"params": [down]}, {"params": [up]}])

        def loss(step, size=32):
            picked = torch.arange(step * size, (step + 1) * size) % 256
            inputs = task.inputs[picked]
            hidden = task.model[0](inputs) + inputs @ down.T @ up.T
            return functional.cross_entropy(task.model[2](hidden.tanh()), task.labels[picked])

        start = loss(0, 256).item()
        for step in range(80):
            opt.step(lambda step=step: loss(step))
        opt.eval()
        assert identical(body, values(task.model))
        # The raw gradient of a product that starts at zero is slow, with any rate.
        assert loss(0, 256).item() < start

    def test_frozen_parameters_may_be_quantised(self, configuration):
        task = classification()
        codes = nn.Parameter(torch.ones(3, dtype=torch.int8), requires_grad=False)
        opt = configuration([codes, *task.model.parameters()])
        for step in range(12):
            opt.step(task.closure(step))
        assert torch.equal(codes, torch.ones(3, dtype=torch.int8))
        assert opt.report.reason is not Reason.NON_FINITE

    def test_parameters_that_get_a_gradient_only_sometimes(self, configuration):
        torch.manual_seed(0)
        task = classification()
        task.model.append(nn.Identity())
        expert = nn.Linear(8, 3)
        opt = configuration([*task.model.parameters(), *expert.parameters()])
        start = full_loss(task)
        for step in range(60):
            picked = torch.arange(step * 32, (step + 1) * 32) % 256
            inputs, labels, idle = task.inputs[picked], task.labels[picked], step % 3 != 0

            def closure(inputs=inputs, labels=labels, idle=idle):
                logits = task.model(inputs)
                return functional.cross_entropy(logits if idle else logits + expert(inputs), labels)

            before = expert.weight.clone()
            opt.step(closure)
            assert not idle or torch.equal(before, expert.weight)
        opt.eval()
        assert full_loss(task) < start

    def test_data_of_the_same_shape_may_be_replaced(self, configuration):
        task = classification()
        opt = configuration(task.model.parameters())
        for step in range(15):
            opt.step(task.closure(step))
        weight = task.model[0].weight
        weight.data = weight.data.clone()
        start = full_loss(task)
        for step in range(15, 60):
            opt.step(task.closure(step))
        opt.eval()
        assert full_loss(task) < start

    def test_a_shape_that_changed_is_named_before_anything_moves(self):
        theta, other = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(2))
        opt = LQA([other, theta])

        def closure():
            return theta.square().sum() + other.square().sum()

        opt.step(closure)
        theta.data, theta.grad = torch.ones(6), None
        before = copy.deepcopy(opt.state[other])
        kept = other.clone()
        message = (
            r"a parameter has shape \(6,\), but had \(4,\) when its state was made; "
            r"forget that state with del opt.state\[param\], or construct LQA anew"
        )
        with pytest.raises(ValueError, match=message):
            opt.step(closure)
        assert torch.equal(kept, other)
        assert same(opt.state[other], before)
        del opt.state[theta]
        opt.step(closure)
        assert opt.report.reason is not Reason.NON_FINITE

    def test_modules_of_a_group_that_joins_later_are_probed_without_trace(self, configuration):
        task = noisy_classification()
        opt = configuration(task.model.parameters())
        opt.step(task.closure())
        head = nn.BatchNorm1d(3)
        opt.add_param_group({"params": list(head.parameters())})
        inputs, labels = task.inputs[:32], task.labels[:32]
        for step in range(4):
            opt.step(lambda: functional.cross_entropy(head(task.model(inputs)), labels))
            assert head.num_batches_tracked == step + 1


class Growing(nn.Module):
    """Keeps a table as long as the longest input, as rotary embeddings do."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(1, 1)
        self.length = 0

    def forward(self, input):
        if len(input) > self.length:
            self.length = len(input)
            self.register_buffer("table", torch.arange(self.length) / self.length)
        return self.linear(input[:, None])[:, 0] - self.table[: len(input)]


class TestModules:
    """Modules that an optimizer, which is given parameters, can only come to know by running."""

    def test_one_that_grows_its_buffers_trains(self, configuration):
        model = Growing()
        opt = configuration(model.parameters())
        for length in (2, 3, 7, 5, 9, 9, 30):
            opt.step(lambda length=length: model(torch.ones(length)).square().mean())
        assert opt.report.forwards > 1
        assert len(model.table) == 30

    @pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
    @pytest.mark.parametrize("kind", ["expanded", "lazy", "scripted", "ensemble"])
    def test_any_kind_trains(self, configuration, kind):
        task = noisy_classification()
        model, inputs, labels = task.model, task.inputs[:32], task.labels[:32]
        params = [*model.parameters()]
        if kind == "expanded":
            model[0].register_buffer("mask", torch.ones(1, 16).expand(32, 16))
        elif kind == "lazy":
            model[1] = nn.LazyBatchNorm1d(affine=False)
        elif kind == "scripted":
            model = torch.jit.script(model)
        elif kind == "ensemble":
            copies = [classification(seed=seed).model for seed in range(3)]
            for each in copies:
                each.register_buffer("scale", torch.ones(()))
            stacked, buffers = torch.func.stack_module_state(copies)
            params = [*stacked.values()]
            base = copies[0]

            def model(inputs):
                def one(stacked, buffers):
                    return torch.func.functional_call(base, (stacked, buffers), inputs)

                return torch.vmap(one)(stacked, buffers).mean(0)

        opt = configuration(params)
        losses = [
            float(opt.step(lambda: functional.cross_entropy(model(inputs), labels)))
            for _ in range(30)
        ]
        assert opt.report.counts.keys() - {Reason.HELD}
        assert losses[-1] < losses[0]

    @pytest.mark.parametrize("wrapped", [False, True])
    def test_those_reached_later_are_probed_without_trace(self, configuration, wrapped):
        """A second head, of parameters known from the start or of a group that joins the base."""
        task = noisy_classification()
        head = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
        params = [*task.model.parameters(), *([] if wrapped else head.parameters())]
        opt = LQA(torch.optim.AdamW(params)) if wrapped else configuration(params)
        for step in range(3):
            opt.step(task.closure(step))
        if wrapped:
            opt._direction.base.add_param_group({"params": [*head.parameters()]})
        inputs, labels = task.inputs[:32], task.labels[:32]
        for step in range(12):
            opt.step(lambda: functional.cross_entropy(head(task.model(inputs)), labels))
            assert head[1].num_batches_tracked == step + 1
            assert task.model[1].num_batches_tracked == step + 4


class Binary(nn.Linear):
    """Weights of two values, whose gradients pass straight through the rounding."""

    def forward(self, inputs):
        binary = self.weight.sign() * self.weight.abs().mean()
        return functional.linear(
            inputs, binary.detach() + self.weight - self.weight.detach(), self.bias
        )


@pytest.mark.parametrize("name", ["lqa", "lqa-auto", "lqa(adamw)"])
class TestGradientsThatAreNotTheSlope:
    """The slope is measured, so a gradient need only point downhill."""

    def left(self, name, task, steps):
        """The part of the loss that is left after so many steps."""
        opt = CONFIGURATIONS[name](task.model.parameters())
        start = full_loss(task)
        for step in range(steps):
            opt.step(task.closure(step))
        opt.eval()
        return full_loss(task) / start

    def test_straight_through_estimators_train(self, name):
        """Far from a parabola, and for some steps of an optimizer with a memory concave."""
        task = classification(Binary(8, 32), nn.ReLU(), Binary(32, 3))
        assert self.left(name, task, steps=1000) < 0.75

    def test_gradients_may_be_scaled(self, name):
        task = classification()
        for param in task.model.parameters():
            param.register_hook(lambda grad: 10.0 * grad)
        assert self.left(name, task, steps=150) < 0.5

    def test_a_reversed_gradient_moves_nothing(self, name):
        task = classification(dtype=torch.float64)
        for param in task.model.parameters():
            param.register_hook(torch.neg)
        opt = CONFIGURATIONS[name](task.model.parameters())
        start, rates = values(task.model), []
        for step in range(5):
            opt.step(task.closure(step))
            assert opt.report.reason is Reason.ASCENT
            rates.append(opt.rate)
        assert identical(start, values(task.model))
        assert rates == sorted(rates, reverse=True)


@pytest.mark.parametrize("seed", range(3))
def test_raw_targets_are_learned_around_another_optimizer(seed):
    """At the start the line has no vertex, and the loss goes up and down by itself."""
    task = classification(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    targets = 150.0 + 75.0 * torch.randn(256, 1, generator=generator)
    opt = LQA(torch.optim.AdamW(task.model.parameters(), lr=1e-3))
    for _ in range(400):
        picked = torch.randint(256, (16,), generator=generator)
        loss = opt.step(
            lambda rows=picked: functional.mse_loss(task.model(task.inputs[rows]), targets[rows])
        )
    assert loss < 2.0 * 75.0**2


def test_a_tiny_rate_and_probes_sent_far_out_do_not_overflow():
    """On a stair of a loss that once had a slope, both happen."""
    param = nn.Parameter(torch.ones(3))
    opt = LQA(torch.optim.SGD([param], lr=1e-10))
    for _ in range(5):
        opt.step(lambda: 1e10 * (param - 0.5).square().sum())
    for _ in range(80):
        opt.step(lambda: 1.0 + (param - param.detach()).sum())
        assert opt.report.reason is Reason.NOISE
    assert param.isfinite().all()


class TestClosuresThatMisbehave:
    MESSAGE = r"the closure returned .* and then .* at the same parameters"

    def test_a_batch_drawn_in_the_closure_is_warned_of_once(self, configuration):
        task = classification()
        opt = configuration(task.model.parameters())
        steps = iter(range(10**6))
        with pytest.warns(UserWarning, match=self.MESSAGE) as caught:
            opt.step(lambda: task.closure(next(steps))())
        assert caught[0].filename == __file__
        for _ in range(30):
            opt.step(lambda: task.closure(next(steps))())

    def test_a_generator_of_its_own_is_warned_of(self, configuration):
        task = classification()
        opt = configuration(task.model.parameters())
        generator = torch.Generator().manual_seed(0)

        def closure():
            picked = torch.randint(256, (32,), generator=generator)
            return functional.cross_entropy(task.model(task.inputs[picked]), task.labels[picked])

        with pytest.warns(UserWarning, match=self.MESSAGE):
            opt.step(closure)

    def test_a_closure_that_turns_bad_is_noticed_later(self, monkeypatch):
        monkeypatch.setattr(optimizer, "AUDIT", 5)
        task = classification()
        opt = LQA(task.model.parameters(), direction="sgd")
        steps = iter(range(10**6))
        for step in range(5):
            opt.step(task.closure(step))
            assert opt.report.forwards == (4 if step == 0 else 3)
        with pytest.warns(UserWarning, match=self.MESSAGE):
            opt.step(lambda: task.closure(next(steps))())

    def test_two_phases_warn_of_a_loss_that_is_not_the_closures(self, configuration):
        task = classification()
        opt = configuration(task.model.parameters())
        loss = backward_of(opt, task.closure())
        with pytest.warns(UserWarning, match=r"loss is .*, but at the same parameters") as caught:
            opt.step(task.closure(), loss=1024.0 * loss)
        assert caught[0].filename == __file__

    @pytest.mark.parametrize("two_phases", [False, True])
    def test_a_loss_computed_before_the_closure_is_warned_of_once(self, two_phases):
        task = classification()
        opt = LQA(task.model.parameters())
        message = (
            r"the closure returned \S+ wherever the parameters were, although the gradient tells a "
            r"change of \S+; compute the loss in the closure, from the optimizer's parameters, and "
            r"not before step\(\)"
        )

        def step(number):
            loss = task.closure(number)()
            if two_phases:
                opt.zero_grad()
                loss.backward()
                opt.step(lambda: loss, loss=loss)
            else:
                opt.step(lambda: loss)

        with pytest.warns(UserWarning, match=message) as seen:
            any(map(step, range(20)))
        assert len(seen) == 1
        assert opt.rate < 1.0

    def test_honest_closures_are_not_accused(self, configuration, monkeypatch):
        """Dropout, batch normalisation, attention, autocast: at every measurement, both phases."""
        monkeypatch.setattr(optimizer, "AUDIT", 1)
        task = noisy_classification()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        opt = configuration([*task.model.parameters(), *layer.parameters()])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for step in range(12):
                inputs, labels = task.inputs[:32], task.labels[:32]

                def closure(inputs=inputs, labels=labels):
                    logits = task.model(layer(inputs.unsqueeze(1)).squeeze(1))
                    return functional.cross_entropy(logits, labels)

                if step % 3 == 2:
                    closure = in_autocast(closure, torch.bfloat16)
                if step % 2:
                    opt.step(closure)
                else:
                    opt.step(closure, loss=backward_of(opt, closure))

    def test_what_a_closure_does_to_the_parameters_counts_once(self, configuration):
        """As with any optimizer: the gradient pass may renormalise them, probes leave no trace."""
        torch.manual_seed(0)
        table, index = nn.Embedding(6, 4, max_norm=0.5), torch.arange(6)
        renormed = copy.deepcopy(table)
        renormed(index)
        opt = configuration(table.parameters())
        opt._search = Still()
        opt.step(lambda: table(index).square().sum() + 1.0)
        assert torch.equal(table.weight, renormed.weight)

    def test_an_embedding_that_renormalises_itself_trains(self, configuration):
        torch.manual_seed(0)
        table, head, index = nn.Embedding(6, 4, max_norm=1.0), nn.Linear(4, 6), torch.arange(6)
        opt = configuration([*table.parameters(), *head.parameters()])
        first = functional.cross_entropy(head(table(index)), index).item()
        for _ in range(100):
            loss = opt.step(lambda: functional.cross_entropy(head(table(index)), index))
        assert loss.item() < first

    def test_an_interrupted_closure_that_moved_the_parameters_is_undone(self):
        task = classification()
        opt = LQA(task.model.parameters(), direction="sgd")
        loss, before = backward_of(opt, task.closure()), values(task.model)
        calls = []

        def closure():
            calls.append(task.closure()())
            with torch.no_grad():
                task.model[0].weight.add_(1.0)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return calls[-1]

        with pytest.raises(KeyboardInterrupt):
            opt.step(closure, loss=loss)
        assert identical(before, values(task.model))


class Differing(nn.Module):
    """Computes otherwise where gradients are off, in whatever way."""

    def __init__(self, way):
        super().__init__()
        self.way = way

    def forward(self, input):
        if torch.is_grad_enabled() or self.way == "not at all":
            return input
        return input * 0.5 if self.way == "smaller" else input + 0.3


class TestForwardPassesThatDifferWithoutGradients:
    @pytest.mark.parametrize("way", ["smaller", "shifted"])
    @pytest.mark.parametrize("two_phases", [False, True])
    def test_are_probed_with_gradients(self, configuration, way, two_phases):
        tasks = [classification(nn.Linear(8, 16), Differing(way), nn.Tanh(), nn.Linear(16, 3))]
        tasks.append(copy.deepcopy(tasks[0]))
        opts = [configuration(task.model.parameters()) for task in tasks]
        for step in range(40):
            for opt, closure in (
                (opts[0], tasks[0].closure(step)),
                (opts[1], torch.enable_grad()(tasks[1].closure(step))),
            ):
                loss = backward_of(opt, closure) if two_phases else None
                opt.step(closure, loss=loss)
        assert identical(values(tasks[0].model), values(tasks[1].model))
        assert opts[0].rate == opts[1].rate

    @pytest.mark.parametrize("resumes", [False, True])
    def test_from_some_step_on(self, resumes):
        """As where a part of a model goes into eval mode."""
        task = classification(
            nn.Linear(8, 16), Differing("not at all"), nn.Tanh(), nn.Linear(16, 3)
        )
        opt = LQA(task.model.parameters())
        for step in range(600):
            if step == 105:
                task.model[1].way = "shifted"
            if resumes and step == 300:
                state = copy.deepcopy(opt.state_dict())
                opt = LQA(task.model.parameters())
                opt.load_state_dict(state)
            opt.step(task.closure(step))
        assert 1e-4 < opt.rate < 1.0
        assert full_loss_with_gradients(task) < 0.6

    def test_a_closure_that_does_not_repeat_with_gradients_either_is_probed_without(self):
        task, enabled = classification(), []
        opt = LQA(task.model.parameters(), direction="sgd")
        steps = iter(range(10**6))

        def closure():
            enabled.append(torch.is_grad_enabled())
            return task.closure(next(steps))()

        with pytest.warns(UserWarning, match="the closure returned"):
            opt.step(closure)
        assert opt.report.forwards == len(enabled) == 7
        enabled.clear()
        opt.step(closure)
        assert enabled == [True, False, False]

    @pytest.mark.parametrize(
        "needs",
        [
            lambda logits: functional.cross_entropy(
                logits, logits.detach().argmax(1)
            ).grad_fn.name(),
            lambda logits: logits.mul(int(logits.requires_grad) or "no"),
            lambda logits: {True: [0], False: []}[logits.requires_grad].index(0),
        ],
    )
    def test_closures_may_fail_without_gradients_in_words_of_their_own(self, needs):
        task, eager = classification(), classification()
        opts = [LQA(each.model.parameters()) for each in (task, eager)]
        for step in range(12):

            def closure(task=task, step=step):
                needs(task.model(task.inputs[:4]))
                return task.closure(step)()

            opts[0].step(closure)
            opts[1].step(torch.enable_grad()(eager.closure(step)))
        assert identical(values(task.model), values(eager.model))

    @pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
    @pytest.mark.parametrize("two_phases", [False, True])
    @pytest.mark.parametrize("begins", [0, 60])
    def test_the_fast_path_of_an_encoder_beside_dropout(self, two_phases, begins):
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
        body = nn.TransformerEncoder(layer, 1)
        head = nn.Sequential(nn.Dropout(0.1), nn.Linear(16, 4))
        model = nn.ModuleList([nn.Embedding(12, 16), body, head])
        tokens = torch.randint(12, (128, 8))
        padded = torch.arange(8) >= torch.randint(3, 7, (128, 1))
        opt, enabled = LQA(model.parameters()), []
        for step, rows in enumerate(torch.randint(128, (200, 32))):
            if step == begins:
                body.eval()

            def closure(rows=rows):
                enabled.append(torch.is_grad_enabled())
                hidden = body(model[0](tokens[rows]), src_key_padding_mask=padded[rows])
                return functional.cross_entropy(head(hidden.mean(1)), tokens[rows, 0] % 4)

            loss = backward_of(opt, closure) if two_phases else None
            opt.step(closure, loss=loss)
        assert all(enabled[-30:])

    @pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
    def test_the_fast_path_of_an_encoder(self):
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
        body = nn.TransformerEncoder(layer, 1)
        body.eval()
        model = nn.ModuleList([nn.Embedding(12, 16), body, nn.Linear(16, 4)])
        tokens = torch.randint(12, (128, 8))
        padded = torch.arange(8) >= torch.randint(3, 7, (128, 1))
        opt = LQA(model.parameters())
        for rows in torch.randint(128, (200, 32)):

            def closure(rows=rows):
                hidden = body(model[0](tokens[rows]), src_key_padding_mask=padded[rows])
                return functional.cross_entropy(model[2](hidden.mean(1)), tokens[rows, 0] % 4)

            loss = opt.step(closure)
        assert loss < 0.3


def full_loss_with_gradients(task: Task) -> float:
    return functional.cross_entropy(task.model(task.inputs), task.labels).item()


def test_threads_train_side_by_side():
    """Each with buffers of its own, and models that are compiled later are."""

    def job():
        task = classification(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 3))
        return task, LQA(task.model.parameters())

    def train(job):
        task, opt = job
        for step in range(150):
            opt.step(task.closure(step))

    alone, *jobs = [job() for _ in range(4)]
    train(alone)
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(train, jobs))
    for task, _ in jobs:
        assert identical(values(task.model), values(alone[0].model))
    frames = CompileCounter()
    torch.compile(alone[0].model, backend=frames)(alone[0].inputs)
    assert frames.frame_count == 1


class TestOutOfMemory:
    MESSAGE = (
        r"^the last 3 measurements ran out of memory, so training goes on at the rate in force, "
        r"\S+: a probe holds one more copy of the parameters and runs the model forward; make the "
        r"batches smaller, or free memory before step\(\)$"
    )
    ERRORS = (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:119] err == 0. DefaultCPUAllocator: can't "
            "allocate memory: you tried to allocate 8 bytes"
        ),
        RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"),
        MemoryError(),
    )

    @staticmethod
    def probing(task, step, error):
        """A closure whose probes run out of memory, and no gradient pass."""

        def closure():
            if not torch.is_grad_enabled():
                raise error
            return task.closure(step)()

        return closure

    @pytest.mark.parametrize("error", ERRORS)
    def test_in_probes_is_told_and_training_goes_on_at_the_rate_in_force(
        self, configuration, error
    ):
        task = classification()
        opt = configuration(task.model.parameters())
        start, first = values(task.model), full_loss(task)
        for step in range(2):
            with pytest.raises(type(error)):
                opt.step(self.probing(task, step, error))
        assert identical(start, values(task.model))
        with pytest.warns(UserWarning, match=self.MESSAGE) as caught:
            opt.step(self.probing(task, 2, error))
        assert caught[0].filename == __file__
        assert opt.report.reason is Reason.HELD
        rate = opt.rate
        for step in range(3, 100):
            opt.step(self.probing(task, step, error))
        assert opt.rate == rate
        assert full_loss(task) < first
        # There is memory again.
        for step in range(100, 150):
            opt.step(task.closure(step))
        assert opt.report.counts[Reason.HELD] < 149
        assert opt.rate != rate

    def test_now_and_then_is_the_callers(self):
        task = classification()
        opt = LQA(task.model.parameters(), direction="sgd")
        for step in range(30):
            if step % 3:
                with pytest.raises(MemoryError):
                    opt.step(self.probing(task, step, MemoryError()))
            else:
                opt.step(task.closure(step))

    def test_in_the_gradient_pass_is_the_callers(self):
        task = classification()
        opt = LQA(task.model.parameters())

        def closure():
            raise torch.OutOfMemoryError("CUDA out of memory")

        for _ in range(30):
            with pytest.raises(torch.OutOfMemoryError):
                opt.step(closure)

    def test_any_other_error_in_probes_is_the_callers(self):
        task = classification()
        opt = LQA(task.model.parameters())
        for step in range(30):
            with pytest.raises(RuntimeError, match="shapes"):
                opt.step(self.probing(task, step, RuntimeError("shapes do not match")))


def test_a_librarys_closure_that_runs_backward_is_not_warned_of(tmp_path, monkeypatch):
    """Its user cannot change it."""
    source = (
        "from functools import partial\n"
        "def run(loss):\n    value = loss()\n    value.backward()\n    return value\n"
        "class Closure:\n    def __init__(self, loss):\n        self.loss = loss\n"
        "    def __call__(self):\n        return run(self.loss)\n"
        "    def run(self):\n        return self()\n"
    )
    (tmp_path / "framework.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(optimizer.sysconfig, "get_path", lambda kind: str(tmp_path))
    import framework

    task = classification()
    for make in (
        lambda loss: partial(framework.run, loss),
        framework.Closure,
        lambda loss: framework.Closure(loss).run,
        lambda loss: partial(partial(framework.Closure(loss).run)),
    ):
        opt = LQA(task.model.parameters())
        opt.step(make(task.closure()))
        assert opt.report.backwards > 1
    opt = LQA(task.model.parameters())
    with pytest.warns(UserWarning, match="the closure calls backward"):
        opt.step(lambda: framework.run(task.closure()))


class Still:
    """A search that measures and stays."""

    parabola, agreement, quiet = None, None, 0.0

    def radius(self, rate):
        return rate

    def decide(self, rate, points):
        from quadstep.parabola import Decision

        return self, Decision(rate, 0.0, Reason.MINIMUM)


class TestBatchesOfTwo:
    @pytest.mark.parametrize("seed", [0, 1])
    @pytest.mark.parametrize(
        "build",
        [
            lambda params: LQA(params, direction="sgd"),
            lambda params: LQA(torch.optim.SGD(params, lr=0.1, momentum=0.9, nesterov=True)),
            lambda params: LQA(torch.optim.Adagrad(params)),
        ],
        ids=["gradient", "nesterov", "adagrad"],
    )
    def test_a_wrong_example_does_not_send_the_rate_out(self, build, seed):
        """Nearly all losses are zero in the end, and the slope of the rest is steep."""
        inputs, labels = map(torch.from_numpy, load_breast_cancer(return_X_y=True))
        inputs = ((inputs - inputs.mean(0)) / inputs.std(0)).float()
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Linear(30, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2)
        )
        opt = build(model.parameters())

        def loss(rows=slice(None)):
            outputs = model(inputs[rows])
            return functional.cross_entropy(outputs, labels[rows])

        for batch in torch.randint(len(labels), (1500, 2)):
            opt.step(lambda batch=batch: loss(batch))
        assert loss() < 0.2


class TestAccelerators:
    def test_what_is_launched_together_gives_what_is_done_one_by_one(
        self, configuration, monkeypatch
    ):
        def trained():
            task = noisy_classification(dtype=torch.float64)
            opt = configuration(task.model.parameters())
            for step in range(25):
                opt.step(task.closure(step))
            return values(task.model)

        plain = trained()
        for module in (line, direction, optimizer):
            monkeypatch.setattr(module, "at_hand", lambda tensor: False)
        torch.testing.assert_close(trained(), plain, rtol=1e-9, atol=1e-12)
        trains_without_a_trace(configuration, lambda opt, closure: opt.step(closure))

    def test_probes_may_write_over_the_gradients(self, configuration, monkeypatch):
        """As those of replayed graphs do."""
        monkeypatch.setattr(direction, "at_hand", lambda tensor: False)
        plain, replayed = classification(dtype=torch.float64), classification(dtype=torch.float64)
        for task in (plain, replayed):
            opt = configuration(task.model.parameters())
            for step in range(15):
                opt.zero_grad()
                loss = task.closure(step)()
                loss.backward()
                static = [param.grad for param in task.model.parameters()]

                def closure(task=task, static=static, step=step):
                    if task is replayed:
                        torch._foreach_zero_(static)
                    return task.closure(step)()

                opt.step(closure, loss=loss)
        assert identical(values(plain.model), values(replayed.model))

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_a_measuring_step_looks_before_any_state_advances(
        self, configuration, bad, monkeypatch
    ):
        """Where looking means waiting a held step does not look, a measuring one does."""
        monkeypatch.setattr(optimizer, "at_hand", lambda tensor: False)
        task, opt = about_to_measure(configuration)
        before, state = values(task.model), copy.deepcopy(opt.state_dict()["state"])
        hook = task.model[0].weight.register_hook(lambda grad: grad * bad)
        opt.step(task.closure())
        hook.remove()
        assert opt.report.reason is Reason.NON_FINITE
        assert identical(before, values(task.model))
        assert same(opt.state_dict()["state"], state)
        for step in range(20):
            opt.step(task.closure(step))
        assert opt.report.reason is not Reason.NON_FINITE
        assert math.isfinite(full_loss(task))

    def test_a_measuring_step_without_a_gradient_is_not_taken(self, monkeypatch):
        monkeypatch.setattr(optimizer, "at_hand", lambda tensor: False)
        task, opt = about_to_measure(LQA)
        before = [param.detach().clone() for param in task.model.parameters()]
        state = copy.deepcopy(opt.state_dict()["state"])
        opt.step(lambda: 0.0 * task.closure()())
        assert opt.report.reason is Reason.HELD
        assert identical(before, list(task.model.parameters()))
        assert same(opt.state_dict()["state"], state)
        opt.step(task.closure())
        assert opt.report.reason is not Reason.HELD

    def test_a_held_step_does_not_look(self, monkeypatch):
        monkeypatch.setattr(optimizer, "at_hand", lambda tensor: False)
        task = classification()
        opt = LQA(task.model.parameters())
        while not opt._wait:
            opt.step(task.closure())
        monkeypatch.setattr(opt, "_inspect", None)
        opt.step(task.closure())
        assert opt.report.reason is Reason.HELD


class TestCheckpoints:
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
        own, other = opt.configuration, state["param_groups"][0]["lqa"]["configuration"]
        key = next(key for key in own if own[key] != other[key])
        before = copy.deepcopy(opt.state_dict())
        with pytest.raises(ValueError, match="state_dict was saved with") as caught:
            opt.load_state_dict(state)
        assert str(caught.value) == (
            f"state_dict was saved with {key} = {other[key]!r}, this optimizer has {key} = "
            f"{own[key]!r}; construct LQA as it was when it was saved"
        )
        assert same(opt.state_dict(), before)
