import math
import random
from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from lines import sample_line

from quadstep.quadratic import LineSamples, Quadratic
from quadstep.statistics import LossStatistics, NoiseEstimate, SlopeCheck, SlopeComparison

anything = st.floats(allow_nan=True, allow_infinity=True)


class TestLossStatistics:
    @given(st.floats(-1e6, 1e6), st.integers(1, 50))
    def test_equal_losses_leave_the_mean_equal_to_the_last_bit(self, loss, count):
        statistics = LossStatistics.initial(loss)
        for _ in range(count):
            statistics = statistics.update(loss, decay=0.03)
        assert statistics.mean == loss
        assert statistics.spread <= 0.1 * abs(loss)

    @given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1))
    @example([1.7e308, -1.7e308])
    def test_stays_finite(self, losses):
        statistics = LossStatistics.initial(losses[0])
        for loss in losses:
            statistics = statistics.update(loss, decay=0.1)
            assert math.isfinite(statistics.mean)
            assert 0.0 <= statistics.spread < math.inf


class TestNoise:
    @staticmethod
    def update(paths, reduction=1.0, linear=1.0):
        noise = NoiseEstimate()
        for losses in paths:
            noise = noise.update(losses, reduction, linear)
        return noise

    @given(st.floats(0.5, 0.99), st.floats(-0.5, 0.5), st.floats(-10, 10), st.floats(1e-3, 1e3))
    def test_losses_on_one_curve_or_on_two_by_turns_are_deterministic(
        self, fall, apart, floor, scale
    ):
        """At any offset and at any scale."""
        losses = [scale * (floor + fall**step * (1 + apart * (-1) ** step)) for step in range(300)]
        paths = [losses[at : at + 11] for at in range(0, 200, 10)]
        assert self.update(paths, reduction=scale, linear=2.0 * scale).determinism > 0.5

    @given(st.integers(0, 2**32), st.floats(0.3, 1e3), st.floats(-10, 10))
    def test_independent_losses_are_not(self, seed, spread, floor):
        generator = random.Random(seed)
        noise = NoiseEstimate()
        for _ in range(50):
            losses = [floor + generator.gauss(0, spread) for _ in range(11)]
            noise = noise.update(losses, reduction=1.0, linear=2.0)
            assert noise.determinism == 0.0

    @given(st.lists(st.lists(anything, max_size=12), max_size=30), anything, st.floats(0, 1e300))
    @example([[1.0] * 11] * 3, 1.0, 0.0)
    @example([[1.7e308, -1.7e308] * 6] * 3, math.inf, 0.0)
    def test_stays_a_ratio(self, paths, linear, reduction):
        noise = self.update(paths, reduction, linear)
        assert 0.0 <= noise.ratio <= 1.0
        assert 0.0 <= noise.determinism <= 1.0

    @pytest.mark.parametrize(
        "losses",
        [[], [1.0] * 6, [1.0, 2.0, math.nan, 1.0, 1.0, 2.0, 1.0], [math.inf] * 11],
        ids=["none", "short", "nan", "inf"],
    )
    def test_losses_without_information_leave_it_unchanged(self, losses):
        assert NoiseEstimate().update(losses, 1.0, 1.0) == NoiseEstimate()

    def test_constant_losses_without_a_predicted_reduction_are_noise(self):
        assert self.update([[1.0] * 11] * 30, reduction=0.0, linear=0.0).determinism == 0.0

    @pytest.mark.parametrize(
        "losses",
        [[1.0, 3.0, 0.0, 2.0, 5.0, 1.0, 4.0, 0.0, 1.0], [1.0 + 0.2 * step for step in range(11)]],
        ids=["noise", "overshoot"],
    )
    def test_what_disturbs_is_heard_at_the_next_measurement(self, losses):
        noise = self.update([[1.0 - 0.01 * step for step in range(11)]] * 30)
        assert noise.determinism == 1.0
        assert noise.update(losses, 1.0, 1.0).determinism == 0.0


class TestSlopeCheck:
    def update(self, check, *slopes):
        """Adds measurements whose losses show a slope of one."""
        for slope in slopes:
            samples = replace(sample_line(Quadratic(1.0, 1.0), 0.1), slope=slope)
            check = check.update(
                samples if check.due else replace(samples, loss_behind=None), damping=1.0
            )
        return check

    def due(self, check, slope, count):
        """Which of the next measurements take two probes."""
        due = []
        for _ in range(count):
            due.append(check.due)
            check = self.update(check, slope)
        return due

    @pytest.mark.parametrize("slope", [0.9, 1.0, 1.15])
    def test_one_measurement_in_ten_is_checked_where_the_slopes_agree(self, slope):
        assert (
            self.due(SlopeCheck(), slope, 40)
            == [True] * 11 + ([False] * 9 + [True]) * 2 + [False] * 9
        )

    @pytest.mark.parametrize("slope", [-1.0, 0.0, 0.1, 0.8, 1.25, 10.0])
    def test_each_measurement_is_checked_where_they_do_not(self, slope):
        assert all(self.due(SlopeCheck(), slope, 40))

    def test_a_check_that_fails_is_followed_by_others(self):
        """Gradients that are clipped all of a sudden are soon no longer used."""
        check = self.update(SlopeCheck(), *[1.0] * 20)
        assert check.due
        check = self.update(check, 0.1)
        assert check.passes
        assert check.due
        assert self.update(check, 1.0, *[1.0] * 3).passes
        assert not self.update(check, *[0.1] * 3).passes

    def test_it_recovers(self):
        check = self.update(SlopeCheck(), *[0.1] * 50)
        assert not check.passes
        assert self.update(check, *[1.0] * 20).passes

    @pytest.mark.parametrize("slope", [math.nan, math.inf])
    def test_it_starts_over_where_the_slope_is_not_finite(self, slope):
        check = self.update(SlopeCheck(), *[1.0] * 20)
        assert self.update(check, slope) == SlopeCheck()

    def test_differences_below_rounding_are_no_checks(self):
        flat = LineSamples(1e-20, 1.0, 1.0, 1.0, slope=1.0)
        assert SlopeCheck().update(flat, damping=1.0) == SlopeCheck(measurements=1)

    @pytest.mark.parametrize(("damping", "slope", "passes"), [(1.0, 1.1, True), (0.1, 1.1, False)])
    def test_the_smaller_the_damping_the_stricter_the_check(self, damping, slope, passes):
        """For a close probe a small error of the slope is a large one of the curvature."""
        samples = replace(sample_line(Quadratic(1.0, 1.0), 0.5 * damping), slope=slope)
        check = SlopeCheck()
        for _ in range(SlopeCheck.INITIAL_CHECKS):
            check = check.update(samples, damping)
        assert check.passes == passes

    def test_a_vertex_far_beyond_the_probe_may_be_anywhere(self):
        """There the trust region bounds the rate, and not the quadratic."""
        samples = replace(sample_line(Quadratic(1.0, 1.0), 0.001), slope=1.1)
        assert SlopeCheck().update(samples, damping=1.0).last_difference < 0.3

    def test_modified_gradients_are_not_used(self):
        check = self.update(SlopeCheck(), *[1.0] * 20)
        line = sample_line(Quadratic(1.0, 1.0), 0.1)
        clipped = replace(line, slope=1.0, gradient_unmodified=False)
        assert check.update(clipped, damping=1.0) == SlopeCheck()


class TestSlopeComparison:
    def samples(self, ratio, resolution=1e-7, curvature=0.0, **changed):
        """Losses whose slope is `ratio` times the one that the gradient gives, which is 2."""
        loss = {"loss_ahead": 1.0 - 0.2 * ratio + curvature, "loss_behind": 1.0 + 0.2 * ratio}
        options = {"loss_center": 1.0, "resolution": resolution, "slope": 2.0}
        return LineSamples(0.1, **loss | options | changed)

    def compare(self, count, *args, **options):
        comparison = SlopeComparison()
        return [comparison.differ(self.samples(*args, **options)) for _ in range(count)]

    @pytest.mark.parametrize("ratio", [0.1, -1.0, 2.0])
    def test_other_gradients_are_noticed_in_time(self, ratio):
        assert self.compare(25, ratio) == [False] * 19 + [True] * 6

    @pytest.mark.parametrize("ratio", [0.5, 1.0, 1.4])
    def test_the_same_are_not(self, ratio):
        assert not any(self.compare(100, ratio))

    @pytest.mark.parametrize(
        "unknown",
        [
            {"resolution": 1e-3},
            {"gradient_unmodified": False},
            {"loss_behind": None},
            {"slope": math.nan},
            {"curvature": 1.0},
            {"loss_ahead": math.inf},
        ],
    )
    def test_what_tells_nothing_is_left_out(self, unknown):
        assert not any(self.compare(100, -1.0, **unknown))
