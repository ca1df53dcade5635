"""Table 4: students with a bias of their own beside the transformer: advised through one output, or a head a teacher.

The recipe is the preset's for all three, the preset's arguments are the transformer's alone. The paper's claim that a
student of less bias is better suited to learn from several teachers is read so: they are worth more to a
transformer than to ResNet-10. Which of ResNet-10's and Mixer-Ti's own rows it puts above which was not at hand.
"""

from collections.abc import Callable, Mapping
from typing import Any

from coadvise.config import RunConfig
from coadvise.runs.plan import ALONE
from coadvise.studies.columns import ABOVE_ALONE, TOP1
from coadvise.studies.question import BOTH, NAIVE, ON_CLASS_TOKEN, RANDOM, Order, Row, Study

SMALL_IMAGES = 96  # pixels; up to there networks of about the micro student's size, which keep the full resolution
SMALL_RESNET10 = {"widths": [24, 48, 96, 192], "stem_kernel": 3, "stem_stride": 1, "stem_pool": False}
SMALL_MIXER = {"patch_size": 4, "num_blocks": 6, "embed_dim": 96}


def student(
    model: str, small: Mapping[str, Any], advice: Mapping[str, str]
) -> Callable[[RunConfig], Mapping[str, Any]]:
    """The configuration with this student in place of the preset's."""

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
