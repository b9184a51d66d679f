"""Snapshots of what a closure touches besides parameters, so that probes are free of side effects.

These are the random generators, the buffers of modules, and the state of DDP and FSDP modules.
"""

from __future__ import annotations

import ctypes
import operator
import pickle
import random
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from quadstep.tensors import assign, copies


@dataclass(frozen=True, slots=True)
class RandomSource:
    """One source of random numbers: how its state is read, set and compared."""

    get: Callable[[], Any]
    set: Callable[[Any], object]
    equal: Callable[[Any, Any], bool]


GeneratorStates = list[tuple[RandomSource, Any]]  # each source with its state


def set_generators(states: GeneratorStates) -> None:
    """Sets the generators that are in another state."""
    for generator, state in states:
        # Setting takes longer than reading, and few closures draw from more than one.
        if not generator.equal(generator.get(), state):
            generator.set(state)


class NumpyGenerator:
    """NumPy's global generator, whose state is read in full only where its memory has changed.

    Reading all 624 words twice a measurement takes a quarter of SGD's step on logistic regression.
    """

    _MERSENNE = ctypes.sizeof(ctypes.c_uint32 * 624) + ctypes.sizeof(ctypes.c_int)

    def __init__(self, numpy_random: Any) -> None:
        self._random = numpy_random
        self._known: tuple[bytes, dict[str, Any]] | None = None

    def get(self) -> dict[str, Any]:
        """Reads the state, which is shared and must not be changed."""
        # NumPy before 1.24 cannot say which generator is the global one.
        generator: Any = getattr(self._random, "get_bit_generator", lambda: None)()
        if type(generator) is not self._random.MT19937:
            return self._random.get_state(legacy=False)
        memory = ctypes.string_at(generator.ctypes.state_address, self._MERSENNE)
        if self._known is not None and self._known[0] == memory:
            return self._known[1]
        # The dictionary takes half the time of the legacy tuple.
        state = self._random.get_state(legacy=False)
        # The second of two normals lies outside that memory.
        self._known = None if state["has_gauss"] else (memory, state)
        return state

    def set(self, state: dict[str, Any]) -> None:
        """Sets the state."""
        self._random.set_state(state)
        self._known = None

    @staticmethod
    def equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
        """Compares two states of generators of any kind."""
        return one is other or pickle.dumps(one) == pickle.dumps(other)


@dataclass(slots=True)
class Snapshot:
    """The random generators, buffers and parallel modules at one time."""

    generators: GeneratorStates
    buffers: list[tuple[nn.Module, str, Tensor, Tensor]]  # owner, name, tensor, copied values
    resets: list[Callable[[], object]]  # of the modules of DDP and FSDP

    def restore(self) -> None:
        """Restores everything."""
        set_generators(self.generators)
        self.restore_buffers()
        for reset in self.resets:
            reset()

    def restore_buffers(self) -> None:
        """Restores the buffers in place, and under their names where they were replaced.

        A buffer that has another shape now, as a cache that has grown, is left as it is.
        """
        rows = [row for row in self.buffers if not _is_reshaped(*row[:3])]
        for owner, name, buffer, _ in rows:
            owner._buffers[name] = buffer
        assign([row[2] for row in rows], [row[3] for row in rows])

    def renew(self, modules: set[nn.Module]) -> None:
        """Takes the present buffers of modules."""
        self.buffers = [row for row in self.buffers if row[0] not in modules] + _buffers(modules)

    def limit(self, modules: set[nn.Module]) -> Snapshot:
        """The snapshot with the buffers of these modules alone."""
        return replace(self, buffers=[row for row in self.buffers if row[0] in modules])

    def pair_advanced(self, earlier: Snapshot) -> tuple[Snapshot, Snapshot]:
        """An earlier snapshot and this one, reduced to the generators that advanced in between."""
        rows = zip(earlier.generators, self.generators, strict=True)
        pairs = [(old, new) for old, new in rows if not old[0].equal(old[1], new[1])]
        return (
            replace(earlier, generators=[old for old, _ in pairs]),
            replace(self, generators=[new for _, new in pairs]),
        )


_STANCE = threading.RLock()  # held while the stance of torch's compiler, global, is changed


class ModuleTracker:
    """Finds the modules that a closure runs: an optimizer is given parameters, not modules.

    It looks during the first step, and during one after new parameters are reached.

    Attributes:
        autocast_dtypes: the types in which autocast was seen to compute.
        roots: the modules that were called by no other module.
        is_due: whether it looks during the next step.
    """

    def __init__(self) -> None:
        self.autocast_dtypes: set[torch.dtype] = set()
        self._modules: list[weakref.ref[nn.Module]] = []
        self._reached: set[int] = set()
        self.roots: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self.is_due = True
        self._is_tracking = False
        self._generators: list[RandomSource] | None = None

    def __reduce__(self) -> tuple[type[ModuleTracker], tuple[()]]:
        """Copies and pickles track anew: their closures run other modules."""
        return ModuleTracker, ()

    @contextmanager
    def tracking(self, snapshot: Snapshot, params: Iterable[Tensor]) -> Generator[None]:
        """Tracks the modules that run, where that is due, and adds their state to a snapshot.

        Compiled modules run eagerly meanwhile: a hook that is there once would be compiled in.
        They do so in all evaluations of a step, as they draw other random numbers then.
        """
        if not self._is_tracking:
            yield
            return
        seen, thread = set(self._alive()), threading.get_ident()
        device_types = {param.device.type for param in params}

        def note_autocast() -> None:
            self.autocast_dtypes |= {
                torch.get_autocast_dtype(kind)
                for kind in device_types
                if torch.is_autocast_enabled(kind)
            }

        def note(module: nn.Module, _: object) -> None:
            if threading.get_ident() != thread:
                return
            note_autocast()
            if module not in seen:
                self.roots.add(module)
                new = [part for part in module.modules() if part not in seen]
                seen.update(new)
                snapshot.buffers.extend(_buffers(new))
                snapshot.resets.extend(_resets(new))
                # The parameters may have moved since FSDP gathered them for validation.
                _reshard(new)

        note_autocast()
        hook = nn.modules.module.register_module_forward_pre_hook(note)
        try:
            with _STANCE, torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Using `torch.compile.* global hooks")
                yield
        finally:
            hook.remove()
        self._modules = [weakref.ref(module) for module in seen if _has_state(module)]

    def start_step(self) -> None:
        """Starts a step, during which it looks if that is due."""
        self._is_tracking, self.is_due = self.is_due, False

    def add(self, modules: Iterable[nn.Module]) -> None:
        """Adds modules that are known before they run."""
        alive = self._alive()
        self._modules += [
            weakref.ref(module) for module in modules if _has_state(module) and module not in alive
        ]

    def note_gradients(self, params: Iterable[Tensor]) -> None:
        """Looks during the rest of the step where a parameter has its first gradient."""
        reached = {id(param) for param in params if param.grad is not None}
        if not reached <= self._reached:
            self._is_tracking = self._is_tracking or bool(self._reached)
            self._reached |= reached

    def look_again(self) -> None:
        """Tracks the next step, too; known modules stay known."""
        self.is_due = True

    def capture(self, params: Iterable[Tensor] | None) -> Snapshot:
        """Takes a snapshot, with the generators of the parameters' devices, if any are given.

        Raises:
            RuntimeError: DDP is to continue without the ranks that run out of data.
        """
        states = [] if params is None else self.generators(params)
        modules = self._alive()
        return Snapshot(states, _buffers(modules), _resets(modules))

    def generators(self, params: Iterable[Tensor]) -> GeneratorStates:
        """The state of all generators, those of the parameters' devices included."""
        if self._generators is None:
            self._generators = _random_sources({param.device for param in params})
        return [(generator, generator.get()) for generator in self._generators]

    def reshard(self) -> None:
        """Has FSDP drop the parameters that it has gathered, because the shards have moved."""
        _reshard(self._alive())

    def _alive(self) -> list[nn.Module]:
        modules = (reference() for reference in self._modules)
        return [module for module in modules if module is not None]


def _has_state(module: nn.Module) -> bool:
    return bool(module._buffers) or _is_ddp(module) or _is_fsdp(module)


def _is_ddp(module: nn.Module) -> bool:
    return isinstance(module, nn.parallel.DistributedDataParallel)


def _is_fsdp(module: nn.Module) -> bool:
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def _reshard(modules: Iterable[Any]) -> None:
    for module in modules:
        if _is_fsdp(module):
            module.reshard()


def _resets(modules: Iterable[Any]) -> list[Callable[[], object]]:
    """What undoes the state that forward passes without gradients leave in parallel modules."""
    resets: list[Callable[[], object]] = []
    for module in modules:
        if _is_ddp(module):
            join = module._join_config
            if join.enable and not join.throw_on_early_termination:
                raise RuntimeError(
                    "LQA cannot go on without the ranks that run out of data, which no longer "
                    "take part in its measurements; "
                    "use ddp.join(throw_on_early_termination=True) or give all ranks as many steps"
                )
            # Without gradients DDP takes the buffers of the next pass to be synchronized already.
            name = "require_forward_param_sync"
            resets.append(partial(setattr, module, name, getattr(module, name)))
        elif _is_fsdp(module):
            # Without a backward pass FSDP keeps what it gathered, though the shards move.
            resets.append(partial(_reshard, [module]))
    return resets


def _buffers(modules: Iterable[nn.Module]) -> list[tuple[nn.Module, str, Tensor, Tensor]]:
    """The owner, name, tensor and copied values of each buffer."""
    rows = [
        (module, name, buffer)
        for module in modules
        for name, buffer in module._buffers.items()
        if buffer is not None and _is_writable(buffer)
    ]
    values = copies([buffer for _, _, buffer in rows])
    return [(*row, value) for row, value in zip(rows, values, strict=True)]


def _is_writable(buffer: Tensor) -> bool:
    """Whether a buffer is neither lazy, expanded nor a wrapper of `torch.func`."""
    untyped: Any = torch._C
    if is_lazy(buffer) or untyped._functorch.is_functorch_wrapped_tensor(buffer):
        return False
    if buffer.layout is not torch.strided:
        return True
    sizes = zip(buffer.shape, buffer.stride(), strict=True)
    return all(size <= 1 or stride for size, stride in sizes)


def _is_reshaped(owner: nn.Module, name: str, buffer: Tensor) -> bool:
    # The buffers of scripted modules are no dictionary.
    current = owner._buffers[name] if name in owner._buffers else None  # noqa: SIM401
    return current is not None and current.shape != buffer.shape


def _random_sources(devices: Iterable[torch.device]) -> list[RandomSource]:
    sources = [
        RandomSource(torch.get_rng_state, torch.set_rng_state, torch.equal),
        RandomSource(random.getstate, random.setstate, operator.eq),
    ]
    for device in devices:
        if device.type not in ("cpu", "meta"):
            module = torch.get_device_module(device)
            get = partial(module.get_rng_state, device)
            set_ = partial(module.set_rng_state, device=device)
            sources.append(RandomSource(get, set_, torch.equal))
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        generator = NumpyGenerator(numpy.random)
        sources.append(RandomSource(generator.get, generator.set, generator.equal))
    return sources
