"""Lightning's checkpoints and its closure, with the module of docs/recipes/lightning.md."""

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

PAGE = Path(__file__).parents[2] / "docs" / "recipes" / "lightning.md"
TASK, EXAMPLE = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
LIGHTNING = EXAMPLE.split("trainer = lightning.Trainer")[0]

needs_lightning = pytest.mark.skipif(
    find_spec("lightning") is None, reason="lightning is not installed"
)


def run(program, folder):
    """Runs a program in a separate process; returns what it printed."""
    ran = subprocess.run(
        [sys.executable, "-c", program], cwd=folder, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    return ran.stdout


CHECKPOINTS = """
import copy, warnings
from pathlib import Path
from lightning.pytorch.callbacks import ModelCheckpoint

warnings.simplefilter("ignore")


class Measured(Module):
    automatic_optimization = AUTOMATIC

    def training_step(self, batch, index):
        if not self.automatic_optimization:
            return super().training_step(batch, index)
        x, y = batch
        return cross_entropy(self.model(x), y)

    def validation_step(self, batch, _):
        x, y = batch
        self.log("validation", cross_entropy(self.model(x), y))


def fit(epochs, kept, resumed=None):
    torch.manual_seed(0)
    measured = Measured(copy.deepcopy(model))
    saving = ModelCheckpoint(kept, "{epoch}-{validation:.9f}", monitor="validation", save_top_k=-1)
    trainer = lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, callbacks=[saving],
        enable_progress_bar=False, num_sanity_val_steps=SANITY,
    )
    batches = torch.utils.data.DataLoader(data, 64)
    trainer.fit(measured, batches, held_out, ckpt_path=resumed)
    return measured, trainer, saving


held_out = torch.utils.data.DataLoader(data, 512)
measured, trainer, saving = fit(4, "uninterrupted")
files = sorted(Path("uninterrupted").iterdir())
assert len(files) == 4
for file in files:
    reported = float(file.stem.split("validation=")[1])
    other = Measured(copy.deepcopy(model))
    other.load_state_dict(torch.load(file, weights_only=True)["state_dict"])
    scored = cross_entropy(other.model(inputs), labels).item()
    assert abs(scored - reported) < 1e-6, (scored, reported)
    trainer = lightning.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    (row,) = trainer.validate(Measured(copy.deepcopy(model)), held_out, ckpt_path=file)
    assert abs(row["validation"] - reported) < 1e-6, (row, reported)

# Goes on bit for bit from what was saved after validation.
resumed, *_ = fit(4, "resumed", next(file for file in files if "epoch=1-" in file.name))
for one, other in zip(measured.parameters(), resumed.parameters()):
    assert torch.equal(one, other)
print([float(param.double().sum()) for param in measured.parameters()])
"""


@pytest.mark.slow
@needs_lightning
@pytest.mark.parametrize("automatic", [False, True])
def test_lightnings_checkpoints_score_what_was_reported(automatic, tmp_path):
    """And its sanity check before the first epoch changes nothing."""
    sums = []
    for sanity in (0, 2):
        folder = tmp_path / str(sanity)
        folder.mkdir()
        checked = CHECKPOINTS.replace("AUTOMATIC", str(automatic)).replace("SANITY", str(sanity))
        sums.append(run(TASK + LIGHTNING + checked, folder).splitlines()[-1])
    assert sums[0] == sums[1]


@pytest.mark.slow
@needs_lightning
def test_lightnings_own_closure_is_not_warned_of(tmp_path):
    program = """
class Automatic(Module):
    automatic_optimization = True

    def training_step(self, batch, _):
        x, y = batch
        return cross_entropy(self.model(x), y)


import warnings

trainer = lightning.Trainer(
    max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False
)
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    trainer.fit(Automatic(model), torch.utils.data.DataLoader(data, 64))
assert not [warning for warning in seen if "backward" in str(warning.message)]
assert trainer.optimizers[0].report.backwards >= 1
"""
    run(TASK + LIGHTNING + program, tmp_path)
