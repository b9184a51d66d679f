"""What the closure of a step may be and do."""

import copy

import pytest
import torch
from problems import classification, identical, values
from torch import nn
from torch.nn import functional
from training import backward_of, step_in_two_phases

from quadstep import LQA

SPARSE = nn.Embedding(4, 2, sparse=True)


class TestErrors:
    def test_step_without_a_closure(self, configuration):
        opt = configuration(classification().model.parameters())
        with pytest.raises(TypeError, match=r"^step\(\) needs a closure .*, got NoneType; call it"):
            opt.step()

    @pytest.mark.parametrize(
        ("closure", "error", "message"),
        [
            (
                lambda task: None,
                TypeError,
                "step() needs a closure that returns the loss, got NoneType; call it as "
                "opt.step(lambda: loss_fn(model(x), y)), which runs backward itself; or construct "
                "LQA(params, model=model), and step() after loss.backward() needs none",
            ),
            (
                lambda task: lambda: task.closure()().item(),
                TypeError,
                "closure must return the loss as a scalar tensor, got float; use the loss itself, "
                "not loss.item(), a tuple or None",
            ),
            (
                lambda task: lambda: (task.closure()(), 1),
                TypeError,
                "closure must return the loss as a scalar tensor, got tuple; use the loss itself, "
                "not loss.item(), a tuple or None",
            ),
            (
                lambda task: lambda: task.model(task.inputs),
                ValueError,
                "closure must return the loss as a scalar tensor, got shape (256, 3); reduce it, "
                "for example with .mean()",
            ),
            (
                lambda task: lambda: task.labels.sum(),
                TypeError,
                "closure must return the loss as a real floating-point tensor, got torch.int64",
            ),
            (
                lambda task: lambda: task.closure()().detach(),
                RuntimeError,
                "the loss that closure returned does not require grad; compute it from the "
                "optimizer's parameters, without torch.no_grad(), .detach() or .item()",
            ),
            (
                lambda task: lambda: nn.Parameter(torch.ones(())) * 2.0,
                RuntimeError,
                "no parameter of the optimizer has a gradient; compute the loss from the "
                "parameters given to LQA, and in the two-phase use call loss.backward() before "
                "step()",
            ),
            (
                lambda task: lambda: SPARSE(torch.tensor([1])).sum() + task.closure()(),
                RuntimeError,
                "LQA got a sparse gradient, which has no dense direction to measure along; use a "
                "dense layer (sparse=False) or wrap an optimizer for sparse gradients: "
                "LQA(torch.optim.SparseAdam(params))",
            ),
        ],
    )
    def test_step(self, closure, error, message):
        task = classification()
        opt = LQA([*task.model.parameters(), *SPARSE.parameters()])
        before = values(task.model)
        with pytest.raises(error) as caught:
            opt.step(closure(task))
        assert str(caught.value) == message
        assert identical(before, values(task.model))

    def test_a_step_in_eval_mode(self):
        task = classification()
        opt = LQA(task.model.parameters())
        opt.eval()
        with pytest.raises(RuntimeError, match=r"or call opt.train"):
            opt.step(task.closure())

    def test_two_phases_with_a_number(self):
        task = classification()
        with pytest.raises(TypeError, match="loss must be given as a scalar tensor, got float"):
            LQA(task.model.parameters()).step(task.closure(), loss=0.5)


def test_a_step_without_a_closure_is_named_at_a_rate_of_zero():
    task = classification()
    opt = LQA(task.model.parameters())
    opt.param_groups[0]["lr"] = 0.0
    task.closure()().backward()
    with pytest.raises(TypeError, match=r"step\(\) needs a closure"):
        opt.step()


class TestClosures:
    def test_two_phases_equal_one(self, configuration):
        one, two = classification(dtype=torch.float64), classification(dtype=torch.float64)
        single, double = (configuration(task.model.parameters()) for task in (one, two))
        for step in range(15):
            single.step(one.closure(step))
            step_in_two_phases(double, two.closure(step))
        assert identical(values(one.model), values(two.model))
        assert double.report.backwards == 0

    def test_derivatives_may_be_taken_in_the_closure(self, configuration):
        """As of a differential equation: forward passes without gradients cannot."""
        task = classification(dtype=torch.float64)
        inputs = task.inputs[:32].requires_grad_()
        eager = copy.deepcopy(task)
        opts = [configuration(each.model.parameters()) for each in (task, eager)]

        def residual(model):
            (slopes,) = torch.autograd.grad(model(inputs).sum(), inputs, create_graph=True)
            return (slopes.sum(1) - inputs.detach().sum(1)).square().mean()

        for _ in range(15):
            opts[0].step(lambda: residual(task.model))
            opts[1].step(torch.enable_grad()(lambda: residual(eager.model)))
        assert identical(values(task.model), values(eager.model))

    def test_activations_may_be_hooked(self, configuration):
        seen = []
        task = classification()
        task.model[1].register_forward_hook(lambda *_: _[-1].register_hook(seen.append) and None)
        opt = configuration(task.model.parameters())
        for _ in range(5):
            opt.step(task.closure())
        assert len(seen) == 5

    def test_any_other_error_in_a_probe_is_the_callers(self):
        """However often it comes, as one of want of memory does not."""
        task = classification()
        opt = LQA(task.model.parameters())
        for _ in range(30):
            calls = []

            def closure(calls=calls):
                calls.append(None)
                if len(calls) == 2:
                    raise RuntimeError("injected")
                return task.closure()()

            with pytest.raises(RuntimeError, match="injected"):
                opt.step(closure)
            assert len(calls) == 2

    def test_the_loss_may_have_one_element_in_any_shape(self):
        task = classification()
        opt = LQA(task.model.parameters())
        assert opt.step(lambda: task.closure()().reshape(1)).shape == (1,)

    @pytest.mark.filterwarnings("ignore:the closure calls backward:UserWarning")
    def test_a_closure_may_return_the_same_tensor_each_time(self, configuration):
        plain, replayed = classification(dtype=torch.float64), classification(dtype=torch.float64)
        opts = [configuration(task.model.parameters()) for task in (plain, replayed)]
        static = torch.zeros((), dtype=torch.float64)
        for step in range(15):

            def closure(step=step):
                for param in replayed.model.parameters():
                    param.grad = None
                loss = replayed.closure(step)()
                loss.backward()
                return static.copy_(loss.detach())

            losses = opts[0].step(plain.closure(step)), opts[1].step(closure)
            assert identical(*([loss.clone()] for loss in losses))
            assert opts[0].report.rate == opts[1].report.rate
        assert identical(values(plain.model), values(replayed.model))

    def test_probes_see_their_own_weights_under_autocast(self):
        """Autocast caches the cast weights: a probe must not be given the cached ones."""
        task = classification()
        opt = LQA.paper(task.model.parameters(), delta0=0.5)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            opt.step(task.closure())
        assert opt.report.slope > 0.0


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
        assert task.closure(size=256)().item() < 0.6

    def test_a_closure_that_does_not_repeat_with_gradients_either_is_probed_without(self):
        task, enabled = classification(), []
        opt = LQA(task.model.parameters(), direction="gradient", averaging=None)
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
        model, loss_of_rows = encoder(dropout=0.1)
        opt, enabled = LQA(model.parameters()), []
        for step, rows in enumerate(torch.randint(128, (200, 32))):
            if step == begins:
                model["body"].eval()

            def closure(rows=rows):
                enabled.append(torch.is_grad_enabled())
                return loss_of_rows(rows)

            loss = backward_of(opt, closure) if two_phases else None
            opt.step(closure, loss=loss)
        assert all(enabled[-30:])

    @pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
    def test_the_fast_path_of_an_encoder(self):
        model, loss_of_rows = encoder(dropout=0.0)
        model["body"].eval()
        opt = LQA(model.parameters())
        for rows in torch.randint(128, (200, 32)):
            loss = opt.step(lambda rows=rows: loss_of_rows(rows))
        assert loss < 0.3


def encoder(dropout):
    """A network around an encoder that computes otherwise in eval mode, and the loss of rows."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    model = nn.ModuleDict(
        {
            "table": nn.Embedding(12, 16),
            "body": nn.TransformerEncoder(layer, 1),
            "head": nn.Sequential(nn.Dropout(dropout), nn.Linear(16, 4)),
        }
    )
    tokens = torch.randint(12, (128, 8))
    padded = torch.arange(8) >= torch.randint(3, 7, (128, 1))

    def loss_of_rows(rows):
        hidden = model["body"](model["table"](tokens[rows]), src_key_padding_mask=padded[rows])
        return functional.cross_entropy(model["head"](hidden.mean(1)), tokens[rows, 0] % 4)

    return model, loss_of_rows
