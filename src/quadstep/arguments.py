"""Checks of what `LQA` is given: errors name the argument, what it was and how to fix it."""

import copy
import inspect
import math
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from quadstep.snapshot import ModuleTracker
from quadstep.tensors import Groups, parameters


def check_params(
    params: Any, own: dict[str, Any], searching: tuple[type[Optimizer], ...]
) -> Optimizer | None:
    """Refuses what cannot be trained; returns the optimizer to wrap, if it is one.

    `own` holds the arguments that a wrapped optimizer replaces, and `searching` the classes of
    optimizers that search their own line.
    """
    if not isinstance(params, Optimizer):
        return None
    name = type(params).__name__
    if isinstance(params, searching):
        raise TypeError(
            f"LQA cannot wrap {name}, which searches its own line; "
            "pass the parameters, or an optimizer that takes plain steps"
        )
    inner: Any = params
    while isinstance(getattr(inner, "optimizer", None), Optimizer):
        # Accelerate's wrapper has both modes for every optimizer, so the one inside counts.
        inner = inner.optimizer
    if all(callable(getattr(inner, mode, None)) for mode in ("train", "eval")):
        raise TypeError(
            f"LQA cannot wrap {name}, which has separate train() and eval() modes and averages "
            "its iterates; LQA(params) does so, too, and LQA(torch.optim.AdamW(params), "
            'averaging="schedule-free") around another optimizer'
        )
    for group in params.param_groups:
        if "lr" not in group:
            raise ValueError(
                f"{name} has no lr in its param groups, so there is no rate to "
                "measure; use an optimizer whose steps are in proportion to lr"
            )
        if not 0.0 <= rate(group["lr"]) < math.inf:
            raise ValueError(
                f"{name} has lr={group['lr']!r} in its param groups, which is no rate to measure "
                "from; construct it with a number for lr, and so that its steps are in proportion "
                "to it (Adafactor of Transformers with relative_step=False)"
            )
        if group.get("maximize"):
            raise ValueError(
                "LQA goes where the loss falls, got a wrapped optimizer with maximize=True; "
                "leave it out and return the negative objective from the closure"
            )
    if own["direction"] is not None:
        raise ValueError(
            "direction is the wrapped optimizer's own step, got "
            f"direction={own['direction']!r}; leave it out, or pass parameters instead of an "
            "optimizer"
        )
    if own["delta0"] is not None:
        raise ValueError(
            f"delta0 is the wrapped optimizer's own lr, got delta0={own['delta0']!r}; "
            f"set it there: {name}(params, lr={own['delta0']!r})"
        )
    if own["weight_decay"]:
        raise ValueError(
            "weight_decay is the wrapped optimizer's own, got "
            f"weight_decay={own['weight_decay']!r}; "
            f"set it there: {name}(params, weight_decay={own['weight_decay']!r})"
        )
    if _needs_closure(params):
        raise TypeError(
            f"LQA cannot wrap {name}, whose step() needs a closure; wrap one that steps "
            "from the gradients alone, such as torch.optim.AdamW(params)"
        )
    return params


def check_modules(model: Any, criterion: Any) -> list[nn.Module]:
    """Refuses what cannot be recorded; returns the modules."""
    modules = [model] if isinstance(model, nn.Module) else _listed(model)
    for module in modules:
        if not isinstance(module, nn.Module):
            raise TypeError(
                f"model must be a module or a list of modules, got {type(module).__name__}; "
                "use model=model, and for a function loss_fn = opt.recorded(loss_fn)"
            )
    if criterion is None:
        return modules
    if not isinstance(criterion, nn.Module):
        raise TypeError(
            f"criterion must be the loss module that the loop calls, got {type(criterion).__name__}"
            "; make one, criterion = nn.CrossEntropyLoss(), or wrap a function: "
            "loss_fn = opt.recorded(loss_fn)"
        )
    if not modules:
        raise ValueError("criterion needs the model whose output it takes; add model=model")
    return modules


def _listed(model: Any) -> list[Any]:
    if model is None:
        return []
    return list(cast(Iterable[Any], model)) if isinstance(model, Iterable) else [model]


def check_ownership(groups: Groups, modules: list[nn.Module], criterion: nn.Module | None) -> None:
    """Refuses parameters that no module has: its calls would not tell how they change the loss."""
    parts = modules if criterion is None else [*modules, criterion]
    owned = {param for part in parts for param in part.parameters()}
    strange = [tuple(param.shape) for param in parameters(groups) if param not in owned]
    if strange:
        raise ValueError(
            f"{len(strange)} of the parameters in params, of shapes {_listing(strange)}, do not "
            "belong to model; pass all modules that the loss is computed by, model=[one, other], "
            "and construct LQA after the model was wrapped, moved or given adapters"
        )


def _listing(items: list[Any]) -> str:
    return ", ".join(map(str, items[:3])) + (", ..." if len(items) > 3 else "")


def check_no_optimizer(params: Any) -> None:
    """Refuses an optimizer, whose steps are not the gradient."""
    if isinstance(params, Optimizer):
        raise TypeError(
            "LQA.paper follows the gradient and takes parameters, not an optimizer; "
            "use LQA(optimizer) to measure along another optimizer's steps"
        )


def check_lr(lr: Any) -> None:
    """Refuses a learning rate; None, which frameworks pass by default, is accepted."""
    if lr is not None:
        raise ValueError(
            f"LQA measures the learning rate, so there is none to choose, got lr={lr!r}; leave lr "
            "out or pass None (delta0 is only the first probe distance, and its default needs no "
            "tuning)"
        )


def _needs_closure(base: Optimizer) -> bool:
    """Whether step() fails without a closure and succeeds with one, tried on a copy."""
    step: Any = type(base).step
    parameter = inspect.signature(step).parameters.get("closure")
    if parameter is not None and parameter.default is inspect.Parameter.empty:
        return True
    if getattr(step, "hooked", False):
        # Without torch's profiler and step hooks.
        step = step.__wrapped__

    def succeeds(*closures: Any) -> bool:
        snapshot = ModuleTracker().capture(())
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                step(_copy_with_small_params(base), *closures)
        except Exception:
            return False
        finally:
            snapshot.restore()
        return True

    return not succeeds() and succeeds(lambda: torch.zeros((), requires_grad=True))


def _copy_with_small_params(base: Optimizer) -> Optimizer:
    """A copy with parameters of one entry and without state."""
    copied: Optimizer = object.__new__(type(base))
    memo: dict[int, Any] = {id(base): copied, id(base.state): defaultdict[Tensor, Any](dict)}
    for group in base.param_groups:
        for param in group["params"]:
            small = nn.Parameter(torch.zeros([1] * param.dim()))
            small.grad = torch.zeros_like(small)
            memo[id(param)] = small
    # deepcopy(base) would go through __getstate__, which drops the attributes of subclasses.
    vars(copied).update(copy.deepcopy(vars(base), memo))
    for hooks in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"):
        setattr(copied, hooks, OrderedDict[int, Any]())
    return copied


def check_options(direction: Any, averaging: Any, every: Any, delta0: Any) -> None:
    """Refuses choices that do not exist and numbers out of range; None stands for a default."""
    is_known = direction in (None, "rms", "gradient")
    is_own = callable(getattr(direction, "line", None)) and not isinstance(direction, type)
    if not (is_known or is_own):
        raise ValueError(
            f'direction must be "rms" or "gradient", got {direction!r}; to follow another '
            "optimizer's steps pass the optimizer itself: LQA(torch.optim.AdamW(params))"
        )
    if averaging not in (None, "auto", "schedule-free"):
        raise ValueError(f'averaging must be "schedule-free" or None, got {averaging!r}')
    is_integer = isinstance(every, Integral) or (isinstance(every, float) and every.is_integer())
    if every is not None and not (is_integer and int(every) >= 1):
        raise ValueError(f"every must be a whole number of steps, at least 1, got {every!r}")
    if delta0 is not None and not 0.0 < _number(delta0) < math.inf:
        raise ValueError(
            f"delta0 must be a positive finite number, got {delta0!r}; "
            "it is only the first probe distance, a small one such as 1e-4 is safe"
        )


def check_controller(controller: Any) -> None:
    """Refuses what cannot choose a rate."""
    names = ("state_type", "needs_slope", "probe_distance", "update")
    is_usable = all(hasattr(controller, name) for name in names)
    if controller is not None and (isinstance(controller, type) or not is_usable):
        raise TypeError(
            "controller must be an instance of a class that has what "
            f"quadstep.controllers.StepController has, got {controller!r}; leave it out for the "
            "default"
        )


def check_memory(state_dtype: Any, restore: Any, has_state: bool, is_wrapper: bool) -> None:
    """Refuses types and ways to return that do not exist, or would save nothing."""
    if state_dtype not in (None, torch.float32, torch.bfloat16):
        raise ValueError(
            f"state_dtype must be torch.float32 or torch.bfloat16, got {state_dtype!r}; "
            "leave it out to keep the state in the type of each parameter"
        )
    if state_dtype is not None and not has_state:
        raise ValueError(
            "state_dtype is the type of LQA's own state, of which there is none without averaging "
            f'around an optimizer or along "gradient", got state_dtype={state_dtype}; leave it '
            'out, or pass averaging="schedule-free"'
        )
    if restore not in ("copy", "subtract"):
        raise ValueError(f'restore must be "copy" or "subtract", got {restore!r}')
    if restore == "subtract" and is_wrapper:
        raise ValueError(
            'restore="subtract" saves nothing around an optimizer, whose own step is found from a '
            "copy of the parameters; leave it out"
        )


def check_group(group: dict[str, Any], defaults: dict[str, Any], decays: bool) -> None:
    """Refuses a rate or weight decay that is out of range; drops either where it is None."""
    for name in ("lr", "weight_decay"):
        if group.get(name, 0.0) is None:
            del group[name]
    if not 0.0 <= rate(group.get("lr", 0.0)) < math.inf:
        raise ValueError(f"lr must be finite and not negative, got {group['lr']!r}")
    decay = group.get("weight_decay", defaults["weight_decay"])
    if not 0.0 <= _number(decay) < math.inf:
        raise ValueError(
            f"weight_decay must be a finite number, not negative, got {decay!r}; "
            "0.01 is common, 0 turns it off"
        )
    if decay and not decays:
        raise ValueError(
            "weight_decay must be 0 along the plain gradient, as in LQA.paper(params), got "
            f"{decay!r}; add the penalty to the loss, or train with LQA(params)"
        )


def check_state(param: Tensor, kept: Tensor, dtype: torch.dtype | None) -> None:
    """Refuses a parameter unlike its state, both as real tensors; `dtype` is the state's own."""
    if param.shape != kept.shape:
        raise ValueError(
            f"a parameter has shape {tuple(param.shape)}, but had {tuple(kept.shape)} when its "
            "state was made; forget that state with del opt.state[param], or construct LQA anew"
        )
    if param.device != kept.device or (dtype is None and param.dtype != kept.dtype):
        raise ValueError(
            f"a parameter is {param.dtype} on {param.device}, but its state is {kept.dtype} on "
            f"{kept.device}: the model was moved or cast after it began to train; have the state "
            "follow with opt.load_state_dict(opt.state_dict())"
        )


def check_call(closure: Any, loss: Any, training: bool, has_record: bool) -> None:
    """Refuses a step without a closure, with a loss that is none, or in evaluation mode.

    With a record of calls no closure is needed.
    """
    if not callable(closure) and (closure is not None or loss is not None or not has_record):
        raise TypeError(
            f"step() needs a closure that returns the loss, got {type(closure).__name__}; "
            "call it as opt.step(lambda: loss_fn(model(x), y)), which runs backward itself; or "
            "construct LQA(params, model=model), and step() after loss.backward() needs none"
        )
    if loss is not None:
        check_loss(loss, "loss")
    if not training:
        raise RuntimeError(
            "step() was called while the parameters hold the averaged weights; "
            "leave `with opt.averaged():`, or call opt.train(), first"
        )


def check_module(model: Any) -> None:
    """Refuses what is not a module."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be a torch.nn.Module, got {type(model).__name__}; "
            "for several modules call it once for each"
        )


def check_trained(model: nn.Module, params: list[Tensor]) -> None:
    """Refuses a module that has none of the optimizer's parameters."""
    if set(model.parameters()).isdisjoint(params):
        raise ValueError(
            f"model, a {type(model).__name__}, has no parameter of this optimizer; "
            "give the module whose parameters LQA was constructed with, not a copy of it"
        )


def check_loss(loss: Any, name: str) -> None:
    """Refuses what is not a scalar loss.

    Args:
        loss: what was given or returned.
        name: "closure" or "loss", whichever it came from.
    """
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


def rate(lr: Any) -> float:
    """The value of a learning rate, a number or a tensor; not a number for anything else."""
    if isinstance(lr, Tensor):
        return float(lr) if lr.numel() == 1 else math.nan
    return _number(lr)


def _number(value: Any) -> float:
    """The value of any real number; not a number for anything else, flags included."""
    return float(value) if not isinstance(value, bool) and isinstance(value, Real) else math.nan
