"""The networks of the paper's tables, and the preset's networks that stand in for them. Imports nothing heavy."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

from pydantic import JsonValue

from coadvise.config.schema import ImageSize, RunConfig, TeacherConfig, plain_size, sides
from coadvise.errors import UserError

SMALL_IMAGES = 96  # pixels; up to this size networks keep the full resolution for longer than the paper's do

# Every network that a table names: its timm name.
PAPER_MODELS = {
    "ResNet-18": "resnet18",
    "ResNet-34": "resnet34",
    "ResNet-50": "resnet50",
    "ResNet-101": "resnet101",
    "ResNet-152": "resnet152",
    "RegNetY-200M": "regnety_002",
    "RegNetY-600M": "regnety_006",
    "RegNetY-4GF": "regnety_040",
    "RegNetY-8GF": "regnety_080",
    "RegNetY-16GF": "regnety_160",
    "RedNet-26": "rednet26",
    "RedNet-38": "rednet38",
    "RedNet-50": "rednet50",
    "RedNet-101": "rednet101",
    "RedNet-152": "rednet152",
    "ViT-B/16": "vit_base_patch16_224",
    "ViT-L/16": "vit_large_patch16_224",
    "DeiT-Ti": "deit_tiny_patch16_224",
    "DeiT-S": "deit_small_patch16_224",
    "DeiT-Ti-KD": "deit_tiny_distilled_patch16_224",
    "DeiT-S-KD": "deit_small_distilled_patch16_224",
    "Transformer-Ti": "cit_tiny_patch16_224",
    "Transformer-S": "cit_small_patch16_224",
    "CiT-Ti": "cit_tiny_patch16_224",
    "CiT-S": "cit_small_patch16_224",
    "CiT-SAK": "cit_small_aligned_patch16_224",
}
STUDENT = "student"  # the key of the student in `Study.networks`


@dataclass(frozen=True)
class Teacher:
    """A teacher of a study.

    Attributes:
        origin: the preset's teacher whose recipe and advice it has.
        paper: the paper's network, a key of `PAPER_MODELS`.
        blocks: how many times the origin's blocks a small network has in its place.
        small: the small network itself, where it is of another family than the origin.
        again: it is a second network like its origin, from another seed.
    """

    origin: str
    paper: str
    blocks: float = 1
    small: Mapping[str, Any] = field(default_factory=dict)
    again: bool = False


_STRIDE_8: Mapping[str, Any] = {"output_stride": 8}  # 4 x 4 positions of 32 x 32 pixels, as the small ResNet has
TEACHERS: Mapping[str, Teacher] = {
    "conv": Teacher("conv", "ResNet-18"),
    "conv2": Teacher("conv", "ResNet-18", again=True),
    "conv34": Teacher("conv", "ResNet-34", 1.5),
    "conv50": Teacher("conv", "ResNet-50", 2),
    "conv101": Teacher("conv", "ResNet-101", 3),
    "conv152": Teacher("conv", "ResNet-152", 4),
    "regnet200": Teacher("conv", "RegNetY-200M", small=_STRIDE_8),
    "regnet600": Teacher("conv", "RegNetY-600M", small=_STRIDE_8),
    "inv": Teacher("inv", "RedNet-26"),
    "inv2": Teacher("inv", "RedNet-26", again=True),
    "inv38": Teacher("inv", "RedNet-38", 1.5),
    "inv50": Teacher("inv", "RedNet-50", 2),
    "inv101": Teacher("inv", "RedNet-101", 3),
    "inv152": Teacher("inv", "RedNet-152", 4),
}
DEPTHS: Mapping[str, Sequence[int]] = {"resnet_small": (1, 1, 1), "rednet_small": (1, 2, 2)}  # the defaults


def teacher_config(name: str, preset: RunConfig, paper: Mapping[str, str] | None) -> TeacherConfig:
    """The configuration of a study's teacher; which token it advises is left to the row.

    Args:
        name: a key of `TEACHERS`.
        paper: for the paper's own networks: those of this study by teacher, where they are not the ones of `TEACHERS`.

    Raises:
        UserError: the preset lacks the origin, or gives its weights although this teacher has to be trained.
    """
    teacher = TEACHERS[name]
    if teacher.origin not in preset.teachers:
        raise UserError(
            f"this study needs a teacher '{teacher.origin}', the preset has {', '.join(preset.teachers)}; choose a "
            "preset with teachers conv and inv"
        )
    given = preset.teachers[teacher.origin].model_copy(update={"token": None})
    model, arguments = given.model, dict(given.model_kwargs)
    same = name == teacher.origin or teacher.again
    if paper is not None:
        wanted = PAPER_MODELS[paper.get(teacher.origin if same else name, teacher.paper)]
        if model.partition(".")[0] != wanted:  # the tag names weights
            model, arguments = wanted, {}
    elif not same and teacher.small and min(sides(preset.data.image_size)) <= SMALL_IMAGES:
        model, arguments = PAPER_MODELS[teacher.paper], dict(teacher.small)
    elif not same and model in DEPTHS and not teacher.small:
        depths: Any = arguments.get("depths", DEPTHS[model])
        arguments["depths"] = list[JsonValue](scaled(depths, teacher.blocks))
    elif not same:
        model, arguments = PAPER_MODELS[teacher.paper], {}
    if name != teacher.origin or model != given.model:
        must_train(teacher.origin, preset, f"as {name} ({model})")
    return given.model_copy(update={"model": model, "model_kwargs": arguments})


def must_train(name: str, config: RunConfig, how: str) -> TeacherConfig:
    """A preset's teacher. Raises UserError if its weights are given: the study trains it, as `how` says."""
    teacher = config.teachers[name]
    if not teacher.trained_here:
        raise UserError(
            f"the weights of teacher '{name}' are given, but this study trains it {how}; leave out "
            f"teachers.{name}.start"
        )
    return teacher


def scaled(depths: Sequence[int], factor: float) -> list[int]:
    """Blocks of each stage for a network with about `factor` times the blocks, in the same proportion."""
    ends = [0, *(int(factor * total + 0.5) for total in accumulate(depths))]
    return [max(1, end - start) for start, end in pairwise(ends)]


def check_paper_size(image_size: ImageSize) -> None:
    """Raises UserError for images that are too small for the paper's networks."""
    if min(sides(image_size)) <= SMALL_IMAGES:
        raise UserError(
            f"--networks paper at data.image_size={plain_size(image_size)}: the paper's networks have a stride of "
            "32 pixels and patches of 16, for images of 224 pixels; use --preset imagenet100, or leave out --networks "
            "to train the preset's networks in their place"
        )


def student_changes(preset: RunConfig, network: str) -> dict[str, Any]:
    """Changes that give the paper's student. Stochastic depth is part of the recipe and stays."""
    kept = {key: value for key, value in preset.student.model_kwargs.items() if key == "drop_path_rate"}
    return {"student.model": PAPER_MODELS[network], "student.model_kwargs": kept}
