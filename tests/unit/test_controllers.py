import itertools
import math
import pickle
import random
from dataclasses import asdict, dataclass, field, fields, replace

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from lines import sample_line
from reference import trust_region

from quadstep.controllers import (
    Decision,
    Reason,
    TrustRegionConfig,
    TrustRegionController,
    TrustRegionState,
    VertexController,
    VertexState,
)
from quadstep.quadratic import LineSamples, Quadratic
from quadstep.statistics import Ema, LossStatistics, SlopeCheck

anything = st.floats(allow_nan=True, allow_infinity=True)
rates = st.floats(1e-30, 1e30)
seeds = st.integers(0, 2**32)

CONFIG = TrustRegionConfig()
CONTROLLER = TrustRegionController()
EXACT = 1e-300  # resolution of losses without rounding errors


@dataclass
class Run:
    """Measurements of one line after the other, each given as a function of the distance."""

    rate: float = 1.0
    controller: TrustRegionController = CONTROLLER
    state: TrustRegionState = field(default=TrustRegionState())
    decisions: list[Decision] = field(default_factory=list)
    states: list[TrustRegionState] = field(default_factory=list)

    def add(self, *lines):
        for line in lines:
            samples = line(self.controller.probe_distance(self.state, self.rate))
            self.state, decision = self.controller.update(self.state, self.rate, samples)
            self.rate = decision.rate
            self.decisions.append(decision)
            self.states.append(self.state)
        return self

    @property
    def rates(self):
        return [decision.rate for decision in self.decisions]

    @property
    def reasons(self):
        return [decision.reason for decision in self.decisions]


def along(quadratic, losses, resolution=2.0**-52):
    return [lambda d, loss=loss: sample_line(quadratic, d, loss, resolution) for loss in losses]


def noisy(seed, count, shift=0.0, scale=1.0):
    """Lines of which slope, curvature and loss vary, around losses that fall, rise or stay."""
    generator = random.Random(seed)
    trend, noise, mean_curvature = (
        generator.choice(values) for values in ([0.95, 1.0, 1.01], [0.01, 0.2], [0.03, 1.0])
    )

    def line(number):
        level = trend**number * (1.0 + noise * generator.gauss(0.0, 1.0))
        slope = generator.gauss(1.0, 0.9)
        curvature = mean_curvature * generator.gauss(1.0, 0.9)
        quadratic = Quadratic(scale * 0.3 * slope, scale * curvature)
        return along(quadratic, [scale * level + shift], EXACT)[0]

    return [line(number) for number in range(count)]


def near(loss, spread=1.0):
    """The statistics of losses that were near this one."""
    return LossStatistics(Ema(loss, 50), Ema(spread, 50), loss, loss)


def started(**changed):
    """A state after the start of the search, which limits nothing."""
    known = {"radius": 1e6, "measurements": 50, "contraction": 50, "adapted": 50}
    known |= {"losses": near(1e9), "has_decreased": True, "reduction": Ema(1e9, 50)}
    return TrustRegionState(**known | changed)


def with_checks(checks=SlopeCheck.INITIAL_CHECKS):
    """A state whose slope check has passed so many times."""
    return started(slope_check=SlopeCheck(Ema(0.0, checks), measurements=1))


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
    def test_constants_out_of_range_are_named(self):
        for constant in fields(TrustRegionConfig):
            for value in (-1.0, math.nan):
                with pytest.raises(ValueError, match=f"{constant.name} must be in"):
                    TrustRegionConfig(**{constant.name: value})


class TestSlopeOfTheGradient:
    def test_is_used_once_the_check_passes_and_not_before(self):
        """The probes show a slope of one, the gradient has one of 1.1."""
        line = replace(sample_line(Quadratic(1.0, 1.0), 0.4), slope=1.1)
        initial = SlopeCheck.INITIAL_CHECKS
        for checks, slope in ((initial, 1.1), (initial - 2, 1.0)):
            state, _ = CONTROLLER.update(with_checks(checks), 0.4, line)
            assert state.quadratic.slope == pytest.approx(slope)

    def test_losses_that_are_not_finite_are_not_ignored(self):
        line = replace(sample_line(Quadratic(1.0, 1.0), 0.4), slope=1.0, loss_behind=math.nan)
        _, decision = CONTROLLER.update(with_checks(), 0.4, line)
        assert decision.reason is Reason.NON_FINITE
        line = replace(line, loss_behind=None, slope=math.inf)
        state, decision = CONTROLLER.update(with_checks(), 0.4, line)
        assert decision.reason is Reason.NON_FINITE
        assert state.slope_check == SlopeCheck()


class TestOneMeasurement:
    @pytest.mark.parametrize(
        ("line", "known", "expected"),
        [
            (Quadratic(2.4, 1.0), {}, Decision(1.2, 1.2, Reason.MINIMUM, settled=True)),
            (Quadratic(1.2, 1.0), {}, Decision(0.6, 0.6, Reason.MINIMUM, settled=True)),
            (Quadratic(8.0, 1.0), {"radius": 1.5}, Decision(1.5, 1.5, Reason.RADIUS)),
            (Quadratic(1.0, -1.0), {"radius": 1.5}, Decision(1.5, 1.5, Reason.CONCAVE)),
            (Quadratic(-0.1, 0.5), {}, Decision(1.0 / 3.0, 0.0, Reason.ASCENT)),
            (Quadratic(0.8, 1.0), {}, Decision(0.4, 0.0, Reason.MINIMUM)),
            (Quadratic(0.02, 0.5), {}, Decision(0.1, 0.0, Reason.MINIMUM)),
            (Quadratic(1.0, 1e12), {}, Decision(0.1, 0.0, Reason.REJECTED)),
            (Quadratic(3e11, 1e12), {}, Decision(0.15, 0.0, Reason.REJECTED)),
            (Quadratic(1.0, math.nan), {}, Decision(0.1, 0.0, Reason.NON_FINITE)),
            (Quadratic(0.0, 0.0), {}, Decision(1.0, 1.0, Reason.UNRESOLVED)),
        ],
        ids=[
            "at the vertex", "at half the rate", "vertex beyond the radius", "no minimum",
            "ascent", "contracted by more than half: rejected", "vertex below the contraction",
            "large loss ahead", "large loss ahead, vertex as a hint", "not finite", "flat",
        ],
    )  # fmt: skip
    def test_each_reason(self, line, known, expected):
        config = replace(CONFIG, growth=2.0, contraction=0.1, rejection=0.5)
        controller = TrustRegionController(config)
        samples = sample_line(line, 1.0, 1.0, EXACT)
        _, decision = controller.update(started(**known), 1.0, samples)
        assert decision == replace(
            expected, rate=pytest.approx(expected.rate), step=pytest.approx(expected.step)
        )

    @pytest.mark.parametrize(("since", "settled"), [(1, False), (10, False), (40, True)])
    def test_the_longer_ago_the_last_contraction_the_slower_the_growth(self, since, settled):
        state = started(contraction=51 - since)
        _, decision = CONTROLLER.update(state, 1.0, sample_line(Quadratic(1.0, 1e-3), 1.0))
        assert decision.rate == 1.0 + CONFIG.growth / since
        assert (decision.reason, decision.settled) == (Reason.RADIUS, settled)

    @given(st.floats(0.01, 100.0), st.floats(0.01, 100.0), st.floats(1.01, 100.0))
    def test_the_vertex_of_a_line_that_stays_above_zero_passes_polyaks_cap(
        self, slope, curvature, more
    ):
        line = Quadratic(slope, curvature)
        loss = more * slope**2 / (4.0 * curvature)
        state = started(losses=near(loss, spread=0.0))
        _, decision = CONTROLLER.update(
            state, line.minimizer, sample_line(line, line.minimizer, loss)
        )
        assert decision.reason is Reason.MINIMUM
        assert decision.rate == pytest.approx(line.minimizer, rel=1e-6)

    @given(st.floats(0.01, 100.0), st.floats(1e-6, 1.0), st.floats(1e-9, 1e-3))
    def test_no_rate_predicts_a_loss_below_zero(self, slope, loss, curvature):
        """Nor below a loss that was lower; but for a factor that a parabola needs."""
        line = Quadratic(slope, curvature * slope**2 / loss)
        known = near(loss, spread=0.0)
        for lowest in (loss, 0.0, -0.2 * loss):
            cap = CONFIG.polyak * (loss - min(lowest, 0.0)) / slope
            samples = sample_line(line, cap / 1.5, loss, EXACT)
            state = started(losses=replace(known, lowest=lowest))
            _, decision = CONTROLLER.update(state, cap / 1.5, samples)
            assert decision.reason is Reason.POLYAK
            assert decision.rate == pytest.approx(cap)

    def test_slope_and_curvature_are_averaged_one_by_one(self):
        lines = along(Quadratic(2.0, 1.0), [1.0]) + along(Quadratic(4.0, 3.0), [1.0])
        run = Run(1.0, state=started()).add(*lines)
        assert run.state.quadratic.slope == pytest.approx(3.0)
        assert run.state.quadratic.curvature == pytest.approx(2.0)
        assert run.rate == pytest.approx(0.75)

    def test_controllers_are_values_and_leave_states_as_they_are(self):
        controller = pickle.loads(pickle.dumps(CONTROLLER))
        assert controller == CONTROLLER
        state = started()
        before = pickle.dumps(state)
        controller.update(state, 0.1, sample_line(Quadratic(1.0, 1.0), 0.1))
        assert pickle.dumps(state) == before


class TestStart:
    @pytest.mark.parametrize("resolution", [2.0**-52, 2.0**-23])
    @pytest.mark.parametrize("exponent", range(-8, 3))
    def test_the_first_rate_does_not_depend_on_delta0(self, exponent, resolution):
        line = Quadratic(1.0, 2.0)
        run = Run(10.0**exponent)
        while not run.state.radius:
            run.add(*along(line, [1.0], resolution))
        assert run.rate == pytest.approx(0.25 / CONFIG.start, rel=0.01)
        assert run.reasons[-1] is Reason.MINIMUM
        assert len(run.decisions) < 10

    def test_the_first_line_is_a_part_of_the_average(self):
        run = Run(1.0).add(*along(Quadratic(1.0, 2.0), [1.0]))
        assert (run.state.quadratic.slope, run.state.fits) == (1.0, 1)
        run.add(*along(Quadratic(3.0, 4.0), [1.0], EXACT))
        assert run.state.quadratic.slope == pytest.approx(2.0)
        assert run.state.quadratic.curvature == pytest.approx(3.0)

    def test_the_first_step_stays_within_reach_of_its_probe(self):
        _, decision = CONTROLLER.update(
            TrustRegionState(), 1e-6, sample_line(Quadratic(1.0, 1.0), 1e-6)
        )
        assert decision.rate == pytest.approx(0.5 / CONFIG.start, rel=1e-3)
        assert decision.step == pytest.approx(1e-6 * (1.0 + CONFIG.growth))

    def test_along_concave_lines_the_probes_go_further_and_further(self):
        run = Run(1e-3).add(*along(Quadratic(1.0, -1.0), [1.0] * 5))
        assert set(run.reasons) == {Reason.CONCAVE}
        assert run.rate == pytest.approx(1e-3 * (1.0 + CONFIG.growth) ** 5)

    def test_rising_lines_move_nothing(self):
        run = Run(1.0).add(*along(Quadratic(-1.0, 1.0), [1.0, 1.5] * 3))
        assert set(run.reasons) == {Reason.ASCENT}
        assert not any(decision.step for decision in run.decisions)
        assert run.rates == sorted(run.rates, reverse=True)
        run.add(*along(Quadratic(1.0, 1.0), [1.0] * 40))
        assert run.rate >= 0.4 / CONFIG.start


class TestRounding:
    def test_the_probes_stay_out_where_a_tiny_rate_is_below_rounding(self):
        """In float32 a rate of 1e-8 changes this loss by less than an ulp."""
        run = Run(1e-8).add(*along(Quadratic(2e-8, 1.0), [1.0] * 20, 2.0**-23))
        assert Reason.UNRESOLVED in run.reasons
        distance = CONTROLLER.probe_distance(run.state, run.rate)
        assert distance > 1e-3
        assert distance > 100.0 * run.rate

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_losses_in_a_coarse_type_are_measured_where_they_differ(self, dtype):
        """Far enough out, and not so far that the loss is large there, again and again."""

        def rounded(distance, step):
            exact = sample_line(Quadratic(1.0, 1.0), distance, 2.3 * 0.97**step)
            losses = [exact.loss_ahead, exact.loss_center, exact.loss_behind]
            losses = torch.tensor(losses).to(dtype).tolist()
            return LineSamples(distance, *losses, torch.finfo(dtype).eps)

        lines = [lambda distance, step=step: rounded(distance, step) for step in range(120)]
        run = Run(1e-4).add(*lines)
        assert set(run.reasons[60:]) <= {Reason.MINIMUM, Reason.RADIUS, Reason.POLYAK}
        assert run.state.quadratic.minimizer == pytest.approx(0.5, rel=0.2)
        assert run.rate > 0.1

    def test_the_probes_stay_within_what_single_precision_can_multiply_a_step_by(self):
        far = started(minimum_distance=1e30)
        assert CONTROLLER.probe_distance(far, 1.0) == 1e30
        assert CONTROLLER.probe_distance(far, 1e-30) == 1.0

    def test_probes_that_went_too_far_do_not_reduce_the_rate(self):
        far = started(minimum_distance=1e3)
        state, decision = CONTROLLER.update(far, 0.1, LineSamples(1e3, math.inf, 1.0, math.inf))
        assert decision.rate == 0.1
        assert CONTROLLER.probe_distance(state, decision.rate) == 0.1

    def test_losses_that_were_computed_before_the_closure_do_not_raise_the_rate(self):
        constant = LineSamples(1.0, 2.0, 2.0, 2.0, slope=1.0)
        run = Run(1e-4).add(*[lambda distance: replace(constant, distance=distance)] * 20)
        assert 0.01 < run.rate < 1.0
        assert run.state.minimum_distance > 1e10, "but the probes go on to move out"


class TestAnyLine:
    @given(
        st.sampled_from([TrustRegionState(), started(), with_checks()]),
        rates,
        st.lists(st.tuples(anything, anything, anything, anything), max_size=20),
    )
    @example(TrustRegionState(), 1.0, [(1e308, -1e308, 1e308, 0.0)])
    @example(TrustRegionState(), 1e-30, [(0.0, 0.0, 0.0, 0.0)])
    @example(started(), 1.0, [(0.0, 0.0, 0.0, 0.0)])
    def test_the_rate_is_finite_positive_and_inside_its_clamp(self, state, rate, losses):
        for ahead, center, behind, slope in losses:
            distance, before = CONTROLLER.probe_distance(state, rate), state
            seen = behind if state.slope_check.due else None
            samples = LineSamples(distance, ahead, center, seen, slope=slope)
            state, decision = CONTROLLER.update(state, rate, samples)
            assert 1e-30 <= decision.rate <= 1e30
            reach = max(rate, distance) * (1.0 + CONFIG.growth)
            assert 0.0 <= decision.step <= min(decision.rate, reach * (1.0 + 1e-12))
            has_started = not before.radius and state.radius
            has_restarted = before.rejections and not state.rejections
            if not (has_started or has_restarted):
                assert decision.rate <= reach * (1.0 + 1e-12)
                assert decision.rate >= min(0.999 * CONFIG.contraction * rate, 1.0)
            rate = decision.rate

    @settings(max_examples=50)
    @given(seeds, st.floats(1e-3, 1e2))
    def test_equals_the_plain_rule_step_by_step(self, seed, rate):
        """With constants that make all of it happen."""
        config = replace(CONFIG, memory=5.0, start=4.0, restart=4)
        lines, expected = noisy(seed, 120), []
        rule = trust_region(rate, asdict(config))
        plain, _ = next(rule)
        for line in lines:
            samples = line(plain)
            plain, _ = rule.send([samples.loss_ahead, samples.loss_center, samples.loss_behind])
            expected.append(plain)
        run = Run(rate, TrustRegionController(config)).add(*lines)
        assume(Reason.UNRESOLVED not in run.reasons)
        assert run.rates == pytest.approx(expected, rel=1e-6)

    @given(seeds, st.integers(-40, 40))
    def test_the_scale_of_the_losses_does_not_matter(self, seed, exponent):
        plain, scaled = (Run(0.01).add(*noisy(seed, 60, scale=s)) for s in (1.0, 2.0**exponent))
        assert scaled.rates == plain.rates
        assert scaled.reasons == plain.reasons

    @given(seeds, st.floats(-100.0, -20.0))
    def test_a_constant_added_to_the_losses_does_not_matter_below_zero(self, seed, shift):
        """Above it zero bounds the losses, or seems to."""
        shifted = [Run(1.0).add(*noisy(seed, 60, shift=each)) for each in (-10.0, shift)]
        assert shifted[1].rates == pytest.approx(shifted[0].rates, rel=0.01)
        assert shifted[1].reasons == shifted[0].reasons


def descent(rate, vertex, gain, resolution=2.0**-52, faults=(), steps=150, start=1.0, shift=0.0):
    """Steps down lines with one vertex, where a fraction `gain` of the loss is gone."""
    run, loss = Run(rate), start
    for step in range(steps):
        if step == 20:
            run.add(
                *[lambda d, fault=fault: LineSamples(d, *fault, resolution) for fault in faults]
            )
        line = Quadratic(2.0 * gain * loss / vertex, gain * loss / vertex**2)
        run.add(*along(line, [loss + shift], resolution))
        step = run.decisions[-1].step
        loss += line.curvature * step**2 - line.slope * step
    return run, loss


class TestDescent:
    @settings(max_examples=25)
    @given(
        st.floats(1e-12, 1e12),
        st.lists(
            st.tuples(*[st.floats(-1.0, 10.0) | st.sampled_from([math.nan, math.inf])] * 3),
            max_size=2,
        ),
        st.floats(1e-4, 1e2),
        st.floats(0.1, 1.0),
        st.sampled_from([2.0**-52, 2.0**-23]),
    )
    def test_goes_on_from_any_rate_and_after_a_few_faults(
        self, rate, faults, vertex, gain, resolution
    ):
        run, loss = descent(rate, vertex, gain, resolution, faults)
        assert loss < 0.95
        assert 1e-5 * vertex < run.rate < 2.5 * vertex

    @pytest.mark.parametrize(
        ("shift", "rate"),
        [
            *itertools.product([10.0], [1e-30, 1e-12, 1e-3, 1.0, 1e3, 1e12, 1e30]),
            *itertools.product([-10.0], [1e-3, 1.0, 1e3, 1e12, 1e30]),
        ],
    )
    def test_finds_the_vertex_from_any_start(self, rate, shift):
        """Below zero the gap is what was descended: at a tiny rate, a rounding error."""
        run, _ = descent(rate, 0.25, 0.01, steps=300, shift=shift)
        assert run.reasons[-1] is Reason.MINIMUM
        assert run.rate == pytest.approx(0.25, rel=1e-2)


class TestRadius:
    """Of a controller that forgets soon, along lines whose vertex is far."""

    config = replace(CONFIG, memory=5.0)
    line = Quadratic(1.0, 1e-4)

    def run(self, losses, line=line, rate=0.1, **known):
        state = replace(TrustRegionState(), radius=rate, **known)
        run = Run(rate, TrustRegionController(self.config), state)
        return run.add(*along(line, losses, EXACT))

    def plateau(self, count, noise=0.01, level=2.0):
        return [level + noise * (-1) ** step for step in range(count)]

    def contractions(self, run):
        """The numbers of the measurements at which the radius has contracted."""
        radii = [state.radius for state in run.states]
        return [n for n in range(1, len(radii)) if radii[n] < radii[n - 1]]

    def decreases(self, run, start=0):
        """Those from a start on at which there was a sufficient decrease."""
        adapted = [state.adapted for state in run.states]
        changed = [n for n in range(max(start, 1), len(adapted)) if adapted[n] > adapted[n - 1]]
        return [n for n in changed if n not in self.contractions(run)]

    def test_expands_after_each_sufficient_decrease_and_at_no_other_time(self):
        run = self.run([2.0 * 0.99**step for step in range(150)])
        rates = [0.1, *run.rates]
        decreases = self.decreases(run)
        for n in range(1, len(run.states)):
            before, after = run.states[n - 1], run.states[n]
            if n in decreases:
                assert after.radius == max(before.radius, self.config.expansion * rates[n])
                assert after.losses.mean.mean < before.reference - after.losses.spread
            else:
                assert after.radius == max(before.radius, rates[n])
        assert len(decreases) > 5
        assert run.rate > 0.5

    def test_a_decrease_counts_once(self):
        """The average that follows it is no other."""
        run = self.run(self.plateau(20, 0.1) + self.plateau(100, 0.1, level=1.0))
        decreases = self.decreases(run)
        assert 1 <= len(decreases) <= 3
        assert max(decreases) < 20 + 3 * self.config.memory

    @pytest.mark.parametrize("noise", [0.001, 0.01])
    def test_contracts_when_a_decrease_would_have_been_seen(self, noise):
        run = self.run(self.plateau(100, noise))
        contractions = self.contractions(run)
        assert contractions[0] == math.floor(2 * self.config.memory)
        for before, at in itertools.pairwise([-1, *contractions]):
            assert at - before > 2 * self.config.memory
            old, new = run.states[at - 1 : at + 1]
            predicted = old.total_reduction + run.rates[at - 1]
            assert predicted > self.config.failure * new.losses.spread
            assert new.radius == pytest.approx(run.rates[at - 1] / self.config.expansion)
            assert new.total_reduction == 0.0
        assert len(contractions) > 3

    def test_contracts_only_once_many_spreads_were_predicted(self):
        """Of which a step predicts a third."""
        run = self.run(self.plateau(200, noise=0.3))
        first = self.contractions(run)[0]
        assert first > 2 * self.config.memory + 1
        old, new = run.states[first - 1 : first + 1]
        assert old.total_reduction < self.config.failure * new.losses.spread
        assert old.total_reduction + 0.11 > self.config.failure * new.losses.spread

    @pytest.mark.parametrize(("reference", "contracts"), [(2.005, False), (1.995, True)])
    def test_does_not_contract_while_the_loss_is_lower_than_at_the_last_success(
        self, reference, contracts
    ):
        """By less than would be another."""
        known = {"reference": reference, "has_decreased": True, "adapted": 1, "measurements": 10}
        run = self.run(self.plateau(100), **known)
        assert not self.decreases(run)
        assert bool(self.contractions(run)) == contracts

    def test_does_not_bind_while_predicted_reductions_are_invisible(self):
        """It rises until what a step predicts is a part of the spread."""
        run = self.run(self.plateau(300, noise=1.0), rate=1e-4)
        assert not run.state.has_decreased
        assert run.rate == pytest.approx(run.state.losses.spread / self.config.window, rel=0.2)

    def test_after_a_decrease_invisible_reductions_hold_the_rate(self):
        """They neither raise it nor leave it to the radius."""
        run = self.run(self.plateau(1000, noise=-1.0), rate=0.05, has_decreased=True)
        assert set(run.rates) == {0.05}
        assert len(self.contractions(run)) > 1

    def test_a_constant_loss_neither_expands_nor_contracts_for_want_of_noise(self):
        """Nor is a reduction invisible beside it."""
        run = self.run([2.0] * 10)
        assert set(run.rates) == {0.1}

    def test_near_zero_loss_it_no_longer_expands(self):
        """Nor near the lowest loss, if that is below zero."""
        losses = [2.0 * 0.9**step for step in range(150)]
        for shift, expansion in ((0.0, 1.0), (-3.0, 1.0), (3.0, self.config.expansion)):
            run = self.run([loss + shift for loss in losses])
            late = self.decreases(run, start=120)
            assert late
            for n in late:
                radius = max(run.states[n - 1].radius, expansion * run.rates[n - 1])
                assert run.states[n].radius == radius
            is_converged = run.state.losses.gap < self.config.converged * 2.0
            assert is_converged == (expansion == 1.0)

    @settings(max_examples=10)
    @given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=20), st.floats(1e-6, 1e6))
    def test_a_decrease_is_seen_after_any_losses(self, losses, rate):
        run = self.run(losses, rate=rate)
        run.add(*along(self.line, self.plateau(1200), EXACT))
        run.add(*along(self.line, self.plateau(100, level=1.0), EXACT))
        assert self.decreases(run, start=1200)


class TestRestart:
    line = Quadratic(1.0, 5.0)

    def test_rejected_lines_in_a_row_return_to_the_last_accepted_rate(self):
        run = Run(0.1, state=started()).add(*along(self.line, [1.0] * 40))
        accepted = run.rate
        infinite = LineSamples(0.1, math.inf, 1.0, math.inf)
        run.add(*[lambda d: replace(infinite, distance=d)] * 50)
        rejected = run.decisions[40:]
        assert {decision.reason for decision in rejected} == {Reason.NON_FINITE}
        assert not any(decision.step for decision in rejected)
        restarts = [n for n, decision in enumerate(rejected, 1) if decision.rate == accepted]
        assert restarts == [CONFIG.restart * n for n in range(1, 50 // CONFIG.restart + 1)]
        assert run.rates[-2] == pytest.approx(accepted * CONFIG.contraction ** (CONFIG.restart - 1))

    def test_what_was_measured_before_no_longer_counts(self):
        run = Run(0.1, state=started()).add(*along(self.line, [1.0] * 40))
        infinite = LineSamples(0.1, math.inf, 1.0, math.inf)
        run.add(*[lambda d: replace(infinite, distance=d)] * CONFIG.restart)
        run.add(*along(Quadratic(1.0, 20.0), [1.0]))
        assert run.state.quadratic == Quadratic(pytest.approx(1.0), pytest.approx(20.0))

    @pytest.mark.parametrize("seed", range(4))
    def test_slopes_of_no_clear_sign_do_not_end_the_search(self, seed):
        """As along a momentum that is mostly noise; the vertex of the mean line is at 0.01."""
        generator, lines = random.Random(seed), []
        for _ in range(1500):
            quadratic = Quadratic(generator.gauss(0.1, 1.0), abs(generator.gauss(5.0, 2.0)))
            lines += along(quadratic, [1.0 + 0.3 * generator.gauss(0.0, 1.0)], EXACT)
        run = Run(0.1).add(*lines)
        assert run.reasons.count(Reason.ASCENT) > 100
        assert 1e-5 < min(run.rates[500:]) < max(run.rates[500:]) < 0.1
