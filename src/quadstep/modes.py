"""The weights that the parameters hold: those that train, or their average."""

from __future__ import annotations

import copy
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from quadstep import arguments
from quadstep.checkpoint import TRAINING
from quadstep.groups import GroupOptimizer
from quadstep.tensors import parameters


class AveragedOptimizer(GroupOptimizer):
    """An optimizer whose parameters hold the averaged weights on request."""

    @contextmanager
    def averaged(self) -> Generator[None]:
        """Holds the averaged weights in the parameters, inside a `with` block.

        Afterwards, also after an exception, the parameters are bit for bit what they were. Blocks
        may be nested. Without averaging nothing changes. `step` raises an error inside.

        Example:
            >>> with opt.averaged():
            ...     validate(model)
        """
        self._adopt()
        was_training = self._scalars[TRAINING]
        self.eval()
        try:
            yield
        finally:
            (self.train if was_training else self.eval)()

    def averaged_state_dict(self, model: nn.Module) -> dict[str, Any]:
        """Returns a copy of `model.state_dict()` with the averaged weights, for export.

        What the optimizer does not average is copied as it is: buffers, other parameters and,
        without averaging, all. Tied parameters stay tied. Model and optimizer stay as they are.
        Call it between steps, where several processes train on all of them.

        Args:
            model: a module with parameters of the optimizer. The keys are those of its
                `state_dict()`: for keys without the prefix of a wrapper give the module inside,
                `ddp.module` or the model that was compiled.

        Raises:
            TypeError: `model` is not a module.
            ValueError: `model` has no parameter of the optimizer.

        Example:
            >>> torch.save(opt.averaged_state_dict(model), "model.pt")
        """
        arguments.check_module(model)
        with self.averaged():
            # FSDP shards the parameters again here, so that they are those of the optimizer.
            state_dict = model.state_dict()
            arguments.check_trained(model, parameters(self.param_groups))
            return copy.deepcopy(state_dict)

    @torch.no_grad()
    def eval(self) -> None:
        """Puts the averaged weights into the parameters; without averaging nothing changes.

        Example:
            >>> opt.eval()
            >>> validate(model)
            >>> opt.train()
        """
        self._adopt()
        if self._scalars[TRAINING]:
            self._evaluator.recorder.hold()
            self.strategies.update.show_average(self.param_groups, self.state)
            self._evaluator.tracker.reshard()
        self._scalars[TRAINING] = False

    @torch.no_grad()
    def train(self) -> None:
        """Puts the weights back from which training continues.

        Example:
            >>> opt.train()
        """
        self._adopt()
        if not self._scalars[TRAINING]:
            self.strategies.update.resume(self.param_groups, self.state)
            self._evaluator.tracker.reshard()
            self._evaluator.recorder.release()
        self._scalars[TRAINING] = True
