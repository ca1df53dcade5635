"""Teachers that start elsewhere learn the data's classes, by fine-tuning or by a probe."""

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from tiny import make_images, records

from coadvise import fit
from coadvise.config.schema import FinetuneConfig, RecipeConfig, TeacherConfig
from coadvise.errors import UserError
from coadvise.models import TokenModel
from coadvise.models.network import load_network
from coadvise.runs.evaluate import evaluate_run


def test_two_teachers_of_another_run_learn_other_classes(finished: Path, tiny_preset: str, tmp_path: Path) -> None:
    data = make_images(tmp_path / "data", classes=("red", "violet"))
    overrides = [
        f"teachers.conv.start={finished}", "teachers.conv.adapt=finetune", "teachers.conv.finetune.epochs=2",
        "teachers.conv.finetune.batch_size=8", f"teachers.inv.start={finished}/teachers/inv",
        "teachers.inv.adapt=probe",
        "student.recipe.epochs=1",
    ]  # fmt: skip
    run = fit(data, tiny_preset, tmp_path / "run", overrides=overrides)
    conv, inv = (load_network(run / "teachers" / name) for name in ("conv", "inv"))
    old = {name: load_network(finished / "teachers" / name).model.state_dict() for name in ("conv", "inv")}
    assert conv.classes == inv.classes == ("red", "violet")
    probed = inv.model.state_dict()
    changed = {key for key, value in probed.items() if not torch.equal(value, old["inv"][key])}
    assert changed == {key for key, value in probed.items() if value.shape != old["inv"][key].shape}
    assert not any(
        torch.equal(value, old["conv"][key]) for key, value in conv.model.state_dict().items() if "conv" in key
    )
    assert [record["part"] for record in records(run, "probe")] == ["teachers/inv"]
    assert {record["epoch"] for record in records(run, "train") if record["part"] == "teachers/conv"} == {1, 2}
    names = [row["name"] for row in records(run, "verdict")[-1]["rows"]]
    assert names[:2] == ["conv teacher (fine-tuned)", "involution teacher (linear probe)"]
    assert fit(data, tiny_preset, tmp_path / "run", overrides=overrides) == run  # it is done already


@pytest.mark.parametrize("kind", ["file", "run"])
def test_a_baseline_of_a_started_student_has_a_probe_of_the_start(
    kind: str, finished: Path, tiny_images: Path, tiny_preset: str, tmp_path: Path
) -> None:
    overrides = ["student.recipe.epochs=1", "teachers.conv.recipe.epochs=1", "teachers.inv.recipe.epochs=1"]
    if kind == "file":
        size = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 3}
        model = timm.create_model("vit_tiny_patch16_224", num_classes=5, **size)
        save_file(model.state_dict(), tmp_path / "vit.safetensors")
        arguments = {key: value for key, value in size.items() if key != "img_size"}
        overrides += [
            "student.model=vit_tiny_patch16_224", f"student.start={tmp_path / 'vit.safetensors'}",
            f"student.model_kwargs={json.dumps(arguments)}",
        ]  # fmt: skip
    else:
        overrides.append(f"student.start={finished}")
    run = fit(tiny_images, tiny_preset, tmp_path / "run", overrides=overrides, baseline=True)
    network = load_network(run / "students" / "start-0")
    assert isinstance(network.model, TokenModel)
    if kind == "file":  # its body is as it was, with no token but its own
        body = {key.removeprefix("vit."): value for key, value in network.model.state_dict().items()}
        assert body.keys() == model.state_dict().keys()
        kept = {key: value for key, value in model.state_dict().items() if not key.startswith("head.")}
        assert all(torch.equal(body[key], value) for key, value in kept.items())
    (record,) = records(run, "probe")
    assert record["part"] == "students/start-0"
    rows = {row["part"]: row for row in records(run, "verdict")[-1]["rows"]}
    assert rows["students/start-0"]["name"] == "linear probe of the student's start"
    scored = evaluate_run(run)["parts"]["students/start-0"]["class"]["top1"]
    assert rows["students/start-0"]["top1"] == pytest.approx(scored)
    assert "linear probe of the student" in (run / "report.html").read_text()
    assert fit(tiny_images, tiny_preset, tmp_path / "run", overrides=overrides, baseline=True) == run  # done already


def test_a_start_s_way_of_making_pixels_is_not_taken_over(
    finished: Path, tiny_images: Path, tiny_preset: str, tmp_path: Path
) -> None:
    for name in ("conv", "inv"):
        network = load_network(finished / "teachers" / name)
        network.about |= {"fit": "pad", "value_range": [0.0, 4095.0], "temperatures": {"class": 2.0}}
        network.save(tmp_path / name)
    data = make_images(tmp_path / "data", classes=("red", "violet"))
    adapted = [f"teachers.{name}.start={tmp_path / name}" for name in ("conv", "inv")]
    adapted += ["teachers.conv.adapt=probe", "teachers.inv.adapt=finetune", "teachers.inv.finetune.epochs=1"]
    overrides = [*adapted, "teachers.inv.finetune.batch_size=8", "student.recipe.epochs=1"]
    as_it_is = [f"teachers.conv.start={tmp_path / 'conv'}", "teachers.inv.recipe.epochs=1", "student.recipe.epochs=1"]
    for images, given in ((data, overrides), (tiny_images, as_it_is)):
        run = fit(images, tiny_preset, tmp_path / f"run-{images.name}", overrides=given)
        for name in ("conv", "inv"):
            about = load_network(run / "teachers" / name).about
            assert not {"fit", "value_range", "temperatures"} & about.keys()


def test_what_cannot_be_adapted_is_refused_and_nothing_is_written(
    finished: Path, tiny_images: Path, tiny_preset: str, tmp_path: Path
) -> None:
    for overrides, message in (
        ([f"teachers.conv.start={finished}", "teachers.conv.adapt=probe"], "has the data's classes already; leave out"),
        (["teachers.conv.adapt=probe"], "adapt=probe needs a start"),
        ([f"teachers.third.start={finished}", "teachers.third.model=resnet18"], "no trained teacher 'third'; give one"),
        (["teachers.conv.start=resnet1888"], "unknown model 'resnet1888', did you mean"),
        (["teachers.conv.pretrained=true"], "unknown key 'teachers.conv.pretrained'"),
    ):
        with pytest.raises(UserError, match=message):
            fit(tiny_images, tiny_preset, tmp_path / "run", overrides=overrides)
    assert not (tmp_path / "run").exists()


def test_fine_tuning_takes_as_many_epochs_as_the_images_ask_for() -> None:
    recipe = RecipeConfig(epochs=300, weight_decay=0.3)
    for images, epochs in ((100, 30), (1_500, 10), (2_500, 6), (100_000, 5)):
        tuned = FinetuneConfig().recipe(recipe, images)
        assert (tuned.epochs, tuned.weight_decay, tuned.head_epochs) == (epochs, 0.3, 1)
    assert FinetuneConfig(epochs=1).recipe(recipe, 100).head_epochs == 0


def test_what_a_start_means_follows_from_its_form() -> None:
    kinds = {
        "resnet18.a1_in1k": "finetune", "hf-hub:some/one": "finetune", "weights.pth": "finetune", "runs/first": "none",
        "runs/first/teachers/conv": "none",
    }  # fmt: skip
    found = {start: TeacherConfig.model_validate({"model": start, "start": start}).adaptation for start in kinds}
    assert found == kinds
    assert TeacherConfig(model="resnet18").adaptation == "train"
