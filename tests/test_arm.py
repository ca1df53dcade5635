"""A student's way through a run, whatever its architecture."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny import CLASSES, records, weights_of

from coadvise import fit, load
from coadvise.config import ModelConfig
from coadvise.errors import UserError
from coadvise.networks import build_network

STUDENTS: dict[str, dict[str, Any]] = {
    "resnet10_coadvised": {"widths": [8, 16], "depths": [1, 1], "strides": [1, 2], "stem_stride": 1},
    "mixer_tiny_coadvised": {"patch_size": 4, "num_blocks": 1, "embed_dim": 24},
}
ONCE = [f"{part}.recipe.epochs=1" for part in ("teachers.conv", "teachers.inv", "student")]


@pytest.mark.parametrize("separate", [True, False])
@pytest.mark.parametrize("model", STUDENTS)
def test_a_student_of_other_bias_is_advised_and_compared(
    model: str, separate: bool, tiny_images: Path, tiny_preset: str, tmp_path: Path
) -> None:
    arguments = {**STUDENTS[model], "separate_heads": separate}
    overrides = [f"student.model={model}", f"student.model_kwargs={yaml.safe_dump(arguments, default_flow_style=True)}"]
    run = fit(tiny_images, tiny_preset, tmp_path / "run", baseline=True, overrides=[*ONCE, *overrides])
    for result in records(run, "result"):
        if result["role"] == "advised":
            assert list(result["top1"]) == ["class", "conv", "inv", "average"]
    assert load(run).predict(torch.rand(3, 16, 16), answer="inv")[0].label in CLASSES

    first = build_network(ModelConfig(model=model, model_kwargs=arguments), CLASSES, 16, 0, ("conv", "inv")).model
    for part, trained in (("advised", first.heads()), ("alone", {"class": first.get_classifier()})):
        after = weights_of(run, f"students/{part}-0")
        same = {key for key, value in first.state_dict().items() if torch.equal(after[key], value)}
        heads = {id(head) for head in trained.values()}
        for name, head in first.heads().items():
            key = next(key for key, value in first.named_modules() if value is head)
            assert ({f"{key}.weight", f"{key}.bias"} <= same) == (id(head) not in heads), (part, name)


def test_a_student_needs_tokens(tiny_images: Path, tiny_preset: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'resnet18' cannot be made .* students are cit_tiny_patch16_224, "):
        fit(tiny_images, tiny_preset, tmp_path / "run", overrides=["student.model=resnet18"])
    assert not (tmp_path / "run").exists()
