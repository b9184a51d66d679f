"""LQA: a torch optimizer that measures its learning rate.

`LQA.step` is the data flow: gradient pass, direction, probes on the line, quadratic, rate, update.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from quadstep import arguments
from quadstep.averaging import PlainUpdate, ScheduleFree
from quadstep.checkpoint import TRAINING, is_state_request
from quadstep.closures import Closure, ClosureEvaluator
from quadstep.controllers import StepController, TrustRegionController, VertexController
from quadstep.directions import (
    Direction,
    Gradient,
    OptimizerStep,
    RMSNormalized,
    TensorNormalized,
)
from quadstep.gradients import gradients_of, mark_used
from quadstep.groups import Strategies
from quadstep.hooks import Function
from quadstep.measurement import StepSearch
from quadstep.modes import AveragedOptimizer
from quadstep.preview import Preview, restored
from quadstep.report import Report, flat_metrics
from quadstep.schedule import COUNTS, Schedule

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class LQA(AveragedOptimizer):
    """Trains without a learning rate: the rate is the minimizer of a measured parabola.

    Args:
        params: parameters or param groups; a module, which stands for its parameters and for
            `model`; or a `torch.optim` optimizer, whose steps are then the directions and whose
            learning rates are measured. The learning rates of several groups keep their ratios.
        direction: "rms", the gradient with each entry over its running root mean square, or
            "gradient", with each tensor over its own, which keeps half the state; both are
            centralized and clipped, see `quadstep.directions.Normalized`. By default "rms". A
            `quadstep.directions.Direction` is for experiments.
        averaging: "schedule-free" averages the iterates and shows the average in `eval()`; None
            keeps the last iterate. By default ("auto") schedule-free, but None around an optimizer.
        delta0: the first probe distance, a factor of the direction; rates are measured. By default
            1e-4; a wrapped optimizer brings its own learning rate.
        every: steps from one measurement to the next, or one less, by the golden section, so that
            measurements do not alias with periodic batches; the steps between reuse the last
            estimate. By default 10 with averaging and 1 without.
        weight_decay: decoupled as in AdamW, in units of the rate; groups may have their own. By
            default 0.01, but 0 along `quadstep.directions.Gradient`.
        state_dtype: `torch.bfloat16` or `torch.float32`, the type of the optimizer's own state (the
            mean squares, and the fast iterate of the averaging); by default that of each
            parameter. Writes in bfloat16 are rounded stochastically, so that small changes count
            on average; with averaging and a `state_dtype` those of parameters in bfloat16 are,
            too. Parameters in bfloat16 with `torch.float32` have a state that does not round, and
            directions in single precision. Loaded states are converted.
        restore: "copy" returns the parameters from a copy after probes; "subtract" moves them
            back, also bit for bit, with a copy of the entries alone that rounding would change: a
            few in a hundred, more where entries are smaller than a move. It takes longer, and what
            a closure itself does to the parameters in a probe is then not undone.
        process_group: the processes that train together, over which the measured losses are
            averaged. By default all processes; a group of one trains by itself.
        model: the module, or modules, whose calls in the loop return the loss, for loops that call
            `step()` without a closure: a scalar tensor, `.loss`, `["loss"]` or the first element
            of a tuple. On steps that measure its calls with gradients enabled are recorded, and
            repeated without gradients as probes.
        criterion: the loss module that the loop calls with the model's output, where the loss is
            not computed in the model.
        controller: the rule that makes a rate of the losses on the line, for experiments. By
            default a `TrustRegionController`.
        lr: None, for frameworks that pass one to every optimizer.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: an argument is out of range.

    Source: Zhu et al., CIKM 2020, section 3.2 and Algorithm 1; `TrustRegionController` and
    `ScheduleFree` go beyond it.

    Example:
        >>> opt = LQA(model.parameters())
        >>> loss = opt.step(lambda: loss_fn(model(x), y))

        Without a closure:

        >>> opt = LQA(model.parameters(), model=model, criterion=criterion)
        >>> criterion(model(x), y).backward()
        >>> opt.step()
    """

    def __init__(
        self,
        params: Any,
        *,
        direction: Literal["rms", "gradient"] | Direction | None = None,
        averaging: Literal["auto", "schedule-free"] | None = "auto",
        delta0: float | None = None,
        every: int | None = None,
        weight_decay: float | None = None,
        state_dtype: torch.dtype | None = None,
        restore: Literal["copy", "subtract"] = "copy",
        process_group: ProcessGroup | None = None,
        model: nn.Module | Iterable[nn.Module] | None = None,
        criterion: nn.Module | None = None,
        controller: StepController[Any] | None = None,
        lr: None = None,
    ) -> None:
        arguments.check_lr(lr)
        if isinstance(params, nn.Module):
            params, model = params.parameters(), params if model is None else model
        modules = arguments.check_modules(model, criterion)
        own = {"direction": direction, "delta0": delta0, "weight_decay": weight_decay}
        base = arguments.check_params(params, own, searching=(LQA, torch.optim.LBFGS))
        arguments.check_options(direction, averaging, every, delta0)
        arguments.check_controller(controller)
        averaged = averaging == "schedule-free" or (averaging == "auto" and base is None)
        has_state = averaged or (base is None and direction in (None, "rms"))
        arguments.check_memory(state_dtype, restore, has_state, base is not None)
        own_direction = _direction(direction, base, state_dtype)
        if every is None:
            every = 10 if averaged else 1
        if delta0 is None:
            delta0 = 1e-4
        if weight_decay is None:
            weight_decay = 0.01 if own_direction.has_weight_decay else 0.0
        strategies = Strategies(
            own_direction,
            controller or TrustRegionController(),
            ScheduleFree(state_dtype=state_dtype) if averaged else PlainUpdate(),
            Schedule(int(every), keeps_losses=averaged),
            process_group,
        )
        strategies.direction.keeps_start = restore == "copy"
        defaults = {"lr": float(delta0), "weight_decay": weight_decay}
        super().__init__(params, strategies, defaults, ClosureEvaluator(modules, criterion))
        if modules:
            arguments.check_ownership(self.param_groups, modules, criterion)

    @classmethod
    def paper(
        cls,
        params: Any,
        delta0: float = 0.1,
        *,
        process_group: ProcessGroup | None = None,
        model: nn.Module | Iterable[nn.Module] | None = None,
        criterion: nn.Module | None = None,
        lr: None = None,
    ) -> Self:
        """Algorithm 1 to the letter: gradient direction, two probes a step, no safeguards.

        The rate is the vertex of the parabola, negative or huge as it may be. Where the printed
        algorithm divides by zero or overflows, the report says `non_finite`, the parameters stay
        and the last finite rate remains the probe distance.

        Args:
            params: parameters, param groups or a module.
            delta0: the initial (small) learning rate, the first probe distance.
            process_group: the processes that train together, by default all.
            model: as in the constructor.
            criterion: as in the constructor.
            lr: None, as in the constructor.

        Example:
            >>> opt = LQA.paper(model.parameters(), delta0=0.1)
        """
        arguments.check_lr(lr)
        arguments.check_no_optimizer(params)
        return cls(
            params,
            direction=Gradient(),
            averaging=None,
            every=1,
            delta0=delta0,
            process_group=process_group,
            model=model,
            criterion=criterion,
            controller=VertexController(),
        )

    @property
    def report(self) -> Report:
        """The record of the last step; reading it waits for the device.

        Example:
            >>> print(opt.report.loss, opt.report.rate, opt.report.reason)
        """
        loss, reason, forwards, backwards = self._last
        quadratic = self.strategies.controller_state(self._scalars).quadratic
        return Report(
            loss=math.nan if loss is None else float(loss),
            slope=quadratic.slope,
            curvature=quadratic.curvature,
            rate=self.rate,
            reason=reason,
            forwards=forwards,
            backwards=backwards,
            counts={
                reason: self._scalars[key] for reason, key in COUNTS.items() if self._scalars[key]
            },
        )

    # Not traced by dynamo; compiled models and losses stay compiled.
    @torch._disable_dynamo
    @torch.no_grad()
    def step(self, closure: Closure | None = None, *, loss: Tensor | None = None) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Takes one step.

        If all gradients are zero, nothing moves unless an optimizer is wrapped.

        Args:
            closure: runs the model forward on this step's batch and returns the loss, a scalar
                tensor. It is called once with gradients enabled. A step that measures calls it once
                or twice more without, and the first measurement in a hundred steps once more, to
                check that it repeats the loss. Update metrics outside the closure. Without one, the
                caller has run `backward` on the loss of the `model`, whose calls are repeated.
            loss: for the two-phase use: the caller has run `loss.backward()` already, the
                gradients are taken as they are and the closure is only probed: three times where
                the step measures, and once or twice more where the random state that the caller's
                forward pass began with is not found. Must be what the closure returns at the same
                parameters.

        Returns:
            The loss before the step, detached.

        Raises:
            TypeError, ValueError, RuntimeError: the closure is missing or returns something other
                than a differentiable scalar loss, or no gradient arrived; nothing has moved then.

        Example:
            >>> loss = opt.step(lambda: loss_fn(model(x), y))

            Without a closure, where LQA was constructed with `model`:

            >>> model(x, y).loss.backward()
            >>> loss = opt.step()
        """
        self._adopt()
        if closure is None and is_state_request(self.param_groups, self.state):
            return self._initialize()
        search = self._search(closure, loss, is_preview=False)
        try:
            with ExitStack() as rollback:
                search.run(rollback)
                if search.line is not None:
                    self.strategies.update.apply(
                        search.line,
                        self.param_groups,
                        self.state,
                        search.decision.step,
                        search.determinism,
                    )
                    self._set_rates(search.decision.rate)
                rollback.pop_all()
        except BaseException:
            if not search.is_moved:
                # A second try finds the parameters restored.
                self._evaluator.recorder.accept_parameters()
            self._evaluator.tracker.look_again()
            raise
        finally:
            mark_used(gradients_of(search.params))
        self.strategies.schedule.record_step(self._scalars, search.decision, search.center)
        reason = search.decision.reason
        self._last = (search.center, reason, search.forwards, search.backwards)
        self._evaluator.recorder.is_two_phase = loss is not None
        self._prepare_recorder()
        self._evaluator.recorder.restart()
        return search.center

    def recorded(self, function: Function) -> Function:
        """Wraps a function that returns the loss, such that `step()` needs no closure.

        Its calls are recorded as those of the `model` are, where the loss is computed by code that
        is no module.

        Args:
            function: returns the loss as a `model` does, and calls the model itself or takes what
                the recorded `model` has returned. A method of a module belongs to it.

        Returns:
            The function, to be called in its place.

        Example:
            >>> loss_fn = opt.recorded(lambda x, y: cross_entropy(model(x).flatten(1), y))
            >>> loss_fn(x, y).backward()
            >>> opt.step()
        """
        return self._evaluator.recorder.recorded(function)

    @torch._disable_dynamo
    @torch.no_grad()
    def preview(self, closure: Closure) -> Preview:
        """Measures the line of the step that `step(closure)` would take, and moves nothing.

        The optimizer's parameters, their gradients, buffers, random state and the state of the
        optimizer stay as they are. The step hooks of a wrapped optimizer run.

        Args:
            closure: as in `step`.

        Returns:
            The line, with the rate of the step.

        Raises:
            TypeError, ValueError, RuntimeError: as `step`.

        Example:
            >>> line = opt.preview(lambda: loss_fn(model(x), y))
            >>> losses = line.losses([0.0, line.rate, 2.0 * line.rate])
        """
        self._adopt()
        base = self.strategies.direction.base
        recorder = self._evaluator.recorder
        with (
            restored(self.param_groups, self.state, base),
            recorder.paused(),
            ExitStack() as rollback,
        ):
            search = self._search(closure, None, is_preview=True)
            search.run(rollback)
        return Preview(search, recorder)

    def metrics(self) -> dict[str, float]:
        """Returns `report` as a flat dict of floats, for loggers; waits for the device once.

        The keys are the same at each call: "lqa/loss", "lqa/rate", "lqa/slope", "lqa/curvature",
        "lqa/forwards" and "lqa/backwards", "lqa/reason/minimum" and so on, the number of steps that
        ended for each reason, and, if there are several param groups, the rate of each,
        "lqa/rate_0", "lqa/rate_1". Values that are not finite are nan.

        Example:
            >>> for name, value in opt.metrics().items():
            ...     writer.add_scalar(name, value, step)
        """
        return flat_metrics(self.report, self.param_groups)

    def _search(self, closure: Any, loss: Any, is_preview: bool) -> StepSearch:
        """Checks the arguments of a step, and resets the rates."""
        has_record = self._evaluator.recorder.is_given and not is_preview
        arguments.check_call(closure, loss, self._scalars[TRAINING], has_record)
        self._reset_rates(warns=not is_preview)
        # What a preview learns of its closure is not known of later ones.
        evaluator = ClosureEvaluator(is_preview=True) if is_preview else self._evaluator
        own = (self.strategies, evaluator, self.param_groups, self.state)
        return StepSearch(*own, closure, loss, is_preview)


def _direction(name: Any, base: Optimizer | None, state_dtype: torch.dtype | None) -> Direction:
    if base is not None:
        return OptimizerStep(base)
    if name == "gradient":
        return TensorNormalized()
    return RMSNormalized(state_dtype=state_dtype) if name in (None, "rms") else name
