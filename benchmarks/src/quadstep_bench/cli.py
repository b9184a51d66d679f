"""The command line: the demonstration, the paper's experiments, and what is drawn from them."""

import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

from quadstep_bench.optimizers import CONFIGURATIONS, check_configuration

# Commands import the rest themselves: not all need torch, which takes long.
from quadstep_bench.runner.records import Config, Record, RecordError, check_installed, read_all
from quadstep_bench.tasks import TASKS, Precision, check_task

_INSTALL = "is not installed: run pip install quadstep-bench"

try:
    import typer
    from rich.console import Console
    from rich.table import Table
except ModuleNotFoundError as missing:
    raise SystemExit(f"{missing.name} {_INSTALL}") from missing

app = typer.Typer(
    help="Trains with no learning rate to choose, and measures it against the paper.",
    no_args_is_help=True,
    add_completion=False,
)

Figure = Literal["1", "2", "3", "4", "5", "all"]
RecordsOption = Annotated[Path, typer.Option("--records", help="The folder of records to read.")]
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
BenchOption = Annotated[Path, typer.Option("--out", help="The folder for the measurement.")]
ResultsOption = Annotated[Path, typer.Option(help="The folder for results.")]


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
        _fail(f"{missing.name} {_INSTALL}", 1)


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
    out: ResultsOption = Path("results"),
) -> None:
    """Trains the runs that a figure still lacks; stopped at any point, it goes on from there."""
    from quadstep_bench.curves import FIGURES
    from quadstep_bench.paper import runs

    _check_device(device)
    names = _names(optimizers)
    with _wrong_use("--optimizers"):
        wanted = [
            config
            for number in (FIGURES if figure == "all" else [int(figure)])
            for config in runs.configs(
                number,
                epochs=epochs,
                seeds=seeds,
                subset=subset,
                optimizers=names,
                precision=precision,
            )
        ]
    _train(wanted, workers=workers, data_root=data, out=out / "records", device=device)


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
    out: ResultsOption = Path("results"),
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
    with Console(stderr=True).status("") as status, _wrong_use():
        for config in configs:
            path = lines.run(
                config,
                steps=steps,
                data_root=data,
                out=out / "lines",
                device=device,
                on_epoch=lambda epoch, config=config: status.update(
                    f"{config}: epoch {epoch.epoch} of {config.epochs}"
                ),
            )
            print(path)


@app.command()
def cost(
    models: NamesOption = None,
    rounds: RoundsOption = 200,
    device: DeviceOption = "cpu",
    out: BenchOption = Path("results/bench"),
) -> None:
    """Measures time and memory of LQA beside those of the optimizers it is compared with.

    Large models take fewer rounds: none begins on a model after five minutes, but the first three.
    """
    from quadstep_bench import cost

    _check_device(device)
    with _wrong_use("--models"):
        path = cost.measure(
            out, Console(), names=_names(models) or [*cost.WORKLOADS], rounds=rounds, device=device
        )
    print(path)


@app.command()
def restore(rounds: RoundsOption = 15, out: BenchOption = Path("results/bench")) -> None:
    """Measures what a probe's return costs, by a snapshot and by subtraction."""
    from quadstep_bench import cost

    print(cost.measure_restore(out, Console(), rounds=rounds))


@app.command()
def suite(
    data: DataOption = None,
    tasks: NamesOption = None,
    optimizers: NamesOption = None,
    seeds: Annotated[int, typer.Option(min=1, help="How many runs of each setting.")] = 1,
    workers: Annotated[int, typer.Option(min=1, help="How many runs at a time.")] = 1,
    device: DeviceOption = "cpu",
    out: ResultsOption = Path("results"),
) -> None:
    """Judges lqa-auto against hand-tuned optimizers and peers; goes on from where it was stopped.

    Trains what is missing, then writes SUITE.md, suite.json and the picture from all the records
    that there are.
    """
    from quadstep_bench import suite

    _check_device(device)
    with _wrong_use("--tasks / --optimizers"):
        wanted = suite.configs(tasks=_names(tasks), optimizers=_names(optimizers), seeds=seeds)
        check_installed({config.optimizer for config in wanted})
    folder = out / "suite"
    _train(wanted, workers=workers, data_root=data, out=folder, device=device)

    from quadstep_bench import figures

    outcomes = suite.judge(_read(folder))
    table = Table("goal", "", "verdict", "measured")
    for goal in suite.goals(outcomes):
        table.add_row(goal.id, goal.text, goal.verdict, goal.measured)
    Console().print(table)
    written = suite.write(outcomes, out)
    if outcomes:
        written += figures.draw_suite(outcomes, out / "figures")
    for path in written:
        print(path)


@app.command()
def soak(
    steps: Annotated[int, typer.Option(min=10, help="How many steps a run takes.")] = 20_000,
    seeds: Annotated[int, typer.Option(min=1, help="How many runs without faults.")] = 3,
    out: BenchOption = Path("results/bench"),
) -> None:
    """Trains under injected faults: what they leave, the memory taken, the loss reached."""
    from quadstep_bench import soak

    print(soak.soak(out, Console(), steps=steps, seeds=seeds))


@app.command()
def figures(
    records: RecordsOption = Path("results/records"),
    out: Annotated[Path, typer.Option(help="The folder for pictures.")] = Path("results/figures"),
) -> None:
    """Draws the paper's figures, and the rates measured, from the records alone."""
    from quadstep_bench import figures

    for path in figures.draw(_read(records), out):
        print(path)


@app.command()
def claims(
    records: RecordsOption = Path("results/records"),
    out: Annotated[Path, typer.Option(help="The folder for CLAIMS.md and claims.json.")] = Path(
        "results"
    ),
) -> None:
    """Decides the paper's claims from the records, and from measurements beside the results."""
    from quadstep_bench.paper import claims

    evidence = claims.gather_evidence(_read(records), out)
    verdicts = claims.measure(evidence)
    table = Table("claim", "the paper says", *CONFIGURATIONS)
    for claim, results in verdicts:
        table.add_row(claim.id, claim.text, *(results[name].verdict for name in CONFIGURATIONS))
    Console().print(table)
    for path in claims.write(evidence, verdicts, out):
        print(path)


def _train(wanted: Sequence[Config], **options: Any) -> None:
    """Trains what is missing of some runs, and ends the command where that does not succeed."""
    from quadstep_bench.runner import parallel

    try:
        with _wrong_use():
            failures = parallel.execute(wanted, **options)
    except KeyboardInterrupt as interrupt:
        print("Interrupted. The same command goes on from here.", file=sys.stderr)
        raise typer.Exit(130) from interrupt
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
    """Tells what has a wrong value; a broken record tells so itself."""
    try:
        yield
    except RecordError:
        raise
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=option) from error


def _read(folder: Path) -> list[Record]:
    records = read_all(folder)
    if not records:
        raise typer.BadParameter(
            f"there are no records in {folder}: make some with quadstep-bench reproduce, or name "
            "the folder that has them",
            param_hint="--records",
        )
    return records


def _fail(message: str, code: int) -> NoReturn:
    line = " ".join(message.split())
    Console(stderr=True).print(line, style="red", markup=False, highlight=False, soft_wrap=True)
    sys.exit(code)
