"""Networks as ONNX, and ONNX in ONNX Runtime. The packages of the extra `onnx` are imported on first use."""

import json
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from coadvise.errors import UserError

IMAGES, PROBABILITIES = "images", "probabilities"  # names of input and output
Model: TypeAlias = Any  # an onnx.ModelProto; the package has no types
Values = npt.NDArray[Any]
Call = Callable[[Values], Values]


def is_installed(name: str) -> bool:
    return find_spec(name) is not None


def check_packages(*names: str) -> None:
    """Raises UserError where one of these packages is missing."""
    if missing := [name for name in names if not is_installed(name)]:
        raise UserError(
            f"writing this ONNX file needs {', '.join(missing)}: pip install 'coadvise[onnx]'; a file ending in .pt2 "
            "needs nothing more"
        )


def to_onnx(network: nn.Module, images: Tensor) -> Model:
    """A network as an ONNX model for any batch size, from sample images [B, 3, H, W], B > 1."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the exporter's, about itself
        program = torch.onnx.export(
            network, (images,), dynamo=True, verbose=False, input_names=[IMAGES], output_names=[PROBABILITIES],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        )  # fmt: skip
    assert program is not None
    return program.model_proto


def to_bytes(model: Model, about: Mapping[str, Any] | None = None) -> bytes:
    """The file, with what is said about it as JSON under "coadvise" in its metadata."""
    import onnx

    onnx.helper.set_model_props(model, {} if about is None else {"coadvise": json.dumps(about)})
    content: bytes = model.SerializeToString()
    return content


def in_onnx_runtime(content: bytes) -> Call:
    """A call of an ONNX file with one input and one output, on the CPU, with as many threads as PyTorch has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    return lambda values: session.run(None, {given.name: values})[0]


def shares_right(calls: Sequence[Call], batches: Iterable[Tensor], labels: Values) -> list[float]:
    """The top-1 accuracy of each network, a share, on the same images [B, 3, H, W] in 0..1 and their labels [N]."""
    found = [[call(images.numpy()).argmax(-1) for call in calls] for images in batches]
    return [float((np.concatenate(own) == labels).mean()) for own in zip(*found, strict=True)]
