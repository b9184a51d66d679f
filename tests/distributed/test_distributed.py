"""LQA on several processes."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from launches import LAUNCHES, SECONDS, launch_all

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    return launch_all(tmp_path_factory.mktemp("distributed"))


@pytest.mark.parametrize(
    ("launch", "check"), [(launch, check) for launch in LAUNCHES for check in LAUNCHES[launch][1]]
)
def test_on_ranks(outcomes, launch, check):
    failures = [
        outcome.get(check, "did not finish: " + next(filter(None, outcome.values()), ""))
        for outcome in outcomes[launch]
    ]
    assert not any(failures), "\n".join(
        f"rank {index}: {failure}" for index, failure in enumerate(failures)
    )


def test_the_page_on_distributed_training_runs_as_it_stands(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "recipes" / "distributed.md").read_text()
    script = tmp_path / "train.py"
    script.write_text(page.split("```python\n")[1].split("```")[0])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*torchrun, "--nproc-per-node", "2", script],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    # Processes may write into each other's lines.
    rates = re.findall(r"rate ([\d.e-]+)", done.stdout)
    assert len(rates) == 2
    assert rates[0] == rates[1]
