"""Param groups as the storage of all scalars: the rates, and the state of the strategies."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from quadstep import arguments, checkpoint
from quadstep.averaging import Update
from quadstep.checkpoint import CONTROLLER_STATE, RATE, TRAINING
from quadstep.closures import PROBES_WITH_GRADIENTS, ClosureEvaluator
from quadstep.controllers import Reason, StepController
from quadstep.diagnostics import makes_schedulers
from quadstep.directions import Direction
from quadstep.gradients import gradients_of, mark_used
from quadstep.schedule import WAIT, Schedule, steps_taken
from quadstep.tensors import Groups, parameters

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Strategies(NamedTuple):
    """What an optimizer is made of; none holds a scalar of the state."""

    direction: Direction
    controller: StepController[Any]
    update: Update
    schedule: Schedule
    process_group: ProcessGroup | None

    def initial_scalars(self) -> dict[str, Any]:
        """The scalars of the state before the first step."""
        return {
            checkpoint.VERSION: checkpoint.STATE_VERSION,
            checkpoint.DIRECTION: type(self.direction.base or self.direction).__name__,
            checkpoint.CONTROLLER: type(self.controller).__name__,
            checkpoint.UPDATE: type(self.update).__name__,
            TRAINING: True,
            checkpoint.DETERMINISM: 0.0,
            PROBES_WITH_GRADIENTS: False,
            **self.schedule.initial_scalars(),
            **self.update.initial_scalars(),
            **self.direction.initial_scalars(),
            **checkpoint.flatten(self.controller.state_type(), CONTROLLER_STATE),
        }

    @property
    def state_dtypes(self) -> dict[str, torch.dtype]:
        """The types of the state of a parameter that are not its own, by key."""
        return {**self.direction.state_dtypes, **self.update.state_dtypes}

    def controller_state(self, scalars: dict[str, Any]) -> Any:
        """The state of the controller, read from the scalars."""
        return checkpoint.unflatten(self.controller.state_type, scalars, CONTROLLER_STATE)


def rate_in_force(groups: Groups) -> float:
    """The rate of the first group that has one other than zero; of a new group that is its lr."""
    rates = (group[RATE] if RATE in group else arguments.rate(group["lr"]) for group in groups)
    return next((rate for rate in rates if rate != 0.0), 0.0)


_NO_STEP = (None, Reason.INITIAL, 0, 0)  # loss, reason, forward and backward passes


class GroupOptimizer(Optimizer):
    """A torch optimizer whose groups and state are its own or those of a wrapped optimizer.

    The first param group holds the scalars of the state as flat keys, and each group its rate, so
    pickle, deepcopy, `state_dict` and `torch.distributed.checkpoint` need no lists of them.

    Args:
        params: parameters, param groups, or the optimizer that the strategies wrap.
        strategies: what the optimizer is made of.
        defaults: of the param groups, for parameters.
        evaluator: evaluates the loss.
    """

    def __init__(
        self,
        params: Any,
        strategies: Strategies,
        defaults: dict[str, Any],
        evaluator: ClosureEvaluator,
    ) -> None:
        base = strategies.direction.base
        self.strategies = strategies
        self._evaluator = evaluator
        self._scalars: dict[str, Any] = {}
        self._last: tuple[Tensor | None, Reason, int, int] = _NO_STEP
        groups: Any = params if base is None else base.param_groups
        super().__init__(groups, defaults if base is None else base.defaults)
        for group in self.param_groups:
            # A wrapped optimizer, or a list of groups, may have served another LQA before.
            checkpoint.clear_scalars(group)
        self._scalars = strategies.initial_scalars()
        self._adopt()
        self._prepare_recorder()

    @property
    def rate(self) -> float:
        """The rate in force: that of the first group that has one other than zero.

        Example:
            >>> print(opt.rate)
        """
        return rate_in_force(self.param_groups)

    def state_dict(self) -> dict[str, Any]:
        """Returns the state as torch's optimizers do; its scalars are keys of the first group.

        Example:
            >>> torch.save(opt.state_dict(), "optimizer.pt")
        """
        self._adopt()
        self._reset_rates()
        state_dict = super().state_dict()
        self.strategies.update.save(self.param_groups, state_dict["state"])
        self.strategies.schedule.save(state_dict["param_groups"][0])
        state_dict["param_groups"] = checkpoint.to_python_numbers(state_dict["param_groups"])
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores a state; training continues bit for bit as it would have where it was saved.

        Raises:
            ValueError: the state was saved by another optimizer, version or configuration.

        Example:
            >>> opt.load_state_dict(torch.load("optimizer.pt"))
        """
        self._adopt()
        checkpoint.check(state_dict, self._scalars)
        super().load_state_dict(state_dict)
        # Torch has cast it to the types of the parameters.
        dtypes = self.strategies.state_dtypes
        ids = parameters(state_dict["param_groups"]) if dtypes else ()
        for number, param in zip(ids, parameters(self.param_groups), strict=False):
            saved = state_dict["state"].get(number, {})
            for key in dtypes.keys() & saved.keys():
                self.state[param][key] = saved[key].to(param.device, dtypes[key])
        if (base := self.strategies.direction.base) is not None:
            base.__setstate__({"state": self.state, "param_groups": self.param_groups})
        self._adopt()
        self.strategies.update.load(self.param_groups, self.state)
        self._last = _NO_STEP
        self._prepare_recorder()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group; without an `lr` it gets the rate in force.

        Example:
            >>> opt.add_param_group({"params": head.parameters(), "weight_decay": 0.1})
        """
        direction, has_started = self.strategies.direction, steps_taken(self._scalars) > 0
        if direction.base is None:
            arguments.check_group(param_group, self.defaults, direction.has_weight_decay)
        if has_started:
            param_group.setdefault("lr", self.rate)
        if has_started and direction.base is not None:
            direction.base.add_param_group(param_group)
        else:
            super().add_param_group(param_group)
        param_group[RATE] = float(param_group["lr"])
        # Gradients of earlier backward passes were not computed for this optimizer.
        mark_used(gradients_of(param_group["params"]))
        # Its modules may be ones that no closure has run yet.
        self._evaluator.tracker.look_again()
        if self._scalars:
            self._prepare_recorder()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients, as torch's optimizers do."""
        super().zero_grad(set_to_none)
        self._evaluator.recorder.note_zero_grad()

    def __getstate__(self) -> dict[str, Any]:
        parts = ("strategies", "_evaluator", "_scalars", "_last")
        return super().__getstate__() | {name: vars(self)[name] for name in parts}

    def __repr__(self) -> str:
        """As torch prints optimizers, without the scalars of the state."""
        lines = super().__repr__().splitlines()
        return "\n".join(line for line in lines if checkpoint.PREFIX not in line)

    def _adopt(self) -> None:
        """Takes over groups and state that a wrapped optimizer, or the caller, has replaced."""
        base = self.strategies.direction.base
        if base is not None and self.param_groups is not base.param_groups:
            self.param_groups = base.param_groups
        if base is not None and self.state is not base.state:
            self.state = base.state
        if self.param_groups:
            scalars = checkpoint.move_scalars(self._scalars, self.param_groups)
            # Wrappers that imitate the class keep for themselves what is assigned through them.
            if scalars is not self._scalars:
                self._scalars = scalars

    def _prepare_recorder(self) -> None:
        """Records the calls of the next step."""
        params = parameters(self.param_groups)
        self._evaluator.recorder.prepare(params, measures=self._scalars[WAIT] == 0)

    def _reset_rates(self, warns: bool = True) -> None:
        """Resets the rates that others have written since the last step, and warns once."""
        for group in self.param_groups:
            written = arguments.rate(group["lr"])
            rate = group.setdefault(RATE, written)
            if written != rate:
                if warns and not makes_schedulers():
                    self._evaluator.diagnostics.warn("lr", written=group["lr"], rate=rate)
                _set_lr(group, rate)

    def _set_rates(self, rate: float) -> None:
        """Puts a new rate in force, at which the groups keep their ratios."""
        old = self.rate
        for group in self.param_groups:
            _set_lr(group, rate * (group[RATE] / old if old else 1.0))

    def _initialize(self) -> Tensor:
        """Creates the state of the parameters that have gradients, as before any step."""
        update = self.strategies.update
        line = self.strategies.direction.line(self.param_groups, self.state, 0.0, update.averages)
        update.initialize(line.blocks, self.state)
        if not self._scalars[TRAINING]:
            update.show_average(self.param_groups, self.state)
        for entry in self.state.values():
            if "step" in entry:
                entry["step"] *= 0
        return torch.zeros(())


def _set_lr(group: dict[str, Any], rate: float) -> None:
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate
    # As a tensor of single precision holds it.
    group[RATE] = float(group["lr"])
