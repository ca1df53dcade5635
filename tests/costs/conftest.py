import pytest

from coadvise.costs.count import KINDS
from coadvise.costs.machine import Calibration, Views
from coadvise.costs.rates import Rate, Rates


@pytest.fixture(scope="session")
def calibration() -> Calibration:
    """A made machine of two cores: 10 GFLOP/s and 5 GB/s on each, whatever the operation."""
    rate = Rate(1e-5, 1e-10, 2e-10)
    one = Rates(dict.fromkeys(KINDS, rate), issue=5e-6)
    two = Rates(dict.fromkeys(KINDS, rate), issue=5e-6, scale=0.5)
    views = {"light": Views(1e-5, 1e-8), "deit": Views(1e-3, 1e-7), "presized": Views(5e-4, 5e-8)}
    return Calibration(
        "made", False, 8e9, {f"{p}, {n}": r for p in ("float32", "bfloat16") for n, r in ((1, one), (2, two))}, views
    )
