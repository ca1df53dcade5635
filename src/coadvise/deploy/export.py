"""Exports a trained network to one file that runs without coadvise: in ONNX Runtime and others, or in PyTorch alone."""

import io
import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from coadvise.advice import AVERAGE, CLASS
from coadvise.config.schema import plain_size, sides
from coadvise.data.images import fitted, preprocessing_text, to_array
from coadvise.deploy.onnx_file import (
    IMAGES,
    PROBABILITIES,
    Model,
    check_packages,
    in_onnx_runtime,
    is_installed,
    to_bytes,
    to_onnx,
)
from coadvise.deploy.predict import TrainedStudent, load_from_run
from coadvise.deploy.preprocess import IMAGE, with_preprocessing
from coadvise.deploy.quantise import in_int8
from coadvise.errors import StorageError, UserError
from coadvise.evaluation.speed import interleaved
from coadvise.runs.conclude import renew_report
from coadvise.storage import write_bytes
from coadvise.training.metrics import Recorder, last_of, read_records

ONNX, EXPORTED = ".onnx", ".pt2"
SAMPLES = 4  # random images that the file is checked on
TOLERANCE = 1e-4  # largest difference of a probability
NEARLY = 0.01  # the same where the file resizes: a grey level or two of a pixel differ
SHAPES = ((1.0, 1.0), (2.3, 1.7), (0.8, 3.0))  # of the pictures that are checked then, in the network's sides
BATCH = 8  # images a timed call


def export(
    run: str | Path,
    out: str | Path,
    part: str | None = None,
    answer: str = CLASS,
    preprocess: bool = False,
    int8: bool = False,
    allow_loss: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Writes a network of a finished run as a file that needs nothing of coadvise.

    It maps images [B, 3, H, W] (float32, RGB in 0..1, made as "made_by" of the metadata says) to probabilities
    [B, K]; with `preprocess` one picture [height, width, 3] (uint8, upright RGB of any size) to probabilities [K].
    Normalisation is part of the network. The metadata hold what is returned here, as JSON under "coadvise". The
    file is written only if it gives the network's probabilities for random images. A calibrated network's logits are
    divided by its temperature before the softmax, also in the file. What was exported to ONNX, its speed and accuracy
    are added to the run's record and report.

    Args:
        run: Run directory.
        out: File to write: ".onnx" for ONNX Runtime and other readers of ONNX, ".pt2" for `torch.export.load`.
        part: The network, such as "students/alone-0"; by default the first co-advised student.
        answer: "class", another token's name, or "average" of all tokens.
        preprocess: Also resize, crop or pad in the file; ONNX alone.
        int8: Quantise matrix products and convolutions, with ranges from training images; ONNX alone. It is written
            with its measured accuracy and speed.
        allow_loss: Also write an int8 file that loses more than a point of top-1.
        say: Receives a line if the run's record or report could not take it up.

    Returns:
        The network's part, model, answer, classes, image size, how an image is made, the names and shapes of input and
        output, "temperature" where it is calibrated, the size in bytes, and the largest difference of a probability
        (None where ONNX Runtime is not installed); with `int8` also {"int8": {"top1", "float_top1", "images",
        "times_as_fast"}}.

    Raises:
        UserError: No such run, network or answer, another file ending, options that do not combine, missing packages
            for ONNX, data that `int8` needs and are not at hand, or an accuracy that falls by more than a point.
    """
    run, out = Path(run), Path(out)
    _check(out, preprocess, int8, allow_loss)
    student = load_from_run(run, part)
    if preprocess and student.network.values is not None:
        raise UserError("--preprocess takes images of 8 bits, and this network's have more; leave out --preprocess")
    answering = student.answering(answer)
    if answer == AVERAGE and len(student.tokens) == 1:
        (answer,) = student.tokens
    about = _about(student, answer)
    images = torch.rand(SAMPLES, 3, *sides(student.image_size), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = answering(images)
    if out.suffix == EXPORTED:
        content = to_pt2(answering, images, about)
        about["difference"] = _checked(_run_pt2(content, images), expected, TOLERANCE)
    else:
        model, about["difference"] = to_onnx(answering, images), None
        if is_installed("onnxruntime"):
            call = in_onnx_runtime(to_bytes(model))
            about["difference"] = _checked(torch.from_numpy(call(images.numpy())), expected, TOLERANCE)
            calls = {"float32": call}
            if int8:
                model, calls["int8"], about["int8"] = in_int8(run, student, model, call, allow_loss)
            _add_speed(about, calls, student)
        if preprocess:
            model = _preprocessed(model, student, about)
        content = to_bytes(model, about)
    write_bytes(out, content)
    about["bytes"] = len(content)
    if "images_per_second" in about:
        _record(run, out, about, say)
    return about


def _check(out: Path, preprocess: bool, int8: bool, allow_loss: bool) -> None:
    if out.suffix not in (ONNX, EXPORTED):
        raise UserError(f"'{out}' must end in {ONNX} or {EXPORTED}, which decides the format")
    if not out.absolute().parent.is_dir():
        raise UserError(f"'{out.parent}' is not a folder; create it, or choose another path")
    if allow_loss and not int8:
        raise UserError("--allow-loss is about int8; give --int8 too, or leave it out")
    for option, given in (("--preprocess", preprocess), ("--int8", int8)):
        if given and out.suffix != ONNX:
            raise UserError(f"{option} is for files ending in {ONNX}, and '{out}' does not")
    if out.suffix == ONNX:
        check_packages("onnx", "onnxscript", *["onnxruntime"] * int8)


def _about(student: TrainedStudent, answer: str) -> dict[str, Any]:
    """What is said of the file, before it is made."""
    height, width = sides(student.image_size)
    about: dict[str, Any] = {
        "part": student.part,
        "model": student.network.about["model"],
        "answer": answer,
        "classes": list(student.classes),
        "image_size": plain_size(student.image_size),
        "fit": student.fit,
        "made_by": preprocessing_text(student.image_size, student.fit, student.network.values),
        "input": {"name": IMAGES, "shape": ["batch", 3, height, width], "dtype": "float32", "range": [0, 1]},
        "output": {"name": PROBABILITIES, "shape": ["batch", len(student.classes)]},
    }
    if (temperature := student.temperature(answer)) is not None:
        about["temperature"] = temperature
    return about


def _add_speed(about: dict[str, Any], calls: Mapping[str, Callable[..., Any]], student: TrainedStudent) -> None:
    """Images a second of what is exported, and how many times as fast int8 is."""
    images = torch.rand(BATCH, 3, *sides(student.image_size)).numpy()
    timed = {name: partial(call, images) for name, call in calls.items()}
    seconds = interleaved(timed, 15, lambda: None, enough_seconds=10)
    about["images_per_second"] = round(BATCH / seconds.get("int8", seconds["float32"]), 1)
    if "int8" in seconds:
        about["int8"]["times_as_fast"] = round(seconds["float32"] / seconds["int8"], 2)


def _preprocessed(network: Model, student: TrainedStudent, about: dict[str, Any]) -> Model:
    """The model of one picture of any size; `about` gets what changes with that."""
    model = with_preprocessing(network, student.image_size, student.fit)
    about["input"] = {"name": IMAGE, "shape": ["height", "width", 3], "dtype": "uint8", "range": [0, 255]}
    about["output"]["shape"] = about["output"]["shape"][1:]
    if is_installed("onnxruntime"):
        about["difference"] = _resizing_difference(
            in_onnx_runtime(to_bytes(model)), in_onnx_runtime(to_bytes(network)), student
        )
    return model


def _resizing_difference(whole: Callable[..., Any], network: Callable[..., Any], student: TrainedStudent) -> float:
    """The largest difference of a probability between both on pictures that Pillow resizes for the network."""
    rng, (height, width) = np.random.default_rng(0), sides(student.image_size)
    differences = []
    for tall, wide in SHAPES:
        coarse = Image.fromarray(rng.integers(0, 256, (5, 7, 3), np.uint8))  # enlarged, it is smooth as photographs are
        picture = coarse.resize((round(wide * width), round(tall * height)), Image.Resampling.BICUBIC)
        pixels = to_array(fitted(picture, student.image_size, student.fit))[None].astype(np.float32) / 255
        found, expected = whole(np.asarray(picture)), network(pixels)[0]
        differences.append(_checked(torch.from_numpy(found), torch.from_numpy(expected), NEARLY))
    return max(differences)


def _checked(found: Tensor, expected: Tensor, tolerance: float) -> float:
    difference = (found - expected).abs().max().item()
    if not difference <= tolerance:
        raise RuntimeError(
            f"the exported network's probabilities differ by {difference:.2g} from the network's; nothing is written"
        )
    return difference


def _record(run: Path, out: Path, about: Mapping[str, Any], say: Callable[[str], None]) -> None:
    """Adds the export to the run's record, and makes its report anew."""
    result = last_of(read_records(run), "result", about["part"]) or {}
    top1 = about.get("int8", {}).get("top1") or result.get("top1", {}).get(about["answer"])
    try:
        Recorder(run, write=True, say=say).add(
            "export", part=about["part"], answer=about["answer"], file=out.name, bytes=about["bytes"],
            int8="int8" in about, top1=top1, images_per_second=about["images_per_second"], batch=BATCH,
        )  # fmt: skip
        renew_report(run)
    except StorageError as error:
        say(f"the run's report does not show this export: {error}")


def export_lines(out: Path, about: Mapping[str, Any]) -> Iterator[str]:
    """What `export` returned, for people."""
    yield f"{out}: {about['part']}, {about['model']}, {about['bytes'] / 1e6:.2f} MB, output head: {about['answer']}"
    given, shape = about["input"], ", ".join(map(str, about["input"]["shape"]))
    if given["name"] == IMAGE:
        yield f"in: {IMAGE}, uint8 [{shape}], upright RGB of any size"
        yield f"    inside: {about['made_by']}"
    else:
        yield f"in: {IMAGES}, float32 [{shape}], RGB in 0..1"
        yield f"    made by: {about['made_by']}"
    shape = ", ".join(map(str, about["output"]["shape"]))
    yield f'out: {PROBABILITIES} [{shape}]; the classes\' names are in its metadata, as JSON under "coadvise"'
    if "temperature" in about:
        what = "log-probabilities" if about["answer"] == AVERAGE else "logits"
        yield f"    calibrated: {what} / {about['temperature']:.4g} before the softmax, fitted on the validation images"
    if (small := about.get("int8")) is not None:
        yield (
            f"int8: top-1 {small['top1']:.1%} in place of {small['float_top1']:.1%} on {small['images']} images, "
            f"{small['times_as_fast']:g} times as fast here"
        )
    if about["difference"] is None:
        yield "not checked: that needs the package onnxruntime"
    else:
        yield f"checked: largest difference from the network's probabilities {about['difference']:.1g}"
    if "images_per_second" in about:
        yield f"speed here in ONNX Runtime: {about['images_per_second']:.0f} images/s in batches of {BATCH}"


def to_pt2(network: nn.Module, images: Tensor, about: Mapping[str, Any]) -> bytes:
    """A network as a .pt2 file for any batch size, from sample images [B, 3, H, W], B > 1, and its metadata."""
    file = io.BytesIO()
    with torch.no_grad():
        program = torch.export.export(network, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    with warnings.catch_warnings():  # of a group of tensors, whatever is saved
        warnings.filterwarnings("ignore", "No complete tensor found in the group")
        torch.export.save(program, file, extra_files={"coadvise": json.dumps(about)})
    return file.getvalue()


def _run_pt2(content: bytes, images: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = torch.export.load(io.BytesIO(content)).module()(images)
    return found
