"""The loss along a direction."""

import contextlib
import itertools
import sys

import pytest
import torch
from problems import identical
from torch import nn

from quadstep import line as line_module
from quadstep import rounding
from quadstep.line import Line, ParamBlock

KEEPS_START = pytest.mark.parametrize("keeps_start", [True, False], ids=["copy", "subtract"])


@contextlib.contextmanager
def interrupted_at(number):
    """Interrupts the module of lines at an instruction; yields how many there were, in a list."""
    count, previous = [0], sys.gettrace()

    def trace(frame, event, _):
        if frame.f_code.co_filename != line_module.__file__:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            count[0] += 1
            if count[0] == number:
                raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        with contextlib.suppress(KeyboardInterrupt):
            yield count
    finally:
        sys.settrace(previous)


def block(*values, lr_ratio=1.0, dtype=torch.float32) -> ParamBlock:
    params = [nn.Parameter(torch.tensor(value, dtype=dtype)) for value in values]
    return ParamBlock(params, params, [torch.rand_like(p) for p in params], lr_ratio)


@pytest.fixture(autouse=True)
def no_grad(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(line_module, "SMALL", 2)
    with torch.no_grad():
        yield


def bits(tensors):
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return [tensor.clone().view(integers[tensor.element_size()]) for tensor in tensors]


@KEEPS_START
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_probes_return_bit_for_bit(keeps_start, dtype):
    extremes = [0.1, 1e6, 1e-9, 0.0, -0.0, torch.finfo(dtype).max, torch.finfo(dtype).tiny]
    blocks = [block(extremes, [[3.0]], dtype=dtype), block([7.0], 7.0, [], dtype=dtype)]
    before = bits(param for part in blocks for param in part.params)
    line = Line(blocks, keeps_start=keeps_start)
    line.losses(lambda: torch.zeros(()), [1.0, 1e-3, 0.0, -1e9, torch.inf])
    assert identical(before, bits(param for part in blocks for param in part.params))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-9, 1e-3, 1e-2, 1.0, 1e9])
def test_so_they_do_in_any_layout_and_by_chunks(dtype, size, monkeypatch):
    monkeypatch.setattr(rounding, "CHUNK", 100)
    images = torch.randn(8, 4, 3, 3).to(memory_format=torch.channels_last)
    tensors = [images, torch.randn(30, 40).T, torch.randn(500, 2)[:, 1], torch.randn(999, 3)]
    params = [tensor.to(dtype) for tensor in tensors]
    before = bits(params)
    # In other layouts.
    direction = [torch.randn(tensor.shape) for tensor in tensors]
    moved = []
    line = Line([ParamBlock(params, params, direction, 1.0)], keeps_start=False)
    line.losses(lambda: moved.append(bits(params)), [size, -size, 0.7 * size])
    assert identical(before, bits(params))
    assert size < 1e-3 or not any(identical(before, probe) for probe in moved)


def test_each_probe_may_be_interrupted_anywhere():
    """Also in a return, which a second one completes, as the rollback of a step does."""
    part = block([0.1, 1e-4, 3.0], [[2.0]])
    before = bits(part.params)
    for number in itertools.count(1):
        line = Line([part], keeps_start=False)
        with interrupted_at(number) as count:
            line.losses(lambda: torch.zeros(()), [0.01, -0.01])
        line.restore()
        assert identical(before, bits(part.params)), number
        if count[0] < number:
            break
    assert number > 500


@KEEPS_START
def test_each_move_starts_from_rate_zero(keeps_start):
    part = block([0.0, 2.0], dtype=torch.float64)
    theta = part.params[0].clone()
    seen = []
    line = Line([part], keeps_start=keeps_start)
    line.losses(lambda: seen.append(part.params[0].clone()) or torch.zeros(()), [0.5, 0.0, -0.5])
    line.move(0.25)
    expected = [theta - rate * part.direction[0] for rate in (0.5, 0.0, -0.5)]
    assert identical(expected, seen)
    assert torch.equal(part.params[0], theta - 0.25 * part.direction[0])


def test_blocks_move_by_their_units():
    one, other = block([1.0], dtype=torch.float64), block([1.0], lr_ratio=0.1, dtype=torch.float64)
    Line([one, other]).move(0.1)
    moved = 1.0 - torch.cat([one.params[0], other.params[0]])
    torch.testing.assert_close(moved, torch.cat([0.1 * one.direction[0], other.direction[0]]))


def test_the_slope_is_the_derivative_of_the_loss_along_the_line():
    blocks = [block([1.0, 2.0], [[3.0]], dtype=torch.float64)]
    blocks.append(block([4.0], lr_ratio=0.1, dtype=torch.float64))
    rate = torch.zeros((), dtype=torch.float64, requires_grad=True)

    def loss(rate):
        return sum(
            (param - rate / part.lr_ratio * direction).sin().square().sum()
            for part in blocks
            for param, direction in zip(part.params, part.direction, strict=True)
        )

    for part in blocks:
        with torch.enable_grad():
            part.gradient = list(torch.autograd.grad(loss(0.0), part.params))
    with torch.enable_grad():
        (derivative,) = torch.autograd.grad(loss(rate), rate)
    assert Line(blocks).slope() == pytest.approx(-float(derivative), rel=1e-12)


def test_a_sparse_gradient_tells_its_slope():
    dense, part = block([1.0]), block([1.0, 2.0])
    dense.gradient = [torch.ones(1)]
    part.gradient = [torch.tensor([0.0, 3.0])]
    slope = Line([dense, part]).slope()
    part.gradient = [part.gradient[0].to_sparse()]
    assert Line([dense, part]).slope() == slope != 0.0


def test_an_unknown_gradient_tells_no_slope():
    known, unknown = block([1.0]), block([1.0])
    known.gradient = [torch.ones(1)]
    assert Line([known, unknown]).slope() is None
    assert Line([]).slope() == 0.0


def test_slopes_beyond_half_precision_are_told():
    part = block([1.0])
    part.params, part.direction = [part.params[0].half()], [torch.full((1,), 1e3).half()]
    part.gradient = part.direction
    assert Line([part]).slope() == pytest.approx(1e6)


def test_a_start_elsewhere_is_returned_to():
    part = block([1.0])
    start = [[part.params[0].clone()]]
    part.params[0].add_(5.0)
    line = Line([part], start)
    line.losses(lambda: part.params[0].sum(), [0.1])
    assert torch.equal(part.params[0], start[0][0])


@KEEPS_START
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_in_a_probe_leaves_nothing_displaced(error, keeps_start):
    part = block([0.1, 0.2])
    before = part.params[0].clone()

    def fail():
        raise error

    with pytest.raises(error):
        Line([part], keeps_start=keeps_start).losses(fail, [0.5])
    assert torch.equal(part.params[0], before)
