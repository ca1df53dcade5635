"""A training step against the same transformer in a bare PyTorch loop.

Ours is the loop of `fit` itself: views (augmented as in the preset small-images), normalisation, loss, gradient
clipping, optimiser; no averaged weights. The bare loop is forward, cross-entropy, backward and fused AdamW on one fixed
batch in memory: no data, augmentation, mixed labels or clipping. Three comparisons:

    student             cit_micro_patch4_32 without teachers, against timm's VisionTransformer of the same shape with
                        two register tokens and timm's defaults
    aligned student     cit_micro_aligned_patch4_32 without teachers, against the same student in the same memory
                        layout: the cost of the loop around it
    with two teachers   the first, advised by the preset's two teachers, against the first's bare loop

The two loops take turns, one step (on CUDA 20 steps) each; figures are medians. The floor is the arithmetic of the
student's forward and backward pass and of its teachers' forward passes, at the speed of a large matrix product.
"""

import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.floor import operations, peak_operations, product_note
from benchmarks.table import Row, Setting, Table, in_turns, machine
from coadvise.advice import LossWeights
from coadvise.config.reading import load_config
from coadvise.config.schema import ModelConfig, RecipeConfig
from coadvise.data.scanned import ScannedSplit
from coadvise.data.sources.folder import FolderSplit
from coadvise.data.views import Views
from coadvise.distill.loss import CoAdvice
from coadvise.distill.teachers import Teacher, Teachers
from coadvise.models import TokenModel
from coadvise.models.network import Network, build_network
from coadvise.models.small import CIT_MICRO
from coadvise.training.checkpoint import Checkpoints
from coadvise.training.engine import Engine, plain_attention
from coadvise.training.loop import Advisers, Progress, Training, train
from coadvise.training.metrics import Recorder

CONFIG = load_config("small-images")
SIZE, CLASSES, BATCH_SIZE, TOKENS = 32, tuple(f"class {n}" for n in range(10)), 64, ("conv", "inv")
SKIP, GOAL = 4, 0.85
PLAIN, ALIGNED = "cit_micro_patch4_32", "cit_micro_aligned_patch4_32"


def steps_of(setting: Setting) -> tuple[int, int, int]:
    """(steps a turn, steps a run, images a step)."""
    turn = 20 if setting.device.type == "cuda" else 1
    return turn, (SKIP + setting.repeats + 1) * turn, setting.batch_size or BATCH_SIZE


def random_split(images: int) -> ScannedSplit:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (images, 3, SIZE, SIZE), dtype=np.uint8)
    labels = rng.integers(0, len(CLASSES), images)
    return ScannedSplit(FolderSplit(Path(), (), labels), labels, pixels, (), Counter({(SIZE, SIZE): images}))


def student(name: str, advised: bool) -> Network:
    """As `fit` builds it: without teachers, the heads without advice get no gradient."""
    network = build_network(ModelConfig(model=name), CLASSES, SIZE, seed=0, tokens=TOKENS)
    if not advised:
        assert isinstance(network.model, TokenModel)
        network.model.train_heads(["class"])
    return network


def timm_transformer() -> nn.Module:
    """timm's own model of the student's shape: the same layers, heads and tokens, and one output head, not three."""
    return timm.create_model("vit_tiny_patch16_224", reg_tokens=len(TOKENS), num_classes=len(CLASSES), **CIT_MICRO)


def bare_loop(model: nn.Module, setting: Setting, layout: torch.memory_format) -> Callable[[Progress], None]:
    """Plain PyTorch on a fixed batch, for `in_turns`."""
    _, count, batch_size = steps_of(setting)
    model = model.to(setting.device).to(memory_format=layout).train()  # type: ignore[call-overload]
    images = torch.randn(batch_size, 3, SIZE, SIZE, device=setting.device).contiguous(memory_format=layout)
    labels = torch.randint(len(CLASSES), (batch_size,), device=setting.device)
    forward = torch.compile(model) if setting.compile else model
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05, fused=True)

    def run(progress: Progress) -> None:
        for step in range(1, count + 1):
            with torch.autocast(setting.device.type, torch.bfloat16, setting.dtype == torch.bfloat16):
                loss = F.cross_entropy(forward(images), labels)
            loss.backward()
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            progress("bare", step, count, {})

    return run


def training(
    network: Network, advisers: Advisers | None, setting: Setting, engine: Engine
) -> Callable[[Progress], object]:
    """The loop of `fit` for one epoch of random images, for `in_turns`."""
    _, count, batch_size = steps_of(setting)
    recipe = RecipeConfig(epochs=1, batch_size=batch_size, warmup_epochs=0, clip=1.0, evaluations=1)
    views = Views(random_split(count * batch_size), CONFIG.augment, len(CLASSES), SIZE, seed=0).on(engine.device)
    weights = CONFIG.loss_weights if advisers else LossWeights()
    job = Training(
        "students/timed", 0, network, recipe, views, advisers or Teachers({}), CoAdvice(weights),
        evaluate=lambda network, step: {"class": 0.0}, workers=0, checkpoint_seconds=1e9,
    )  # fmt: skip

    def run(progress: Progress) -> object:
        with tempfile.TemporaryDirectory() as folder:
            record = Recorder(Path(folder), write=False, say=lambda text: None)
            return train(job, Checkpoints(Path(folder, "checkpoints")), engine, record, progress)

    return run


def preset_teachers(engine: Engine) -> Teachers:
    """The preset's teachers, prepared as for a run. They have random weights and the statistics of random images."""
    teachers = {}
    images = torch.rand(128, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    for name, teacher in CONFIG.teachers.items():
        network = build_network(teacher, CLASSES, SIZE, seed=1).train()
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None  # statistics of these images alone; with the initial ones activations overflow
        with torch.no_grad():
            network(images)
        teachers[name] = Teacher(name, network, CLASSES)
        engine.prepare(teachers[name])
    return Teachers(teachers)


def step_operations(network: Network, teachers: Teachers | None) -> int:
    """Multiplications and additions of a training step, per image."""
    advice = sum(operations(teacher, SIZE) for teacher in teachers.by_name.values()) if teachers else 0
    return operations(network.model, SIZE, backward=True) + advice


def run(setting: Setting) -> Table:
    """Times the three students. With `compile`, the students' forward passes are compiled, as in training."""
    turn, _, batch_size = steps_of(setting)
    torch.manual_seed(0)
    same = student(ALIGNED, advised=False)
    if setting.device.type == "cpu":
        plain_attention(same)  # as the engine prepares ours
    peak = peak_operations(setting)
    usual, rows = torch.contiguous_format, []
    with setting.engine() as engine:
        for name, own, bare, layout, teachers, goal in (
            ("student", student(PLAIN, False), timm_transformer(), usual, None, GOAL),
            ("aligned student", student(ALIGNED, False), same.model, engine.memory_format, None, GOAL),
            ("with two teachers", student(PLAIN, True), timm_transformer(), usual, preset_teachers(engine), 0.0),
        ):
            floor = peak / step_operations(own, teachers)
            runs = {"ours": training(own, teachers, setting, engine), "bare": bare_loop(bare, setting, layout)}
            speed = {n: batch_size / s for n, s in in_turns(runs, turn, SKIP, setting.synchronise).items()}
            rows.append(Row(name, "images/s", speed["ours"], speed["bare"], floor, goal))
    about = {**machine(setting), "batch": batch_size, "pixels": SIZE, "mode": "training"}
    about["layout"] = "channels-last; the bare transformer's contiguous"
    return Table("training step against a bare PyTorch loop", "bare loop", rows, about, [product_note(peak)])
