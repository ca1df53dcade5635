"""An exported file gives the student's probabilities, in a process without coadvise."""

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor

from coadvise import export
from coadvise.deploy import export as portable
from coadvise.deploy.predict import load
from coadvise.errors import StorageError, UserError

onnxruntime = pytest.importorskip("onnxruntime", reason="the extra 'onnx' is not installed")
onnx = pytest.importorskip("onnx", reason="the extra 'onnx' is not installed")

WITHOUT_COADVISE = """
import sys
sys.modules["coadvise"] = sys.modules["timm"] = None  # cannot be imported
import json, torch
extra = {"coadvise": ""}
program = torch.export.load(sys.argv[1], extra_files=extra).module()
with torch.no_grad():
    print(json.dumps([program(torch.load(sys.argv[2])).tolist(), json.loads(extra["coadvise"])]))
"""


@pytest.fixture(scope="module")
def pixels(tiny_images: Path) -> Tensor:
    """Real validation images [B, 3, 16, 16] in 0..1."""
    paths = sorted((tiny_images / "val").rglob("*.png"))
    return (
        torch.from_numpy(np.stack([np.asarray(Image.open(p).convert("RGB")) for p in paths])).permute(0, 3, 1, 2) / 255
    )


def wanted(run: Path, pixels: Tensor, answer: str = "class", part: str | None = None) -> np.ndarray:
    found = load(run, part).predict(list(pixels), answer)
    return np.array([list(prediction.probabilities.values()) for prediction in found])


def by_onnx(path: Path, pixels: Tensor) -> np.ndarray:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(["probabilities"], {"images": pixels.numpy()})[0]


def test_pt2_answers_in_a_process_without_coadvise(finished: Path, pixels: Tensor, tmp_path: Path) -> None:
    about = export(finished, tmp_path / "student.pt2")
    torch.save(pixels.contiguous(), tmp_path / "images.pt")
    command = [sys.executable, "-c", WITHOUT_COADVISE, tmp_path / "student.pt2", tmp_path / "images.pt"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    answers, metadata = json.loads(said.splitlines()[-1])
    np.testing.assert_allclose(answers, wanted(finished, pixels), atol=1e-5)
    assert metadata["classes"] == ["blue", "green", "red"]
    assert metadata == {key: about[key] for key in metadata}


@pytest.mark.parametrize("answer", ["class", "average"])
def test_onnx_has_plain_operators_and_the_students_answer(
    answer: str, finished: Path, pixels: Tensor, tmp_path: Path
) -> None:
    file = tmp_path / "student.onnx"
    about = export(finished, file, answer=answer)
    assert about["difference"] < 1e-5
    model = onnx.load(file)
    onnx.checker.check_model(model, full_check=True)
    assert {node.domain for node in model.graph.node} == {""}
    assert not model.functions
    metadata = json.loads({entry.key: entry.value for entry in model.metadata_props}["coadvise"])
    assert metadata["answer"] == answer
    assert metadata["image_size"] == 16
    for batch in (1, len(pixels)):
        np.testing.assert_allclose(by_onnx(file, pixels[:batch]), wanted(finished, pixels, answer)[:batch], atol=1e-5)


def test_the_last_block_has_no_product_over_all_tokens() -> None:
    student = timm.create_model("cit_micro_aligned_patch4_32", depth=3, embed_dim=24, num_classes=5).for_inference()
    images, tokens = torch.randn(2, 3, 32, 32), 1 + 2 + 64

    model = onnx.shape_inference.infer_shapes(onnx.load_from_string(portable.to_onnx(student, images, {})))
    shapes = {value.name: value.type.tensor_type.shape.dim for value in (*model.graph.value_info, *model.graph.output)}
    products = [shapes[node.output[0]] for node in model.graph.node if node.op_type in ("MatMul", "Gemm")]
    # In each of the other two: queries, keys and values at once, scores, their sum, projection, the MLP's two layers.
    assert sum(shape[-2].dim_value == tokens for shape in products) == 2 * 6

    graph = torch.export.load(io.BytesIO(portable.to_pt2(student, images, {}))).graph
    kinds = ("linear", "matmul", "scaled_dot_product_attention")
    nodes = [node for node in graph.nodes if any(kind in str(node.target) for kind in kinds)]
    # The fused attention is one.
    assert sum(node.meta["val"].shape[-2] == tokens for node in nodes if node.op == "call_function") == 2 * 5


@pytest.mark.parametrize(("part", "ending"), [("students/alone-0", "pt2"), ("teachers/inv", "onnx")])
def test_any_network_of_a_run(part: str, ending: str, finished: Path, pixels: Tensor, tmp_path: Path) -> None:
    file = tmp_path / f"network.{ending}"
    about = export(finished, file, part)
    assert about["part"] == part
    if ending == "onnx":
        found = by_onnx(file, pixels)
    else:
        with torch.no_grad():
            found = torch.export.load(file).module()(pixels).numpy()
    np.testing.assert_allclose(found, wanted(finished, pixels, part=part), atol=1e-5)
    assert list(tmp_path.iterdir()) == [file]


def test_what_cannot_be_exported_is_refused(finished: Path, tmp_path: Path) -> None:
    for out, about, said in (
        (tmp_path / "student.tflite", {}, r"\.tflite' must end in \.onnx or \.pt2"),
        (tmp_path / "none" / "student.onnx", {}, "/none' is not a folder"),
        (
            tmp_path / "student.pt2",
            {"answer": "conf"},
            "no answer 'conf'; this network has class, conv, inv and average",
        ),
        (
            tmp_path / "student.pt2",
            {"part": "students/advised-7"},
            "it has teachers/conv, teachers/inv, students/advised-0",
        ),
    ):
        with pytest.raises(UserError, match=said):
            export(finished, out, **about)
    with pytest.raises(UserError, match="is no run directory"):
        export(tmp_path, tmp_path / "student.pt2")
    assert not list(tmp_path.iterdir())


def test_without_the_packages_it_says_what_to_install(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = portable.find_spec
    monkeypatch.setattr(portable, "find_spec", lambda name: None if name == "onnxscript" else there(name))
    with pytest.raises(UserError, match=r"needs 'pip install onnxscript'; a file ending in \.pt2 needs"):
        export(finished, tmp_path / "student.onnx")
    monkeypatch.setattr(portable, "find_spec", lambda name: None if name == "onnxruntime" else there(name))
    assert export(finished, tmp_path / "student.onnx")["difference"] is None


def test_a_file_that_answers_otherwise_is_not_written(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "student.pt2").write_text("an earlier one")
    for wrong in (1e-3, float("nan")):
        monkeypatch.setattr(
            portable, "_run_pt2", lambda content, images, wrong=wrong: torch.full((4, 3), 1 / 3) + wrong
        )
        with pytest.raises(RuntimeError, match="nothing is written"):
            export(finished, tmp_path / "student.pt2")
    assert (tmp_path / "student.pt2").read_text() == "an earlier one"


def test_a_full_disk_leaves_nothing(finished: Path, small_disk, tmp_path: Path) -> None:
    disk = small_disk(4096)
    with pytest.raises(StorageError, match="cannot write"):
        export(finished, disk / "student.pt2")
    assert not list(disk.iterdir())
