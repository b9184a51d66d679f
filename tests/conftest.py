"""What all folders share."""

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
