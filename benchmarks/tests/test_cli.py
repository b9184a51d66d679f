import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from synthetic import grid

import quadstep_bench
from quadstep_bench import cli
from quadstep_bench.optimizers import settings
from quadstep_bench.paper.claims import gather_evidence
from quadstep_bench.runner import records


@pytest.fixture
def run(capsys):
    """Runs a command and returns its exit status, output and error output."""

    def command_line(*arguments: str | Path) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return command_line


@pytest.fixture
def results(tmp_path) -> Path:
    for record in grid(1, lambda optimizer, epoch: 2.0 / (1 + epoch), epochs=2):
        records.write(record, tmp_path / "records")
    return tmp_path


@pytest.mark.parametrize(
    "command",
    [
        "",
        "demo",
        "reproduce",
        "lines",
        "cost",
        "restore",
        "suite",
        "soak",
        "figures",
        "claims",
    ],
)
def test_help(run, command):
    status, output, _ = run(*command.split(), "--help")
    assert status == 0
    assert "Usage: quadstep-bench" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["reproduce"], "Missing option '--figure'. Choose from: 1, 2, 3, 4, 5, all"),
        (["reproduce", "--figure", "6"], "--figure"),
        (["reproduce", "--figure", "1", "--epochs", "0"], "--epochs"),
        (["reproduce", "--figure", "1", "--seeds", "none"], "--seeds"),
        (["reproduce", "--figure", "1", "--workers", "0"], "--workers"),
        (
            ["reproduce", "--figure", "1", "--optimizers", "sgd-0.1,sdg"],
            "--optimizers: unknown optimizer 'sdg': choose from sgd-0.1, ",
        ),
        (["reproduce", "--figure", "1", "--device", "abacus"], "--device: abacus: "),
        (["reproduce", "--figure", "1", "--data", "nowhere"], "no folder nowhere/mnist"),
        (["lines"], "Missing option '--task'"),
        (["lines", "--task", "mlp"], "--task: unknown task 'mlp': choose from logistic-mnist, "),
        (
            ["lines", "--task", "mlp-digits", "--optimizers", "lqa,sgd-0.1"],
            "--optimizers: unknown configuration 'sgd-0.1': choose from lqa-paper, lqa, lqa-auto",
        ),
        (
            ["lines", "--task", "mlp-digits", "--epochs", "1", "--steps", "23"],
            "steps must be between 1 and 22, all that the run has: got 23",
        ),
        (["lines", "--task", "mlp-mnist", "--data", "nowhere"], "no folder nowhere/mnist"),
        (["lines", "--task", "mlp-digits", "--device", "abacus"], "--device: abacus: "),
        (["cost", "--models", "mpl"], "--models: unknown model 'mpl': choose from logis"),
        (["cost", "--rounds", "0"], "--rounds"),
        (["cost", "--device", "abacus"], "--device: abacus: "),
        (["peer"], "peer"),
        (["suite", "--tasks", "mlp"], "unknown task 'mlp': choose from logistic-mnist, "),
        (["suite", "--optimizers", "lqa-paper"], "unknown optimizer 'lqa-paper': choose"),
        (["suite", "--seeds", "0"], "--seeds"),
        (["suite", "--device", "abacus"], "--device: abacus: "),
        (["figures", "--records", "nowhere"], "--records: there are no records in nowhere: "),
        (["claims", "--records", "nowhere"], "--records: there are no records in nowhere: "),
        (["claims", "--recrods", "nowhere"], "--recrods"),
        (["repoduce"], "repoduce"),
    ],
)
def test_what_cannot_be_done_is_one_line_that_names_the_option(
    run, monkeypatch, tmp_path, arguments, message
):
    monkeypatch.chdir(tmp_path)
    status, _, errors = run(*arguments)
    assert status == 2
    assert message in errors
    assert errors.count("\n") == 1


def test_a_broken_record_is_named(run, results):
    broken = results / "records" / "logistic-mnist" / "lqa-seed0.jsonl"
    broken.write_text("{}\n")
    for command in ("figures", "claims"):
        status, _, errors = run(command, "--records", results / "records", "--out", results)
        assert status == 2
        assert str(broken) in errors
        assert errors.count("\n") == 1


def test_a_folder_that_cannot_be_written(run, results):
    (results / "file").touch()
    out = results / "file" / "out"
    status, _, errors = run("claims", "--records", results / "records", "--out", out)
    assert status == 1
    assert str(results / "file") in errors
    assert errors.count("\n") == 1


def test_reproduce_asks_for_the_runs(run, monkeypatch, tmp_path):
    from quadstep_bench.runner import parallel

    asked = {}

    def execute(wanted, **options):
        asked.update(options, wanted=list(wanted))
        return 0

    monkeypatch.setattr(parallel, "execute", execute)
    command = ["reproduce", "--figure", "all", "--data", "data", "--epochs", "3", "--seeds", "2"]
    command += ["--subset", "500", "--optimizers", "sgd-0.1, lqa", "--workers", "2"]
    command += ["--precision", "bfloat16"]
    status, _, _ = run(*command, "--out", tmp_path)
    assert status == 0
    assert len(asked["wanted"]) == 5 * 2 * 2
    assert {(config.epochs, config.subset) for config in asked["wanted"]} == {(3, 500)}
    assert {config.optimizer for config in asked["wanted"]} == {"sgd-0.1", "lqa"}
    assert {config.precision for config in asked["wanted"]} == {"bfloat16"}
    assert asked["out"] == tmp_path / "records"
    assert asked["data_root"] == Path("data")
    assert asked["workers"] == 2


@pytest.mark.parametrize(
    ("outcome", "status", "message"),
    [(3, 1, "3 runs failed"), (KeyboardInterrupt(), 130, "The same command goes on from here")],
)
def test_reproduce_that_does_not_get_through(run, monkeypatch, outcome, status, message):
    from quadstep_bench.runner import parallel

    def execute(wanted, **options):
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    monkeypatch.setattr(parallel, "execute", execute)
    ended, _, errors = run("reproduce", "--figure", "1")
    assert ended == status
    assert message in errors


def test_lines(run, tmp_path):
    command = ["lines", "--task", "mlp-digits", "--subset", "100", "--epochs", "1", "--steps", "2"]
    status, output, _ = run(*command, "--optimizers", "lqa, lqa-auto", "--out", tmp_path)
    assert status == 0
    assert [Path(line) for line in output.splitlines()] == [
        tmp_path / "lines" / f"mlp-digits-subset100-{name}-seed0.jsonl"
        for name in ("lqa", "lqa-auto")
    ]
    assert len(gather_evidence([], tmp_path).lines) == 4


def test_bench(run, monkeypatch, tmp_path):
    from quadstep_bench import cost, soak

    monkeypatch.setattr(cost, "TRIPS", (1,))
    monkeypatch.setattr(soak, "SAMPLES", 1)
    out = tmp_path / "bench"
    for command in ("cost --models logistic --rounds 1", "restore --rounds 1", "soak --steps 20"):
        status, output, _ = run(*command.split(), "--out", out)
        assert status == 0
        assert output.splitlines()[-1] == str(out / f"{command.split()[0]}.json")
    assert {row["model"] for row in gather_evidence([], tmp_path).costs} == {"logistic"}


def test_bench_suite(run, monkeypatch, tmp_path):
    from quadstep_bench.runner import parallel, training

    def execute(wanted, *, out, **options):
        for config in wanted:
            training.run(config, out=out)
        return 0

    monkeypatch.setattr(parallel, "execute", execute)
    command = ["suite", "--tasks", "mlp-digits", "--out", tmp_path]
    status, output, _ = run(*command, "--optimizers", "lqa-auto, adamw-0.003")
    assert status == 0
    names = ("SUITE.md", "suite.json", "figures/suite.png", "figures/suite.svg")
    assert output.split()[-4:] == [str(tmp_path / name) for name in names]
    assert "AdamW 0.003" in (tmp_path / "SUITE.md").read_text()


def test_a_peer_that_is_not_installed_stops_the_suite_at_once(run, monkeypatch, tmp_path):
    monkeypatch.setattr(records, "_version", lambda package: None)
    status, _, errors = run("suite", "--out", tmp_path)
    assert status == 2
    assert 'run pip install "quadstep-bench[peers]", or leave out cocob, dadapt-adam, ' in errors
    assert errors.count("\n") == 1


def test_claims(run, results):
    status, output, _ = run("claims", "--records", results / "records", "--out", results)
    assert status == 0
    assert "not run" in output
    assert (results / "CLAIMS.md").exists()
    assert (results / "claims.json").exists()


def test_figures_and_claims_do_without_torch(results):
    code = (
        "import sys; from quadstep_bench.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as ended: sys.exit(ended.code or 'torch' in sys.modules)"
    )
    for command in ("figures", "claims"):
        arguments = [command, "--records", results / "records", "--out", results / "out"]
        done = subprocess.run([sys.executable, "-c", code, *arguments], check=False)
        assert done.returncode == 0
    assert (results / "out" / "figure-1.png").exists()


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_without_the_extra_the_command_says_what_to_install(missing):
    code = f"import sys; sys.modules[{missing!r}] = None; import quadstep_bench.cli"
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 1
    assert "pip install quadstep-bench" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_library_of_the_extra_that_is_missing_is_named(run, results, monkeypatch):
    # As if nothing had imported it yet.
    monkeypatch.delitem(sys.modules, "quadstep_bench.figures", raising=False)
    monkeypatch.delattr(quadstep_bench, "figures", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    status, _, errors = run("figures", "--records", results / "records", "--out", results)
    assert status == 1
    assert errors == "matplotlib is not installed: run pip install quadstep-bench\n"


def test_demo(run, monkeypatch, tmp_path):
    from quadstep_bench import demo

    shown = ("adam-0.01", "sgd-0.001", "lqa-auto")
    assert set(shown) < set(settings())
    monkeypatch.setattr(demo, "settings", lambda: shown)
    monkeypatch.setitem(demo.TASKS, demo.TASK, replace(demo.TASKS[demo.TASK], epochs=3))
    threads = torch.get_num_threads()
    try:
        status, output, _ = run("demo", "--out", tmp_path)
    finally:
        torch.set_num_threads(threads)
    assert status == 0
    assert output.index("lqa-auto") < output.index("SGD 0.001")
    assert (tmp_path / "demo.png").exists()
    assert {record.config.optimizer for record in records.read_all(tmp_path / "records")} == set(
        shown
    )
