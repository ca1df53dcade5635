"""Scores a finished run's networks again: on its own validation images or on others, as they are or corrupted."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coadvise.config import RunConfig, nearest, read_config
from coadvise.data.loader import still_batches
from coadvise.data.scan import scan_split
from coadvise.data.sources import Split, evaluation_remarks, evaluation_split, few, source_of
from coadvise.errors import UserError
from coadvise.evaluation.agreement import agreements, divergences
from coadvise.evaluation.corruptions import CORRUPTIONS, SEVERITIES
from coadvise.evaluation.robustness import corruption_scores, count_cases, file_cases, made_cases, relative_to_alexnet
from coadvise.evaluation.scores import in_order, predict_each, scores
from coadvise.evaluation.shifts import FOLDER, IMAGENET_C, LAYOUTS, corrupted_splits, layout_of, subset, subset_split
from coadvise.models.network import load_network
from coadvise.runs.run import CONFIG, check_run, trained_parts, trained_tokens, with_resolved_source
from coadvise.training.engine import Engine, for_this_machine
from coadvise.training.listener import Listener, Silent


class Networks:
    """All finished networks of a run, ready to answer.

    Raises:
        UserError: nothing trained yet.
    """

    def __init__(self, run: Path, config: RunConfig, engine: Engine) -> None:
        parts = trained_parts(run)
        if not parts:
            raise UserError(f"'{run}' has no finished network yet; run the same 'coadvise fit' again to go on")
        self.run, self.config, self.engine = run, config, engine
        self.networks = {part: load_network(run / part) for part in parts}
        self.tokens = {part: trained_tokens(run, part, network) for part, network in self.networks.items()}
        for network in self.networks.values():
            self.engine.prepare(network)
        self.classes = self.networks[parts[-1]].classes

    def answers(self, batches: Iterable[Tensor], classes: Sequence[str]) -> dict[str, dict[str, Tensor]]:
        """Logits [N, len(classes)] by part and token, of the tokens that somebody trained; other classes left out."""
        found = predict_each(self.networks, batches, self.engine)
        for part, tokens in found.items():
            trained = {name: tokens[name] for name in self.tokens[part]}
            found[part] = in_order(trained, self.networks[part].classes, classes)
        return found


def evaluate_run(
    run: Path,
    data: str | None = None,
    layout: str | None = None,
    corruptions: bool = False,
    severities: Sequence[int] = SEVERITIES,
    images: int | None = None,
    listener: Listener | None = None,
    engine: Engine | None = None,
) -> dict[str, Any]:
    """Scores every trained network of a run.

    Args:
        data: a folder of class folders, or one with val/, valid/ or test/; ImageNet-A, -R or -C; the run's own
            validation images when None.
        layout: "folder", "imagenet-a", "imagenet-r" or "imagenet-c"; recognised by the folder's names when None.
        corruptions: also score on these images under each corruption at these severities.
        images: score on so many of the images, evenly chosen; on all when None.
        engine: an entered one to compute on; None makes the run's own.

    Returns:
        {"data", "layout", "classes": among how many is answered, "images": how many were scored, "unreadable": files
        that were not} and, but for ImageNet-C, {"parts": {part: {answer: its `Scores`}}, "divergences": `Divergence`s,
        "agreements": `Agreement`s}; with corruptions {"corruptions": see `corruption_scores`; for ImageNet-C with each
        answer's "relative_to_alexnet"}.

    Raises:
        UserError: no run, nothing trained yet, data of other classes or incomplete, or requests that exclude another.
    """
    _check(data, layout, corruptions, severities, images)
    layout = layout or (FOLDER if data is None else layout_of(data))
    if corruptions and layout == IMAGENET_C:
        raise UserError(f"'{data}' is ImageNet-C, whose images are corrupted already; leave out --corruptions")
    check_run(run)
    config = read_config(run / CONFIG)
    with Engine(for_this_machine(config.engine)) if engine is None else nullcontext(engine) as engine:
        ready = Networks(run, config, engine)
        return _evaluated(ready, data, layout, corruptions, severities, images, listener or Silent())


def _evaluated(
    ready: Networks, data: str | None, layout: str, corruptions: bool, severities: Sequence[int], images: int | None,
    listener: Listener,
) -> dict[str, Any]:  # fmt: skip
    size, workers = ready.config.data.image_size, ready.config.data.workers
    if layout == IMAGENET_C and data is not None:
        return _imagenet_c(ready, data, images, listener)
    files, classes = _image_set(ready, data, layout, listener)
    numbers = _evenly(len(files), images)
    some = files.subset(numbers)
    split = scan_split(some, size, in_memory=ready.config.in_memory)
    if not len(split):
        raise UserError(f"none of the {len(numbers)} images can be read; first fault: {split.unreadable[0]}")
    labels = torch.from_numpy(split.labels)
    logits = ready.answers(still_batches(split, size, workers=workers), classes)
    result = {
        **_what(data or f"{ready.config.data.source} (validation)", layout, len(classes), len(split)),
        "unreadable": list(split.unreadable),
        "parts": {part: _plain(scores(tokens, labels)) for part, tokens in logits.items()},
        "divergences": [asdict(divergence) for divergence in divergences(logits)],
        "agreements": [{**asdict(pair), "error_overlap": pair.error_overlap} for pair in agreements(logits, labels)],
    }
    if corruptions:
        by_name = dict(zip(some.names(), numbers, strict=True))
        readable = [by_name[name] for name in split.split.names()]
        cases = made_cases(split, readable, severities, size, ready.config.seed, workers)
        total = len(CORRUPTIONS) * len(severities)
        result["corruptions"] = corruption_scores(lambda b: ready.answers(b, classes), cases, total, listener)
    return result


def _image_set(ready: Networks, data: str | None, layout: str, listener: Listener) -> tuple[Split, tuple[str, ...]]:
    """The images to score on, and the classes among which is answered."""
    if data is None:
        source = source_of(with_resolved_source(ready.run, ready.config))
        return source.val, source.classes  # a given teacher by itself may know more
    if layout == FOLDER:
        split = evaluation_split(data, ready.classes, ready.config.data.classes)
        for line in evaluation_remarks(data, ready.classes):
            listener.say(line)
        there = set(split.labels.tolist())
        if missing := [name for label, name in enumerate(ready.classes) if label not in there]:
            listener.say(f"no images of {few(missing)}; answers are among all {len(ready.classes)} classes")
        return split, ready.classes
    known = set(ready.classes).intersection(*(network.classes for network in ready.networks.values()))
    return subset_split(data, layout, tuple(known)), subset(layout)


def _imagenet_c(ready: Networks, data: str, images: int | None, listener: Listener) -> dict[str, Any]:
    splits = {
        where: split.subset(_evenly(len(split), images))
        for where, split in corrupted_splits(data, ready.classes, ready.config.data.classes).items()
    }
    unreadable: list[str] = []
    cases = file_cases(splits, ready.config.data.image_size, unreadable, ready.config.data.workers)
    total = count_cases(splits.values())
    found = corruption_scores(lambda b: ready.answers(b, ready.classes), cases, total, listener)
    for answers in found["parts"].values():
        for summary in answers.values():
            summary["relative_to_alexnet"] = relative_to_alexnet(summary["top1"])
    return {
        **_what(data, IMAGENET_C, len(ready.classes), found["images"]),
        "unreadable": unreadable,
        "corruptions": found,
    }


def _check(
    data: str | None, layout: str | None, corruptions: bool, severities: Sequence[int], images: int | None
) -> None:
    """Raises UserError for requests that make no sense whatever the run."""
    if layout is not None and layout not in LAYOUTS:
        raise UserError(f"no layout '{layout}'{nearest(layout, LAYOUTS)}; there are {', '.join(LAYOUTS)}")
    if layout is not None and data is None:
        raise UserError(f"--layout {layout} is that of a folder; give the folder with --data")
    if not severities or not {*severities} <= {*SEVERITIES} or len({*severities}) < len(severities):
        raise UserError(f"severities {', '.join(map(str, severities))}: give some of 1, 2, 3, 4 and 5, each once")
    if tuple(severities) != SEVERITIES and not corruptions:
        raise UserError("severities are those of --corruptions; give that too")
    if images is not None and images < 1:
        raise UserError(f"{images} images cannot be scored; give 1 or more, or leave it out to score on all")


def _evenly(count: int, images: int | None) -> list[int]:
    """So many of 0..count-1, evenly spread: files are in the order of their classes."""
    few = count if images is None else min(images, count)
    return np.linspace(0, count, few, endpoint=False).astype(int).tolist()


def _what(data: str, layout: str, classes: int, images: int) -> dict[str, Any]:
    return {"data": data, "layout": layout, "classes": classes, "images": images}


def _plain(found: Mapping[str, Any]) -> dict[str, Any]:
    return {answer: asdict(score) for answer, score in found.items()}
