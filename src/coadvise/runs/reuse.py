"""Networks that another run has trained already: taken from it in place of training the same ones again."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coadvise.advice import CLASS
from coadvise.config import FREE, RunConfig, StudentConfig, TeacherConfig, deciding_values, read_config
from coadvise.data.scan import Dataset
from coadvise.distill.logit_cache import teacher_fingerprint
from coadvise.errors import UserError
from coadvise.models.network import build_network, load_network
from coadvise.runs.network_job import is_done, is_trained, trained_here
from coadvise.runs.plan import ADVISED, ALONE, TEACHER, Part
from coadvise.runs.run import CONFIG, Run, check_run, data_record, written_data
from coadvise.training.metrics import read_records

# In the run of a teacher by itself, and in that of a student alone, the other networks are never made.
NO_STUDENT, _NO_TEACHER = StudentConfig(model="cit_micro_patch4_32"), TeacherConfig(model="resnet_small")
_HOW = ("token", "weight", "temperature", "hard")  # what a configuration says of a teacher's advice


def unadvising(teacher: TeacherConfig) -> TeacherConfig:
    """A teacher without whom it advises and how, which changes nothing that it says."""
    return teacher.model_copy(update={key: TeacherConfig.model_fields[key].default for key in _HOW})


def by_itself(config: RunConfig, role: str, teacher: str = "") -> RunConfig:
    """What is left of a configuration once all is gone that cannot change a network's numbers.

    Args:
        role: the network's (`run.TEACHER`, `ADVISED` or `ALONE`); an advised student depends on everything.
        teacher: its name, where the network is one.

    Returns:
        A configuration with which the network is trained to the same numbers. Equal ones mean equal networks, given the
        same images and seed, and for an advised student the same teachers.
    """
    if role == TEACHER:
        own = unadvising(config.teachers[teacher])
        augment = own.augment or config.augment
        own = own.model_copy(update={"augment": augment})
        same = {"teachers": {teacher: own}, "student": NO_STUDENT, "augment": augment, "cache": None}
        return config.model_copy(update=same)
    if role == ALONE:  # of those who do not advise it, it has the tokens
        advice = config.loss_weights.advice
        tokens = {n: _NO_TEACHER.model_copy(update={"token": _token(n, a.tokens(n))}) for n, a in advice.items()}
        student = config.student.model_copy(update={"weight": 1.0, "combine": "sum"})  # of classes, of advice
        return config.model_copy(update={"teachers": tokens, "student": student, "cache": None})
    return config


def _token(name: str, tokens: tuple[str, ...]) -> str | tuple[str, ...] | None:
    """One spelling of `TeacherConfig.token`, without the class token, which is there whoever advises it."""
    advised = tuple(token for token in tokens if token != CLASS) or (CLASS,)
    if len(advised) > 1:
        return advised
    return None if advised[0] == name else advised[0]


def check_reuse(other: Path, dataset: Dataset, image_size: int) -> None:
    """Raises UserError for what is no run, a run on other images than these, or one that was changed on its way."""
    check_run(other, "give --reuse one that 'coadvise fit' made")
    here, there = data_record(dataset, image_size), written_data(other)
    if here["folder"] in (there.get("folder"), str(Path(str(there.get("root"))).resolve())):
        there |= {"root": here["root"], "folder": here["folder"]}  # however each was told of it, and from where
    if differ := [what for what in here if there.get(what) != here[what]]:
        raise UserError(
            f"'{other}' was trained on other images (its {', '.join(differ)}); give --reuse a run on the same ones"
        )
    for record in read_records(other):
        if changed := [line for line in record.get("changed", ()) if line.partition(":")[0] not in FREE]:
            raise UserError(
                f"'{other}' was changed on its way ({changed[0]}), so its configuration need not be that of all its "
                "networks; give --reuse a run without --allow-changes"
            )


def take(run: Run, parts: Sequence[Part], other: Path) -> None:
    """Copies into `run`, with their curves, those of `parts` that `other` has trained from the same configuration.

    An advised student is the same only where its teachers are, byte for byte, so these must be there before. What is
    copied counts as trained here; it is scored again.

    Raises:
        UserError: a network of `other` is damaged.
    """
    theirs, classes = read_config(other / CONFIG), run.dataset.classes
    for part in parts if run.engine.is_main else ():
        if is_trained(run.folder, part) or not is_done(other, part) or _from_files(part, run.config):
            continue
        if _decides(run.folder, run.config, part, classes) != _decides(other, theirs, part, classes):
            continue
        network = load_network(other / part.name)
        run.record.rewind(part.name, 0)
        for record in read_records(other):
            if record["kind"] in ("train", "eval") and record["part"] == part.name:
                run.record.add(**record)
        run.record.add("reused", part=part.name, run=str(other))
        network.save(run.folder / part.name)
        run.listener.say(f"{part.title}: the same as in {other}, taken from there")
    run.engine.barrier()


def _from_files(part: Part, config: RunConfig) -> bool:
    """Whether an part is, or starts from, weights given as a file, which may be another than when it was taken up."""
    return not trained_here(part, config) or (part.role != TEACHER and config.student.start is not None)


def _decides(folder: Path, config: RunConfig, part: Part, classes: tuple[str, ...]) -> dict[str, Any]:
    """All that decides an part's numbers beside the images, in plain values."""
    values = deciding_values(by_itself(config, part.role, part.teacher))
    if part.role != TEACHER:  # which tokens are aligned may be written out, or be what the model does by itself
        student = build_network(config.student, classes, config.data.image_size, part.seed, tokens=config.tokens)
        values["student"]["model_kwargs"]["aligned"] = getattr(student.model, "aligned", None)
    if part.role == ADVISED:
        for name, teacher in values["teachers"].items():
            fingerprint = teacher_fingerprint(folder / "teachers" / name)
            values["teachers"][name] = {"network": fingerprint, **{key: teacher[key] for key in _HOW}}
    return values
