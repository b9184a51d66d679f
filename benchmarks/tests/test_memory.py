import json
from functools import partial

import pytest
import torch
from rich.console import Console
from synthetic import results_in

from quadstep_bench import memory, report
from quadstep_bench.tasks import models


def test_memory(tmp_path, monkeypatch):
    # Activations are few beside the parameters.
    monkeypatch.setattr(memory, "LENGTH", 16)
    small = partial(models.transformer, (memory.LENGTH,), width=128, layers=2)
    monkeypatch.setattr(memory, "transformer", small)
    monkeypatch.setattr(memory, "SEQUENCES", (1,))
    monkeypatch.setattr(memory, "TASKS", ("mlp-digits-batch512",))
    monkeypatch.setattr(memory, "DTYPES", ((torch.float32, None), (torch.float32, torch.bfloat16)))
    results = results_in(tmp_path)
    path = memory.measure(results, Console(quiet=True), seeds=1)
    measured = json.loads(path.read_text())
    rows = {row["setting"]: row for row in measured["peaks"]}
    assert [*rows] == [*memory.SETTINGS]
    adamw, lqa, low, moved, both, gradient, least, _ = rows.values()
    assert adamw["state"] == pytest.approx(lqa["state"], rel=1e-3)
    assert low["state"] == both["state"] == lqa["state"] / 2
    assert gradient["state"] == pytest.approx(adamw["state"] / 2, rel=1e-3)
    assert least["state"] == pytest.approx(adamw["state"] / 4, rel=1e-3)
    assert lqa["peak"] > gradient["peak"] > least["peak"] > 1.0
    assert lqa["peak"] > max(low["peak"], moved["peak"]) > both["peak"] > 1.0
    assert {row["state_dtype"] for row in measured["losses"]} == {None, "bfloat16"}
    assert all(0.0 < row["loss"] < 0.5 for row in measured["losses"])
    assert report.write(results, tmp_path / "pages").files[-1].name == "MEMORY.md"
    page = (tmp_path / "pages" / "MEMORY.md").read_text()
    assert f"| `AdamW(params)` | {adamw['peak']:.2f} |" in page
    assert "| mlp-digits-batch512 |" in page
