"""An exported file gives the student's probabilities, in a process without coadvise."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

from coadvise import export
from coadvise.cli import app
from coadvise.deploy import export as portable
from coadvise.deploy import onnx_file
from coadvise.deploy.publish import load
from coadvise.errors import StorageError, UserError
from coadvise.storage import describe_model
from coadvise.training.metrics import Recorder, last_of, read_records

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
def run(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose record may be added to."""
    return shutil.copytree(finished, tmp_path_factory.mktemp("exported") / "run")


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


def test_pt2_answers_in_a_process_without_coadvise(run: Path, pixels: Tensor, tmp_path: Path) -> None:
    about = export(run, tmp_path / "student.pt2")
    torch.save(pixels.contiguous(), tmp_path / "images.pt")
    command = [sys.executable, "-c", WITHOUT_COADVISE, tmp_path / "student.pt2", tmp_path / "images.pt"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    answers, metadata = json.loads(said.splitlines()[-1])
    np.testing.assert_allclose(answers, wanted(run, pixels), atol=1e-5)
    assert metadata["classes"] == ["blue", "green", "red"]
    assert metadata == {key: about[key] for key in metadata}


@pytest.mark.parametrize("part", ["students/advised-0", "teachers/inv"])
def test_onnx_has_plain_operators_and_the_networks_answer(part: str, run: Path, pixels: Tensor, tmp_path: Path) -> None:
    file = tmp_path / "network.onnx"
    about = export(run, file, part)
    assert about["difference"] < 1e-5
    model = onnx.load(file)
    onnx.checker.check_model(model, full_check=True)
    assert {node.domain for node in model.graph.node} == {""}
    assert not model.functions
    metadata = json.loads({entry.key: entry.value for entry in model.metadata_props}["coadvise"])
    assert (metadata["part"], metadata["image_size"]) == (part, 16)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for images in (pixels[:1], pixels):
        (found,) = session.run(["probabilities"], {"images": images.numpy()})
        np.testing.assert_allclose(found, wanted(run, images, part=part), atol=1e-5)


def test_the_last_block_has_no_product_over_all_tokens(run: Path, tmp_path: Path) -> None:
    export(run, tmp_path / "student.pt2")
    graph = torch.export.load(tmp_path / "student.pt2").graph
    kinds = ("linear", "matmul", "scaled_dot_product_attention")
    products = [node.meta["val"].shape for node in graph.nodes if any(kind in str(node.target) for kind in kinds)]
    assert products
    assert all(1 + 2 + 16 not in shape[:-1] for shape in products), "the student has one block, and 16 patches"


@pytest.mark.parametrize(("part", "answer"), [("students/alone-0", "class"), ("students/advised-0", "average")])
def test_any_network_and_answer(part: str, answer: str, run: Path, pixels: Tensor, tmp_path: Path) -> None:
    file = tmp_path / "network.pt2"
    about = export(run, file, part, answer)
    assert (about["part"], about["answer"]) == (part, answer)
    with torch.no_grad():
        found = torch.export.load(file).module()(pixels).numpy()
    np.testing.assert_allclose(found, wanted(run, pixels, answer, part), atol=1e-5)
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(("answer", "ending"), [("class", "onnx"), ("average", "pt2")])
def test_a_calibrated_network_s_temperature_is_in_the_file(
    answer: str, ending: str, run: Path, pixels: Tensor, tmp_path: Path
) -> None:
    plain_run, file = run, tmp_path / f"network.{ending}"
    run = shutil.copytree(plain_run, tmp_path / "run")
    about = load(run).network.about | {"temperatures": {"class": 0.4, "average": 2.5}}
    describe_model(run / "students" / "advised-0", about)
    plain = torch.tensor(wanted(plain_run, pixels, answer)).log() / about["temperatures"][answer]
    np.testing.assert_allclose(wanted(run, pixels, answer), plain.softmax(-1), atol=1e-6)
    said = CliRunner().invoke(app, ["export", str(run), "--out", str(file), "--answer", answer], catch_exceptions=False)
    assert f" / {about['temperatures'][answer]} before the softmax" in said.stdout
    if ending == "onnx":
        metadata = {entry.key: entry.value for entry in onnx.load(file).metadata_props}
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        (found,) = session.run(["probabilities"], {"images": pixels.numpy()})
    else:
        metadata = {"coadvise": ""}
        with torch.no_grad():
            found = torch.export.load(file, extra_files=metadata).module()(pixels).numpy()
    assert json.loads(metadata["coadvise"])["temperature"] == about["temperatures"][answer]
    np.testing.assert_allclose(found, wanted(run, pixels, answer), atol=1e-5)


def test_what_cannot_be_exported_is_refused(run: Path, tmp_path: Path) -> None:
    for out, part, answer, said in (
        ("student.tflite", None, "class", r"\.tflite'"),
        ("none/student.onnx", None, "class", "/none' is not a folder"),
        ("student.pt2", None, "conf", "no answer 'conf'"),
        ("student.pt2", "students/advised-7", "class", "'students/advised-7'"),
    ):
        with pytest.raises(UserError, match=said):
            export(run, tmp_path / out, part, answer)
    for options, said in (
        ({"preprocess": True}, "--preprocess is for files ending in .onnx"),
        ({"int8": True}, "--int8 is for files ending in .onnx"),
        ({"allow_loss": True}, "give --int8 too"),
    ):
        with pytest.raises(UserError, match=said):
            export(run, tmp_path / "student.pt2", **options)
    with pytest.raises(UserError, match="is no run directory"):
        export(tmp_path, tmp_path / "student.pt2")
    assert not list(tmp_path.iterdir())


def test_without_the_packages_it_says_what_to_install(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = onnx_file.find_spec
    monkeypatch.setattr(onnx_file, "find_spec", lambda name: None if name == "onnxscript" else there(name))
    with pytest.raises(UserError, match=r"onnxscript: pip install 'coadvise\[onnx\]'"):
        export(run, tmp_path / "student.onnx")
    monkeypatch.setattr(onnx_file, "find_spec", lambda name: None if name == "onnxruntime" else there(name))
    with pytest.raises(UserError, match="needs onnxruntime"):
        export(run, tmp_path / "student.onnx", int8=True)
    before = read_records(run)
    about = export(run, tmp_path / "student.onnx", preprocess=True)
    assert about["difference"] is None
    assert "images_per_second" not in about
    assert read_records(run) == before


def test_the_record_and_the_report_show_what_was_exported(finished: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    pictures = (run / "report.html").read_text().count("data:image")
    (run / "report.html").unlink()
    for part in ("students/advised-0", "teachers/conv"):
        export(run, tmp_path / "network.onnx", part)
    *_, student, teacher = read_records(run)
    assert [r["kind"] for r in (student, teacher)] == ["export"] * 2
    for record in (student, teacher):
        result = last_of(read_records(run), "result", record["part"])
        assert result is not None
        assert record["top1"] == result["top1"]["class"]
        assert record["images_per_second"] > 0
    page = (run / "report.html").read_text()
    assert page.count('class="mark"') == 2
    assert page.count("data:image") == pictures > 0, "its pictures are there as before"


def test_an_export_of_a_run_that_cannot_be_written_is_there_nonetheless(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise StorageError("the disk is full")

    monkeypatch.setattr(Recorder, "add", full)
    said: list[str] = []
    export(run, tmp_path / "student.onnx", say=said.append)
    assert (tmp_path / "student.onnx").exists()
    assert len(said) == 1
    assert "the disk is full" in said[0]


def test_a_file_that_answers_otherwise_is_not_written(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "student.pt2").write_text("an earlier one")
    for wrong in (1e-3, float("nan")):
        monkeypatch.setattr(
            portable, "_run_pt2", lambda content, images, wrong=wrong: torch.full((4, 3), 1 / 3) + wrong
        )
        with pytest.raises(RuntimeError, match="nothing is written"):
            export(run, tmp_path / "student.pt2")
    assert (tmp_path / "student.pt2").read_text() == "an earlier one"
