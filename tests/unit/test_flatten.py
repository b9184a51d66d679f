import math

import pytest

from quadstep.checkpoint import flatten, unflatten
from quadstep.controllers import TrustRegionController, VertexController
from quadstep.quadratic import LineSamples


@pytest.mark.parametrize("controller", [VertexController(), TrustRegionController()])
def test_states_are_plain_scalars_under_dotted_keys(controller):
    state = controller.state_type()
    samples = LineSamples(0.1, 0.9, 1.0, 1.2, slope=math.nan)
    state, _ = controller.update(state, 0.1, samples)
    flat = flatten(state, "lqa.controller.")
    assert {type(value) for value in flat.values()} <= {int, float, bool}
    assert flat["lqa.controller.quadratic.slope"] == state.quadratic.slope
    assert flat["lqa.controller.fits"] == state.fits > 0
    assert unflatten(type(state), flat, "lqa.controller.") == state


def test_a_missing_key_is_named():
    state = VertexController().state_type()
    with pytest.raises(KeyError, match=r"lqa\.quadratic\.slope"):
        unflatten(type(state), {"lqa.fits": 0}, "lqa.")
