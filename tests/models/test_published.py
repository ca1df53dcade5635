"""The models against tensors that the published implementations computed, and the published sizes."""

import json
import re
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open
from torch import Tensor

from coadvise.models import RedNet, Student

PARAMETERS = {  # millions, with the 1000-class head
    "rednet26": 9.233,
    "rednet38": 12.387,
    "rednet50": 15.541,
    "rednet101": 25.653,
    "rednet152": 33.985,
}


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, int]]:
    """Weights, other tensors and constructor arguments of one reference file."""
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (not a dict)
        arguments = {key: json.loads(value) for key, value in file.metadata().items()}
    weights = {key.removeprefix("weights."): value for key, value in tensors.items() if key.startswith("weights.")}
    return weights, tensors, arguments


def assert_relative(actual: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


def test_rednet26_stages_and_input_gradient(reference: Path) -> None:
    weights, tensors, arguments = load(reference / "rednet26_w16.safetensors")
    widths = tuple(4 * arguments["base_channels"] * 2**i for i in range(4))
    net = RedNet(depths=(1, 2, 4, 1), widths=widths, stem_width=arguments["stem_channels"], num_classes=0).eval()
    net.load_state_dict(weights, strict=True)
    image = tensors["input"].requires_grad_()
    stages = net.forward_intermediates(image, indices=[1, 2, 3, 4], intermediates_only=True)
    for i, stage in enumerate(stages, start=1):
        assert_relative(stage, tensors[f"stage{i}"])
    (gradient,) = torch.autograd.grad(stages[-1].square().mean(), image)
    assert_relative(gradient, tensors["input_grad"])


def test_aligned_student_logits(reference: Path) -> None:
    weights, tensors, arguments = load(reference / "student_aligned_d48.safetensors")
    student = Student(aligned={"conv": "conv", "inv": "inv"}, **arguments).eval()
    student.load_state_dict({re.sub(r"^(\w+)_embed\.", r"patch_embed.stems.\1.", k): v for k, v in weights.items()})
    with torch.no_grad():
        logits = student.forward_tokens(tensors["input"])
        assert_relative(student(tensors["input"]), tensors["class_logits"])
    for name in ("class", "conv", "inv"):
        assert_relative(logits[name], tensors[f"{name}_logits"])
    assert_relative(torch.stack(list(logits.values())).mean(0), tensors["average_logits"])


@pytest.mark.parametrize(("name", "millions"), PARAMETERS.items())
def test_rednet_parameters(name: str, millions: float) -> None:
    with torch.device("meta"):
        net = timm.create_model(name)
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(millions, abs=1e-3)


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("cit_tiny_patch16_224", 5.5, 6.5),
        ("cit_small_patch16_224", 21.5, 23.0),
        ("cit_small_aligned_patch16_224", 25.0, 26.5),
        ("resnet_small", 0.4, 1.2),
        ("rednet_small", 0.4, 1.2),
        ("cit_micro_patch4_32", 0.3, 1.0),
        ("cit_micro_aligned_patch4_32", 0.3, 1.0),
    ],
)
def test_parameters_in_millions(name: str, low: float, high: float) -> None:
    net = timm.create_model(name)
    assert low < sum(p.numel() for p in net.parameters()) / 1e6 < high
