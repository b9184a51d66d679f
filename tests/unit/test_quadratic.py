import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lines import sample_line

from quadstep.quadratic import LineSamples, Quadratic

coefficients = st.floats(0.01, 100.0)


@given(st.floats(-100, 100), st.floats(-100, 100), st.floats(0.01, 10))
def test_fit_recovers_the_coefficients_of_equations_6_and_7(slope, curvature, distance):
    fit = Quadratic.fit(sample_line(Quadratic(slope, curvature), distance))
    scale = 1.0 + abs(slope) * distance + abs(curvature) * distance**2
    assert math.isclose(fit.slope, slope, abs_tol=1e-14 * scale / distance)
    assert math.isclose(fit.curvature, curvature, abs_tol=1e-14 * scale / distance**2)


@given(coefficients, coefficients, st.floats(0.01, 100))
def test_the_minimizer_is_the_vertex_at_any_probe_distance(slope, curvature, distance):
    vertex = slope / (2.0 * curvature)
    fit = Quadratic.fit(sample_line(Quadratic(slope, curvature), distance * vertex, slope * vertex))
    assert math.isclose(fit.minimizer, vertex, rel_tol=1e-9)


@pytest.mark.parametrize(
    ("quadratic", "minimizer"),
    [
        (Quadratic(1.0, 0.0), math.inf),
        (Quadratic(-1.0, 0.0), -math.inf),
        (Quadratic(1.0, -0.0), -math.inf),
        (Quadratic(0.0, 0.0), math.nan),
        (Quadratic(math.nan, 0.0), math.nan),
        (Quadratic(0.0, 1.0), 0.0),
        (Quadratic(-1.0, 1.0), -0.5),
    ],
)
def test_the_minimizer_divides_as_floating_point_does(quadratic, minimizer):
    assert quadratic.minimizer == pytest.approx(minimizer, rel=0, abs=0, nan_ok=True)


@given(coefficients, st.floats(-100.0, 100.0), st.floats(0.01, 10.0))
def test_the_slope_of_the_gradient_replaces_a_probe(curvature, slope, distance):
    both = replace(sample_line(Quadratic(slope, curvature), distance), slope=slope)
    one = replace(both, loss_behind=None)
    scale = abs(both.loss_behind) + abs(both.loss_ahead) + 1.0
    assert one.implied_loss_behind == pytest.approx(both.loss_behind, rel=0, abs=1e-14 * scale)
    fit = Quadratic.fit(one)
    assert fit.slope == pytest.approx(slope, rel=0, abs=1e-13 * scale / distance)
    assert fit.curvature == pytest.approx(curvature, rel=0, abs=1e-13 * scale / distance**2)


class TestResolution:
    @pytest.mark.parametrize("resolution", [2.0**-52, 2.0**-23, 2.0**-8])
    @pytest.mark.parametrize(("factor", "unresolved"), [(4.0, True), (5.0, False)])
    def test_differences_of_up_to_four_roundings_are_unresolved(
        self, resolution, factor, unresolved
    ):
        rising = LineSamples(1.0, 1.0, 1.0, 1.0 + factor * resolution, resolution)
        assert rising.slope_unresolved == unresolved
        assert rising.curvature_unresolved == unresolved

    @pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
    def test_every_loss_that_is_used_must_be_finite(self, loss):
        samples = LineSamples(1.0, 1.0, 1.0, 1.0)
        assert samples.is_finite
        for name in ("loss_ahead", "loss_center", "loss_behind"):
            assert not replace(samples, **{name: loss}).is_finite
        assert replace(samples, slope=loss).is_finite
        assert not replace(samples, slope=loss, loss_behind=None).is_finite


class TestContradictsGradient:
    """Losses that were computed before the closure was called do not change with a probe."""

    constant = LineSamples(1.0, 2.0, 2.0, 2.0, slope=1.0)

    @pytest.mark.parametrize(
        ("samples", "contradicts"),
        [
            (constant, True),
            (replace(constant, loss_behind=None), True),
            (replace(constant, slope=-1.0, gradient_unmodified=False), True),
            (replace(constant, loss_ahead=2.0 + 1e-15), False),
            (replace(constant, loss_behind=2.0 + 1e-15), False),
            (replace(constant, slope=0.1), False),
            (replace(constant, slope=math.nan), False),
            (LineSamples(1.0, 0.0, 0.0, 0.0, slope=1.0), False),
        ],
    )
    def test_where_the_gradient_predicts_a_large_change(self, samples, contradicts):
        assert samples.contradicts_gradient == contradicts
