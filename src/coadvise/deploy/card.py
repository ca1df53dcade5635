"""A model card from a run's record: what the network is, how sure its verdict is, and what it was trained on."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from coadvise.config.schema import HUB, RunConfig, names_folder, names_model, size_text
from coadvise.data.images import preprocessing_text
from coadvise.evaluation.scores import class_scores, confusion
from coadvise.models.network import Network

MOST_CLASSES = 100  # that are listed one by one
Record = Mapping[str, Any]
CITATION = """\
@inproceedings{ren2022coadvise,
  title     = {Co-advise: Cross Inductive Bias Distillation},
  author    = {Ren, Sucheng and Gao, Zhengqi and Hua, Tianyu and Xue, Zihui and Tian, Yonglong and He, Shengfeng and
               Zhao, Hang},
  booktitle = {Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)},
  year      = {2022}
}"""


def card(
    name: str,
    part: str,
    network: Network,
    config: RunConfig,
    data: Record,
    result: Record,
    verdict: Record | None,
    logits: Tensor,
    labels: Tensor,
    needs_coadvise: bool,
) -> str:
    """The text of the card.

    Args:
        name: ORG/NAME.
        part: The network's place in its run.
        data: What data.json of the run holds.
        result, verdict: Records of the run.
        logits, labels: Of the scored pictures, [N, K] and [N].
        needs_coadvise: timm knows the architecture only once coadvise is imported.
    """
    kept = {
        "library_name": "timm",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "timm", "coadvise"],
        "metrics": ["accuracy"],
    }
    title = name.partition("/")[2]
    sections = [
        f"---\n{yaml.safe_dump(kept, sort_keys=False)}---",
        f"# {title}",
        *_what(part, network, config),
        *_verdict(part, result, verdict, len(labels)),
        *_classes(data["classes"], logits, labels),
        *_training(part, config, data),
        *_limits(network, len(labels)),
        *_use(name, network, needs_coadvise),
        "## Citation\n\nThe method is that of",
        f"```bibtex\n{CITATION}\n```",
    ]
    return "\n\n".join(sections) + "\n"


def _what(part: str, network: Network, config: RunConfig) -> Iterator[str]:
    about = network.about
    kind = "A teacher" if part.startswith("teachers/") else "A student"
    advice = ""
    if part.startswith("students/advised"):
        teachers = ", ".join(f"{name} ({teacher.model})" for name, teacher in config.teachers.items())
        advice = f", advised by {len(config.teachers)} teachers while it was trained: {teachers}"
    yield (
        f"{kind} of {network.parameter_count / 1e6:.2f} million parameters (`{about['model']}`) that tells "
        f"{len(network.classes)} classes apart in images of {size_text(about['image_size'])} pixels{advice}."
    )
    yield f"Classes: {', '.join(network.classes[:MOST_CLASSES])}."


def _verdict(part: str, result: Record, verdict: Record | None, images: int) -> Iterator[str]:
    yield "## How good it is"
    scores = {"top-1": "top1", "macro accuracy": "macro_accuracy", "calibration error": "ece"}
    words = [f"{what} {100 * result[key]['class']:.1f} %" for what, key in scores.items() if key in result]
    yield f"On {images:,} images that it was not trained on: {', '.join(words)}."
    if verdict is None or not part.startswith("students/advised"):
        return
    yield str(verdict["sentence"]) + (f" {verdict['remark']}" if verdict.get("remark") else "")
    lines = ["| network | top-1 | parameters |", "| --- | --- | --- |"]
    lines += [
        f"| {row['name']} | {100 * row['top1']:.1f} % | {row['parameters'] / 1e6:.2f} M |" for row in verdict["rows"]
    ]
    yield "\n".join(lines)


def _classes(classes: Sequence[str], logits: Tensor, labels: Tensor) -> Iterator[str]:
    if len(classes) > MOST_CLASSES:
        return
    lines = ["| class | images | precision | recall |", "| --- | --- | --- | --- |"]
    for name, score in zip(classes, class_scores(confusion(logits, labels)), strict=True):
        lines.append(f"| {name} | {score.images} | {100 * score.precision:.1f} % | {100 * score.recall:.1f} % |")
    yield "\n".join(lines)


def _training(part: str, config: RunConfig, data: Record) -> Iterator[str]:
    yield "## How it was trained"
    train = data["splits"]["train"]
    counts = train["per_class"]
    yield (
        f"Data: {Path(data['root']).name}, {train['images']:,} images, {min(counts)} to {max(counts)} a class. "
        f"Division: {data['note']}."
    )
    teacher = config.teachers.get(part.removeprefix("teachers/"))
    network = teacher or config.student
    recipe = network.recipe
    lines = [
        f"- {recipe.epochs} epochs in batches of {recipe.batch_size}, AdamW, learning rate {recipe.learning_rate:g}, "
        f"weight decay {recipe.weight_decay:g}",
        f"- started from: {_start(network.start, network.model)}",
    ]
    if part.startswith("students/advised"):
        lines += [
            f"- {name}: {teacher.model}, on the token(s) {_words(teacher.token or name)}, λ {teacher.weight:g}, "
            f"τ {teacher.temperature:g}"
            for name, teacher in config.teachers.items()
        ]
    yield "\n".join(lines)


def _start(start: str | bool | None, model: str) -> str:
    """What a network started from. Where on a disk says nothing to others."""
    if start is None:
        return "random weights"
    named = model if start is True else str(start)
    return named if names_model(named) else "another run" if names_folder(named) else "a file of weights"


def _words(names: str | tuple[str, ...]) -> str:
    return names if isinstance(names, str) else " and ".join(names)


def _limits(network: Network, images: int) -> Iterator[str]:
    yield "## Limits"
    calibrated = (
        "Its probabilities were calibrated on validation images."
        if network.temperatures
        else "Its probabilities are not calibrated: a probability of 90 % may be right more or less often than that."
    )
    yield (
        f"It answers with one of its {len(network.classes)} classes whatever the image shows. It was scored on "
        f"{images:,} images of one source; on images of other cameras, light or places expect less. "
        f"{calibrated} The licence of these weights is for their publisher to state; that of the data may bind it."
    )


def _use(name: str, network: Network, needs_coadvise: bool) -> Iterator[str]:
    about = network.about
    yield "## How to use it"
    yield (
        f"```python\nimport coadvise\n\nmodel = coadvise.load('{HUB}{name}')\nanswer = model.predict('photo.jpg')[0]\n"
        "print(answer.label, answer.probability)\n```"
    )
    also = "import coadvise.models  # registers the architecture\n" if needs_coadvise else ""
    made = preprocessing_text(about["image_size"], about.get("fit", "crop"), network.values)
    yield (
        f"With timm alone it takes normalised images (to make one: {made}):"
        if not needs_coadvise
        else (f"As a timm model it takes normalised images (to make one: {made}):")
    )
    yield f"```python\n{also}import timm\n\nmodel = timm.create_model('{HUB}{name}', pretrained=True).eval()\n```"
