import math
import pickle
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from lines import sample_line

from quadstep.controllers import (
    Damping,
    Decision,
    Reason,
    RegionState,
    SufficientDecrease,
    TrustRegionConfig,
    TrustRegionController,
    VertexController,
    VertexState,
)
from quadstep.quadratic import LineSamples, Quadratic
from quadstep.statistics import SlopeCheck

anything = st.floats(allow_nan=True, allow_infinity=True)
rates = st.floats(1e-30, 1e30)
coefficients = st.floats(0.01, 100.0)

UNDAMPED = Damping(minimum=1.0, window=0.0)
"""Clips nothing and takes the full minimizer."""


def undamped(smoothing=0.9, growth=2.0) -> TrustRegionController:
    config = TrustRegionConfig(UNDAMPED, smoothing, growth, growth_decays=False)
    return TrustRegionController(config)


def damped(rule=UNDAMPED) -> TrustRegionController:
    config = TrustRegionConfig(rule, smoothing=0.99, growth=1.1, growth_decays=False, step_cap=2.0)
    return TrustRegionController(config)


def plain() -> TrustRegionController:
    return damped(Damping())


def averaged() -> TrustRegionController:
    return TrustRegionController(TrustRegionConfig(smoothing=0.9))


def fast() -> TrustRegionController:
    return undamped(growth=3.0)


def with_checks(checks=SlopeCheck.INITIAL_CHECKS):
    """A state whose slope check has passed so many times."""
    check = SlopeCheck(checks=checks, measurements=1)
    return replace(fast().state_type(), slope_check=check)


def record(rule, losses, reduction):
    state = RegionState.initial(losses[0])
    for loss in losses:
        state = rule.update(state, loss, 1.0, reduction)
    return state


def run(controller, rate, lines, state=None):
    """The state, the rates and the reasons of measurements of lines, given as functions."""
    state = state or controller.state_type()
    found, reasons = [], []
    for line in lines:
        samples = line(controller.probe_distance(state, rate))
        state, decision = controller.update(state, rate, samples)
        rate = decision.rate
        found.append(rate)
        reasons.append(decision.reason)
    return state, found, reasons


def along(quadratic, losses):
    return [lambda distance, loss=loss: sample_line(quadratic, distance, loss) for loss in losses]


class TestVertexController:
    @given(rates, anything, anything, anything)
    @example(1.0, 1.0, 1.0, 1e300)
    @example(1e30, 0.0, -1e-300, 1.0)
    def test_takes_the_vertex_or_reports_that_it_does_not(self, rate, ahead, center, behind):
        samples = LineSamples(rate, ahead, center, behind)
        state, decision = VertexController().update(VertexState(), rate, samples)
        minimizer = Quadratic.fit(samples).minimizer
        if samples.is_finite and abs(minimizer) <= 3.4e38:
            assert decision.rate == decision.step == minimizer
            assert decision.reason is not Reason.NON_FINITE
            assert state == VertexState(Quadratic.fit(samples), fits=1)
        else:
            assert decision == Decision(rate, 0.0, Reason.NON_FINITE)
            assert state == VertexState()

    @pytest.mark.parametrize(
        ("quadratic", "reason"),
        [
            (Quadratic(1.0, 1.0), Reason.MINIMUM),
            (Quadratic(-1.0, 1.0), Reason.ASCENT),
            (Quadratic(1.0, -1.0), Reason.CONCAVE),
            (Quadratic(1.0, 0.0), Reason.NON_FINITE),
        ],
    )
    def test_names_what_it_does_not_repair(self, quadratic, reason):
        samples = sample_line(quadratic, 0.5)
        assert VertexController().update(VertexState(), 0.5, samples)[1].reason is reason

    def test_does_not_divide_by_a_zero_distance(self):
        samples = LineSamples(0.0, 1.0, 1.0, 1.0)
        _, decision = VertexController().update(VertexState(), 0.0, samples)
        assert decision == Decision(0.0, 0.0, Reason.NON_FINITE)


class TestConfig:
    @pytest.mark.parametrize("kind", [TrustRegionConfig, Damping, SufficientDecrease])
    def test_constants_out_of_range_are_named(self, kind):
        for constant in fields(kind):
            if constant.name in ("rule", "growth_decays"):
                continue
            for value in (-1.0, math.nan):
                with pytest.raises(ValueError, match=f"{constant.name} must be in"):
                    kind(**{constant.name: value})


class TestSlopeOfTheGradient:
    def test_is_used_once_the_check_passes_and_not_before(self):
        """The probes show a slope of one, the gradient has one of 1.1."""
        line = replace(sample_line(Quadratic(1.0, 1.0), 0.4), slope=1.1)
        initial = SlopeCheck.INITIAL_CHECKS
        for checks, slope in ((initial, 1.1), (initial - 2, 1.0)):
            state, _ = fast().update(with_checks(checks), 0.4, line)
            assert state.quadratic.slope == pytest.approx(slope)

    def test_losses_that_are_not_finite_are_not_ignored(self):
        line = replace(sample_line(Quadratic(1.0, 1.0), 0.4), slope=1.0, loss_behind=math.nan)
        _, decision = fast().update(with_checks(), 0.4, line)
        assert decision.reason is Reason.NON_FINITE
        line = replace(line, loss_behind=None, slope=math.inf)
        state, decision = fast().update(with_checks(), 0.4, line)
        assert decision.reason is Reason.NON_FINITE
        assert state.slope_check == SlopeCheck()


class TestConstantLosses:
    """Losses that were computed before the closure was called do not change with a probe."""

    def test_does_not_raise_the_rate(self):
        constant = LineSamples(1.0, 2.0, 2.0, 2.0, slope=1.0)
        lines = [lambda distance: replace(constant, distance=distance)] * 20
        state, found, _ = run(undamped(), 1e-4, lines)
        assert 0.01 < found[-1] < 1.0
        assert state.minimum_distance > 1e10, "but the probes go on to move out"


class TestTrustRegionController:
    @given(
        st.sampled_from([undamped, damped, plain, averaged, fast]),
        rates,
        st.lists(st.tuples(anything, anything, anything, anything), max_size=20),
    )
    @example(undamped, 1.0, [(1e308, -1e308, 1e308, 0.0)])
    @example(undamped, 1e-30, [(0.0, 0.0, 0.0, 0.0)])
    def test_the_rate_is_finite_positive_and_inside_its_clamp(self, make, rate, losses):
        controller = make()
        growth = controller.config.growth
        state = with_checks() if make is fast else controller.state_type()
        for ahead, center, behind, slope in losses:
            distance = controller.probe_distance(state, rate)
            seen = behind if state.slope_check.due else None
            samples = LineSamples(distance, ahead, center, seen, slope=slope)
            state, decision = controller.update(state, rate, samples)
            assert 0.0 < decision.rate < math.inf
            assert 0.0 <= decision.step <= min(decision.rate, max(distance, growth * rate))
            upper = growth * rate
            if decision.reason is Reason.NOISE:
                upper = distance
            elif decision.reason is Reason.GROWN:
                upper = math.inf
            lower = 0.1 * rate * (1.0 - 1e-15)
            assert max(lower, 1e-30) <= decision.rate <= min(max(upper, rate), 1e30)
            rate = decision.rate

    @settings(max_examples=300)
    @example(1e-12, [(0.0, 0.0, 0.0)] * 2 + [(0.0, 9e-62, 1.0)], 8.0, 0.5, 1.0, 2.0**-23, 0.9)
    @given(
        st.floats(1e-12, 1e12),
        st.lists(st.tuples(*[st.floats(-1e6, 1e6) | st.sampled_from([math.nan, math.inf])] * 3)),
        st.floats(1e-4, 1e2),
        st.floats(0.01, 1.0),
        st.floats(0.01, 100.0),
        st.sampled_from([2.0**-52, 2.0**-23]),
        st.sampled_from([0.0, 0.9, 0.99]),
    )
    def test_recovers_within_100_measurements(
        self, rate, faults, vertex, gain, loss, resolution, smoothing
    ):
        """From any rate and after any faults."""
        curvature = gain * loss / vertex**2
        line = Quadratic(2.0 * curvature * vertex, curvature)
        lines = [lambda d, fault=fault: LineSamples(d, *fault, resolution) for fault in faults]
        lines += [lambda d: sample_line(line, d, loss, resolution)] * 100
        _, found, _ = run(undamped(smoothing), rate, lines)
        # Faults that look like an ordinary line of the same scale fade in the average, slowly.
        assert 0.09 * vertex <= found[-1] <= 11.0 * vertex

    @pytest.mark.parametrize("start", [1e-30, 1e-12, 1e-3, 1.0, 1e3, 1e12, 1e30])
    def test_finds_the_vertex_from_any_start(self, start):
        line = Quadratic(1.0, 2.0)
        _, found, reasons = run(undamped(), start, along(line, [1.0] * 100))
        # The first measurements, within rounding error, fade in the average.
        assert found[-1] == pytest.approx(line.minimizer, rel=1e-4)
        assert reasons[-1] is Reason.MINIMUM

    @pytest.mark.parametrize(
        ("rate", "line", "expected"),
        [
            (1.0, Quadratic(2.0, 1.0), Decision(1.0, 1.0, Reason.MINIMUM)),
            (1.0, Quadratic(2.8, 1.0), Decision(1.4, 1.4, Reason.MINIMUM)),
            (1.0, Quadratic(8.0, 1.0), Decision(2.0, 2.0, Reason.GROWN)),
            (1.0, Quadratic(1.0, -1.0), Decision(2.0, 2.0, Reason.CONCAVE)),
            (1.0, Quadratic(-0.1, 0.5), Decision(0.5, 0.0, Reason.ASCENT)),
            (1.0, Quadratic(0.02, 0.5), Decision(0.1, 0.0, Reason.SHRUNK)),
            (1.0, Quadratic(0.8, 1.0), Decision(0.4, 0.0, Reason.MINIMUM)),
            (1.0, Quadratic(1.0, 100.0), Decision(0.1, 0.0, Reason.SHRUNK)),
            (1.0, Quadratic(30.0, 100.0), Decision(0.15, 0.0, Reason.SHRUNK)),
            (1.0, Quadratic(1.0, math.nan), Decision(0.1, 0.0, Reason.NON_FINITE)),
            (1.0, Quadratic(0.0, 0.0), Decision(1.0, 1.0, Reason.NOISE)),
        ],
        ids=[
            "at the vertex", "within the clamp", "vertex beyond the growth limit", "no minimum",
            "ascent", "vertex below the contraction", "contracted by more than half: rejected",
            "large loss ahead", "large loss ahead, vertex as a hint", "not finite", "flat",
        ],
    )  # fmt: skip
    def test_each_safeguard(self, rate, line, expected):
        controller = undamped()
        _, decision = controller.update(controller.state_type(), rate, sample_line(line, rate))
        assert decision.rate == pytest.approx(expected.rate)
        assert decision.step == pytest.approx(expected.step)
        assert decision.reason is expected.reason

    def test_the_probes_stay_out_where_a_tiny_rate_is_below_rounding(self):
        """In float32 a rate of 1e-8 changes this loss by less than an ulp."""
        line = Quadratic(2e-8, 1.0)
        lines = [lambda distance: sample_line(line, distance, 1.0, 2.0**-23)] * 20
        state, found, reasons = run(undamped(), 1e-8, lines)
        assert Reason.NOISE in reasons
        distance = undamped().probe_distance(state, found[-1])
        assert distance > 1e-3
        assert distance > 100.0 * found[-1]

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_losses_in_a_coarse_type_are_measured_where_they_differ(self, dtype):
        """Far enough out, and not so far that the loss is large there, again and again."""

        def rounded(distance, step):
            exact = sample_line(Quadratic(1.0, 1.0), distance, 2.3 * 0.99**step)
            losses = [exact.loss_ahead, exact.loss_center, exact.loss_behind]
            losses = torch.tensor(losses).to(dtype).tolist()
            return LineSamples(distance, *losses, torch.finfo(dtype).eps)

        lines = [lambda distance, step=step: rounded(distance, step) for step in range(120)]
        _, found, reasons = run(averaged(), 1e-4, lines)
        assert set(reasons[60:]) <= {Reason.MINIMUM, Reason.GROWN}
        assert found[-1] == pytest.approx(0.5, rel=0.2)

    def test_the_probes_stay_within_what_single_precision_can_multiply_a_step_by(self):
        far = replace(undamped().state_type(), minimum_distance=1e30)
        assert undamped().probe_distance(far, 1.0) == 1e30
        assert undamped().probe_distance(far, 1e-30) == 1.0

    def test_probes_that_went_too_far_do_not_reduce_the_rate(self):
        far = replace(undamped().state_type(), minimum_distance=1e3)
        state, decision = undamped().update(far, 0.1, LineSamples(1e3, math.inf, 1.0, math.inf))
        assert decision.rate == 0.1
        assert undamped().probe_distance(state, decision.rate) == 0.1

    def test_smoothing_averages_slope_and_curvature_one_by_one(self):
        lines = along(Quadratic(2.0, 1.0), [1.0]) + along(Quadratic(4.0, 3.0), [1.0])
        state, found, _ = run(undamped(smoothing=0.5), 1.0, lines)
        assert state.quadratic.slope == pytest.approx(3.0)
        assert state.quadratic.curvature == pytest.approx(2.0)
        assert found[-1] == pytest.approx(0.75)

    def test_an_outlier_is_averaged_and_many_in_a_row_replace_the_average(self):
        controller = undamped()
        state, _ = controller.update(
            controller.state_type(), 1.0, sample_line(Quadratic(2.0, 1.0), 1.0)
        )
        outlier = sample_line(Quadratic(2e-6, 1e-4), 0.01)
        for _ in range(9):
            state, _ = controller.update(state, 0.01, outlier)
            assert state.quadratic.minimizer == pytest.approx(1.0, rel=1e-3)
        state, _ = controller.update(state, 0.01, outlier)
        assert state.quadratic.minimizer == pytest.approx(0.01)

    @pytest.mark.parametrize("make", [undamped, plain, averaged])
    def test_controllers_are_values_and_leave_states_as_they_are(self, make):
        controller = pickle.loads(pickle.dumps(make()))
        assert controller == make()
        state = controller.state_type()
        before = pickle.dumps(state)
        controller.update(state, 0.1, sample_line(Quadratic(1.0, 1.0), 0.1))
        assert pickle.dumps(state) == before


class TestDamping:
    rule = Damping()

    def record(self, losses, reduction=0.0):
        return record(self.rule, losses, reduction)

    def is_free(self, state):
        """Whether the growth is not limited for want of a decrease."""
        return self.rule.clip(state, 1.0, 1.1) == 1.1

    def test_a_falling_loss_is_not_damped(self):
        state = self.record([2.0 * 0.99**step for step in range(200)], reduction=1.0)
        assert state.damping == 1.0
        assert state.last_success
        assert self.is_free(state)

    def test_a_rising_loss_is_damped_down_to_a_bound(self):
        assert 0.1 < self.record([1.0 + 0.01 * step for step in range(30)]).damping < 0.7
        assert self.record([1.0 + 0.01 * step for step in range(300)]).damping == 0.1

    def test_a_slow_increase_wants_a_loss_that_falls_nine_times_of_ten(self):
        slow = Damping(increase=1.002)
        waves = [2.0, *(([1.5] * 10 + [1.0] * 90) * 30)]
        descent = [1.0 * 0.99**step for step in range(1200)]
        assert self.record(waves).damping == 1.0
        assert record(slow, waves, 0.0).damping < 0.2
        assert record(slow, waves + descent, 0.0).damping == 1.0

    def test_growth_is_limited_on_a_plateau(self):
        plateau = [2.3 + 0.01 * (-1) ** step for step in range(300)]
        assert not self.is_free(self.record(plateau, reduction=0.01))

    def test_predicted_reductions_too_small_to_be_visible_limit_nothing(self):
        plateau = [2.3 + 0.01 * (-1) ** step for step in range(300)]
        assert self.is_free(self.record(plateau, reduction=1e-6))

    @given(st.lists(st.floats(-1e6, 1e6), min_size=1), st.floats(0.0, 1e6))
    def test_the_damping_stays_in_its_bounds(self, losses, reduction):
        assert 0.1 <= self.record(losses, reduction).damping <= 1.0

    def test_growth_is_limited_on_a_plateau_only(self):
        def grown(losses):
            return run(plain(), 0.1, along(Quadratic(1.0, 0.05), losses))[1][-1]

        assert grown([12.3] * 200) < 0.2
        assert grown([10.0 + 2.3 * 0.97**step for step in range(200)]) > 1.0

    def test_along_lines_without_a_vertex_no_rate_rises_while_the_loss_does(self):
        """There is no minimizer to damp, and growth at every step would never end."""
        fallen = [2.0 * 0.97**step for step in range(200)]
        risen = [*fallen, *(fallen[-1] * 1.1**step for step in range(80))]
        falling = [*risen, *(risen[-1] * 0.97**step for step in range(100))]
        assert self.rule.clip(self.record(fallen, 10.0), 1.0, 1.1, convex=False) == 1.1
        assert self.rule.clip(self.record(risen, 10.0), 1.0, 1.1, convex=False) == 0.9
        assert self.rule.clip(self.record(risen, 10.0), 1.0, 1.1) == 1.1
        slow = Damping(increase=1.002)
        state = record(slow, falling, 10.0)
        assert state.damping < 1.0
        assert state.losses.mean < state.second_mean
        assert slow.clip(state, 1.0, 1.1, convex=False) == 1.0

    def test_a_rising_loss_does_not_reduce_a_rate_whose_predicted_reductions_are_invisible(self):
        risen = [*(2.0 * 0.97**step for step in range(200)), *(1.1**step for step in range(40))]
        assert self.record(risen, 1e-6).damping < 1.0
        assert self.rule.clip(self.record(risen, 1e-6), 1.0, 1.1, convex=False) == 1.1

    def test_the_rate_contracts_until_predicted_reductions_are_below_the_noise(self):
        lines = along(Quadratic(1.0, -0.05), [2.0 + 0.01 * step for step in range(300)])
        state, found, reasons = run(plain(), 0.1, lines)
        assert set(reasons) == {Reason.CONCAVE, Reason.SHRUNK}
        assert found[-1] == pytest.approx(state.region.losses.spread / 50.0, rel=0.3)
        assert found[-1] < 0.1 * max(found)


class TestPolyakStepCap:
    def minimizer(self, quadratic, loss):
        """The rate after one measurement at the minimizer."""
        rate = quadratic.minimizer
        samples = sample_line(quadratic, rate, loss)
        controller = damped()
        return controller.update(controller.state_type(), rate, samples)[1].rate

    @given(coefficients, coefficients, st.floats(1.0, 100.0))
    def test_the_vertex_of_a_line_that_stays_above_zero_is_trusted(self, slope, curvature, factor):
        quadratic = Quadratic(slope, curvature)
        loss = factor * slope**2 / (4.0 * curvature)
        assert self.minimizer(quadratic, loss) == pytest.approx(quadratic.minimizer, rel=1e-6)

    @given(coefficients, st.floats(1e-6, 1.0), st.floats(1e-9, 1e-3))
    def test_no_vertex_takes_off_more_than_there_is(self, slope, loss, curvature):
        """Half of what its slope alone predicts."""
        rate = 2.0 * loss / slope
        _, found, _ = run(damped(), rate, along(Quadratic(slope, curvature), [loss]))
        assert 0.5 * slope * found[-1] <= loss * (1.0 + 1e-12)

    def test_a_loss_of_nothing_bounds_nothing(self):
        """Losses may start at zero and fall from there."""
        assert self.minimizer(Quadratic(1.0, 0.5), 0.0) == 1.0


class TestSufficientDecrease:
    rule = SufficientDecrease()

    def record(self, losses, reduction=1.0):
        return record(self.rule, losses, reduction)

    def test_no_rate_expands_without_a_sufficient_decrease(self):
        plateau = [2.3 + 0.01 * (-1) ** step for step in range(300)]
        assert self.rule.clip(self.record(plateau[:2]), 1.0, 3.0) == 1.0
        assert self.rule.clip(self.record(plateau), 1.0, 3.0) < 1.0
        assert self.rule.clip(self.record(plateau, reduction=1e-6), 1.0, 3.0) == 3.0

    def test_a_rate_contracts_after_ten_predicted_decreases_without_one(self):
        plateau = [2.0 + 0.1 * (-1) ** step for step in range(100)]
        few = self.record(plateau, reduction=0.009)
        visible = few.losses.spread / (12.0 * few.predicted_reduction)
        assert self.rule.clip(few, 1.0, 3.0) == max(1.0, visible)
        assert self.rule.clip(self.record(plateau, reduction=0.1), 1.0, 3.0) == 0.95

    @pytest.mark.parametrize("line", [Quadratic(1.0, 0.05), Quadratic(1.0, -0.05)])
    def test_the_reason_of_such_a_contraction_is_shrunk(self, line):
        lines = along(line, [2.0 + 0.01 * (-1) ** step for step in range(300)])
        _, found, reasons = run(averaged(), 0.1, lines)
        pairs = zip([0.1, *found], found, reasons, strict=False)
        assert {reason for before, after, reason in pairs if after < before} == {Reason.SHRUNK}

    def test_each_success_lets_the_rate_rise_once(self):
        state = self.record([2.3] * 12 + [1.0] * 10)
        assert self.rule.clip(state, 1.0, 3.0) == 1.7
        assert self.rule.clip(state, 1.7, 3.0) == 1.7
        assert self.rule.clip(state, 0.1, 0.3) == 0.3
        assert self.rule.clip(state, 2.0, 3.0) == 2.0
        for _ in range(300):
            state = self.rule.update(state, 1.0, 1.7, 0.0)
        assert self.rule.clip(state, 1.7, 3.0) == pytest.approx(1.7 * 1.7)

    def test_a_decrease_does_not_count_again_when_the_mean_follows(self):
        state = self.record([2.3] * 12 + [1.0] * 10)
        assert state.losses.mean > 1.4
        assert state.reference_loss < 1.25
        for _ in range(20):
            state = self.rule.update(state, 1.0, 1.0, 1.0)
        assert state.losses.mean < 1.06
        assert state.last_success < 22

    def test_a_rate_contracts_where_the_loss_has_risen_since_the_last_success(self):
        def after(loss, reduction, steps=60):
            state = self.record([2.3] * 12 + [1.0] * 60)
            for _ in range(steps):
                state = self.rule.update(state, loss, 1.0, reduction)
            return state

        risen = after(1.5, 1.0)
        assert self.rule.clip(risen, 1.0, 3.0) == 1.0 - 3.0 / risen.updates
        assert self.rule.clip(after(1.5, 1.0, steps=5), 1.0, 3.0) == 1.7
        assert self.rule.clip(after(0.9, 1.0), 1.0, 3.0) >= 1.7
        # A rate whose predicted reductions are invisible is not the cause, and may rise.
        assert self.rule.clip(after(1.5, 1e-6), 1.0, 3.0) == 1.7

    def test_near_zero_loss_the_rate_stays_though_the_loss_rises(self):
        state = self.record([2.0 * 0.9**step for step in range(120)])
        assert state.losses.mean < 0.01 * state.peak_loss
        for _ in range(60):
            state = self.rule.update(state, 5e-3, 1.0, 1.0)
        assert state.losses.mean > state.reference_loss
        assert self.rule.clip(state, 1.0, 3.0) >= 1.0

    @settings(deadline=None, max_examples=20)
    @given(st.lists(st.floats(-1e6, 1e6), min_size=1), st.floats(0.0, 1e6))
    def test_every_loss_is_forgotten(self, losses, reduction):
        state = self.record(losses, reduction)
        for _ in range(15_000):
            state = self.rule.update(state, 2.0, 7.0, reduction)
        for step in range(1000):
            state = self.rule.update(state, 2.0 * 0.999**step, 7.0, reduction)
        assert state.radius == 1.7 * 7.0

    def test_no_rate_rises_once_all_but_a_hundredth_of_the_loss_is_gone(self):
        state = self.record([2.0 * 0.99**step for step in range(450)])
        assert state.radius == 1.7
        for step in range(450, 2000):
            state = self.rule.update(state, 2.0 * 0.99**step, 1.2, 1.0)
        assert state.radius == 1.2

    def test_a_rate_that_was_contracted_may_rise_to_the_radius(self):
        state = self.record([2.3] * 12 + [1.0] * 30)
        assert self.rule.clip(state, 1e-3, 3e-3) == 3e-3
        assert self.rule.clip(state, 1.4, 3.0) == 1.7

    def test_the_search_waits_for_a_loss_that_falls(self):
        """Where it does not, each batch shows its own noise."""

        def found(losses):
            return run(averaged(), 1e-3, along(Quadratic(1.0, 1.0), losses))[1][-1]

        assert found([2.3 + 0.01 * (-1) ** step for step in range(500)]) < 0.05
        assert found([2.3 * 0.98**step for step in range(500)]) == pytest.approx(0.5)
