"""Inference of students against timm's distilled DeiTs of the same size, at 224 pixels.

Both run in evaluation mode on one batch of noise in channels-last memory, with the same precision (bfloat16 is
autocast) and compile state. Ours is `Student.for_inference()`, the class token's logits; timm's averages two heads. The
weights are random, which changes no time. Three comparisons:

    CiT-Ti            cit_tiny_patch16_224 against deit_tiny_distilled_patch16_224
    CiT-S             cit_small_patch16_224 against deit_small_distilled_patch16_224
    CiT-S, aligned    cit_small_aligned_patch16_224 against the latter

The calls take turns, and every figure is a median. The floor is the arithmetic of the class token's logits at the speed
of a large matrix product of the same run, in the faster of float32 and the precision.
"""

from collections.abc import Callable

import timm
import torch
from torch import Tensor, nn

from benchmarks.floor import operations, peak_operations, product_note
from benchmarks.table import Row, Setting, Table, machine
from coadvise.evaluation.speed import interleaved
from coadvise.models import Student

SIZE = 224
BATCH_SIZE = {"cpu": 8, "cuda": 64}
CALLS = 10  # a timed turn on CUDA, where one call alone would mostly measure the launching
DEIT_TINY, DEIT_SMALL = "deit_tiny_distilled_patch16_224", "deit_small_distilled_patch16_224"
COMPARISONS = (  # row, student, peer, goal in PyTorch, goal in ONNX Runtime (benchmarks/export.py)
    ("CiT-Ti", "cit_tiny_patch16_224", DEIT_TINY, 1.05, 1.0),
    ("CiT-S", "cit_small_patch16_224", DEIT_SMALL, 1.05, 1.0),
    ("CiT-S, aligned", "cit_small_aligned_patch16_224", DEIT_SMALL, 0.75, 0.7),
)
NOTES = (
    "the paper's ratios of the same three, all heads computed, on one GPU, batch 64: 0.997, 1.012, 0.914",
    "arithmetic: the aligned student multiplies 6.1 billion times an image, DeiT-S 4.6: 0.76 where that is the limit",
)


def prepared(model: nn.Module, images: Tensor, setting: Setting) -> Callable[[], Tensor]:
    """A call of a network, the same for student and peer."""
    model = model.to(setting.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if setting.compile:
        model.compile()
    calls = CALLS if setting.device.type == "cuda" else 1

    def call() -> Tensor:
        with (
            torch.inference_mode(),
            torch.autocast(setting.device.type, torch.bfloat16, setting.dtype != torch.float32),
        ):
            for _ in range(calls):
                logits: Tensor = model(images)
        return logits

    return call


def networks() -> dict[str, nn.Module]:
    """Both peers, and the students for inference."""
    torch.manual_seed(0)
    models: dict[str, nn.Module] = {name: timm.create_model(name).eval() for name in (DEIT_TINY, DEIT_SMALL)}
    for _, name, *_ in COMPARISONS:
        model = timm.create_model(name)
        assert isinstance(model, Student)
        models[name] = model.for_inference()
    return models


def run(setting: Setting) -> Table:
    """Times the five networks."""
    batch = setting.batch_size or BATCH_SIZE[setting.device.type]
    models = networks()
    images = torch.randn(batch, 3, SIZE, SIZE, device=setting.device).contiguous(memory_format=torch.channels_last)
    peak = peak_operations(setting)
    floor = {name: peak / operations(model, SIZE) for name, model in models.items()}
    calls = {name: prepared(model, images, setting) for name, model in models.items()}
    images_a_call = batch * (CALLS if setting.device.type == "cuda" else 1)
    seconds = interleaved(calls, setting.repeats, setting.synchronise)
    speed = {name: images_a_call / time for name, time in seconds.items()}
    rows = [
        Row(row, "images/s", speed[name], speed[peer], floor[name], goal) for row, name, peer, goal, _ in COMPARISONS
    ]
    about = {**machine(setting), "batch": batch, "pixels": SIZE, "layout": "channels-last", "mode": "inference"}
    return Table(
        "inference of a student against timm's distilled DeiT", "timm DeiT", rows, about, [product_note(peak), *NOTES]
    )
