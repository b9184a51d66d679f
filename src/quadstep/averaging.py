"""How a step moves the parameters: along its line, or by schedule-free averaging."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from quadstep.arguments import check_state
from quadstep.changes import UNKNOWN, ChangeDetector
from quadstep.line import Line, ParamBlock
from quadstep.rounding import parts, single
from quadstep.tensors import Groups, parameters, real_views

State = MutableMapping[Any, dict[str, Any]]

UPDATES, MOMENTUM_SCALE = "lqa.updates", "lqa.momentum_scale"

WATCHED_STEPS = 100  # a copy is kept until the caller has left a parameter alone for so many
_CHECKPOINTED = {"y_checksum": UNKNOWN, "x_checksum": UNKNOWN, "unchanged_steps": WATCHED_STEPS}


class Update(Protocol):
    """How a step moves the parameters, and which weights evaluation shows.

    Methods take the param groups, the first of which holds the scalars, and the state of the
    parameters.
    """

    averages: ClassVar[bool]
    state_dtypes: Mapping[str, torch.dtype] = {}  # by key of the state, if not the parameter's

    def initial_scalars(self) -> dict[str, int | float]:
        """Returns what the first param group must hold."""
        return {}

    def initialize(self, blocks: list[ParamBlock], state: State) -> None:
        """Makes the state of parameters that have none."""

    def observe(self, groups: Groups, state: State, look: bool) -> None:
        """Applies the caller's changes of the parameters.

        With `look`, contents are compared, too, which waits for the device but also finds writes
        that leave the version unchanged.
        """

    def apply(
        self, line: Line, groups: Groups, state: State, step: float, determinism: float | None
    ) -> None:
        """Moves the parameters from the start of the line by a rate, which may be zero.

        `determinism` is 0 where losses are noisy, 1 where they are not; None if no loss was finite.
        """
        ...

    def show_average(self, groups: Groups, state: State) -> None:
        """Puts the averaged weights into the parameters."""

    def resume(self, groups: Groups, state: State) -> None:
        """Puts the weights back from which training continues."""

    def save(self, groups: Groups, packed: dict[Any, Any]) -> None:
        """Adds to the per-parameter state of a state dict; the live state is unchanged."""

    def load(self, groups: Groups, state: State) -> None:
        """Resumes from a loaded state; parameters may be loaded before or after it."""


class PlainUpdate(Update):
    """The step itself."""

    averages: ClassVar[bool] = False

    def apply(
        self, line: Line, groups: Groups, state: State, step: float, determinism: float | None
    ) -> None:
        """Moves along the line."""
        line.move(step)


@dataclass(eq=False)
class ScheduleFree(Update):
    """Schedule-free averaging (Defazio et al., "The Road Less Scheduled", 2024).

    z takes the steps, x is the average of the z, and gradients are taken at y = (1 - beta) z +
    beta x, which the parameters hold in training. Only z is stored; x follows from y and z. What
    the caller changes in y, as by clipping, masking or loading weights, z follows.

    Attributes:
        beta: weight of x in y.
        z_step_scale: step of z in units of the measured rate; y moves by a fraction of it.
        weight_power: the n-th z has a weight of about n to this power in x.
        max_momentum_scale: largest momentum scale. Where losses are deterministic, the step of z is
            multiplied by the scale, and the weight of z in y is divided by it.
        state_dtype: type of z; parameters in bfloat16 are then rounded stochastically, as z is.

    Example:
        >>> update = ScheduleFree(beta=0.9)
        >>> groups = [{"params": [param], **update.initial_scalars()}]
        >>> update.apply(line, groups, state, step=0.1, determinism=0.0)
        >>> update.show_average(groups, state)
    """

    averages: ClassVar[bool] = True
    beta: float = 0.9
    z_step_scale: float = 4.0
    weight_power: float = 3.0
    max_momentum_scale: float = 3.0
    state_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        self.state_dtypes = {} if self.state_dtype is None else {"z": self.state_dtype}
        # _y: parameters as the last step left them; _watched: those the caller changed lately.
        self._y, self._watched = ChangeDetector(), ChangeDetector(exact=True)
        self._x = ChangeDetector()
        self._frozen: set[Tensor] = set()
        self._look_next = False

    def initial_scalars(self) -> dict[str, int | float]:
        """The number of updates, and the momentum scale."""
        return {UPDATES: 0, MOMENTUM_SCALE: 1.0}

    def initialize(self, blocks: list[ParamBlock], state: State) -> None:
        """Starts z at y, and adds all keys, as distributed checkpoints load no new ones."""
        for block in blocks:
            for owner, param in zip(block.owners, block.params, strict=True):
                if "z" not in state[owner]:
                    z = param.to(self.state_dtype or param.dtype, copy=True)
                    state[owner] |= {"z": z} | _CHECKPOINTED
                    self._watched.remove(owner)
                    self._y.add(owner)

    def observe(self, groups: Groups, state: State, look: bool) -> None:
        """Shifts z with the changed entries of watched parameters; sets it to other changed y."""
        if self._watched:
            self._observe_watched(groups, state)
        frozen = {param for param in self._y if not param.requires_grad}
        if look or self._look_next or self._y.version_changed or frozen != self._frozen:
            _remove_stateless(self._y, state)
            changed = self._y.changed()
            for param in self._y:
                if param in changed or param in frozen - self._frozen:
                    y, z = _real(param), state[param]["z"]
                    check_state(y, z, self.state_dtype)
                    z.copy_(y)
            for param in self._y:
                if param in changed:
                    state[param]["unchanged_steps"] = 0
                    self._y.remove(param)
                    self._watched.add(param)
            self._watched.record()
            self._frozen, self._look_next = frozen, False

    def _observe_watched(self, groups: Groups, state: State) -> None:
        _remove_stateless(self._watched, state)
        for param in self._watched:
            # Every shape is checked before any z changes.
            check_state(_real(param), state[param]["z"], self.state_dtype)
        changed = self._watched.changed()
        for param in self._watched:
            state[param] |= self._followed(param, state[param], changed, groups)
            if state[param]["unchanged_steps"] == WATCHED_STEPS:
                self._watched.remove(param)
                self._y.add(param)
        # In case this step is undone and taken again.
        self._watched.record()

    def apply(
        self, line: Line, groups: Groups, state: State, step: float, determinism: float | None
    ) -> None:
        """Adapts the momentum scale, moves z, x and y, and records y."""
        line.restore()
        if determinism is not None:
            self._adapt(groups, state, determinism)
        if step:
            groups[0][UPDATES] += 1
            self._move(line.blocks, groups, state, step)
        self._watched.record()
        self._y.record()

    def show_average(self, groups: Groups, state: State) -> None:
        """Replaces y by x, but not where the caller has changed y: x may break a constraint."""
        beta = self._momentum(groups)
        changed = self._y.changed()
        self._look_next = bool(changed)
        self._x = ChangeDetector()
        for param, held, z in _iterates(groups, state):
            if param in self._y and param not in changed:
                state[param]["y"] = held.clone()
                _lerp(held, z, 1.0 - 1.0 / beta)
                self._x.add(param)
        self._x.record()

    def resume(self, groups: Groups, state: State) -> None:
        """Replaces x by y, but not where the caller has changed x."""
        beta = self._momentum(groups)
        changed = self._x.changed()
        self._look_next = self._look_next or bool(changed)
        for param, held, z in _iterates(groups, state):
            y = state[param].pop("y", None)
            if param in self._x and param not in changed:
                if y is not None:
                    held.copy_(y)
                elif self._y.checksum(param) == UNKNOWN:
                    # A distributed checkpoint has no y.
                    _lerp(held, z, 1.0 - beta)
        self._x = ChangeDetector()

    @torch.no_grad()
    def save(self, groups: Groups, packed: dict[Any, Any]) -> None:
        """Adds the checksums; z follows changes of y, since copies of y are not saved."""
        changed = self._watched.changed()
        for number, param in enumerate(parameters(groups)):
            own = packed.get(number, {})
            if "z" in own:
                if param in self._watched:
                    own = self._followed(param, own, changed, groups)
                    # The next step adds it again.
                    own["unchanged_steps"] -= 1
                checksums = {"y_checksum": self._y.checksum(param)}
                checksums["x_checksum"] = self._x.checksum(param)
                packed[number] = own | checksums

    def load(self, groups: Groups, state: State) -> None:
        """Watches the parameters that were watched, and compares others with the checksums."""
        self.__post_init__()
        self._look_next = True
        for param, *_ in _iterates(groups, state):
            own = state[param]
            if own["unchanged_steps"] < WATCHED_STEPS:
                self._watched.add(param)
            else:
                self._y.add(param, own["y_checksum"])
                self._x.add(param, own["x_checksum"])

    def _momentum(self, groups: Groups) -> float:
        """The weight of x in y at present."""
        return 1.0 - (1.0 - self.beta) / groups[0][MOMENTUM_SCALE]

    def _newest_weight(self, groups: Groups) -> float:
        """The weight of the newest z in x, in (0, 1]."""
        return (1.0 + self.weight_power) / (groups[0][UPDATES] + self.weight_power)

    def _adapt(self, groups: Groups, state: State, determinism: float) -> None:
        """Sets the momentum scale, bounded so that x pulls y by no more than one step.

        Momentum accumulates steps along a valley and cancels those across it. x is unchanged; y, or
        z if the scale falls, moves toward it.
        """
        bound = (1.0 - self.beta) / self._newest_weight(groups)
        scale = min(max(bound, 1.0), self.max_momentum_scale) ** determinism
        if scale == groups[0][MOMENTUM_SCALE]:
            return
        old = self._momentum(groups)
        groups[0][MOMENTUM_SCALE] = scale
        new = self._momentum(groups)
        toward_z, toward_y = 1.0 - new / old, 1.0 - new / (1.0 - new) * (1.0 - old) / old
        for number, (_, *pair) in enumerate(_iterates(groups, state)):
            target, source = pair if new > old else reversed(pair)
            stream = f"adapt {groups[0][UPDATES]}.{number}"
            for _, (targets, sources) in parts(self.state_dtype, stream, [target], [source]):
                targets[0].lerp_(sources[0], toward_z if new > old else toward_y)

    def _move(self, blocks: list[ParamBlock], groups: Groups, state: State, rate: float) -> None:
        """Moves z, x and y, written for z and y with s the step of z and c the weight of z in x.

        y <- (1 - c) y + c z - (1 - beta (1 - c)) s d, and z <- z - s d.
        """
        self.initialize(blocks, state)
        weight = self._newest_weight(groups)
        fraction = 1.0 - self._momentum(groups) * (1.0 - weight)
        stream = f"move {groups[0][UPDATES]}"
        for block in blocks:
            fast = [state[owner]["z"] for owner in block.owners]
            step = self.z_step_scale * groups[0][MOMENTUM_SCALE] * rate / block.lr_ratio
            iterates = block.params, fast, block.direction
            for _, (y, z, direction) in parts(self.state_dtype, stream, *iterates):
                torch._foreach_lerp_(y, z, weight)
                torch._foreach_add_(y, direction, alpha=-step * fraction)
                torch._foreach_add_(z, direction, alpha=-step)

    def _followed(
        self, param: Tensor, own: dict[str, Any], changed: set[Tensor], groups: Groups
    ) -> dict[str, Any]:
        """The state of a watched parameter after z has followed the change of y.

        z shifts by the change, and its distance from y shrinks by at most beta / (1 - beta) times
        the change. So a mask that undoes a step also undoes that of z, and a change that is small
        beside a step keeps the average.
        """
        if param not in changed:
            return own | {"unchanged_steps": own["unchanged_steps"] + 1}
        y, copy, beta = _real(param), _real(self._watched.copy(param)), self._momentum(groups)
        check_state(y, copy, None)
        change = y - copy
        bound = change.abs().mul_(beta / (1.0 - beta))
        shift = change.sub_(torch.clamp(own["z"] - copy, -bound, bound))
        z = own["z"].clone()
        stream = f"follow {groups[0][UPDATES]}"
        for _, (followed, shifts) in parts(self.state_dtype, stream, [z], [shift]):
            followed[0].add_(shifts[0])
        return own | {"z": z, "unchanged_steps": 0}


def _remove_stateless(detector: ChangeDetector, state: State) -> None:
    for param in detector:
        if "z" not in state.get(param, ()):
            detector.remove(param)


def _lerp(y: Tensor, z: Tensor, weight: float) -> None:
    dtype = single(y.dtype)
    y.copy_(y.to(dtype).lerp(z.to(dtype), weight))


def _real(tensor: Tensor) -> Tensor:
    return real_views([tensor])[0]


def _iterates(groups: Groups, state: State) -> Iterable[tuple[Tensor, Tensor, Tensor]]:
    """Each parameter that has moved, what it holds, and its z, both as real tensors."""
    moved = [param for param in parameters(groups) if "z" in state.get(param, ())]
    return zip(moved, real_views(moved), (state[param]["z"] for param in moved), strict=True)
