"""The faults of `scripts/plant_faults.py` can still be planted, and the tests that should catch them are there."""

import re

import pytest
from plant_faults import FAULTS, ROOT, faulty


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_can_be_planted(fault):
    assert faulty(fault) != (ROOT / fault.file).read_text()
    file, _, name = fault.test.partition("::")
    assert re.search(rf"^def {name.partition('[')[0]}\(", (ROOT / file).read_text(), re.MULTILINE)
