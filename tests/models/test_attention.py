"""Where tokens look, against attention computed by hand."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from tiny import records
from torch import Tensor, nn

from coadvise import UserError, load
from coadvise.models import attention as attention_module
from coadvise.models.attention import AttentionMaps, attention_maps
from coadvise.models.network import Network
from coadvise.models.student import Student
from coadvise.models.token_vit import create_token_vit

SIZE: dict[str, Any] = {
    "img_size": (16, 24),
    "patch_size": 8,
    "embed_dim": 24,
    "depth": 3,
    "num_heads": 3,
    "num_classes": 5,
}


def _student() -> Student:
    return Student(**SIZE, aligned={"conv": "conv", "inv": "inv"})


def _token_vit() -> nn.Module:
    return create_token_vit("vit_small_patch14_reg4_dinov2", ["conv", "inv"], **SIZE)


def _network(model: nn.Module) -> Network:
    return Network(model, {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]})


def by_hand(body: Any, sequence: Tensor) -> list[Tensor]:
    """Attention [B, N, N] of each block, mean over heads, from the sequence that enters the first."""
    found = []
    for block in body.blocks:
        x = block.norm1(sequence)
        query, key, _ = block.attn.qkv(x).unflatten(-1, (3, 3, -1)).permute(2, 0, 3, 1, 4)
        found.append((query @ key.mT / query.shape[-1] ** 0.5).softmax(-1).mean(1))
        sequence = block(sequence)
    return found


@pytest.mark.parametrize(("make", "rows"), [(_student, (0, 1, 2)), (_token_vit, (0, 5, 6))])
def test_maps_are_the_rows_of_the_tokens(make: Any, rows: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_module, "AT_ONCE", 2)  # of three images
    torch.manual_seed(0)
    model = make().train()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    body, images = getattr(model, "vit", model), torch.rand(3, 3, 16, 24)
    entered: list[Tensor] = []
    hook = body.blocks[0].register_forward_pre_hook(lambda module, given: entered.append(given[0]))
    fused = [block.attn.fused_attn for block in body.blocks]
    found = attention_maps(_network(model), images)
    hook.remove()
    assert (model.training, [block.attn.fused_attn for block in body.blocks]) == (True, fused)
    sequence = torch.cat(entered)
    with torch.no_grad():  # what enters is made of normalised images
        model.eval()
        seen: list[Tensor] = []
        again = body.blocks[0].register_forward_pre_hook(lambda module, given: seen.append(given[0]))
        model.forward_features(
            (images - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)) / torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)
        )
        again.remove()
    torch.testing.assert_close(sequence, seen[0])
    with torch.no_grad():
        weights = by_hand(body, sequence)
    joint = torch.eye(weights[0].shape[-1])
    for layer in weights:
        joint = (0.5 * layer + 0.5 * torch.eye(layer.shape[-1])) @ joint
    for attention, maps in ((weights[-1], found.last), (joint, found.rollout)):
        assert list(maps) == ["class", "conv", "inv"]
        for row, map_ in zip(rows, maps.values(), strict=True):
            wanted = attention[:, row, rows[-1] + 1 :]
            torch.testing.assert_close(map_, (wanted / wanted.sum(-1, keepdim=True)).view(3, 2, 3))


def test_the_overlap_of_two_maps_is_a_share() -> None:
    one = torch.tensor([[[1.0, 0.0]], [[0.5, 0.5]]])
    other = torch.tensor([[[0.0, 1.0]], [[0.5, 0.5]]])
    (found,) = AttentionMaps({"a": one, "b": other}, {"a": one, "b": one}).overlaps()
    assert found == {"tokens": ["a", "b"], "last": 0.5, "rollout": 1.0}


def test_a_network_without_attention_is_named() -> None:
    with pytest.raises(UserError, match="a ResNet has no tokens that look at patches"):
        attention_maps(_network(timm.create_model("resnet10t")), torch.rand(1, 3, 32, 32))


def test_a_run_records_overlaps_and_draws_them(finished: Path, tiny_images: Path, tmp_path: Path) -> None:
    pairs = records(finished, "verdict")[-1]["overlaps"]
    assert [pair["tokens"] for pair in pairs] == [["class", "conv"], ["class", "inv"], ["conv", "inv"]]
    student = load(finished)
    paths = [tiny_images / "val" / label / f"{number}.png" for label in ("blue", "green", "red") for number in range(4)]
    for wanted, pair in zip(student.attention_maps(paths).overlaps(), pairs, strict=True):
        assert pair["images"] == 12
        assert {kind: pair[kind] for kind in ("last", "rollout")} == pytest.approx(
            {kind: wanted[kind] for kind in ("last", "rollout")}, abs=1e-5
        )
    page = (finished / "report.html").read_text()
    assert "disagree on 0 of" not in page
    assert "of what they look at" in page
    assert page.count('class="attention"') == page.count('class="card"') > 0
    student.draw_attention(paths[:3], tmp_path / "out.png")
    with Image.open(tmp_path / "out.png") as drawn:
        pixels = np.asarray(drawn)
    assert pixels.shape[0] > 3 * 160
    assert pixels.shape[1] > 4 * 160
    for images, out, said in (
        (paths, tmp_path / "out.jpg", "must end in .png"),
        (paths, tmp_path / "no" / "out.png", "must end in .png, in a folder that is there"),
        (paths * 3, tmp_path / "many.png", "36 images; where tokens look is drawn for 1 to 32"),
    ):
        with pytest.raises(UserError, match=said):
            student.draw_attention(images, out)
    assert [path.name for path in tmp_path.iterdir()] == ["out.png"]
