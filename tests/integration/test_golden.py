import json

import pytest
from golden import CONFIGURATIONS, RECORD, train


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_ordinary_training_takes_the_recorded_steps(name):
    recorded = json.loads(RECORD.read_text())[name]
    trained = train(name)
    assert trained["losses"] == pytest.approx(recorded["losses"], rel=1e-9)
    assert trained["rates"] == pytest.approx(recorded["rates"], rel=1e-9)
