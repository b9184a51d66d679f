"""What all folders share."""

import pytest
import torch
from configurations import CONFIGURATIONS

torch.set_num_threads(1)


@pytest.fixture(params=CONFIGURATIONS)
def configuration(request):
    """Builds each optimizer in turn from parameters."""
    return CONFIGURATIONS[request.param]
