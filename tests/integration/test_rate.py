"""The rate in training jobs: from any first rate, on plateaus, in noise, around odd gradients."""

import copy
import math

import pytest
import torch
from configurations import BASES, CONFIGURATIONS, SAFEGUARDED
from problems import Quadratic, classification, identical, values
from seams import is_due, keep_momentum, momentum_scale, noise_estimate
from sklearn.datasets import load_breast_cancer
from torch import nn
from torch.nn import functional
from training import full_loss, train, with_fault

from quadstep import LQA, Reason


class TestTheRate:
    @pytest.mark.parametrize("start", [1e-12, 1e-3, 1e3, 1e6, 1e12])
    @pytest.mark.parametrize(
        "build",
        [
            lambda params, start: LQA(params, delta0=start),
            lambda params, start: LQA(params, direction="gradient", delta0=start),
            lambda params, start: LQA(torch.optim.AdamW(params, lr=start)),
        ],
        ids=["lqa-auto", "lqa", "lqa(adamw)"],
    )
    def test_recovers_from_any_rate_within_100_steps(self, build, start):
        task = classification()
        opt = build(task.model.parameters(), start)
        first = task.closure(0, 256)().item()
        train(task, opt, range(100))
        opt.eval()
        last = task.closure(0, 256)().item()
        assert last < 0.8 * first
        assert 1e-5 < opt.rate < 10.0

    def test_a_plateau_does_not_throw_the_weights_away(self):
        """Small weights in a deep network: hardly any slope, a vertex far beyond the probes."""
        torch.manual_seed(0)
        task = classification(
            nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)
        )
        with torch.no_grad():
            for param in task.model.parameters():
                param.mul_(0.05)
        opt = LQA(task.model.parameters(), direction="gradient")
        train(task, opt, range(1000))
        # Gradient descent at a rate of 0.1 is still at 1.08.
        assert task.closure(0, 256)().item() < 0.6

    @pytest.mark.parametrize("name", ["momentum", "adam"])
    def test_noise_along_a_momentum_direction_does_not_run_away(self, name):
        """Each batch predicts a decrease along a direction made from it; others see a rise."""
        torch.manual_seed(0)
        model, labels = nn.Linear(64, 4), torch.randint(4, (2048,))
        inputs = torch.randn(2048, 64)
        opt = LQA(BASES[name](model.parameters()))
        for batch in torch.randint(2048, (1000, 16)):
            opt.step(
                lambda batch=batch: functional.cross_entropy(model(inputs[batch]), labels[batch])
            )
        assert functional.cross_entropy(model(inputs), labels).item() < 3.0


class TestNoise:
    """Where losses are free of noise, the fast iterate of the default steps further."""

    def test_losses_of_full_batches_are_deterministic(self):
        task = classification()
        opt = LQA(task.model.parameters())
        scales = []
        for _ in range(400):
            opt.step(task.closure(size=256))
            scales.append(momentum_scale(opt))
        assert max(scales) == 3.0

    def test_batches_are_not_and_change_nothing(self, monkeypatch):
        ends = []
        for keeps in (False, True):
            if keeps:
                keep_momentum(monkeypatch)
            task = classification()
            opt = LQA(task.model.parameters())
            for step in range(400):
                opt.step(task.closure(step, size=16))
            assert momentum_scale(opt) == 1.0
            ends.append(values(task.model))
        assert identical(*ends)

    def test_a_probe_that_is_not_finite_says_nothing_of_noise(self):
        task = classification()
        opt = LQA(task.model.parameters())
        closure = task.closure(size=256)
        while momentum_scale(opt) < 2.0 or not is_due(opt):
            opt.step(closure)
        known = noise_estimate(opt), momentum_scale(opt)
        opt.step(with_fault(closure, 2, lambda loss: loss * math.inf))
        assert opt.report.reason is Reason.NON_FINITE
        assert (noise_estimate(opt), momentum_scale(opt)) == known

    def test_a_narrow_valley_is_followed_faster(self, monkeypatch):
        left = []
        rotation = torch.linalg.qr(torch.arange(400, dtype=torch.float64).reshape(20, 20).sin()).Q
        hessian = rotation @ torch.logspace(-4, 0, 20, dtype=torch.float64).diag() @ rotation.T
        for keeps in (False, True):
            if keeps:
                keep_momentum(monkeypatch)
            theta = nn.Parameter(torch.ones(20, dtype=torch.float64))
            valley = Quadratic(hessian, torch.zeros_like(theta), 0.0, theta)
            opt = LQA([theta])
            for _ in range(600):
                opt.step(valley)
            opt.eval()
            left.append(valley().item())
        assert left[0] < 0.6 * left[1]


@pytest.mark.slow
class TestBatchesOfTwo:
    @pytest.mark.parametrize("seed", [0, 1])
    @pytest.mark.parametrize(
        "build",
        [
            lambda params: LQA(params, direction="gradient"),
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
            return functional.cross_entropy(model(inputs[rows]), labels[rows])

        for batch in torch.randint(len(labels), (1500, 2)):
            opt.step(lambda batch=batch: loss(batch))
        assert loss() < 0.2


class Binary(nn.Linear):
    """Weights of two values, whose gradients pass straight through the rounding."""

    def forward(self, inputs):
        binary = self.weight.sign() * self.weight.abs().mean()
        return functional.linear(
            inputs, binary.detach() + self.weight - self.weight.detach(), self.bias
        )


@pytest.mark.parametrize("name", SAFEGUARDED)
class TestGradientsThatAreNotTheSlope:
    """The slope is measured, so a gradient need only point downhill."""

    def left(self, name, task, steps):
        """The part of the loss that is left after so many steps."""
        opt = CONFIGURATIONS[name](task.model.parameters())
        start = full_loss(task)
        train(task, opt, range(steps))
        opt.eval()
        return full_loss(task) / start

    @pytest.mark.slow
    def test_straight_through_estimators_train(self, name):
        """Slowly: near by the loss is a stair, and has no minimum."""
        task = classification(Binary(8, 32), nn.ReLU(), Binary(32, 3))
        assert self.left(name, task, steps=2000) < 0.9

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


@pytest.mark.parametrize("direction", ["rms", "gradient"])
class TestRowsWithAMean:
    """What has a mean over the inputs of an output is learned, however many there are."""

    @pytest.mark.parametrize("shape", [(64,), (1, 64), (3, 1, 5), (2, 1, 8, 8)])
    def test_a_field_becomes_its_target(self, direction, shape):
        torch.manual_seed(0)
        target = 1.0 + torch.randn(shape)
        field = nn.Parameter(torch.zeros(shape))
        opt = LQA([field], direction=direction)
        for _ in range(400):
            loss = opt.step(lambda: (field - target).square().mean())
        assert loss < 0.01
        assert opt.rate > 1e-3

    @pytest.mark.parametrize(
        ("layer", "shape"), [(nn.Linear(50, 1), (50,)), (nn.Conv2d(3, 2, 3), (3, 6, 6))]
    )
    def test_a_layer_on_positive_inputs(self, direction, layer, shape):
        torch.manual_seed(0)
        layer.reset_parameters()
        model, truth = copy.deepcopy(layer), copy.deepcopy(layer)
        with torch.no_grad():
            for param in truth.parameters():
                param.copy_(0.25 + 0.02 * torch.randn_like(param))
            inputs = torch.rand(256, *shape)
            targets = truth(inputs)
        opt = LQA(model.parameters(), direction=direction)

        def loss(rows=slice(None)):
            return functional.mse_loss(model(inputs[rows]), targets[rows]) / targets.var()

        for rows in torch.randint(256, (600, 32)):
            opt.step(lambda rows=rows: loss(rows))
        opt.eval()
        assert loss() < 0.02

    def test_log_variances(self, direction):
        torch.manual_seed(0)
        data = torch.randn(256, 6) * torch.tensor([0.2, 0.3, 0.5, 1.0, 2.0, 3.0]) + 1.0
        mean, log_variance = (nn.Parameter(torch.zeros(1, 6)) for _ in range(2))
        opt = LQA([mean, log_variance], direction=direction)

        def loss():
            return (log_variance + (data - mean).square() / log_variance.exp()).mean()

        for _ in range(600):
            opt.step(loss)
        opt.eval()
        best = (data.var(0, correction=0).log() + 1.0).mean()
        assert loss() < best + 0.01

    def test_columns_that_never_occur_do_not_move_a_prediction(self, direction):
        torch.manual_seed(0)
        kinds = torch.randint(12, (256,))
        inputs = torch.cat([torch.randn(256, 4), functional.one_hot(kinds, 16)], 1)
        targets = inputs[:, :1] + kinds[:, None] / 12
        model = nn.Sequential(nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 1))
        unseen = model[0].weight[:, 16:].clone()
        opt = LQA(model.parameters(), direction=direction, weight_decay=0)
        for rows in torch.randint(256, (200, 32)):
            opt.step(lambda rows=rows: functional.mse_loss(model(inputs[rows]), targets[rows]))
        opt.eval()
        assert functional.mse_loss(model(inputs), targets) < 0.05
        assert torch.equal(model[0].weight[:, 16:], unseen)


@pytest.mark.parametrize("name", ["lqa-auto", "lqa(adamw)"])
def test_a_constant_added_to_the_loss_changes_little(name):
    """Also where it then starts at zero, or below."""
    ends = []
    for start in (None, 0.0, -2.0):
        task = classification()
        opt = CONFIGURATIONS[name](task.model.parameters())
        constant = 0.0 if start is None else start - full_loss(task)
        for step in range(400):
            closure = task.closure(step)
            opt.step(lambda closure=closure, constant=constant: closure() + constant)
        opt.eval()
        ends.append(full_loss(task))
    assert ends[0] < 0.45
    assert max(ends) < 1.5 * min(ends)


@pytest.mark.parametrize(
    "build",
    [
        lambda params: LQA(torch.optim.SGD(params, lr=0.1)),
        lambda params: LQA(torch.optim.SGD(params, lr=0.1, momentum=0.9)),
        lambda params: LQA(torch.optim.AdamW(params)),
        lambda params: LQA(params, averaging=None),
        lambda params: LQA(params, direction="gradient", averaging=None),
    ],
    ids=["sgd", "momentum", "adamw", "rms", "gradient"],
)
def test_policy_gradients_with_a_baseline(build):
    """The loss of a batch is noise around zero, and says nothing of what is learned."""
    torch.manual_seed(0)
    states = torch.randn(1024, 8)
    best = (states @ torch.randn(8, 4)).argmax(1)
    policy, baseline, rates = nn.Linear(8, 4), 0.25, []
    opt = build(policy.parameters())
    for rows in torch.randint(1024, (500, 64)):
        with torch.no_grad():
            actions = torch.distributions.Categorical(logits=policy(states[rows])).sample()
        rewards = (actions == best[rows]).float()
        advantages = rewards - baseline
        opt.step(
            lambda rows=rows, actions=actions, advantages=advantages: (
                advantages
                * functional.cross_entropy(policy(states[rows]), actions, reduction="none")
            ).mean()
        )
        baseline += 0.1 * (rewards.mean().item() - baseline)
        rates.append(opt.rate)
    # AdamW at 3e-3, 1e-2 and 3e-2 chooses the best action for 0.92, 0.95 and 0.96 of the states.
    assert (policy(states).argmax(1) == best).float().mean() > 0.9
    assert max(rates[100:]) < 100.0 * min(rates[100:])


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
        assert opt.report.reason is Reason.UNRESOLVED
    assert param.isfinite().all()
