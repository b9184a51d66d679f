"""Schedule-free averaging: a greedy iterate, its average, and the point between them.

Defazio et al., "The Road Less Scheduled" (2024): the fast iterate z takes the steps, x is the
average of its path, and gradients are taken at y = (1 - beta) z + beta x. The parameters hold y
while training and x while evaluating; z is kept, and x follows from y and z, so that only one copy
of the parameters is stored, and one more, of y, while they hold x.

Callers change parameters between steps: they clip, mask and project them, restore rows, load other
weights. What they change is where training goes on from, so z follows. Which entries have changed
only a copy tells; it is kept of the parameters that have been changed, which are watched.
"""

# torch.optim itself is built from the foreach operations, private in name alone.
# pyright: reportPrivateUsage=false, reportPrivateImportUsage=false

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from quadstep.arguments import check_shape
from quadstep.direction import real
from quadstep.fingerprint import Fingerprints
from quadstep.line import Block, is_distributed, whole

WATCHED = 100
"""For so many steps after the last change a copy of a parameter is kept."""


class ScheduleFree:
    """The iterates of schedule-free averaging.

    Args:
        beta: weight of the average in the point where gradients are taken.
        kappa: how far the fast iterate steps, in units of the measured rate. The line is measured
            at y, which moves by a fraction of what z moves.
        power: the n-th iterate counts in the average with about the power of n, so that the average
            forgets where a long run began.
        furthest: how many times as far z steps at most, see `adapt`.

    Attributes:
        stretch: how many times as far z steps at present.

    State of a parameter: `z`; `y`, while it holds x; `left`, what the last step left in it, and
    `unchanged`, for how many steps it has been left so, where the caller has changed it.
    """

    def __init__(
        self, beta: float = 0.9, kappa: float = 4.0, power: float = 3.0, furthest: float = 3.0
    ) -> None:
        self.power = power
        self.stretch = 1.0
        # Of y as the last step left it, but of the watched ones, and of x while it is held.
        self._left = Fingerprints()
        # In one order on all processes.
        self._watched: dict[Tensor, None] = {}
        self._frozen: set[Tensor] = set()
        self._shown = Fingerprints()
        # Whether to look at all parameters at the next step.
        self._looks = False
        self._beta = beta
        self._kappa = kappa
        self._furthest = furthest

    @property
    def beta(self) -> float:
        """The weight of the average in y at present."""
        return 1.0 - (1.0 - self._beta) / self.stretch

    @property
    def kappa(self) -> float:
        """How far the fast iterate steps at present, in units of the measured rate."""
        return self._kappa * self.stretch

    def weight(self, moves: int) -> float:
        """The share of the newest iterate in the average of so many, in (0, 1]."""
        return (1.0 + self.power) / (moves + self.power)

    def move(self, blocks: list[Block], state: Any, rate: float, weight: float) -> None:
        """Moves z against the direction, x towards z, and y with both.

        Written for y and z alone, with `s = kappa * rate` and c the weight:
        `y <- (1 - c) y + c z - (1 - beta (1 - c)) s d` and `z <- z - s d`.

        Args:
            blocks: the parameters, at y, and their directions.
            state: the per-parameter state, where z lives.
            rate: the measured rate.
            weight: share of the new z in the average x, in (0, 1].
        """
        for block in blocks:
            fast: list[Tensor] = []
            for owner, param in zip(block.owners, block.params, strict=True):
                if "z" not in state[owner]:
                    state[owner]["z"] = param.clone()
                    self._left.add(owner)
                fast.append(state[owner]["z"])
            step = self.kappa * rate / block.unit
            torch._foreach_lerp_(block.params, fast, weight)
            torch._foreach_add_(
                block.params, block.direction, alpha=-step * (1.0 - self.beta * (1.0 - weight))
            )
            torch._foreach_add_(fast, block.direction, alpha=-step)

    def adapt(self, quiet: float, moves: int, params: list[Tensor], state: Any) -> None:
        """Lets z step further where the losses are free of noise.

        As many times less of it is then in y, which a step by itself moves no further. That is what
        more momentum is to gradient descent: along a valley the steps add up, across it they
        cancel. But the average draws y after z, too, and much so while it is young: no further than
        where that moves y by as much as a step itself. Where the weights change x stays, and moved
        is whichever of y and z comes nearer to it.

        Args:
            quiet: how free of noise the losses are, from 0 to 1.
            moves: how many steps there were.
            params: all parameters, at y.
            state: the per-parameter state, where z lives.
        """
        most = min(max((1.0 - self._beta) / self.weight(moves), 1.0), self._furthest)
        stretch = most**quiet
        if stretch == self.stretch:
            return
        before, self.stretch = self.beta, stretch
        if self.beta > before:
            self._towards_fast(params, state, 1.0 - self.beta / before)
            return
        left = self.beta / (1.0 - self.beta) * (1.0 - before) / before
        for held, fast in _pairs(params, state):
            fast.lerp_(held, 1.0 - left)

    def follow(self, state: Any, look: bool) -> None:
        """Lets z follow what the caller has changed in y since the last step.

        Args:
            state: the per-parameter state.
            look: whether to look at all parameters, which waits for their device, although the
                version of none has changed.
        """
        for param in [*self._watched]:
            if "left" in state.get(param, ()):
                self._shift(param, state[param])
            else:
                del self._watched[param]
        frozen = {param for param in self._left if not param.requires_grad}
        if look or self._looks or self._left.touched or frozen != self._frozen:
            self._take(state, frozen)
        self._looks = False

    def _shift(self, param: Tensor, own: Any) -> None:
        """Shifts z with the entries of y that have changed.

        An entry of z keeps as much of its lead over y as the change leaves: a change that takes
        back all that the last step moved y takes back all that it moved z, which is beta / (1 -
        beta) times as far from y; one that is small beside a step shifts z along.
        """
        shift = self._shift_of(param, own)
        own["unchanged"] = own["unchanged"] + 1 if shift is None else 0
        if shift is not None:
            own["z"].add_(shift)
            # For the case that this step is undone and taken again.
            own["left"].copy_(*real([param]))
        if own["unchanged"] == WATCHED:
            del own["left"], own["unchanged"], self._watched[param]
            self._left.add(param)

    def _shift_of(self, param: Tensor, own: Any) -> Tensor | None:
        """What z is to be shifted by; None where nothing has changed."""
        (held,) = real([param])
        if own["left"] is None:
            own["left"] = held.clone()
            return None
        check_shape(held, own["left"])
        if is_distributed(held):
            same = not whole((held != own["left"]).any())
        else:
            same = torch.equal(held, own["left"])
        if same:
            return None
        change = held - own["left"]
        bound = change.abs().mul_(self.beta / (1.0 - self.beta))
        lead = own["z"] - own["left"]
        return change.sub_(torch.clamp(lead, -bound, bound))

    def _take(self, state: Any, frozen: set[Tensor]) -> None:
        """Lets z take the values of parameters that have changed, or that were frozen.

        Which entries have changed is not known yet; the parameter is watched from now on.
        """
        changed = self._left.changed()
        for param in self._left:
            own = state.get(param, {})
            if "z" not in own:
                self._left.remove(param)
            elif param in changed or param in frozen - self._frozen:
                (held,) = real([param])
                check_shape(held, own["z"])
                own["z"].copy_(held)
                if param in changed:
                    self._left.remove(param)
                    own |= {"left": held.clone(), "unchanged": 0}
                    self._watched[param] = None
        self._frozen = frozen

    @torch.no_grad()
    def saved(self, params: list[Tensor], state: dict[Any, Any]) -> dict[str, Any]:
        """What is saved of the parameters as the last step left them.

        In the per-parameter state there is only what a fresh optimizer has, which is all that
        distributed checkpoints load: in place of what tells which entries were changed since, z
        is shifted by them.

        Args:
            params: all parameters, in the order that the keys of the state number them in.
            state: the per-parameter state as torch saves it, in which z is replaced.
        """
        unchanged: list[int | None] = [None] * len(params)
        for number, param in enumerate(params):
            if param in self._watched and "left" in state.get(number, ()):
                own = dict(state[number])
                shift = self._shift_of(param, own)
                # One less than the next step is to count.
                unchanged[number] = own.pop("unchanged") if shift is None else -1
                del own["left"]
                if shift is not None:
                    own["z"] = own["z"] + shift
                state[number] = own
        return {
            "bits": [self._left.bits(param) for param in params],
            "shown": [self._shown.bits(param) for param in params],
            "unchanged": unchanged,
        }

    def loaded(self, params: list[Tensor], state: Any, saved: dict[str, Any]) -> None:
        """Takes over what a loaded state tells of the parameters as the last step left them."""
        self._left, self._watched, self._frozen = Fingerprints(), {}, set()
        self._shown, self._looks = Fingerprints(), True
        rows = zip(params, saved["bits"], saved["shown"], saved["unchanged"], strict=True)
        for param, bits, shown, unchanged in rows:
            own = state.get(param, {})
            if "z" not in own:
                continue
            if unchanged is None:
                self._left.add(param, bits)
                self._shown.add(param, shown)
            else:
                # What it holds is not loaded yet, perhaps.
                own |= {"left": None, "unchanged": unchanged}
                self._watched[param] = None

    def leave(self, state: Any) -> None:
        """Records y as a step leaves it."""
        for param in self._watched:
            state[param]["left"].copy_(*real([param]))
        self._left.record()

    def average(self, params: list[Tensor], state: Any) -> None:
        """Replaces y by x in the parameters, but not in those that the caller changes.

        What a caller enforces after each step may not hold of x.
        """
        self._shown = Fingerprints()
        changed = self._left.changed()
        self._looks = bool(changed)
        for param in _moved(params, state):
            if param in self._left and param not in changed:
                own = state[param]
                (held,) = real([param])
                own["y"] = held.clone()
                held.lerp_(own["z"], 1.0 - 1.0 / self.beta)
                self._shown.add(param)
        self._shown.record()

    def resume(self, params: list[Tensor], state: Any) -> None:
        """Replaces x by y in the parameters, but not in those that the caller has changed."""
        changed = self._shown.changed()
        self._looks = self._looks or bool(changed)
        for param in _moved(params, state):
            own = state[param]
            y = own.pop("y", None)
            if param not in self._shown or param in changed:
                continue
            (held,) = real([param])
            if y is not None:
                held.copy_(y)
            elif self._left.bits(param) is None:
                # A distributed checkpoint keeps no more than a fresh optimizer has.
                held.lerp_(own["z"], 1.0 - self.beta)
        self._shown = Fingerprints()

    def _towards_fast(self, params: list[Tensor], state: Any, weight: float) -> None:
        for held, fast in _pairs(params, state):
            held.lerp_(fast, weight)


def _moved(params: list[Tensor], state: Any) -> list[Tensor]:
    """The parameters that have moved."""
    return [param for param in params if "z" in state.get(param, ())]


def _pairs(params: list[Tensor], state: Any) -> Iterable[tuple[Tensor, Tensor]]:
    """What each parameter that has moved holds, and its z."""
    moved = _moved(params, state)
    return zip(real(moved), (state[param]["z"] for param in moved), strict=True)
