"""Whose gradients a step finds in place: cleared, stale, of another optimizer, or dropped."""

import pytest
import torch
from problems import classification, identical, values
from torch import nn
from torch.nn import functional
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from training import backward_of, train

from quadstep import LQA


def clear_in_closure(task, opt, run):
    def closure():
        opt.zero_grad(set_to_none=False)
        return run()

    return closure


def clear_by_the_model(task, opt, run):
    def closure():
        task.model.zero_grad(set_to_none=False)
        return run()

    return closure


def clear_by_hand(task, opt, run):
    def closure():
        loss = run()
        for param in task.model.parameters():
            if param.grad is not None:
                param.grad.zero_()
        return loss

    return closure


def clear_to_none(task, opt, run):
    def closure():
        opt.zero_grad()
        return run()

    return closure


class TestClearedGradients:
    @pytest.mark.parametrize(
        "clear", [clear_in_closure, clear_by_the_model, clear_by_hand, clear_to_none]
    )
    @pytest.mark.parametrize("before", [None, False, True])
    def test_in_a_closure_that_only_runs_forward_change_nothing(self, clear, before):
        plain, cleared = classification(), classification()
        expected, opt = LQA(plain.model.parameters()), LQA(cleared.model.parameters())
        for step in range(40):
            expected.step(plain.closure(step))
            if before is not None:
                opt.zero_grad(set_to_none=before)
            opt.step(clear(cleared, opt, cleared.closure(step)))
        assert identical(values(plain.model), values(cleared.model))
        assert opt.report == expected.report

    @pytest.mark.filterwarnings("ignore:the closure calls backward")
    def test_a_batch_without_a_gradient_in_a_closure_that_runs_backward(self):
        task = classification()
        opt = LQA(task.model.parameters())
        for step in range(60):

            def closure(step=step):
                opt.zero_grad(set_to_none=False)
                loss = task.closure(step)() * float(step % 5 != 3)
                loss.backward()
                return loss

            opt.zero_grad(set_to_none=False)
            opt.step(closure)
        assert opt.report.loss < 1.0

    def test_zeros_that_a_closure_puts_there_are_no_backward_pass(self):
        plain, cleared = classification(), classification()
        expected, opt = LQA(plain.model.parameters()), LQA(cleared.model.parameters())
        for step in range(20):
            expected.step(plain.closure(step))

            def closure(step=step):
                for param in cleared.model.parameters():
                    param.grad = torch.zeros_like(param)
                return cleared.closure(step)()

            opt.step(closure)
        assert identical(values(plain.model), values(cleared.model))

    @pytest.mark.filterwarnings("ignore:the closure calls backward")
    def test_a_first_batch_without_a_gradient_in_a_closure_that_runs_backward(self):
        task = classification()
        opt = LQA(task.model.parameters())

        def closure(step):
            loss = task.closure(step)() * float(step > 1)
            loss.backward()
            return loss

        for step in range(20):
            opt.step(lambda step=step: closure(step))
        assert opt.report.counts["reused"] >= 2


class GenerativeAdversarialNetwork:
    """A generator of points and its discriminator."""

    def __init__(self):
        torch.manual_seed(0)
        self.generator = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 2))
        self.discriminator = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 1))
        self.real = 3.0 + 0.1 * torch.randn(64, 2)
        self.noise = torch.randn(64, 2)

    def discriminate(self):
        logits = self.discriminator(torch.cat([self.real, self.generator(self.noise).detach()]))
        labels = torch.cat([torch.ones(64, 1), torch.zeros(64, 1)])
        return binary_cross_entropy_with_logits(logits, labels)

    def generate(self):
        logits = self.discriminator(self.generator(self.noise))
        return binary_cross_entropy_with_logits(logits, torch.ones(64, 1))


class TestStaleGradients:
    """Those that the backward pass of another loss leaves."""

    @pytest.mark.parametrize("clears", [None, "before", "in the closure"])
    @pytest.mark.parametrize("generator", ["lqa", "adam"])
    def test_a_generator_leaves_them_in_its_discriminator(self, clears, generator):
        pair = GenerativeAdversarialNetwork()
        opts = [LQA(pair.discriminator.parameters(), averaging=None)]
        if generator == "lqa":
            opts.append(LQA(pair.generator.parameters(), averaging=None))
        else:
            opts.append(torch.optim.Adam(pair.generator.parameters(), lr=1e-3))

        def closure():
            if clears == "in the closure":
                opts[0].zero_grad(set_to_none=False)
            return pair.discriminate()

        first = pair.discriminate().item()
        for _ in range(60):
            if clears == "before":
                opts[0].zero_grad(set_to_none=False)
            opts[0].step(closure)
            if generator == "lqa":
                opts[1].step(pair.generate)
            else:
                backward_of(opts[1], pair.generate)
                opts[1].step()
        assert opts[0].rate > 1e-4
        assert opts[0].report.loss != first
        assert opts[0].report.backwards == 1

    @pytest.mark.parametrize("generator", ["lqa", "lqa in two phases", "adam"])
    @pytest.mark.parametrize("loss", ["least squares", "hinge", "mean"])
    def test_that_were_cleared_after_a_step_are_not_taken_for_dropped_ones(self, loss, generator):
        losses = {
            "least squares": lambda logits, sign: (logits - sign).square().mean(),
            "hinge": lambda logits, sign: functional.relu(1.0 - sign * logits).mean(),
            "mean": lambda logits, sign: -sign * logits.mean(),
        }
        judge = losses[loss]
        pair = GenerativeAdversarialNetwork()
        opt = LQA(pair.discriminator.parameters(), averaging=None)
        other = (
            torch.optim.Adam(pair.generator.parameters())
            if generator == "adam"
            else LQA(pair.generator.parameters(), averaging=None)
        )

        def discriminate():
            fake = pair.discriminator(pair.generator(pair.noise).detach())
            return judge(pair.discriminator(pair.real), 1.0) + judge(fake, -1.0)

        def generate():
            return judge(pair.discriminator(pair.generator(pair.noise)), 1.0)

        for _ in range(30):
            opt.step(discriminate)
            opt.zero_grad()
            if generator == "lqa":
                other.step(generate)
                continue
            made = backward_of(other, generate)
            if generator == "adam":
                other.step()
            else:
                other.step(generate, loss=made)

    def test_of_a_group_that_joins_later(self):
        task = classification()
        opt = LQA(task.model[0].parameters())
        train(task, opt, range(5))
        opt.add_param_group({"params": list(task.model[2].parameters())})
        train(task, opt, range(5))


MESSAGE = (
    r"^gradients were in place when step\(closure\) was called, and the closure's own took their "
    r"place: what was clipped, scaled or accumulated is lost; give the loss that backward was "
    r"called on, step\(closure, loss=loss\), or leave that backward out$"
)


class TestDroppedGradients:
    """A loop that still runs backward itself and does not say so."""

    @pytest.mark.parametrize("build", [LQA, lambda params: LQA(torch.optim.SGD(params, lr=0.1))])
    @pytest.mark.parametrize("parts", [1, 4])
    @pytest.mark.parametrize("scale", [1.0, 2.0**10])
    def test_are_warned_of_once(self, build, parts, scale):
        task = classification()
        opt = build(task.model.parameters())

        def run():
            for step in range(20):
                opt.zero_grad()
                for part in range(parts):
                    closure = task.closure(parts * step + part)
                    (scale * closure() / parts).backward()
                nn.utils.clip_grad_norm_(task.model.parameters(), 0.1)
                opt.step(closure)

        with pytest.warns(UserWarning, match=MESSAGE) as caught:
            run()
        (warning,) = caught
        assert warning.filename == __file__

    def test_with_dropout_and_two_optimizers(self):
        torch.manual_seed(0)
        layers = nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3)
        task = classification(*layers)
        body, head = LQA(layers[0].parameters()), LQA(layers[3].parameters())

        def run():
            for step in range(5):
                for opt, layer in ((body, layers[0]), (head, layers[3])):
                    opt.zero_grad()
                    task.closure(step)().backward()
                    nn.utils.clip_grad_norm_(layer.parameters(), 0.1)
                    opt.step(task.closure(step))

        with pytest.warns(UserWarning, match=MESSAGE) as caught:
            run()
        assert len(caught) == 2

    @pytest.mark.parametrize("set_to_none", [None, False])
    @pytest.mark.parametrize("parts", [1, 4])
    def test_with_dropout_and_gradients_that_are_never_let_go(self, set_to_none, parts):
        layers = nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3)
        task = classification(*layers)
        opt = LQA(task.model.parameters())

        def run():
            for step in range(20):
                if set_to_none is not None:
                    opt.zero_grad(set_to_none=set_to_none)
                for part in range(parts):
                    (task.closure(parts * step + part)() / parts).backward()
                nn.utils.clip_grad_norm_(task.model.parameters(), 0.1)
                opt.step(task.closure(parts * step))

        with pytest.warns(UserWarning, match=MESSAGE) as caught:
            run()
        assert len(caught) == 1

    def test_none_are_where_the_loss_is_given(self):
        task = classification()
        opt = LQA(task.model.parameters())
        for step in range(20):
            loss = backward_of(opt, task.closure(step))
            nn.utils.clip_grad_norm_(task.model.parameters(), 0.1)
            opt.step(task.closure(step), loss=loss)

    def test_none_are_of_another_loss(self):
        task = classification()
        opt = LQA(task.model.parameters())
        for step in range(20):
            opt.step(task.closure(step))
            task.model(torch.randn(64, 8)).square().mean().neg().backward()
            functional.l1_loss(task.model(task.inputs), torch.zeros(256, 3)).neg().backward()

    def test_an_error_that_the_warning_was_made_leaves_the_step_undone(self):
        task = classification()
        opt = LQA(task.model.parameters())
        before = values(task.model)
        task.closure()().backward()
        with pytest.raises(UserWarning, match=MESSAGE):
            opt.step(task.closure())
        assert identical(before, values(task.model))
        opt.step(task.closure())
        assert not identical(before, values(task.model))


class TestAccumulatedGradients:
    @pytest.mark.filterwarnings("ignore:the closure calls backward:UserWarning")
    def test_a_closure_that_runs_backward_adds_to_what_was_accumulated(self, configuration):
        every, parts = classification(dtype=torch.float64), classification(dtype=torch.float64)
        expected, opt = (configuration(task.model.parameters()) for task in (every, parts))
        for step in range(12):
            expected.zero_grad()
            every.closure(step + 100)().backward()
            loss = every.closure(step)()
            loss.backward()
            expected.step(every.closure(step), loss=loss)

            def closure(step=step):
                loss = parts.closure(step)()
                loss.backward()
                return loss

            opt.zero_grad()
            parts.closure(step + 100)().backward()
            opt.step(closure)
        assert identical(values(every.model), values(parts.model))

    @pytest.mark.filterwarnings("ignore:gradients were in place:UserWarning")
    def test_what_was_accumulated_is_cleared_for_a_closure_that_only_runs_forward(
        self, configuration
    ):
        cleared, left = classification(dtype=torch.float64), classification(dtype=torch.float64)
        expected, opt = (configuration(task.model.parameters()) for task in (cleared, left))
        for step in range(12):
            expected.step(cleared.closure(step))
            left.closure(step + 100)().backward()
            opt.step(left.closure(step))
        assert identical(values(cleared.model), values(left.model))

    @pytest.mark.filterwarnings("ignore:the closure calls backward:UserWarning")
    @pytest.mark.parametrize("runs_backward", [True, False])
    def test_what_the_last_step_left_is_cleared(self, configuration, runs_backward):
        cleared, left = classification(dtype=torch.float64), classification(dtype=torch.float64)
        expected, opt = (configuration(task.model.parameters()) for task in (cleared, left))
        for step in range(12):
            expected.step(cleared.closure(step))

            def closure(step=step):
                loss = left.closure(step)()
                if runs_backward:
                    loss.backward()
                return loss

            if step == 5:
                with pytest.raises(ZeroDivisionError):
                    opt.step(lambda closure=closure: closure() / (1 // 0))
            opt.step(closure)
        assert identical(values(cleared.model), values(left.model))


def test_sparse_gradients_of_another_pass():
    table = nn.Embedding(10, 4, sparse=True)
    opt = LQA(torch.optim.SparseAdam(table.parameters(), lr=0.01))
    rows, labels = torch.arange(4), torch.arange(4)
    for _ in range(10):
        opt.step(lambda: cross_entropy(table(rows), labels))
        table(rows).sum().backward()
