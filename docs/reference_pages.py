"""The reference, made when the site is built: commands of the parser, keys of the schema, Python's public names."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer.main

from coadvise.cli import app
from coadvise.config.reading import preset_names, preset_text
from coadvise.config.schema import RunConfig
from coadvise.storage import write_text

PYTHON = {  # heading -> kind of object -> names in `coadvise`; every public name is under one of them
    "Train and compare": {
        "function": ["fit", "check", "compare", "build_cache", "load_config"],
        "class": ["RunConfig"],
    },
    "Use a trained network": {
        "function": ["load", "export", "push", "load_published"],
        "class": ["TrainedStudent", "Prediction", "models.attention.AttentionMaps"],
    },
    "The loss alone": {"function": ["co_advise_loss"], "class": ["LossWeights", "Advice"]},
    "Involution": {"function": ["ops.involution2d"], "class": ["ops.Involution2d"]},
    "Networks": {
        "function": ["models.describe_models"],
        "class": [f"models.{name}" for name in ("TokenModel", "Student", "AlignedPatchEmbed", "RedNet")],
    },
    "Data": {"function": ["data.sources.open_source"], "class": ["data.sources.Source", "data.sources.Split"]},
    "Errors": {"exception": ["UserError", "Interrupted", "StorageError", "LostProcessError"]},
}
WITHOUT_MEMBERS = {"RunConfig"}  # whose fields are on the page of the configuration


def write(folder: Path) -> None:
    """Write all pages of the reference."""
    folder.mkdir(exist_ok=True)
    pages = {"COMMANDS.md": commands(), "CONFIGURATION.md": configuration(), "PYTHON.rst": python()}
    for name, lines in pages.items():
        write_text(folder / name, "\n".join(lines) + "\n")


def commands() -> Iterator[str]:
    """Every command with its arguments and options, as its `--help` has them."""
    yield "# Commands"
    yield "\n`coadvise COMMAND --help` prints the same. [Exit codes](../RELIABILITY.md#exit-codes)."
    program: Any = typer.main.get_command(app)
    top = program.make_context("coadvise", [], resilient_parsing=True)
    for name in program.list_commands(top):
        command = program.get_command(top, name)
        context = command.make_context(name, [], parent=top, resilient_parsing=True)
        yield f"\n## {name}\n\n{_escaped(command.help)}\n"
        yield f"```text\n{command.get_usage(context).removeprefix('Usage: ')}\n```\n"
        yield from _directive("program", f"coadvise {name}")
        for parameter in command.get_params(context):
            if parameter.name != "help" and (record := parameter.get_help_record(context)):
                yield from _directive("option", record[0], _escaped(record[1]))


def configuration() -> Iterator[str]:
    """Every key of the configuration with its type, default and meaning, a section each."""
    yield "# Configuration"
    yield "\nA run's `config.yaml` has every key. A key is changed as `a.b=c` behind `coadvise fit DATA`, and NAME is a"
    yield "teacher's name. Defaults are the schema's; [presets](#presets) have values of their own."
    schema = RunConfig.model_json_schema()
    for name, paths in _sections(schema).items():
        section = schema["$defs"].get(name, schema)
        yield f"\n## {' and '.join(f'`{path}`' for path in paths) or 'Top level'}\n\n{section['description']}\n"
        for key, field in section["properties"].items():
            if "description" in field or not _section_of(field):
                path = ".".join(filter(None, (_common_end(paths), key)))
                yield from _directive("confval", path, field["description"], type=_type(field), default=_default(field))
    yield "\n## Presets\n"
    for name in preset_names():
        yield f"\n### {name}\n\n```yaml\n{preset_text(name).rstrip()}\n```"


def python() -> Iterator[str]:
    """Every public name with its signature and docstring."""
    yield "Python\n======\n"
    yield "``import coadvise`` is light: each of its names is loaded on first use."
    for heading, kinds in PYTHON.items():
        yield f"\n{heading}\n{'-' * len(heading)}\n"
        for kind, names in kinds.items():
            for name in names:
                members = "\n   :members:" if kind == "class" and name not in WITHOUT_MEMBERS else ""
                yield f".. auto{kind}:: coadvise.{name}{members}\n"


def _directive(name: str, argument: str, text: str = "", **options: str) -> Iterator[str]:
    """A directive of Sphinx in MyST."""
    yield f"```{{{name}}} {argument}"
    yield from (f":{key}: {value}" for key, value in options.items() if value)
    yield f"\n{text}\n```\n" if text else "```\n"


def _escaped(text: str) -> str:
    """Text that Markdown shows as it is."""
    return re.sub(r"([\\`*_{}\[\]<>#])", r"\\\1", text)


def _sections(schema: dict[str, Any]) -> dict[str, list[str]]:
    """The paths at which each section of the schema stands, in the order of the file."""
    found: dict[str, list[str]] = {"": []}

    def visit(section: dict[str, Any], path: str) -> None:
        for key, field in section["properties"].items():
            if name := _section_of(field):
                below = f"{path}{key}{'.NAME' if 'additionalProperties' in field else ''}"
                found.setdefault(name, []).append(below)
                visit(schema["$defs"][name], f"{below}.")

    visit(schema, "")
    return found


def _section_of(field: dict[str, Any]) -> str:
    """The section that a field holds, in itself, by name, or where it is not null; else nothing."""
    inside = [field, field.get("additionalProperties"), *field.get("anyOf", ())]
    names = [one["$ref"].rpartition("/")[2] for one in inside if isinstance(one, dict) and "$ref" in one]
    return names[0] if names and names[0] != "JsonValue" else ""


def _common_end(paths: list[str]) -> str:
    """The last keys that all paths share."""
    shared: list[str] = []
    for keys in zip(*(reversed(path.split(".")) for path in paths), strict=False):
        if len(set(keys)) > 1:
            break
        shared.insert(0, keys[0])
    return ".".join(shared)


def _type(field: dict[str, Any]) -> str:
    """A field's type and bounds in words."""
    if field.get("$ref", "").endswith("Config"):
        return "section"
    if "anyOf" in field:
        return ", or ".join(_type(one) for one in field["anyOf"])
    if "const" in field or "enum" in field:
        return " or ".join(json.dumps(value).strip('"') for value in field.get("enum", [field.get("const")]))
    if "prefixItems" in field:
        return f"[{', '.join(_type(one) for one in field['prefixItems'])}]"
    kind = field.get("type", "")
    if kind == "array":
        return f"list of {_several(field['items'])}"
    if kind == "object":
        return f"mapping to {_several(field['additionalProperties'])}"
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = ", ".join(f"{sign} {field[key]}" for key, sign in signs.items() if key in field)
    return f"{kind} {bounds}".strip()


def _several(field: dict[str, Any]) -> str:
    """A type in the plural."""
    return re.sub(r"^(string|number|list)\b", r"\1s", _type(field)) or "anything"


def _default(field: dict[str, Any]) -> str:
    if "default" not in field:
        return "none, it has to be given"
    return f"`{json.dumps(field['default'])}`"
