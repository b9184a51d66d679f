import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from synthetic import collection_in, grid

import quadstep_bench
from quadstep_bench import cli
from quadstep_bench.optimizers import settings
from quadstep_bench.runner import environment
from quadstep_bench.runner.files import read_rows
from quadstep_bench.runner.records import Results


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
        collection_in(tmp_path).add(record)
    return tmp_path / "results"


@pytest.mark.parametrize(
    "command",
    [
        "",
        "demo",
        "reproduce",
        "lines",
        "cost",
        "memory",
        "trainer",
        "restore",
        "suite",
        "selftuning",
        "selftuning-time",
        "soak",
        "report",
    ],
)
def test_help(run, command):
    status, output, _ = run(*command.split(), "--help")
    assert status == 0
    assert "Usage: quadstep-bench" in output


ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_the_documents_name_commands_and_options_that_exist(run):
    lines = [line for page in DOCUMENTS for line in page.read_text().splitlines()]
    named = [
        re.findall(r"quadstep-bench ([a-z]+)((?: --[a-z]+(?: [\w./-]+)?)*)", line) for line in lines
    ]
    commands = {command: set() for found in named for command, _ in found}
    for found in named:
        for command, options in found:
            commands[command].update(re.findall(r"--[a-z]+", options))
    assert len(commands) > 6
    for command, options in commands.items():
        status, helped, _ = run(command, "--help")
        assert status == 0, command
        assert options <= set(re.findall(r"--[a-z]+", helped)), command


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
        (["report", "--results", "nowhere"], "--results: there are no records in nowhere: "),
        (["report", "--reslts", "nowhere"], "--reslts"),
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


def test_a_damaged_record_is_named(run, results):
    damaged = results / "records" / "logistic-mnist.jsonl"
    damaged.write_text("{}\n")
    status, _, errors = run("report", "--results", results)
    assert status == 2
    assert str(damaged) in errors
    assert errors.count("\n") == 1


def test_a_folder_that_cannot_be_written(run, tmp_path):
    (tmp_path / "file").touch()
    status, _, errors = run("restore", "--rounds", "1", "--out", tmp_path / "file" / "out")
    assert status == 1
    assert str(tmp_path / "file") in errors
    assert errors.count("\n") == 1


def test_reproduce_asks_for_the_runs(run, monkeypatch, tmp_path):
    from quadstep_bench.runner import parallel

    asked = {}

    def execute(wanted, collection, **options):
        asked.update(options, wanted=list(wanted), collection=collection)
        return 0

    monkeypatch.setattr(parallel, "execute", execute)
    command = ["reproduce", "--figure", "all", "--data", "data", "--epochs", "3", "--seeds", "2"]
    command += ["--subset", "500", "--optimizers", "sgd-0.1, lqa", "--workers", "2"]
    command += ["--precision", "bfloat16", "--collection", "pilot", "--runs", tmp_path / "runs"]
    status, _, _ = run(*command, "--out", tmp_path)
    assert status == 0
    assert len(asked["wanted"]) == 5 * 2 * 2
    assert {(config.epochs, config.subset) for config in asked["wanted"]} == {(3, 500)}
    assert {config.optimizer for config in asked["wanted"]} == {"sgd-0.1", "lqa"}
    assert {config.precision for config in asked["wanted"]} == {"bfloat16"}
    assert asked["collection"] == Results(tmp_path, tmp_path / "runs").collection("pilot")
    assert asked["data_root"] == Path("data")
    assert asked["workers"] == 2


@pytest.mark.parametrize(
    ("outcome", "status", "message"),
    [(3, 1, "3 runs failed"), (KeyboardInterrupt(), 130, "The same command goes on from here")],
)
def test_reproduce_that_does_not_get_through(run, monkeypatch, outcome, status, message):
    from quadstep_bench.runner import parallel

    def execute(wanted, collection, **options):
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    monkeypatch.setattr(parallel, "execute", execute)
    ended, _, errors = run("reproduce", "--figure", "1")
    assert ended == status
    assert message in errors


def test_lines(run, tmp_path):
    command = ["lines", "--task", "mlp-digits", "--subset", "100", "--epochs", "1", "--steps", "2"]
    command += ["--out", tmp_path, "--runs", tmp_path / "runs"]
    status, output, _ = run(*command, "--optimizers", "lqa, lqa-auto")
    assert status == 0
    assert output.splitlines() == [str(tmp_path / "lines.jsonl")]
    rows = read_rows(tmp_path / "lines.jsonl")
    assert [(row["optimizer"], len(row["step"])) for row in rows] == [("lqa", 2), ("lqa-auto", 2)]


@pytest.mark.slow
def test_bench(run, monkeypatch, tmp_path):
    from quadstep_bench import cost, soak

    monkeypatch.setattr(cost, "TRIPS", (1,))
    monkeypatch.setattr(soak, "SAMPLES", 1)
    out = ["--out", tmp_path, "--runs", tmp_path / "runs"]
    command = ["cost", "--models", "logistic", "--rounds", "1"]
    for label, name in (("", "cost"), ("cuda", "cost-cuda")):
        status, output, _ = run(*command, "--label", label, *out)
        assert status == 0
        assert output.splitlines()[-1] == str(tmp_path / "bench" / f"{name}.json")
    for command in (["restore", "--rounds", "1"], ["soak", "--steps", "20"]):
        status, output, _ = run(*command, *out)
        assert status == 0
        assert output.splitlines()[-1] == str(tmp_path / "bench" / f"{command[0]}.json")


def test_suite(run, monkeypatch, tmp_path):
    from quadstep_bench.runner import parallel, training

    def execute(wanted, collection, **options):
        for config in wanted:
            training.run(config, collection)
        return 0

    monkeypatch.setattr(parallel, "execute", execute)
    command = ["suite", "--tasks", "mlp-digits", "--out", tmp_path, "--runs", tmp_path / "runs"]
    status, _, _ = run(*command, "--optimizers", "lqa-auto, adamw-0.003")
    assert status == 0
    status, output, _ = run("report", "--results", tmp_path)
    assert status == 0
    names = ("SUITE.md", "suite.json", "figures/suite.png", "figures/suite.svg")
    assert output.split()[-4:] == [str(tmp_path / name) for name in names]
    assert "AdamW 0.003" in (tmp_path / "SUITE.md").read_text()


def test_a_peer_that_is_not_installed_stops_the_suite_at_once(run, monkeypatch, tmp_path):
    monkeypatch.setattr(environment, "version", lambda package: None)
    status, _, errors = run("suite", "--out", tmp_path)
    assert status == 2
    assert 'run pip install "quadstep-bench[peers]", or leave out cocob, dadapt-adam, ' in errors
    assert errors.count("\n") == 1


def test_report(run, results):
    status, output, _ = run("report", "--results", results)
    assert status == 0
    assert "not run" in output
    assert {path.name for path in results.iterdir()} == {
        *("CLAIMS.md", "SUITE.md", "claims.json", "suite.json"),
        *("environments.json", "figures", "records"),
    }
    assert run("report", "--results", results, "--check")[0] == 0
    page = results / "CLAIMS.md"
    page.write_text(page.read_text().replace("**holds**", "**fails**", 1))
    status, _, errors = run("report", "--results", results, "--check")
    assert status == 1
    assert errors == f"out of date, run quadstep-bench report: {page}\n"


def test_the_report_does_without_torch(results):
    code = (
        "import sys; from quadstep_bench.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as ended: sys.exit(ended.code or 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, "report", "--results", results], check=False)
    assert done.returncode == 0
    assert (results / "figures" / "figure-1.png").exists()


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_without_the_extra_the_command_says_what_to_install(missing):
    code = f"import sys; sys.modules[{missing!r}] = None; import quadstep_bench.cli"
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 1
    assert "pip install quadstep-bench" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_library_of_the_extra_that_is_missing_is_named(run, results, monkeypatch):
    # As if nothing had imported it yet.
    for name in ("report", "figures"):
        monkeypatch.delitem(sys.modules, f"quadstep_bench.{name}", raising=False)
        monkeypatch.delattr(quadstep_bench, name, raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    status, _, errors = run("report", "--results", results)
    assert status == 1
    assert errors == "matplotlib is not installed: run pip install quadstep-bench\n"


def test_an_extra_that_is_not_installed(run, monkeypatch, tmp_path):
    monkeypatch.delitem(sys.modules, "quadstep_bench.trainer", raising=False)
    monkeypatch.delattr(quadstep_bench, "trainer", raising=False)
    monkeypatch.setitem(sys.modules, "transformers", None)
    status, _, errors = run("trainer", "--out", tmp_path)
    assert status == 1
    assert errors == 'transformers is not installed: run pip install "quadstep-bench[trainer]"\n'


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
    records = Results(tmp_path, tmp_path / "runs").collection("records").read_all()
    assert {record.config.optimizer for record in records} == set(shown)
