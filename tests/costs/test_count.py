"""Counting a step: as a real one counts, memory until it is freed, and the bytes that processes exchange."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

from coadvise.config.reading import load_config
from coadvise.config.schema import RecipeConfig
from coadvise.costs.count import KINDS, Counted, Tally, count
from coadvise.costs.step import TrainingStep, materialise
from coadvise.models.network import Network, build_network, on_meta
from coadvise.runs.network_job import initial_network
from coadvise.runs.plan import ADVISED, TEACHER, Part

RECIPE = RecipeConfig(ema=0.9, clip=1.0)
PARTS = (Part("", TEACHER, 0, "conv"), Part("", TEACHER, 0, "inv"), Part("", ADVISED, 0))


def counted(preset: str, part: Part, *batches: int, half: bool = False) -> list[Counted]:
    network = on_meta(lambda: initial_network(part, load_config(preset), ("a", "b", "c")))
    assert isinstance(network, Network)

    def step() -> TrainingStep:
        materialise(network)
        return TrainingStep(network, RECIPE, half=half, plain=half)

    return count(step, batches, 16)


def check_counts(tiny_preset: str, part: Part, half: bool) -> None:
    """A step without numbers counts what a real one does."""
    network = initial_network(part, load_config(tiny_preset), ("a", "b", "c"))
    network.to(memory_format=torch.channels_last)
    step = TrainingStep(network, RECIPE, half=half, plain=half)
    images = torch.rand(6, 3, 16, 16).to(memory_format=torch.channels_last)
    step(images)
    with Tally(clock=lambda: 0.0) as tally:
        step(images)
    (found,) = counted(tiny_preset, part, 6, half=half)
    assert found.calls == tally.calls
    assert found.work.keys() == tally.work.keys()
    for kind, (calls, flops, moved) in tally.work.items():
        assert found.work[kind][:2] == (calls, flops), kind
        assert found.work[kind].bytes == pytest.approx(moved, rel=0.01), kind
    assert set(found.work) <= set(KINDS)
    with FlopCounterMode(display=False) as counter:
        step(images)
    attention = found.work.get("attention", (0, 0, 0))[1]  # which PyTorch does not count on a CPU
    assert sum(work.flops for work in found.work.values()) - attention == counter.get_total_flops()


def test_a_step_without_numbers_counts_what_a_real_one_does(tiny_preset: str) -> None:
    check_counts(tiny_preset, PARTS[0], half=True)


def test_operations_of_a_network_by_hand() -> None:
    """A convolution and a linear layer: forward, the weights' gradients, and that of the linear layer's input."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Flatten(), nn.Linear(800, 4))
    model.get_classifier = lambda: model[2]
    network = Network(
        model, {"mean": [0, 0, 0], "std": [1, 1, 1], "classes": list("abcd"), "model": "", "model_kwargs": {}}
    )
    step = TrainingStep(network, RecipeConfig())
    with Tally(clock=lambda: 0.0) as tally:
        step(torch.rand(5, 3, 10, 10))
    assert tally.work["convolutions"].flops == 5 * 2 * (2 * 3 * 8 * 9 * 100)
    assert tally.work["products"].flops == 5 * 3 * (2 * 800 * 4)
    assert step.gradients == 4 * (3 * 8 * 9 + 8 + 800 * 4 + 4)


def test_memory_grows_with_the_batch_and_never_below_what_is_kept(tiny_preset: str) -> None:
    few, many = counted(tiny_preset, PARTS[0], 8, 16)
    assert few.kept < few.peak < many.peak
    assert few.work["updates"] == many.work["updates"]


def test_micro_batches_add_up(tiny_preset: str) -> None:
    network = build_network(load_config(tiny_preset).teachers["conv"], ("a", "b"), 16, 0)
    network.to(memory_format=torch.channels_last)
    step, images = TrainingStep(network, RECIPE), torch.rand(2, 3, 16, 16).to(memory_format=torch.channels_last)
    step(images)
    with Tally(clock=lambda: 0.0) as tally:
        step(images, 4)
    shapes = network.to("meta")

    def make() -> TrainingStep:
        materialise(shapes)
        return TrainingStep(shapes, RECIPE)

    (found,) = count(make, [2], 16, micro_batches=4)
    assert found.calls == tally.calls
    assert {kind: work[:2] for kind, work in found.work.items()} == {k: work[:2] for k, work in tally.work.items()}


def test_memory_is_what_is_held_at_once() -> None:
    """Two of three tensors of 4,000 bytes at a time."""
    with torch.device("meta"), Tally() as tally:
        first = torch.empty(1000)
        second = first + 1
        view = second[1:]
        del first, second
        third = view + 1
    assert tally.peak == 8000
    assert tally.held == 4000 + third.nbytes


def test_gradients_and_buffers_are_what_ddp_exchanges(tmp_path: Path, tiny_preset: str) -> None:
    sent = [0]

    def hook(state, bucket):
        sent[0] += bucket.buffer().nbytes
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        for part in PARTS[:2]:
            network = initial_network(part, load_config(tiny_preset), ("a", "b", "c"))
            found = TrainingStep(copy.deepcopy(network), RECIPE)
            model = DistributedDataParallel(network)
            model.register_comm_hook(None, hook)
            sent[0] = 0
            model(torch.rand(2, 3, 16, 16))["class"].sum().backward()
            assert sent[0] == found.gradients
            assert sum(buffer.nbytes for buffer in model.modules_buffers) == found.buffers
    finally:
        torch.distributed.destroy_process_group()


def test_a_head_alone_has_no_gradients(tiny_preset: str) -> None:
    config = load_config(tiny_preset).teachers["conv"]
    step = TrainingStep(build_network(config, ("a", "b"), 16, 0), None)
    with Tally(clock=lambda: 0.0) as tally:
        step(torch.rand(2, 3, 16, 16))
    assert step.gradients == step.buffers == 0
    assert "updates" not in tally.work
