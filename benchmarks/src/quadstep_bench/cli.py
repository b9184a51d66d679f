"""The command line: the demonstration, the experiments, and the reports written from them."""

import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

from quadstep_bench.optimizers import CONFIGURATIONS, PAPER_CONFIGURATIONS, check_configuration

# Commands import the rest themselves: not all need torch, which takes long.
from quadstep_bench.runner.files import RecordError
from quadstep_bench.runner.records import Collection, Config, Results
from quadstep_bench.tasks import TASKS, Precision, check_task

_INSTALL = "is not installed: run pip install"
_EXTRAS = {"accelerate": "trainer", "transformers": "trainer"}

try:
    import typer
    from rich.console import Console
    from rich.table import Table
except ModuleNotFoundError as missing:
    raise SystemExit(f"{missing.name} {_INSTALL} quadstep-bench") from missing

app = typer.Typer(
    help="Trains with no learning rate to choose, and measures it against the paper.",
    no_args_is_help=True,
    add_completion=False,
)

Figure = Literal["1", "2", "3", "4", "5", "all"]
DataOption = Annotated[
    Path | None,
    typer.Option(help="The folder of mnist/ and cifar10/; QUADSTEP_DATA or the hub without."),
]
EpochsOption = Annotated[int | None, typer.Option(min=1, help="The paper's by default.")]
SubsetOption = Annotated[
    int | None, typer.Option(min=1, help="How many training images to keep; all by default.")
]
PrecisionOption = Annotated[
    Precision, typer.Option(help="What models compute in; bfloat16 is by autocast.")
]
NamesOption = Annotated[str | None, typer.Option(help="Names with commas between; all by default.")]
DeviceOption = Annotated[str, typer.Option(help="Where to train: cpu, cuda, cuda:1...")]
RoundsOption = Annotated[int, typer.Option(min=1, help="How often to measure everything.")]
ConfirmOption = Annotated[
    bool, typer.Option("--confirm", help="Also the tasks that only confirm a decision.")
]
OutOption = Annotated[Path, typer.Option("--out", help="The folder of results.")]
RunsOption = Annotated[Path, typer.Option(help="The folder of runs that have not ended.")]

OUT, RUNS = Path("results"), Path("runs")


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Runs the command line, by default on the arguments of the process."""
    try:
        sys.exit(app(arguments, prog_name="quadstep-bench", standalone_mode=False))
    except typer.TyperException as error:
        _fail(error.format_message(), error.exit_code)
    except RecordError as error:
        _fail(str(error), 2)
    except OSError as error:
        _fail(str(error), 1)
    except ModuleNotFoundError as missing:
        extra = _EXTRAS.get(missing.name or "")
        package = f'"quadstep-bench[{extra}]"' if extra else "quadstep-bench"
        _fail(f"{missing.name} {_INSTALL} {package}", 1)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="The folder for records and picture.")] = Path(
        "quadstep-demo"
    ),
) -> None:
    """Trains on handwritten digits, LQA beside the paper's competitors, in under a minute."""
    from quadstep_bench import demo

    picture = demo.run(out, Console())
    print(f"The curves are drawn in {picture}, the records lie beside it.")


@app.command()
def reproduce(
    figure: Annotated[Figure, typer.Option(help="The paper's figure.")],
    data: DataOption = None,
    epochs: EpochsOption = None,
    seeds: Annotated[int, typer.Option(min=1, help="How many runs of each setting.")] = 1,
    subset: SubsetOption = None,
    precision: PrecisionOption = "float32",
    optimizers: NamesOption = None,
    workers: Annotated[int, typer.Option(min=1, help="How many runs at a time.")] = 1,
    device: DeviceOption = "cpu",
    collection: Annotated[
        str, typer.Option(help="Where the records belong; reports are written from `records`.")
    ] = "records",
    out: OutOption = OUT,
    runs: RunsOption = RUNS,
) -> None:
    """Trains the runs that a figure still lacks; stopped at any point, it goes on from there."""
    from quadstep_bench.curves import FIGURES
    from quadstep_bench.paper.runs import configs

    _check_device(device)
    names = _names(optimizers)
    with _wrong_use("--optimizers"):
        wanted = [
            config
            for number in (FIGURES if figure == "all" else [int(figure)])
            for config in configs(
                number,
                epochs=epochs,
                seeds=seeds,
                subset=subset,
                optimizers=names,
                precision=precision,
            )
        ]
    chosen = Results(out, runs).collection(collection)
    _train(wanted, chosen, workers=workers, data_root=data, device=device)


@app.command()
def lines(
    task: Annotated[str, typer.Option(help="The model and its data: mlp-mnist, lenet-cifar10...")],
    data: DataOption = None,
    epochs: EpochsOption = None,
    steps: Annotated[int, typer.Option(min=1, help="How many lines to search in a run.")] = 200,
    seed: Annotated[int, typer.Option(min=0, help="Of weights and batches.")] = 0,
    subset: SubsetOption = None,
    optimizers: NamesOption = None,
    device: DeviceOption = "cpu",
    out: OutOption = OUT,
    runs: RunsOption = RUNS,
) -> None:
    """Measures how near each rate comes to the greatest reduction along its line."""
    from quadstep_bench import lines

    _check_device(device)
    names = _names(optimizers) or CONFIGURATIONS
    with _wrong_use("--task"):
        check_task(task)
    with _wrong_use("--optimizers"):
        for name in names:
            check_configuration(name)
    configs = [
        Config(task, name, seed, epochs or TASKS[task].epochs, subset=subset) for name in names
    ]
    results = Results(out, runs)
    with Console(stderr=True).status("") as status, _wrong_use():
        for config in configs:
            lines.run(
                config,
                results,
                steps=steps,
                data_root=data,
                device=device,
                on_epoch=lambda epoch, config=config: status.update(
                    f"{config}: epoch {epoch.epoch} of {config.epochs}"
                ),
            )
    print(lines.path(results))


@app.command()
def cost(
    models: NamesOption = None,
    rounds: RoundsOption = 200,
    device: DeviceOption = "cpu",
    label: Annotated[
        str, typer.Option(help="Names the machine in the file; reports are written without one.")
    ] = "",
    out: OutOption = OUT,
    runs: RunsOption = RUNS,
) -> None:
    """Measures time and memory of LQA beside those of the optimizers it is compared with.

    Large models take fewer rounds: none begins on a model after five minutes, but the first three.
    """
    from quadstep_bench import cost

    _check_device(device)
    with _wrong_use("--models"):
        path = cost.measure(
            Results(out, runs),
            Console(),
            names=_names(models) or [*cost.WORKLOADS],
            rounds=rounds,
            device=device,
            label=label,
        )
    print(path)


@app.command()
def restore(rounds: RoundsOption = 15, out: OutOption = OUT, runs: RunsOption = RUNS) -> None:
    """Measures what a probe's return costs, by a snapshot and by subtraction."""
    from quadstep_bench import cost

    print(cost.measure_restore(Results(out, runs), Console(), rounds=rounds))


@app.command()
def memory(
    seeds: Annotated[int, typer.Option(min=1, help="How many runs of each setting.")] = 3,
    out: OutOption = OUT,
    runs: RunsOption = RUNS,
) -> None:
    """Measures the memory of a step beside AdamW's, and what low precision does to training."""
    from quadstep_bench import memory

    print(memory.measure(Results(out, runs), Console(), seeds=seeds))


@app.command()
def trainer(
    seeds: Annotated[int, typer.Option(min=1, help="How many runs of each setting.")] = 10,
    out: OutOption = OUT,
    runs: RunsOption = RUNS,
) -> None:
    """Trains a small BERT by the Trainer of Transformers and by a closure, LQA and AdamW.

    Stopped at any point, it goes on from there.
    """
    from quadstep_bench import trainer

    print(trainer.measure(Results(out, runs), Console(), seeds=seeds))


@app.command()
def suite(
    data: DataOption = None,
    tasks: NamesOption = None,
    optimizers: NamesOption = None,
    seeds: Annotated[int, typer.Option(min=1, help="How many runs of each setting.")] = 1,
    workers: Annotated[int, typer.Option(min=1, help="How many runs at a time.")] = 1,
    device: DeviceOption = "cpu",
    out: OutOption = OUT,
    runs: RunsOption = RUNS,
) -> None:
    """Trains the runs of the suite that are missing; stopped at any point, it goes on from there.

    They compare lqa-auto with hand-tuned optimizers and with other optimizers without a rate.
    """
    from quadstep_bench import suite
    from quadstep_bench.runner.environment import check_installed

    _check_device(device)
    with _wrong_use("--tasks / --optimizers"):
        wanted = suite.configs(tasks=_names(tasks), optimizers=_names(optimizers), seeds=seeds)
        check_installed({config.optimizer for config in wanted})
    collection = Results(out, runs).collection("suite")
    _train(wanted, collection, workers=workers, data_root=data, device=device)


@app.command()
def selftuning(
    data: DataOption = None,
    tasks: NamesOption = None,
    settings: Annotated[
        str | None,
        typer.Option(help="Names with commas between; `baseline` for its trials. All by default."),
    ] = None,
    confirm: ConfirmOption = False,
    seeds: Annotated[int, typer.Option(min=1, help="How many runs of each setting.")] = 3,
    workers: Annotated[int, typer.Option(min=1, help="How many runs at a time.")] = 1,
    out: OutOption = OUT,
    runs: RunsOption = RUNS,
) -> None:
    """Trains the runs of the self-tuning benchmark that are missing.

    One frozen setting for all tasks is compared with AdamW that was tuned on each. Stopped at any
    point, it goes on from there.
    """
    from quadstep_bench.selftuning.runs import execute

    with _resumable(), _wrong_use("--tasks / --settings"):
        failures = execute(
            Results(out, runs),
            Console(stderr=True),
            tasks=_names(tasks),
            settings=_names(settings),
            confirm=confirm,
            seeds=seeds,
            workers=workers,
            data_root=data,
        )
    _check_failures(failures)


@app.command()
def selftuning_time(
    data: DataOption = None,
    tasks: NamesOption = None,
    confirm: ConfirmOption = False,
    rounds: RoundsOption = 7,
    out: OutOption = OUT,
    runs: RunsOption = RUNS,
) -> None:
    """Measures the time of a step of each entrant of the self-tuning benchmark beside AdamW's."""
    from quadstep_bench.selftuning import timing

    with _resumable(), _wrong_use("--tasks"):
        path = timing.measure(
            Results(out, runs),
            Console(stderr=True),
            tasks=_names(tasks),
            confirm=confirm,
            rounds=rounds,
            data_root=data,
        )
    print(path)


@app.command()
def soak(
    steps: Annotated[int, typer.Option(min=10, help="How many steps a run takes.")] = 20_000,
    seeds: Annotated[int, typer.Option(min=1, help="How many runs without faults.")] = 3,
    out: OutOption = OUT,
    runs: RunsOption = RUNS,
) -> None:
    """Trains under injected faults: what they leave, the memory taken, the loss reached."""
    from quadstep_bench import soak

    print(soak.soak(Results(out, runs), Console(), steps=steps, seeds=seeds))


@app.command()
def report(
    results: Annotated[Path, typer.Option(help="The folder of results.")] = OUT,
    check: Annotated[
        bool, typer.Option("--check", help="Only tell whether the files there are up to date.")
    ] = False,
) -> None:
    """Writes every figure, table and verdict from the records."""
    from quadstep_bench import report, suite

    # Nothing is trained here: no lock is taken in the folder of runs.
    records = Results(results, RUNS)
    if not any(results.glob("*/*.jsonl")):
        raise typer.BadParameter(
            f"there are no records in {results}: make some with quadstep-bench reproduce, or name "
            "the folder that has them",
            param_hint="--results",
        )
    if check:
        stale = report.check(records)
        if stale:
            names = ", ".join(map(str, stale))
            raise typer.TyperException(f"out of date, run quadstep-bench report: {names}")
        return
    written = report.write(records, results)
    table = Table("claim", "the paper says", *PAPER_CONFIGURATIONS)
    for claim, found in written.verdicts:
        table.add_row(claim.id, claim.text, *(found[name].verdict for name in PAPER_CONFIGURATIONS))
    Console().print(table)
    table = Table("goal", "", "verdict", "measured")
    for goal in suite.goals(written.outcomes):
        table.add_row(goal.id, goal.text, goal.verdict, goal.measured)
    Console().print(table)
    for path in written.files:
        print(path)


def _train(wanted: Sequence[Config], collection: Collection, **options: Any) -> None:
    """Trains what is missing of some runs, and ends the command where that does not succeed."""
    from quadstep_bench.runner import parallel

    with _resumable(), _wrong_use():
        failures = parallel.execute(wanted, collection, **options)
    _check_failures(failures)


@contextmanager
def _resumable() -> Generator[None]:
    """Tells who interrupts a command that it can be taken up again."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        print("Interrupted. The same command goes on from here.", file=sys.stderr)
        raise typer.Exit(130) from interrupt


def _check_failures(failures: int) -> None:
    if failures:
        raise typer.TyperException(f"{failures} runs failed; the same command tries them again")


def _check_device(device: str) -> None:
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise typer.BadParameter(f"{device}: {error}", param_hint="--device") from error


def _names(listed: str | None) -> list[str] | None:
    return None if listed is None else [name.strip() for name in listed.split(",")]


@contextmanager
def _wrong_use(option: str | None = None) -> Generator[None]:
    """Tells what has a wrong value; a damaged record tells so itself."""
    try:
        yield
    except RecordError:
        raise
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=option) from error


def _fail(message: str, code: int) -> NoReturn:
    line = " ".join(message.split())
    Console(stderr=True).print(line, style="red", markup=False, highlight=False, soft_wrap=True)
    sys.exit(code)
