"""A trained network as one file that answers without coadvise: for ONNX's readers, or for PyTorch alone."""

import io
import json
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from coadvise.advice import AVERAGE, CLASS
from coadvise.deploy.predict import load
from coadvise.errors import UserError
from coadvise.storage import write_bytes

ONNX, EXPORTED = ".onnx", ".pt2"
IMAGES, PROBABILITIES = "images", "probabilities"  # the names of what goes in and comes out
SAMPLES = 4  # random images on which a file must answer as its network does
TOLERANCE = 1e-4  # of a probability


def export(run: str | Path, out: str | Path, part: str | None = None, answer: str = CLASS) -> dict[str, Any]:
    """Write a network of a finished run as a file that needs nothing of coadvise.

    It maps images [B, 3, S, S] (float32, RGB in 0..1, the shorter side resized to S and the middle cut out) to
    probabilities [B, K]; normalisation is in it. Its metadata have what is returned here, as JSON under "coadvise". A
    file is written only if it answers random images as the network does.

    Args:
        run: A run's folder.
        out: The file to write. One ending in .onnx is for ONNX Runtime and other readers of ONNX; one in .pt2 for
            `torch.export.load`.
        part: The network, such as "students/alone-0"; by default the first co-advised student.
        answer: "class", another token's name, or "average" of all tokens.

    Returns:
        The network's part, model, answer, classes, image size, the names and shapes of input and output, and how far
        the file's answers were from the network's (None where that could not be checked).

    Raises:
        UserError: no such run, network or answer, another ending, or no packages for ONNX.
    """
    out = Path(out)
    if out.suffix not in (ONNX, EXPORTED):
        raise UserError(f"'{out}' must end in {ONNX} or {EXPORTED}, which says what is written")
    if not out.absolute().parent.is_dir():
        raise UserError(f"'{out.parent}' is no folder; make it, or write elsewhere")
    if out.suffix == ONNX and (missing := [name for name in ("onnx", "onnxscript") if find_spec(name) is None]):
        raise UserError(
            f"writing ONNX needs 'pip install {' '.join(missing)}'; a file ending in {EXPORTED} needs nothing more"
        )
    student = load(run, part)
    answering, size = student.answering(answer), student.image_size
    if answer == AVERAGE and len(student.tokens) == 1:
        (answer,) = student.tokens
    images = torch.rand(SAMPLES, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = answering(images)
    about: dict[str, Any] = {
        "part": student.part,
        "model": student.network.about["model"],
        "answer": answer,
        "classes": list(student.classes),
        "image_size": size,
        "input": {"name": IMAGES, "shape": ["batch", 3, size, size], "dtype": "float32", "range": [0, 1]},
        "output": {"name": PROBABILITIES, "shape": ["batch", len(student.classes)]},
    }
    write, read = (_onnx, _by_onnxruntime) if out.suffix == ONNX else (_exported, _by_torch)
    content = write(answering, images, about)
    got = read(content, images)
    off = None if got is None else (got - wanted).abs().max().item()
    if off is not None and not off <= TOLERANCE:
        raise RuntimeError(f"the exported network answers otherwise, by {off:.2g} of a probability; nothing is written")
    write_bytes(out, content)
    return {**about, "bytes": len(content), "difference": off}


def _exported(network: nn.Module, images: Tensor, about: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    with torch.no_grad():
        program = torch.export.export(network, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, file, extra_files={"coadvise": json.dumps(about)})
    return file.getvalue()


def _by_torch(content: bytes, images: Tensor) -> Tensor:
    with torch.no_grad():
        answer: Tensor = torch.export.load(io.BytesIO(content)).module()(images)
    return answer


def _onnx(network: nn.Module, images: Tensor, about: dict[str, Any]) -> bytes:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of the exporter about itself
        program = torch.onnx.export(
            network, (images,), dynamo=True, verbose=False, input_names=[IMAGES], output_names=[PROBABILITIES],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        )  # fmt: skip
    assert program is not None
    program.model.metadata_props["coadvise"] = json.dumps(about)
    content: bytes = program.model_proto.SerializeToString()
    return content


def _by_onnxruntime(content: bytes, images: Tensor) -> Tensor | None:
    if find_spec("onnxruntime") is None:
        return None
    import onnxruntime  # type: ignore[import-not-found, import-untyped, unused-ignore]

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run([PROBABILITIES], {IMAGES: images.numpy()})[0])
