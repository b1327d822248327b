"""Every kernel against its reference, over shapes, dtypes, layouts and groups drawn at random."""

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.gpu.check import CHECKS, check, runnable


@pytest.mark.parametrize("name", CHECKS)
@settings(
    max_examples=80, deadline=None, derandomize=True, database=None,
    phases=[Phase.generate],  # a smaller seed is no smaller case
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(seed=st.integers(0, 2**31))
def test_kernels_equal_their_references(name, device, seed):
    if name not in runnable():
        pytest.skip(f"this device has no instructions for {name}")
    check(name, seed, device)
