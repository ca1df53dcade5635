"""A cache holds the teachers' logits bit for bit; students advised by it, and everything that can go wrong."""

import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import (
    Stopper,
    assert_same_weights,
    command,
    contents,
    make_images,
    never,
    records,
    weights_of,
)
from torch import Tensor

from coadvise import build_cache, fit
from coadvise.config.reading import load_config
from coadvise.config.schema import AugmentConfig, EngineConfig
from coadvise.data.scan import scan
from coadvise.data.sources import open_source
from coadvise.data.views import Views
from coadvise.distill.logit_cache import Form, LogitCache, StoredLogits
from coadvise.distill.teachers import Teacher, Teachers, load_teachers
from coadvise.errors import Interrupted, UserError
from coadvise.runs import build_cache as cache_build
from coadvise.training.engine import Engine

STUDENT = "students/advised-0"


def given(run: Path) -> list[str]:
    """Overrides that use the teachers of another run."""
    return [f"teachers.{name}.start={run / 'teachers' / name}" for name in ("conv", "inv")]


@pytest.fixture(scope="module")
def cache(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished run's views, to be read only: both epochs of seed 0."""
    return build_cache(finished, tmp_path_factory.mktemp("cache") / "cache")


@pytest.fixture
def rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Teachers answer in logits rounded to float16."""
    answer = Teacher.forward
    monkeypatch.setattr(Teacher, "forward", lambda self, images: answer(self, images).half().float())


@pytest.fixture
def silent_teachers(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: Teacher, images: Tensor) -> Tensor:
        raise AssertionError("a teacher ran")

    monkeypatch.setattr(Teacher, "forward", forward)


def shards(cache: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(cache).items() if name.endswith("safetensors")}


# What is stored


def test_it_holds_the_logits_of_each_view_in_float16(finished: Path, tiny_images: Path, cache: Path) -> None:
    config = load_config(str(finished / "config.yaml"))
    dataset = scan(open_source(tiny_images), 16, in_memory=True)
    teachers = load_teachers({name: finished / "teachers" / name for name in config.teachers}, dataset.classes)
    views = Views(dataset.train, config.augment, 3, 16, seed=0)
    assert sorted(shards(cache)) == [f"seed-0/epoch-0000{n}.safetensors" for n in (0, 1)]
    for epoch in (0, 1):
        arrays = LogitCache(cache / "seed-0", {}).read(epoch)
        batch = Engine(config.engine).place(views[epoch, np.arange(24)])
        for token, logits in teachers(batch).items():
            stored = torch.from_numpy(arrays[token])[batch.index]
            assert stored.dtype == torch.float16
            assert torch.equal(stored, logits.half())
    assert len(set(shards(cache).values())) == 2, "epochs differ"


def test_of_a_view_whose_file_is_lost_nothing_is_stored_or_read(tmp_path: Path) -> None:
    """Another image stands in its place, and in that of its share in what it is mixed with."""
    images = make_images(tmp_path / "images")
    train = scan(open_source(images), 16, in_memory=False).train
    views, form = Views(train, AugmentConfig(kind="deit"), 3, 16, seed=0), Form(3, 32)
    (images / train.name(5)).unlink()
    says = re.escape(train.name(5))
    with pytest.raises(UserError, match=says):
        cache_build.answers(views, 0, Teachers({}), form, Engine(EngineConfig(device="cpu")), 0, lambda number: None)
    empty = LogitCache(tmp_path / "cache", {})
    empty.create()
    with pytest.raises(UserError, match=says):
        StoredLogits(empty, (), form)(views[0, np.arange(24)])


def test_students_learn_as_from_teachers_that_round(
    finished: Path, tiny_images: Path, tiny_preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rounding: None
) -> None:
    for n, more in enumerate([[], ["student.recipe.accumulate=2", "augment.recycle=1", "augment.cutmix=1"]]):
        batch = 6 if more else 12  # teachers see the same batches, so that their sums have the same order
        monkeypatch.setattr(cache_build, "BATCH", batch)
        options: dict[str, Any] = {"overrides": given(finished) + more}
        asked = fit(tiny_images, tiny_preset, tmp_path / f"asked-{n}", **options)
        read = fit(tiny_images, tiny_preset, tmp_path / f"read-{n}", cache=tmp_path / f"cache-{n}", **options)
        assert_same_weights(weights_of(read, STUDENT), weights_of(asked, STUDENT))
        assert len(shards(tmp_path / f"cache-{n}")) == (1 if more else 2)
        assert records(read, "train", "eval", "result") == records(asked, "train", "eval", "result")


def test_many_classes_are_kept_in_part(tmp_path: Path, tiny_preset: str) -> None:
    images = make_images(tmp_path / "images", train=3, val=1, classes=[f"c{n}" for n in range(8)])
    one = ["teachers.conv.recipe.epochs=1", "teachers.inv.recipe.epochs=1", "cache.top_k=2"]
    run = fit(images, tiny_preset, tmp_path / "run", overrides=one)  # a preset with a cache has it in its run
    arrays = LogitCache(run / "cache" / "seed-0", {}).read(0)
    assert arrays["conv.values"].shape == arrays["conv.classes"].shape == (24, 2)
    assert arrays["conv.others"].shape == (24,)
    assert {r["part"] for r in records(run, "result")} == {"teachers/conv", "teachers/inv", STUDENT}
    three = build_cache(run, tmp_path / "three", top_k=3)
    assert LogitCache(three / "seed-0", {}).read(0)["conv.values"].shape == (24, 3)
    with pytest.raises(UserError, match=r"the 3 largest .* -> the 2 largest"):
        build_cache(run, three)
    with pytest.raises(UserError, match=r"standardise needs .* all 8 logits, and cache\.top_k=2"):
        fit(images, tiny_preset, tmp_path / "z", overrides=[*one, "student.standardise=true"])
    assert not (tmp_path / "z").exists()


# Another run with the same teachers


def test_another_student_needs_no_teacher(
    finished: Path, tiny_images: Path, tiny_preset: str, cache: Path, tmp_path: Path, silent_teachers: None
) -> None:
    other = [*given(finished), "student.model_kwargs={embed_dim: 48, depth: 2}", "student.recipe.batch_size=8"]
    other += ["augment.smoothing=0.3", "teachers.conv.temperature=3", "student.standardise=true"]
    before = contents(cache)
    run = fit(tiny_images, tiny_preset, tmp_path / "run", overrides=other, cache=cache)
    assert contents(cache) == before
    assert records(run, "run")[0]["cache"] == str(cache)
    assert set(records(run, "train")[-1]["losses"]) == {"total", "class", "conv", "inv"}
    with pytest.raises(AssertionError, match="a teacher ran"):
        fit(tiny_images, tiny_preset, tmp_path / "live", overrides=other)


def test_more_epochs_and_seeds_are_added(finished: Path, cache: Path, tmp_path: Path) -> None:
    grown = shutil.copytree(cache, tmp_path / "cache")
    listener, again = Stopper(never), Stopper(never)
    build_cache(finished, grown, epochs=3, seeds=2, listener=listener)
    assert listener.steps == [("logit cache", n) for n in (3, 4, 5, 6)]
    assert shards(build_cache(finished, tmp_path / "at once", epochs=3, seeds=2)) == shards(grown)
    build_cache(finished, grown, epochs=3, seeds=2, listener=again)
    assert again.steps == []
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace("seed: 0", "seed: 3", 1))
    out = build_cache(run, tmp_path / "of seed 3", epochs=1, seeds=2)
    assert {path.name for path in out.iterdir()} == {"seed-3", "seed-4"}


def test_a_disk_that_is_too_small_is_named(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=500))
    with pytest.raises(UserError, match=r"2 epochs x 24 images.*: 576 B, .*500 B are free"):
        build_cache(finished, tmp_path / "other")
    assert not shards(tmp_path / "other")


def test_a_cache_of_something_else_is_refused_before_anything_is_written(
    finished: Path, tiny_images: Path, tiny_preset: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(cache)
    for override, field in (
        ("augment.shift=0.2", r"views\.shift: 0\.125 -> 0\.2"),
        ("engine.precision=bfloat16", "precision: float32 -> bfloat16"),
    ):
        with pytest.raises(UserError, match=f"seed-0' .*{field}"):
            fit(tiny_images, tiny_preset, tmp_path / "run", overrides=[override], cache=cache)
    assert not (tmp_path / "run").exists()
    other = shutil.copytree(tiny_images, tmp_path / "images")
    first, second, *_ = sorted((other / "train" / "red").iterdir())
    first.write_bytes(second.read_bytes())
    with pytest.raises(UserError, match=r"data\.files: \w{16} -> \w{16}"):
        fit(other, tiny_preset, tmp_path / "run", cache=cache)
    with pytest.raises(UserError, match=r"teachers\.conv\.weights: \w{16} -> \w{16}"):
        fit(tiny_images, tiny_preset, tmp_path / "run", overrides=["teachers.conv.recipe.epochs=1"], cache=cache)
    monkeypatch.setattr("coadvise.distill.logit_cache.VIEWS", 99)
    with pytest.raises(UserError, match=r"code\.views: 1 -> 99"):
        build_cache(finished, cache)
    with pytest.raises(UserError, match=r"cache\.top_k: None -> 32"):
        fit(tiny_images, tiny_preset, finished, cache=cache)
    assert contents(cache) == before


def test_wrong_folders_and_numbers_are_refused(
    finished: Path, tiny_images: Path, tiny_preset: str, tmp_path: Path
) -> None:
    there = contents(finished)
    (tmp_path / "file").touch()
    for place, said in ((finished, r"is a run directory .*--reuse"), (tmp_path / "file", "is a file")):
        with pytest.raises(UserError, match=said):
            fit(tiny_images, tiny_preset, tmp_path / "run", overrides=given(finished), cache=place)
        with pytest.raises(UserError, match=said):
            build_cache(finished, place)
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="is no run directory"):
        build_cache(tmp_path)
    unfinished = shutil.copytree(finished, tmp_path / "unfinished")
    shutil.rmtree(unfinished / "teachers" / "inv")
    with pytest.raises(UserError, match=r"teacher 'inv'"):
        build_cache(unfinished)
    for option in ("seeds", "epochs", "jobs", "top_k"):
        with pytest.raises(UserError, match=option):
            build_cache(finished, tmp_path / "cache", **{option: 0})
    assert not (tmp_path / "cache").exists()
    assert contents(finished) == there


# The run that uses it


def test_a_stopped_run_continues_bit_for_bit_and_only_with_a_cache(
    finished: Path, tiny_images: Path, tiny_preset: str, cache: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"overrides": given(finished)}
    whole = fit(tiny_images, tiny_preset, tmp_path / "whole", cache=cache, **options)
    run = tmp_path / "run"
    for step in (1, 3):
        stopper = Stopper(lambda part, done, step=step: (part, done) == (STUDENT, step))
        with pytest.raises(Interrupted, match=f"step {step} of 4 of {STUDENT}"):
            fit(tiny_images, tiny_preset, run, cache=cache, listener=stopper, **options)
    with pytest.raises(UserError, match="--cache DIR"):
        fit(tiny_images, tiny_preset, run, **options)
    fit(tiny_images, tiny_preset, run, cache=tmp_path / "made again", **options)
    assert_same_weights(weights_of(run, STUDENT), weights_of(whole, STUDENT))
    assert records(run, "train", "eval", "result") == records(whole, "train", "eval", "result")
    shutil.rmtree(tmp_path / "made again")  # nothing is left that needs it
    fit(tiny_images, tiny_preset, run, cache=tmp_path / "made again", **options)
    assert not (tmp_path / "made again").exists()


def test_a_damaged_shard_ends_the_run_which_continues_once_it_is_deleted(
    finished: Path, tiny_images: Path, tiny_preset: str, cache: Path, tmp_path: Path
) -> None:
    own = shutil.copytree(cache, tmp_path / "cache")
    path = own / "seed-0" / "epoch-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    options: dict[str, Any] = {"overrides": given(finished), "cache": own}
    with pytest.raises(UserError, match=f"'{path}' is damaged"):
        fit(tiny_images, tiny_preset, tmp_path / "run", **options)
    assert max(r["epoch"] for r in records(tmp_path / "run", "train") if r["part"] == STUDENT) == 1
    path.unlink()
    fit(tiny_images, tiny_preset, tmp_path / "run", **options)
    assert shards(own) == shards(cache)


def test_jobs_share_the_work(finished: Path, tiny_images: Path, tiny_preset: str, cache: Path, tmp_path: Path) -> None:
    listener = Stopper(never)
    options: dict[str, Any] = {"overrides": given(finished), "cache": tmp_path / "cache"}
    run = fit(tiny_images, tiny_preset, tmp_path / "run", jobs=2, listener=listener, reuse=finished, **options)
    assert sorted(step for part, step in listener.steps if part == "logit cache") == [1, 2]
    assert shards(tmp_path / "cache") == shards(cache)
    alone = fit(tiny_images, tiny_preset, tmp_path / "alone", cache=cache, overrides=given(finished))
    assert_same_weights(weights_of(run, STUDENT), weights_of(alone, STUDENT))
    options["cache"] = tmp_path / "none"
    fit(tiny_images, tiny_preset, tmp_path / "copied", reuse=alone, **options)
    assert not (tmp_path / "none").exists(), "students that are copied need no logits"


# Building


def test_a_stopped_build_continues(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_build, "BATCH", 10)  # three batches an epoch
    stopper = Stopper(lambda part, step: step == 7)  # in the middle of the third epoch
    with pytest.raises(Interrupted, match="2 of 4 epochs"):
        build_cache(finished, tmp_path / "cache", epochs=4, listener=stopper)
    assert len(shards(tmp_path / "cache")) == 2
    assert not list((tmp_path / "cache").rglob("*.part"))
    rest = Stopper(never)
    build_cache(finished, tmp_path / "cache", epochs=4, listener=rest)
    assert rest.steps == [("logit cache", n) for n in range(7, 13)]
    assert shards(tmp_path / "cache") == shards(build_cache(finished, tmp_path / "undisturbed", epochs=4))


def test_independent_processes_share_the_work_and_one_may_be_killed(finished: Path, tmp_path: Path) -> None:
    out, epochs = tmp_path / "cache", 40
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    arguments = command("cache", finished, "--epochs", str(epochs), "--out", out)
    first, second, third = (
        subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    )
    deadline = time.monotonic() + 300
    while len(list(out.rglob("*.safetensors"))) < 5:
        assert time.monotonic() < deadline, "it does not get going"
        time.sleep(0.02)
    first.kill()
    second.send_signal(signal.SIGTERM)
    first.communicate()
    err = second.communicate(timeout=300)[1]
    assert second.returncode in (Interrupted.exit_code, -signal.SIGTERM), err  # it may not have begun yet
    err = third.communicate(timeout=300)[1]
    assert third.returncode == 0, err
    build_cache(finished, out, epochs=epochs)  # sweeps what the killed one left, if nobody has
    assert {path.suffix for path in out.rglob("*") if path.is_file()} == {"", ".json", ".safetensors"}
    assert shards(out) == shards(build_cache(finished, tmp_path / "alone", epochs=epochs))
