"""Scores the finished networks of a run again: on the images it was scored on or others, unchanged or corrupted."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coadvise.advice import CLASS
from coadvise.config.reading import nearest, read_config
from coadvise.config.schema import RunConfig
from coadvise.data.loader import still_batches
from coadvise.data.scan import scan_split
from coadvise.data.sources import Split, evaluation_remarks, evaluation_split, few
from coadvise.data.sources.split import evenly
from coadvise.errors import CodeNotKeptError, UserError
from coadvise.evaluation.agreement import agreements, divergences
from coadvise.evaluation.calibration import calibrated_errors
from coadvise.evaluation.corruptions import CORRUPTIONS, SEVERITIES
from coadvise.evaluation.robustness import corruption_scores, count_cases, file_cases, made_cases, relative_to_alexnet
from coadvise.evaluation.scores import class_scores, confusion, in_order, predict_each, scores
from coadvise.evaluation.shifts import FOLDER, IMAGENET_C, LAYOUTS, corrupted_splits, layout_of, subset, subset_split
from coadvise.models.network import load_network
from coadvise.runs.run import CONFIG, check_run, own_pictures, trained_parts, trained_tokens
from coadvise.training.engine import Engine, for_this_machine
from coadvise.training.listener import Listener, Silent

MOST_CONFUSED = 200  # classes of which all confusions are given


@dataclass(frozen=True)
class Request:
    """On which images networks are scored; see `evaluate_run`. Raises UserError for a request without sense."""

    data: str | None = None
    layout: str | None = None
    corruptions: bool = False
    severities: Sequence[int] = SEVERITIES
    images: int | None = None

    def __post_init__(self) -> None:
        layout, severities = self.layout, self.severities
        if layout is not None and layout not in LAYOUTS:
            raise UserError(f"no layout '{layout}'{nearest(layout, LAYOUTS)}; there are {', '.join(LAYOUTS)}")
        if layout is not None and self.data is None:
            raise UserError(f"--layout {layout} is that of a folder; give the folder with --data")
        if not severities or not {*severities} <= {*SEVERITIES} or len({*severities}) < len(severities):
            raise UserError(f"severities {', '.join(map(str, severities))}: give some of 1, 2, 3, 4 and 5, each once")
        if tuple(severities) != SEVERITIES and not self.corruptions:
            raise UserError("severities are those of --corruptions; give that too")
        if self.images is not None and self.images < 1:
            raise UserError(f"{self.images} images cannot be scored; give 1 or more, or leave it out to score all")
        if self.corruptions and self.kind == IMAGENET_C:
            raise UserError(f"'{self.data}' is ImageNet-C, whose images are corrupted already; leave out --corruptions")

    @property
    def kind(self) -> str:
        """The layout, recognised by the folder's names if it is not given."""
        return self.layout or (FOLDER if self.data is None else layout_of(self.data))


class Networks:
    """All finished networks of a run, ready for inference.

    Networks whose code is not kept are left out.

    Args:
        say: receives a line for each of these.

    Raises:
        UserError: nothing is trained yet.
    """

    def __init__(self, run: Path, config: RunConfig, engine: Engine, say: Callable[[str], None]) -> None:
        self.networks = {}
        for part in trained_parts(run):
            try:
                self.networks[part] = load_network(run / part)
            except CodeNotKeptError as error:
                say(f"{part} is left out: {error}")
        parts = list(self.networks)
        if not parts:
            raise UserError(f"'{run}' has no finished network yet; run the same 'coadvise fit' again to continue it")
        self.run, self.config, self.engine = run, config, engine
        self.tokens = {part: trained_tokens(run, part, network) for part, network in self.networks.items()}
        for network in self.networks.values():
            self.engine.prepare(network)
        self.classes = self.networks[parts[-1]].classes
        self.values = self.networks[parts[-1]].values

    def logits(self, batches: Iterable[Tensor], classes: Sequence[str]) -> dict[str, dict[str, Tensor]]:
        """Logits [N, len(classes)] by part and token, of the trained tokens. Other classes are left out."""
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
        data: a folder of class folders, one with val/ or test/, or a table; ImageNet-A, -R or -C; None: the images
            that the run was scored on.
        layout: "folder", "imagenet-a", "imagenet-r" or "imagenet-c"; None: recognised by the folder's names.
        corruptions: also score on these images under each corruption at these severities.
        images: score on this many images, evenly chosen; None: all.
        engine: an entered engine; None makes one as the run had it.

    Returns:
        {"data", "layout", "classes": number of classes to choose from, "images": number scored, "unreadable": files
        that were not} and, except for ImageNet-C, {"parts": {part: {head: its `Scores`, and "temperature" and
        "calibrated_ece" of a calibrated network}}, "by_class": {part: {class: its `ClassScores`, of the class token}},
        "confusions": {part: counts by label and prediction}, "divergences": `Divergence`s, "agreements":
        `Agreement`s}; with corruptions {"corruptions": see `corruption_scores`; for ImageNet-C with
        "relative_to_alexnet" for each head}.

    Raises:
        UserError: no run, nothing trained yet, data of other classes or incomplete, or options that do not combine.
    """
    request = Request(data, layout, corruptions, severities, images)
    check_run(run)
    config, listener = read_config(run / CONFIG), listener or Silent()
    with Engine(for_this_machine(config.engine)) if engine is None else nullcontext(engine) as engine:
        return _evaluated(Networks(run, config, engine, listener.say), request, listener)


def _evaluated(ready: Networks, request: Request, listener: Listener) -> dict[str, Any]:
    size, fit, workers = ready.config.data.image_size, ready.config.data.fit, ready.config.data.workers
    if request.kind == IMAGENET_C and request.data is not None:
        return _imagenet_c(ready, request.data, request.images, listener)
    data, files, classes = _image_set(ready, request.data, request.kind, listener)
    numbers = evenly(len(files), request.images)
    some = files.subset(numbers)
    split = scan_split(some, size, ready.config.in_memory, fit, ready.values)
    if not len(split):
        raise UserError(f"none of the {len(numbers)} images can be read; first fault: {split.unreadable[0]}")
    labels = torch.from_numpy(split.labels)
    logits = ready.logits(still_batches(split, size, workers=workers), classes)
    confusions = {part: confusion(tokens[CLASS], labels) for part, tokens in logits.items()}
    result = {
        **_what(data, request.kind, len(classes), len(split)),
        "unreadable": list(split.unreadable),
        "parts": {part: _scored(tokens, labels, ready.networks[part].temperatures) for part, tokens in logits.items()},
        "by_class": {part: _by_class(counts, classes) for part, counts in confusions.items()},
        "confusions": {part: counts.tolist() for part, counts in confusions.items()}
        if len(classes) <= MOST_CONFUSED
        else None,
        "divergences": [asdict(divergence) for divergence in divergences(logits)],
        "agreements": [{**asdict(pair), "error_overlap": pair.error_overlap} for pair in agreements(logits, labels)],
    }
    if request.corruptions:
        by_name = dict(zip(some.names(), numbers, strict=True))
        places = [by_name[name] for name in split.split.names()]
        cases = made_cases(split, places, request.severities, size, ready.config.seed, workers)
        total = len(CORRUPTIONS) * len(request.severities)
        result["corruptions"] = corruption_scores(lambda b: ready.logits(b, classes), cases, total, listener)
    return result


def _image_set(
    ready: Networks, data: str | None, layout: str, listener: Listener
) -> tuple[str, Split, tuple[str, ...]]:
    """What to call the images, the images to score on, and the classes to choose from."""
    if data is None:
        source = own_pictures(ready.run, ready.config).source
        kind = "validation" if source.test is None else "test"
        return (
            f"{ready.config.data.source} ({kind})",
            source.scored,
            source.classes,
        )  # a given teacher alone may know more
    if layout == FOLDER:
        how = ready.config.data.elsewhere()
        split = evaluation_split(data, ready.classes, how)
        for line in evaluation_remarks(data, how):
            listener.say(line)
        there = set(split.labels.tolist())
        if missing := [name for label, name in enumerate(ready.classes) if label not in there]:
            listener.say(f"no images of {few(missing)}; networks choose from all {len(ready.classes)} classes")
        return data, split, ready.classes
    known = set(ready.classes).intersection(*(network.classes for network in ready.networks.values()))
    return data, subset_split(data, layout, tuple(known)), subset(layout)


def _imagenet_c(ready: Networks, data: str, images: int | None, listener: Listener) -> dict[str, Any]:
    splits = {
        where: split.subset(evenly(len(split), images))
        for where, split in corrupted_splits(data, ready.classes, ready.config.data.elsewhere()).items()
    }
    unreadable: list[str] = []
    how = ready.config.data
    cases = file_cases(splits, how.image_size, unreadable, how.workers, how.fit, ready.values)
    total = count_cases(splits.values())
    found = corruption_scores(lambda b: ready.logits(b, ready.classes), cases, total, listener)
    for answers in found["parts"].values():
        for summary in answers.values():
            summary["relative_to_alexnet"] = relative_to_alexnet(summary["top1"])
    return {
        **_what(data, IMAGENET_C, len(ready.classes), found["images"]),
        "unreadable": unreadable,
        "corruptions": found,
    }


def _what(data: str, layout: str, classes: int, images: int) -> dict[str, Any]:
    return {"data": data, "layout": layout, "classes": classes, "images": images}


def _by_class(counts: Tensor, classes: Sequence[str]) -> dict[str, Any]:
    return dict(zip(classes, map(asdict, class_scores(counts)), strict=True))


def _scored(logits: Mapping[str, Tensor], labels: Tensor, temperatures: Mapping[str, float]) -> dict[str, Any]:
    found = {answer: asdict(score) for answer, score in scores(logits, labels).items()}
    for answer, error in calibrated_errors(logits, labels, temperatures).items():
        found[answer] |= {"temperature": temperatures[answer], "calibrated_ece": error}
    return found
