"""Loggers take metrics() as it is and give back what report has."""

import json
import math
from pathlib import Path

import pytest
from problems import classification
from training import reported, train

from quadstep import LQA

pytestmark = pytest.mark.usefixtures("offline")


def logged_steps(log):
    """Trains, and logs each step and the time before the first; returns what must be found."""
    task = classification()
    opt = LQA(task.model.parameters())
    expected = []
    for step in range(13):
        log(opt.metrics(), step)
        expected.append(reported(opt))
        train(task, opt, [step])
    assert len({row["lqa/rate"] for row in expected}) > 2
    assert math.isnan(expected[0]["lqa/loss"])
    return expected


def approximately(expected):
    """To single precision, which is what TensorBoard keeps."""
    return [pytest.approx(row, rel=1e-6, nan_ok=True) for row in expected]


def test_tensorboard():
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter("runs") as writer:

        def log(metrics, step):
            for name, value in metrics.items():
                writer.add_scalar(name, value, step)

        expected = logged_steps(log)
    events = EventAccumulator("runs").Reload()
    columns = {name: events.Scalars(name) for name in events.Tags()["scalars"]}
    rows = [{name: column[step].value for name, column in columns.items()} for step in range(13)]
    assert rows == approximately(expected)


def offline_rows(path):
    """The rows of an offline run of W&B: its log has no public reader."""
    from wandb.proto.wandb_internal_pb2 import Record

    # A header of 7 bytes, and then for each record a checksum of 4, the length in 2, the kind in 1.
    log, start = path.read_bytes(), 7
    assert len(log) < 2**15, "the log has a second block, whose records may be in parts"
    rows = []
    while start < len(log):
        end = start + 7 + int.from_bytes(log[start + 4 : start + 6], "little")
        items = Record.FromString(log[start + 7 : end]).history.item
        row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
        rows += [row] if row else []
        start = end
    return rows


@pytest.mark.slow
def test_wandb():
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    with wandb.init(project="lqa", settings={"console": "off"}) as run:
        expected = logged_steps(lambda metrics, step: run.log(metrics, step=step))
    # The run has ended before its service has written all of the log.
    wandb.teardown()
    (path,) = Path.cwd().glob("wandb/offline-run-*/*.wandb")
    rows = offline_rows(path)
    assert [row["_step"] for row in rows] == [*range(13)]
    found = [{name: row[name] for name in row if not name.startswith("_")} for row in rows]
    assert found == approximately(expected)


def test_mlflow():
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    with mlflow.start_run() as run:
        expected = logged_steps(lambda metrics, step: mlflow.log_metrics(metrics, step=step))
    client = mlflow.MlflowClient()
    names = client.get_run(run.info.run_id).data.metrics
    columns = {name: client.get_metric_history(run.info.run_id, name) for name in names}
    assert [entry.step for entry in columns["lqa/rate"]] == [*range(13)]
    rows = [{name: column[step].value for name, column in columns.items()} for step in range(13)]
    assert rows == approximately(expected)


def test_mlflow_takes_the_rates_of_several_groups():
    """It keeps a file for each name, so none may be the folder of another."""
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    task = classification()
    opt = LQA([{"params": [param]} for param in task.model.parameters()])
    with mlflow.start_run() as run:
        mlflow.log_metrics(opt.metrics())
    found = mlflow.MlflowClient().get_run(run.info.run_id).data.metrics
    assert found == pytest.approx(opt.metrics(), nan_ok=True)


def test_trackio():
    trackio = pytest.importorskip("trackio", reason="trackio is not installed")
    from trackio.sqlite_storage import SQLiteStorage

    trackio.init(project="lqa", name="run", auto_log_cpu=False, auto_log_gpu=False)
    expected = logged_steps(lambda metrics, step: trackio.log(metrics, step=step))
    trackio.finish()
    rows = SQLiteStorage.get_logs("lqa", "run")
    assert [row["step"] for row in rows] == [*range(13)]
    found = [{name: row[name] for name in row if name.startswith("lqa/")} for row in rows]
    assert found == approximately(expected)
