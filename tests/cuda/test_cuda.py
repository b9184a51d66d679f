"""What LQA guarantees, where parameters, generators and losses live on an accelerator."""

import copy
import math

import pytest
import torch
from problems import classification, identical, noisy_classification, values
from torch.nn import functional
from training import (
    about_to_measure,
    about_to_reuse,
    assert_free_of_side_effects,
    raising,
    saved_and_loaded,
    step_in_two_phases,
    train,
    with_fault,
)

from quadstep import LQA, Reason

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def test_steps_are_those_of_the_processor(configuration):
    here = classification(dtype=torch.float64)
    there = copy.deepcopy(here).to("cuda")
    tasks = (here, there)
    opts = [configuration(task.model.parameters()) for task in tasks]
    for step in range(12):
        for opt, task in zip(opts, tasks, strict=True):
            opt.step(task.closure(step))
        assert opts[0].report.reason is opts[1].report.reason
        assert opts[0].report.rate == pytest.approx(opts[1].report.rate, rel=1e-6)
    moved = [value.cpu() for value in values(there.model)]
    torch.testing.assert_close(moved, values(here.model), rtol=1e-6, atol=1e-9)


def test_steps_have_no_side_effects(configuration):
    assert_free_of_side_effects(
        configuration, lambda opt, closure: opt.step(closure), device="cuda"
    )


@pytest.mark.parametrize("failing", [1, 2, 3])
@pytest.mark.parametrize("fault", ["exception", "not finite"])
def test_a_measuring_step_that_fails_is_undone(configuration, failing, fault):
    task, opt = about_to_measure(configuration, "cuda")
    before, random = values(task.model), torch.cuda.get_rng_state()
    if fault == "exception":
        with pytest.raises(KeyboardInterrupt):
            opt.step(with_fault(task.closure(), failing, raising(KeyboardInterrupt)))
    else:
        opt.step(with_fault(task.closure(), failing, lambda loss: loss * math.nan))
        assert opt.report.reason is Reason.NON_FINITE
    assert identical(before, values(task.model))
    # A loss that fails by itself must not be drawn again for ever.
    stands = fault == "exception" or failing > 1
    assert torch.equal(random, torch.cuda.get_rng_state()) == stands


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
def test_a_step_waits_for_the_device_only_to_measure():
    task = classification().to("cuda")
    closure = task.closure()
    opt = about_to_reuse(task)
    torch.cuda.set_sync_debug_mode("error")
    try:
        opt.step(closure)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert opt.report.reason is Reason.REUSED


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_a_state_of_the_device_resumes_there_and_elsewhere(configuration, device):
    task = noisy_classification().to("cuda")
    opt = configuration(task.model.parameters())
    train(task, opt, range(13))
    model, state = saved_and_loaded(task.model, opt, map_location=device)
    resumed = noisy_classification().to(device)
    resumed.model.load_state_dict(model)
    second = configuration(resumed.model.parameters())
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


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.filterwarnings("default")
def test_compiled_losses(configuration, mode):
    """The second mode replays graphs, which give the same tensors each time."""
    eager = classification(dtype=torch.float64).to("cuda")
    task = copy.deepcopy(eager)
    opt, reference = (configuration(some.model.parameters()) for some in (task, eager))

    def compute(inputs, labels):
        return functional.cross_entropy(task.model(inputs), labels)

    compiled = torch.compile(compute, mode=mode)
    for _ in range(15):
        loss = opt.step(lambda: compiled(task.inputs, task.labels))
        expected = reference.step(eager.closure(size=256))
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(values(task.model), values(eager.model), rtol=1e-6, atol=1e-9)


def test_captured_graphs(configuration):
    eager = classification(dtype=torch.float64).to("cuda")
    task = copy.deepcopy(eager)
    opt, reference = (configuration(some.model.parameters()) for some in (task, eager))
    closure, side = task.closure(), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        closure().backward()
        with torch.no_grad():
            closure()
    torch.cuda.current_stream().wait_stream(side)
    both, forward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    opt.zero_grad()
    with torch.cuda.graph(both):
        loss = closure()
        loss.backward()
    with torch.no_grad(), torch.cuda.graph(forward):
        probe = closure()

    def replay():
        forward.replay()
        return probe

    for _ in range(15):
        both.replay()
        opt.step(replay, loss=loss)
        expected = step_in_two_phases(reference, eager.closure())
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(values(task.model), values(eager.model), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {"capturable": True}])
def test_wraps_what_torch_fuses(options):
    def trained(**options):
        task = classification().to("cuda")
        opt = LQA(torch.optim.AdamW(task.model.parameters(), lr=1e-2, **options))
        train(task, opt, range(12))
        return values(task.model)

    torch.testing.assert_close(trained(**options), trained(foreach=False), rtol=1e-3, atol=1e-5)
