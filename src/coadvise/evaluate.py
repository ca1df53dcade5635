"""Scores: every token's logits for every validation image, and what follows from them."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from coadvise.checkpoint import DamagedError, fsync, storing
from coadvise.data.audit import AuditedSplit
from coadvise.data.loader import still_batches
from coadvise.engine import Engine
from coadvise.loss import CLASS, average_probabilities
from coadvise.networks import class_map

AVERAGE = "average"


@torch.no_grad()
def predict_logits(
    network: nn.Module, split: AuditedSplit, image_size: int, engine: Engine, workers: int = 0
) -> dict[str, Tensor]:
    """Logits [N, K] float32 on the CPU by token, rows in the split's order. The network's mode is put back after."""
    was_training = network.training
    network.eval()
    collected: dict[str, list[Tensor]] = {}
    for images in still_batches(split, image_size, workers=workers):
        with engine.autocast():
            tokens = network(images.to(engine.device, memory_format=engine.memory_format))
        for name, logits in tokens.items():
            collected.setdefault(name, []).append(logits.float())
    network.train(was_training)
    return {name: torch.cat(parts).cpu() for name, parts in collected.items()}


def in_order(logits: Mapping[str, Tensor], known: Sequence[str], wanted: Sequence[str]) -> dict[str, Tensor]:
    """Logits [N, K] over the known classes as those over the wanted ones, which are all known, in their order."""
    if tuple(known) == tuple(wanted):
        return dict(logits)
    places = class_map(known, wanted)
    assert places is not None
    return {name: values[:, places] for name, values in logits.items()}


def correct(logits: Mapping[str, Tensor], labels: Tensor) -> dict[str, Tensor]:
    """Which images each answer gets right, [N] bool: one entry a token, and "average" where there are several."""
    answers = {name: values.argmax(-1) for name, values in logits.items()}
    if len(logits) > 1:
        answers[AVERAGE] = average_probabilities(logits).argmax(-1)
    return {name: answer == labels for name, answer in answers.items()}


def top1(logits: Mapping[str, Tensor], labels: Tensor, tokens: tuple[str, ...]) -> dict[str, float]:
    """Share of right answers by token; tokens that nobody trained are left out."""
    known = {name: logits[name] for name in tokens}
    return {name: hits.double().mean().item() for name, hits in correct(known, labels).items()}


def top5(logits: Mapping[str, Tensor], labels: Tensor) -> float:
    """Share of images whose label is among the class token's five most likely."""
    best = logits[CLASS].topk(min(5, logits[CLASS].shape[-1]), dim=-1).indices
    return (best == labels[:, None]).any(-1).double().mean().item()


def predictions_path(run: Path, part: str) -> Path:
    return run / "predictions" / f"{part.replace('/', '.')}.safetensors"


def save_predictions(run: Path, part: str, logits: Mapping[str, Tensor], labels: Tensor) -> None:
    """Keeps what verdict and report are computed from."""
    path = predictions_path(run, part)
    beside = path.with_suffix(".part")
    tensors = {"labels": labels, **{f"logits.{name}": values.contiguous() for name, values in logits.items()}}
    with storing(path, beside):
        path.parent.mkdir(exist_ok=True)
        save_file(tensors, beside, {"sha256": _digest(tensors)})
        beside.chmod(0o644)
        fsync(beside)
        beside.rename(path)


def load_predictions(run: Path, part: str) -> tuple[dict[str, Tensor], Tensor]:
    """(logits by token, labels) as `save_predictions` kept them.

    Raises:
        DamagedError: the file is missing, truncated or changed.
    """
    path = predictions_path(run, part)
    try:
        with safe_open(path, framework="pt") as file:
            wanted = (file.metadata() or {}).get("sha256")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
    except (OSError, SafetensorError) as error:
        raise DamagedError(f"{path}: {error}") from None
    if wanted not in (None, _digest(tensors)):  # earlier versions wrote none
        raise DamagedError(f"{path}: its contents changed (sha256 differs)")
    labels = tensors.pop("labels")
    return {name.removeprefix("logits."): values for name, values in tensors.items()}, labels


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].numpy().tobytes())
    return digest.hexdigest()
