"""Networks with integer weights and activations of 8 bits: ONNX Runtime's static quantisation."""

import contextlib
import io
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from coadvise.config.reading import read_config
from coadvise.data.loader import still_batches
from coadvise.data.scan import scan_split
from coadvise.data.scanned import ScannedSplit
from coadvise.data.sources import Split
from coadvise.data.sources.split import evenly
from coadvise.deploy.onnx_file import IMAGES, Call, Model, in_onnx_runtime, shares_right, to_bytes
from coadvise.deploy.predict import TrainedStudent
from coadvise.errors import UserError
from coadvise.models.network import class_map
from coadvise.runs.run import CONFIG, own_pictures

CALIBRATED_ON, SCORED_ON = 200, 5000  # pictures, evenly chosen
BATCH = 25  # pictures whose activations are held at a time
LOSS = 0.01  # of top-1, from which on int8 must be asked for
OPERATORS = ("MatMul", "Gemm", "Conv")  # the arithmetic; with softmax and norms too a student lost a point
PERCENTILE = 99.999  # of an activation's values that are told apart; the largest few would take the levels of all


def in_int8(
    run: Path, student: TrainedStudent, network: Model, float_call: Call, allow_loss: bool
) -> tuple[Model, Call, dict[str, Any]]:
    """The quantised network, a call of it, and what it costs on the run's scored pictures.

    Args:
        network: Images [B, 3, H, W] in 0..1 to probabilities [B, K]; `float_call` calls it.
        allow_loss: Also where it loses more than a point.

    Raises:
        UserError: It loses more than a point, or the run's pictures are not at hand.
    """
    config, size = read_config(run / CONFIG), student.image_size
    source = own_pictures(run, config).source
    own = class_map(student.network.classes, source.classes)  # a given teacher's may be more, or in another order
    if own is None:
        raise UserError(f"the network does not know all classes of '{source.where}'; leave out --int8")

    def some(split: Split, most: int) -> ScannedSplit:
        chosen = split.subset(evenly(len(split), most))
        return scan_split(chosen, size, config.in_memory, student.fit, student.network.values)

    ranged = some(source.train, CALIBRATED_ON)
    batch = BATCH if len(ranged) % BATCH == 0 else 1  # ONNX Runtime collects batches of one size
    small = quantised(network, still_batches(ranged, size, batch))
    call = in_onnx_runtime(to_bytes(small))
    scored = some(source.scored, SCORED_ON)
    before, after = shares_right((float_call, call), still_batches(scored, size), np.array(own)[scored.labels])
    if before - after > LOSS and not allow_loss:
        raise UserError(
            f"int8 loses {100 * (before - after):.1f} points of top-1: {after:.1%} in place of {before:.1%} on "
            f"{len(scored)} images; nothing is written; leave out --int8, or accept that with --allow-loss"
        )
    return small, call, {"top1": after, "float_top1": before, "images": len(scored)}


def quantised(network: Model, batches: Iterable[Tensor]) -> Model:
    """The same model with matrix products and convolutions in int8, their ranges taken from some images.

    Args:
        network: Images [B, 3, H, W] in 0..1 to probabilities [B, K]. It is not changed.
        batches: Images to take ranges from.
    """
    import onnx
    from onnxruntime import quantization
    from onnxruntime.quantization import shape_inference

    class Ranges(quantization.CalibrationDataReader):  # type: ignore[misc, unused-ignore]
        def __init__(self) -> None:
            self.batches = iter(batches)

        def get_next(self) -> dict[str, object] | None:
            images = next(self.batches, None)
            return None if images is None else {IMAGES: images.numpy()}

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):  # it prints its steps
        plain, prepared, small = (Path(folder, f"{name}.onnx") for name in ("plain", "prepared", "int8"))
        onnx.save(network, plain)
        shape_inference.quant_pre_process(str(plain), str(prepared), skip_symbolic_shape=True)
        quantization.quantize_static(
            str(prepared), str(small), Ranges(), quant_format=quantization.QuantFormat.QDQ, per_channel=True,
            op_types_to_quantize=list(OPERATORS), calibrate_method=quantization.CalibrationMethod.Percentile,
            extra_options={"CalibPercentile": PERCENTILE},
        )  # fmt: skip
        return onnx.load(small)
