"""docs/PAPER.md names files, commands, studies and networks that exist."""

import hashlib
import re
from pathlib import Path

import pytest
import timm
import typer
from timm.data import ImageNetInfo

from coadvise.cli import app
from coadvise.config.reading import load_config, preset_names, preset_text
from coadvise.studies import STUDIES

ROOT = Path(__file__).parents[1]
PAPER = (ROOT / "docs" / "PAPER.md").read_text()
MAP = PAPER.partition("Not there yet:")[0]
CODE = re.findall(r"`([^`]+)`", PAPER)


def test_files_exist() -> None:
    names = [name for name in CODE if re.fullmatch(r"[\w/]+(\.py|\.yaml|/)", name)]
    assert len(names) >= 15
    missing = [name for name in names if not (ROOT / name).exists() and not (ROOT / "src/coadvise" / name).exists()]
    assert missing == []
    for link in re.findall(r"\]\((?!http)([^)#]+)", PAPER):
        assert (ROOT / "docs" / link).is_file()


def test_commands_exist_with_their_options() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    said = [words.split() for words in CODE if words.startswith("coadvise ")]
    assert len(said) >= 8
    for _, name, *arguments in said:
        options = {option for parameter in commands[name].params for option in parameter.opts}
        assert {word for word in arguments if word.startswith("--")} <= options


def test_every_study_is_mapped_by_its_table() -> None:
    assert set(re.findall(r"coadvise study (\w+)", MAP)) == set(STUDIES)
    for name, study in STUDIES.items():
        what = re.match(r"(Table|Figure) \d|The abstract's claim|Beyond the paper", study.title)
        assert what
        line = next(line for line in MAP.splitlines() if f"coadvise study {name} " in line)
        assert what[0].lower() in line.lower()
        assert f"`studies/{name}.py`" in line


def test_all_tables_figures_equations_and_sections_are_mapped() -> None:
    for what in (*(f"Table {n}" for n in range(1, 10)), *(f"Figure {n}" for n in range(1, 5)), "Eq. (1)"):
        assert what in MAP
    for section in ("3.1", "3.2", "4.1", "4.2", "4.3.1", "4.3.2", "4.3.3", "4.3.4", "4.4"):
        assert re.search(rf"^\|[^|]*section {re.escape(section)}\b", MAP, re.M | re.I), section


def test_networks_and_presets_exist() -> None:
    models = re.findall(r"student\.model=(\w+)|`((?:mixer|resnet|cit)_?\w+)`", PAPER)
    assert len(models) >= 3
    assert all(timm.is_model(one or other) for one, other in models)
    assert {"photos", "imagenet1k", "imagenet100"} <= set(preset_names())


TEACHERS = {
    "photos": ("resnet26", "rednet26"),
    "imagenet1k": ("regnety_040.pycls_in1k", "rednet101"),
    "imagenet100": ("resnet18", "rednet26"),
}


@pytest.mark.parametrize("preset", TEACHERS)
def test_the_recipe_of_the_large_presets_is_as_described(preset: str) -> None:
    config = load_config(preset)
    recipe = config.student.recipe
    assert (recipe.epochs, recipe.warmup_epochs, recipe.weight_decay, recipe.clip) == (300, 20, 0.05, 15)
    assert (recipe.betas, recipe.min_learning_rate) == ((0.9, 0.999), 5e-6)
    size, rate, average = (256, 5e-4, 0.9998) if preset == "photos" else (8 * 128, 1e-3, 0)
    assert (recipe.batch_size, recipe.learning_rate, recipe.ema) == (size, rate, average)
    assert (config.augment.mixup, config.augment.cutmix, config.augment.erase, config.augment.smoothing) == (
        0.8, 1.0, 0.25, 0.1
    )  # fmt: skip
    assert config.augment.rand_augment == "rand-m9-mstd0.5-inc1"
    student = "cit_tiny_patch16_224" if preset == "imagenet100" else "cit_small_aligned_patch16_224"
    assert (config.student.model, config.student.model_kwargs) == (student, {"drop_path_rate": 0.1})
    assert (config.teachers["conv"].model, config.teachers["inv"].model) == TEACHERS[preset]
    assert config.loss_weights.label == 1
    assert all((advice.weight, advice.temperature) == (1, 1) for advice in config.loss_weights.advice.values())


def test_imagenet_100_is_the_list_of_contrastive_multiview_coding() -> None:
    classes = load_config("imagenet100").data.classes
    assert len(set(classes)) == 100
    assert set(classes) <= set(ImageNetInfo().label_names())
    listed = re.findall(r"n\d{8}", preset_text("imagenet100"))  # in the order of the published file
    assert (listed[0], listed[-1]) == ("n02869837", "n02090622")
    assert hashlib.sha256("\n".join(listed).encode()).hexdigest()[:16] == "b06db93f7ac2851e"
    assert load_config("imagenet1k").data.classes == ()
