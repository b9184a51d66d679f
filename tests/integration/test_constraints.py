"""What callers enforce on the parameters after each step."""

import copy
import gc
import weakref
from functools import cache

import pytest
import torch
from problems import classification, identical, values
from seams import watched
from torch import nn
from torch.nn import functional
from training import full_loss, saved_and_loaded, train

from quadstep import LQA


@torch.no_grad()
def clamp(task):
    for param in task.model.parameters():
        param.clamp_(-0.2, 0.2)


def clamp_data(task):
    for param in task.model.parameters():
        param.data.clamp_(-0.2, 0.2)


def replace_data(task):
    for param in task.model.parameters():
        param.data = param.data.clamp(-0.2, 0.2)


@torch.no_grad()
def prune(task):
    weight = task.model[0].weight
    weight.mul_(torch.arange(weight.numel()).reshape(weight.shape) % 3 == 0)


ROWS = torch.linspace(-0.3, 0.3, 24).reshape(3, 8)


@torch.no_grad()
def restore_rows(task):
    task.model[0].weight[:3] = ROWS


def restore_rows_of_data(task):
    task.model[0].weight.data[:3] = ROWS


@torch.no_grad()
def unit_rows(task):
    for layer in (task.model[0], task.model[2]):
        layer.weight.copy_(functional.normalize(layer.weight, dim=1))


@torch.no_grad()
def sum_to_nothing(task):
    task.model[2].weight.sub_(task.model[2].weight.mean(0))


@torch.no_grad()
def sort_rows(task):
    task.model[0].weight.copy_(task.model[0].weight.sort(1).values)


@torch.no_grad()
def no_signs(task):
    task.model[2].weight.abs_()


ENFORCED = [
    sort_rows,
    no_signs,
    clamp,
    clamp_data,
    replace_data,
    prune,
    restore_rows,
    restore_rows_of_data,
    unit_rows,
    sum_to_nothing,
]


@cache
def averaged_loss_and_lead(change):
    """The loss of the average after 400 steps, each changed, and how far the fast iterate leads."""
    task = classification()
    opt = LQA(task.model.parameters())
    for step in range(400):
        opt.step(task.closure(step))
        if change is not None:
            with torch.no_grad():
                for param in task.model.parameters():
                    param.copy_(change(param))
    leads = [own["z"] - param for param, own in opt.state.items()]
    opt.eval()
    return full_loss(task), sum(lead.abs().sum().item() for lead in leads)


class TestWhatIsEnforcedAfterEachStep:
    @pytest.mark.parametrize("enforce", ENFORCED)
    @pytest.mark.parametrize("first", [0, 120], ids=["from the start", "later"])
    def test_holds_in_what_eval_shows(self, enforce, first):
        task = classification()
        opt = LQA(task.model.parameters())
        train(task, opt, range(first))
        train(task, opt, range(first, first + 200), enforce)
        training, trained = values(task.model), full_loss(task)
        opt.eval()
        shown = values(task.model)
        if enforce is unit_rows:
            assert torch.equal(training[0], shown[0])
        if enforce in (unit_rows, sum_to_nothing):
            # To normalize once more changes bits.
            assert torch.equal(training[2], shown[2])
        else:
            enforce(task)
            assert identical(values(task.model), shown)
        assert full_loss(task) < 1.02 * trained
        opt.train()
        assert identical(values(task.model), training)

    @pytest.mark.slow
    @pytest.mark.parametrize("enforce", ENFORCED)
    def test_trains_as_well_as_by_plain_steps(self, enforce):
        losses = []
        for build in (LQA, lambda params: torch.optim.AdamW(params, lr=3e-3)):
            task = classification()
            opt = build(task.model.parameters())
            for step in range(400):
                closure = task.closure(step)
                if isinstance(opt, LQA):
                    opt.step(closure)
                else:
                    opt.zero_grad()
                    closure().backward()
                    opt.step()
                enforce(task)
            losses.append(full_loss(task))
        assert losses[0] < 1.1 * losses[1]

    @pytest.mark.parametrize(
        "change",
        [
            lambda param: param.mul_(1.0 - 1e-5),
            lambda param: param.sign().mul_((param.abs() - 1e-5).clamp_(min=0.0)),
            lambda param: param.mul_(1.1).div_(1.1),
            lambda param: param.add_(1e-5 * torch.randn_like(param)),
        ],
        ids=["decay", "soft threshold", "rounding", "noise"],
    )
    def test_if_small_beside_a_step_keeps_the_average(self, change):
        """The fast iterate is shifted along."""
        plain, changed = averaged_loss_and_lead(None), averaged_loss_and_lead(change)
        assert changed[0] < 1.05 * plain[0]
        assert changed[1] > 0.3 * plain[1]

    def test_once_and_then_shown(self):
        """As after training is over."""
        task = classification()
        opt = LQA(task.model.parameters())
        train(task, opt, range(100))
        prune(task)
        weight = task.model[0].weight.clone()
        opt.eval()
        assert torch.equal(task.model[0].weight, weight)

    @pytest.mark.parametrize("change", [prune, clamp_data])
    def test_once_then_saved_in_eval_mode(self, change):
        task = classification()
        opt = LQA(task.model.parameters())
        train(task, opt, range(100))
        change(task)
        opt.eval()
        shown = full_loss(task)
        state = copy.deepcopy(opt.state_dict())
        resumed = copy.deepcopy(task)
        other = LQA(resumed.model.parameters())
        other.load_state_dict(state)
        for optimizer, owner in ((opt, task), (other, resumed)):
            optimizer.train()
            train(owner, optimizer, range(5))
        assert identical(values(task.model), values(resumed.model))
        assert full_loss(resumed) < shown, "training went on from there"

    @pytest.mark.parametrize("hidden", [16, 4096])
    def test_if_it_changes_nothing_keeps_the_average_and_no_copy(self, hidden):
        """As a box that nothing leaves."""
        ends = []
        for clamps in (False, True):
            task = classification(nn.Linear(8, hidden), nn.Tanh(), nn.Linear(hidden, 20))
            opt = LQA(task.model.parameters())
            for step in range(60):
                opt.step(task.closure(step))
                if clamps:
                    with torch.no_grad():
                        for param in task.model.parameters():
                            param.clamp_(-100.0, 100.0)
            assert not watched(opt)
            opt.eval()
            ends.append(values(task.model))
        assert identical(*ends)

    @pytest.mark.parametrize(
        "change",
        [
            lambda param: param.flip(0),
            lambda param: param.roll(1, 0),
            lambda param: param.flip(1),
            lambda param: param.neg(),
            lambda param: param.mul(0.5),
        ],
        ids=["rows", "rolled rows", "columns", "signs", "halves"],
    )
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    @pytest.mark.parametrize("shape", [(256, 512), (257, 511), (4, 3)])
    @pytest.mark.parametrize("data", [False, True])
    def test_in_whatever_way_is_seen(self, change, dtype, shape, data):
        torch.manual_seed(0)
        theta = nn.Parameter(torch.randn(shape, dtype=dtype))
        opt = LQA([theta])
        for _ in range(30):
            opt.step(lambda: theta.float().square().mean())
        changed = change(theta.detach().clone())
        if data:
            theta.data.copy_(changed)
        else:
            with torch.no_grad():
                theta.copy_(changed)
        opt.eval()
        assert torch.equal(theta, changed)

    def test_of_parameters_that_share_a_vector(self):
        """At whatever place in it."""
        task = classification(nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 14001), nn.Linear(14001, 3))
        vector = nn.utils.parameters_to_vector(task.model.parameters()).detach()
        nn.utils.vector_to_parameters(vector, task.model.parameters())
        opt = LQA(task.model.parameters())
        train(task, opt, range(20), clamp)
        state = copy.deepcopy(opt.state_dict())
        opt.load_state_dict(state)
        train(task, opt, range(5), clamp)
        opt.eval()
        assert max(param.abs().max() for param in task.model.parameters()) <= 0.2

    def test_in_eval_mode_and_then_saved(self):
        task = classification()
        opt = LQA(task.model.parameters())
        train(task, opt, range(100))
        opt.eval()
        prune(task)
        kept = task.model[0].weight.clone()
        resumed = copy.deepcopy(task)
        other = LQA(resumed.model.parameters())
        other.load_state_dict(copy.deepcopy(opt.state_dict()))
        for optimizer, owner in ((opt, task), (other, resumed)):
            optimizer.train()
            assert torch.equal(owner.model[0].weight, kept)

    def test_in_a_hook_of_step(self):
        task = classification()
        opt = LQA(task.model.parameters())
        opt.register_step_post_hook(lambda *_: unit_rows(task))
        train(task, opt, range(60))
        opt.eval()
        norms = task.model[0].weight.norm(dim=1)
        torch.testing.assert_close(norms, torch.ones_like(norms))

    def test_in_the_closure(self):
        torch.manual_seed(0)
        table, head, index = nn.Embedding(6, 4, max_norm=1.0), nn.Linear(4, 6), torch.arange(6)
        opt = LQA([*table.parameters(), *head.parameters()])
        for _ in range(300):
            loss = opt.step(lambda: functional.cross_entropy(head(table(index)), index))
        opt.eval()
        shown = functional.cross_entropy(head(table(index)), index).item()
        assert shown < 1.1 * loss.item()

    @pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
    def test_complex_parameters(self, dtype):
        theta = nn.Parameter(torch.ones(4, dtype=dtype))
        opt = LQA([theta])
        for _ in range(50):
            opt.step(lambda: (theta - 2j).abs().square().sum())
            with torch.no_grad():
                theta[0] = 1.0
        opt.eval()
        assert theta[0] == 1.0
        assert theta[1] != 1.0

    def test_beside_parameters_without_an_entry(self):
        params = [nn.Parameter(each) for each in (torch.empty(0), torch.empty(0, 3), ROWS.clone())]
        opt = LQA(params)
        for _ in range(20):
            opt.step(lambda: sum(param.square().sum() for param in params))
            opt.load_state_dict(copy.deepcopy(opt.state_dict()))
        opt.eval()

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
    def test_in_other_precisions(self, dtype):
        theta = nn.Parameter(torch.ones(4, dtype=dtype))
        opt = LQA([theta])
        for _ in range(50):
            opt.step(lambda: (theta.float() - 2.0).square().sum())
            theta.data[0] = 0.5
        opt.eval()
        assert theta[0] == 0.5

    @pytest.mark.parametrize("stop", [1, 2, 30])
    @pytest.mark.parametrize("enforce", [prune, clamp_data, unit_rows])
    def test_resumes_bit_for_bit(self, enforce, stop):
        task, stopped, resumed = (classification() for _ in range(3))
        opts = [LQA(each.model.parameters()) for each in (task, stopped, resumed)]
        train(task, opts[0], range(40), enforce)
        train(stopped, opts[1], range(stop), enforce)
        model, state = saved_and_loaded(stopped.model, opts[1])
        # In the order that is less convenient.
        opts[2].load_state_dict(state)
        resumed.model.load_state_dict(model)
        train(resumed, opts[2], range(stop, 40), enforce)
        assert identical(values(task.model), values(resumed.model))
        opts[0].eval()
        opts[2].eval()
        assert identical(values(task.model), values(resumed.model))

    def test_costs_a_copy_of_what_is_changed_alone(self):
        task = classification()
        opt = LQA(task.model.parameters())
        weight = task.model[0].weight
        train(task, opt, range(5), prune)
        assert watched(opt) == {weight}
        train(task, opt, range(101))
        assert not watched(opt)

    def test_a_state_that_is_forgotten_is_made_anew(self):
        task = classification()
        opt = LQA(task.model.parameters())
        for forget in (lambda: opt.state.pop(task.model[0].weight), opt.state.clear):
            train(task, opt, range(10), prune)
            forget()
            train(task, opt, range(10), prune)
            opt.eval()
            opt.train()

    def test_nothing_of_a_parameter_that_was_emptied_is_kept(self):
        """As where weights are offloaded between steps."""
        theta = nn.Parameter(torch.ones(64))
        opt = LQA([theta])
        for _ in range(5):
            opt.step(lambda: theta.square().sum())
        storage = weakref.ref(theta.untyped_storage())
        held, theta.data = theta.data.clone(), torch.empty(0)
        gc.collect()
        assert storage() is None
        theta.data = held
        opt.step(lambda: theta.square().sum())
