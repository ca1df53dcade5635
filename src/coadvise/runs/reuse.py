"""Copies networks from another run if they were trained there with the same configuration."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coadvise.config.reading import HARMLESS_KEYS, deciding_values, read_config
from coadvise.config.schema import ImageSize, RunConfig
from coadvise.data.scanned import PREPROCESSING, Dataset
from coadvise.distill.logit_cache import teacher_fingerprint
from coadvise.errors import UserError
from coadvise.models.network import build_network, load_network
from coadvise.runs.canonical import advice_of, canonical_config
from coadvise.runs.network_job import is_done, is_trained
from coadvise.runs.plan import ADVISED, TEACHER, Part
from coadvise.runs.run import CONFIG, Run, check_run, data_record, image_changes, written_data
from coadvise.training.metrics import read_records


def check_reuse(other: Path, dataset: Dataset, image_size: ImageSize) -> None:
    """Raises UserError unless a folder is a run on these images with one configuration from beginning to end."""
    check_run(other, "give --reuse the folder of a run of 'coadvise fit'")
    here, there = data_record(dataset, image_size), written_data(other)
    if here["folder"] in (there.get("folder"), str(Path(str(there.get("root"))).resolve())):
        there |= {"root": here["root"], "folder": here["folder"]}  # a path may be written differently
    differ = [what for what in (*here, *PREPROCESSING) if there.get(what) != here.get(what)]
    if differ or image_changes(other, dataset):
        raise UserError(
            f"'{other}' was trained on other images (its {', '.join(differ) or 'files'}); give --reuse a run on the "
            "same ones"
        )
    changed: list[str] = []
    for record in read_records(other):
        lines = {line.partition(":")[0]: line for line in record.get("changed", ())}
        if "training images" in lines:  # all its networks were trained again
            changed = []
        else:
            changed += [
                line for key, line in lines.items() if key not in (*HARMLESS_KEYS, "validation images", "test images")
            ]
    if changed:
        raise UserError(
            f"'{other}' was continued with another configuration ({changed[0]}), so its networks may differ from what "
            "its config.yaml says; give --reuse a run without --allow-changes"
        )


def reuse_networks(run: Run, parts: Sequence[Part], other: Path) -> None:
    """Copies, with their curves, those of `parts` that `other` has trained with the same configuration.

    Advised students are equal only if their teachers are, byte for byte, so the teachers must be finished. What is
    copied counts as trained here; it is scored again.

    Raises:
        UserError: a network of `other` is damaged.
    """
    theirs, classes = read_config(other / CONFIG), run.dataset.classes
    for part in parts if run.engine.is_main else ():
        if is_trained(run.folder, part) or not is_done(other, part) or _uses_given_weights(part, run.config):
            continue
        if _deciding(run.folder, run.config, part, classes) != _deciding(other, theirs, part, classes):
            continue
        network = load_network(other / part.name)
        run.record.rewind(part.name, 0)
        for record in read_records(other):
            if record["kind"] in ("train", "eval") and record["part"] == part.name:
                run.record.add(**record)
        run.record.add("reused", part=part.name, run=str(other))
        network.save(run.folder / part.name)
        run.listener.say(f"{part.title}: same configuration as in {other}, copied from there")
    run.engine.barrier()


def _uses_given_weights(part: Part, config: RunConfig) -> bool:
    """Whether a network is, or starts from, a file of weights. The file may have changed since the other run."""
    network = config.teachers[part.teacher] if part.role == TEACHER else config.student
    return network.start is not None


def _deciding(folder: Path, config: RunConfig, part: Part, classes: tuple[str, ...]) -> dict[str, Any]:
    """All that decides the numbers of a network of the run in `folder`, besides the images, as plain values."""
    values = deciding_values(canonical_config(config, part.role, part.teacher))
    if part.role != TEACHER:  # aligned tokens may be named in the configuration, or be the model's default
        student = build_network(config.student, classes, config.data.image_size, part.seed, tokens=config.tokens)
        values["student"]["model_kwargs"]["aligned"] = getattr(student.model, "aligned", None)
    if part.role == ADVISED:
        for name, teacher in values["teachers"].items():
            values["teachers"][name] = advice_of(teacher, teacher_fingerprint(folder / "teachers" / name))
    return values
