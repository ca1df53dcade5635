"""A network in int8 is written with what it was measured to cost."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from coadvise import export
from coadvise.errors import UserError
from coadvise.training.metrics import read_records

pytest.importorskip("onnxruntime", reason="the extra 'onnx' is not installed")
onnx = pytest.importorskip("onnx", reason="the extra 'onnx' is not installed")
from coadvise.deploy import quantise  # noqa: E402
from coadvise.deploy.onnx_file import in_onnx_runtime  # noqa: E402


def test_ranges_are_taken_from_any_number_of_images(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantise, "BATCH", 10)  # of 24 or 36 training images
    assert export(run, tmp_path / "int8.onnx", int8=True, allow_loss=True)["int8"]["images"] == 12


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


def test_it_is_in_int8_and_has_the_accuracy_that_it_says(run: Path, tiny_images: Path, tmp_path: Path) -> None:
    plain = export(run, tmp_path / "float.onnx")
    small = export(run, tmp_path / "int8.onnx", int8=True, allow_loss=True)
    types = {weight.data_type for weight in onnx.load(tmp_path / "int8.onnx").graph.initializer}
    assert onnx.TensorProto.INT8 in types
    assert types != {weight.data_type for weight in onnx.load(tmp_path / "float.onnx").graph.initializer}
    paths = sorted((tiny_images / "val").rglob("*.png"))
    images = np.stack([np.asarray(Image.open(path)).transpose(2, 0, 1) for path in paths]).astype(np.float32) / 255
    labels = np.repeat(np.arange(3), len(paths) // 3)
    accuracy = {
        name: (in_onnx_runtime((tmp_path / f"{name}.onnx").read_bytes())(images).argmax(1) == labels).mean()
        for name in ("float", "int8")
    }
    assert small["int8"]["top1"] == accuracy["int8"]
    assert small["int8"]["float_top1"] == accuracy["float"]
    assert small["int8"]["images"] == len(paths)
    assert "int8" not in plain
    last = read_records(run)[-1]
    assert (last["kind"], last["int8"], last["top1"]) == ("export", True, accuracy["int8"])


def test_a_loss_of_more_than_a_point_must_be_asked_for(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantise, "quantised", lambda network, batches: network)
    monkeypatch.setattr(quantise, "shares_right", lambda *_: [0.9, 0.8])
    with pytest.raises(UserError, match=r"loses 10\.0 points .* 80\.0% in place of 90\.0% on 12 images"):
        export(run, tmp_path / "student.onnx", int8=True)
    assert not (tmp_path / "student.onnx").exists()
    assert export(run, tmp_path / "student.onnx", int8=True, allow_loss=True)["int8"]["top1"] == 0.8


def test_data_that_moved_are_named(run: Path, tmp_path: Path) -> None:
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(
        "\n".join(f"  source: {tmp_path}/gone" if line.startswith("  source:") else line for line in text.split("\n"))
    )
    (run / "data.json").unlink()
    with pytest.raises(UserError, match="gone"):
        export(run, tmp_path / "student.onnx", int8=True)
    assert not (tmp_path / "student.onnx").exists()
