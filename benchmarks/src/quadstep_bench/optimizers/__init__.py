"""Optimizers: the settings that are compared, by name.

Nothing here imports torch, so that reports can be written from records alone.
"""

from dataclasses import dataclass

from quadstep_bench.tasks import check_name


@dataclass(frozen=True)
class Competitor:
    """An optimizer of the comparisons at one of its learning rates."""

    family: str
    rate: float


FAMILIES = {
    "sgd": "SGD",
    "sgd-m": "SGD-M",
    "sgd-nag": "SGD-NAG",
    "adagrad": "AdaGrad",
    "rmsprop": "RMSProp",
    "adam": "Adam",
}
"""The competitors' families and how the paper writes them."""

RATES = (0.1, 0.01, 0.001)

COMPETITORS = {
    f"{family}-{rate}": Competitor(family, rate) for family in FAMILIES for rate in RATES
}

HAND_TUNED = COMPETITORS | {
    f"adamw-{rate}": Competitor("adamw", rate) for rate in (0.1, 0.01, 0.003, 0.001, 0.0003)
}
"""What the suite takes the best of on each task: the competitors, and AdamW at five rates."""

SCHEDULED = {
    f"adamw-cosine-{rate}": Competitor("adamw", rate)
    for rate in (0.1, 0.03, 0.01, 0.003, 0.001, 0.0003)
}
"""What the suite shows beside them: AdamW with a schedule, which has to know how long a run is."""

WARM_UP = 0.05
"""The share of a run in which a scheduled rate rises from zero, before it falls back to it."""

PEERS = {
    "schedulefree-adamw": "schedulefree",
    "schedulefree-radam": "schedulefree",
    "prodigy": "prodigyopt",
    "dadapt-adam": "dadaptation",
    "gen": "gen-optim",
    "momo": "momo-opt",
    "momo-adam": "momo-opt",
    "dog": "dog-optimizer",
    "ldog": "dog-optimizer",
    "cocob": "parameterfree",
}
"""Optimizers of other packages that want no rate either, and the distribution each comes with."""

CONFIGURATIONS = ("lqa-paper", "lqa", "lqa-auto")

PAPER_CONFIGURATIONS = (*CONFIGURATIONS, "lqa-authors")
"""Those that the paper's claims are decided for; the last has the rules of its authors' code."""

BASES = {"lqa-paper": "sgd", "lqa": "sgd", "lqa-auto": "adamw"}
"""The optimizer of torch that takes steps of the same kind, and that costs are compared with."""

VARIANTS = ("lqa", "lqa-adamw", "lqa-sgdm", "lqa-auto-decay")
"""What the suite shows beside `lqa-auto`; the last is that with ten times its weight decay."""

CONSTANT_RATES = {f"lqa-constant-{rate}": rate for rate in (0.0001, 0.0003, 0.001, 0.003, 0.01)}
"""The default's direction and averaging at rates that are not measured."""

LQA_SETTINGS = frozenset((*PAPER_CONFIGURATIONS, *VARIANTS, *CONSTANT_RATES))
"""All that is trained by LQA."""


def settings() -> tuple[str, ...]:
    """Names every optimizer setting of the paper's figures, the competitors first."""
    return (*COMPETITORS, *PAPER_CONFIGURATIONS)


def suite_settings() -> tuple[str, ...]:
    """Names every optimizer setting of the suite, those of LQA first."""
    return ("lqa-auto", *VARIANTS, *CONSTANT_RATES, *HAND_TUNED, *SCHEDULED, *PEERS)


def check_optimizer(name: str) -> None:
    """Raises a `ValueError` that lists the optimizers unless `name` is one."""
    check_name("optimizer", name, dict.fromkeys((*settings(), *suite_settings())))


def check_configuration(name: str) -> None:
    """Raises a `ValueError` that lists the configurations of LQA unless `name` is one."""
    check_name("configuration", name, CONFIGURATIONS)
