"""Predictions of a trained student for images."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from coadvise.advice import AVERAGE, CLASS
from coadvise.config.schema import Fit
from coadvise.data.images import UnreadableImageError, fitted, fitted_size, read_image, to_array, upright_rgb
from coadvise.distill.loss import average_probabilities
from coadvise.errors import UserError
from coadvise.evaluation.calibration import calibrated
from coadvise.evaluation.scores import log_probabilities
from coadvise.models.attention import AttentionMaps, attention_maps
from coadvise.models.network import Network, load_network
from coadvise.report.attention import darkened, encoded, sheet
from coadvise.runs.run import check_run, trained_parts, trained_tokens
from coadvise.storage import write_bytes

MOST_DRAWN = 32  # images, of which is drawn where tokens look
T = TypeVar("T")
ImageLike = str | Path | Image.Image | npt.NDArray[np.uint8] | Tensor


@dataclass(frozen=True)
class Prediction:
    """The most probable class of an image, its probability, and all probabilities by class name."""

    label: str
    probability: float
    probabilities: dict[str, float]


class TrainedStudent:
    """A student with its classes, image size and normalisation; what `coadvise.load(run)` returns.

    Attributes:
        network: Images [B, 3, H, W] in 0..1 to logits by token.
        part: Its place in the run, such as "students/advised-0".
        tokens: The tokens that were trained, "class" first.
        classes: Class names in the order of the logits.
        image_size: Pixels: the side of a square, or (height, width).
        fit: How an image of another shape is fitted to that size: crop, pad or stretch.
    """

    def __init__(self, network: Network, part: str, tokens: tuple[str, ...]) -> None:
        self.network, self.part, self.tokens = network.eval(), part, tokens
        self.classes = network.classes
        self.image_size = network.image_size
        self.fit: Fit = network.about.get("fit", "crop")

    @property
    def model(self) -> torch.nn.Module:
        """The timm model itself; it expects normalised images."""
        return self.network.model

    @cached_property
    def class_network(self) -> Network:
        """The network for inference, which gives the class token's logits alone."""
        return self.network.for_inference()

    def answering(self, answer: str = CLASS) -> "Answering":
        """A module that maps images [B, 3, H, W] in 0..1 to probabilities [B, K], calibrated if the network is.

        Args:
            answer: As for `predict`.

        Raises:
            UserError: An answer that the student does not have.
        """
        if answer not in (*self.tokens, AVERAGE):
            raise UserError(f"no answer '{answer}'; this network has {', '.join(self.tokens)} and {AVERAGE}")
        tokens = self.tokens if answer == AVERAGE else (answer,)
        network = self.class_network if tokens == (CLASS,) else self.network
        return Answering(network, tokens, self.temperature(answer)).eval()

    def temperature(self, answer: str = CLASS) -> float | None:
        """What an answer's logits are divided by before the softmax; None if it is not calibrated."""
        only = self.tokens[0] if answer == AVERAGE and len(self.tokens) == 1 else answer
        return self.network.temperatures.get(only)

    @torch.inference_mode()
    def predict(
        self, images: ImageLike | Sequence[ImageLike], answer: str = CLASS, batch_size: int = 64
    ) -> list[Prediction]:
        """One prediction per image, in their order.

        Args:
            images: One or several paths, PIL images, uint8 arrays [H, W, 3] or tensors [3, H, W] (uint8 or 0..1 float).
            answer: "class" (the class token, as in the paper), another token's name, or "average" of all tokens.
            batch_size: Images at a time.

        Raises:
            UserError: An image that cannot be read, or an answer that the student does not have.
        """
        several = isinstance(images, Iterable) and not isinstance(images, (str, Image.Image, np.ndarray, Tensor))
        given: list[ImageLike] = list(images) if several else [images]  # type: ignore[arg-type, list-item]
        answering = self.answering(answer)
        found: list[Prediction] = []
        for start in range(0, len(given), batch_size):
            for row in answering(self.batch(given[start : start + batch_size])).tolist():
                best = int(np.argmax(row))
                found.append(Prediction(self.classes[best], row[best], dict(zip(self.classes, row, strict=True))))
        return found

    def attention_maps(self, images: Sequence[ImageLike]) -> AttentionMaps:
        """Where each token looks in some images, over the patches [N, H', W'].

        Raises:
            UserError: An image that cannot be read, or a network without attention.
        """
        return attention_maps(self.network, self.batch(images))

    def draw_attention(self, images: Sequence[Path], out: Path) -> None:
        """Writes a PNG file: a row an image, dark where each of its tokens does not look in the last block.

        Raises:
            UserError: As `attention_maps`, more than `MOST_DRAWN` images, another ending, or no such folder.
        """
        if out.suffix != ".png" or not out.absolute().parent.is_dir():
            raise UserError(f"'{out}' must end in .png, in a folder that is there")
        if not 0 < len(images) <= MOST_DRAWN:
            raise UserError(f"{len(images)} images; where tokens look is drawn for 1 to {MOST_DRAWN}")
        seen = self.batch(images)
        maps = attention_maps(self.network, seen).last
        rows = []
        for place, pixels in enumerate(seen.mul(255).round().byte().permute(0, 2, 3, 1).numpy()):
            picture = Image.fromarray(pixels)
            by_token = [darkened(picture, own[place].numpy()) for own in maps.values()]
            rows.append([picture.resize(by_token[0].size, Image.Resampling.NEAREST), *by_token])
        write_bytes(out, encoded(sheet(["image", *(f"{name} token" for name in maps)], rows), "PNG"))

    def batch(self, images: Sequence[ImageLike]) -> Tensor:
        """Images as the network takes them, [N, 3, H, W] in 0..1. Raises UserError: one that cannot be read."""
        return torch.from_numpy(np.stack([self._pixels(image) for image in images])).float().div_(255)

    def _pixels(self, image: ImageLike) -> npt.NDArray[np.uint8]:
        if isinstance(image, (str, Path)):
            try:
                need = partial(fitted_size, size=self.image_size, fit=self.fit)
                image = read_image(Path(image), need, self.network.values)
            except UnreadableImageError as error:
                raise UserError(
                    f"cannot read image {error}; leave it out (coadvise predict: --allow-unreadable)"
                ) from None
        elif isinstance(image, Tensor):
            image = _from_tensor(image)
        elif isinstance(image, np.ndarray):
            if image.dtype != np.uint8 or image.ndim < 2 or image.shape[2:] not in ((), (3,), (4,)) or not image.size:
                raise UserError(
                    f"an array of {image.dtype} {list(image.shape)} is not an image; give uint8 [H, W, 3] or [H, W]"
                )
            image = Image.fromarray(image)
        elif not isinstance(image, Image.Image):
            raise UserError(f"{image!r} is not an image; give one or several paths, PIL images, arrays or tensors")
        return to_array(fitted(upright_rgb(image, self.network.values), self.image_size, self.fit))


class Answering(torch.nn.Module):
    """Maps images [B, 3, H, W] in 0..1 to the mean of the tokens' probabilities, at a temperature if there is one."""

    def __init__(self, network: Network, tokens: tuple[str, ...], temperature: float | None = None) -> None:
        super().__init__()
        self.network, self.tokens, self.temperature = network, tokens, temperature

    @property
    def classes(self) -> tuple[str, ...]:
        return self.network.classes

    def forward(self, images: Tensor) -> Tensor:
        logits: dict[str, Tensor] = self.network(images)
        if self.temperature is not None:
            answers = log_probabilities({name: logits[name].float() for name in self.tokens})
            return calibrated(answers[AVERAGE if len(self.tokens) > 1 else self.tokens[0]], self.temperature).exp()
        if len(self.tokens) == 1:
            return logits[self.tokens[0]].float().softmax(-1)
        return average_probabilities({name: logits[name] for name in self.tokens})


def _from_tensor(image: Tensor) -> Image.Image:
    if image.ndim != 3 or image.shape[0] != 3 or not image.numel():
        raise UserError(f"a tensor of shape {list(image.shape)} is not an image; give [3, H, W], or a list of them")
    if image.is_floating_point():
        if not 0 <= image.min() <= image.max() <= 1:
            raise UserError(
                f"a tensor with values from {image.min():g} to {image.max():g} is not an image; give floats in "
                "0..1 that are not normalised, or uint8"
            )
        image = (image * 255).round().to(torch.uint8)
    elif image.dtype != torch.uint8:
        raise UserError(f"a tensor of {image.dtype} is not an image; give floats in 0..1 or uint8")
    return Image.fromarray(image.permute(1, 2, 0).cpu().numpy())


def load_from_run(run: str | Path, part: str | None = None) -> TrainedStudent:
    """Loads a network of a finished run.

    Args:
        run: Run directory.
        part: The network, such as "students/alone-0"; by default the first co-advised student.

    Raises:
        UserError: No such run, or the network is not finished.
    """
    run, part = Path(run), part and part.rstrip("/")
    check_run(run)
    if part is not None and part not in (parts := trained_parts(run)):
        raise UserError(f"'{run}' has no finished network '{part}'; it has {', '.join(parts) or 'none yet'}")
    part = part or _first_student(run)
    network = load_network(run / part)
    return TrainedStudent(network, part, trained_tokens(run, part, network))


def _first_student(run: Path) -> str:
    students = [part for part in trained_parts(run) if part.startswith("students/advised-")]
    if not students:
        raise UserError(f"'{run}' has no finished student yet; run the same 'coadvise fit' command again to continue")
    return students[0]
