import copy
import gc
import pickle
import threading
import warnings
import weakref
from collections import UserDict
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from configurations import CONFIGURATIONS
from problems import identical, noisy_classification
from seams import is_due, take_two_probes
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from quadstep import LQA, Reason


class Classifier(nn.Module):
    """Returns the loss: dropout draws random numbers, batch normalization has buffers."""

    def __init__(self, returns=lambda loss, logits: loss):
        super().__init__()
        self.net = noisy_classification().model
        self.returns = returns

    def forward(self, x, y):
        logits = self.net(x)
        return self.returns(functional.cross_entropy(logits, y), logits)


def batches(steps, size=32):
    """The inputs and labels of each step; drawn from a separate generator."""
    task = noisy_classification()
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        picked = torch.randint(len(task.inputs), (size,), generator=generator)
        yield task.inputs[picked], task.labels[picked]


def build(make=LQA, kind=Classifier, **options):
    """A model, and an optimizer that records it or, with `model=None`, does not."""
    torch.manual_seed(0)
    model = kind()
    opt = make(model.parameters(), **{"model": model} | options)
    torch.manual_seed(1)
    return model, opt


def state(model, opt):
    return [*model.state_dict().values(), torch.tensor(opt.rate), torch.tensor(opt.report.loss)]


def run(model, opt, given):
    """Steps without a closure; returns what has come of it."""
    for x, y in given:
        opt.zero_grad()
        model(x, y).backward()
        opt.step()
    return state(model, opt)


def run_with_closure(model, opt, given):
    for x, y in given:
        opt.step(partial(model, x, y))
    return state(model, opt)


MAKERS = {
    "lqa-paper": LQA.paper,
    "lqa": partial(LQA, direction="gradient", averaging=None),
    "lqa-auto": LQA,
    "lqa(adamw)": lambda params, **options: LQA(torch.optim.AdamW(params, lr=1e-2), **options),
}
assert MAKERS.keys() == CONFIGURATIONS.keys()


class TestEquality:
    @pytest.mark.parametrize("name", MAKERS)
    def test_closure(self, name):
        model, opt = build(MAKERS[name])
        other, reference = build(MAKERS[name], model=None)
        ended = run(model, opt, batches(60))
        assert identical(ended, run_with_closure(other, reference, batches(60)))
        assert opt.report.slope == reference.report.slope

    @pytest.mark.parametrize(
        "returns",
        [
            lambda loss, logits: loss.reshape(1),
            lambda loss, logits: {"logits": logits, "loss": loss},
            lambda loss, logits: (loss, logits),
            lambda loss, logits: UserDict(logits=logits, loss=loss),
            lambda loss, logits: type("Output", (), {"loss": loss, "logits": logits})(),
        ],
    )
    def test_outputs(self, returns):
        model, opt = build(kind=partial(Classifier, returns))
        other, reference = build(model=None)
        for x, y in batches(20):
            output = model(x, y)
            if isinstance(output, torch.Tensor):
                loss = output
            elif isinstance(output, tuple):
                loss = output[0]
            else:
                loss = output.loss if hasattr(output, "loss") else output["loss"]
            loss.backward()
            opt.step()
            opt.zero_grad()
        ended = run_with_closure(other, reference, batches(20))
        assert identical(state(model, opt), ended)

    def test_two_phases(self, monkeypatch):
        take_two_probes(monkeypatch)
        model, opt = build(model=None)
        other, reference = build(model=None)
        for x, y in batches(60):
            closure = partial(model, x, y)
            opt.zero_grad()
            loss = closure()
            loss.backward()
            opt.step(closure, loss=loss)
        ended = run_with_closure(other, reference, batches(60))
        assert identical(state(model, opt), ended)

    @pytest.mark.parametrize("drawn", ["before", "after", "alone"])
    def test_two_phases_of_closures_that_draw(self, monkeypatch, drawn):
        take_two_probes(monkeypatch)
        weight = noisy_classification().model[0].weight.detach()
        ends = []
        for two_phases in (False, True):
            model, opt = build(model=None)
            free = nn.Parameter(weight.clone())
            opt.add_param_group({"params": [free]})
            for x, y in batches(40):
                torch.rand(3)  # of the loader

                def closure(model=model, free=free, x=x, y=y):
                    noise = torch.randn_like(x) if drawn == "before" else 0.0
                    loss = 0.0 if drawn == "alone" else model(x + 0.1 * noise, y)
                    hidden = functional.dropout(functional.linear(x, free), 0.3)
                    return loss + hidden.square().mean()

                if two_phases:
                    opt.zero_grad()
                    loss = closure()
                    loss.backward()
                    opt.step(closure, loss=loss)
                else:
                    opt.step(closure)
            ends.append([*state(model, opt), free])
        assert identical(*ends)

    def test_resumed(self):
        model, opt = build()
        given = [*batches(50)]
        run(model, opt, given[:25])
        saved = copy.deepcopy((model.state_dict(), opt.state_dict(), torch.get_rng_state()))
        ended = run(model, opt, given[25:])
        fresh, resumed = build()
        fresh.load_state_dict(saved[0])
        resumed.load_state_dict(saved[1])
        torch.set_rng_state(saved[2])
        assert identical(ended, run(fresh, resumed, given[25:]))

    def test_module_in_place_of_parameters(self):
        torch.manual_seed(0)
        model = Classifier()
        opt = LQA(model)
        torch.manual_seed(1)
        assert identical(run(model, opt, batches(5)), run(*build(), batches(5)))


class TestAccumulation:
    """In double precision, the closure being the mean or the sum over all parts."""

    @pytest.mark.parametrize("factors", [[0.5, 0.5], [1.0, 1.0], [0.2, 0.3, 0.5]])
    @pytest.mark.parametrize("clip", [False, True])
    def test_parts(self, factors, clip):
        ends = []
        for recorded in (True, False):
            model, opt = build(model=None)
            model.double()
            opt = LQA(model.parameters(), model=model if recorded else None)
            for x, y in batches(40):
                parts = [*zip(x.double().chunk(len(factors)), y.chunk(len(factors)), strict=True)]

                def closure(model=model, parts=parts):
                    terms = zip(factors, parts, strict=True)
                    return torch.stack([f * model(x, y) for f, (x, y) in terms]).sum()

                opt.zero_grad()
                if recorded:
                    for factor, (x, y) in zip(factors, parts, strict=True):
                        (factor * model(x, y)).backward()
                else:
                    loss = closure()
                    loss.backward()
                if clip:
                    nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                if recorded:
                    opt.step()
                else:
                    opt.step(closure, loss=loss)
            ends.append(state(model, opt))
        for one, other in zip(*ends, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9, check_dtype=False)

    def test_last_of_several_in_the_closure(self):
        reported = []
        model, opt = build(model=None)
        for x, y in batches(30):
            opt.zero_grad()
            losses = []
            for part in zip(x.chunk(2), y.chunk(2), strict=True):
                closure = partial(model, *part)
                losses.append(closure())
                (losses[-1] / 2).backward()
            was_due = is_due(opt)
            loss = opt.step(closure, loss=losses[-1])
            if was_due:
                reported.append((loss - sum(losses) / 2).abs().item())
        assert len(reported) > 3
        assert reported[0] > 1e-3  # nothing is known of the modules before the first
        assert max(reported[1:]) < 1e-6

    @pytest.mark.parametrize("clears", ["optimizer", "model", "zeros"])
    def test_skipped_batch(self, clears):
        model, opt = build()
        given = [*batches(2)]
        model(*given[0]).backward()  # it is thrown away
        if clears == "model":
            model.zero_grad()
        else:
            opt.zero_grad(set_to_none=clears == "optimizer")
        loss = model(*given[1])
        loss.backward()
        assert opt.step() == loss

    @pytest.mark.parametrize("of_inputs", [False, True])
    def test_gradients_that_the_loop_takes_first(self, of_inputs):
        model, opt = build()
        for x, y in batches(3):
            x.requires_grad_(of_inputs)
            loss = model(x, y)
            inputs = [x] if of_inputs else [*model.parameters()]
            torch.autograd.grad(2.0 * loss, inputs, retain_graph=True)
            opt.zero_grad()
            loss.backward()
            assert opt.step() == loss

    def test_features_of_which_each_loss_has_its_own_backward_pass(self):
        torch.manual_seed(0)
        body = nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8))
        heads, criterion = [nn.Linear(8, 3), nn.Linear(8, 3)], nn.CrossEntropyLoss()
        modules = nn.ModuleList([body, *heads])
        opt = LQA(modules.parameters(), model=[body, *heads], criterion=criterion)
        for x, y in batches(5):
            features, gradients = body(x), []
            for head in heads:
                opt.zero_grad()
                loss = criterion(head(features), y)
                loss.backward(retain_graph=True)
                gradients.append(body.bias.grad.clone())
            body.bias.grad = sum(gradients)
            assert opt.step() == loss

    def test_losses_of_calls_that_pass_a_state_on(self):
        class Recurrent(nn.Module):
            def __init__(self):
                super().__init__()
                self.cell = nn.LSTMCell(8, 3)

            def forward(self, x, y, state=None):
                hidden, cell = self.cell(x, state)
                return functional.cross_entropy(hidden, y), (hidden, cell)

        ends = []
        for recorded in (True, False):
            model, opt = build(kind=Recurrent, model=None)
            opt = LQA(model.parameters(), model=model if recorded else None)
            for x, y in batches(20):

                def losses(model=model, x=x, y=y):
                    state, losses = None, []
                    for part, labels in zip(x.split(8), y.split(8), strict=True):
                        loss, state = model(part, labels, state)
                        losses.append(loss)
                    return torch.stack(losses).sum()

                if recorded:
                    losses().backward()
                    opt.step()
                    opt.zero_grad()
                else:
                    opt.step(losses)
            ends.append(state(model, opt))
        for one, other in zip(*ends, strict=True):
            torch.testing.assert_close(one, other, check_dtype=False)

    def test_zero_grad_between_passes(self):
        model, opt = build()
        for x, y in batches(3):
            loss = model(x, y)
            opt.zero_grad()
            loss.backward()
            assert opt.step() == loss

    def test_losses_of_one_backward_pass(self):
        model, opt = build()
        one, other = batches(2)
        first, second = model(*one), model(*other)
        (first + 3.0 * second).backward()
        torch.testing.assert_close(opt.step(), (first + 3.0 * second).detach())

    def test_loss_without_backward_does_not_count(self):
        model, opt = build()
        (x, y), other = batches(2)
        model(*other)
        loss = model(x, y)
        model(*other)
        loss.backward()
        assert opt.step() == loss

    def test_scaled_in_place(self):
        model, opt = build()
        ((x, y),) = batches(1)
        loss = model(x, y)
        value = loss.item()
        loss *= 0.5
        loss.backward()
        assert opt.step().item() == pytest.approx(value / 2)

    def test_gradient_scaler(self):
        losses = []
        for enabled in (False, True):
            model, opt = build()
            scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=enabled)
            for x, y in batches(30):
                scaler.scale(model(x, y)).backward()
                scaler.step(opt)
                scaler.update()
                opt.zero_grad()
                losses.append(opt.report.loss)
        assert losses[30:] == pytest.approx(losses[:30], rel=1e-2)

    def test_overflow_of_the_scaler(self):
        model, opt = build()
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
        taken = []
        for x, y in batches(5):
            scale, loss = scaler.get_scale(), 4.0 * model(x, y)
            scaler.scale(loss).backward()
            scaler.step(opt)
            scaler.update()
            model.zero_grad()
            if scaler.get_scale() == scale:
                taken.append(opt.report.loss / loss.item())
        assert 0 < len(taken) < 5
        assert taken == pytest.approx([1.0] * len(taken))


class TestCriterion:
    def build(self, recorded, criterion=None):
        torch.manual_seed(0)
        model = noisy_classification().model
        criterion = nn.CrossEntropyLoss() if criterion is None else criterion
        options = {"model": model, "criterion": criterion} if recorded else {}
        torch.manual_seed(1)
        return model, criterion, LQA(model.parameters(), **options)

    @pytest.mark.parametrize(
        "between",
        [
            lambda out: out,
            lambda out: out.float(),
            lambda out: out.unsqueeze(1).squeeze(1),
            lambda out: out.view(-1, 3)[:, :],
            lambda out: out.T.contiguous().T,
            lambda out: out[:, [0, 1, 2]],
        ],
        ids=["nothing", "float", "squeeze", "view", "transpose", "index"],
    )
    def test_between(self, between):
        ends = []
        for recorded in (True, False):
            model, criterion, opt = self.build(recorded)
            for x, y in batches(30):
                if recorded:
                    criterion(between(model(x)), y).backward()
                    opt.step()
                    opt.zero_grad()
                else:
                    opt.step(lambda model=model, c=criterion, x=x, y=y: c(between(model(x)), y))
            ends.append(state(model, opt))
        assert identical(*ends)

    def test_cast(self):
        ends = []
        for recorded in (True, False):
            model, criterion, opt = self.build(recorded)
            for x, y in batches(30):

                def outputs(model=model, x=x):
                    with torch.autocast("cpu", torch.bfloat16):
                        return model(x).float()

                if recorded:
                    criterion(outputs(), y).backward()
                    opt.step()
                    opt.zero_grad()
                else:
                    opt.step(lambda o=outputs, c=criterion, y=y: c(o(), y))
            ends.append(state(model, opt))
        assert identical(*ends)

    def test_model_called_twice(self):
        ends = []
        for recorded in (True, False):
            criterion = nn.CosineEmbeddingLoss(margin=0.2)
            model, criterion, opt = self.build(recorded, criterion)
            for x, y in batches(30):

                def loss(model=model, criterion=criterion, x=x, y=y):
                    left, right = x.chunk(2)
                    target = (y.chunk(2)[0] == y.chunk(2)[1]).float() * 2.0 - 1.0
                    return criterion(model(left), model(right), target)

                if recorded:
                    loss().backward()
                    opt.step()
                    opt.zero_grad()
                else:
                    opt.step(loss)
            ends.append(state(model, opt))
        assert identical(*ends)

    def test_several_modules(self):
        ends = []
        for recorded in (True, False):
            torch.manual_seed(0)
            body, head = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.2)), nn.Linear(16, 3)
            criterion = nn.CrossEntropyLoss()
            options = {"model": [body, head], "criterion": criterion} if recorded else {}
            opt = LQA([*body.parameters(), *head.parameters()], **options)
            for x, y in batches(30):

                def loss(body=body, head=head, criterion=criterion, x=x, y=y):
                    return criterion(head(body(x)), y)

                if recorded:
                    loss().backward()
                    opt.step()
                    opt.zero_grad()
                else:
                    opt.step(loss)
            ends.append([*body.parameters(), *head.parameters(), torch.tensor(opt.rate)])
        assert identical(*ends)

    def test_outputs_in_an_object(self):
        class Wrapped(nn.Linear):
            def forward(self, x):
                return SimpleNamespace(features=x, logits=super().forward(x))

        class OfObject(nn.Module):
            def forward(self, output, y):
                return functional.cross_entropy(output.logits, y)

        ends = []
        for recorded in (True, False):
            torch.manual_seed(0)
            model, criterion = Wrapped(8, 3), nn.CrossEntropyLoss()
            options = {"model": model, "criterion": criterion} if recorded else {}
            opt = LQA(model.parameters(), **options)
            for x, y in batches(20):
                if recorded:
                    criterion(model(x).logits, y).backward()
                    opt.step()
                    opt.zero_grad()
                else:
                    opt.step(lambda m=model, c=criterion, x=x, y=y: c(m(x).logits, y))
            ends.append(state(model, opt))
        assert identical(*ends)
        criterion = OfObject()
        opt = LQA(model.parameters(), model=model, criterion=criterion)
        criterion(model(x), y).backward()
        with pytest.raises(RuntimeError, match="cannot repeat what happened"):
            opt.step()

    @pytest.mark.parametrize("is_inside", [True, False])
    def test_parts_of_complex_outputs(self, is_inside):
        class Complex(nn.Linear):
            def forward(self, x):
                output = super().forward(x.to(torch.complex64))
                return output.imag if is_inside else output

        model, criterion = Complex(8, 3, dtype=torch.complex64), nn.CrossEntropyLoss()
        opt = LQA(model.parameters(), model=model, criterion=criterion)
        ((x, y),) = batches(1)
        output = model(x)
        loss = criterion(output if is_inside else output.imag, y)
        loss.backward()
        if is_inside:
            assert opt.step() == loss
        else:
            with pytest.raises(RuntimeError, match="cannot repeat what happened"):
                opt.step()

    def test_parameters_of_the_criterion(self):
        torch.manual_seed(0)
        model, criterion = nn.Linear(8, 4), nn.Bilinear(4, 4, 1)
        LQA([*model.parameters(), *criterion.parameters()], model=model, criterion=criterion)


class TestFunctions:
    def test_function(self):
        ends = []
        for recorded in (True, False):
            model, opt = build(model=None)

            def loss_fn(batch, model=model):
                x = batch.pop("x")
                return functional.cross_entropy(torch.tanh(model.net(x)), batch["y"]), "extra"

            if recorded:
                loss_fn = opt.recorded(loss_fn)
            for x, y in batches(30):
                if recorded:
                    loss, extra = loss_fn({"x": x, "y": y})
                    assert extra == "extra"
                    loss.backward()
                    opt.step()
                    opt.zero_grad()
                else:
                    opt.step(lambda f=loss_fn, x=x, y=y: f({"x": x, "y": y})[0])
            ends.append(state(model, opt))
        assert identical(*ends)

    def test_closure_that_runs_backward(self):
        """As Lightning's: gradients are cleared between the forward and the backward pass."""
        ends = []
        for recorded in (True, False):
            model, opt = build(model=None)
            training_step = opt.recorded(model.forward) if recorded else model.forward
            for x, y in batches(60):

                def closure(opt=opt, training_step=training_step, x=x, y=y):
                    loss = training_step(x, y)
                    opt.zero_grad()
                    loss.backward()
                    return loss.detach()

                if recorded:
                    assert opt.step(closure) is not None
                    assert opt.report.backwards == 1
                else:
                    opt.step(partial(model, x, y))
            ends.append(state(model, opt))
        assert identical(*ends)

    def test_closure_without_a_loss(self):
        """As that of loops that run backward themselves, in Lightning's manual optimization."""
        model, opt = build()
        other, reference = build()
        for x, y in batches(20):
            model(x, y).backward()
            opt.step(lambda: None)
            opt.zero_grad()
        take = run(other, reference, batches(20))
        for one, two in zip(state(model, opt), take, strict=True):
            torch.testing.assert_close(one, two, rtol=0.2, atol=0.05, check_dtype=False)

    def test_nested(self):
        model, opt = build()
        loss_fn = opt.recorded(lambda x, y: 2.0 * model(x, y))
        ((x, y),) = batches(1)
        loss = loss_fn(x, y)
        loss.backward()
        assert opt.step() == loss

    def test_attributes(self):
        _, opt = build()

        def loss_fn(x):
            """Documented."""

        wrapped = opt.recorded(loss_fn)
        assert wrapped.__doc__ == loss_fn.__doc__
        assert wrapped.__wrapped__ is loss_fn


@pytest.fixture
def quick_collection():
    """Collects what a test makes, and not all that the process has imported."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("quick_collection")
class TestRecords:
    def test_nothing_is_kept(self):
        model, opt = build()
        for x, y in batches(12):
            kept = weakref.ref(x)
            loss = model(x, y)
            opt.zero_grad()
            loss.backward()
            opt.step()
            del x
            gc.collect()
            assert kept() is None
            assert loss.grad_fn is not None

    def test_arguments_are_kept_by_measuring_steps_alone(self):
        model, opt = build()
        seen = set()
        for x, y in batches(40):
            due, kept = is_due(opt), weakref.ref(x)
            model(x, y).backward()
            del x
            gc.collect()
            assert (kept() is not None) == due
            seen.add(due)
            opt.step()
            opt.zero_grad()
        assert seen == {True, False}

    def test_evaluation_is_not_kept(self):
        model, _opt = build()
        references = []
        for x, y in batches(5):
            references.append(weakref.ref(x))
            model(x, y).item()  # with gradients enabled, by mistake
            del x
        ((x, y),) = batches(1)
        model(x, y)
        gc.collect()
        assert [reference() for reference in references] == [None] * 5

    def test_evaluation_changes_nothing(self):
        given = [*batches(30)]
        model, opt = build()
        for x, y in given:
            opt.zero_grad()
            model(x, y).backward()
            opt.step()
            model.eval()
            with torch.no_grad():
                model(x, y)
            model(x, y)
            model.train()
        assert identical(state(model, opt), run(*build(), given))

    def test_teacher(self):
        model, opt = build()
        ((x, y),) = batches(1)
        with torch.no_grad():
            target = model(x, y)
        loss = model(x, y)
        (loss - target).backward()
        assert opt.step() == loss

    @pytest.mark.parametrize("interrupt", [KeyboardInterrupt, ValueError])
    def test_interrupted_pass(self, interrupt):
        model, opt = build()
        ((x, y),) = batches(1)

        def fail(*_):
            raise interrupt

        handle = model.net[0].register_forward_hook(fail)
        with pytest.raises(interrupt):
            model(x, y)
        handle.remove()
        loss = model(x, y)
        loss.backward()
        assert opt.step() == loss

    def test_failed_probe(self):
        model, opt = build()
        ((x, y),) = batches(1)
        loss = model(x, y)
        loss.backward()
        buffers = [buffer.clone() for buffer in model.buffers()]
        before = [*map(torch.clone, model.parameters())], torch.get_rng_state()

        def fail(*_):
            raise OSError("a device is lost")

        handle = model.net[0].register_forward_pre_hook(fail)
        with pytest.raises(OSError, match="lost"):
            opt.step()
        handle.remove()
        assert identical(before[0], [*model.parameters()])
        assert identical(buffers, [*model.buffers()])
        assert torch.equal(before[1], torch.get_rng_state())
        assert opt.step() == loss
        # Two probes, and the loss once more.
        assert opt.report.forwards == 3

    def test_copies(self):
        model, opt = build()
        run(model, opt, batches(3))
        copied = copy.deepcopy(model)
        copied(*next(batches(1))).backward()  # as of a target network
        other, another = copy.deepcopy((model, opt))
        torch.manual_seed(5)
        ended = run(model, opt, batches(20))
        torch.manual_seed(5)
        assert identical(ended, run(other, another, batches(20)))

    def test_pickles(self):
        torch.manual_seed(0)
        model = nn.Linear(8, 3)
        criterion = nn.CrossEntropyLoss()
        opt = LQA(model.parameters(), model=model, criterion=criterion)
        alone = pickle.loads(pickle.dumps(model))
        alone(torch.zeros(1, 8)).sum().backward()
        model, criterion, opt = pickle.loads(pickle.dumps((model, criterion, opt)))
        ((x, y),) = batches(1)
        loss = criterion(model(x), y)
        loss.backward()
        assert opt.step() == loss

    def test_hooks_end_with_the_optimizer(self):
        model, opt = build()
        assert len(model._forward_hooks) == len(model._forward_pre_hooks) == 1
        del opt
        gc.collect()
        assert not model._forward_hooks
        assert not model._forward_pre_hooks

    @pytest.mark.parametrize("use_reentrant", [False, True])
    def test_checkpointed_activations(self, use_reentrant):
        class Checkpointed(Classifier):
            def forward(self, x, y):
                hidden = checkpoint(self.net[0], x, use_reentrant=use_reentrant)
                hidden = checkpoint(self.net[3], hidden, use_reentrant=use_reentrant)
                return functional.cross_entropy(self.net[4](hidden), y)

        # Reentrant ones see no gradient of the first layer, whose inputs need none.
        model, opt = build(kind=Checkpointed)
        with warnings.catch_warnings():
            if use_reentrant:
                warnings.filterwarnings("ignore", "None of the inputs have requires_grad")
            ended = run(model, opt, batches(20))
            other, reference = build(kind=Checkpointed, model=None)
            assert identical(ended, run_with_closure(other, reference, batches(20)))

    def test_several_optimizers_record_a_module(self):
        torch.manual_seed(0)
        body, head, criterion = nn.Linear(8, 16), nn.Linear(16, 3), nn.CrossEntropyLoss()
        given = {"model": [body, head], "criterion": criterion}
        opts = [LQA(part.parameters(), **given) for part in (body, head)]
        for x, y in batches(5):
            for opt in opts:
                body.zero_grad()
                head.zero_grad()
                loss = criterion(head(body(x)), y)
                loss.backward()
                assert opt.step() == loss

    def test_adversaries(self):
        """What one does to the other's parameters and buffers in between changes no measurement."""
        torch.manual_seed(0)
        generator = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 8))
        first, last = (nn.utils.parametrizations.spectral_norm(nn.Linear(n, 8)) for n in (8, 8))
        critic = nn.Sequential(first, nn.Tanh(), last)
        given = {"model": [generator, critic], "criterion": nn.MSELoss()}
        opt, other = LQA(generator.parameters(), **given), LQA(critic.parameters(), **given)
        one, zero = torch.ones(32, 8), torch.zeros(32, 8)
        for x, _ in batches(20):
            made = generator(torch.randn(32, 4))
            loss = given["criterion"](critic(made.detach()), zero)
            loss = loss + given["criterion"](critic(x), one)
            other.zero_grad()
            loss.backward()
            assert other.step() == loss
            opt.zero_grad()
            loss = given["criterion"](critic(made), one)
            loss.backward()
            assert opt.step() == loss
        assert Reason.CONCAVE not in opt.report.counts

    @pytest.mark.parametrize("steps", [0, 12, 20])
    def test_state_and_groups_that_come_between_backward_and_step(self, steps):
        model, opt = build()
        extra = nn.Parameter(torch.zeros(3))
        saved = copy.deepcopy(opt.state_dict())
        run(model, opt, batches(steps))
        opt.zero_grad()
        ((x, y),) = batches(1)
        loss = model(x, y)
        loss.backward()
        opt.load_state_dict(saved)
        opt.add_param_group({"params": [extra]})
        assert opt.step() == loss
        model(x, y).backward()
        opt.step()
        assert opt.report.reason is not Reason.REUSED

    def test_parameters_without_values_yet(self):
        class Lazy(Classifier):
            def __init__(self):
                super().__init__()
                self.net = nn.Sequential(nn.LazyBatchNorm1d(), nn.LazyLinear(3))

        model, opt = build(kind=Lazy)
        other, reference = build(kind=Lazy, model=None)
        ended = run(model, opt, batches(10))
        assert identical(ended, run_with_closure(other, reference, batches(10)))

    @pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
    def test_a_traced_export(self):
        model, opt = build()
        model.eval()
        ((x, y),) = batches(1)
        traced = torch.jit.trace(model, (x, y))
        assert torch.equal(traced(x, y), model(x, y))
        loss = model(x, y)
        loss.backward()
        assert opt.step() == loss

    def test_evaluation_in_another_thread(self):
        class Waiting(Classifier):
            def forward(self, x, y):
                if not torch.is_grad_enabled():
                    has_begun.set()
                    may_end.wait(10.0)
                return super().forward(x, y)

        def evaluate():
            with torch.no_grad():
                model(x, y)

        has_begun, may_end = threading.Event(), threading.Event()
        model, opt = build(kind=Waiting)
        model.eval()
        ((x, y),) = batches(1)
        thread = threading.Thread(target=evaluate)
        thread.start()
        has_begun.wait(10.0)
        waiting = Waiting.forward
        model.forward = lambda x, y: (may_end.set(), thread.join(), waiting(model, x, y))[2]
        loss = model(x, y)
        del model.forward
        loss.backward()
        assert opt.step() == loss

    def test_random_state_that_the_loop_restores(self):
        model, opt = build()
        for x, y in batches(5):
            with torch.random.fork_rng():
                loss = model(x, y)
            loss.backward()
            before = torch.get_rng_state()
            opt.step()
            opt.zero_grad()
            assert torch.equal(before, torch.get_rng_state())

    def test_parameters_that_return_before_the_step_have_not_changed(self):
        model, opt = build()
        forwards = []
        for x, y in batches(6):
            model(x, y).backward()
            if len(forwards) % 2:
                opt.preview(partial(model, x, y)).losses([0.0, 1.0])
            with opt.averaged(), opt.averaged():
                pass
            opt.step()
            opt.zero_grad()
            forwards.append(opt.report.forwards)
        assert max(forwards[1:]) == 2

    def test_preview_records_nothing(self):
        model, opt = build()
        given = [*batches(2)]
        opt.preview(partial(model, *given[0])).losses([0.0, 0.1])
        loss = model(*given[1])
        loss.backward()
        assert opt.step() == loss


class TestWarnings:
    def test_changed_arguments(self):
        model, opt = build()
        given = [*batches(4)]
        rate = opt.rate

        def step(x, y):
            model(x, y).backward()
            x.mul_(2.0)
            opt.step()
            opt.zero_grad()
            assert opt.report.reason is Reason.REUSED

        with pytest.warns(UserWarning, match="has been changed before step"):
            step(*given[0])
        for x, y in given[1:]:
            step(x, y)
        assert opt.rate == rate
        run(model, opt, batches(1))
        assert opt.report.reason is not Reason.REUSED

    @pytest.mark.parametrize("nest", [lambda x: {"a": [x]}, lambda x: UserDict(a=x), None])
    def test_changed_inside_of_arguments(self, nest):
        class Batch:
            def __init__(self, x):
                self.x = x

        class Nested(Classifier):
            def forward(self, batch, y):
                x = batch.x if isinstance(batch, Batch) else batch["a"]
                return super().forward(x[0] if isinstance(x, list) else x, y)

        model, opt = build(kind=Nested)
        ((x, y),) = batches(1)
        model((nest or Batch)(x), y).backward()
        x.zero_()
        with pytest.warns(UserWarning, match="has been changed before step"):
            opt.step()

    def test_other_optimizer_in_between(self):
        torch.manual_seed(0)
        body, head = nn.Linear(8, 16), nn.Linear(16, 3)
        model = nn.Sequential(body, nn.Tanh(), head)
        criterion = nn.CrossEntropyLoss()
        first = torch.optim.SGD(body.parameters(), lr=0.5)
        opt = LQA(head.parameters(), model=model, criterion=criterion)

        def step(x, y):
            criterion(model(x), y).backward()
            first.step()
            opt.step()
            first.zero_grad()
            opt.zero_grad()

        given = [*batches(20)]
        with pytest.warns(UserWarning, match="parameters have changed since the model's forward"):
            step(*given[0])
        for x, y in given[1:]:
            step(x, y)
        assert opt.report.counts.get(Reason.REUSED, 0) < 20

    def test_parameters_that_the_forward_pass_writes_to(self):
        """They do not train, as those of a momentum encoder; no other optimizer is suspected."""

        class Momentum(Classifier):
            def __init__(self):
                super().__init__()
                self.key = nn.Parameter(self.net[0].weight.detach().clone(), requires_grad=False)

            def forward(self, x, y):
                if torch.is_grad_enabled():
                    with torch.no_grad():
                        self.key.lerp_(self.net[0].weight, 0.1)
                return super().forward(x, y)

        torch.manual_seed(0)
        model = Momentum()
        trained = [param for param in model.parameters() if param.requires_grad]
        opt = LQA(trained, model=model, every=1)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            run(model, opt, batches(3))
        assert opt.report.forwards == 2

    def test_penalty_outside_of_the_model(self):
        model, opt = build()

        def train(given):
            for x, y in given:
                opt.zero_grad()
                (model(x, y) + sum(p.square().sum() for p in model.parameters())).backward()
                opt.step()

        with pytest.warns(UserWarning, match="the gradients are not those of the loss"):
            train(batches(100))
        train(batches(100))

    def test_forgotten_zero_grad(self):
        model, opt = build()

        def train(given):
            for x, y in given:
                model(x, y).backward()
                opt.step()

        with pytest.warns(UserWarning, match=r"zero_grad\(\) is missing"):
            train(batches(100))

    def test_shared_weights_are_no_penalty(self):
        class Tied(nn.Module):
            def __init__(self):
                super().__init__()
                self.net = nn.Linear(8, 8)
                self.head = nn.Linear(8, 3)

            def forward(self, x, y):
                return functional.cross_entropy(self.head(self.net(torch.tanh(self.net(x)))), y)

        model, opt = build(kind=Tied)
        other, reference = build(kind=Tied, model=None)
        assert identical(
            run(model, opt, batches(60)), run_with_closure(other, reference, batches(60))
        )

    def test_unrepeatable_model(self):
        class Counting(Classifier):
            calls = 0

            def forward(self, x, y):
                self.calls += 1
                return super().forward(x, y) * (1.0 + self.calls)

        model, opt = build(kind=Counting)
        with pytest.warns(UserWarning, match="when it was called again with the same arguments"):
            run(model, opt, batches(1))
