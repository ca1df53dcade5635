"""Weights that a student starts from: a DeiT's file, timm's by name, a file of a timm model, a run."""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.data import ImageNetInfo
from timm.layers import resample_abs_pos_embed
from tiny import CLASSES, Stopper, assert_same_weights, never, records, weights_of, write_preset
from torch import Tensor, nn

from coadvise import fit, load
from coadvise.config.reading import load_config
from coadvise.errors import Interrupted, UserError
from coadvise.models.network import Network
from coadvise.models.start import _selected
from coadvise.models.token_vit import TokenViT
from coadvise.runs.network_job import initial_network
from coadvise.runs.plan import ADVISED, ALONE, Part

# a DeiT's file ----------------------------------------------------------------------------------------------------

TINY_VIT = {"img_size": 8, "patch_size": 4, "embed_dim": 24, "depth": 1, "num_heads": 3, "mlp_ratio": 2.0}


def write_deit(path: Path, **changes: Any) -> dict[str, torch.Tensor]:
    """A distilled DeiT of the tiny preset's widths, for half its image size and other classes."""
    torch.manual_seed(5)
    model = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=5, **{**TINY_VIT, **changes})
    torch.save({"model": model.state_dict()}, path)
    return model.state_dict()


def test_positions_follow_a_rectangle_as_timm_resamples_them(tmp_path: Path) -> None:
    weights = write_deit(tmp_path / "deit.pth")
    given = [f"student.start={tmp_path / 'deit.pth'}", "data.image_size=[8, 24]"]
    config = load_config(write_preset(tmp_path), given)
    student = initial_network(Part("part", ALONE, 0), config, ("blue", "green", "red")).model
    own = weights["pos_embed"]
    wanted = resample_abs_pos_embed(own, new_size=[2, 6], old_size=[2, 2], num_prefix_tokens=2)
    torch.testing.assert_close(student.pos_embed[:, 3:], wanted[:, 2:])


def test_students_start_from_published_weights(tmp_path: Path) -> None:
    weights = write_deit(tmp_path / "deit.pth")
    config = load_config(write_preset(tmp_path), [f"student.start={tmp_path / 'deit.pth'}"])
    said: list[str] = []
    students = {
        role: initial_network(Part(f"students/{role}-0", role, 0), config, ("blue", "green", "red"), said.append).model
        for role in (ADVISED, ALONE)
    }
    for name in ("blocks.0.attn.qkv.weight", "patch_embed.proj.weight", "norm.bias", "cls_token"):
        assert all(torch.equal(student.state_dict()[name], weights[name]) for student in students.values())
    advised, alone = (student.state_dict() for student in students.values())
    assert torch.equal(
        advised["reg_token"][:, 0], weights["dist_token"][:, 0]
    )  # the conv token: DeiT's teacher was one
    assert advised["pos_embed"].shape == (1, 3 + 16, 24)
    assert all(torch.equal(advised[name], alone[name]) for name in advised)
    torch.manual_seed(99)  # no global generator has a say
    again, other = (
        initial_network(Part("part", ALONE, seed), config, ("blue", "green", "red")).model.state_dict()
        for seed in (0, 1)
    )
    assert all(torch.equal(again[name], alone[name]) for name in alone)
    assert not torch.equal(other["head.weight"], alone["head.weight"])
    fresh = [f"{tmp_path / 'deit.pth'}: {what}" for what in (
        "token 'inv' is newly initialised: its vector, its position and its head",
        "heads for 3 classes instead of 5 are newly initialised",
    )]  # fmt: skip
    assert said == 2 * fresh


def test_a_run_starts_from_published_weights_and_goes_on(
    finished: Path, tiny_images: Path, tiny_preset: str, tmp_path: Path
) -> None:
    write_deit(tmp_path / "deit.pth")
    start = partial(fit, tiny_images, tiny_preset, overrides=[f"student.start={tmp_path / 'deit.pth'}"])
    with pytest.raises(Interrupted):
        start(tmp_path / "stopped", listener=Stopper(lambda part, done: "advised" in part and done == 1))
    runs = start(tmp_path / "stopped"), start(tmp_path / "whole"), finished
    stopped, whole, without = (weights_of(run, "students/advised-0") for run in runs)
    assert_same_weights(stopped, whole)
    assert not torch.equal(whole["norm.weight"], without["norm.weight"])


@pytest.mark.parametrize(
    ("changes", "overrides", "match"),
    [
        ({"embed_dim": 48}, [], "deit.pth': these are not weights of 'cit_micro_patch4_32'"),
        ({}, ["student.start=nowhere.pth"], "no checkpoint 'nowhere.pth'; give a .pth?"),
        ({}, ["student.model=resnet10_coadvised", "student.model_kwargs={}"], "'resnet10_coadvised' is not"),
    ],
)
def test_a_start_that_does_not_fit(
    changes: dict[str, Any], overrides: list[str], match: str, tiny_images: Path, tiny_preset: str, tmp_path: Path
) -> None:
    write_deit(tmp_path / "deit.pth", **changes)
    start = [f"student.start={tmp_path / 'deit.pth'}", *overrides]
    with pytest.raises(UserError, match=match):
        fit(tiny_images, tiny_preset, tmp_path / "out", overrides=start)
    assert not (tmp_path / "out").exists()


# timm's weights by name ----------------------------------------------------------------------------------------------

IMAGENET = ImageNetInfo().label_names()


def cache_made_weights(folder: Path, name: str) -> nn.Module:
    """Puts weights that are made here where the hub's client keeps those of a timm model."""
    torch.manual_seed(4)
    model = timm.create_model(name).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    place = folder / f"models--timm--{name}.r160_in1k"
    for path in (place / "snapshots" / "abc", place / "refs"):
        path.mkdir(parents=True)
    save_file(model.state_dict(), place / "snapshots" / "abc" / "model.safetensors")
    (place / "refs" / "main").write_text("abc")
    return model


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """timm's smallest, test_vit (6 blocks of width 64, for 160 pixels), in a local cache; there is no connection."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return cache_made_weights(tmp_path / "hub", "test_vit")


def started(
    folder: Path, *overrides: str, classes: Sequence[str] = CLASSES, seed: int = 0
) -> tuple[Network, list[str]]:
    """An untrained student for 32 pixels, and what was said of its weights."""
    config = load_config(write_preset(folder), ["data.image_size=32", "student.model=test_vit", *overrides])
    said: list[str] = []
    return initial_network(Part("students/advised-0", ADVISED, seed), config, classes, said.append), said


def body(network: Network) -> dict[str, Tensor]:
    assert isinstance(network.model, TokenViT)
    return network.model.vit.state_dict()


def test_true_is_timm_s_weights_from_the_local_cache(cached: nn.Module, tmp_path: Path) -> None:
    network, said = started(tmp_path, "student.start=true")
    by_name, _ = started(tmp_path, "student.start=test_vit.r160_in1k")
    fresh, silence = started(tmp_path)
    wanted = cached.state_dict()
    own = body(network)
    assert_same_weights(body(by_name), own)
    for key in wanted.keys() - {"pos_embed", "head.weight", "head.bias"}:
        assert torch.equal(own[key], wanted[key]), key
    cached.set_input_size(32)  # 2 by 2 patches
    torch.testing.assert_close(own["pos_embed"], cached.pos_embed)
    model = network.model
    assert isinstance(model, TokenViT)
    torch.testing.assert_close(model.tokens[0], (own["cls_token"] + own["pos_embed"][:, :1])[0].expand(2, -1))
    for name, head in model.heads().items():
        assert torch.equal(head.weight, fresh.model.heads()[name].weight)
    assert said == [
        "student.start=test_vit: tokens that start as the class token: conv, inv; "
        "newly initialised heads: class, conv, inv"
    ]
    assert not silence
    images = torch.rand(2, 3, 32, 32)
    length, prefix = 1 + 2 + 4, 1
    mask = torch.zeros(length, length)
    mask[:, prefix : prefix + 2] = -torch.inf
    seen = network.eval().model.forward_features((images - network.mean) / network.std, mask)[:, [0, 3, 4, 5, 6]]
    torch.testing.assert_close(seen, cached.forward_features((images - 0.5) / 0.5))


def test_the_class_head_keeps_the_classes_that_the_weights_know_by_name(cached: nn.Module, tmp_path: Path) -> None:
    network, said = started(tmp_path, "student.start=true", classes=[IMAGENET[7], "mine", IMAGENET[3]])
    assert torch.equal(body(network)["head.weight"][[0, 2]], cached.head.weight[[7, 3]])
    assert torch.equal(body(network)["head.bias"][[0, 2]], cached.head.bias[[7, 3]])
    assert not body(network)["head.bias"][1].any()
    assert said[0].endswith("newly initialised heads: conv, inv; newly initialised in each head: mine")


def test_aligned_stems_are_fresh_and_the_rest_is_timm_s(cached: nn.Module, tmp_path: Path) -> None:
    network, said = started(tmp_path, "student.start=true", "student.model_kwargs={aligned: {conv: conv}}")
    assert torch.equal(body(network)["blocks.5.mlp.fc2.weight"], cached.blocks[5].mlp.fc2.weight)
    assert said[0].startswith(
        "student.start=test_vit: newly initialised stems; tokens that start as the class token: inv;"
    )
    assert network(torch.rand(2, 3, 32, 32))["conv"].shape == (2, 3)


def test_a_smaller_student_starts_from_evenly_spaced_rows_of_the_first_layers(
    cached: nn.Module, tmp_path: Path
) -> None:
    arguments = "student.model_kwargs={embed_dim: 32, num_heads: 1, depth: 3, mlp_ratio: 2}"
    network, said = started(tmp_path, "student.start=true", arguments)
    own, wanted = body(network), cached.state_dict()
    every, third = torch.arange(0, 64, 2), torch.arange(64) * wanted["blocks.0.mlp.fc1.bias"].numel() // 64
    qkv = torch.cat([every, every + 64, every + 128])
    assert torch.equal(own["blocks.0.attn.qkv.weight"], wanted["blocks.0.attn.qkv.weight"][qkv][:, every])
    assert torch.equal(own["blocks.2.mlp.fc1.weight"], wanted["blocks.2.mlp.fc1.weight"][third][:, every])
    assert torch.equal(own["blocks.2.mlp.fc2.weight"], wanted["blocks.2.mlp.fc2.weight"][every][:, third])
    assert torch.equal(own["patch_embed.proj.weight"], wanted["patch_embed.proj.weight"][every])
    assert torch.equal(own["norm.weight"], wanted["norm.weight"][every])
    assert said[0].startswith(
        "student.start=test_vit: evenly spaced rows of its first 3 layers are taken; tokens that start"
    )


def test_selected_queries_and_keys_are_of_the_same_places() -> None:
    """Also where the widths do not divide each other; a tensor that is not larger stays as it is."""
    rows = torch.arange(3 * 10.0)[:, None].expand(-1, 10)
    found = _selected("blocks.0.attn.qkv.weight", rows, [3 * 4, 4])
    assert found[:, 0].tolist() == [0, 2, 5, 7, 10, 12, 15, 17, 20, 22, 25, 27]
    assert torch.equal(_selected("blocks.0.attn.qkv.bias", rows[:, 0], [12]), found[:, 0])
    assert _selected("norm.weight", rows[:, 0], [40]).shape == (30,)
    assert _selected("norm.weight", rows, [12]).shape == (30, 10)


def test_a_file_of_a_timm_model_is_a_start(tmp_path: Path) -> None:
    deit3 = {"embed_dim": 24, "depth": 1, "num_heads": 3, "patch_size": 8}
    model = timm.create_model("deit3_small_patch16_224", img_size=48, num_classes=7, **deit3)
    old = {
        key.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): v for key, v in model.state_dict().items()
    }
    torch.save({"model": old}, tmp_path / "deit3.pth")  # as published
    arguments = f"student.model_kwargs={json.dumps(deit3)}"
    given = ["student.model=deit3_small_patch16_224", arguments, f"student.start={tmp_path / 'deit3.pth'}"]
    network, said = started(tmp_path, *given)
    assert torch.equal(body(network)["blocks.0.ls1.gamma"], model.blocks[0].ls1.gamma)
    assert body(network)["pos_embed"].shape == (1, 16, 24)
    assert said[0].endswith("newly initialised heads: class, conv, inv")
    for other, what in (
        (given[:1], r"has not the weights of 'deit3_small_patch16_224': no blocks.1.norm1.weight, no .*, and \d+ more"),
        (
            ["student.model=deit_tiny_patch16_224", arguments],
            r"unexpected blocks.0.gamma_1, unexpected blocks.0.gamma_2, pos_embed ",
        ),
        ([given[0], arguments.replace("24", "48")], r"cls_token \[1, 1, 24\] instead of \[1, 1, 48\]"),
    ):
        with pytest.raises(UserError, match=what):
            started(tmp_path, *other, given[2])
    torch.save({"x": torch.ones(1)}, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"x.pth' has not the weights of 'test_vit': no cls_token, no pos_embed, no"):
        started(tmp_path, f"student.start={tmp_path / 'x.pth'}")


# a run ---------------------------------------------------------------------------------------------------------------


def test_a_run_s_student_is_a_start_and_its_heads_keep_classes_by_name(finished: Path, tmp_path: Path) -> None:
    config = load_config(write_preset(tmp_path), [f"student.start={finished}"])
    said: list[str] = []
    part = Part("students/advised-7", ADVISED, 7)
    network = initial_network(part, config, ("red", "violet", "blue"), said.append)
    old, new = load(finished).network, network.model.state_dict()
    assert old.classes == ("blue", "green", "red")
    for key, value in old.model.state_dict().items():
        if not key.startswith("head"):
            assert torch.equal(new[key], value)
        else:
            assert torch.equal(new[key][[2, 0]], value[[0, 2]])
    assert said == [f"student.start={finished}: newly initialised in each head: violet"]
    same = initial_network(part, config, old.classes, said.append)
    assert_same_weights(same.model.state_dict(), old.model.state_dict())
    assert len(said) == 1, "nothing is new"
    larger = load_config(
        write_preset(tmp_path), [f"student.start={finished / 'students' / 'alone-0'}", "data.image_size=32"]
    )
    assert initial_network(part, larger, old.classes).model.pos_embed.shape == (1, 1 + 2 + 64, 24)
    for overrides, what in (
        (["student.label_tokens=[class, more]"], "has the tokens conv, inv, this one conv, inv, more"),
        (
            ["student.model=cit_tiny_patch16_224"],
            "has a 'cit_micro_patch4_32', the student is a 'cit_tiny_patch16_224'",
        ),
        (["student.model_kwargs.embed_dim=48"], r"cls_token \[1, 1, 24\] instead of \[1, 1, 48\]"),
        ([f"student.start={finished / 'teachers' / 'conv'}"], "has a 'resnet_small'"),
        ([f"student.start={tmp_path}"], "no model in "),
    ):
        with pytest.raises(UserError, match=what):
            initial_network(
                part, load_config(write_preset(tmp_path), [f"student.start={finished}", *overrides]), CLASSES
            )


def test_a_run_s_vision_transformer_keeps_its_tokens_by_name(tmp_path: Path) -> None:
    small = "student.model_kwargs={depth: 1}"
    (tmp_path / "run").mkdir()
    first, _ = started(tmp_path, small, seed=3)
    first.save(tmp_path / "run" / "students" / "advised-3")
    network, said = started(tmp_path, small, f"student.start={tmp_path / 'run'}", "teachers.inv.token=more", seed=4)
    assert network.model.token_names == ("conv", "more")
    assert torch.equal(network.model.tokens[:, 0], first.model.tokens[:, 0])
    torch.testing.assert_close(network.model.tokens[:, 1:], first.model.class_token)
    assert torch.equal(network.model.heads()["conv"].weight, first.model.heads()["conv"].weight)
    assert said == [
        f"student.start={tmp_path / 'run'}: tokens that start as the class token: more; newly initialised heads: more"
    ]


# what is refused, and a run from beginning to end --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "match"),
    [
        (["student.start=true"], "student.start=cit_micro_patch4_32: timm's weights do not fit 'cit_micro_patch4_32'"),
        (
            ["student.start=vit_tny_patch16_224"],
            "no file, no run and no model of timm, did you mean 'vit_tiny_patch16_224'",
        ),
        (["student.start=3"], "give true, the name of a model"),
        (
            ["student.model=test_vit", "student.start=vit_tiny_patch16_224.none"],
            "unknown weights 'vit_tiny_patch16_224.none'",
        ),
        (["student.model=vit_wee_patch16_reg1_gap_256"], "'vit_wee_patch16_reg1_gap_256' cannot be a student"),
        (
            ["student.model=vit_tiny_patch16_224", "data.image_size=32", "student.start=true"],
            "'vit_tiny_patch16_224' could not be loaded: .*; fetch them once where .*coadvise fetch vit_tiny",
        ),
    ],
)
def test_a_start_that_is_not_at_hand_is_refused_and_nothing_is_written(
    overrides: list[str], match: str, cached: nn.Module, tiny_images: Path, tiny_preset: str, tmp_path: Path
) -> None:
    """In the cache there is timm's test_vit alone."""
    with pytest.raises(UserError, match=match) as refused:
        fit(tiny_images, tiny_preset, tmp_path / "out", overrides=overrides)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_a_student_by_timm_s_name_is_trained_heads_first_and_answers(
    cached: nn.Module, finished: Path, tiny_images: Path, tiny_preset: str, tmp_path: Path
) -> None:
    overrides = [
        "student.model=test_vit", "student.model_kwargs={patch_size: 8, depth: 2}", "student.start=true",
        "student.recipe.head_epochs=1", "student.recipe.layer_decay=0.5",
    ]  # fmt: skip
    listener = Stopper(lambda part, done: "advised" in part and done == 1)
    start = partial(fit, tiny_images, tiny_preset, tmp_path / "run", overrides=overrides, reuse=finished)
    with pytest.raises(Interrupted):
        start(listener=listener)
    run = start()
    assert any(line.startswith("student.start=test_vit: its first 2 layers are taken; ") for line in listener.said)
    (result,) = (record for record in records(run, "result") if record["role"] == "advised")
    assert list(result["top1"]) == ["class", "conv", "inv", "average"]
    student = load(run)
    assert student.predict(torch.rand(3, 16, 16))[0].label in CLASSES
    assert not torch.equal(student.model.vit.blocks[0].norm1.weight, cached.blocks[0].norm1.weight), "after epoch 1"


@pytest.mark.parametrize(
    ("preset", "overrides"),
    [
        ("photos-pretrained", ["data.presize=0", "teachers.inv.model_kwargs={depths: [1, 1, 1, 1]}"]),
        ("photos-pretrained-small", []),
    ],
)
def test_presets_of_pretrained_networks_are_trained_from_weights_in_the_cache(
    preset: str, overrides: list[str], cached: nn.Module, tiny_images: Path, tmp_path: Path
) -> None:
    cache_made_weights(tmp_path / "hub", "test_efficientnet")
    overrides = [
        *overrides, "teachers.conv.start=test_efficientnet", "student.model=test_vit", "data.image_size=32",
        "data.workers=0", "teachers.conv.finetune.epochs=2", "teachers.conv.finetune.batch_size=8",
        *(f"{part}.recipe.{change}" for part in ("teachers.inv", "student") for change in ("epochs=2", "batch_size=8")),
    ]  # fmt: skip
    listener = Stopper(never)
    run = fit(tiny_images, preset, tmp_path / "run", listener, overrides=overrides, baseline=True)
    adapted = "linear probe" if preset.endswith("small") else "fine-tuned"
    rows = [row["name"] for row in records(run, "verdict")[-1]["rows"]]
    assert rows[0] == f"conv teacher ({adapted})"
    assert "linear probe of the student's start" in rows
    assert any(
        line.startswith("student.start=test_vit: tokens that start as the class token") for line in listener.said
    )
    trained = {record["part"] for record in records(run, "train")}
    assert ("teachers/conv" in trained) == (adapted == "fine-tuned")
