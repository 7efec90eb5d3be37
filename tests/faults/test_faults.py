"""The faults of scenarios.py, a few repetitions of each; `python -m tests.faults` runs as many as you like."""

import pytest

from .scenarios import FAULTS
from .world import make_worlds


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    return make_worlds(tmp_path_factory.mktemp("faults"))


@pytest.mark.parametrize("name", FAULTS)
def test_fault(fresh, name):
    done = sum(1 for _ in FAULTS[name](fresh, 4))
    if not done:
        pytest.skip("needs the right to mount a tmpfs")
