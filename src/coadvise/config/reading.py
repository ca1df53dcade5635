"""Reads a configuration: a preset or a YAML file plus `a.b=c` overrides. Says what is wrong with it, or differs."""

import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from importlib import resources
from itertools import count
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from coadvise.advice import CLASS
from coadvise.config.schema import AugmentConfig, CacheConfig, RunConfig, StudentConfig, TeacherConfig, names_model
from coadvise.errors import UserError

MOST_YAML = 2**17  # bytes of a configuration, and values in it after its aliases are expanded


def preset_names() -> list[str]:
    """The names that `load_config` accepts."""
    return sorted(p.name.removesuffix(".yaml") for p in _presets().iterdir() if p.name.endswith(".yaml"))


def preset_text(name: str) -> str:
    """The YAML of a preset or a preset file, with its header."""
    try:
        return (_presets() / f"{name}.yaml" if name in preset_names() else Path(name)).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"'{name}' is not UTF-8; save it so") from None


def load_config(
    preset: str, overrides: Sequence[str] = (), seed: int | None = None, source: str | None = None
) -> RunConfig:
    """Reads a preset by name or a YAML file, applies `a.b=c` overrides, checks everything.

    Raises:
        UserError: all faults at once: what was given, what is allowed, and the nearest name.
    """
    if preset in preset_names():
        path = _presets() / f"{preset}.yaml"
    elif not preset.endswith((".yaml", ".yml")):
        raise UserError(
            f"unknown preset '{preset}'{nearest(preset, preset_names())}; "
            f"there are {', '.join(preset_names())}, or give a file ending in .yaml"
        )
    elif not Path(preset).is_file():
        raise UserError(
            f"no preset file '{preset}'; give a YAML file, or one of the presets {', '.join(preset_names())}"
        )
    else:
        path = Path(preset)
    values = _read_yaml(path, f"preset '{preset}'")
    first = (".model=", ".start=")
    for override in sorted(overrides, key=lambda text: not any(key in text for key in first)):  # before arguments
        _apply(values, override)
    if seed is not None:
        values["seed"] = seed
    if source is not None:
        _set(values, "data.source", source)
    config = parse_config(values)
    _check_intended(config)
    return config


def parse_arguments(overrides: Sequence[str]) -> dict[str, Any]:
    """Turns `a=1`, `b.c=[2]` into a nested dict; values are YAML. Raises UserError."""
    values: dict[str, Any] = {}
    for override in overrides:
        _apply(values, override)
    return values


def _check_intended(config: RunConfig) -> None:
    """Raises UserError for what is surely a mistake. Not checked when a finished run is read."""
    if not config.loss_weights.trains_class:
        raise UserError(
            "student.weight=0 and no teacher advises the class token, so nothing would train it; give student.weight a "
            "value above 0, or let a teacher advise it: teachers.NAME.token=[NAME, class]"
        )
    known = (*config.teachers, CLASS)
    for token, teachers in config.loss_weights.by_token.items():
        if token not in known and len(teachers) == 1 and (meant := nearest(token, known)):
            raise UserError(
                f"unknown token '{token}' of teachers.{teachers[0]}.token{meant}; give a new token a name less like "
                f"{', '.join(known)}, or let two teachers advise it"
            )
    for token in config.student.label_tokens:
        if token not in (CLASS, *config.loss_weights.by_token) and (meant := nearest(token, known)):
            raise UserError(f"unknown token '{token}' of student.label_tokens{meant}")
    networks: dict[str, StudentConfig | TeacherConfig] = {"student": config.student}
    networks |= {f"teachers.{name}": given for name, given in config.teachers.items()}
    for part, network in networks.items():
        if "img_size" in network.model_kwargs:
            raise UserError(
                f"{part}.model_kwargs.img_size={network.model_kwargs['img_size']}: all networks get images of the "
                "same size; set data.image_size"
            )
        if network.recipe.epochs <= network.recipe.head_epochs:
            raise UserError(
                f"{part}.recipe.head_epochs={network.recipe.head_epochs} leaves none of the {network.recipe.epochs} "
                f"epochs for the rest of the network; give fewer, or more {part}.recipe.epochs"
            )
    if config.data.class_weights != "auto" and config.data.balance == "none":
        raise UserError("data.class_weights has no effect with data.balance=none; give data.balance=loss too")
    if config.data.views == "device" and config.in_memory:
        raise UserError("data.views=device is of augment.kind=deit, and no views here are of that kind; leave it out")
    if len({*config.engine.trackers}) < len(config.engine.trackers):
        raise UserError(f"engine.trackers={', '.join(config.engine.trackers)} names one twice; give each once")


def read_config(path: Path) -> RunConfig:
    """Reads the configuration of a run. Raises UserError as `load_config`. Nothing in the file is executed."""
    return parse_config(_read_yaml(path, f"'{path}'"))


def parse_config(values: Mapping[str, Any]) -> RunConfig:
    """Checks a nested dict. Raises UserError with all faults at once."""
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise UserError("; ".join(_faults(error))) from None


def with_changes(config: RunConfig, changes: Mapping[str, Any]) -> RunConfig:
    """A copy with other values at dotted keys. Raises UserError as `parse_config`."""
    values = config.model_dump(mode="json")
    for path, value in changes.items():
        _set(values, path, value)
    return parse_config(values)


def with_cache(config: RunConfig) -> RunConfig:
    """The same, advised by stored logits. Raises UserError if its views cannot be stored."""
    return with_changes(config, {"cache": (config.cache or CacheConfig()).model_dump()})


def differences(old: RunConfig, new: RunConfig) -> list[str]:
    """One line `a.b: old -> new` for every key that differs."""
    return changes(old.model_dump(mode="json"), new.model_dump(mode="json"))


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """One line `a.b: old -> new` for every value that differs between two nested dicts."""
    before, after = dict(_leaves(old)), dict(_leaves(new))
    keys = sorted(before.keys() | after.keys())
    return [f"{k}: {before.get(k)} -> {after.get(k)}" for k in keys if before.get(k) != after.get(k)]


def nearest(given: str, allowed: Sequence[str]) -> str:
    """`, did you mean 'x'?` or nothing."""
    close = difflib.get_close_matches(given, allowed, n=1, cutoff=0.6)
    return f", did you mean '{close[0]}'?" if close else ""


def _presets() -> Any:
    return resources.files("coadvise") / "presets"


def _read_yaml(path: Any, what: str) -> dict[str, Any]:
    """Reads a YAML file from any source: plain data only; tags that would build other objects are refused."""
    try:
        content = path.read_bytes()
        if len(content) > MOST_YAML:
            raise UserError(f"{what} has {len(content)} bytes; a configuration has at most {MOST_YAML}")
        values = _unshared(yaml.safe_load(content), count())
    except UserError:
        raise
    except (
        OSError,
        yaml.YAMLError,
        ValueError,
        TypeError,
        RecursionError,
    ) as error:  # ValueError: a date of no calendar
        raise UserError(f"{what} is not YAML: {_why(error)}") from None
    if not isinstance(values, dict):
        holds = "is empty" if values is None else "holds something else"
        raise UserError(f"{what} {holds}; it must hold keys and values, such as those of 'coadvise presets digits'")
    teachers = values.get("teachers")
    for teacher in teachers.values() if isinstance(teachers, dict) else ():
        if isinstance(teacher, dict):
            _with_start(teacher)
    engine = values.get("engine")
    if isinstance(engine, dict) and engine.pop("tensorboard", False) is True:  # files from before `trackers`
        engine["trackers"] = ["tensorboard"]
    return values


def _why(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    said = str(getattr(error, "problem", None) or error or type(error).__name__)
    return " ".join(said.split()) + (f", at line {mark.line + 1}, character {mark.column + 1}" if mark else "")


def _with_start(teacher: dict[str, Any]) -> None:
    """Renames the keys of files from before `start`, in place."""
    checkpoint, pretrained = teacher.pop("checkpoint", None), teacher.pop("pretrained", None)
    given = checkpoint or (teacher.get("model") if pretrained is True else None)
    if given is not None:
        teacher |= {"start": given, "adapt": "none"}


def _unshared(value: Any, things: Iterator[int]) -> Any:
    """A copy without shared objects: YAML's aliases share one, and an override of one must not change the other.

    Raises:
        ValueError: more than MOST_YAML values, which a few lines of nested aliases can describe.
    """
    if next(things) > MOST_YAML:
        raise ValueError("its aliases expand to too many values")
    if isinstance(value, dict):
        return {key: _unshared(child, things) for key, child in value.items()}
    return [_unshared(child, things) for child in value] if isinstance(value, list) else value


def _apply(values: dict[str, Any], override: str) -> None:
    path, separator, text = override.partition("=")
    if not separator or not path:
        raise UserError(f"'{override}' is not an override; write key=value, for instance student.recipe.epochs=10")
    try:
        value = yaml.safe_load(text)
        _unshared(value, count())
    except (yaml.YAMLError, ValueError, TypeError, RecursionError):
        raise UserError(f"'{override}': the value is not YAML") from None
    if isinstance(value, str) and value == text.strip():  # YAML 1.1 reads 1e-3 as a word; in quotes it is one
        with suppress(ValueError):
            value = float(value) if math.isfinite(float(value)) else value
    network, _, key = path.rpartition(".")
    named = key == "start" and network.startswith("teachers.") and isinstance(value, str) and names_model(value)
    if named:
        _set(values, f"{network}.model", value)
    if named or key == "model":  # the preset's arguments are those of the preset's model
        _set(values, f"{network}.model_kwargs", {})
    _set(values, path, value)


def _set(values: dict[str, Any], path: str, value: Any) -> None:
    *parents, key = path.split(".")
    for parent in parents:
        if values.get(parent) is None:  # missing, or a key without a value
            values[parent] = {}
        values = values[parent]
        if not isinstance(values, dict):
            raise UserError(f"'{path}': '{parent}' is a value and has no keys")
    values[key] = value


# Pydantic's words for these are Python's, and values are given as YAML.
_ASKED = {
    "tuple_type": "give a list, such as [a, b]",
    "dict_type": "give keys and values, such as {a: b}",
    "model_type": "give keys and values, such as {a: b}",
    "string_type": "give text; put quotes around numbers, yes and no",
}


def _faults(error: ValidationError) -> Iterator[str]:
    for fault in error.errors():
        where = [str(part) for part in fault["loc"] if part != "[key]"]
        name = ".".join(where) or "the configuration"
        if fault["type"] == "extra_forbidden":
            allowed = _keys_at(where[:-1])
            yield f"unknown key '{name}'{nearest(where[-1], allowed)}; allowed here: {', '.join(allowed)}"
        elif fault["type"] == "missing":
            yield f"'{name}' is missing"
        else:
            said = _ASKED.get(fault["type"], fault["msg"].removeprefix("Value error, "))
            given = "" if fault["input"] and isinstance(fault["input"], Mapping) else f" is {_short(fault['input'])}"
            yield f"'{name}'{given}: {said}" if where else said


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else text[:200] + "..."


def _keys_at(path: Sequence[str]) -> list[str]:
    """The keys allowed at a place of the configuration."""
    model: type[BaseModel] = RunConfig
    rest = list(path)
    while rest:
        key = rest.pop(0)
        if model is RunConfig and key == "teachers":
            if not rest:
                return []
            rest.pop(0)
            model = TeacherConfig
            continue
        annotation = model.model_fields[key].annotation
        optional = {"augment": AugmentConfig, "cache": CacheConfig}
        model = optional.get(key, annotation)  # type: ignore[assignment,arg-type]
    return list(model.model_fields)


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, child in value.items():
            yield from _leaves(child, f"{path}.{key}" if path else str(key))
    else:
        yield path, value


# Keys that change no result: a run may be continued with other values.
HARMLESS_KEYS = (
    "data.workers",
    "data.cache_gb",
    "data.max_unreadable",
    "engine.checkpoint_seconds",
    "engine.cpus",
    "engine.gpus",
    "engine.timeout_seconds",
    "engine.trackers",
)


def deciding_values(config: RunConfig) -> dict[str, Any]:
    """All values that decide results, besides where the images are, as plain values."""
    values = config.model_dump(mode="json")
    for key in ("data.source", *HARMLESS_KEYS):
        group, _, name = key.partition(".")
        values[group].pop(name, None)
    return values
