"""Rounding to bfloat16 does what the processor's own instructions do."""

from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.nn import functional

from quadstep_bench.runner import precision
from quadstep_bench.runner.precision import Rounding, computing_in

LAYERS = {
    "convolution": (nn.Conv2d(3, 5, 3, stride=2, padding=1), (4, 3, 8, 8)),
    "plain convolution": (nn.Conv2d(3, 5, 1, bias=False), (4, 3, 8, 8)),
    "product": (nn.Linear(6, 7), (4, 6)),
}


@pytest.mark.parametrize("layer", LAYERS)
def test_outputs_and_gradients_are_exact_sums_rounded_once(layer, monkeypatch):
    monkeypatch.setattr(precision, "_multiplies_in_bfloat16", lambda: False)
    module, shape = LAYERS[layer]
    torch.manual_seed(0)
    inputs = torch.randn(shape, requires_grad=True)
    with computing_in("bfloat16", "cpu"):
        outputs = module(inputs)
    assert outputs.dtype == torch.bfloat16
    seeds = torch.randn_like(outputs)
    found = [outputs, *torch.autograd.grad(outputs, [inputs, *module.parameters()], seeds)]

    exact = deepcopy(module).bfloat16().double()
    rounded = inputs.detach().bfloat16().double().requires_grad_()
    sums = exact(rounded)
    wanted = [sums, *torch.autograd.grad(sums, [rounded, *exact.parameters()], seeds.double())]
    for value, sum_ in zip(found, wanted, strict=True):
        # A sum in float32 may fall on the other side of a tie.
        torch.testing.assert_close(value.double(), sum_, rtol=2**-8 + 1e-5, atol=1e-6)
        assert (value == sum_.bfloat16()).double().mean() > 0.99


def test_sums_are_rounded_once():
    """1 + 256 terms of 2**-9 are 1.5; summed up in bfloat16 they stay 1."""
    weight = torch.full((1, 257), 2.0**-9)
    weight[0, 0] = 1.0
    with Rounding():
        assert functional.linear(torch.ones(1, 257), weight).item() == 1.5


def test_float32_is_left_alone():
    with computing_in("float32", "cpu"):
        assert functional.linear(torch.ones(1, 2), torch.ones(1, 2)).dtype == torch.float32
