"""Networks of a run: views and seeds, and students of other architectures."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import CLASSES, ONE_EPOCH, records, weights_of

from coadvise import fit, load
from coadvise.config.reading import load_config
from coadvise.config.schema import AugmentConfig, ModelConfig
from coadvise.data.scan import scan
from coadvise.data.sources import source_of
from coadvise.models.network import build_network
from coadvise.runs.network_job import _job, initial_network
from coadvise.runs.plan import ALONE, TEACHER, Part
from coadvise.runs.run import Run
from coadvise.training.engine import Engine
from coadvise.training.listener import Silent
from coadvise.training.metrics import Recorder

STUDENTS: dict[str, dict[str, Any]] = {
    "resnet10_coadvised": {"widths": [8, 16], "depths": [1, 1], "strides": [1, 2], "stem_stride": 1},
    "mixer_tiny_coadvised": {"patch_size": 4, "num_blocks": 1, "embed_dim": 24},
}


@pytest.mark.parametrize(("model", "tokens"), [*zip(STUDENTS, [("conv", "inv"), ()], strict=True)])
def test_a_student_of_other_bias_is_advised_and_compared(
    model: str, tokens: tuple[str, ...], tiny_images: Path, tiny_preset: str, tmp_path: Path
) -> None:
    """Through a head a teacher, or through the one output that it has then."""
    arguments = STUDENTS[model]
    overrides = [f"student.model={model}", f"student.model_kwargs={json.dumps(arguments)}"]
    overrides += [] if tokens else ["teachers.conv.token=class", "teachers.inv.token=class"]
    run = fit(tiny_images, tiny_preset, tmp_path / "run", baseline=True, overrides=[*ONE_EPOCH, *overrides])
    (result,) = (result for result in records(run, "result") if result["role"] == "advised")
    assert list(result["top1"]) == (["class", "conv", "inv", "average"] if tokens else ["class"])
    assert load(run).predict(torch.rand(3, 16, 16))[0].label in CLASSES

    first = build_network(ModelConfig(model=model, model_kwargs=arguments), CLASSES, 16, 0, tokens).model
    names = {id(module): name for name, module in first.named_modules()}
    for part, trained in (("advised", ("class", *tokens)), ("alone", ("class",))):
        after = weights_of(run, f"students/{part}-0")
        for token, head in first.heads().items():
            assert torch.equal(after[f"{names[id(head)]}.weight"], head.weight) == (token not in trained), (part, token)


def test_a_teacher_is_trained_on_its_own_views_and_students_by_their_seeds(
    tiny_images: Path, tiny_preset: str, tmp_path: Path
) -> None:
    config = load_config(tiny_preset, ["seed=4", "teachers.conv.augment.kind=none"], source=str(tiny_images))
    dataset = scan(source_of(config), config.data.image_size, config.in_memory)
    run = Run(tmp_path, config, dataset, Engine(config.engine), Recorder(tmp_path, False, Silent().say), Silent())
    parts = [*(Part(f"teachers/{name}", TEACHER, 4, name) for name in ("conv", "inv")), Part("alone", ALONE, 6)]
    conv, inv, alone = (_job(run, part, initial_network(part, config, CLASSES)) for part in parts)
    assert conv.views.augment == AugmentConfig(kind="none")
    assert inv.views.augment == alone.views.augment == config.augment
    assert conv.seed == conv.views.seed != inv.seed == inv.views.seed
    assert alone.seed == alone.views.seed == 6
