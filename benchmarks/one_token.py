"""Co-advising against timm's distillation by one token, on finished runs: what a second teacher is worth.

    python -m benchmarks.one_token RUN [RUN ...] --out FOLDER

For each co-advised student of each run a distilled vision transformer of timm is trained by timm's own task
(`timm.task.TokenDistillationTask`): of the same width, depth and patches, by the run's most accurate teacher at its
temperature, on the same views in the same order, by the same recipe, with the same seed. What differs is what Co-advise
is: the second teacher and its token, stems in place of a patch embedding where tokens are aligned, and advice to the
class token where the run has it. timm's student answers by the mean of its two heads, as timm does; the co-advised
one by its class token.

The same command goes on where it stopped. FOLDER gets a record and predictions for each run, one-token.json and
one-token.md.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from timm.loss import SoftTargetCrossEntropy
from timm.models.deit import VisionTransformerDistilled
from timm.task import TokenDistillationTask
from torch import Tensor, nn

from coadvise.advice import CLASS
from coadvise.config.reading import read_config
from coadvise.config.schema import EngineConfig
from coadvise.data.scan import scan
from coadvise.data.sources import source_of
from coadvise.data.views import Batch
from coadvise.distill.teachers import Teacher, Teachers
from coadvise.evaluation.scores import correct, load_predictions, predict_logits, save_predictions, top1
from coadvise.evaluation.verdict import Interval, paired_interval, seed_interval
from coadvise.models.network import Network, load_network
from coadvise.runs.executors.base import run_tasks
from coadvise.runs.executors.local import Local
from coadvise.runs.plan import ADVISED, TEACHER
from coadvise.runs.run import CONFIG, Run, check_images, with_resolved_source
from coadvise.runs.schedule import at_once
from coadvise.storage import write_text
from coadvise.terminal import Terminal
from coadvise.training.checkpoint import Checkpoints
from coadvise.training.engine import Engine
from coadvise.training.listener import Listener
from coadvise.training.loop import Training, train
from coadvise.training.metrics import Recorder, last_of, read_records

PART = "students/one-token-{}"  # by seed, as a part of the record and of the predictions


class _AsTimms(nn.Module):
    """A network of ours, which normalises images itself, as timm's task takes a student or a teacher."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.pretrained_cfg = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
        self.num_classes = self.in_chans = 0  # of use only where timm builds the teacher

    def forward(self, images: Tensor) -> Any:
        answer = self.network(images)
        return answer if isinstance(answer, Tensor) else answer[CLASS]

    def set_distilled_training(self, enable: bool = True) -> None:
        for module in self.network.modules():
            if isinstance(module, VisionTransformerDistilled):
                module.set_distilled_training(enable)


class TimmLoss:
    """timm's task as the loss of our training loop.

    Args:
        label_weight, weight, temperature: of the labels' cross-entropy; of the teacher's KL term, and its τ.
    """

    def __init__(
        self, network: Network, teacher: Teacher, label_weight: float, weight: float, temperature: float
    ) -> None:
        self.classes = len(network.classes)
        self.task = TokenDistillationTask(
            _AsTimms(network), _AsTimms(teacher), SoftTargetCrossEntropy(), task_loss_weight=label_weight,
            distill_loss_weight=weight, temperature=temperature, device=network.mean.device, verbose=False,
        )  # fmt: skip

    def __call__(self, student: nn.Module, batch: Batch, advice: Mapping[str, Tensor]) -> dict[str, Tensor]:
        self.task.trainable_module = _AsTimms(student)  # as the engine has wrapped it
        labels = batch.labels
        if labels.ndim == 1:
            labels = nn.functional.one_hot(labels, self.classes).float()
        found = self.task(batch.images, labels)
        return {
            "total": found["loss"], CLASS: found["task_loss"].detach(), "distillation": found["distill_loss"].detach(),
        }  # fmt: skip


def peer_of(student: Network, seed: int) -> Network:
    """timm's distilled vision transformer of a student's width, depth, heads and patches, with random weights."""
    model: Any = student.model
    block = model.blocks[0]
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        peer = VisionTransformerDistilled(
            img_size=student.image_size, patch_size=model.patch_embed.patch_size, embed_dim=model.embed_dim,
            depth=len(model.blocks), num_heads=block.attn.num_heads, num_classes=len(student.classes),
            mlp_ratio=block.mlp.fc1.out_features / model.embed_dim, global_pool="token",
        )  # fmt: skip
    return Network(peer, student.about)


def train_peer(folder: Path, out: Path, seed: int, listener: Listener) -> None:
    """Trains and scores the peer of one student of the run in `folder`."""
    config = with_resolved_source(folder, read_config(folder / CONFIG))
    data = config.data
    dataset = scan(source_of(config), data.image_size, config.in_memory, data.presize, fit=data.fit)
    check_images(folder, dataset)
    with Engine(config.engine) as engine, engine.graceful_shutdown():
        record, part = Recorder(out, True, listener.say), PART.format(seed)
        run = Run(folder, config, dataset, engine, record, listener)
        name = best_teacher(folder)
        teacher, by = config.teachers[name], run.load_teachers().by_name[name]
        network = peer_of(load_network(folder / "students" / f"advised-{seed}"), seed).to(engine.device)
        job = Training(
            part=part, seed=seed, network=network, recipe=config.student.recipe,
            views=run.student_views(seed).on(engine.device), teachers=Teachers({}),
            losses=TimmLoss(network, by, config.student.weight, teacher.weight, teacher.temperature),
            evaluate=partial(_top1, run), workers=data.workers, checkpoint_seconds=config.engine.checkpoint_seconds,
            max_unreadable=data.max_unreadable,
        )  # fmt: skip
        checkpoints = Checkpoints(out / "checkpoints" / part.replace("/", "."))
        trained = train(job, checkpoints, engine, record, listener.progress)
        logits = predict_logits(trained, dataset.scored, data.image_size, engine, data.workers)
        save_predictions(out, part, logits, torch.from_numpy(dataset.scored.labels))
        checkpoints.remove()
        record.add(
            "result", part=part, seed=seed, teacher=name, parameters=trained.parameter_count,
            top1=top1(logits, torch.from_numpy(dataset.scored.labels), (CLASS,)),
        )  # fmt: skip


def _top1(run: Run, network: nn.Module, step: int) -> dict[str, float]:
    val = run.dataset.val
    logits = predict_logits(network, val, run.config.data.image_size, run.engine, run.config.data.workers)
    return top1(logits, torch.from_numpy(val.labels), (CLASS,))


def _results(folder: Path, role: str) -> dict[str, dict[str, Any]]:
    """The results of a run's networks of a role, by part."""
    return {r["part"]: r for r in read_records(folder) if r["kind"] == "result" and r.get("role") == role}


def best_teacher(folder: Path) -> str:
    """The name of a run's most accurate teacher."""
    results = _results(folder, TEACHER)
    return max(results, key=lambda part: results[part]["top1"][CLASS]).partition("/")[2]


@dataclass(frozen=True)
class Pair:
    """A co-advised student and its peer, scored on the same pictures.

    Attributes:
        ours, peer: which pictures each is right about, [N].
        pictures: their names.
    """

    run: Path
    seed: int
    teacher: float
    ours: np.ndarray
    peer: np.ndarray
    pictures: Sequence[str]

    @property
    def gain(self) -> float:
        return float(self.ours.mean() - self.peer.mean())


def pair_of(folder: Path, out: Path, seed: int) -> Pair:
    """Reads what both have said."""
    hits = []
    for where, part in ((folder, f"students/advised-{seed}"), (out, PART.format(seed))):
        logits, labels = load_predictions(where, part)
        hits.append(correct(logits, labels)[CLASS].numpy().astype(float))
    splits = json.loads((folder / "data.json").read_text())["splits"]
    teacher = _results(folder, TEACHER)[f"teachers/{best_teacher(folder)}"]["top1"][CLASS]
    return Pair(folder, seed, teacher, *hits, (splits.get("test") or splits["val"])["paths"])


def intervals(pairs: Sequence[Pair]) -> tuple[Interval, Interval | None, int]:
    """The gain over pictures, each counted once whatever the number of students scored on it; over pairs; pictures."""
    gains: dict[str, list[float]] = {}
    for pair in pairs:
        for picture, ours, peer in zip(pair.pictures, pair.ours, pair.peer, strict=True):
            gains.setdefault(picture, []).append(ours - peer)
    means = np.array([np.mean(of_picture) for of_picture in gains.values()])
    return paired_interval([means], [np.zeros_like(means)]), seed_interval([p.gain for p in pairs]), len(means)


def lines(pairs: Sequence[Pair]) -> list[str]:
    """The table in Markdown."""
    over_images, over_pairs, images = intervals(pairs)
    rows = [
        f"| {pair.run.name} | {pair.seed} | {pair.teacher:.1%} | {pair.peer.mean():.1%} | {pair.ours.mean():.1%} | "
        f"{100 * pair.gain:+.1f} |"
        for pair in pairs
    ]
    return [
        "| run | seed | better teacher | timm, one token | co-advised | points |",
        "| --- | --- | --- | --- | --- | --- |",
        *rows,
        "",
        f"Co-advising against one token: {over_images} over {images} test images"
        + (f", {over_pairs} over {len(pairs)} students." if over_pairs else "."),
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.one_token", description=__doc__.partition("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, help="finished runs of the same data")
    parser.add_argument("--out", type=Path, required=True, help="folder for records, predictions and the table")
    given = parser.parse_args()
    wanted = []
    for folder in given.runs:
        seeds = [result["seed"] for result in _results(folder, ADVISED).values()]
        if not seeds:
            parser.error(f"'{folder}' has no finished co-advised student; give the folder of a finished 'coadvise fit'")
        wanted += [(folder, given.out / folder.name, seed) for seed in seeds]
    with closing(Terminal(Console())) as terminal, Engine(EngineConfig()) as engine:
        tasks = {}
        for folder, out, seed in wanted:
            out.mkdir(parents=True, exist_ok=True)
            if last_of(read_records(out), "result", PART.format(seed)) is None:
                tasks[f"{folder.name}, seed {seed}"] = partial(train_peer, folder, out, seed)
        run_tasks(tasks, Local(at_once(len(tasks), engine), engine), engine, terminal)
    pairs = [pair_of(*of) for of in wanted]
    over_images, over_pairs, images = intervals(pairs)
    result = {
        "rows": [
            {"run": p.run.name, "seed": p.seed, "teacher": p.teacher, "one_token": float(p.peer.mean()),
             "co_advised": float(p.ours.mean())} for p in pairs
        ],
        "images": images, "over_images": asdict(over_images), "over_students": over_pairs and asdict(over_pairs),
    }  # fmt: skip
    write_text(given.out / "one-token.json", json.dumps(result, indent=1) + "\n")
    text = "\n".join(lines(pairs)) + "\n"
    write_text(given.out / "one-token.md", text)
    print(text, end="")


if __name__ == "__main__":
    from benchmarks import one_token  # other processes find the task by this name

    one_token.main()
