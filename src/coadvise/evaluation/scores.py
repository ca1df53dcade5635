"""Predictions of networks for validation images, the scores computed from them, and the files that hold them.

An output is one token's ("class", "conv", ...) or "average", the mean of all tokens' probabilities.
"""

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from coadvise.advice import AVERAGE
from coadvise.config.schema import ImageSize
from coadvise.data.loader import still_batches
from coadvise.data.scanned import ScannedSplit
from coadvise.distill.loss import average_probabilities
from coadvise.errors import UserError
from coadvise.models.network import class_map
from coadvise.storage import DamagedError, storing, write_weights
from coadvise.training.engine import Engine

BINS = 15  # of confidence, of equal width, for the calibration error
BATCH = 250  # images per forward pass; the bits of the logits depend on it


def predict_logits(
    network: nn.Module, split: ScannedSplit, image_size: ImageSize, engine: Engine, workers: int = 0
) -> dict[str, Tensor]:
    """Logits [N, K] float32 on the CPU by output head, rows in the split's order. The network's mode is restored.

    Each process answers for every n-th batch, and all get all logits, the same bits whatever n is.
    """
    engine.copy_buffers_from_main(network)
    places = torch.arange(len(split)).split(BATCH)
    own = range(engine.rank, len(places), engine.processes)
    # A process without a batch also answers for the first one, only to know the names and sizes of the logits.
    batches = still_batches(split, image_size, BATCH, workers, numbers=own or range(1))
    found = predict_each({"": network}, batches, engine)[""]
    if engine.processes == 1:
        return found
    logits = {}
    for name, values in found.items():
        rows = torch.zeros(len(split), values.shape[1])
        for number, part in zip(own, values.split(BATCH), strict=False):
            rows[places[number]] = part
        logits[name] = engine.fill_from_all_ranks(rows)
    return logits


@torch.no_grad()
def predict_each(
    networks: Mapping[str, nn.Module], batches: Iterable[Tensor], engine: Engine
) -> dict[str, dict[str, Tensor]]:
    """Logits [N, K] float32 on the CPU by network and output head, for batches of images that are made only once."""
    were_training = {part: network.training for part, network in networks.items()}
    collected: dict[str, dict[str, list[Tensor]]] = {part: {} for part in networks}
    for network in networks.values():
        network.eval()
    for images in batches:
        placed = images.to(engine.device, memory_format=engine.memory_format)
        for part, network in networks.items():
            with engine.autocast():
                tokens = network(placed)
            for name, logits in tokens.items():
                collected[part].setdefault(name, []).append(logits.float())
    for part, network in networks.items():
        network.train(were_training[part])
    return {part: {name: torch.cat(rows).cpu() for name, rows in tokens.items()} for part, tokens in collected.items()}


def in_order(logits: Mapping[str, Tensor], known: Sequence[str], wanted: Sequence[str]) -> dict[str, Tensor]:
    """Selects and sorts logits [N, K]: from the `known` classes to the `wanted` ones, all of which must be known."""
    if tuple(known) == tuple(wanted):
        return dict(logits)
    places = class_map(known, wanted)
    assert places is not None
    return {name: values[:, places] for name, values in logits.items()}


def correct(logits: Mapping[str, Tensor], labels: Tensor) -> dict[str, Tensor]:
    """Which images each output gets right, [N] bool, by token; with several tokens also "average"."""
    answers = {name: values.argmax(-1) for name, values in logits.items()}
    if len(logits) > 1:
        answers[AVERAGE] = average_probabilities(logits).argmax(-1)
    return {name: answer == labels for name, answer in answers.items()}


def top1(logits: Mapping[str, Tensor], labels: Tensor, tokens: tuple[str, ...]) -> dict[str, float]:
    """Share of images with the right prediction, by output. `tokens` names the trained tokens; others are left out."""
    known = {name: logits[name] for name in tokens}
    return {name: hits.double().mean().item() for name, hits in correct(known, labels).items()}


@dataclass(frozen=True)
class Scores:
    """The scores of one output.

    Attributes:
        top1, top5: shares of images whose label is the most probable class, or among the five most probable.
        ece: expected calibration error: the mean distance between confidence and accuracy over 15 bins of confidence of
            equal width, each weighted by its images (Guo et al., ICML 2017).
        nll: negative log-likelihood of the labels, mean over images, in nats.
        macro_accuracy, macro_f1: means over the classes that have images, so that each class counts the same: of the
            share of its images that are right (also called balanced accuracy), and of its F1.
    """

    top1: float
    top5: float
    ece: float
    nll: float
    macro_accuracy: float
    macro_f1: float


@dataclass(frozen=True)
class ClassScores:
    """The scores of one output for one class. A ratio of nothing is 0, as scikit-learn has it.

    Attributes:
        images: images with this label.
        precision: share of the images predicted as this class that have its label.
        recall: share of the images with this label that are predicted as this class.
        f1: harmonic mean of both.
    """

    images: int
    precision: float
    recall: float
    f1: float


def scores(logits: Mapping[str, Tensor], labels: Tensor) -> dict[str, Scores]:
    """The scores of each token; with several tokens also of "average"."""
    hits, shares = correct(logits, labels), log_probabilities(logits)
    by_class = {name: class_scores(confusion(values, labels)) for name, values in shares.items()}
    return {
        name: Scores(
            top1=hits[name].double().mean().item(),
            top5=_among_five(values, labels),
            ece=calibration_error(values, labels),
            nll=-values.gather(1, labels[:, None]).double().mean().item(),
            macro_accuracy=_macro(by_class[name], "recall"),
            macro_f1=_macro(by_class[name], "f1"),
        )
        for name, values in shares.items()
    }


def confusion(values: Tensor, labels: Tensor) -> Tensor:
    """How many images of each class are predicted as each: [K, K] int64, a row a label, from logits [N, K]."""
    classes = values.shape[1]
    pairs = labels * classes + values.argmax(-1)
    return torch.bincount(pairs, minlength=classes**2).view(classes, classes)


def class_scores(counts: Tensor) -> list[ClassScores]:
    """The scores of each class, from a confusion matrix [K, K]."""
    right, images, predicted = counts.diagonal().double(), counts.sum(1).double(), counts.sum(0).double()
    precision, recall = right / predicted.clamp_min(1), right / images.clamp_min(1)
    f1 = 2 * right / (images + predicted).clamp_min(1)
    columns = (images.long().tolist(), precision.tolist(), recall.tolist(), f1.tolist())
    return [ClassScores(*figures) for figures in zip(*columns, strict=True)]


def _macro(classes: Sequence[ClassScores], figure: str) -> float:
    there = [getattr(scores, figure) for scores in classes if scores.images]
    return sum(there) / len(there)


def log_probabilities(logits: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Log-probabilities [N, K] of each token; with several tokens also of "average"."""
    answers = {name: values.log_softmax(-1) for name, values in logits.items()}
    if len(logits) > 1:
        answers[AVERAGE] = torch.stack(list(answers.values())).logsumexp(0) - math.log(len(logits))
    return answers


def calibration_error(log_probabilities: Tensor, labels: Tensor) -> float:
    """Expected calibration error of log-probabilities [N, K], see `Scores`."""
    best = log_probabilities.max(-1)
    confidence = best.values.double().exp()
    bins = torch.bucketize(confidence, torch.linspace(0, 1, BINS + 1, dtype=torch.float64)[1:-1])
    excess = torch.zeros(BINS, dtype=torch.float64)
    excess.index_add_(0, bins, confidence - (best.indices == labels).double())
    return excess.abs().sum().item() / len(labels)


def _among_five(values: Tensor, labels: Tensor) -> float:
    best = values.topk(min(5, values.shape[-1]), dim=-1).indices
    return (best == labels[:, None]).any(-1).double().mean().item()


def predictions_path(run: Path, part: str) -> Path:
    return run / "predictions" / f"{part.replace('/', '.')}.safetensors"


def save_predictions(run: Path, part: str, logits: Mapping[str, Tensor], labels: Tensor) -> None:
    """Writes the logits [N, K] by token and the labels [N], from which verdict and report are computed."""
    path = predictions_path(run, part)
    tensors = {"labels": labels, **{f"logits.{name}": values.contiguous() for name, values in logits.items()}}
    with storing(path):
        path.parent.mkdir(exist_ok=True)  # not its parents: a deleted run directory stays deleted
    write_weights(path, tensors, {"sha256": _digest(tensors)})


def load_predictions(run: Path, part: str) -> tuple[dict[str, Tensor], Tensor]:
    """(logits by token, labels), as written by `save_predictions`.

    Raises:
        DamagedError: the file is missing, truncated or changed.
    """
    path = predictions_path(run, part)
    try:
        with safe_open(path, framework="pt") as file:
            wanted = (file.metadata() or {}).get("sha256")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
    except (OSError, SafetensorError) as error:
        raise DamagedError(f"{path}: {error}") from None
    if wanted not in (None, _digest(tensors)):  # earlier versions wrote no sum
        raise DamagedError(f"{path}: its contents changed (sha256 differs)")
    if "labels" not in tensors:
        raise DamagedError(f"{path}: there are no labels in it")
    labels = tensors.pop("labels")
    return {name.removeprefix("logits."): values for name, values in tensors.items()}, labels


def finished_predictions(run: Path, part: str) -> tuple[dict[str, Tensor], Tensor]:
    """The same of a run that should be finished. Raises UserError where they are missing or damaged."""
    try:
        return load_predictions(run, part)
    except DamagedError as error:
        raise UserError(f"{error}; the same 'coadvise fit' computes the predictions of '{run}' again") from None


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].numpy().tobytes())
    return digest.hexdigest()
