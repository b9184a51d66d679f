"""LQA: a torch optimizer that measures its learning rate.

`LQA.step` is the map of the package: gradient pass, direction, probes on the line, parabola,
safeguarded rate, update.
"""

# torch.optim itself is built from the foreach operations, private in name alone.
# pyright: reportPrivateUsage=false, reportPrivateImportUsage=false

from __future__ import annotations

import math
import re
import warnings
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from torch import Tensor
from torch.optim import Optimizer

from quadstep.averaging import ScheduleFree
from quadstep.direction import Direction, Displacement, Gradient, NormalisedGradient, real
from quadstep.line import (
    Closure,
    Line,
    Moment,
    Surroundings,
    alike,
    at_hand,
    local,
    processes,
    rank_mean,
    whole,
)
from quadstep.parabola import (
    Agreement,
    Decision,
    Evidence,
    Exact,
    Ledger,
    Noise,
    Points,
    Reason,
    Safeguarded,
    WaryLedger,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

STATE_VERSION = 3


def _deaf_to_noise(saved: dict[str, Any]) -> dict[str, Any]:
    """Adds to a state of version 1 what is known of the noise in the losses: nothing."""
    search = saved["search"] | {"noise": asdict(Noise())}
    return saved | {"version": 2, "search": search, "path": [], "stretch": 1.0}


def _heedless_of_gradients(saved: dict[str, Any]) -> dict[str, Any]:
    """Adds to a state of version 2 what is known of the slopes of the gradients: nothing."""
    search = saved["search"] | {"agreement": asdict(Agreement())}
    return saved | {"version": 3, "search": search}


UPGRADES: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {
    1: _deaf_to_noise,
    2: _heedless_of_gradients,
}
"""What turns LQA's own part of a state of each older version into that of the next."""

AUDIT = 100
"""Of so many measurements one evaluates the loss twice at the same parameters."""

MEDDLED = 10
"""After so many steps in a row with a rate that no step has left, a scheduler is suspected."""

PATH = 100
"""Of the losses between two measurements so many are kept, the last."""

_GOLDEN = (3.0 - math.sqrt(5.0)) / 2.0

_SPENT = "_quadstep_spent"
"""The attribute of a gradient that keeps the version at which a step has used it."""

_MISSES_GRADIENTS = re.compile("require.*grad")
"""What the errors say of closures that cannot do without autograd."""

CANCELLING = 1 / 64
"""What is left of the rounding errors of single values in their mean, the loss."""


@dataclass(frozen=True, slots=True)
class Report:
    """What the last step saw and did.

    Attributes:
        loss: the loss before the step.
        slope: a of equation (2), the decrease of the loss per unit of rate; where the measurements
            are smoothed, the smoothed one.
        curvature: b of equation (2), likewise.
        rate: the rate in force after the step.
        reason: why the rate is what it is.
        forwards: evaluations of the closure.
        backwards: backward passes.
        counts: how many steps ended for each reason since the optimizer was made.
    """

    loss: float
    slope: float
    curvature: float
    rate: float
    reason: Reason
    forwards: int
    backwards: int
    counts: Mapping[Reason, int] = field(default_factory=dict[Reason, int])


class LQA(Optimizer):
    """Learns without a learning rate: the rate is the minimiser of a measured parabola.

    Args:
        params: parameters or param groups, or a `torch.optim` optimizer, whose steps are then the
            directions and whose learning rates are measured. The learning rates of several groups
            keep their ratios.
        direction: "rms", the gradient over its running root mean square, centred over the inputs of
            each output, or "sgd", the gradient.
        averaging: "schedule-free" takes greedy steps and keeps their average, shown by `eval()`;
            None keeps the last iterate. By default schedule-free along "rms", else None.
        delta0: the first rate and probe radius; later ones are measured. By default 1e-4 along
            "rms" and 0.1 along "sgd"; a wrapped optimizer brings its own learning rate.
        every: measure once in so many steps, or one less by turns (and at once whenever the last
            measurement hit a limit). By default 10 with averaging and 1 without.
        weight_decay: along "rms", what each step takes off the parameters, in proportion to them
            and to the rate, as AdamW does and by default as much, 0.01; groups may have their own.
            The line that is measured includes it.
        process_group: the processes that train together, over which the measured losses are
            averaged. By default all processes; a group of one trains by itself.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: an argument is out of range.

    Source: Zhu et al., CIKM 2020, sections 3.2 and Algorithm 1; what goes beyond it is said in
    `parabola.Safeguarded` and `averaging.ScheduleFree`.
    """

    def __init__(
        self,
        params: Any,
        *,
        direction: Literal["rms", "sgd"] | None = None,
        averaging: Literal["auto", "schedule-free"] | None = "auto",
        delta0: float | None = None,
        every: int | None = None,
        weight_decay: float | None = None,
        process_group: ProcessGroup | None = None,
    ) -> None:
        if isinstance(params, torch.nn.Module):
            raise TypeError(
                f"params must be parameters, param groups or an optimizer, got a module, "
                f"{type(params).__name__}; use LQA(model.parameters())"
            )
        base: Optimizer | None = params if isinstance(params, Optimizer) else None
        if base is not None:
            _check_base(base, direction, delta0, weight_decay)
        elif direction not in (None, "rms", "sgd"):
            raise ValueError(
                f'direction must be "rms" or "sgd", got {direction!r}; to follow another '
                "optimizer's steps pass the optimizer itself: LQA(torch.optim.AdamW(params))"
            )
        if averaging not in (None, "auto", "schedule-free"):
            raise ValueError(f'averaging must be "schedule-free" or None, got {averaging!r}')
        greedy = base is None and direction != "sgd"
        averaged = averaging == "schedule-free" or (averaging == "auto" and greedy)
        if every is not None:
            _check_every(every)
        if delta0 is None:
            delta0 = 1e-4 if greedy else 0.1
        _check_delta0(delta0)
        if weight_decay is None:
            weight_decay = 0.01 if greedy else 0.0

        self._direction: Direction
        if base is not None:
            self._direction = Displacement(base)
        else:
            self._direction = NormalisedGradient() if greedy else Gradient()
        self._averaging = ScheduleFree() if averaged else None
        self._every = int(every or (10 if averaged else 1))
        # Averaged iterates bear a greedy rate; without averaging the loss itself must vouch for it.
        ledger = Ledger if base is None else WaryLedger
        self._search: Safeguarded | Exact = (
            Safeguarded(smoothing=0.97, growth=3.0, slowing=True, ledger=Evidence.open(0.0))
            if averaged
            else Safeguarded(smoothing=0.99, growth=1.1, ledger=ledger.open(0.0))
        )
        self._process_group = process_group
        # The losses since the last measurement, that one's first, for what is noise in them.
        length = min(self._every, PATH) if averaged else 0
        self._path: deque[Tensor | float] = deque(maxlen=length)
        self._wait = 0
        self._moves = 0
        self._left = math.nan
        self._meddled = 0
        self._training = True
        self._closure_runs_backward = False
        self._differentiates = False
        self._audits = True
        self._sees = True
        self._counts: Counter[Reason] = Counter()
        self._last: tuple[Tensor | None, Reason, int, int] = (None, Reason.HELD, 0, 0)
        self._surroundings = Surroundings()
        self._reached: set[int] = set()
        groups: Any = params if base is None else base.param_groups
        own = {"lr": delta0, "weight_decay": weight_decay}
        super().__init__(groups, own if base is None else base.defaults)
        self._share()

    @classmethod
    def paper(
        cls, params: Any, delta0: float = 0.1, *, process_group: ProcessGroup | None = None
    ) -> Self:
        """Algorithm 1 to the letter: gradient direction, two probes a step, no safeguards.

        The rate is the vertex of the parabola, negative or huge as it may be. Where the printed
        algorithm divides by zero or overflows, the report says `non_finite`, the parameters stay
        and the last finite rate remains the probe radius.

        Args:
            params: parameters or param groups.
            delta0: initial (small) learning rate, the first probe radius.
            process_group: the processes that train together, by default all.
        """
        if isinstance(params, Optimizer):
            raise TypeError(
                "LQA.paper follows the gradient and takes parameters, not an optimizer; "
                "use LQA(optimizer) to measure along another optimizer's steps"
            )
        optimizer = cls(
            params, direction="sgd", averaging=None, delta0=delta0, process_group=process_group
        )
        optimizer._search = Exact()
        return optimizer

    @property
    def rate(self) -> float:
        """The rate in force: the `lr` of the first group that has one other than zero."""
        rates = [float(group["lr"]) for group in self.param_groups]
        return next((rate for rate in rates if rate != 0.0), 0.0)

    @property
    def report(self) -> Report:
        """The record of the last step; reading it waits for the device."""
        loss, reason, forwards, backwards = self._last
        parabola = self._search.parabola
        return Report(
            loss=math.nan if loss is None else float(loss),
            slope=parabola.slope,
            curvature=parabola.curvature,
            rate=self.rate,
            reason=reason,
            forwards=forwards,
            backwards=backwards,
            counts={reason: self._counts[reason] for reason in Reason if self._counts[reason]},
        )

    @torch.no_grad()
    def step(self, closure: Closure | None = None, *, loss: Tensor | None = None) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Takes one step; where all gradients are zero only a wrapped optimizer moves anything.

        Args:
            closure: runs the model forward on this step's batch and returns the loss, a scalar
                tensor. It is called with gradients enabled once, and twice more without where the
                step measures, or once where the slope of the gradient fits to the losses. The first
                and every hundredth measurement take one more call, to see that it returns the same
                loss at the same parameters.
            loss: for the two-phase use: the caller has run `loss.backward()` already, the
                gradients are taken as they are and the closure is only probed (three times where
                the step measures). Must be what the closure returns at the same parameters.

        Returns:
            The loss before the step, detached.

        Raises:
            TypeError, ValueError, RuntimeError: the closure is missing or returns something other
                than a differentiable scalar loss, or no gradient arrived; nothing has moved then.
        """
        self._share()
        if self._only_asks_for_state(closure):
            return self._make_state()
        closure = self._check_call(closure, loss)
        rate, due, line = self.rate, self._wait == 0, None
        self._suspect_scheduler(rate)
        own, probes = int(loss is None), 0
        before = self._surroundings.capture(self._devices() if due else None)
        try:
            centre = self._gradient_pass(closure, loss, before)
            self._note_new_gradients()
            if due:
                # Closures may return one tensor each time, as replayed graphs do.
                centre = centre.clone()
            # Elsewhere looking means waiting, which a held step does not.
            finite, sloping = self._inspect(centre) if due or at_hand(centre) else (True, True)
            if not finite:
                before.restore_buffers()
                return self._finish(centre, Decision(rate, 0.0, Reason.NON_FINITE), own)
            if not sloping and not isinstance(self._search, Exact):
                # There is no line to measure and nothing to learn: only a wrapped optimizer moves.
                if not isinstance(self._direction, Displacement):
                    return self._finish(centre, Decision(rate, 0.0, Reason.HELD), own)
                due = False
            keep = due or self._averaging is not None
            line = self._direction.line(self.param_groups, self.state, rate, keep)
            if not due:
                decision = Decision(rate, rate, Reason.HELD)
            else:
                points, probes = self._measure(closure, loss, centre, line, before)
                self._search, decision = self._search.decide(rate, points)
                if decision.reason is Reason.NON_FINITE and math.isfinite(points.centre):
                    before.restore()
            self._move(line, decision)
        except BaseException:
            if line is not None:
                line.restore()
            before.restore()
            raise
        finally:
            self._spend_gradients()
        return self._finish(centre, decision, own, probes)

    @torch.no_grad()
    def eval(self) -> None:
        """Puts the averaged weights into the parameters, to validate and to save."""
        if self._training and self._averaging is not None:
            self._averaging.average(self._parameters(), self.state)
            self._surroundings.reshard()
        self._training = False

    @torch.no_grad()
    def train(self) -> None:
        """Puts the weights back that training goes on from."""
        if not self._training and self._averaging is not None:
            self._averaging.resume(self._parameters(), self.state)
            self._surroundings.reshard()
        self._training = True

    @property
    def configuration(self) -> dict[str, Any]:
        """What a checkpoint must agree on with the optimizer that loads it."""
        return {
            "direction": type(self._direction).__name__,
            "base": type(self._direction.base).__name__
            if isinstance(self._direction, Displacement)
            else None,
            "search": type(self._search).__name__,
            "averaging": self._averaging is not None,
        }

    def state_dict(self) -> dict[str, Any]:
        """Returns the state as torch's optimizers do, with LQA's own under "lqa" in group 0."""
        self._share()
        state = super().state_dict()
        state["param_groups"][0]["lqa"] = {
            "version": STATE_VERSION,
            "configuration": self.configuration,
            "search": asdict(self._search),
            "wait": self._wait,
            "moves": self._moves,
            # As long as a fresh optimizer's, for the same reason as all counts below.
            "path": [*map(float, self._path), *(None for _ in range(self._missing))],
            "stretch": 1.0 if self._averaging is None else self._averaging.stretch,
            "training": self._training,
            # All reasons: distributed checkpoints load the keys that a fresh optimizer has.
            "counts": {reason.value: self._counts[reason] for reason in Reason},
        }
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores a state; training goes on bit for bit where it was saved.

        Raises:
            ValueError: the state was saved by another optimizer, version or configuration.
        """
        saved = _saved(state_dict)
        for key, own in self.configuration.items():
            if saved["configuration"].get(key) != own:
                raise ValueError(
                    f"state_dict was saved with {key} = {saved['configuration'].get(key)!r}, this "
                    f"optimizer has {key} = {own!r}; construct LQA as it was when it was saved"
                )
        search = self._search.loaded(saved["search"])
        self._share()
        super().load_state_dict(state_dict)
        del self.param_groups[0]["lqa"]
        if isinstance(self._direction, Displacement):
            self._direction.base.__setstate__(
                {"state": self.state, "param_groups": self.param_groups}
            )
        self._search = search
        self._wait = saved["wait"]
        self._moves = saved["moves"]
        self._path.clear()
        self._path.extend(loss for loss in saved["path"] if loss is not None)
        if self._averaging is not None:
            self._averaging.stretch = saved["stretch"]
        self._training = saved["training"]
        self._counts = +Counter({Reason(key): count for key, count in saved["counts"].items()})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group; without an `lr` of its own it gets the rate in force."""
        rate = float(param_group.get("lr", 0.0))
        if not 0.0 <= rate < math.inf:
            raise ValueError(f"lr must be finite and not negative, got {rate!r}")
        if not isinstance(self._direction, Displacement):
            decay = param_group.get("weight_decay", self.defaults["weight_decay"])
            _check_weight_decay(decay, self._direction)
        if self._counts:
            param_group.setdefault("lr", self.rate)
        if self._counts and isinstance(self._direction, Displacement):
            self._direction.base.add_param_group(param_group)
        else:
            super().add_param_group(param_group)
        # Its modules may be ones that no closure has run yet.
        self._surroundings.look_again()

    def __getstate__(self) -> dict[str, Any]:
        own = {key: value for key, value in vars(self).items() if key in _PICKLED}
        return super().__getstate__() | own

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_surroundings" not in vars(self):
            self._surroundings = Surroundings()
            self._reached = set()

    def _share(self) -> None:
        """Makes groups and state those of the wrapped optimizer, which may have replaced them."""
        if isinstance(self._direction, Displacement):
            self.param_groups = self._direction.base.param_groups
            self.state = self._direction.base.state

    def _parameters(self) -> list[Tensor]:
        return [param for group in self.param_groups for param in group["params"]]

    def _gradients(self) -> list[Tensor]:
        return [param.grad for param in self._parameters() if param.grad is not None]

    def _devices(self) -> set[torch.device]:
        return {param.device for param in self._parameters()}

    def _only_asks_for_state(self, closure: Any) -> bool:
        """Whether this is `torch.distributed.checkpoint`, which steps a fresh optimizer at rate 0.

        It wants the state of every parameter to be there, to load a checkpoint into it.
        """
        return closure is None and not self.state and self.rate == 0.0

    def _make_state(self) -> Tensor:
        """Makes the state of the parameters that have gradients, as no step had been taken."""
        line = self._direction.line(self.param_groups, self.state, 0.0, self._averaging is not None)
        if self._averaging is not None:
            self._averaging.move(line.blocks, self.state, 0.0, 1.0)
        for state in self.state.values():
            if "step" in state:
                state["step"] *= 0
        return torch.zeros(())

    def _check_call(self, closure: Closure | None, loss: Any) -> Closure:
        if not callable(closure):
            raise TypeError(
                f"step() needs a closure that returns the loss, got {type(closure).__name__}; "
                "call it as opt.step(lambda: loss_fn(model(x), y))"
            )
        if loss is not None:
            _check_loss(loss, "loss")
        if not self._training:
            raise RuntimeError(
                "step() was called while the parameters hold the averaged weights; "
                "call opt.train() first"
            )
        return closure

    def _suspect_scheduler(self, rate: float) -> None:
        """Warns once of rates set from outside after each step, which leave none as measured."""
        self._meddled = self._meddled + 1 if rate != self._left else 0
        # Once more than where the first step of a fresh or loaded optimizer finds its rate.
        if self._meddled == MEDDLED + 1:
            warnings.warn(
                f"the lr of the param groups was changed after each of the last {MEDDLED} steps, "
                "so no measured rate stays in force; leave the learning-rate scheduler out, LQA "
                "sets the rate itself",
                # A scheduler wraps `step` once more.
                stacklevel=6,
            )

    def _gradient_pass(self, closure: Closure, loss: Tensor | None, before: Moment) -> Tensor:
        """Evaluates the loss and its gradients, unless the caller has done so."""
        if loss is None:
            loss = self._evaluate(closure, before)
        if not self._gradients():
            raise RuntimeError(
                "no parameter of the optimizer has a gradient; compute the loss from the "
                "parameters given to LQA, and in the two-phase use call loss.backward() before "
                "step()"
            )
        return whole(loss.detach())

    def _evaluate(self, closure: Closure, before: Moment) -> Tensor:
        """Evaluates the closure, and runs backward unless it does.

        What a caller has accumulated since the last step is left to a closure that runs backward,
        to clear or to add to.
        """
        accumulated = self._has_fresh_gradients()
        if accumulated:
            self._spend_gradients()
        else:
            self._clear_gradients()
        with torch.enable_grad(), self._surroundings.discovering(before, self._devices):
            loss = closure()
        _check_loss(loss, "closure")
        if self._has_fresh_gradients():
            self._note_backward_in_closure()
        elif not loss.requires_grad:
            raise RuntimeError(
                "the loss that closure returned does not require grad; compute it from the "
                "optimizer's parameters, without torch.no_grad(), .detach() or .item()"
            )
        else:
            if accumulated:
                self._clear_gradients()
            torch.autograd.backward(loss)
        return loss

    def _clear_gradients(self) -> None:
        # As `zero_grad` does, whose notes for the profiler take ten times as long.
        for param in self._parameters():
            param.grad = None

    def _has_fresh_gradients(self) -> bool:
        """Whether a gradient has come, or has been added to, since all were spent."""
        return any(getattr(grad, _SPENT, None) != grad._version for grad in self._gradients())

    def _spend_gradients(self) -> None:
        """Marks the gradients that there are, for later ones to be told from them."""
        for grad in self._gradients():
            setattr(grad, _SPENT, grad._version)

    def _note_backward_in_closure(self) -> None:
        if not self._closure_runs_backward:
            warnings.warn(
                "the closure calls backward() itself, so each probe pays for a backward pass; "
                "return the loss alone, LQA runs backward",
                stacklevel=7,
            )
        self._closure_runs_backward = True

    def _note_new_gradients(self) -> None:
        """Looks for modules once more where parameters have a gradient that never had one."""
        reached = {id(param) for param in self._parameters() if param.grad is not None}
        if not reached <= self._reached:
            if self._reached:
                self._surroundings.look_again()
            self._reached |= reached

    def _inspect(self, loss: Tensor) -> tuple[bool, bool]:
        """Whether loss and gradients are finite, and whether any gradient is not zero.

        Both must be known before any state advances. Processes see losses and shards of gradients
        of their own, and all must take one branch.
        """
        grads = local(self._gradients())
        dense = [grad.coalesce().values() if grad.is_sparse else grad for grad in grads]
        parts = [grad for grad in real(dense) if grad.numel()]
        if at_hand(loss):
            values = [float(loss), *_sizes(parts)]
        else:
            # The largest size carries every inf and nan. The device is waited for once.
            sizes = [size for some in alike(parts) for size in torch._foreach_norm(some, math.inf)]
            waiting: Any = torch.stack([value.to(loss.device) for value in (_scalar(loss), *sizes)])
            values = waiting.tolist()
        finite, sloping = all(map(math.isfinite, values)), any(values[1:])
        if processes(self._process_group) > 1:
            flags = [float(finite), float(sloping)]
            finite_ranks, sloping_ranks = rank_mean(flags, loss, self._process_group)
            finite, sloping = finite_ranks == 1.0, sloping_ranks > 0.0
        return finite, sloping

    def _measure(
        self, closure: Closure, loss: Tensor | None, centre: Tensor, line: Line, before: Moment
    ) -> tuple[Points, int]:
        """Probes the line; the generators, buffers and gradients stay as the gradient pass left.

        In the two-phase use the caller's forward pass drew random numbers of its own, so the
        centre is evaluated again under those of the probes.
        """
        after = before
        if loss is None:
            # What the gradient pass did not draw from, the probes will not either.
            before, after = self._surroundings.capture(self._devices()).advanced(before)

        kinds: list[torch.dtype] = []

        def run() -> Tensor:
            before.restore()
            torch.clear_autocast_cache()
            with (
                torch.set_grad_enabled(self._closure_runs_backward or self._differentiates),
                self._surroundings.discovering(before, self._devices),
            ):
                return closure()

        def evaluate() -> Tensor | float:
            try:
                probe = run()
            except RuntimeError as error:
                if self._differentiates or not _MISSES_GRADIENTS.search(str(error)):
                    raise
                # It takes derivatives itself, as the residual of a differential equation does.
                self._differentiates = True
                probe = run()
            _check_loss(probe, "closure")
            kinds.append(probe.dtype)
            return _reading(probe)

        radius = self._search.radius(self.rate)
        audited = self._audits and self._measured % AUDIT == 0
        again = audited or loss is not None
        # A caller who has had the gradients in hand may have clipped them, if only now and then.
        own = loss is None and not self._closure_runs_backward
        agreement = self._search.agreement
        slope = None if agreement is None else line.slope()
        both = slope is None or agreement is None or not own or agreement.due
        rates = {"minus": radius}
        if again:
            rates["again"] = 0.0
        if both:
            rates["plus"] = -radius
        known = len(before.buffers)
        # Out of reach of a closure that clears or accumulates gradients.
        grads = [(param, param.grad) for param in self._parameters()]
        self._clear_gradients()
        try:
            losses = line.losses(evaluate, rates.values())
            if audited and loss is not None:
                # The caller's forward pass may rightly have drawn other numbers.
                now = self._surroundings.capture(self._devices())
                audited = not now.advanced(before)[0].generators
        finally:
            for param, grad in grads:
                param.grad = grad
            if after is not before:
                after.buffers.extend(before.buffers[known:])
            after.restore()
        sent = {"centre": _reading(centre), **dict(zip(rates, losses, strict=True))}
        if slope is not None:
            sent["slope"] = slope
        # As many on every process: one that took over the state of another may know fewer.
        path = [*self._path, *(math.nan for _ in range(self._missing))]
        # The one wait for the device.
        values = rank_mean([*sent.values(), *path], centre, self._process_group)
        seen = dict(zip(sent, values, strict=False))
        given, repeated = seen["centre"], seen.get("again", seen["centre"])
        points = Points(
            radius=radius,
            minus=seen["minus"],
            centre=given if loss is None else repeated,
            plus=seen.get("plus"),
            resolution=self._resolution(kinds[0]),
            path=tuple(value for value in values[len(sent) :] if not math.isnan(value)),
            slope=seen.get("slope", math.nan),
            own=own,
        )
        if points.blind and isinstance(self._search, Safeguarded) and not self._search.fits:
            self._note_blindness(points)
        if audited:
            self._audit(given, repeated, points, loss is None)
        return points, len(rates)

    @property
    def _missing(self) -> int:
        return (self._path.maxlen or 0) - len(self._path)

    @property
    def _interval(self) -> int:
        """Steps to the next measurement: `every`, or one less by the golden ratio.

        Whatever rhythm batches have, as tasks that take turns, measurements then meet every beat.
        """
        now, then = ((self._measured + ahead) * _GOLDEN for ahead in (0, 1))
        return max(1, self._every - math.floor(then) + math.floor(now))

    @property
    def _measured(self) -> int:
        return sum(self._counts.values()) - self._counts[Reason.HELD]

    def _note_blindness(self, points: Points) -> None:
        """Warns once of a loss that was computed before the closure was called."""
        if self._sees:
            warnings.warn(
                f"the closure returned {points.centre:.6g} wherever the parameters were, although "
                f"the gradient tells a change of {points.slope * points.radius:.3g}; compute the "
                "loss in the closure, from the optimizer's parameters, and not before step()",
                stacklevel=6,
            )
        self._sees = False

    def _audit(self, given: float, repeated: float, points: Points, own: bool) -> None:
        """Warns once of a closure that returns two losses at the same parameters."""
        apart = min(100.0 * points.resolution, 0.05) * max(abs(given), abs(repeated))
        if not abs(given - repeated) > apart:
            return
        self._audits = False
        warnings.warn(
            f"the closure returned {given:.6g} and then {repeated:.6g} at the same parameters and "
            "under the same random state, so the measured rates are noise; draw batches, and "
            "numbers from generators of your own, before step() and not in the closure"
            if own
            else f"loss is {given:.6g}, but at the same parameters the closure returned "
            f"{repeated:.6g}; give as loss what the closure returns: the same batch, unscaled, "
            "drawn before step() and not in the closure",
            stacklevel=6,
        )

    def _resolution(self, kind: torch.dtype) -> float:
        """The relative rounding error of a loss, whatever type it was cast to in the end."""
        types = {param.dtype for param in self._parameters()} | self._surroundings.autocast
        # Frozen parameters may be quantised to integers.
        inexact = [dtype for dtype in types if dtype.is_floating_point or dtype.is_complex]
        computed = max(torch.finfo(dtype).eps for dtype in inexact)
        return max(torch.finfo(kind).eps, CANCELLING * computed)

    def _move(self, line: Line, decision: Decision) -> None:
        """Moves the parameters from where the line starts and puts the new rate in force."""
        if self._averaging is None:
            line.move(decision.step)
        else:
            line.restore()
            if decision.reason is not Reason.NON_FINITE:
                self._averaging.adapt(
                    self._search.quiet, self._moves, self._parameters(), self.state
                )
            if decision.step:
                self._moves += 1
                weight = self._averaging.weight(self._moves)
                self._averaging.move(line.blocks, self.state, decision.step, weight)
        old = self.rate
        for group in self.param_groups:
            rate = decision.rate * (float(group["lr"]) / old if old else 1.0)
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def _finish(self, loss: Tensor, decision: Decision, own: int, probes: int = 0) -> Tensor:
        """Books the step and sets when to measure next: at once until the rate has settled."""
        if decision.reason is not Reason.HELD:
            self._path.clear()
            self._wait = self._interval - 1 if decision.settled else 0
        elif self._wait and decision.step:
            # A measurement that is due stays so, and a step that moves nothing brings none nearer.
            self._wait -= 1
        backwards = own + (probes if self._closure_runs_backward else 0)
        if self._path.maxlen:
            self._path.append(_reading(loss))
        self._counts[decision.reason] += 1
        self._last = (loss, decision.reason, own + probes, backwards)
        self._left = self.rate
        return loss


_PICKLED = frozenset(
    (
        "_audits",
        "_averaging",
        "_closure_runs_backward",
        "_counts",
        "_differentiates",
        "_direction",
        "_every",
        "_last",
        "_left",
        "_meddled",
        "_moves",
        "_path",
        "_process_group",
        "_search",
        "_sees",
        "_training",
        "_wait",
    )
)


def _scalar(loss: Tensor) -> Tensor:
    """A loss without history or dimensions, whole on every process."""
    return whole(loss.detach()).reshape(())


def _reading(loss: Tensor) -> Tensor | float:
    """What a loss is now: a number, or a copy of it where reading means waiting."""
    return float(whole(loss.detach())) if at_hand(loss) else _scalar(loss).clone()


def _sizes(grads: list[Tensor]) -> list[float]:
    """Numbers that are all zero where all gradients are, and not all finite where they are not."""
    norms = [float(norm) for norm in torch._foreach_norm(grads)] if grads else []
    if all(map(math.isfinite, norms)) and any(norms):
        return norms
    # Norms overflow, and vanish, where gradients do not yet; extremes take longer.
    return [float(extreme) for grad in grads for extreme in torch.aminmax(grad)]


def _check_base(
    base: Optimizer,
    direction: str | None,
    delta0: float | None,
    weight_decay: float | None,
) -> None:
    if isinstance(base, LQA | torch.optim.LBFGS):
        raise TypeError(
            f"LQA cannot wrap {type(base).__name__}, which searches its own line; "
            "pass the parameters, or an optimizer that takes plain steps"
        )
    for group in base.param_groups:
        if "lr" not in group:
            raise ValueError(
                f"{type(base).__name__} has no lr in its param groups, so there is no rate to "
                "measure; use an optimizer whose steps are in proportion to lr"
            )
        if group.get("maximize"):
            raise ValueError(
                "LQA goes where the loss falls, got a wrapped optimizer with maximize=True; "
                "leave it out and return the negative objective from the closure"
            )
    if direction is not None:
        raise ValueError(
            f"direction is the wrapped optimizer's own step, got direction={direction!r}; "
            "leave it out, or pass parameters instead of an optimizer"
        )
    if delta0 is not None:
        raise ValueError(
            f"delta0 is the wrapped optimizer's own lr, got delta0={delta0!r}; "
            f"set it there: {type(base).__name__}(params, lr={delta0!r})"
        )
    if weight_decay:
        raise ValueError(
            f"weight_decay is the wrapped optimizer's own, got weight_decay={weight_decay!r}; "
            f"set it there: {type(base).__name__}(params, weight_decay={weight_decay!r})"
        )


def _check_every(value: Any) -> None:
    whole = isinstance(value, Integral) or (isinstance(value, float) and value.is_integer())
    if not (whole and int(value) >= 1):
        raise ValueError(f"every must be a whole number of steps, at least 1, got {value!r}")


def _number(value: Any) -> float:
    """The value of any real number; not a number for anything else, flags included."""
    return float(value) if not isinstance(value, bool) and isinstance(value, Real) else math.nan


def _check_delta0(value: Any) -> None:
    if not 0.0 < _number(value) < math.inf:
        raise ValueError(
            f"delta0 must be a positive finite number, got {value!r}; "
            "it is only the first rate, a small one such as 1e-4 is safe"
        )


def _check_weight_decay(value: Any, direction: Direction) -> None:
    if not 0.0 <= _number(value) < math.inf:
        raise ValueError(
            f"weight_decay must be a finite number, not negative, got {value!r}; "
            "0.01 is common, 0 turns it off"
        )
    if value and not isinstance(direction, NormalisedGradient):
        raise ValueError(
            f'weight_decay goes with direction="rms", got weight_decay={value!r} along "sgd"; '
            f"wrap an optimizer that has it: LQA(torch.optim.SGD(params, weight_decay={value!r}))"
        )


def _check_loss(loss: Any, name: str) -> None:
    source = "closure must return the loss" if name == "closure" else "loss must be given"
    if not isinstance(loss, Tensor):
        raise TypeError(
            f"{source} as a scalar tensor, got {type(loss).__name__}; "
            "use the loss itself, not loss.item(), a tuple or None"
        )
    if loss.numel() != 1:
        raise ValueError(
            f"{source} as a scalar tensor, got shape {tuple(loss.shape)}; "
            "reduce it, for example with .mean()"
        )
    if not loss.is_floating_point():
        raise TypeError(f"{source} as a real floating-point tensor, got {loss.dtype}")


def _saved(state_dict: dict[str, Any]) -> dict[str, Any]:
    """The part of a state dict that is LQA's own."""
    groups: list[dict[str, Any]] = state_dict.get("param_groups", [])
    saved: dict[str, Any] | None = groups[0].get("lqa") if groups else None
    if saved is None:
        raise ValueError(
            "state_dict was not saved by LQA: its first param group has no entry 'lqa'; "
            "load it into the optimizer that saved it"
        )
    if saved["version"] > STATE_VERSION:
        raise ValueError(
            f"state_dict has version {saved['version']}, newer than {STATE_VERSION}, the newest "
            "that this quadstep reads; load it with the quadstep that saved it, or a newer one"
        )
    while saved["version"] < STATE_VERSION:
        saved = UPGRADES[saved["version"]](saved)
    return saved
