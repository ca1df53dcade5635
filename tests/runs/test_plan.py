"""Options and plans: what the user gives, checked before anything heavy is imported."""

import inspect
from pathlib import Path

import pytest
import torch
from tiny import make_images

import coadvise
from coadvise import fit
from coadvise.config.reading import load_config
from coadvise.errors import UserError
from coadvise.machine import available_cores
from coadvise.runs import plan as plan_module
from coadvise.runs.options import FitOptions
from coadvise.runs.plan import default_preset, faster_preset, plan_fit
from coadvise.studies.runner import run_study


def test_unknown_options_and_counts_below_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'basline', did you mean 'baseline'"):
        fit("digits", basline=True)
    with pytest.raises(UserError, match="'shift', did you mean 'shifts'"):
        run_study("table7", shift=["a"])
    for name, value in (("seeds", 0), ("jobs", 0), ("jobs", "-1"), ("jobs", "many"), ("jobs", 1.5)):
        with pytest.raises(UserError, match=f"{name}={value}; give 1 or more"):
            fit("digits", out=tmp_path / "run", **{name: value})
    assert not (tmp_path / "run").exists()


def test_help_on_fit_lists_its_options() -> None:
    text = inspect.getdoc(coadvise.fit) or ""
    for option in inspect.signature(FitOptions).parameters:
        assert f"{option}: " in text or option in ("data", "preset", "out")


def test_a_plan_names_folder_and_networks(tiny_images: Path, tiny_preset: str) -> None:
    plan = plan_fit(FitOptions.of(data=tiny_images, preset=tiny_preset, seed=3, seeds=2, baseline=True))
    assert plan.folder == Path("runs") / f"{tiny_images.name}-tiny-seed3"
    students = [f"students/{role}-{seed}" for seed in (3, 4) for role in ("advised", "alone")]
    assert [part.name for part in plan.parts] == ["teachers/conv", "teachers/inv", *students]
    assert [part.name for part in plan.students] == students
    assert plan.config.cache is None
    cached = plan_fit(FitOptions.of(data=tiny_images, preset=tiny_preset, cache="c"))
    assert cached.config.cache is not None
    of_preset = plan_fit(FitOptions.of(data=tiny_images, preset=tiny_preset, out="run", overrides=["cache.top_k=5"]))
    assert of_preset.cache == Path("run/cache"), "where 'coadvise cache' puts it"


def test_the_default_preset_follows_images_and_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert default_preset("digits") == "digits"
    assert default_preset(make_images(tmp_path / "small", 1, 1, size=64)) == "small-images"
    large = make_images(tmp_path / "large", 4, 1, size=128)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert default_preset(large) == "photos"
    assert default_preset(large, ["engine.device=cpu"]) == "photos-small"
    assert default_preset(large, ["data=3", "data.workers=0"]) == "photos", "what is wrong with it is said later"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    plan = plan_fit(FitOptions.of(data=large))
    assert (plan.preset, plan.by_default, plan.folder.name) == ("photos-small", True, "large-photos-small-seed0")
    monkeypatch.setattr(plan_module, "MOST_ON_A_CORE", 11 / available_cores())  # there are 12 training images
    assert plan_fit(FitOptions.of(data=large)).preset == "small-images", "too many for the time"
    plan = plan_fit(FitOptions.of(data=large, preset="photos-small"))
    assert (plan.preset, plan.by_default) == ("photos-small", False)


def test_a_faster_preset_is_the_next_one() -> None:
    assert [faster_preset(name) for name in ("photos", "photos-small")] == ["photos-small", "small-images"]
    assert [faster_preset(name) for name in ("small-images", "mine.yaml")] == [None, None]
    assert faster_preset("photos-small-patient") == "photos-small"
    assert faster_preset("small-images-patient") == "small-images"
    assert faster_preset("mine-patient") is None


def test_a_patient_preset_has_the_teachers_of_the_other() -> None:
    patient, plain = (load_config(f"photos-small{end}") for end in (plan_module.PATIENT, ""))
    assert patient.teachers == plain.teachers
    assert patient.student.recipe.epochs > plain.student.recipe.epochs
    assert patient.cache is not None
    assert patient.augment.recycle
