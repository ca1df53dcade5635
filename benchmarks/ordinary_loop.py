"""Trains small networks by an ordinary loop, and says how long a run of coadvise took to be as accurate.

    python benchmarks/ordinary_loop.py DATA                       trains them all, an hour and a half on 2 cores
    python benchmarks/ordinary_loop.py DATA --steps 40 --run RUN  minutes by 40 steps of each; and RUN's beside them

The loop is plain PyTorch: images in memory, flipped and cropped, AdamW with warm-up and cosine, float32, no mixed
images, no averaged weights; a co-advised student asks its teachers in every step. Networks are a ResNet and a RedNet of
the preset small-images and transformers of width 96. RedNet's involution is coadvise's own, so the ordinary RedNet is
faster here than one of `F.unfold`. Without --steps each network is scored, and RUN is compared with what came of it;
with --steps, with what such a loop had reached on the first 500 images a class of CIFAR-10 (CASES).
"""

import argparse
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from coadvise.advice import Advice, LossWeights
from coadvise.config import ModelConfig, load_config, read_config
from coadvise.data.scan import ScannedSplit, scan
from coadvise.data.sources import open_source
from coadvise.distill.loss import co_advise_loss
from coadvise.models.network import Network, build_network
from coadvise.training.metrics import read_records

BATCH_SIZE, SIZE, TOKENS = 64, 32, ("conv", "inv")
WARM_UP = 5  # steps that are not timed, where steps are


@dataclass(frozen=True)
class Case:
    """A network of the ordinary loop.

    Attributes:
        epochs, accuracy: how long it trains, and what it reached so on the first 500 images a class of CIFAR-10.
        part: the network of a run that has to be as accurate; the preset's students are all aligned.
    """

    epochs: int
    accuracy: float
    part: str


CASES = {
    "conv teacher": Case(30, 0.736, "teachers/conv"),
    "inv teacher": Case(30, 0.673, "teachers/inv"),
    "alone": Case(40, 0.569, "students/alone"),
    "co-advised": Case(40, 0.615, "students/advised"),
    "aligned": Case(40, 0.620, "students/alone"),
    "aligned, co-advised": Case(40, 0.656, "students/advised"),
}


def networks(classes: tuple[str, ...]) -> dict[str, Network]:
    teachers = load_config("small-images").teachers
    found = {f"{name} teacher": build_network(teachers[name], classes, SIZE, seed=0) for name in TOKENS}
    for name in ("alone", "co-advised", "aligned", "aligned, co-advised"):
        model = "cit_micro_aligned_patch4_32" if "aligned" in name else "cit_micro_patch4_32"
        wide = ModelConfig(model=model, model_kwargs={"mlp_ratio": 4.0})
        found[name] = build_network(wide, classes, SIZE, seed=0, tokens=TOKENS)
    return found


def flipped_and_cropped(images: Tensor) -> Tensor:
    """uint8 [B, 3, H, W] to as many views in 0..1: half of them flipped, all shifted by up to 4 pixels."""
    images = torch.where(torch.rand(len(images), 1, 1, 1) < 0.5, images.flip(-1), images)
    padded = F.pad(images, (4, 4, 4, 4))
    corners = torch.randint(9, (len(images), 2)).tolist()
    return (
        torch.stack([view[:, y : y + SIZE, x : x + SIZE] for view, (y, x) in zip(padded, corners, strict=True)]) / 255
    )


def train(network: Network, split: ScannedSplit, epochs: int, teachers: Mapping[str, Network], steps: int) -> float:
    """Trains a network. Returns the seconds that all epochs take: measured, or by `steps` steps where that is not 0."""
    images, labels = torch.from_numpy(split.pixels), torch.from_numpy(split.labels)
    per_epoch = len(labels) // BATCH_SIZE
    optimiser = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.05)
    warm_up = torch.optim.lr_scheduler.LinearLR(optimiser, 0.01, total_iters=3 * per_epoch)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, (epochs - 3) * per_epoch)
    schedule = torch.optim.lr_scheduler.SequentialLR(optimiser, [warm_up, cosine], [3 * per_epoch])
    weights = LossWeights(advice={name: Advice() for name in teachers})
    network.train()
    began, done = time.perf_counter(), 0
    for _ in range(epochs):
        for chosen in torch.randperm(len(labels))[: per_epoch * BATCH_SIZE].split(BATCH_SIZE):
            if steps and done == WARM_UP:
                began = time.perf_counter()
            if steps and done == WARM_UP + steps:
                return (time.perf_counter() - began) / steps * per_epoch * epochs
            views = flipped_and_cropped(images[chosen])
            with torch.no_grad():
                advice = {name: teacher(views)["class"] for name, teacher in teachers.items()}
            co_advise_loss(network(views), advice, labels[chosen], weights)["total"].backward()
            optimiser.step()
            schedule.step()
            optimiser.zero_grad()
            done += 1
    return time.perf_counter() - began


@torch.inference_mode()
def top1(network: Network, split: ScannedSplit) -> float:
    images, labels = torch.from_numpy(split.pixels), torch.from_numpy(split.labels)
    answers = torch.cat([network.eval()(batch / 255)["class"].argmax(-1) for batch in images.split(250)])
    return (answers == labels).float().mean().item()


def reached(run: Path, part: str, accuracy: float, images: int) -> str:
    """When a network of a run was first scored as accurate as that (minutes by its recorded rate), and how accurate."""
    seed = read_config(run / "config.yaml").seed
    name = part if part.startswith("teachers") else f"{part}-{seed}"
    records = [r for r in read_records(run) if r.get("part") == name]
    rates = {r["epoch"]: r["images_per_second"] for r in records if r["kind"] == "train"}
    for record in records:
        if record["kind"] == "eval" and record["top1"]["class"] >= accuracy:
            epoch = record["epoch"]
            per_epoch = images // BATCH_SIZE * BATCH_SIZE
            return f"{epoch * per_epoch / rates[epoch] / 60:12.1f}{epoch:7}{record['top1']['class']:8.1%}"
    return f"{'never':>12}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("data")
    parser.add_argument("--run", type=Path, help="a run of coadvise fit DATA --preset small-images --baseline")
    parser.add_argument("--steps", type=int, default=0, help="steps of each network; 0: all")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    dataset = scan(open_source(arguments.data, 0.2, 0), SIZE, in_memory=True)
    found = networks(dataset.classes)
    print(f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{'':22}{'ordinary loop':^22}{f'{arguments.run}' if arguments.run else '':^28}")
    print(
        f"{'':22}{'minutes':>8}{'epochs':>7}{'top-1':>7}"
        + (f"{'minutes':>12}{'epochs':>7}{'top-1':>8}" * bool(arguments.run))
    )
    for name, case in CASES.items():
        network = found[name]
        teachers = {token: found[f"{token} teacher"].eval() for token in TOKENS if "co-advised" in name}
        seconds = train(network, dataset.train, case.epochs, teachers, arguments.steps)
        accuracy = case.accuracy if arguments.steps else top1(network, dataset.val)
        beside = reached(arguments.run, case.part, accuracy, len(dataset.train)) if arguments.run else ""
        print(f"{name:22}{seconds / 60:8.1f}{case.epochs:7}{accuracy:7.1%}{beside}", flush=True)


if __name__ == "__main__":
    main()
