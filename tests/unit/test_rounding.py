"""Arithmetic in single precision, rounded without bias."""

import pytest
import torch

from quadstep import rounding
from quadstep.rounding import parts, rounded, seeded

BF16 = torch.bfloat16
CPU = torch.device("cpu")


def roundings(value: float, dtype: torch.dtype = torch.float32, count: int = 100_000):
    return rounded(torch.full((count,), value, dtype=dtype), BF16, seeded("test", CPU))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("part", [0.1, 0.25, 0.5, 0.99])
@pytest.mark.parametrize("below", [1.0, -1.0, 3.0e-5, 2.0**-130])
def test_means_are_exact(below, part, dtype):
    """The value lies at this part of the way from one number of bfloat16 to the next."""
    lower = torch.tensor(below).to(BF16)
    upper = (lower.view(torch.int16) + 1).view(BF16)
    value = float(lower) + part * (float(upper) - float(lower))
    found = roundings(value, dtype)
    assert set(found.unique().tolist()) == {float(lower), float(upper)}
    # The standard error is 0.0016 at most.
    assert float((found == upper).double().mean()) == pytest.approx(part, abs=0.008)


def test_what_bfloat16_holds_stays():
    values = torch.tensor([0.0, -0.0, 1.0, -3.5, 2.0**-133, torch.inf, -torch.inf, torch.nan])
    for seed in range(20):
        found = rounded(values.clone(), BF16, seeded(str(seed), CPU))
        assert torch.equal(found.view(torch.int16), values.to(BF16).view(torch.int16))


def test_other_types_round_to_nearest():
    value = torch.tensor([1.0 + 2**-30], dtype=torch.float64)
    assert rounded(value, torch.float32, seeded("test", CPU)).item() == 1.0


def test_numbers_are_independent_of_neighbours():
    """Of the four numbers drawn at a time, and of one step and the next."""
    noise = torch.stack(
        [
            rounded(torch.full((40_000,), 1.0 + 2**-8), BF16, seeded(f"{step}.0", CPU)).float()
            for step in range(2)
        ]
    )
    up = (noise > 1.0).double() - 0.5
    correlations = [4 * (up[0] * up[1]).mean()]
    correlations += [4 * (up[0][lag:] * up[0][:-lag]).mean() for lag in (1, 2, 3, 4)]
    # The standard error is 0.005.
    assert max(map(abs, correlations)) < 0.025


def test_the_users_random_numbers_stay_and_streams_repeat():
    state = torch.get_rng_state()
    one, other = roundings(1.003), roundings(1.003)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(one, other)


def test_a_mean_reaches_what_rounding_to_nearest_stalls_at():
    """A running mean of ones with a decay of 0.999, from zero."""
    nearest, stochastic = torch.zeros(1000, dtype=BF16), torch.zeros(1000, dtype=BF16)
    one = [torch.ones(1000)]
    for step in range(8000):
        nearest.mul_(0.999).add_(one[0], alpha=0.001)
        for _, ((mean,), (target,)) in parts(BF16, f"{step}", [stochastic], one):
            mean.mul_(0.999).add_(target, alpha=0.001)
    assert nearest.float().mean() <= 0.5
    # Each is off by about 4%, so that the mean of all is by 0.0013.
    assert stochastic.float().mean() == pytest.approx(1.0, abs=0.006)


def test_only_tensors_to_write_are_written(monkeypatch):
    monkeypatch.setattr(rounding, "CHUNK", 8)
    targets = [torch.ones(5, 4, dtype=BF16), torch.ones((), dtype=BF16), torch.ones(0, dtype=BF16)]
    sources = [torch.full_like(target, 2.0) for target in targets]
    versions = [source._version for source in sources]
    sizes = []
    for here, ((target,), (source,)) in parts(BF16, "test", targets, sources):
        sizes.append((here.start, target.numel()))
        assert target.dtype is source.dtype is torch.float32
        target.add_(source)
        source.zero_()
    assert sizes == [(0, 8), (0, 8), (0, 4), (1, 1), (2, 0)]
    assert all(target.eq(3.0).all() for target in targets)
    assert all(source.eq(2.0).all() for source in sources)
    assert versions == [source._version for source in sources]
