"""All that the demo shows of a picture: every opinion, where each token looks, the nearest training pictures."""

import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from coadvise.advice import AVERAGE
from coadvise.config.reading import read_config
from coadvise.config.schema import size_text
from coadvise.data.images import UnreadableImageError, decode, fitted_size, open_image
from coadvise.data.scanned import Dataset
from coadvise.data.sources import short_name
from coadvise.deploy.opinions import opinions
from coadvise.deploy.predict import TrainedStudent
from coadvise.errors import UserError
from coadvise.evaluation.nearest import Nearest
from coadvise.models.attention import attention_maps
from coadvise.report.attention import darkened
from coadvise.runs.plan import TEACHER, Part
from coadvise.runs.run import CONFIG, own_pictures, written_data
from coadvise.training.listener import Listener
from coadvise.training.metrics import last_of, read_records

NEIGHBOURS = 8  # training pictures
EXAMPLES = 6  # pictures that the run was scored on
SIDE = 400  # pixels of the longer side of a training picture, at most
ENDINGS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp"}  # by Pillow's format
Captioned = list[tuple[Image.Image, str]]


@dataclass(frozen=True)
class Seen:
    """What is shown of one picture.

    Attributes:
        answers: A dict from class to probability for each of `Viewer.titles`.
        attention: The picture as the networks see it, then darkened where each token does not look.
        nearest: The training pictures nearest to it, with label and cosine similarity.
    """

    answers: list[dict[str, float]]
    attention: Captioned
    nearest: Captioned


class Viewer:
    """A student, the teachers of its run and the run's pictures, ready to be asked.

    Attributes:
        titles: Whose opinions there are, as the verdict's table has them; teachers first.
        name: Of the data.
        about: The student and its accuracy, in a sentence.
        columns: What the opinions are, in a sentence.
        neighbours: Which training pictures are compared with, or why none are.
        looks: Whether the student has tokens that attend to patches.
        nearest: None if the run's pictures are not at hand.
    """

    def __init__(self, student: TrainedStudent, run: Path, listener: Listener) -> None:
        self.student = student
        asked = opinions(student, run)
        teachers = [name for name in asked if name.startswith("teachers/")]
        names = [*teachers, *(name for name in asked if name not in teachers)]
        self.asked = {_title(name): asked[name] for name in names}
        data = written_data(run)
        self.name = short_name(data["root"]) if "root" in data else run.name
        self.about = _about(student, run, data)
        self.columns = _columns(student, bool(teachers))
        self.looks = _looks(student)
        self.dataset: Dataset | None = None
        self.nearest: Nearest | None = None
        self.neighbours = self._open_pictures(run, listener)

    def _open_pictures(self, run: Path, listener: Listener) -> str:
        """Looks at the run's own pictures. Returns what the page says of them."""
        began = time.monotonic()
        try:
            dataset = own_pictures(run, read_config(run / CONFIG))
            self.nearest = Nearest(self.student.network, dataset.train, listener.progress)
        except UserError as error:
            why = str(error).partition("; ")[0]  # what follows is for whoever trains
            listener.say(text := f"Without the nearest training pictures: {why}.")
            return text
        self.dataset = dataset
        some, every = len(self.nearest.rows), len(dataset.train)
        them = f"{some:,} training pictures" + (f", evenly chosen of {every:,}" if some < every else "")
        listener.say(f"looked at {them} in {time.monotonic() - began:.0f} s")
        return f"Of {them}, with label and cosine similarity of the class token's features."

    @property
    def titles(self) -> list[str]:
        return list(self.asked)

    def __call__(self, content: bytes, name: str) -> Seen:
        """What is shown of an encoded picture. Raises UnreadableImageError."""
        need = partial(fitted_size, size=self.student.image_size, fit=self.student.fit)
        images = self.student.batch([decode(content, name, need, self.student.network.values)])
        with torch.inference_mode():
            rows = {title: module(images)[0].tolist() for title, module in self.asked.items()}
        answers = [dict(zip(module.classes, rows[title], strict=True)) for title, module in self.asked.items()]
        return Seen(answers, self._attention(images), self._nearest(images))

    def examples(self) -> list[tuple[str, bytes]]:
        """Some of the pictures that the run was scored on, those that browsers show: file names and bytes."""
        if self.dataset is None:
            return []
        split = self.dataset.scored
        rows = [len(split) * place // EXAMPLES for place in range(min(EXAMPLES, len(split)))]
        return [(f"{row}.{ending}", content) for row in rows if (ending := ending_of(content := split.read(row)))]

    def _attention(self, images: Tensor) -> Captioned:
        if not self.looks:
            return []
        picture = Image.fromarray(images[0].mul(255).round().byte().permute(1, 2, 0).numpy())
        maps = attention_maps(self.student.network, images).last
        by_token = [(darkened(picture, own[0].numpy()), _title(name)) for name, own in maps.items()]
        whole = picture.resize(by_token[0][0].size, Image.Resampling.NEAREST)
        return [(whole, "input"), *by_token]

    def _nearest(self, images: Tensor) -> Captioned:
        if self.nearest is None or self.dataset is None:
            return []
        found: Captioned = []
        train = self.dataset.train
        for row, similarity in self.nearest(images, NEIGHBOURS):
            with suppress(UnreadableImageError):  # removed in the meantime
                picture = train.decoded(row, lambda width, height: (SIDE, SIDE)).image
                picture.thumbnail((SIDE, SIDE))
                found.append((picture, f"{self.dataset.classes[train.labels[row]]}, {similarity:.2f}"))
        return found


def ending_of(content: bytes) -> str | None:
    """The ending for a picture's file; None if browsers do not show its format. Raises whatever Pillow does."""
    with open_image(content) as image:
        return ENDINGS.get(str(image.format))


def _title(name: str) -> str:
    """What the verdict's table calls an opinion."""
    if name.startswith("teachers/"):
        return Part(name, TEACHER, 0, name.removeprefix("teachers/")).title
    return name if name == AVERAGE else f"{name} token"


def _about(student: TrainedStudent, run: Path, data: Mapping[str, Any]) -> str:
    part = student.part
    kind = "co-advised student" if part.startswith("students/advised") else f"student {part.partition('/')[2]}"
    about = (
        f"{kind}, {student.network.parameter_count / 1e6:.2f} million parameters, {len(student.classes)} classes, "
        f"{size_text(student.image_size)} pixels"
    )
    if result := last_of(read_records(run), "result", part):
        scored = [split["images"] for split in data.get("splits", {}).values() if "paths" in split]
        count = f" of {scored[0]:,} pictures that it was not trained on" if scored else ""
        about += f"; its class token is right on {100 * result['top1']['class']:.1f} %{count}"
    return f"A {about}."


def _columns(student: TrainedStudent, teachers: bool) -> str:
    who = ["each teacher"] if teachers else []
    who += ["each token of the student (the class token is its answer)" if len(student.tokens) > 1 else "the student"]
    who += ["the average of the tokens"] if len(student.tokens) > 1 else []
    how = "calibrated" if student.network.temperatures else "not calibrated"
    listed = ", ".join(who[:-1]) + " and " + who[-1] if len(who) > 1 else who[0]
    return f"The most probable classes by {listed}; probabilities are {how}."


def _looks(student: TrainedStudent) -> bool:
    try:
        student.attention_maps([Image.new("RGB", (8, 8))])
    except UserError:  # a Mixer or a ResNet
        return False
    return True
