"""Networks of another run are copied if they were trained with the same configuration, and only then."""

import shutil
from pathlib import Path

import pytest
from tiny import CLASSES, ONE_EPOCH, Stopper, make_images, never, records

from coadvise import fit
from coadvise.config.reading import load_config
from coadvise.config.schema import RunConfig, TeacherConfig
from coadvise.data.scan import scan
from coadvise.data.sources import open_source
from coadvise.errors import Interrupted, UserError
from coadvise.models.network import build_network
from coadvise.runs.canonical import ADVICE_FIELDS, NETWORK_FIELDS, advice_of, canonical_config, strip_advice
from coadvise.runs.plan import ADVISED, ALONE, TEACHER, Part
from coadvise.runs.reuse import _deciding, _uses_given_weights, check_reuse
from coadvise.studies.plan import config_hash
from coadvise.studies.runner import run_study

PARTS = ("teachers/conv", "teachers/inv", "students/advised-0", "students/alone-0")
TEACHERS, STUDENTS = PARTS[:2], PARTS[2:]


def trained(data: Path, preset: str, out: Path, reuse: Path, *overrides: str) -> tuple[str, ...]:
    """The parts that a run had to train although it could reuse another one."""
    listener = Stopper(never)
    fit(data, preset, out, baseline=True, overrides=overrides, listener=listener, reuse=reuse)
    return tuple(part for part in PARTS if (part, 1) in listener.steps)


def weights(run: Path, part: str) -> bytes:
    return (run / part / "model.safetensors").read_bytes()


def test_the_same_run_again_trains_nothing(finished: Path, tiny_images: Path, tiny_preset: str, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):  # the run may have begun before
        fit(tiny_images, tiny_preset, tmp_path / "run", listener=Stopper(lambda part, step: step == 3))
    assert trained(tiny_images, tiny_preset, tmp_path / "run", finished) == ()
    assert all(weights(tmp_path / "run", part) == weights(finished, part) for part in PARTS)
    for kind in ("train", "eval", "result", "verdict"):
        ours, theirs = (sorted(map(str, records(run, kind))) for run in (tmp_path / "run", finished))
        assert ours == theirs
    assert [record["part"] for record in records(tmp_path / "run", "reused")] == list(PARTS)


@pytest.mark.parametrize(
    ("override", "again"),
    [
        ("student.recipe.learning_rate=0.01", STUDENTS),
        ("teachers.conv.temperature=3", ("students/advised-0",)),
        ("teachers.inv.recipe.epochs=1", ("teachers/inv", "students/advised-0")),
        ("engine.precision=bfloat16", PARTS),
        ("data.workers=1", ()),
    ],
)
def test_what_a_change_affects_is_trained_again(
    override: str, again: tuple[str, ...], finished: Path, tiny_images: Path, tiny_preset: str, tmp_path: Path
) -> None:
    assert trained(tiny_images, tiny_preset, tmp_path / "run", finished, override) == again
    if override == "teachers.conv.temperature=3":  # copied teachers advise as its own
        fit(tiny_images, tiny_preset, tmp_path / "anew", overrides=[override])
        assert weights(tmp_path / "run", "students/advised-0") == weights(tmp_path / "anew", "students/advised-0")


def test_the_same_images_may_be_named_differently(
    finished: Path, tiny_images: Path, tiny_preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("images").symlink_to(tiny_images)
    assert trained(Path("images"), tiny_preset, tmp_path / "again", finished) == ()
    shutil.move(tmp_path / "again", tmp_path / "there" / "again")  # with its images: a relative path is still right
    shutil.copytree(tiny_images, tmp_path / "there" / "images")
    monkeypatch.chdir(tmp_path / "there")
    assert trained(Path("images"), tiny_preset, tmp_path / "moved", tmp_path / "there" / "again") == ()


def test_a_study_reuses_networks_of_a_run(tiny_images: Path, tiny_preset: str, tmp_path: Path) -> None:
    aligned = ["student.model=cit_micro_aligned_patch4_32"]  # by default; the rows of the study name it
    labels = [*aligned, "student.label_tokens=[class, conv, inv]"]  # without advice, as in the study
    run = fit(tiny_images, tiny_preset, tmp_path / "run", baseline=True, overrides=labels)
    listener, study = Stopper(never), tmp_path / "study"
    run_study("table8", tiny_images, listener, preset=tiny_preset, out=study, overrides=aligned, reuse=run)
    taken = [record["part"] for part in study.glob("*/*") for record in records(part, "reused")]
    assert sorted(taken) == ["students/alone-0", "teachers/conv", "teachers/inv"]
    assert sum(step == 1 for _, step in listener.steps) == 7, "one of eight rows and both teachers were there"


def test_other_runs_are_refused_before_anything_is_written(
    finished: Path, tiny_images: Path, tiny_preset: str, tmp_path: Path
) -> None:
    other = make_images(tmp_path / "other", train=7)
    with pytest.raises(UserError, match=r"is no run directory .*--reuse"):
        trained(tiny_images, tiny_preset, tmp_path / "run", other)
    with pytest.raises(UserError, match=r"other images \(its root, folder, splits\)"):
        trained(other, tiny_preset, tmp_path / "run", finished)
    own = Path(shutil.copytree(tiny_images, tmp_path / "own"))
    once = fit(own, tiny_preset, tmp_path / "once", overrides=ONE_EPOCH)
    shutil.copy(own / "train" / "red" / "1.png", own / "train" / "blue" / "0.png")
    with pytest.raises(UserError, match=r"other images \(its files\)"):
        trained(own, tiny_preset, tmp_path / "run", once)
    fit(own, tiny_preset, once, overrides=ONE_EPOCH, allow_changes=True)
    check_reuse(once, scan(open_source(own), 16, in_memory=True), 16)
    changed = Path(shutil.copytree(finished, tmp_path / "changed"))
    fit(tiny_images, tiny_preset, changed, overrides=["data.workers=1"])  # which changes no result
    check_reuse(changed, scan(open_source(tiny_images), 16, in_memory=True), 16)
    fit(tiny_images, tiny_preset, changed, overrides=["student.recipe.epochs=3"], allow_changes=True)
    with pytest.raises(UserError, match=r"another configuration \(student.recipe.epochs: 2 -> 3\)"):
        trained(tiny_images, tiny_preset, tmp_path / "run", changed)
    damaged = Path(shutil.copytree(finished, tmp_path / "damaged"))
    (damaged / "teachers/conv/model.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="damaged model"):
        trained(tiny_images, tiny_preset, tmp_path / "partial", damaged)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "override",
    ["teachers.conv.weight=2", "teachers.conv.hard=true", "student.weight=2", "student.combine=mean", "cache.top_k=5"],
)
def test_everything_about_advice_counts_for_a_student(override: str, tiny_preset: str, tmp_path: Path) -> None:
    one, other = load_config(tiny_preset), load_config(tiny_preset, [override])
    for name, teacher in one.teachers.items():
        build_network(teacher, CLASSES, 16, seed=0).save(tmp_path / "teachers" / name)
    advised = Part("students/advised-0", ADVISED, 0)
    assert _deciding(tmp_path, one, advised, CLASSES) != _deciding(tmp_path, other, advised, CLASSES)


def test_a_field_that_is_new_counts() -> None:
    """For the teacher's own network as for the students it advises; each field of today is one of the two kinds."""
    assert TeacherConfig.model_fields.keys() == ADVICE_FIELDS | NETWORK_FIELDS
    assert not ADVICE_FIELDS & NETWORK_FIELDS
    teacher = load_config("small-images").teachers["conv"]
    one, other = (advice_of({**teacher.model_dump(), "new": value}, "fingerprint") for value in (0, 1))
    assert one != other
    future = teacher.model_copy(update={"new": 1, "weight": 3.0})
    assert strip_advice(future).__dict__["new"] == 1
    assert strip_advice(future).weight == 1.0


def test_students_that_start_from_a_file_are_not_reused() -> None:
    config = load_config("small-images", ["student.start=deit.pth"], source="x")  # the file may have changed
    reused = {
        role: not _uses_given_weights(Part("part", role, 0, "conv"), config) for role in (TEACHER, ADVISED, ALONE)
    }
    assert reused == {TEACHER: True, ADVISED: False, ALONE: False}


def canonical(role: str, *overrides: str, teacher: str = "") -> RunConfig:
    return canonical_config(load_config("small-images", overrides, source="x"), role, teacher)


def test_a_canonical_configuration_leaves_out_what_has_no_effect() -> None:
    warmer = ("teachers.conv.temperature=9", "student.recipe.epochs=1")
    assert canonical(TEACHER, teacher="conv") == canonical(TEACHER, *warmer, teacher="conv")
    assert canonical(TEACHER, teacher="conv") != canonical(TEACHER, *warmer, teacher="inv")
    for unused in (
        warmer[0],
        "student.weight=2",
        "student.combine=mean",
        "student.standardise=true",
    ):  # a student alone has one loss term
        assert canonical(ALONE) == canonical(ALONE, unused)
        assert canonical(ADVISED) != canonical(ADVISED, unused)
    for one, other, same in (
        ("[conv, class]", "null", True),
        ("[class, conv]", "[conv]", True),
        ("[class]", "class", True),
        ("[one, class, two]", "[one, two]", True),
        ("[one, two]", "one", False),
    ):  # a student alone has the tokens, whoever advises the class token
        tokens = [f"teachers.conv.token={token}" for token in (one, other)]
        assert (canonical(ALONE, tokens[0]) == canonical(ALONE, tokens[1])) is same
        assert canonical(ADVISED, tokens[0]) != canonical(ADVISED, tokens[1])


def test_a_given_teacher_is_loaded_from_its_folder(
    finished: Path, tiny_images: Path, tiny_preset: str, tmp_path: Path
) -> None:
    given = Path(shutil.copytree(finished / "teachers" / "conv", tmp_path / "given"))
    override = f"teachers.conv.start={given}"
    one = fit(tiny_images, tiny_preset, tmp_path / "one", overrides=[override, *ONE_EPOCH])
    shutil.rmtree(given)
    build_network(load_config(tiny_preset).teachers["conv"], CLASSES, 16, seed=9).save(given)
    again = fit(tiny_images, tiny_preset, tmp_path / "again", overrides=[override, *ONE_EPOCH], reuse=one)
    assert weights(again, "teachers/conv") == weights(given, "") != weights(one, "teachers/conv")
    assert weights(again, "teachers/inv") == weights(one, "teachers/inv")
    assert [record["part"] for record in records(again, "reused")] == ["teachers/inv"]


def test_a_study_identifies_given_weights_by_their_contents(finished: Path, tmp_path: Path) -> None:
    given = Path(shutil.copytree(finished / "teachers" / "conv", tmp_path / "given"))
    moved = Path(shutil.copytree(given, tmp_path / "moved"))
    start = tmp_path / "start.safetensors"
    start.write_bytes(b"one")

    def of(teacher: Path) -> str:
        overrides = [f"teachers.conv.start={teacher}", f"student.start={start}"]
        return config_hash(load_config("small-images", overrides, source="x"), tmp_path / "study")

    first = of(given)
    assert of(moved) == first
    start.write_bytes(b"another")
    assert of(given) != first
    start.write_bytes(b"one")
    shutil.rmtree(given)
    shutil.copytree(finished / "teachers" / "inv", given)
    assert of(given) != first == of(moved)
