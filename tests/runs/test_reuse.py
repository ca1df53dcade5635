"""Networks of another run are taken where they would be trained just so again, and nowhere else."""

import shutil
from pathlib import Path

import pytest
from tiny import CLASSES, Stopper, make_images, never, records

from coadvise import fit
from coadvise.config import load_config
from coadvise.data.scan import scan
from coadvise.data.sources import open_source
from coadvise.errors import Interrupted, UserError
from coadvise.models.network import build_network
from coadvise.runs.plan import ADVISED, ALONE, TEACHER, Part
from coadvise.runs.reuse import _decides, _from_files, by_itself, check_reuse
from coadvise.studies.runner import _hash, run_study

PARTS = ("teachers/conv", "teachers/inv", "students/advised-0", "students/alone-0")
TEACHERS, STUDENTS = PARTS[:2], PARTS[2:]


def trained(data: Path, preset: str, out: Path, reuse: Path, *overrides: str) -> tuple[str, ...]:
    """The parts that a run had to train though it might take those of another one."""
    listener = Stopper(never)
    fit(data, preset, out, baseline=True, overrides=overrides, listener=listener, reuse=reuse)
    return tuple(part for part in PARTS if (part, 1) in listener.steps)


def weights(run: Path, part: str) -> bytes:
    return (run / part / "model.safetensors").read_bytes()


def test_the_same_run_again_trains_nothing(finished: Path, tiny_images: Path, tiny_preset: str, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):  # it may have been begun, too
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
        ("augment.flip=false", PARTS),  # the tiny teachers have no views of their own
        ("teachers.conv.temperature=3", ("students/advised-0",)),
        ("teachers.conv.token=[conv, class]", ("students/advised-0",)),
        ("teachers.inv.recipe.epochs=1", ("teachers/inv", "students/advised-0")),
        ("engine.precision=bfloat16", PARTS),
        ("data.workers=1", ()),
    ],
)
def test_what_a_change_can_reach_is_trained_again(
    override: str, again: tuple[str, ...], finished: Path, tiny_images: Path, tiny_preset: str, tmp_path: Path
) -> None:
    assert trained(tiny_images, tiny_preset, tmp_path / "run", finished, override) == again
    if again in (STUDENTS, ("students/advised-0",)):  # advised by teachers that were taken, as by one's own
        fit(tiny_images, tiny_preset, tmp_path / "anew", overrides=[override])
        assert weights(tmp_path / "run", "students/advised-0") == weights(tmp_path / "anew", "students/advised-0")


def test_the_same_images_may_be_named_from_elsewhere(
    tiny_images: Path, tiny_preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "here" / "images").symlink_to(tiny_images)
    run = fit(Path("images"), tiny_preset, tmp_path / "run", baseline=True)
    monkeypatch.chdir(tmp_path)
    for number, same in enumerate((Path("here/images"), tiny_images)):
        assert trained(same, tiny_preset, tmp_path / f"again{number}", run) == ()
    moved = shutil.move(tmp_path / "here", tmp_path / "there")  # all of it: what is relative is still right
    monkeypatch.chdir(moved)
    (moved / "images").unlink()
    shutil.copytree(tiny_images, moved / "images")
    assert trained(Path("images"), tiny_preset, tmp_path / "moved", run) == ()


def test_a_study_takes_what_fit_has_trained(tiny_images: Path, tiny_preset: str, tmp_path: Path) -> None:
    aligned = ["student.model=cit_micro_aligned_patch4_32"]  # aligned by itself, in the study's rows by an argument
    run = fit(tiny_images, tiny_preset, tmp_path / "run", baseline=True, overrides=aligned)
    anew = run_study("injection", tiny_images, tiny_preset, out=tmp_path / "anew", overrides=aligned)
    listener = Stopper(never)
    study = tmp_path / "study"
    found = run_study("injection", tiny_images, tiny_preset, out=study, overrides=aligned, listener=listener, reuse=run)
    assert [row["figures"] for row in found["rows"]] == [row["figures"] for row in anew["rows"]]
    taken = [record["part"] for part in study.glob("*/*") for record in records(part, "reused")]
    assert sorted(taken) == sorted(PARTS)
    assert sum(step == 1 for _, step in listener.steps) == 4, "of six rows two, and both teachers, were there"


def test_what_cannot_be_reused_is_refused_before_anything_is_written(
    finished: Path, tiny_images: Path, tiny_preset: str, tmp_path: Path
) -> None:
    other = make_images(tmp_path / "other", train=7)
    with pytest.raises(UserError, match=r"is no run directory .*give --reuse one that"):
        trained(tiny_images, tiny_preset, tmp_path / "run", other)
    with pytest.raises(UserError, match=r"trained on other images \(its root, folder, splits\)"):
        trained(other, tiny_preset, tmp_path / "run", finished)
    changed = Path(shutil.copytree(finished, tmp_path / "changed"))
    fit(tiny_images, tiny_preset, changed, overrides=["data.workers=1"])  # which changes no number
    check_reuse(changed, scan(open_source(tiny_images, 0.2, 0), 16, in_memory=True), 16)
    fit(tiny_images, tiny_preset, changed, overrides=["student.recipe.epochs=3"], allow_changes=True)
    with pytest.raises(UserError, match=r"changed on its way \(student.recipe.epochs: 2 -> 3\)"):
        trained(tiny_images, tiny_preset, tmp_path / "run", changed)
    assert not (tmp_path / "run").exists()


def test_a_damaged_network_is_not_taken(finished: Path, tiny_images: Path, tiny_preset: str, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(finished, tmp_path / "damaged"))
    (damaged / "teachers/conv/model.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="damaged model"):
        trained(tiny_images, tiny_preset, tmp_path / "run", damaged)


@pytest.mark.parametrize(
    "override",
    ["teachers.conv.weight=2", "teachers.conv.hard=true", "student.weight=2", "student.combine=mean", "cache.top_k=5"],
)
def test_how_it_was_advised_decides_a_student_s_numbers(override: str, tiny_preset: str, tmp_path: Path) -> None:
    one, other = load_config(tiny_preset), load_config(tiny_preset, [override])
    for name, teacher in one.teachers.items():
        build_network(teacher, CLASSES, 16, seed=0).save(tmp_path / "teachers" / name)
    advised = Part("students/advised-0", ADVISED, 0)
    assert _decides(tmp_path, one, advised, CLASSES) != _decides(tmp_path, other, advised, CLASSES)


def test_students_that_start_from_a_file_are_not_taken() -> None:
    config = load_config("small-images", ["student.start=deit.pth"], source="x")  # which may be another one by now
    taken = {role: not _from_files(Part("part", role, 0, "conv"), config) for role in (TEACHER, ADVISED, ALONE)}
    assert taken == {TEACHER: True, ADVISED: False, ALONE: False}


def test_by_itself_leaves_out_what_cannot_matter() -> None:
    config = load_config("small-images", source="x")
    warmer = load_config("small-images", ["teachers.conv.temperature=9", "student.recipe.epochs=1"], source="x")
    assert by_itself(config, TEACHER, "conv") == by_itself(warmer, TEACHER, "conv")
    assert by_itself(config, TEACHER, "conv") != by_itself(warmer, TEACHER, "inv")
    warmer = load_config("small-images", ["teachers.conv.temperature=9"], source="x")
    assert by_itself(config, ALONE) == by_itself(warmer, ALONE)
    for unread in ("student.weight=2", "student.combine=mean"):  # a student alone has one term
        assert by_itself(config, ALONE) == by_itself(load_config("small-images", [unread], source="x"), ALONE)
    assert by_itself(config, ADVISED) != by_itself(warmer, ADVISED)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("[conv, class]", "conv", True),
        ("[conv, class]", "null", True),
        ("[class, conv]", "[conv]", True),
        ("[class]", "class", True),
        ("[one, class]", "one", True),
        ("[one, class, two]", "[one, two]", True),
        ("[one, two]", "one", False),
    ],
)
def test_a_student_alone_has_the_tokens_whoever_advises_the_class_token(one: str, other: str, same: bool) -> None:
    first, second = (load_config("small-images", [f"teachers.conv.token={t}"], source="x") for t in (one, other))
    assert (by_itself(first, ALONE) == by_itself(second, ALONE)) is same
    assert by_itself(first, ADVISED) != by_itself(second, ADVISED)


def test_a_given_teacher_is_had_where_it_is_given(
    finished: Path, tiny_images: Path, tiny_preset: str, tmp_path: Path
) -> None:
    given = Path(shutil.copytree(finished / "teachers" / "conv", tmp_path / "given"))
    override = f"teachers.conv.checkpoint={given}"
    one = fit(tiny_images, tiny_preset, tmp_path / "one", overrides=[override])
    other = fit(tiny_images, tiny_preset, tmp_path / "other", seed=1)
    shutil.rmtree(given)
    shutil.copytree(other / "teachers" / "conv", given)
    again = fit(tiny_images, tiny_preset, tmp_path / "again", overrides=[override], reuse=one)
    assert weights(again, "teachers/conv") == weights(given, "") != weights(one, "teachers/conv")
    assert weights(again, "teachers/inv") == weights(one, "teachers/inv")
    assert [record["part"] for record in records(again, "reused")] == ["teachers/inv"]


def test_a_study_tells_given_weights_by_their_contents(finished: Path, tmp_path: Path) -> None:
    given = Path(shutil.copytree(finished / "teachers" / "conv", tmp_path / "given"))
    moved = Path(shutil.copytree(given, tmp_path / "moved"))
    start = tmp_path / "start.safetensors"
    start.write_bytes(b"one")

    def of(teacher: Path) -> str:
        overrides = [f"teachers.conv.checkpoint={teacher}", f"student.start={start}"]
        return _hash(load_config("small-images", overrides, source="x"), tmp_path / "study")

    first = of(given)
    assert of(moved) == first
    start.write_bytes(b"another")
    assert of(given) != first
    start.write_bytes(b"one")
    shutil.rmtree(given)
    shutil.copytree(finished / "teachers" / "inv", given)
    assert of(given) != first == of(moved)
