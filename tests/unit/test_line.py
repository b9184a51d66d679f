"""The loss along a direction."""

import pytest
import torch
from problems import identical
from torch import nn

from quadstep.line import Line, ParamBlock


def block(*values, lr_ratio=1.0, dtype=torch.float32) -> ParamBlock:
    params = [nn.Parameter(torch.tensor(value, dtype=dtype)) for value in values]
    return ParamBlock(params, params, [torch.rand_like(p) for p in params], lr_ratio)


@pytest.fixture(autouse=True)
def no_grad():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_probes_return_bit_for_bit(dtype):
    blocks = [block([0.1, 1e6, 1e-9], [[3.0]], dtype=dtype), block([7.0], dtype=dtype)]
    before = [param.clone() for part in blocks for param in part.params]
    Line(blocks).losses(lambda: torch.zeros(()), [1.0, 1e-3, -1e9])
    assert identical(before, [param for part in blocks for param in part.params])


def test_each_move_starts_from_rate_zero():
    part = block([0.0, 2.0], dtype=torch.float64)
    theta = part.params[0].clone()
    seen = []
    line = Line([part])
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


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_in_a_probe_leaves_nothing_displaced(error):
    part = block([0.1, 0.2])
    before = part.params[0].clone()

    def fail():
        raise error

    with pytest.raises(error):
        Line([part]).losses(fail, [0.5])
    assert torch.equal(part.params[0], before)
