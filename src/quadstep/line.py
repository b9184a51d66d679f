"""The loss along a direction: probes that leave no trace, moves that restore exactly.

A `Line` knows nothing of how its direction arose. Moves are written from a snapshot of the start:
taking a displacement back by subtraction would round, a snapshot costs one transient copy of the
parameters while a line is measured and returns them bit for bit.
"""

# torch.optim itself is built from the foreach operations, private in name alone.
# pyright: reportPrivateUsage=false, reportPrivateImportUsage=false

from __future__ import annotations

import ctypes
import math
import operator
import pickle
import random
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.tensor import DTensor

Closure = Callable[[], Tensor]

Loss = TypeVar("Loss")
Item = TypeVar("Item")


@dataclass(slots=True)
class Block:
    """The parameters of one group that have gradients, and where they are headed.

    Attributes:
        owners: the parameters themselves, the keys of the optimizer's state.
        params: the same as real tensors (views, where a parameter is complex).
        direction: what a step subtracts from each of them, of the same shapes.
        unit: the rate of the optimizer at which a step subtracts the direction once; carries the
            ratios between the rates of the groups.
        weight_decay: of the group.
        gradient: the gradients there, likewise; None where they are not known.
    """

    owners: list[Tensor]
    params: list[Tensor]
    direction: list[Tensor]
    unit: float
    weight_decay: float = 0.0
    gradient: list[Tensor] | None = None


class Line:
    """The points `theta - rate / unit * direction` of all blocks together.

    Args:
        blocks: the parameters and their directions.
        start: copies of the parameters at rate zero, block by block, where they are elsewhere now;
            by default the parameters are at rate zero and are copied before the first probe.
    """

    def __init__(self, blocks: list[Block], start: list[list[Tensor]] | None = None) -> None:
        self.blocks = blocks
        self._start = start
        self._displaced = start is not None

    def move(self, rate: float) -> None:
        """Takes the parameters to a rate; the restore is part of the move."""
        self.restore()
        self._displaced = rate != 0.0
        if self._displaced:
            for block in self.blocks:
                torch._foreach_add_(block.params, block.direction, alpha=-rate / block.unit)

    def restore(self) -> None:
        """Returns the parameters to rate zero, bit for bit."""
        if self._displaced and self._start is not None:
            for block, start in zip(self.blocks, self._start, strict=True):
                assign(block.params, start)
        self._displaced = False

    def slope(self) -> Tensor | float | None:
        """The decrease of the loss per unit of rate, as the gradients tell it.

        Returns:
            A scalar whose mean over the processes is meant; None where a gradient is not known.
        """
        slopes: list[Tensor] = []
        for block in self.blocks:
            if block.gradient is None:
                return None
            # One by one: all products together would be another copy of the parameters.
            products = map(inner, block.gradient, block.direction)
            slopes.append(torch.stack([*products]).sum() / block.unit)
        if not slopes:
            return 0.0
        slope = torch.stack([part.to(slopes[0].device) for part in slopes]).sum()
        return float(slope) if at_hand(slope) else slope

    def losses(self, evaluate: Callable[[], Loss], rates: Iterable[float]) -> list[Loss]:
        """Evaluates the loss at several rates and returns to rate zero, however that ends.

        Args:
            evaluate: returns the loss at the present parameters, as a tensor or a number.
            rates: where on the line; negative ones lie uphill.

        Returns:
            The losses, in the order of the rates.
        """
        if self._start is None:
            self._start = [copies(block.params) for block in self.blocks]
        losses: list[Loss] = []
        try:
            for rate in rates:
                self.move(rate)
                # Whatever a closure itself does to the parameters goes, too.
                self._displaced = True
                losses.append(evaluate())
        finally:
            self.restore()
        return losses


def rank_mean(
    values: Sequence[Tensor | float], like: Tensor, group: ProcessGroup | None
) -> list[float]:
    """Averages numbers over the processes that train together; reading them waits for the device.

    The sum is formed once and sent to all, so that all go on with the same bits.

    Args:
        values: scalars, as many on every process.
        like: a tensor on the device where they are averaged, of the type that numbers have there.
        group: the processes; None means all, or this one alone where there is no process group.
    """
    distributed, size = torch.distributed, processes(group)
    numbers = [value for value in values if isinstance(value, float)]
    if len(numbers) == len(values):
        if size == 1:
            return numbers
        together = like.new_tensor(numbers)
    else:
        together = torch.stack(
            [
                value.to(like.device) if isinstance(value, Tensor) else like.new_tensor(value)
                for value in values
            ]
        )
    if size > 1:
        together = together.double()
        distributed.all_reduce(together, group=group)
    # One by one, values would be tensors first, which takes ten times as long. Torch has no types
    # for the way that takes them together.
    untyped: Any = together
    return [value / size for value in untyped.tolist()]


def processes(group: ProcessGroup | None) -> int:
    """How many processes train together, see `rank_mean`."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_world_size(group)
    return 1


_PLAIN = frozenset((Tensor, nn.Parameter))


def is_distributed(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether a tensor is a DTensor, known without the second that importing DTensor takes."""
    if type(tensor) in _PLAIN:
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensors: Iterable[Tensor]) -> list[Tensor]:
    """This process's parts of the tensors, sharing their memory."""
    return [tensor.to_local() if is_distributed(tensor) else tensor for tensor in tensors]


def copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies tensors; on an accelerator together, which copies launched one by one hold up."""
    if tensors and at_hand(tensors[0]):
        return [tensor.clone() for tensor in tensors]
    fresh = [torch.empty_like(tensor) for tensor in tensors]
    assign(fresh, tensors)
    return fresh


def assign(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copies values into tensors of the same shapes, types and devices, all together."""
    parts = (alike(local(tensors)) for tensors in (targets, sources))
    for some, values in zip(*parts, strict=True):
        torch._foreach_copy_(some, values)


def alike(tensors: list[Tensor]) -> Iterable[list[Tensor]]:
    """Parts tensors into those that an operation on all takes in one launch, where it is one."""
    if tensors and at_hand(tensors[0]):
        return [tensors]
    return parted(tensors, lambda tensor: (tensor.device, tensor.dtype))


def parted(items: Iterable[Item], key: Callable[[Item], Any]) -> Iterable[list[Item]]:
    """Parts items by what a key says of them, each part in their order."""
    parts: dict[Any, list[Item]] = {}
    for item in items:
        parts.setdefault(key(item), []).append(item)
    return parts.values()


def inner(one: Tensor, other: Tensor) -> Tensor:
    """The inner product of two tensors laid out alike, or what has it as its mean over a mesh.

    It is that of single precision at least: the squares of what half precision holds overflow.
    """
    kind = torch.promote_types(one.dtype, torch.float32)
    one, other = one.to(kind), other.to(kind)
    if not (is_distributed(one) and is_distributed(other)):
        return (one * other).sum()
    parts = [
        size
        for placement, size in zip(one.placements, one.device_mesh.shape, strict=True)
        if not placement.is_replicate()
    ]
    return (one.to_local() * other.to_local()).sum() * math.prod(parts)


def whole(tensor: Tensor) -> Tensor:
    """A plain tensor of what a device mesh may hold in parts."""
    return tensor.full_tensor() if is_distributed(tensor) else tensor


def any_shard(flag: bool, tensor: Tensor) -> bool:
    """Whether a flag is set by any process that holds a part of the tensor."""
    if not is_distributed(tensor):
        return flag
    from torch.distributed.tensor import DTensor, Partial

    own = torch.tensor(float(flag), device=tensor.to_local().device)
    placements = [Partial("max")] * tensor.device_mesh.ndim
    return bool(DTensor.from_local(own, tensor.device_mesh, placements).full_tensor())


def at_hand(tensor: Tensor) -> bool:
    """Whether a value can be read without waiting for a device."""
    return tensor.is_cpu


@dataclass(frozen=True, slots=True)
class RandomSource:
    """One source of random numbers: how its state is read, set and compared."""

    get: Callable[[], Any]
    set: Callable[[Any], object]
    same: Callable[[Any, Any], bool]


class NumpyGenerator:
    """NumPy's global generator, whose state is read in full only where its memory has changed.

    NumPy turns the 624 words of a Mersenne twister into an array one by one, twice a measurement a
    quarter of SGD's step on logistic regression; comparing their memory takes next to nothing.

    Args:
        random: the module `numpy.random`.
    """

    _MERSENNE = ctypes.sizeof(ctypes.c_uint32 * 624) + ctypes.sizeof(ctypes.c_int)
    """The bytes of a Mersenne twister: its words and where it is among them."""

    def __init__(self, random: Any) -> None:
        self._random = random
        self._known: tuple[bytes, dict[str, Any]] | None = None

    def get(self) -> dict[str, Any]:
        """Reads the state; what it returns is shared and not to be changed."""
        # Before NumPy 1.24 there is no way to ask which generator is the global one.
        generator: Any = getattr(self._random, "get_bit_generator", lambda: None)()
        if type(generator) is not self._random.MT19937:
            return self._random.get_state(legacy=False)
        memory = ctypes.string_at(generator.ctypes.state_address, self._MERSENNE)
        if self._known is not None and self._known[0] == memory:
            return self._known[1]
        # The dictionary takes half the time of the legacy tuple.
        state = self._random.get_state(legacy=False)
        # The second of two normals is kept elsewhere: whether it is there still, only NumPy knows.
        self._known = None if state["has_gauss"] else (memory, state)
        return state

    def set(self, state: dict[str, Any]) -> None:
        """Sets the state."""
        self._random.set_state(state)
        self._known = None

    @staticmethod
    def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
        """Compares two states, of whatever kind of generator."""
        return one is other or pickle.dumps(one) == pickle.dumps(other)


@dataclass(slots=True)
class Moment:
    """The random generators, module buffers and parallel modules as they were at one time.

    Attributes:
        generators: each generator and its state.
        buffers: the owner, name, tensor and copied values of every buffer.
        rewinds: what brings the modules of DDP and FSDP back.
    """

    generators: list[tuple[RandomSource, Any]]
    buffers: list[tuple[nn.Module, str, Tensor, Tensor]]
    rewinds: list[Callable[[], object]]

    def restore(self) -> None:
        """Sets everything back."""
        for generator, state in self.generators:
            # Setting takes longer than looking, and few closures draw from more than one.
            if not generator.same(generator.get(), state):
                generator.set(state)
        self.restore_buffers()
        for rewind in self.rewinds:
            rewind()

    def restore_buffers(self) -> None:
        """Sets the buffers back, in place; one that was replaced becomes the old tensor again.

        Unless it is of another shape: such a cache has grown, as its module remembers.
        """
        rows = [row for row in self.buffers if not _reshaped(*row[:3])]
        for owner, name, buffer, _ in rows:
            owner._buffers[name] = buffer
        assign([row[2] for row in rows], [row[3] for row in rows])

    def advanced(self, since: Moment) -> tuple[Moment, Moment]:
        """Pairs this moment with an earlier one, both without the generators that stood still."""
        moved = [
            (generator, before, after)
            for (generator, before), (_, after) in zip(
                since.generators, self.generators, strict=True
            )
            if not generator.same(before, after)
        ]
        return (
            replace(since, generators=[(generator, before) for generator, before, _ in moved]),
            replace(self, generators=[(generator, after) for generator, _, after in moved]),
        )


_STANCE = threading.RLock()
"""The stance of torch's compiler is one for all threads, and each must find it as it was."""


class Surroundings:
    """What a closure touches besides the parameters: random generators and the state of modules.

    An optimizer is given parameters, not modules, so the modules that matter are those seen to run
    during the first closure, and during one after parameters are reached that never were before.

    Attributes:
        autocast: the types that autocast was seen to compute in.
    """

    def __init__(self) -> None:
        self.autocast: set[torch.dtype] = set()
        self._modules: list[weakref.ref[nn.Module]] = []
        self._looks = True
        self._generators: list[RandomSource] | None = None

    def discovering(
        self, moment: Moment, devices: Callable[[], Iterable[torch.device]] = tuple
    ) -> AbstractContextManager[None]:
        """Notes which modules run, where it is time to; adds their untouched state to `moment`.

        Compiled modules run eagerly meanwhile: a hook that is there once would be compiled in.

        Args:
            moment: before the closure runs.
            devices: tells where the parameters live; their autocast types are noted.
        """
        return self._discovering(moment, devices) if self._looks else nullcontext()

    @contextmanager
    def _discovering(
        self, moment: Moment, devices: Callable[[], Iterable[torch.device]]
    ) -> Generator[None]:
        seen, owner = set(self._alive()), threading.get_ident()
        kinds = {device.type for device in devices()}

        def note_autocast() -> None:
            self.autocast.update(
                torch.get_autocast_dtype(kind) for kind in kinds if torch.is_autocast_enabled(kind)
            )

        def note(module: nn.Module, _: object) -> None:
            if threading.get_ident() != owner:
                return
            note_autocast()
            if module not in seen:
                fresh = [part for part in module.modules() if part not in seen]
                seen.update(fresh)
                moment.buffers.extend(_copies(fresh))
                moment.rewinds.extend(_rewinds(fresh))
                # The parameters may have moved since FSDP gathered them to validate.
                _reshard(fresh)

        note_autocast()
        hook = nn.modules.module.register_module_forward_pre_hook(note)
        try:
            with _STANCE, torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Using `torch.compile.* global hooks")
                yield
        finally:
            hook.remove()
        self._modules = [
            weakref.ref(module)
            for module in seen
            if module._buffers or _replicates(module) or _shards(module)
        ]
        self._looks = False

    def look_again(self) -> None:
        """Has the modules noted that run in the next closure; those known stay known."""
        self._looks = True

    def capture(self, devices: Iterable[torch.device] | None) -> Moment:
        """Copies the buffers and the states of the generators; notes those of parallel modules.

        Args:
            devices: where the parameters live; their generators join CPU's, Python's and NumPy's.
                None leaves all generators out.

        Raises:
            RuntimeError: DDP is to go on without the ranks that run out of data.
        """
        states: list[tuple[RandomSource, Any]] = []
        if devices is not None:
            if self._generators is None:
                self._generators = _generators(devices)
            states = [(generator, generator.get()) for generator in self._generators]
        modules = self._alive()
        return Moment(states, _copies(modules), _rewinds(modules))

    def reshard(self) -> None:
        """Makes FSDP forget the parameters that it has gathered, because they have moved."""
        _reshard(self._alive())

    def _alive(self) -> list[nn.Module]:
        modules = (reference() for reference in self._modules)
        return [module for module in modules if module is not None]


def _replicates(module: nn.Module) -> bool:
    return isinstance(module, nn.parallel.DistributedDataParallel)


def _shards(module: nn.Module) -> bool:
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def _reshard(modules: Iterable[Any]) -> None:
    for module in modules:
        if _shards(module):
            module.reshard()


def _rewinds(modules: Iterable[Any]) -> list[Callable[[], object]]:
    """Collects what undoes the traces that forward passes without gradients leave in modules."""
    rewinds: list[Callable[[], object]] = []
    for module in modules:
        if _replicates(module):
            join = module._join_config
            if join.enable and not join.throw_on_early_termination:
                raise RuntimeError(
                    "LQA cannot go on without the ranks that run out of data, which no longer "
                    "take part in its measurements; "
                    "use ddp.join(throw_on_early_termination=True) or give all ranks as many steps"
                )
            # Without gradients DDP takes the buffers of the next pass to be in step already.
            name = "require_forward_param_sync"
            rewinds.append(partial(setattr, module, name, getattr(module, name)))
        elif _shards(module):
            # Without a backward pass FSDP keeps what it gathered, blind to moves of the shards.
            rewinds.append(partial(_reshard, [module]))
    return rewinds


def _copies(modules: Iterable[nn.Module]) -> list[tuple[nn.Module, str, Tensor, Tensor]]:
    buffers = [
        (module, name, buffer)
        for module in modules
        for name, buffer in module._buffers.items()
        if buffer is not None and _plain(buffer)
    ]
    values = copies([buffer for _, _, buffer in buffers])
    return [(*row, value) for row, value in zip(buffers, values, strict=True)]


def _plain(buffer: Tensor) -> bool:
    """Whether a buffer can be copied and written to.

    One that is expanded cannot, nor one without a shape yet, nor the stand-ins of `torch.func`.
    """
    untyped: Any = torch._C
    if is_lazy(buffer) or untyped._functorch.is_functorch_wrapped_tensor(buffer):
        return False
    if buffer.layout is not torch.strided:
        return True
    sizes = zip(buffer.shape, buffer.stride(), strict=True)
    return all(size <= 1 or stride for size, stride in sizes)


def _reshaped(owner: nn.Module, name: str, buffer: Tensor) -> bool:
    # Those of scripted modules are no dictionary.
    current = owner._buffers[name] if name in owner._buffers else None  # noqa: SIM401
    return current is not None and current.shape != buffer.shape


def _generators(devices: Iterable[torch.device]) -> list[RandomSource]:
    generators = [
        RandomSource(torch.get_rng_state, torch.set_rng_state, torch.equal),
        RandomSource(random.getstate, random.setstate, operator.eq),
    ]
    for device in devices:
        if device.type not in ("cpu", "meta"):
            module = torch.get_device_module(device)
            generators.append(
                RandomSource(
                    partial(module.get_rng_state, device),
                    partial(module.set_rng_state, device=device),
                    torch.equal,
                )
            )
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        generator = NumpyGenerator(numpy.random)
        generators.append(RandomSource(generator.get, generator.set, generator.same))
    return generators
