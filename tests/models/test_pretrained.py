"""Teachers that others trained: by timm's name, a hub's, a file. A hub's files are served from a folder here."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from timm.data import ImageNetInfo
from timm.models import save_for_hf
from tiny import make_images, records
from torch import nn

from coadvise import fit
from coadvise.config.schema import TeacherConfig
from coadvise.distill.teachers import Teacher
from coadvise.errors import UserError
from coadvise.models.network import Network, load_network
from coadvise.models.pretrained import adapted_network, given_network
from coadvise.runs.evaluate import evaluate_run

TINY = {"widths": [8, 16], "depths": [1, 1], "strides": [2, 2]}
NAMES = ["green", "red", "blue", "black"]
HUB = TeacherConfig(model="hf-hub:some/one", start="hf-hub:some/one", adapt="none")
IMAGENET = ImageNetInfo().label_names()
Serve = Callable[..., list[tuple[str, str]]]


@pytest.fixture
def serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Serve:
    """Puts a model onto the hub `tmp_path/hub`, and returns what is asked of it."""

    def put(model: nn.Module, **config: Any) -> list[tuple[str, str]]:
        save_for_hf(
            model, str(tmp_path / "hub"), model_config=config, model_args=model.arguments, safe_serialization=True
        )
        asked: list[tuple[str, str]] = []

        def download(repo_id: str, filename: str, **_: Any) -> str:
            asked.append((repo_id, filename))
            if not (tmp_path / "hub" / filename).is_file():
                raise EntryNotFoundError(filename)
            return str(tmp_path / "hub" / filename)

        monkeypatch.setattr("timm.models._hub.hf_hub_download", download)
        return asked

    return put


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: Any, **__: Any) -> None:
        raise LocalEntryNotFoundError("no connection,\nand the file is not in the cache")

    monkeypatch.setattr("timm.models._hub.hf_hub_download", download)


def edit(config: Path, **changes: Any) -> None:
    config.write_text(json.dumps({**json.loads(config.read_text()), **changes}))


def made(name: str = "resnet_small", classes: int = len(NAMES), **arguments: Any) -> nn.Module:
    torch.manual_seed(3)
    model = timm.create_model(name, num_classes=classes, **arguments).eval()
    model.arguments = arguments  # what timm before 1.0.31 does not write into a hub's config.json by itself
    return model


def same_answers(network: Network, model: nn.Module, size: int = 32) -> bool:
    images = torch.rand(2, 3, size, size)
    return torch.allclose(network.eval()(images)["class"], model((images - network.mean) / network.std), atol=1e-6)


# A hub


@pytest.mark.parametrize("names", [NAMES, dict(enumerate(NAMES))])
def test_a_hub_s_model_comes_with_its_classes_and_is_kept_without_the_hub(
    names: Any, serve: Serve, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model = made(**TINY)
    asked = serve(model, label_names=names)
    network = given_network("conv", HUB, 32)
    assert network.classes == tuple(NAMES)
    assert (network.about["model"], network.about["model_kwargs"]["widths"]) == ("resnet_small", [8, 16])
    assert same_answers(network, model)
    assert set(asked) == {("some/one", "config.json"), ("some/one", "model.safetensors")}
    network.save(tmp_path / "kept")
    request.getfixturevalue("offline")
    assert same_answers(load_network(tmp_path / "kept"), model)


def test_a_hub_s_transformer_takes_the_data_s_image_size(serve: Serve, tmp_path: Path) -> None:
    arguments = {"patch_size": 4, "embed_dim": 24, "depth": 1, "img_size": 16}
    serve(made("deit_tiny_patch16_224", **arguments), label_names=NAMES)
    network = given_network("conv", HUB, 32)
    assert network.about["image_size"] == 32
    network.save(tmp_path / "kept")
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(load_network(tmp_path / "kept")(images)["class"], network.eval()(images)["class"])


@pytest.mark.parametrize("model", [HUB.model, "regnety_002.pycls_in1k"])
def test_offline_it_is_one_sentence(model: str, offline: None) -> None:
    with pytest.raises(UserError, match=f"'{model}' could not be loaded: no connection, and"):
        given_network("conv", TeacherConfig(model=model, start=model, adapt="none"), 32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label_names": None}, "does not say what its 4 classes are"),
        ({"label_names": {"1": "a", "2": "b", "3": "c", "4": "d"}}, "does not say what its 4 classes are"),
        ({"label_names": ["crane", "red", "crane", "black"]}, "several classes named 'crane'"),
        ({"architecture": "../../model"}, r"unknown model '\.\./\.\./model'"),
        ({"model_args": [3]}, "'hf-hub:some/one' could not be loaded"),
        ({"model_args": {**TINY, "checkpoint_path": "/etc/passwd"}}, "must not contain checkpoint_path"),
        ({"model_args": {**TINY, "widths": [8, 24]}}, "model 'resnet_small' cannot be built with"),
        ({"pretrained_cfg": {"custom_load": True, "num_classes": 4}}, "in a format of its own"),
        ({"model_args": {**TINY, "in_chans": 1}}, "for 1 image channels"),
    ],
)
def test_a_hub_s_model_that_is_not_whole_is_refused(
    changes: dict[str, Any], message: str, serve: Serve, tmp_path: Path
) -> None:
    serve(made(**TINY), label_names=NAMES)
    edit(tmp_path / "hub" / "config.json", **changes)
    with pytest.raises(UserError, match=message):
        given_network("conv", HUB, 32)


def test_of_timm_s_own_place_a_thousand_classes_are_imagenet_s(serve: Serve) -> None:
    serve(made(classes=1000, **TINY))
    timms = TeacherConfig(model="hf-hub:timm/some.in1k", start="hf-hub:timm/some.in1k", adapt="none")
    assert given_network("conv", timms, 32).classes == tuple(IMAGENET)
    with pytest.raises(UserError, match="does not say what its 1000 classes are"):
        given_network("conv", HUB, 32)


# timm's names


def test_published_weights_that_are_not_there_or_have_no_names_are_refused_before_they_are_fetched() -> None:
    for name, message in {
        "rednet26": "no published weights for 'rednet26'",
        "resnet1888": "unknown model 'resnet1888'",
        "regnety_040.ra4_in1k": "of regnety_040 timm has regnety_040.pycls_in1k, regnety_040.ra3_in1k",
        "vit_base_patch16_clip_224.openai": "does not say what the 512 classes.*adapt=finetune",
    }.items():
        with pytest.raises(UserError, match=message):
            given_network("conv", TeacherConfig(model=name, start=name, adapt="none"), 32)


def test_a_tag_names_the_weights(serve: Serve, tmp_path: Path) -> None:
    model = made("regnety_002", classes=1000)
    asked = serve(model)
    network = given_network(
        "conv", TeacherConfig(model="regnety_002.pycls_in1k", start="regnety_002.pycls_in1k", adapt="none"), 32
    )
    assert asked == [("timm/regnety_002.pycls_in1k", "model.safetensors")]
    assert network.classes == tuple(IMAGENET)
    assert same_answers(network, model)
    network.save(tmp_path / "kept")
    assert same_answers(load_network(tmp_path / "kept"), model)


# Files


def given_file(model: str, path: Path, **arguments: Any) -> Network:
    return given_network("conv", TeacherConfig(model=model, start=str(path), adapt="none", model_kwargs=arguments), 32)


def test_a_file_has_the_named_model_s_weights(tmp_path: Path) -> None:
    model = made(classes=1000, **TINY)
    torch.save({"model": model.state_dict(), "epoch": 3}, tmp_path / "conv_teacher.pth")
    network = given_file("resnet_small", tmp_path / "conv_teacher.pth", **TINY)
    assert network.classes == tuple(IMAGENET)
    assert same_answers(network, model)
    with pytest.raises(UserError, match=r"not weights of 'resnet_small': .*size mismatch"):
        given_file("resnet_small", tmp_path / "conv_teacher.pth", **{**TINY, "widths": [8, 24]})


def test_a_file_in_a_published_layout_is_recognised(tmp_path: Path) -> None:
    model = made("rednet26", classes=1000, widths=(64, 64, 64, 64), stem_width=32)
    renamed = {key.replace("fc.", "head.fc.") if key.startswith("fc.") else f"backbone.{key}": value
               for key, value in model.state_dict().items()}  # fmt: skip
    torch.save({"state_dict": renamed}, tmp_path / "inv_teacher.pth")
    network = given_file("rednet101", tmp_path / "inv_teacher.pth")  # its depth is read off its shapes
    assert network.about["model"] == "rednet26"
    assert same_answers(network, model)
    network.save(tmp_path / "kept")
    assert same_answers(load_network(tmp_path / "kept"), model)


def test_a_file_of_unnamed_classes_or_of_no_model_is_refused(tmp_path: Path) -> None:
    torch.save(made(classes=100, **TINY).state_dict(), tmp_path / "hundred.pth")
    with pytest.raises(UserError, match=r"hundred.pth' has 100 classes without names"):
        given_file("resnet_small", tmp_path / "hundred.pth", **TINY)
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"other.pth' has an unknown layout"):
        given_file("resnet_small", tmp_path / "other.pth", **TINY)
    with pytest.raises(UserError, match="no checkpoint"):
        given_file("resnet_small", tmp_path / "nowhere.pth")


# A new head


def adapted(classes: list[str], start: str, **about: Any) -> tuple[Network, str]:
    teacher = TeacherConfig.model_validate({"model": start, "start": start, "adapt": "finetune", **about})
    return adapted_network("conv", teacher, classes, 32, seed=0)


def test_an_adapted_network_has_the_body_and_the_rows_of_classes_that_both_know(serve: Serve, tmp_path: Path) -> None:
    model = made(**TINY)
    serve(model, label_names=NAMES)
    network, note = adapted(["black", "pink", "red"], "hf-hub:some/one")
    assert network.classes == ("black", "pink", "red")
    assert note == "new in its head: pink"
    own, given = network.model.state_dict(), model.state_dict()
    head = [key for key in own if own[key].shape != given[key].shape]
    assert len(head) == 2
    assert all(torch.equal(own[key], given[key]) for key in own if key not in head)
    for key in head:
        assert torch.equal(own[key][[0, 2]], given[key][[3, 1]])
    again, _ = adapted(["black", "pink", "red"], "hf-hub:some/one")
    assert all(torch.equal(own[key], value) for key, value in again.model.state_dict().items())
    network.save(tmp_path / "kept")
    assert torch.equal(load_network(tmp_path / "kept").model.state_dict()[head[0]], own[head[0]])


def test_a_network_whose_classes_have_no_names_can_be_adapted(serve: Serve) -> None:
    serve(made(**TINY))
    with pytest.raises(UserError, match=r"does not say what its 4 classes are.*adapt=finetune"):
        given_network("conv", HUB, 32)
    network, note = adapted(["a", "b", "c"], "hf-hub:some/one")
    assert (network.classes, note) == (("a", "b", "c"), "a new head")
    assert network(torch.rand(2, 3, 32, 32))["class"].shape == (2, 3)


def test_a_file_of_real_sizes_is_adapted(tmp_path: Path) -> None:
    """RedNet's published layout, of which only the body is needed."""
    model = made("rednet26", classes=1000, widths=(64, 64, 64, 64), stem_width=32)
    renamed = {key.replace("fc.", "head.fc.") if key.startswith("fc.") else f"backbone.{key}": value
               for key, value in model.state_dict().items()}  # fmt: skip
    torch.save({"state_dict": renamed}, tmp_path / "inv_teacher.pth")
    network, note = adapted(["a", IMAGENET[9]], str(tmp_path / "inv_teacher.pth"), model="rednet101")
    assert note == "new in its head: a"
    assert torch.equal(network.model.get_classifier().weight[1], model.get_classifier().weight[9])


def test_a_file_that_knows_the_data_s_classes_may_be_fine_tuned_and_a_bare_folder_is_told_from_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = made(classes=1000, **TINY)
    torch.save(model.state_dict(), tmp_path / "conv.pth")
    network, note = adapted(IMAGENET, str(tmp_path / "conv.pth"), model="resnet_small", model_kwargs=TINY)
    assert note == ""
    assert same_answers(network.eval(), model)
    (tmp_path / "first").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"'first' is read as the name of a model; give the folder as \./first"):
        adapted(["a", "b"], "first")


# In a run


def test_a_teacher_of_a_thousand_classes_advises_on_two_chosen_folders_by_their_wordnet_ids(
    serve: Serve, tiny_preset: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """From an ordinary ImageNet folder, of which two classes are wanted; the run goes on without a connection."""
    model = made(classes=1000, **TINY)
    serve(model)
    data = make_images(tmp_path / "imagenet", classes=[IMAGENET[7], IMAGENET[3], IMAGENET[500]])
    overrides = [
        "teachers.conv.start=hf-hub:timm/some.in1k", "teachers.conv.adapt=none",
        f"data.classes=[{IMAGENET[500]}, {IMAGENET[3]}]",
    ]  # fmt: skip
    start = partial(fit, data, tiny_preset, tmp_path / "run", overrides=overrides)
    run = start()
    about = json.loads((run / "data.json").read_text())
    assert about["classes"] == [IMAGENET[3], IMAGENET[500]]
    assert (about["splits"]["train"]["images"], about["splits"]["val"]["images"]) == (16, 8)
    network = load_network(run / "teachers/conv")
    images = torch.rand(2, 3, 16, 16)
    expected = model((images - network.mean) / network.std)[:, [3, 500]]
    torch.testing.assert_close(Teacher("conv", network, tuple(about["classes"]))(images), expected)
    assert records(run, "result")[0]["model"] == "resnet_small"
    own, folder = evaluate_run(run), evaluate_run(run, str(data))  # which holds a third class
    assert own["images"] == folder["images"] == 8
    assert own["parts"] == folder["parts"]

    request.getfixturevalue("offline")
    shutil.rmtree(run / "students")
    start(baseline=True)
    assert len(list((run / "students").iterdir())) == 2
