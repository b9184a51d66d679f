"""What all folders share."""

import sys

import pytest
import torch
from configurations import CONFIGURATIONS
from hypothesis import settings

torch.set_num_threads(1)
# Other processes may hold the processor for longer than any deadline.
settings.register_profile("shared machine", deadline=None)
settings.load_profile("shared machine")


@pytest.fixture(params=CONFIGURATIONS)
def configuration(request):
    """Builds each optimizer in turn from parameters."""
    return CONFIGURATIONS[request.param]


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """Makes loggers write into a temporary folder and send nothing."""
    monkeypatch.chdir(tmp_path)
    variables = {
        "MLFLOW_ALLOW_FILE_STORE": "true",  # the other stores need the full package
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_TRACKING_URI": f"file:{tmp_path}/mlruns",
        "TRACKIO_DIR": f"{tmp_path}/trackio",
        "WANDB_CACHE_DIR": f"{tmp_path}/cache",
        "WANDB_ERROR_REPORTING": "false",
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    yield
    if "wandb" in sys.modules:
        # Its service runs in a separate process.
        sys.modules["wandb"].teardown()
