"""The promises where parameters, generators and losses live on an accelerator."""

import copy
import io
import math

import pytest
import torch
from configurations import CONFIGURATIONS
from problems import (
    about_to_measure,
    classification,
    identical,
    noisy_classification,
    trains_without_a_trace,
    values,
)
from torch.nn import functional

from quadstep import LQA, Reason

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

every_configuration = pytest.mark.parametrize("name", CONFIGURATIONS)


@every_configuration
def test_steps_are_those_of_the_processor(name):
    here = classification(dtype=torch.float64)
    there = copy.deepcopy(here).to("cuda")
    tasks = (here, there)
    opts = [CONFIGURATIONS[name](task.model.parameters()) for task in tasks]
    for step in range(12):
        for opt, task in zip(opts, tasks, strict=True):
            opt.step(task.closure(step))
        assert opts[0].report.reason is opts[1].report.reason
        assert opts[0].report.rate == pytest.approx(opts[1].report.rate, rel=1e-6)
    moved = [value.cpu() for value in values(there.model)]
    torch.testing.assert_close(moved, values(here.model), rtol=1e-6, atol=1e-9)


@every_configuration
def test_steps_leave_no_trace(name):
    trains_without_a_trace(
        CONFIGURATIONS[name], lambda opt, closure: opt.step(closure), device="cuda"
    )


@every_configuration
@pytest.mark.parametrize("failing", [1, 2, 3])
@pytest.mark.parametrize("fault", ["exception", "not finite"])
def test_a_measuring_step_that_fails_is_undone(name, failing, fault):
    task, opt = about_to_measure(CONFIGURATIONS[name], "cuda")
    before, random = values(task.model), torch.cuda.get_rng_state()
    calls = 0

    def closure():
        nonlocal calls
        calls += 1
        loss = task.closure()()
        if calls < failing or fault == "not finite":
            return loss * math.nan if calls == failing else loss
        raise KeyboardInterrupt

    if fault == "exception":
        with pytest.raises(KeyboardInterrupt):
            opt.step(closure)
    else:
        opt.step(closure)
        assert opt.report.reason is Reason.NON_FINITE
    assert identical(before, values(task.model))
    # A loss that fails by itself must not be drawn again for ever.
    stands = fault == "exception" or failing > 1
    assert torch.equal(random, torch.cuda.get_rng_state()) == stands


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
def test_a_step_waits_for_the_device_only_to_measure():
    task = classification().to("cuda")
    opt = LQA(task.model.parameters())
    closure = task.closure()
    while not opt._wait:
        opt.step(closure)
    torch.cuda.set_sync_debug_mode("error")
    try:
        opt.step(closure)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert opt.report.reason is Reason.HELD


@every_configuration
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_a_state_of_the_device_resumes_there_and_elsewhere(name, device):
    task = noisy_classification().to("cuda")
    opt = CONFIGURATIONS[name](task.model.parameters())
    for step in range(13):
        opt.step(task.closure(step))
    file = io.BytesIO()
    torch.save((task.model.state_dict(), opt.state_dict()), file)
    file.seek(0)
    model, state = torch.load(file, map_location=device)
    resumed = noisy_classification().to(device)
    resumed.model.load_state_dict(model)
    second = CONFIGURATIONS[name](resumed.model.parameters())
    second.load_state_dict(state)
    for step in range(13, 30):
        for one, other in ((opt, task), (second, resumed)):
            torch.manual_seed(step)
            one.step(other.closure(step))
    if device == "cuda":
        assert identical(values(task.model), values(resumed.model))
        assert second.report == opt.report
    assert math.isfinite(second.report.loss)


@pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16])
def test_autocast_and_a_scaler(precision):
    task = classification().to("cuda")
    opt = LQA(task.model.parameters())
    # The first scale overflows in float16: the scaler skips steps until it fits.
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**24)

    def run(step):
        with torch.autocast("cuda", dtype=precision):
            return task.closure(step)()

    for step in range(200):
        opt.zero_grad()
        loss = run(step)
        scaler.scale(loss).backward()
        scaler.unscale_(opt)
        torch.nn.utils.clip_grad_norm_(task.model.parameters(), 1.0)
        scaler.step(opt, lambda step=step: run(step), loss=loss)
        scaler.update()
    opt.eval()
    assert task.closure(0, 256)().item() < 0.5


@every_configuration
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.filterwarnings("default")
def test_compiled_losses(name, mode):
    """The second mode replays graphs, which give the same tensors each time."""
    eager = classification(dtype=torch.float64).to("cuda")
    task = copy.deepcopy(eager)
    opt, reference = (CONFIGURATIONS[name](some.model.parameters()) for some in (task, eager))

    def compute(inputs, labels):
        return functional.cross_entropy(task.model(inputs), labels)

    compiled = torch.compile(compute, mode=mode)
    for _ in range(15):
        loss = opt.step(lambda: compiled(task.inputs, task.labels))
        expected = reference.step(eager.closure(size=256))
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(values(task.model), values(eager.model), rtol=1e-6, atol=1e-9)


@every_configuration
def test_captured_graphs(name):
    eager = classification(dtype=torch.float64).to("cuda")
    task = copy.deepcopy(eager)
    opt, reference = (CONFIGURATIONS[name](some.model.parameters()) for some in (task, eager))
    closure, side = task.closure(), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        closure().backward()
        with torch.no_grad():
            closure()
    torch.cuda.current_stream().wait_stream(side)
    whole, forward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    opt.zero_grad()
    with torch.cuda.graph(whole):
        loss = closure()
        loss.backward()
    with torch.no_grad(), torch.cuda.graph(forward):
        probe = closure()

    def replay():
        forward.replay()
        return probe

    for _ in range(15):
        whole.replay()
        opt.step(replay, loss=loss)
        reference.zero_grad()
        expected = eager.closure()()
        expected.backward()
        reference.step(eager.closure(), loss=expected)
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(values(task.model), values(eager.model), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {"capturable": True}])
def test_wraps_what_torch_fuses(options):
    def trained(**options):
        task = classification().to("cuda")
        opt = LQA(torch.optim.AdamW(task.model.parameters(), lr=1e-2, **options))
        for step in range(12):
            opt.step(task.closure(step))
        return values(task.model)

    torch.testing.assert_close(trained(**options), trained(foreach=False), rtol=1e-3, atol=1e-5)
