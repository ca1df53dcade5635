"""How teachers' logits are stored, and how a cache that is damaged or has other contents is noticed."""

import json
import math
import multiprocessing
import os
import resource
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import CLASSES

from coadvise.config.reading import changes, load_config
from coadvise.config.schema import RunConfig
from coadvise.data.scan import scan
from coadvise.data.scanned import Dataset
from coadvise.data.sources import open_source
from coadvise.distill.logit_cache import CACHE, Form, LogitCache, fingerprint
from coadvise.errors import StorageError, UserError
from coadvise.models.network import Network, build_network

FINGERPRINT = {"data": {"images": 3}, "views": {"flip": True, "seed": 0}, "stored": "float16"}
ARRAYS = {"conv": np.arange(12, dtype=np.float16).reshape(3, 4), "inv": np.ones((3, 4), np.float16)}


@pytest.fixture
def cache(tmp_path: Path) -> LogitCache:
    cache = LogitCache(tmp_path / "cache" / "seed-0", FINGERPRINT)
    cache.create()
    return cache


def store(cache: LogitCache, epoch: int) -> bool:
    with cache.claim(epoch) as file:
        if file is not None:
            cache.write(epoch, file, ARRAYS)
        return file is not None


def names(cache: LogitCache) -> set[str]:
    return {path.name for path in cache.folder.iterdir()} - {".lock"}


@given(st.one_of(st.integers(2, 2000), st.just(70_000)), st.integers(1, 40), st.integers(1, 9), st.integers(0, 99))
def test_logits_are_read_as_they_were_in_half_precision(classes: int, top_k: int, rows: int, seed: int) -> None:
    logits = 8 * torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed))
    form = Form(classes, top_k)
    arrays = form.pack("conv", logits)
    assert sum(array.nbytes for array in arrays.values()) == rows * form.bytes_an_answer
    some = np.random.default_rng(seed).integers(0, rows, 5)
    got, wanted = form.unpack("conv", arrays, some), logits[some].half().float()
    assert got.dtype == torch.float32
    assert form.bytes_an_answer <= 2 * classes, "never larger than all of it"
    if form.dense:
        assert torch.equal(got, wanted)
        return
    kept = logits[some].topk(top_k).indices
    assert torch.equal(got.gather(1, kept), wanted.gather(1, kept))
    others = torch.ones_like(got, dtype=torch.bool).scatter_(1, kept, False)
    assert (got[others].view(5, -1).max(1).values == got[others].view(5, -1).min(1).values).all()
    mass, wanted_mass = ((logits.softmax(1) * others).sum(1) for logits in (got, logits[some]))
    torch.testing.assert_close(mass, wanted_mass, rtol=0.02, atol=1e-4)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_cannot_be_stored_are_an_error(value: float) -> None:
    logits = torch.zeros(4, 3)
    logits[2, 1] = value
    with pytest.raises(UserError, match=r"teacher 'inv' has logits that are no numbers"):
        Form(3, 32).pack("inv", logits)


@pytest.mark.parametrize("classes", [3, 50])
def test_logits_too_large_for_float16_keep_their_probabilities(classes: int) -> None:
    logits = torch.randn(4, classes, generator=torch.Generator().manual_seed(0))
    logits[1] *= 1e6
    logits[2] -= 1e5
    logits[3] += 3_000  # float16 would keep even numbers alone
    form, rows = Form(classes, 3), np.arange(4)
    found = form.unpack("inv", form.pack("inv", logits), rows)
    torch.testing.assert_close(found.softmax(1).amax(1), logits.softmax(1).amax(1), rtol=0.05, atol=0)
    assert torch.equal(found.argmax(1), logits.argmax(1))
    assert torch.equal(found[:1], form.unpack("inv", form.pack("inv", logits[:1]), rows[:1]))
    assert found[0].max() == logits[0].max().half(), "what fits is stored as it is"


def test_what_is_stored_is_read_again_and_not_stored_twice(cache: LogitCache) -> None:
    assert cache.missing(3) == [0, 1, 2]
    assert store(cache, 1)
    assert not store(cache, 1)
    assert cache.missing(3) == [0, 2]
    for name, array in cache.read(1).items():
        assert array.dtype == np.float16
        assert np.array_equal(array, ARRAYS[name])
    assert names(cache) == {CACHE, "epoch-00001.safetensors"}
    cache.create()
    assert cache.missing(3) == [0, 2], "creating it again changes nothing"


def test_what_differs_is_named(cache: LogitCache) -> None:
    other = LogitCache(cache.folder, {**FINGERPRINT, "views": {"flip": False, "seed": 0}, "data": {"images": 4}})
    for ask in (other.check, other.create):
        with pytest.raises(UserError, match=r"data\.images: 3 -> 4; views\.flip: True -> False"):
            ask()
    with pytest.raises(UserError, match=r"contents: views\.flip"):
        other.check(["views"])
    other.check(["stored"])


def test_a_cache_of_other_contents_is_emptied_and_nothing_else_deleted(cache: LogitCache) -> None:
    for epoch in (0, 3):
        store(cache, epoch)
    (cache.folder / "notes.txt").write_text("mine")
    (cache.folder / ".epoch-00001.part").write_bytes(b"left by a process that was killed")
    cache.reset()
    assert cache.missing(4) == [1, 2], "it has these contents: nothing to empty"
    other = LogitCache(cache.folder, {**FINGERPRINT, "data": {"images": 4}})
    with cache.claim(2) as file:
        assert file is not None
        other.reset()
        assert names(cache) == {"notes.txt", ".epoch-00002.part"}
        (cache.folder / "notes.txt").unlink()
        file.close()
    other.create()
    with pytest.raises(UserError, match=r"has other contents: data\.images: 4 -> 3"):
        store(cache, 1)  # by a process that began before
    assert store(other, 1)
    (cache.folder / "notes.txt").write_text("mine")
    (cache.folder / CACHE).unlink()
    with pytest.raises(UserError, match="is not a logit cache"):
        other.reset()
    assert names(other) == {"notes.txt", "epoch-00001.safetensors"}


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda data: data[:-1], r"\d+ bytes, should be \d+"),
        (lambda data: data[:-1] + bytes([data[-1] ^ 1]), "its contents changed"),
    ],
)
def test_a_damaged_shard_is_named_and_made_again_once_it_is_deleted(change, fault: str, cache: LogitCache) -> None:
    store(cache, 0)
    path = cache.shard(0)
    whole = path.read_bytes()
    path.write_bytes(change(whole))
    with pytest.raises(UserError, match=f"'{path}' is damaged: {fault}.*; delete this file and run again"):
        cache.read(0)
    if "bytes" in fault:  # found before anything is trained
        with pytest.raises(UserError, match=f"'{path}' is damaged: {fault}"):
            cache.missing(1)
    path.unlink()
    assert cache.missing(1) == [0]
    assert store(cache, 0)
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    "text",
    ["{", '{"format": 1, "fingerprint": []}', '{"format": 1, "fingerprint": {}, "shards": {"x": {}}}', '{"format": 9}'],
)
def test_a_damaged_or_newer_cache_file_is_named(text: str, cache: LogitCache) -> None:
    (cache.folder / CACHE).write_text(text)
    with pytest.raises(UserError, match=f"{CACHE}' (cannot be read|has format 9)"):
        cache.check()
    assert (cache.folder / CACHE).read_text() == text


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years")
    for folder in (tmp_path, tmp_path / "thesis.txt"):
        with pytest.raises(UserError, match="exists and is not a logit cache"):
            LogitCache(folder, FINGERPRINT).check()
    with pytest.raises(UserError, match=r"thesis.txt/seed-0' cannot be written: Not a directory"):
        LogitCache(tmp_path / "thesis.txt" / "seed-0", FINGERPRINT).create()
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """Files cannot grow beyond so many bytes: the system refuses a write in its middle, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_where_the_disk_is_full_nothing_half_written_is_left(cache: LogitCache) -> None:
    store(cache, 0)
    before = {path: path.read_bytes() for path in cache.folder.iterdir()}
    for size in (100, cache.shard(0).stat().st_size):  # too little for the shard; enough for it, not for cache.json
        with full_disk(size), pytest.raises(StorageError, match=r"cannot write .*: File too large; .*make room"):
            store(cache, 1)
        assert {path: path.read_bytes() for path in cache.folder.iterdir()} == before
    assert store(cache, 1)


def test_a_shard_is_on_the_disk_and_listed_before_it_has_its_name(
    cache: LogitCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def synced(descriptor: int) -> None:
        order.append(Path(f"/proc/self/fd/{descriptor}").resolve().name)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "rename", lambda self, to: (order.append(f"-> {to.name}"), rename(self, to))[1])
    assert store(cache, 0)
    folder, shard = cache.folder.name, cache.shard(0).name
    assert order == [".epoch-00000.part", f".{CACHE}.part", f"-> {CACHE}", folder, f"-> {shard}"]


def test_the_fingerprint_has_all_that_the_numbers_depend_on(
    tiny_images: Path, tiny_preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(tiny_preset, ["cache.top_k=32"])
    dataset = scan(open_source(tiny_images), 16, in_memory=True)
    network = build_network(config.teachers["conv"], CLASSES, 16, seed=0)

    def taken(config: RunConfig = config, dataset: Dataset = dataset, seed: int = 0, **about: Any) -> dict[str, Any]:
        Network(network.model, {**network.about, **about}).save(tmp_path / "conv")
        return fingerprint(config, dataset, {"conv": tmp_path / "conv"}, seed)

    def differing(other: dict[str, Any]) -> list[str]:
        return [line.partition(":")[0] for line in changes(before, other)]

    before, train = taken(), dataset.train
    assert differing(taken()) == []
    data = config.data.model_copy(update={"presize": 32})
    assert differing(taken(config.model_copy(update={"data": data}))) == ["views.presize"]
    there = config.data.model_copy(update={"views": "device"})
    assert differing(taken(config.model_copy(update={"data": there}))) == ["views.on_device"]
    assert differing(taken(seed=1)) == ["views.seed"]
    sized = config.data.model_copy(update={"image_size": (16, 24)})
    assert differing(taken(config.model_copy(update={"data": sized}))) == ["views.image_size"]
    assert differing(taken(dataset=replace(dataset, train=replace(train, fit="pad")))) == ["views.fit"]
    assert differing(taken(dataset=replace(dataset, train=replace(train, values=(0, 9))))) == ["views.value_range"]
    large = replace(train, sizes=train.sizes + Counter({(6016, 4016): 1}))
    assert differing(taken(dataset=replace(dataset, train=large))) == ["views.reduced"]
    renamed = replace(dataset, source=replace(dataset.source, classes=(*CLASSES[:2], "rot")))
    assert differing(taken(dataset=renamed)) == ["data.classes"]
    relabelled = replace(dataset, train=replace(train, labels=train.labels[::-1]))
    assert differing(taken(dataset=relabelled)) == ["data.labels"]
    for about in ({"mean": [0.1, 0.2, 0.3]}, {"std": [0.1, 0.2, 0.3]}, {"classes": CLASSES[::-1]}, {"model": "other"}):
        assert differing(taken(**about)) == [f"teachers.conv.{name}" for name in about]
    for library in ("coadvise", "pillow", "timm", "torch", "torchvision"):
        with monkeypatch.context() as patch:
            patch.setattr(
                "coadvise.distill.logit_cache.version", lambda name, new=library: "9" if name == new else version(name)
            )
            assert differing(taken()) == [f"code.{library}"]


def test_an_epoch_is_one_process_s_until_it_dies(cache: LogitCache) -> None:
    context = multiprocessing.get_context("fork")
    holding = context.Event()

    def hold() -> None:
        with cache.claim(0) as file:
            assert file is not None
            file.write(b"half")
            holding.set()
            time.sleep(600)

    process = context.Process(target=hold)
    process.start()
    assert holding.wait(60)
    assert not store(cache, 0)
    cache.sweep()
    assert ".epoch-00000.part" in names(cache), "another process is writing it"
    assert store(cache, 1)
    process.kill()
    process.join()
    assert ".epoch-00000.part" in names(cache)
    cache.sweep()
    assert names(cache) == {CACHE, "epoch-00001.safetensors"}
    assert store(cache, 0)
    assert cache.missing(2) == []


def test_what_a_killed_process_left_does_not_count_as_stored(cache: LogitCache) -> None:
    (cache.folder / ".epoch-00000.part").write_bytes(b"x" * 1000)
    assert store(cache, 0)
    assert np.array_equal(cache.read(0)["conv"], ARRAYS["conv"])
    contents = json.loads((cache.folder / CACHE).read_text())
    contents["shards"]["epoch-00001.safetensors"] = {"bytes": 5, "sha256": "0"}  # listed, but not there yet
    (cache.folder / CACHE).write_text(json.dumps(contents))
    assert cache.missing(2) == [1]
    assert store(cache, 1)
    assert cache.missing(2) == []
