"""A probe trains a head as scikit-learn does on a frozen body's features, and nothing else."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from coadvise.config.schema import AugmentConfig, EngineConfig, ModelConfig
from coadvise.data.scan import scan
from coadvise.data.sources import open_source
from coadvise.data.views import Views
from coadvise.errors import Interrupted, UserError
from coadvise.models.network import Network, build_network
from coadvise.training.engine import Engine
from coadvise.training.listener import Silent
from coadvise.training.probe import STRENGTHS, check_head, probe

TINY = ModelConfig(model="resnet_small", model_kwargs={"widths": [8, 16], "depths": [1, 1], "strides": [2, 2]})
MIXED = AugmentConfig(mixup=0.8, cutmix=1.0, erase=0.5, smoothing=0.1)


def network_of(classes: tuple[str, ...]) -> Network:
    return build_network(TINY, classes, 16, seed=1)


@pytest.mark.parametrize("classes", [3, 2])
def test_only_the_head_is_trained_and_it_answers_for_most_training_images(image_folder: Path, classes: int) -> None:
    whole = scan(open_source(image_folder), 16, in_memory=True).train
    rows = np.flatnonzero(whole.labels < classes)
    split = replace(whole, split=whole.split.subset(rows), labels=whole.labels[rows], pixels=whole.pixels[rows])
    network = network_of(("a", "b", "c")[:classes])
    before = {key: value.clone() for key, value in network.model.state_dict().items()}
    with Engine(EngineConfig(device="cpu")) as engine:
        views = Views(split, MIXED.unmixed, classes, 16, seed=0)
        found = probe("teachers/conv", network, views, engine, 0, None, Silent().progress)
    assert found.views == 3 * len(split)
    assert found.weight_decay in STRENGTHS
    after = network.model.state_dict()
    assert {key for key in before if not torch.equal(before[key], after[key])} == {"fc.weight", "fc.bias"}
    with torch.no_grad():
        answers = network.eval()(torch.from_numpy(split.pixels).float() / 255)["class"].argmax(1)
    assert (answers.numpy() == split.labels).mean() > 0.8  # made images are tinted by their class
    assert found.top1 > 0.6


def test_it_stops_when_it_is_asked_to(image_folder: Path) -> None:
    split = scan(open_source(image_folder), 16, in_memory=True).train
    with Engine(EngineConfig(device="cpu")) as engine:
        engine.stop_requested = True
        views = Views(split, MIXED.unmixed, 3, 16, seed=0)
        with pytest.raises(Interrupted, match="before the probe of teachers/conv was done"):
            probe("teachers/conv", network_of(("a", "b", "c")), views, engine, 0, None, Silent().progress)


def test_a_head_that_is_no_linear_layer_is_refused() -> None:
    network = network_of(("a", "b"))
    check_head("conv", network)
    network.model.fc = torch.nn.Sequential(torch.nn.Linear(16, 2), torch.nn.Tanh())
    with pytest.raises(UserError, match=r"teachers\.conv\.adapt=probe: the head of 'resnet_small' .*adapt=finetune"):
        check_head("conv", network)
