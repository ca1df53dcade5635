"""The reference of the site is complete: every public name, every command's options, every key."""

import typer.main
from docs.reference_pages import PYTHON, commands, configuration

import coadvise
from coadvise.cli import app
from coadvise.config import schema


def test_every_public_name_is_on_the_page_of_python() -> None:
    named = [name for kinds in PYTHON.values() for names in kinds.values() for name in names]
    assert len(named) == len(set(named))
    assert set(coadvise.__all__) <= set(named)


def test_every_option_is_on_the_page_of_commands() -> None:
    page = "\n".join(commands())
    program = typer.main.get_command(app)
    for name, command in program.commands.items():  # type: ignore[attr-defined]
        section = page.partition(f"\n## {name}\n")[2].partition("\n## ")[0]
        flags = [flag for parameter in command.params for flag in parameter.opts if flag.startswith("--")]
        assert section
        assert all(f"```{{option}} {flag}" in section for flag in flags if flag != "--help")


SECTIONS = {
    "data": schema.DataConfig,
    "augment": schema.AugmentConfig,
    "teachers.NAME": schema.TeacherConfig,
    "teachers.NAME.finetune": schema.FinetuneConfig,
    "student": schema.StudentConfig,
    "recipe": schema.RecipeConfig,
    "cache": schema.CacheConfig,
    "engine": schema.EngineConfig,
}


def test_every_key_of_a_run_is_on_the_page_of_the_configuration() -> None:
    page = "\n".join(configuration())
    keys = {f"{path}.{key}": field for path, section in SECTIONS.items() for key, field in section.model_fields.items()}
    sections = {"teachers.NAME.recipe", "teachers.NAME.finetune", "student.recipe"}
    for key, field in keys.items():
        shown = page.partition(f"```{{confval}} {key}\n:type: ")[2]
        assert key in sections or field.description in shown.partition("```")[0], key
