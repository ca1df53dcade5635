"""docs/PAPER.md names files, commands, studies and networks that exist."""

import re
from pathlib import Path

import timm
import typer

from coadvise.cli import app
from coadvise.config import load_config, preset_names
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
        what = re.match(r"(Table|Figure) \d", study.title)
        assert what
        line = next(line for line in MAP.splitlines() if f"coadvise study {name} " in line)
        assert what[0] in line


def test_networks_and_presets_exist() -> None:
    models = re.findall(r"student\.model=(\w+)|`((?:mixer|resnet|cit)_?\w+)`", PAPER)
    assert len(models) >= 3
    assert all(timm.is_model(one or other) for one, other in models)
    assert "photos" in preset_names()


def test_the_recipe_of_photos_is_as_described() -> None:
    config = load_config("photos")
    recipe = config.student.recipe
    assert (recipe.epochs, recipe.warmup_epochs, recipe.weight_decay, recipe.clip) == (300, 20, 0.05, 15)
    assert (recipe.betas, recipe.min_learning_rate) == ((0.9, 0.999), 5e-6)
    assert recipe.learning_rate == 1e-3 * recipe.batch_size / 512
    assert (config.augment.mixup, config.augment.cutmix, config.augment.erase, config.augment.smoothing) == (
        0.8, 1.0, 0.25, 0.1
    )  # fmt: skip
    assert config.augment.rand_augment == "rand-m9-mstd0.5-inc1"
    assert config.student.model_kwargs == {"drop_path_rate": 0.1}
    assert (config.teachers["conv"].model, config.teachers["inv"].model) == ("resnet26", "rednet26")
    assert config.loss_weights.label == 1
    assert all((advice.weight, advice.temperature) == (1, 1) for advice in config.loss_weights.advice.values())
