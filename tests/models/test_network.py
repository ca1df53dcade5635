from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import assert_same_weights

from coadvise.config.schema import ModelConfig
from coadvise.errors import UserError
from coadvise.models import TokenModel
from coadvise.models.network import build_network, load_network

CLASSES = ("ant", "bee", "cow", "dog")
CONV = ModelConfig(model="resnet_small", model_kwargs={"widths": [8, 16], "depths": [1, 1], "strides": [2, 2]})
VIT = ModelConfig(model="vit_tiny_patch16_224", model_kwargs={"patch_size": 4, "embed_dim": 24, "depth": 1})
STUDENT = ModelConfig(model="cit_micro_patch4_32", model_kwargs={"embed_dim": 24, "depth": 1, "drop_rate": 0.1})
ALIGNED = ModelConfig(model="cit_micro_aligned_patch4_32", model_kwargs={"embed_dim": 24, "depth": 1})
TOKENS = ("conv", "inv")


@pytest.mark.parametrize(("config", "tokens"), [(CONV, None), (VIT, None), (ALIGNED, TOKENS), (STUDENT, TOKENS)])
def test_features_are_what_the_head_makes_logits_of(config: ModelConfig, tokens: tuple[str, ...] | None) -> None:
    network: Any = build_network(config, CLASSES, 16, seed=0, tokens=tokens).eval()
    images = torch.rand(3, 3, 16, 16)
    features = network.features(images)
    assert features.ndim == 2
    torch.testing.assert_close(network.model.get_classifier()(features), network(images)["class"])


@pytest.mark.parametrize(
    ("config", "tokens", "answers"),
    [
        (CONV, None, ("class",)),
        (ALIGNED, TOKENS, ("class", *TOKENS)),
        (STUDENT, ("one", "two", "three"), ("class", "one", "two", "three")),
    ],
)
def test_answers_have_one_structure_training_or_not(
    config: ModelConfig, tokens: tuple[str, ...], answers: tuple[str, ...]
) -> None:
    network = build_network(config, CLASSES, 16, seed=0, tokens=tokens)
    images = torch.rand(3, 3, 16, 16)
    for training in (True, False):
        network.train(training)
        logits = network(images)
        assert isinstance(logits, dict)
        assert tuple(logits) == answers
        assert all(value.shape == (3, len(CLASSES)) for value in logits.values())
        alone = network.model((images - network.mean) / network.std)
        assert isinstance(alone, torch.Tensor)
        assert alone.shape == (3, len(CLASSES))
    assert torch.equal(alone, logits["class"])
    assert isinstance(network.model, TokenModel) == bool(tokens)


@pytest.mark.parametrize("config", [CONV, STUDENT])
def test_each_network_normalises_by_its_own_figures(config: ModelConfig) -> None:
    network = build_network(config, CLASSES, 16, seed=0).eval()
    settings = network.model.pretrained_cfg
    assert network.mean.flatten().tolist() == pytest.approx(settings["mean"])
    assert network.std.flatten().tolist() == pytest.approx(settings["std"])


def test_weights_are_a_function_of_the_seed_alone() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = build_network(STUDENT, CLASSES, 16, seed=7, tokens=TOKENS)
    assert torch.equal(torch.get_rng_state(), state), "building a network moved the global generator"
    torch.manual_seed(2)
    again = build_network(STUDENT, CLASSES, 16, seed=7, tokens=TOKENS)
    other = build_network(STUDENT, CLASSES, 16, seed=8, tokens=TOKENS)
    assert_same_weights(again.state_dict(), first.state_dict())
    assert not torch.equal(other.model.head.weight, first.model.head.weight)


@pytest.mark.parametrize(
    ("config", "tokens"), [(CONV, None), (VIT, None), (ALIGNED, TOKENS), (STUDENT, ("one", "two"))]
)
def test_saved_and_loaded_it_answers_the_same(config: ModelConfig, tokens: tuple[str, ...], tmp_path: Path) -> None:
    network = build_network(config, CLASSES, 16, seed=0, tokens=tokens)
    for _ in range(2):  # batch norm's running figures move
        network(torch.rand(8, 3, 16, 16))
    network.eval().save(tmp_path / "model")
    loaded = load_network(tmp_path / "model")
    assert not loaded.training
    assert loaded.classes == CLASSES
    assert loaded.parameter_count == network.parameter_count == sum(p.numel() for p in network.model.parameters())
    images = torch.rand(2, 3, 16, 16)
    for name, logits in network(images).items():
        assert torch.equal(loaded(images)[name], logits)
    assert loaded.about == network.about, "saved again it is the same file"


@pytest.mark.parametrize(("config", "tokens"), [(CONV, None), (ALIGNED, TOKENS), (STUDENT, ("one", "two"))])
def test_for_inference_it_is_a_frozen_copy_with_the_class_answer(config: ModelConfig, tokens: tuple[str, ...]) -> None:
    network = build_network(config, CLASSES, 16, seed=0, tokens=tokens)
    for _ in range(2):
        network(torch.rand(8, 3, 16, 16))
    made = network.for_inference()
    assert network.training
    assert not made.training
    assert not any(p.requires_grad for p in made.parameters())
    assert made.about == network.about
    images = torch.rand(2, 3, 16, 16)
    answers = made(images)
    assert answers.keys() == {"class"}
    torch.testing.assert_close(answers["class"], network.eval()(images)["class"], rtol=1e-5, atol=1e-5)


def test_normalisation_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    network = build_network(CONV, CLASSES, 16, seed=0).eval()
    network.about["mean"] = [0.1, 0.2, 0.3]
    network.save(tmp_path / "model")
    assert load_network(tmp_path / "model").mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])


@pytest.mark.parametrize("config", [CONV, VIT, STUDENT, ALIGNED])
def test_an_image_may_be_a_rectangle(config: ModelConfig, tmp_path: Path) -> None:
    tokens = TOKENS if config in (STUDENT, ALIGNED) else None
    network = build_network(config, CLASSES, (8, 24), seed=0, tokens=tokens).eval()
    network.about |= {"fit": "pad", "value_range": [0.0, 4095.0]}
    network.save(tmp_path / "network")
    again = load_network(tmp_path / "network")
    assert again.about["image_size"] == [8, 24]
    assert (again.about["fit"], again.values) == ("pad", (0.0, 4095.0))
    images = torch.rand(2, 3, 8, 24)
    assert torch.equal(again(images)["class"], network(images)["class"])
    torch.testing.assert_close(network.for_inference()(images)["class"], network(images)["class"])
    if config is not CONV:
        with pytest.raises(
            UserError,
            match=r"32 x 33 pixels; set data\.image_size to 32 or \[32, 36\]|not a whole number of patches of 4",
        ):
            build_network(config, CLASSES, (32, 33), seed=0, tokens=tokens)
        with pytest.raises((AssertionError, UserError)):
            network(torch.rand(2, 3, 24, 8))


def test_a_square_network_s_manifest_is_as_it_was(tmp_path: Path) -> None:
    build_network(CONV, CLASSES, (16, 16), seed=0).save(tmp_path / "network")
    about = load_network(tmp_path / "network").about
    assert about["image_size"] == 16
    assert not {"fit", "value_range"} & about.keys()


def test_a_transformer_is_built_for_the_data_s_image_size() -> None:
    assert build_network(VIT, CLASSES, 16, seed=0).model.patch_embed.img_size == (16, 16)
    assert build_network(VIT, CLASSES, 16, seed=0).fixed_image_size
    assert not build_network(CONV, CLASSES, 16, seed=0).fixed_image_size


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        ("resnet_smal", {}, "'resnet_smal', did you mean 'resnet_small'"),
        ("resnet18.none_such", {}, r"'resnet18\.none_such'.*resnet18\.a1_in1k"),
        ("hf-hub:some/one", {}, "'hf-hub:some/one'.*teacher's start"),
        ("resnet_small", {"wides": [8]}, "'resnet_small' cannot be built with .*wides"),
        ("cit_micro_patch4_32", {"embed_dim": 25}, "'cit_micro_patch4_32' cannot be built with"),
    ],
)
def test_what_cannot_be_built_is_said(model: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_network(ModelConfig(model=model, model_kwargs=arguments), CLASSES, 16, seed=0)
