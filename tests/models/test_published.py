"""Published checkpoints become models here, agree with the published implementations, and every fault is named."""

import argparse
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from coadvise import load_published
from coadvise.errors import UserError
from coadvise.models import REDNETS, RedNet, Student
from coadvise.models.published import convert, read_published

STUDENT = {"aligned": {"conv": "conv", "inv": "inv"}, "embed_dim": 128, "depth": 2, "num_heads": 2, "num_classes": 5}
REDNET = {"widths": (64, 128, 128, 192), "stem_width": 32, "num_classes": 5}


def published_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights under the published names, and the image and outputs, of one reference file."""
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        about = file.metadata()
    generator = torch.Generator().manual_seed(int(about["input_seed"]))
    tensors["input"] = torch.randn(json.loads(about["input_shape"]), generator=generator)[:1]
    prefix = "weights."
    weights = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    return {key: value.float() if value.dtype == torch.float16 else value for key, value in weights.items()}, tensors


def wrapped(weights: dict[str, Tensor], layout: str) -> dict[str, Any]:
    """The same weights as mmcls, the Co-advise authors or a wrapping module save them, or bare."""
    if layout == "mmcls":
        prefixed = {
            key.replace("fc.", "head.fc.") if key[:3] == "fc." else f"backbone.{key}": weights[key] for key in weights
        }
        return {"meta": {"epoch": 130, "CLASSES": ["a", "b"]}, "state_dict": prefixed}
    if layout == "co-advise":
        wrapped = {
            key.replace("fc.", "classifier.") if key[:3] == "fc." else f"model.{key}": weights[key] for key in weights
        }
        return {"model": wrapped, "epoch": 299}
    if layout == "parallel and compiled":
        return {"state_dict": {f"module._orig_mod.{key}": weights[key] for key in weights}}
    return weights


def student_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our names to the published student's."""
    prefix = "patch_embed.stems."
    return {
        key.removeprefix(prefix).replace(".", "_embed.", 1) if key.startswith(prefix) else key: value
        for key, value in weights.items()
    }


def assert_relative(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


def assert_same(model: nn.Module, weights: dict[str, Tensor]) -> None:
    state = model.state_dict()
    assert state.keys() == weights.keys()
    assert all(torch.equal(state[key], value) for key, value in weights.items())


def rednet() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("rednet26", **REDNET).eval()


def student(**arguments: Any) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("cit_small_aligned_patch16_224", **{**STUDENT, **arguments}).eval()


def deit(distilled: bool, **arguments: Any) -> nn.Module:
    """timm's, whose keys are those of DeiT's own checkpoints."""
    torch.manual_seed(0)
    name = "deit_tiny_distilled_patch16_224" if distilled else "deit_tiny_patch16_224"
    return timm.create_model(
        name, **{"depth": 2, "embed_dim": 64, "num_heads": 1, "num_classes": 5, **arguments}
    ).eval()


def images(size: int = 224, channels: int = 3) -> Tensor:
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(1))


# agreement with what the published implementations computed ----------------------------------------------------------


def test_rednet26_stages_and_input_gradient(reference: Path, tmp_path: Path) -> None:
    weights, tensors = published_tensors(reference / "rednet26_w16.safetensors")
    torch.save(weights, tmp_path / "rednet.pth")
    net = load_published(tmp_path / "rednet.pth")
    assert isinstance(net, RedNet)
    image = tensors["input"].requires_grad_()
    stages = net.forward_intermediates(image, indices=[1, 2, 3, 4], intermediates_only=True)
    for i, stage in enumerate(stages, start=1):
        assert_relative(stage, tensors[f"stage{i}"], 1e-5 if i < 4 else 1e-3)  # layer4 is stored in float16
    (gradient,) = torch.autograd.grad(stages[-1].square().mean(), image)
    assert_relative(gradient, tensors["input_grad"], 3e-3)


def test_aligned_student_logits(reference: Path, tmp_path: Path) -> None:
    path = reference / "student_aligned_d48.safetensors"
    weights, tensors = published_tensors(path)
    with safe_open(path, "pt") as file:
        heads = json.loads(file.metadata()["num_heads"])
    torch.save(weights, tmp_path / "student.pth")
    net = load_published(tmp_path / "student.pth", num_heads=heads)
    assert isinstance(net, Student)
    with torch.no_grad():
        logits = net.forward_tokens(tensors["input"])
        assert torch.equal(net(tensors["input"]), logits["class"])
    logits["average"] = torch.stack(list(logits.values())).mean(0)
    for name, values in logits.items():
        assert_relative(values, tensors[f"{name}_logits"], 1e-3)


# layouts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "classes"), [("bare", 0), ("bare", 5), ("mmcls", 5), ("co-advise", 5), ("parallel and compiled", 5)]
)
def test_rednet_layouts(layout: str, classes: int, tmp_path: Path) -> None:
    first = rednet()
    first.reset_classifier(classes)
    torch.save(wrapped(first.state_dict(), layout), tmp_path / "rednet.pth")
    found = read_published(tmp_path / "rednet.pth")
    assert (found.layout, found.model, found.notes) == ("RedNet", "rednet26", ())
    assert found.arguments["num_classes"] == classes
    net = load_published(tmp_path / "rednet.pth")
    assert_same(net, first.state_dict())
    torch.testing.assert_close(net(images(64)), first(images(64)))


@pytest.mark.parametrize("name", REDNETS[:-1])
def test_every_depth_is_read_off_the_shapes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"):
        weights = timm.create_model(name).state_dict()
    monkeypatch.setattr("coadvise.models.published.read_tensors", lambda path: (weights, {}))
    found = read_published("never.pth")
    assert (found.model, found.arguments["num_classes"]) == (name, 1000)
    assert found.arguments["widths"] == [256, 512, 1024, 2048]
    assert (found.arguments["stem_width"], found.arguments["kernel_size"]) == (64, 7)


@pytest.mark.parametrize(("size", "patch"), [(224, 16), (96, 8)])
def test_students_of_any_size(size: int, patch: int, tmp_path: Path) -> None:
    first = student(img_size=size, patch_size=patch, in_chans=1, mlp_ratio=2.0)
    torch.save({"model": student_names(first.state_dict())}, tmp_path / "student.pth")
    net = load_published(tmp_path / "student.pth")
    assert_same(net, first.state_dict())
    torch.testing.assert_close(net(images(size, 1)), first(images(size, 1)))


@pytest.mark.parametrize("layout", ["the authors'", "converted", "converted, learned tokens"])
def test_tokens_keep_their_vectors_and_positions_in_any_order(layout: str, tmp_path: Path) -> None:
    path, arguments = tmp_path / "student.safetensors", {**STUDENT, "img_size": 32, "in_chans": 3}
    arguments["token_names"] = ["conv", "inv"]
    if layout == "converted, learned tokens":
        arguments["aligned"] = {}
    name = "cit_small_aligned_patch16_224" if arguments["aligned"] else "cit_small_patch16_224"
    weights = timm.create_model(name, **arguments).state_dict()
    if layout == "the authors'":
        save_file(student_names(weights), path)
    else:
        save_file(weights, path, {"model": name, "arguments": json.dumps(arguments)})
    with torch.no_grad():
        wanted = load_published(path).forward_tokens(images(32))
        got = load_published(path, token_names=["inv", "conv"]).forward_tokens(images(32))
    assert list(got) == ["class", "inv", "conv"]
    for token, logits in wanted.items():
        torch.testing.assert_close(got[token], logits)


def test_what_the_authors_saved_beside_the_weights_is_read_as_plain_data(tmp_path: Path) -> None:
    """Their checkpoints hold a yacs configuration, DeiT's an argparse namespace; neither may be imported or run."""
    module = types.ModuleType("yacs.config")
    node = type("CfgNode", (dict,), {"__module__": "yacs.config", "__qualname__": "CfgNode"})
    module.CfgNode = node  # type: ignore[attr-defined]
    config = node(LR=5e-4, TRAIN=node(EPOCHS=300))
    config.__dict__["__immutable__"] = True
    first = student()
    content = {"model": student_names(first.state_dict()), "config": config, "args": argparse.Namespace(lr=1.0)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
        patch.setitem(sys.modules, "yacs.config", module)
        torch.save(content, tmp_path / "student.pth")
    assert "yacs" not in sys.modules
    assert_same(load_published(tmp_path / "student.pth"), first.state_dict())
    assert "yacs" not in sys.modules


# DeiT ----------------------------------------------------------------------------------------------------------------


def test_distilled_deit_becomes_a_student_of_one_token(tmp_path: Path) -> None:
    first = deit(distilled=True)
    first.set_distilled_training(True)
    torch.save({"model": first.state_dict()}, tmp_path / "deit.pth")
    net = load_published(tmp_path / "deit.pth", token_names=("inv",))
    with torch.no_grad():
        answers = net.forward_tokens(images())
        expected = first.train()(images())
    for answer, wanted in zip(answers.values(), expected, strict=True):
        torch.testing.assert_close(answer, wanted)


@pytest.mark.parametrize("token", [None, "inv"])
def test_the_missing_token_is_fresh_and_said(token: str | None, tmp_path: Path) -> None:
    first = deit(distilled=token is not None)
    torch.save({"model": first.state_dict()}, tmp_path / "deit.pth")
    missing = [name for name in ("conv", "inv") if name != token]
    with pytest.warns(UserWarning, match="newly initialised") as said:
        net = load_published(tmp_path / "deit.pth", distillation_token=token)
    assert [any(f"token '{name}'" in str(w.message) for w in said) for name in missing] == [True] * len(missing)
    assert len(said) == len(missing)
    old = first.state_dict()
    prefix = 1 + (token is not None)
    torch.testing.assert_close(net.cls_token, first.cls_token)
    torch.testing.assert_close(net.pos_embed[:, 0], old["pos_embed"][:, 0])
    torch.testing.assert_close(net.pos_embed[:, 3:], old["pos_embed"][:, prefix:])
    for place, name in enumerate(("conv", "inv")):
        vector, position, head = net.reg_token[:, place], net.pos_embed[:, 1 + place], net.heads()[name]
        if name == token:
            torch.testing.assert_close(vector, old["dist_token"][:, 0])
            torch.testing.assert_close(position, old["pos_embed"][:, 1])
            torch.testing.assert_close(head.weight, old["head_dist.weight"])
        else:
            assert all(tensor.std() > 0.005 for tensor in (vector, position, head.weight))
    with pytest.warns(UserWarning, match="newly"):
        again = load_published(tmp_path / "deit.pth", distillation_token=token)
    assert_same(again, net.state_dict())


# what may differ from the checkpoint ----------------------------------------------------------------------------------


def test_other_classes_size_and_channels(tmp_path: Path) -> None:
    first = student()
    torch.save(student_names(first.state_dict()), tmp_path / "student.pth")
    with pytest.warns(UserWarning, match="heads for 7 classes instead of 5 are newly initialised"):
        net = load_published(tmp_path / "student.pth", num_classes=7, img_size=96, in_chans=1, drop_path_rate=0.1)
    assert {name: logits.shape for name, logits in net.forward_tokens(images(96, 1)).items()} == dict.fromkeys(
        ("class", "conv", "inv"), (2, 7)
    )
    torch.testing.assert_close(net.blocks[1].mlp.fc1.weight, first.blocks[1].mlp.fc1.weight)
    bare = load_published(tmp_path / "student.pth", num_classes=0)
    torch.testing.assert_close(bare(images()), first.forward_head(first.forward_features(images()), pre_logits=True))
    resized = load_published(tmp_path / "student.pth", img_size=96)
    first.set_input_size(96)
    torch.testing.assert_close(resized(images(96)), first(images(96)))


# convert --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["rednet", "student", "deit"])
def test_what_is_converted_timm_loads(kind: str, tmp_path: Path) -> None:
    first = {"rednet": rednet, "student": student, "deit": lambda: deit(distilled=False)}[kind]()
    weights = student_names(first.state_dict()) if kind == "student" else first.state_dict()
    save_file(weights, tmp_path / "published.safetensors")
    out = tmp_path / "new" / "ours.safetensors"
    found = convert(tmp_path / "published.safetensors", out, **({"token_names": []} if kind == "deit" else {}))
    with safe_open(out, "pt") as file:
        about = file.metadata()
    arguments = json.loads(about["arguments"])
    assert about["model"] == found.model
    by_path = timm.create_model(about["model"], checkpoint_path=str(out), **arguments).eval()
    overlay = {"file": str(out), "num_classes": 5}
    by_overlay = timm.create_model(about["model"], pretrained=True, pretrained_cfg_overlay=overlay, **arguments).eval()
    for net in (by_path, by_overlay, load_published(out)):
        assert_same(net, found.weights)
        torch.testing.assert_close(net(images()), first(images()))
    assert [path.name for path in out.parent.iterdir()] == [out.name]


# faults ---------------------------------------------------------------------------------------------------------------


def test_every_key_without_a_place_is_named_as_in_the_file(tmp_path: Path) -> None:
    weights = student_names(student().state_dict())
    del weights["conv_embed.proj.bias"], weights["blocks.1.norm1.weight"]
    weights |= {"conv_embed.extra": torch.zeros(1), "tail": torch.zeros(1), "head_conv.bias": torch.zeros(3)}
    torch.save(weights, tmp_path / "student.pth")
    with pytest.raises(UserError) as fault:
        load_published(tmp_path / "student.pth")
    for phrase in (
        "unexpected keys: conv_embed.extra, tail",
        "missing keys: ",
        "blocks.1.norm1.weight",
        "patch_embed.stems.conv.proj.bias",
        "head_conv.bias [3] instead of [5]",
    ):
        assert phrase in str(fault.value)
    assert "\n" not in str(fault.value)


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda w: w.pop("layer2.0.conv1.weight"), r"layer2\.0\.conv1\.weight"),
        (lambda w: w.update({"layer1.1.conv1.weight": torch.zeros(1)}), r"\(2, 2, 4, 1\) blocks per stage"),
        (lambda w: w.update({"classifier.bias": w["fc.bias"]}), r"twice, as fc\.bias and classifier\.bias"),
        (lambda w: w.update({"fc.weight": torch.zeros(5, 7)}), r"fc\.weight \[5, 7\] instead of \[5, 192\]"),
        (lambda w: w.update({"layer1.0.conv1.weight": torch.zeros(0, 1)}), r"layer1\.0\.conv1\.weight"),
        (lambda w: w.update({"fc.bias": torch.zeros(5, dtype=torch.int64)}), r"fc\.bias is int64"),
        (lambda w: w.update({"fc.weight": w["fc.weight"].to_sparse()}), r"fc\.weight is sparse_coo"),
        (lambda w: w.update({1: torch.zeros(1)}), "neither a dict of tensors by name nor"),
    ],
)
def test_a_spoilt_rednet(spoil: Any, match: str, tmp_path: Path) -> None:
    weights = rednet().state_dict()
    spoil(weights)
    torch.save(weights, tmp_path / "rednet.pth")
    with pytest.raises(UserError, match=match):
        load_published(tmp_path / "rednet.pth")


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"distillation_token": "mixer"}, "not 'mixer'"),
        ({"aligned": {"conv": "conv"}}, "leave out 'aligned'"),
        ({"num_head": 3}, "num_head"),
        ({"depth": 3}, r"missing keys: blocks\.2\."),
        ({"num_heads": 0}, "cannot be loaded as cit_tiny_patch16_224"),
    ],
)
def test_arguments_that_do_not_fit(arguments: dict[str, Any], match: str, tmp_path: Path) -> None:
    torch.save(deit(distilled=True).state_dict(), tmp_path / "deit.pth")
    with pytest.raises(UserError, match=match):
        load_published(tmp_path / "deit.pth", **arguments)


@pytest.mark.parametrize("of", ["student", "deit", "ours"])
def test_a_key_that_numbers_a_hundred_million_blocks_makes_none(of: str, tmp_path: Path) -> None:
    weights = deit(distilled=False).state_dict() if of == "deit" else student_names(student().state_dict())
    path, far = tmp_path / "far.safetensors", {"blocks.99999999.mlp.fc1.weight": torch.zeros(2, 2)}
    about = {"model": "cit_tiny_patch16_224", "arguments": '{"depth": 100000000}'} if of == "ours" else None
    save_file({**weights, **(far if of != "ours" else {})}, path, about)
    with pytest.raises(
        UserError, match=r"blocks\.99999999\.mlp.*none of number 2|depth=100000000, and has \d+ tensors"
    ):
        load_published(path)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ("{", "its arguments are not a JSON object"),
        ('{"depth": "12"}', "says depth='12', and has 1 tensors"),
        ('{"depths": [3000, 1]}', r"says depths=\[3000, 1\], and has 1 tensors"),
    ],
)
def test_what_a_strangers_file_says_of_itself_is_checked(arguments: str, match: str, tmp_path: Path) -> None:
    path = tmp_path / "strange.safetensors"
    save_file({"a": torch.zeros(1)}, path, {"model": "rednet26", "arguments": arguments})
    with pytest.raises(UserError, match=match):
        load_published(path)


def test_what_shapes_do_not_show_is_asked_for(tmp_path: Path) -> None:
    torch.save(student_names(student(embed_dim=48, num_heads=3).state_dict()), tmp_path / "narrow.pth")
    with pytest.raises(UserError, match="give num_heads=N"):
        load_published(tmp_path / "narrow.pth")
    assert load_published(tmp_path / "narrow.pth", num_heads=3).blocks[0].attn.num_heads == 3
    torch.save(student_names(student(img_size=(64, 32)).state_dict()), tmp_path / "wide.pth")
    with pytest.raises(UserError, match="positions for 8 patches"):
        load_published(tmp_path / "wide.pth")


class Trap:
    """Unpickled by ordinary pickle it would run code."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("sprung"),))


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ({}, "holds no weights"),
        ({"a": torch.zeros(1), "b": 3}, "holds no weights"),
        ({"a.weight": torch.zeros(1)}, "an unknown layout"),
        ({"model": {"a.weight": torch.zeros(1)}, "optimizer": Trap()}, "not only tensors and plain values"),
    ],
)
def test_files_that_are_not_checkpoints(
    content: Any, match: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(content, tmp_path / "file.pth")
    with pytest.raises(UserError, match=match):
        load_published("file.pth")
    assert [path.name for path in tmp_path.iterdir()] == ["file.pth"]


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut"])
def test_damaged_files(suffix: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / f"file{suffix}"
    path.write_bytes(content)
    with pytest.raises(UserError, match="it is damaged"):
        load_published(path)


# sizes ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "millions", "tolerance"),
    [
        ("rednet26", 9.233, 1e-3),  # the published figures
        ("rednet38", 12.387, 1e-3),
        ("rednet50", 15.541, 1e-3),
        ("rednet101", 25.653, 1e-3),
        ("rednet152", 33.985, 1e-3),
        ("cit_tiny_patch16_224", 6, 0.5),  # the paper's
        ("cit_small_patch16_224", 22, 1),
        ("cit_small_aligned_patch16_224", 26, 1),
    ],
)
def test_parameters_in_millions(name: str, millions: float, tolerance: float) -> None:
    with torch.device("meta"):
        net = timm.create_model(name)
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(millions, abs=tolerance)
