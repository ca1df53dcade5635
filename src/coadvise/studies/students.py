"""Table 4: students of other inductive bias, advised through one output head or through one head a teacher.

All three use the preset's recipe; its model arguments are for the transformer only. The paper claims that a student
with less bias learns better from several teachers. Judged as: advice adds more to the transformer than to ResNet-10.
"""

from collections.abc import Callable, Mapping
from typing import Any

from coadvise.config import RunConfig
from coadvise.runs.plan import ALONE
from coadvise.studies.columns import ABOVE_ALONE, TOP1
from coadvise.studies.question import BOTH, NAIVE, ON_CLASS_TOKEN, RANDOM, Order, Row, Study

SMALL_IMAGES = 96  # pixels; up to this size, networks as small as the micro student that keep the full resolution
SMALL_RESNET10 = {"widths": [24, 48, 96, 192], "stem_kernel": 3, "stem_stride": 1, "stem_pool": False}
SMALL_MIXER = {"patch_size": 4, "num_blocks": 6, "embed_dim": 96}


def student(
    model: str, small: Mapping[str, Any], advice: Mapping[str, str]
) -> Callable[[RunConfig], Mapping[str, Any]]:
    """Changes that give this student instead of the preset's."""

    def changes(config: RunConfig) -> Mapping[str, Any]:
        arguments = small if config.data.image_size <= SMALL_IMAGES else {}
        return {"student.model": model, "student.model_kwargs": dict(arguments), **advice}

    return changes


def rows(name: str, one_output: Any, separate_heads: Any) -> list[Row]:
    return [
        Row(f"{name}, alone", BOTH, one_output, ALONE),
        Row(f"{name}, both teachers through one output", BOTH, one_output),
        Row(f"{name}, both through separate heads", BOTH, separate_heads),
    ]


STUDY = Study(
    "Table 4: students of other inductive bias (tokens not aligned)",
    [
        *rows("transformer", NAIVE, RANDOM),
        *rows("ResNet-10", *(student("resnet10_coadvised", SMALL_RESNET10, advice) for advice in (ON_CLASS_TOKEN, {}))),
        *rows("Mixer-Ti", *(student("mixer_tiny_coadvised", SMALL_MIXER, advice) for advice in (ON_CLASS_TOKEN, {}))),
    ],
    [
        Order("transformer, both through separate heads", "transformer, alone"),
        Order("transformer, both through separate heads", "transformer, both teachers through one output"),
        Order("transformer, both through separate heads", "ResNet-10, both through separate heads", ABOVE_ALONE.name),
    ],
    [TOP1, ABOVE_ALONE],
)
