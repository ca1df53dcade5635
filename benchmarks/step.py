"""A student's training step against the same transformer, alone, in a bare PyTorch loop.

Ours is `coadvise.train.train` itself: views (the augmentation of the preset small-images), normalisation, loss, clipped
gradients, optimiser, no averaged weights. The bare loop is forward, cross-entropy, backward and fused AdamW on one
fixed batch in memory: no data, no augmentation, no mixed labels, no clipping. Three comparisons:

    student             cit_micro_patch4_32 without teachers, against timm's VisionTransformer of the same shape with
                        two register tokens and timm's defaults (in bfloat16 on a CPU these are slow: attention.py)
    aligned student     cit_micro_aligned_patch4_32 without teachers, against the very same student, set up the same
                        (channels-last memory, on a CPU plain attention): what the loop around it costs
    with two teachers   the first, advised by the preset's two teachers, against the first's bare loop

The two loops take turns within one process, a step (on CUDA 20 steps) each, and every figure is a median, so that a
slow moment of the machine falls on both. The floor is the arithmetic of the student's forward and backward pass, and
of its teachers' answers, at the speed of a large matrix product of the same run, in the faster of float32 and the
precision.
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
from coadvise.config import EngineConfig, ModelConfig, RecipeConfig, RunConfig, load_config
from coadvise.data.scan import ScannedSplit
from coadvise.data.sources.folder import FolderSplit
from coadvise.data.views import Views
from coadvise.distill.teachers import Teacher, Teachers
from coadvise.models import TokenModel
from coadvise.models.network import Network, build_network
from coadvise.models.small import CIT_MICRO
from coadvise.training.checkpoint import Checkpoints
from coadvise.training.engine import Engine, plain_attention
from coadvise.training.loop import Advisers, Progress, Training, train
from coadvise.training.metrics import Recorder

SIZE, CLASSES, BATCH_SIZE = 32, tuple(f"class {n}" for n in range(10)), 64
SKIP, TARGET = 4, 0.85
TOKENS = ("conv", "inv")


def random_split(images: int, size: int = SIZE, classes: int = len(CLASSES)) -> ScannedSplit:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (images, 3, size, size), dtype=np.uint8)
    labels = rng.integers(0, classes, images)
    return ScannedSplit(FolderSplit(Path(), (), labels), labels, pixels, (), Counter({(size, size): images}))


def student(name: str, advised: bool) -> Network:
    """As `coadvise fit` makes it: without teachers, the heads that nobody advises get no gradient."""
    network = build_network(ModelConfig(model=name), CLASSES, SIZE, seed=0, tokens=TOKENS)
    if not advised:
        assert isinstance(network.model, TokenModel)
        network.model.freeze_advised_heads()
    return network


def timm_transformer() -> nn.Module:
    """timm's own model of the student's shape: as many layers, heads and tokens, and one head instead of three."""
    return timm.create_model("vit_tiny_patch16_224", reg_tokens=len(TOKENS), num_classes=len(CLASSES), **CIT_MICRO)


def bare_loop(
    model: nn.Module, batch_size: int, setting: Setting, layout: torch.memory_format, engine: Engine
) -> Callable[[], None]:
    """One step of plain PyTorch on a fixed batch."""
    model = model.to(engine.device).to(memory_format=layout).train()  # type: ignore[call-overload]
    images = torch.randn(batch_size, 3, SIZE, SIZE, device=engine.device).contiguous(memory_format=layout)
    labels = torch.randint(len(CLASSES), (batch_size,), device=engine.device)
    forward = torch.compile(model) if setting.compile else model
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05, fused=True)

    def step() -> None:
        with torch.autocast(engine.device.type, dtype=torch.bfloat16, enabled=setting.precision == "bfloat16"):
            loss = F.cross_entropy(forward(images), labels)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    return step


def training(
    network: Network, recipe: RecipeConfig, views: Views, teachers: Advisers, weights: LossWeights, engine: Engine
) -> Callable[[Progress], Network]:  # fmt: skip
    """`coadvise.train.train` of a network, for `in_turns`."""
    scored = random_split(8, views.image_size, views.classes)
    job = Training("students/timed", 0, network, recipe, views.on(engine.device), scored, teachers, weights, 0, 1e9)

    def run(progress: Progress) -> Network:
        with tempfile.TemporaryDirectory() as folder:
            record = Recorder(Path(folder), write=False, say=lambda text: None)
            return train(job, Checkpoints(Path(folder, "checkpoints")), engine, record, progress)

    return run


def preset_teachers(config: RunConfig, engine: Engine) -> Teachers:
    """The preset's teachers, where and as they run fastest; they know nothing but the scale of their activations."""
    teachers = {}
    images = torch.rand(128, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    for name, teacher in config.teachers.items():
        network = build_network(teacher, CLASSES, SIZE, seed=1).train()
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None  # the figures of what it has seen, and nothing of those it was made with
        with torch.no_grad():  # with those, activations grow beyond bounds
            network(images)
        teachers[name] = Teacher(name, network, CLASSES)
        engine.prepare(teachers[name])
    return Teachers(teachers)


def step_operations(network: Network, teachers: Teachers) -> int:
    """Multiplications and additions of a training step, an image."""
    answers = sum(operations(teacher, SIZE) for teacher in teachers.by_name.values())
    return operations(network.model, SIZE, backward=True) + answers


def compare(
    name: str, network: Network, bare: nn.Module, layout: torch.memory_format, teachers: Teachers, config: RunConfig,
    setting: Setting, engine: Engine, peak: float, goal: float = 0.0,
) -> Row:  # fmt: skip
    turn = 20 if engine.device.type == "cuda" else 1
    count, batch_size = (SKIP + setting.repeats + 1) * turn, setting.batch_size or BATCH_SIZE
    recipe = RecipeConfig(epochs=1, batch_size=batch_size, warmup_epochs=0, clip=1.0, evaluations=1)
    views = Views(random_split(count * batch_size), config.augment, len(CLASSES), SIZE, seed=0)
    weights = config.loss_weights if teachers.by_name else LossWeights()
    floor = peak / step_operations(network, teachers)
    bare_step = bare_loop(bare, batch_size, setting, layout, engine)

    def bare_run(progress: Progress) -> None:
        for step in range(1, count + 1):
            bare_step()
            progress("bare", step, count, {})

    contestants = {"ours": training(network, recipe, views, teachers, weights, engine), "bare": bare_run}
    seconds = in_turns(contestants, turn, SKIP, engine.synchronise)
    return Row(name, "images/s", batch_size / seconds["ours"], batch_size / seconds["bare"], floor, goal)


def run(setting: Setting) -> Table:
    """Times the three students. Only the students' forward passes are compiled where asked, as in training."""
    config = load_config("small-images")
    device = "cuda" if setting.device.type == "cuda" else "cpu"
    engine = Engine(EngineConfig(device=device, precision=setting.precision, compile=setting.compile))
    torch.manual_seed(0)
    plain = student("cit_micro_patch4_32", advised=False)
    aligned, same = (student("cit_micro_aligned_patch4_32", advised=False) for _ in range(2))
    if engine.device.type == "cpu":
        plain_attention(same)
    advised = student("cit_micro_patch4_32", advised=True)
    usual, nobody, teachers = torch.contiguous_format, Teachers({}), preset_teachers(config, engine)
    peak = peak_operations(setting)
    rows = [
        compare("student", plain, timm_transformer(), usual, nobody, config, setting, engine, peak, TARGET),
        compare(
            "aligned student", aligned, same.model, engine.memory_format, nobody, config, setting, engine, peak, TARGET
        ),
        compare("with two teachers", advised, timm_transformer(), usual, teachers, config, setting, engine, peak),
    ]
    about = {**machine(setting), "batch": setting.batch_size or BATCH_SIZE, "pixels": SIZE, "mode": "training"}
    about["layout"] = "channels-last; the bare transformer's as it is"
    return Table("training step against a bare PyTorch loop", "bare loop", rows, about, [product_note(peak)])
