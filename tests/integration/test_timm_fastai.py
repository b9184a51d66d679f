"""timm's registry and fastai's learner make LQA. Both need torchvision, which is not declared."""

import runpy
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from quadstep import LQA

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_timm_makes_it_by_name():
    pytest.importorskip("timm", reason="timm is not installed")
    made = runpy.run_path(str(EXAMPLES / "timm_by_name.py"))
    assert isinstance(made["opt"], LQA)
    assert [group["weight_decay"] for group in made["opt"].param_groups] == [0.0, 0.05]
    assert made["loss"] < 0.6
    assert made["opt"].report.backwards == 0


def test_a_learner_of_fastai_trains():
    pytest.importorskip("fastai", reason="fastai is not installed")
    with pytest.warns(UserWarning, match="lr was set"):
        made = runpy.run_path(str(EXAMPLES / "fastai_learner.py"))
    assert made["loss"] < 0.3


def test_fastais_own_losses():
    pytest.importorskip("fastai", reason="fastai is not installed")
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner
    from fastai.losses import CrossEntropyLossFlat
    from fastai.optimizer import OptimWrapper

    inputs = torch.randn(256, 10)
    data = DataLoader(TensorDataset(inputs, inputs[:, :3].argmax(1)), 32)
    model, loss = torch.nn.Linear(10, 3), CrossEntropyLossFlat()

    def lqa(params, lr=None):
        return OptimWrapper(params, LQA, model=model, criterion=loss.func, every=1)

    learner = Learner(DataLoaders(data, data), model, loss_func=loss, opt_func=lqa)
    with pytest.warns(UserWarning, match="lr was set"):
        learner.fit(2)
    assert learner.opt.opt.report.forwards >= 1
    assert learner.opt.opt.report.backwards == 0
