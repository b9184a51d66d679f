"""LQA: a torch optimizer that measures its learning rate.

`LQA.step` is the map of the package: gradient pass, direction, probes on the line, parabola,
safeguarded rate, update.
"""

# torch.optim itself is built from the foreach operations, private in name alone.
# pyright: reportPrivateUsage=false, reportPrivateImportUsage=false

from __future__ import annotations

import copy
import math
import re
import sysconfig
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from torch import Tensor
from torch.optim import Optimizer

from quadstep import arguments, gradients
from quadstep.averaging import ScheduleFree
from quadstep.diagnostics import Diagnostics
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
    Decision,
    Evidence,
    Exact,
    Ledger,
    Points,
    Reason,
    Safeguarded,
    WaryLedger,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

STATE_VERSION = 4

_RATE = "measured_lr"
"""The entry of a param group that keeps its rate, whatever others write into its lr."""

AUDIT = 100
"""The first measurement in so many steps evaluates the loss twice at the same parameters."""

OUT_OF_MEMORY, RETRY = 3, 10
"""After so many measurements in a row that ran out of memory, training goes on without one, and
measures again after so many steps."""

PATH = 100
"""Of the losses between two measurements so many are kept, the last."""

_GOLDEN = (3.0 - math.sqrt(5.0)) / 2.0

EQUAL, ALIKE, LOOKED_FOR = 0.999, 0.1, 100
"""The cosines to the closure's own gradient from which one that was in place counts as the same,
and, if it was clipped, scaled or accumulated, as one of the same loss; and in how many steps that
is looked for."""

STUCK = 3
"""After so many measurements in a row without a step or a vertex the closure is audited."""

_MISSES_GRADIENTS = re.compile("require.*grad")
"""What torch's errors say of closures that cannot do without autograd."""

_RAN_BACKWARD = "backward through the graph a second time"
"""What the error says where the graph of a loss is gone."""

_NO_MEMORY = re.compile("out of memory|not enough memory|can't allocate memory|_ALLOC_FAILED")
"""What the errors say where memory has run out."""

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


_NOTHING: tuple[Tensor | None, Reason, int, int] = (None, Reason.INITIAL, 0, 0)
"""What there is to report before a step."""


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
        lr: None, for frameworks that pass one to every optimizer: there is none to choose.

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
        lr: None = None,
    ) -> None:
        arguments.check_lr(lr)
        arguments.check_params(params)
        base: Optimizer | None = params if isinstance(params, Optimizer) else None
        if isinstance(base, LQA | torch.optim.LBFGS):
            raise TypeError(
                f"LQA cannot wrap {type(base).__name__}, which searches its own line; "
                "pass the parameters, or an optimizer that takes plain steps"
            )
        if base is not None:
            given = {"direction": direction, "delta0": delta0, "weight_decay": weight_decay}
            arguments.check_base(base, given)
        arguments.check_direction(direction)
        arguments.check_averaging(averaging)
        greedy = base is None and direction != "sgd"
        averaged = averaging == "schedule-free" or (averaging == "auto" and greedy)
        if every is not None:
            arguments.check_every(every)
        if delta0 is None:
            delta0 = 1e-4 if greedy else 0.1
        arguments.check_delta0(delta0)
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
        self._training = True
        self._closure_runs_backward = False
        self._probes_with_gradients = False
        # The number of the last steps whose first measurement was audited.
        self._audited = -1
        # In a row: measurements without a step or a vertex, and those that ran out of memory.
        self._stuck = 0
        self._out_of_memory = 0
        # Steps that found gradients in place that may have been dropped by mistake.
        self._found_gradients = 0
        self._counts: Counter[Reason] = Counter()
        self._last = _NOTHING
        self._diagnostics = Diagnostics()
        self._surroundings = Surroundings()
        self._reached: set[int] = set()
        groups: Any = params if base is None else base.param_groups
        own = {"lr": float(delta0), "weight_decay": weight_decay}
        super().__init__(groups, own if base is None else base.defaults)
        self._share()

    @classmethod
    def paper(
        cls,
        params: Any,
        delta0: float = 0.1,
        *,
        process_group: ProcessGroup | None = None,
        lr: None = None,
    ) -> Self:
        """Algorithm 1 to the letter: gradient direction, two probes a step, no safeguards.

        The rate is the vertex of the parabola, negative or huge as it may be. Where the printed
        algorithm divides by zero or overflows, the report says `non_finite`, the parameters stay
        and the last finite rate remains the probe radius.

        Args:
            params: parameters or param groups.
            delta0: initial (small) learning rate, the first probe radius.
            process_group: the processes that train together, by default all.
            lr: None, as in the constructor.
        """
        arguments.check_lr(lr)
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
        """The rate in force: that of the first group that has one other than zero."""
        rates = (group.get(_RATE, 0.0) for group in self.param_groups)
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

    # Within a compiled train step it runs as it is; models and losses that are compiled stay so.
    @torch._disable_dynamo
    @torch.no_grad()
    def step(self, closure: Closure | None = None, *, loss: Tensor | None = None) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Takes one step; where all gradients are zero only a wrapped optimizer moves anything.

        Args:
            closure: runs the model forward on this step's batch and returns the loss, a scalar
                tensor. It is called with gradients enabled once, and twice more without where the
                step measures, or once where the slope of the gradient fits to the losses. The first
                measurement in a hundred steps takes one more call, to see that it returns the same
                loss at the same parameters. What counts calls, as a metric does, belongs outside of
                it and takes the output of the first call.
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
        self._reclaim_rates()
        rate, due, line = self.rate, self._wait == 0, None
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
            if self._averaging is not None:
                self._averaging.follow(self.state, look=due)
            keep = due or self._averaging is not None
            line = self._direction.line(self.param_groups, self.state, rate, keep)
            measured = self._measure(closure, loss, centre, line, before) if due else None
            if measured is None:
                decision = Decision(rate, rate, Reason.HELD)
            else:
                points, probes = measured
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
            gradients.mark_used(self._gradients())
        return self._finish(centre, decision, own, probes)

    @torch.no_grad()
    def preview(self, closure: Closure) -> Preview:
        """Measures the line of the step that `step(closure)` would take, and moves nothing."""
        params = self._parameters()
        before = self._surroundings.capture(self._devices())
        grads = [param.grad for param in params]
        same = {id(param): param for param in params}
        twin = _Still(copy.deepcopy(self.__getstate__(), dict(same)))
        try:
            with self._surroundings.discovering(before, self._devices):
                twin.step(closure)
        finally:
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad
            before.restore()
        return Preview(twin.stride, twin.line, closure, before)

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
        self._reclaim_rates()
        state = super().state_dict()
        left: dict[str, Any] = {}
        if self._averaging is not None:
            left = self._averaging.saved(self._parameters(), state["state"])
        state["param_groups"] = arguments.with_python_numbers(state["param_groups"])
        state["param_groups"][0]["lqa"] = {
            "version": STATE_VERSION,
            "configuration": self.configuration,
            "search": asdict(self._search),
            "wait": self._wait,
            "moves": self._moves,
            "audited": self._audited,
            # As long as a fresh optimizer's, for the same reason as all counts below.
            "path": [*map(float, self._path), *(None for _ in range(self._missing))] or [None],
            "stretch": 1.0 if self._averaging is None else self._averaging.stretch,
            "training": self._training,
            "probes_with_gradients": self._probes_with_gradients,
            # All reasons: distributed checkpoints load the keys that a fresh optimizer has.
            "counts": {reason.value: self._counts[reason] for reason in Reason},
        } | left
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
        self._audited = saved["audited"]
        self._path.clear()
        self._path.extend(loss for loss in saved["path"] if loss is not None)
        if self._averaging is not None:
            self._averaging.stretch = saved["stretch"]
            self._averaging.loaded(self._parameters(), self.state, saved)
        self._training = saved["training"]
        self._probes_with_gradients = saved["probes_with_gradients"]
        self._last = _NOTHING
        self._counts = +Counter({Reason(key): count for key, count in saved["counts"].items()})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group; without an `lr` of its own it gets the rate in force."""
        if not isinstance(self._direction, Displacement):
            for name in ("lr", "weight_decay"):
                if param_group.get(name, 0.0) is None:
                    del param_group[name]
            decay = param_group.get("weight_decay", self.defaults["weight_decay"])
            decays = isinstance(self._direction, NormalisedGradient)
            arguments.check_group(param_group | {"weight_decay": decay}, decays)
        if self._counts:
            param_group.setdefault("lr", self.rate)
        if self._counts and isinstance(self._direction, Displacement):
            self._direction.base.add_param_group(param_group)
        else:
            super().add_param_group(param_group)
        param_group[_RATE] = float(param_group["lr"])
        # What earlier backward passes have left there was not of a step of theirs.
        gradients.mark_used(gradients.of(param_group["params"]))
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

    def _reclaim_rates(self) -> None:
        """Sets the rates back that others have written since the last step, and warns once."""
        for group in self.param_groups:
            written = arguments.rate(group["lr"])
            rate = group.setdefault(_RATE, written)
            if written != rate:
                self._diagnostics.warn(
                    "lr",
                    f"lr was set to {group['lr']!r} from outside, as a learning-rate scheduler "
                    f"does, and is ignored: LQA measures the rate, which stays at {rate:.3g}; "
                    "leave the scheduler out",
                )
                _set_lr(group, rate)

    def _parameters(self) -> list[Tensor]:
        return [param for group in self.param_groups for param in group["params"]]

    def _gradients(self) -> list[Tensor]:
        return gradients.of(self._parameters())

    def _devices(self) -> set[torch.device]:
        return {param.device for param in self._parameters()}

    def _only_asks_for_state(self, closure: Any) -> bool:
        """Whether this is `torch.distributed.checkpoint`, which steps a fresh optimizer in vain.

        At a rate of zero, with gradients of zero: it wants the state of every parameter to be
        there, to load a checkpoint into it.
        """
        rates = (arguments.rate(group["lr"]) for group in self.param_groups)
        if closure is not None or self.state or any(rates):
            return False
        grads = self._gradients()
        return bool(grads) and all(map(gradients.is_zero, grads))

    def _make_state(self) -> Tensor:
        """Makes the state of the parameters that have gradients, as no step had been taken."""
        line = self._direction.line(self.param_groups, self.state, 0.0, self._averaging is not None)
        if self._averaging is not None:
            self._averaging.move(line.blocks, self.state, 0.0, 1.0)
            if not self._training:
                self._averaging.average(self._parameters(), self.state)
        for state in self.state.values():
            if "step" in state:
                state["step"] *= 0
        return torch.zeros(())

    def _check_call(self, closure: Closure | None, loss: Any) -> Closure:
        if not callable(closure):
            raise TypeError(
                f"step() needs a closure that returns the loss, got {type(closure).__name__}; "
                "call it as opt.step(lambda: loss_fn(model(x), y)), which runs backward itself, or "
                "after loss.backward() as opt.step(closure, loss=loss)"
            )
        if loss is not None:
            arguments.check_loss(loss, "loss")
        if not self._training:
            raise RuntimeError(
                "step() was called while the parameters hold the averaged weights; "
                "call opt.train() first"
            )
        return closure

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
        params = self._parameters()
        found = gradients.new(params)
        changed = all(map(gradients.is_changed, found.values()))
        if found:
            gradients.mark_used(found.values())
        else:
            gradients.clear(params)
        with torch.enable_grad(), self._surroundings.discovering(before, self._devices):
            loss = closure()
        arguments.check_loss(loss, "closure")
        if self._has_run_backward(found):
            self._note_backward_in_closure(closure)
        elif not loss.requires_grad:
            raise RuntimeError(
                "the loss that closure returned does not require grad; compute it from the "
                "optimizer's parameters, without torch.no_grad(), .detach() or .item()"
            )
        else:
            zeros = gradients.new(params)
            gradients.clear(params)
            try:
                torch.autograd.backward(loss)
            except RuntimeError as error:
                if not zeros or _RAN_BACKWARD not in str(error):
                    raise
                # The closure has run backward after all, over a loss without a slope.
                for param, gradient in zeros.items():
                    param.grad = gradient
                self._note_backward_in_closure(closure)
            self._suspect_dropped_gradients(found, changed)
        return loss

    def _has_run_backward(self, found: dict[Tensor, Tensor]) -> bool:
        """Whether the closure has: a gradient is there that was not, or has changed.

        Gradients that are zero now have been cleared, unless the closure is known to run backward.

        Args:
            found: the gradients that were in place before; if there were none all had been cleared.
        """
        params = self._parameters()
        if not found and all(param.grad is None for param in params):
            return False
        new = gradients.new(params).values()
        return any(self._closure_runs_backward or not gradients.is_zero(each) for each in new)

    def _note_backward_in_closure(self, closure: Closure) -> None:
        self._closure_runs_backward = True
        if not _is_of_a_library(closure):
            self._diagnostics.warn(
                "backward",
                "the closure calls backward() itself, so each probe pays for a backward pass; "
                "return the loss alone, LQA runs backward",
            )

    def _suspect_dropped_gradients(self, found: dict[Tensor, Tensor], changed: bool) -> None:
        """Warns once of a backward pass before `step`, whose gradients the closure's replace.

        Those of another loss, as that of a generator leaves in its discriminator, lie near the
        closure's own often enough; but nobody clips them.

        Args:
            found: the gradients that were in place before.
            changed: whether they had been clipped, scaled or accumulated.
        """
        if not found or self._found_gradients == LOOKED_FOR:
            return
        self._found_gradients += 1
        again = {param: param.grad for param in found if param.grad is not None}
        pairs = [found[param] for param in again], again.values()
        if gradients.cosine(*pairs) > (ALIKE if changed else EQUAL):
            self._diagnostics.warn(
                "dropped",
                "gradients were in place when step(closure) was called, and the closure's own took "
                "their place: what was clipped, scaled or accumulated is lost; give the loss that "
                "backward was called on, step(closure, loss=loss), or leave that backward out",
            )

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
    ) -> tuple[Points, int] | None:
        """Probes the line; the generators, buffers and gradients stay as the gradient pass left.

        Where the loss repeats itself with gradients alone, probes run with gradients from then on.

        Returns:
            What was measured, and how many evaluations it took; None where memory has run out in
            several measurements in a row, so that training goes on without.
        """
        try:
            points, probes, repeats = self._probe(closure, loss, centre, line, before)
            if repeats is not None and not self._has_gradients_in_probes:
                points, more, repeats = self._probe(closure, loss, centre, line, before, True)
                self._probes_with_gradients = repeats is None
                probes += more
        except Exception as error:
            if not self._goes_on_without_memory(error):
                raise
            return None
        self._out_of_memory = 0
        self._audited = self._steps // AUDIT
        if repeats is not None:
            self._note_unrepeatable(*repeats, loss is None)
        return points, probes

    @property
    def _has_gradients_in_probes(self) -> bool:
        return self._closure_runs_backward or self._probes_with_gradients

    def _probe(
        self,
        closure: Closure,
        loss: Tensor | None,
        centre: Tensor,
        line: Line,
        before: Moment,
        with_gradients: bool = False,
    ) -> tuple[Points, int, tuple[float, float] | None]:
        """Measures once, see `_measure`.

        In the two-phase use the caller's forward pass drew random numbers of its own, so the
        centre is evaluated again under those of the probes.

        Returns:
            What was measured, how many evaluations it took, and the loss as it was and as it is at
            the same parameters where these should be equal and are not.
        """
        after = before
        if loss is None:
            # What the gradient pass did not draw from, the probes will not either.
            before, after = self._surroundings.capture(self._devices()).advanced(before)

        kinds: list[torch.dtype] = []

        def run(with_gradients: bool = with_gradients) -> Tensor:
            before.restore()
            torch.clear_autocast_cache()
            with (
                torch.set_grad_enabled(with_gradients or self._has_gradients_in_probes),
                self._surroundings.discovering(before, self._devices),
            ):
                probe = closure()
            arguments.check_loss(probe, "closure")
            return probe

        def evaluate() -> Tensor | float:
            try:
                probe = run()
            except Exception as error:
                if with_gradients or self._has_gradients_in_probes or not _misses_graph(error):
                    raise
                try:
                    probe = run(with_gradients=True)
                except Exception:
                    raise error from None
                # It takes derivatives itself, as the residual of a differential equation does.
                self._probes_with_gradients = True
            kinds.append(probe.dtype)
            return _reading(probe)

        radius = self._search.radius(self.rate)
        suspected = self._steps // AUDIT > self._audited or self._stuck == STUCK
        audited = suspected and "unrepeatable" not in self._diagnostics.given
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
        compared = _reading(centre) if audited and loss is not None else None
        extra = 0
        # Out of reach of a closure that clears or accumulates gradients.
        grads = [(param, param.grad) for param in self._parameters()]
        gradients.clear(self._parameters())
        try:
            losses = line.losses(evaluate, rates.values())
            if compared is not None:
                now = self._surroundings.capture(self._devices())
                drawn = [float(bool(now.advanced(before)[0].generators))]
                if any(rank_mean(drawn, centre, self._process_group)):
                    # The caller's forward pass drew other numbers than the probes.
                    compared, extra = _reading(run(with_gradients=True)), 1
        finally:
            for param, grad in grads:
                param.grad = grad
            if after is not before:
                after.buffers.extend(before.buffers[known:])
            after.restore()
        sent = {"centre": _reading(centre), **dict(zip(rates, losses, strict=True))}
        if slope is not None:
            sent["slope"] = slope
        if compared is not None:
            sent["compared"] = compared
        # As many on every process: one that took over the state of another may know fewer.
        path = [*self._path, *(math.nan for _ in range(self._missing))]
        # The one wait for the device.
        values = rank_mean([*sent.values(), *path], centre, self._process_group)
        seen = dict(zip(sent, values, strict=False))
        given, repeated = seen["centre"], seen.get("again", seen["centre"])
        expected = seen.get("compared", given)
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
        apart = min(100.0 * points.resolution, 0.05) * max(abs(expected), abs(repeated))
        repeats = not (audited and abs(expected - repeated) > apart)
        return points, len(rates) + extra, None if repeats else (expected, repeated)

    def _goes_on_without_memory(self, error: Exception) -> bool:
        """Whether to step at the rate in force; one process alone of several cannot decide so."""
        if not _is_out_of_memory(error) or processes(self._process_group) > 1:
            return False
        self._out_of_memory += 1
        if self._out_of_memory < OUT_OF_MEMORY:
            return False
        self._wait = max(self._every, RETRY)
        self._diagnostics.warn(
            "memory",
            f"the last {self._out_of_memory} measurements ran out of memory, so training goes on "
            f"at the rate in force, {self.rate:.3g}: a probe holds one more copy of the parameters "
            "and runs the model forward; make the batches smaller, or free memory before step()",
        )
        return True

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
    def _steps(self) -> int:
        return sum(self._counts.values())

    @property
    def _measured(self) -> int:
        return self._steps - self._counts[Reason.HELD]

    def _note_blindness(self, points: Points) -> None:
        """Warns once of a loss that was computed before the closure was called."""
        self._diagnostics.warn(
            "constant",
            f"the closure returned {points.centre:.6g} wherever the parameters were, although "
            f"the gradient tells a change of {points.slope * points.radius:.3g}; compute the "
            "loss in the closure, from the optimizer's parameters, and not before step()",
        )

    def _note_unrepeatable(self, given: float, repeated: float, own: bool) -> None:
        """Warns once of a closure that returns two losses at the same parameters."""
        self._diagnostics.warn(
            "unrepeatable",
            f"the closure returned {given:.6g} and then {repeated:.6g} at the same parameters and "
            "under the same random state, so the measured rates are noise; draw batches, and "
            "numbers from generators of your own, before step() and not in the closure"
            if own
            else f"loss is {given:.6g}, but at the same parameters the closure returned "
            f"{repeated:.6g}; give as loss what the closure returns: the same batch, unscaled, "
            "drawn before step() and not in the closure",
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
            self._averaging.leave(self.state)
        old = self.rate
        for group in self.param_groups:
            _set_lr(group, decision.rate * (group[_RATE] / old if old else 1.0))

    def _finish(self, loss: Tensor, decision: Decision, own: int, probes: int = 0) -> Tensor:
        """Books the step and sets when to measure next: at once until the rate has settled."""
        if decision.reason is not Reason.HELD:
            self._path.clear()
            self._wait = self._interval - 1 if decision.settled else 0
            found = decision.step and decision.reason is not Reason.CONCAVE
            self._stuck = 0 if found else self._stuck + 1
        elif self._wait and decision.step:
            # A measurement that is due stays so, and a step that moves nothing brings none nearer.
            self._wait -= 1
        backwards = own + (probes if self._closure_runs_backward else 0)
        if self._path.maxlen:
            self._path.append(_reading(loss))
        self._counts[decision.reason] += 1
        self._last = (loss, decision.reason, own + probes, backwards)
        return loss


class Preview:
    """The line of a step that has not been taken."""

    def __init__(self, rate: float, line: Line, closure: Closure, before: Moment) -> None:
        self.rate = rate
        self._line = line
        self._closure = closure
        self._before = before

    @torch.no_grad()
    def losses(self, rates: Iterable[float]) -> list[float]:
        """Evaluates the loss on the line."""

        def evaluate() -> float:
            self._before.restore()
            return float(self._closure())

        try:
            return self._line.losses(evaluate, rates)
        finally:
            self._before.restore()


class _Still(LQA):
    """LQA in a given state that stays where it is, and keeps the line and rate of its step."""

    def __init__(self, state: dict[str, Any]) -> None:
        self.__setstate__(state)
        self.line = Line([])
        self.stride = 0.0

    def _move(self, line: Line, decision: Decision) -> None:
        line.restore()
        self.line, self.stride = line, decision.step


_PICKLED = frozenset(
    (
        "_audited",
        "_averaging",
        "_closure_runs_backward",
        "_counts",
        "_diagnostics",
        "_direction",
        "_every",
        "_found_gradients",
        "_last",
        "_moves",
        "_out_of_memory",
        "_path",
        "_probes_with_gradients",
        "_process_group",
        "_search",
        "_stuck",
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


def _set_lr(group: dict[str, Any], rate: float) -> None:
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate
    # As a tensor of single precision has it.
    group[_RATE] = float(group["lr"])


def _is_out_of_memory(error: Exception) -> bool:
    """Whether memory has run out; of the CPU's only the message tells."""
    told = isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error)) is not None
    return told or isinstance(error, torch.OutOfMemoryError | MemoryError)


def _misses_graph(error: Exception) -> bool:
    """Whether a closure may have failed for want of a graph, which its own checks say otherwise."""
    told = isinstance(error, RuntimeError) and _MISSES_GRADIENTS.search(str(error)) is not None
    return told or isinstance(error, AssertionError | AttributeError | TypeError | ValueError)


def _is_of_a_library(closure: Any) -> bool:
    """Whether a closure is defined in an installed package, as those of frameworks are."""
    while isinstance(closure, partial):
        closure = closure.func
    plain: Any = getattr(closure, "__func__", closure)
    if not hasattr(plain, "__code__"):
        plain = type(closure).__call__
    file = getattr(getattr(plain, "__code__", None), "co_filename", "")
    return file.startswith(tuple(sysconfig.get_path(kind) for kind in ("purelib", "platlib")))


def _saved(state_dict: dict[str, Any]) -> dict[str, Any]:
    """The part of a state dict that is LQA's own."""
    groups: list[dict[str, Any]] = state_dict.get("param_groups", [])
    saved: dict[str, Any] | None = groups[0].get("lqa") if groups else None
    if saved is None:
        raise ValueError(
            "state_dict was not saved by LQA: its first param group has no entry 'lqa'; "
            "load it into the optimizer that saved it"
        )
    if saved.get("version") != STATE_VERSION:
        raise ValueError(
            f"state_dict has version {saved.get('version')}, and this quadstep reads version "
            f"{STATE_VERSION}; load it with the quadstep that saved it"
        )
    return saved
