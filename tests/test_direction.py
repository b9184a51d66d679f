import pytest
import torch
from reference import normalised
from torch import nn

from quadstep.direction import NormalisedGradient


def direction(params, grads, state=None):
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    state = {param: {} for param in params} if state is None else state
    with torch.no_grad():
        line = NormalisedGradient().line([{"params": params, "lr": 1.0}], state, 1.0, True)
    return line.blocks[0].direction


@pytest.mark.parametrize(
    "shape", [(), (6,), (5, 6), (4, 3, 2, 2), (5, 1), (7, 1, 1), (1, 6), (0, 6), (6, 0)]
)
def test_equals_the_plain_direction(shape):
    torch.manual_seed(0)
    param = nn.Parameter(torch.randn(shape, dtype=torch.float64))
    state = {param: {}}
    grads = [torch.randn(shape, dtype=torch.float64) + 0.5 for _ in range(5)]
    for step in range(1, 6):
        (found,) = direction([param], [grads[step - 1]], state)
        torch.testing.assert_close(found, normalised(grads[:step]), rtol=1e-12, atol=1e-14)


def test_a_gradient_of_one_sign_moves_an_output_as_far_as_its_bias():
    layer = nn.Linear(64, 3)
    weight, bias = direction([layer.weight, layer.bias], [torch.rand(3, 64) + 0.1, torch.ones(3)])
    inputs = torch.ones(64)
    torch.testing.assert_close(weight @ inputs, bias)


def test_real_and_imaginary_parts_are_centred_apart():
    torch.manual_seed(0)
    grad = torch.randn(4, 6, dtype=torch.complex128) + (1.0 + 2.0j)
    (joint,) = direction([nn.Parameter(torch.zeros(4, 6, dtype=torch.complex128))], [grad])
    apart = [normalised([part]) for part in (grad.real, grad.imag)]
    torch.testing.assert_close(joint, torch.stack(apart, dim=-1), rtol=1e-12, atol=1e-14)


def test_a_complex_vector_is_not_centred():
    grad = torch.full((3,), 1.0 + 1.0j, dtype=torch.complex128)
    (kept,) = direction([nn.Parameter(torch.zeros_like(grad))], [grad])
    torch.testing.assert_close(kept, torch.ones(3, 2, dtype=torch.float64))
