"""Loops of Accelerate, which call `step` without a closure."""

import copy
import runpy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from quadstep import LQA

accelerate = pytest.importorskip("accelerate")

EXAMPLES = Path(__file__).parents[2] / "examples"
INPUTS = torch.randn(256, 10, generator=torch.Generator().manual_seed(0))
LABELS = INPUTS[:, :3].argmax(1)


def model_and_loss(dropout=0.1):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Dropout(dropout), nn.Linear(32, 3))
    return model, nn.CrossEntropyLoss()


def accelerator_of(**options):
    # Its state is shared by all of a process.
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    return accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2, **options)


def batches(epochs=1):
    order = torch.Generator().manual_seed(0)
    data = TensorDataset(INPUTS, LABELS)
    loader = DataLoader(data, 16, shuffle=True, generator=order)
    return [batch for _ in range(epochs) for batch in loader]


def train(accelerator, net, loss_fn, optimizer, batches, clip=1.0):
    """The loop of Accelerate's documentation."""
    for number, (x, y) in enumerate(batches):
        accelerator.gradient_state._set_sync_gradients(number % 2 == 1)
        loss = loss_fn(net(x), y)
        accelerator.backward(loss)
        if clip and accelerator.sync_gradients:
            accelerator.clip_grad_norm_(net.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()


def loss_of(model):
    model.eval()
    with torch.no_grad():
        loss = nn.functional.cross_entropy(model(INPUTS).float(), LABELS).item()
    model.train()
    return loss


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_trains_in_mixed_precision(precision):
    model, loss_fn = model_and_loss()
    opt = LQA(model.parameters(), model=model, criterion=loss_fn)
    accelerator = accelerator_of(mixed_precision=precision)
    if precision == "fp16":
        # Accelerate gives no scaler on the CPU; the first steps overflow.
        accelerator.native_amp = True
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
    net, optimizer = accelerator.prepare(model, opt)
    before = loss_of(net)
    train(accelerator, net, loss_fn, optimizer, batches(15))
    assert opt.rate > 1e-3
    assert 0.0 < opt.report.loss < before
    with opt.averaged():
        assert loss_of(net) < 0.3 * before


def test_accumulated_steps_are_those_of_full_batches():
    """In double precision and without dropout, to rounding."""
    model, loss_fn = model_and_loss(dropout=0.0)
    model.double()
    other = copy.deepcopy(model)
    opt = LQA(
        model.parameters(), model=model, criterion=loss_fn, direction="gradient", averaging=None
    )
    accelerator = accelerator_of()
    net, optimizer = accelerator.prepare(model, opt)
    parts = [(x.double(), y) for x, y in batches(2)]
    train(accelerator, net, loss_fn, optimizer, parts, clip=None)

    reference = LQA(other.parameters(), direction="gradient", averaging=None)
    for pair in zip(parts[::2], parts[1::2], strict=True):
        x, y = (torch.cat(both) for both in zip(*pair, strict=True))
        reference.step(lambda x=x, y=y: loss_fn(other(x), y))
    for one, another in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, another, rtol=1e-7, atol=1e-9)
    assert opt.rate == pytest.approx(reference.rate, rel=1e-7)


def test_warns_of_the_callers_scheduler():
    model, loss_fn = model_and_loss()
    opt = LQA(model.parameters(), model=model, criterion=loss_fn)
    accelerator = accelerator_of()
    schedule = torch.optim.lr_scheduler.ExponentialLR(opt, 0.5)
    net, optimizer, schedule = accelerator.prepare(model, opt, schedule)
    train(accelerator, net, loss_fn, optimizer, batches()[:2])
    schedule.step()
    with pytest.warns(UserWarning, match="lr was set to"):
        train(accelerator, net, loss_fn, optimizer, batches()[2:4])


@pytest.mark.parametrize("evaluating", [False, True])
def test_a_saved_state_resumes_bit_for_bit(evaluating, tmp_path):
    """Also one that was saved while the averaged weights were shown."""
    parts = batches(3)
    ends = []
    for is_resumed in (False, True):
        model, loss_fn = model_and_loss()
        opt = LQA(model.parameters(), model=model, criterion=loss_fn)
        accelerator = accelerator_of(mixed_precision="bf16")
        net, optimizer = accelerator.prepare(model, opt)
        if is_resumed:
            accelerator.load_state(str(tmp_path))
        else:
            torch.manual_seed(1)
            train(accelerator, net, loss_fn, optimizer, parts[:22])
            if evaluating:
                optimizer.eval()
            accelerator.save_state(str(tmp_path))
        optimizer.train()
        train(accelerator, net, loss_fn, optimizer, parts[22:])
        ends.append((model.state_dict().values(), opt.rate))
    (one, rate), (other, resumed_rate) = ends
    assert all(torch.equal(*pair) for pair in zip(one, other, strict=True))
    assert rate == resumed_rate


def test_the_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    runpy.run_path(str(EXAMPLES / "accelerate_loop.py"))
    accuracy = capsys.readouterr().out.splitlines()[-1].split("accuracy ")[1].split(",")[0]
    assert float(accuracy) > 0.95
