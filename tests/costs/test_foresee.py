"""Plans: proportions, the boundary of memory, and bytes as a run leaves them."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.numpy import save

from coadvise.config.reading import load_config, with_changes
from coadvise.config.schema import EngineConfig, RecipeConfig
from coadvise.costs import sizes
from coadvise.costs.bottleneck import LOADER, MEMORY, NETWORK, bottleneck
from coadvise.costs.count import Counted
from coadvise.costs.foresee import Foreseen, Question, largest_batch, network_of
from coadvise.costs.gpus import gpu_named
from coadvise.costs.machine import Calibration, of_calibration, of_sheet
from coadvise.data.scan import scan
from coadvise.data.sources import open_source
from coadvise.distill.logit_cache import Form
from coadvise.errors import UserError
from coadvise.models.network import load_network
from coadvise.runs.plan import TEACHER, Part
from coadvise.storage import bytes_text
from coadvise.training.checkpoint import Checkpoints, TrainingState
from coadvise.training.engine import Engine
from coadvise.training.metrics import Recorder
from coadvise.training.nonfinite import NonFiniteGuard
from coadvise.training.optim import average_of, make_optimiser

CONV = Part("teachers/conv", TEACHER, 0, "conv")


@pytest.fixture(scope="module")
def asked(tiny_preset: str, calibration: Calibration) -> Question:
    return Question(load_config(tiny_preset), 1200, 3, of_calibration(calibration, 32e9), 0)


@pytest.fixture(scope="module")
def one(asked: Question) -> Foreseen:
    return network_of(asked, CONV, threads=1)


def on_gpus(asked: Question, gpus: int, nodes: int = 1) -> Question:
    return replace(asked, target=of_sheet(gpu_named("h100"), None), gpus=gpus, nodes=nodes)


def test_twice_the_images_take_twice_the_minutes_and_all_cores_less(asked: Question, one: Foreseen) -> None:
    double = network_of(replace(asked, images=2400), CONV, threads=2)
    assert double.steps == 2 * one.steps == 2 * 2 * 100
    assert double.seconds < one.seconds
    assert one.minutes == one.steps * one.seconds / 60
    assert sum(double.computing.values()) == pytest.approx(sum(one.computing.values()) / 2)


def test_gpus_divide_a_batch_and_exchange_gradients(asked: Question) -> None:
    alone, four = (network_of(on_gpus(asked, gpus), CONV, 1) for gpus in (1, 4))
    assert (alone.images, four.images) == (12, 3)
    assert (alone.sent, alone.exchanging) == (0, 0)
    assert four.memory < alone.memory
    assert four.steps == alone.steps
    with pytest.raises(UserError, match="cannot be divided into 1 micro-batches on 5 processes"):
        network_of(on_gpus(asked, 5), CONV, 1)


def test_a_ring_sends_nearly_two_gradients_and_the_slower_link_counts() -> None:
    counted = Counted({}, 0, 0, 0, gradients=8e9, buffers=1e9)
    assert [sizes.sent(counted, processes) for processes in (1, 2, 8)] == [0, 9e9, 15e9]
    assert sizes.exchange_seconds(counted, 8, 1, link=5e9, network=1) == 3
    assert sizes.exchange_seconds(counted, 8, 2, link=5e9, network=1e9) == 15
    assert sizes.exchange_seconds(counted, 2, 2, link=1, network=1e9) == 9


def test_the_largest_batch_fits_and_one_image_more_does_not() -> None:
    own, double = Counted({}, 0, 1000, 500, 0, 0), Counted({}, 0, 1480, 500, 0, 0)  # 10 bytes each of 48 images
    for memory in (1000, 1009, 1010, 999, 5000, 530, 519):
        most = largest_batch(own, double, 48, memory)
        assert 1000 + 10 * (most - 48) <= memory or most == 0
        assert 1000 + 10 * (most + 1 - 48) > memory


def test_what_holds_a_training_up_is_named(asked: Question, one: Foreseen) -> None:
    gpu = on_gpus(asked, 2)
    config = with_changes(asked.config, {"data.workers": 2})
    waits = replace(one, making=10.0, seconds=5.0, cores=4.2)
    found = bottleneck(replace(gpu, config=config), waits)
    assert (found.what, found.share) == (LOADER, 1.0)
    assert "data.workers=3" in found.remedy
    assert bottleneck(gpu, replace(one, waiting=1.0, seconds=1.5, making=0.0)).what == NETWORK
    large = replace(one, memory=1e12, largest=one.images // 3)
    assert bottleneck(asked, large).what == MEMORY
    assert "recipe.accumulate=3" in bottleneck(asked, large).remedy
    assert sum(one.computing.values()) + one.issuing < one.seconds, "views are made in the same process"


def test_bytes_of_a_store_are_its_files(asked: Question, tiny_images: Path) -> None:
    kept = scan(open_source(tiny_images), 16, in_memory=True).train.kept
    assert kept is not None
    files = sum(kept.path.with_suffix(ending).stat().st_size for ending in (".pixels", ".table"))
    assert files == sizes.store_bytes(asked.config, 24)
    presized = with_changes(asked.config, {"augment.kind": "deit", "data.presize": 30})
    assert (
        sizes.store_bytes(presized, 24)
        == sizes.store_bytes(with_changes(presized, {"data.presize": 0}), 24) + 24 * 3600
    )


@pytest.mark.parametrize("classes", [3, 1000])
def test_bytes_of_a_cache_are_its_shard_s(asked: Question, classes: int) -> None:
    form = Form(classes, 32)
    arrays = {}
    for teacher in asked.config.teachers:
        arrays |= form.pack(teacher, torch.randn(50, classes))
    header = len(save({name: array[:0] for name, array in arrays.items()}))
    assert len(save(arrays)) - header == pytest.approx(sizes.cache_bytes(asked.config, 50, classes), abs=64)


def test_bytes_of_a_checkpoint_are_its_files(asked: Question, one: Foreseen, finished: Path, tmp_path: Path) -> None:
    network = load_network(finished / "teachers/conv").train()
    recipe = RecipeConfig()
    optimiser = make_optimiser(network.model, recipe)
    network(torch.rand(2, 3, 16, 16))["class"].sum().backward()
    optimiser.step()
    with Engine(EngineConfig(device="cpu")) as engine:
        guard = NonFiniteGuard("part", network, optimiser, engine, Recorder(tmp_path, False, lambda text: None))
        TrainingState(network, optimiser, average_of(network, recipe), guard).save(1, Checkpoints(tmp_path / "kept"))
    written = sum(path.stat().st_size for path in (tmp_path / "kept").rglob("*") if path.is_file())
    assert one.checkpoint < written < one.checkpoint + 30_000, (
        "a state's names, counts of steps and checksums are the rest"
    )
    assert sizes.disk(asked.config, 24, 3, 1, one.checkpoint).checkpoints == 3 * one.checkpoint


def test_sizes_read_by_people() -> None:
    assert [bytes_text(n) for n in (0, 999, 1000, 99_400, 123e6, 4.2e12)] == [
        "0 B",
        "999 B",
        "1.0 kB",
        "99.4 kB",
        "123 MB",
        "4.2 TB",
    ]
