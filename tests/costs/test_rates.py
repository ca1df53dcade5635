"""Rates are found again from steps that were made with them; GPUs are found by their names."""

import numpy as np
import pytest

from coadvise.costs.count import OTHER, PRODUCT, Counted, Work
from coadvise.costs.gpus import GPUS, gpu_named, gpu_of
from coadvise.costs.rates import Rate, Rates, Timed, fit
from coadvise.errors import UserError

TRUE = {PRODUCT: Rate(2e-5, 1e-11, 3e-11), OTHER: Rate(1e-5, 0.0, 1e-10)}


def steps(rates: Rates) -> list[Timed]:
    rng = np.random.default_rng(0)
    found = []
    for size in (1, 3, 10, 30):
        single, work = [], {}
        for kind in TRUE:
            for flops, moved in rng.uniform(1e5, 1e8, (20, 2)) * size:
                one = Work(1, flops * (kind == PRODUCT), moved)
                single.append((kind, one, TRUE[kind].seconds(one)))
                work[kind] = work.get(kind, Work()).plus(one)
        counted = Counted(work, 100.0 * size, 0, 0, 0, 0)
        found.append(Timed(rates.seconds(counted), counted, single))
    return found


def test_rates_are_found_again() -> None:
    true = Rates(TRUE, issue=4e-6, scale=1.2)
    found = fit(steps(true), overlapped=False)
    assert found.issue == pytest.approx(true.issue, rel=1e-3)
    assert found.scale == pytest.approx(true.scale, rel=1e-3)
    for kind, rate in TRUE.items():
        assert found.kinds[kind] == pytest.approx(rate, rel=1e-3, abs=1e-15)
    assert Rates.of(found.plain()) == found


def test_a_device_that_computes_while_operations_are_issued_takes_the_longer_of_both() -> None:
    counted = Counted({OTHER: Work(10, 0, 1e9)}, 1000, 0, 0, 0, 0)
    rates = Rates({OTHER: Rate(0, 0, 1e-9)}, issue=2e-3, overlapped=True)
    assert rates.seconds(counted) == 2.0
    assert Rates(rates.kinds, issue=1e-4, overlapped=True).seconds(counted) == pytest.approx(1.0)
    assert Rates(rates.kinds, issue=1e-4).seconds(counted) == pytest.approx(1.1)


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("h100", "H100"), ("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA H200", "H200"), ("a100", "A100 40 GB"),
        ("NVIDIA A100-SXM4-80GB", "A100 80 GB"), ("nvidia a10", "A10"), ("L4", "L4"), ("Tesla T4", "T4"),
        ("v100", "V100 32 GB"), ("NVIDIA GeForce RTX 4090", "RTX 4090"), ("rtx3090", "RTX 3090"),
    ],
)  # fmt: skip
def test_gpus_by_any_name(given: str, name: str) -> None:
    assert gpu_named(given).name == name


@pytest.mark.parametrize("given", ["H1000", "Radeon", "", "a1", "V100-16GB"])
def test_an_unknown_gpu_is_answered_with_the_nearest_and_how_to_give_figures(given: str) -> None:
    with pytest.raises(UserError, match="--gpu-tflops") as error:
        gpu_named(given)
    assert all(gpu.name in str(error.value) for gpu in GPUS)


def test_a_gpu_without_bfloat16_and_one_of_figures() -> None:
    with pytest.raises(UserError, match="has no bfloat16"):
        gpu_named("t4").rates(half=True)
    assert (
        gpu_named("t4").rates(half=False).kinds[PRODUCT].flop > gpu_named("h100").rates(half=True).kinds[PRODUCT].flop
    )
    mine = gpu_of("mine", 100, 48, 900)
    assert (mine.half, mine.memory, mine.bandwidth) == (100e12, 48e9, 900e9)
    work = Counted({PRODUCT: Work(1, 1e12, 0)}, 1, 0, 0, 0, 0)
    assert mine.rates(half=True).seconds(work) == pytest.approx(0.01 / mine.share)
