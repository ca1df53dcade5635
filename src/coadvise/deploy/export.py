"""Exports a trained network to one file that runs without coadvise: in ONNX Runtime and others, or in PyTorch alone."""

import io
import json
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from coadvise.advice import AVERAGE, CLASS
from coadvise.config.schema import plain_size, sides
from coadvise.data.images import preprocessing_text
from coadvise.deploy.predict import load_from_run
from coadvise.errors import UserError
from coadvise.storage import write_bytes

ONNX, EXPORTED = ".onnx", ".pt2"
IMAGES, PROBABILITIES = "images", "probabilities"  # names of input and output
SAMPLES = 4  # random images that the file is checked on
TOLERANCE = 1e-4  # largest difference of a probability


def export(run: str | Path, out: str | Path, part: str | None = None, answer: str = CLASS) -> dict[str, Any]:
    """Writes a network of a finished run as a file that needs nothing of coadvise.

    It maps images [B, 3, H, W] (float32, RGB in 0..1, made as "made_by" of the metadata says) to probabilities
    [B, K]. Normalisation is part of the network. The metadata hold what is returned here, as JSON under "coadvise". The
    file is written only if it gives the network's probabilities for random images. A calibrated network's logits are
    divided by its temperature before the softmax, also in the file.

    Args:
        run: Run directory.
        out: File to write: ".onnx" for ONNX Runtime and other readers of ONNX, ".pt2" for `torch.export.load`.
        part: The network, such as "students/alone-0"; by default the first co-advised student.
        answer: "class", another token's name, or "average" of all tokens.

    Returns:
        The network's part, model, answer, classes, image size, how an image is made, the names and shapes of input and
        output, "temperature" where it is calibrated, the size in bytes, and the largest difference of a probability
        (None where ONNX Runtime is not installed).

    Raises:
        UserError: No such run, network or answer, another file ending, or missing packages for ONNX.
    """
    out = Path(out)
    if out.suffix not in (ONNX, EXPORTED):
        raise UserError(f"'{out}' must end in {ONNX} or {EXPORTED}, which decides the format")
    if not out.absolute().parent.is_dir():
        raise UserError(f"'{out.parent}' is not a folder; create it, or choose another path")
    if out.suffix == ONNX and (missing := [name for name in ("onnx", "onnxscript") if find_spec(name) is None]):
        raise UserError(
            f"writing ONNX needs 'pip install {' '.join(missing)}'; a file ending in {EXPORTED} needs nothing more"
        )
    student = load_from_run(run, part)
    answering, (height, width) = student.answering(answer), sides(student.image_size)
    if answer == AVERAGE and len(student.tokens) == 1:
        (answer,) = student.tokens
    images = torch.rand(SAMPLES, 3, height, width, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = answering(images)
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
    write, read = (to_onnx, _run_onnx) if out.suffix == ONNX else (to_pt2, _run_pt2)
    content = write(answering, images, about)
    found = read(content, images)
    difference = None if found is None else (found - expected).abs().max().item()
    if difference is not None and not difference <= TOLERANCE:
        raise RuntimeError(
            f"the exported network's probabilities differ by {difference:.2g} from the network's; nothing is written"
        )
    write_bytes(out, content)
    return {**about, "bytes": len(content), "difference": difference}


def to_pt2(network: nn.Module, images: Tensor, about: dict[str, Any]) -> bytes:
    """A network as a .pt2 file for any batch size, from sample images [B, 3, H, W], B > 1, and its metadata."""
    file = io.BytesIO()
    with torch.no_grad():
        program = torch.export.export(network, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, file, extra_files={"coadvise": json.dumps(about)})
    return file.getvalue()


def _run_pt2(content: bytes, images: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = torch.export.load(io.BytesIO(content)).module()(images)
    return found


def to_onnx(network: nn.Module, images: Tensor, about: dict[str, Any]) -> bytes:
    """A network as an ONNX file for any batch size, from sample images [B, 3, H, W], B > 1, and its metadata."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the exporter's, about itself
        program = torch.onnx.export(
            network, (images,), dynamo=True, verbose=False, input_names=[IMAGES], output_names=[PROBABILITIES],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        )  # fmt: skip
    assert program is not None
    program.model.metadata_props["coadvise"] = json.dumps(about)
    content: bytes = program.model_proto.SerializeToString()
    return content


def _run_onnx(content: bytes, images: Tensor) -> Tensor | None:
    if find_spec("onnxruntime") is None:
        return None
    import onnxruntime  # type: ignore[import-not-found, import-untyped, unused-ignore]

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run([PROBABILITIES], {IMAGES: images.numpy()})[0])
