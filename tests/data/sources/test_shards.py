"""Shards give the pictures, names, labels, facts and numbers of the data that were written, and name what is wrong."""

import json
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch

from coadvise.config.reading import load_config, with_cache
from coadvise.config.schema import AugmentConfig, DataConfig
from coadvise.data.loader import TrainingLoader
from coadvise.data.scan import scan
from coadvise.data.shards import place as place_module
from coadvise.data.shards.index import ROW, Kept, check_rows
from coadvise.data.shards.place import Place
from coadvise.data.shards.write import write_shards
from coadvise.data.sources import (
    Source,
    Split,
    evaluation_split,
    is_here,
    open_source,
    resolved,
    short_name,
    typical_size,
)
from coadvise.data.sources.shards import ShardSplit
from coadvise.data.views import Batch, Views
from coadvise.distill.logit_cache import fingerprint
from coadvise.errors import StorageError, UserError

SMALL = 0.012  # megabytes: about four pictures a shard


@pytest.fixture(scope="module")
def shards(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The made pictures in many shards; to be read only."""
    out = tmp_path_factory.mktemp("shards") / "made"
    write_shards(open_source(image_folder), Place(str(out)), megabytes=SMALL)
    return out


@pytest.fixture
def elsewhere(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The same behind an address, with an empty cache and without waiting between attempts."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(place_module, "WAITS", (0.0,) * 3)
    files, root = fsspec.filesystem("memory"), f"/{tmp_path.name}"
    for path in shards.rglob("*.*"):
        files.pipe_file(f"{root}/{path.relative_to(shards)}", path.read_bytes())
    yield f"shards:memory:/{root}"
    files.rm(root, recursive=True)


def opened(where: Path | str, **how: Any) -> Source:
    where = f"shards:{where}" if isinstance(where, Path) else where
    return open_source(where, DataConfig.model_validate(how))


def same_pictures(got: Source, wanted: Source) -> bool:
    assert got.classes == wanted.classes
    assert got.splits.keys() == wanted.splits.keys()
    return all(
        split.names() == other.names()
        and [split.name(index) for index in range(len(split))] == other.names()
        and split.labels.tolist() == other.labels.tolist()
        and [split.read(index) for index in range(len(split))] == [other.read(index) for index in range(len(other))]
        for split, other in zip(got.splits.values(), wanted.splits.values(), strict=True)
    )


def cached(tmp_path: Path) -> dict[str, int]:
    """The files of the cache, with their sizes."""
    return {path.name: path.stat().st_size for path in (tmp_path / "cache/coadvise/shards").glob("[!.]*")}


@pytest.mark.parametrize("how", [{}, {"exclude": ["red"]}, {"classes": {"cold": ["blue", "green"], "warm": ["red"]}}])
def test_they_hold_what_was_written(image_folder: Path, shards: Path, how: dict[str, Any]) -> None:
    folder = open_source(image_folder, DataConfig.model_validate(how))
    assert same_pictures(opened(shards, **how), folder)
    classes = folder.classes
    scored, expected = (
        evaluation_split(where, classes, DataConfig.model_validate(how)) for where in (f"shards:{shards}", image_folder)
    )
    assert scored.names() == expected.names()
    assert scored.labels.tolist() == expected.labels.tolist()


def test_a_split_that_was_made_when_they_were_written_stays(image_folder: Path, tmp_path: Path) -> None:
    for seed in (0, 3):
        source = open_source(image_folder / "train", seed=seed)
        write_shards(source, Place(str(tmp_path / str(seed))))
        assert same_pictures(opened(tmp_path / str(seed)), source)
        assert f"chosen by seed {seed}" in opened(tmp_path / str(seed)).note


def test_they_are_scanned_without_reading_a_picture(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "some"
    shutil.copytree(image_folder, folder)
    (folder / "train/red/0.png").write_bytes(b"no picture")
    wanted = scan(open_source(folder), 16, in_memory=False)
    write_shards(open_source(folder), Place(str(tmp_path / "out")), megabytes=SMALL)
    read = list[str]()
    original = ShardSplit.read

    def noted(split: ShardSplit, index: int) -> bytes:
        read.append(split.name(index))
        return original(split, index)

    monkeypatch.setattr(ShardSplit, "read", noted)
    found = scan(opened(tmp_path / "out"), 16, in_memory=False)
    assert {*read} == {"train/red/0.png"}  # why it cannot be read is only known to who tries
    for split, other in zip(found.splits.values(), wanted.splits.values(), strict=True):
        assert (split.identity, split.sha256) == (other.identity, other.sha256)
        assert (split.sizes, split.unreadable) == (other.sizes, other.unreadable)


def batches(source: Source, first: int, last: int, workers: int = 0, rank: int = 0, ranks: int = 1) -> list[Batch]:
    split = scan(source, 16, in_memory=False).train
    views = Views(split, AugmentConfig(kind="deit", mixup=0.8), len(source.classes), 16, seed=0)
    return [step[0] for step in TrainingLoader(views, 8, 1, workers, rank, ranks).steps(first, last)]


def test_in_windows_any_step_can_be_the_first_whatever_reads(shards: Path, elsewhere: str) -> None:
    whole = batches(opened(shards, window=3), 0, 9)
    for start, source, workers in ((4, opened(elsewhere, window=3), 0), (6, opened(elsewhere, window=3), 2)):
        found = batches(source, start, 9, workers)
        assert [batch.index.tolist() for batch in found] == [batch.index.tolist() for batch in whole[start:]]
        assert all(torch.equal(one.images, two.images) for one, two in zip(found, whole[start:], strict=True))
    shares = [batches(opened(shards, window=3), 2, 5, rank=rank, ranks=2) for rank in (0, 1)]
    for step, (one, two) in enumerate(zip(*shares, strict=True)):
        assert torch.equal(torch.cat([one.images, two.images]), whole[step + 2].images)


def test_a_window_of_all_gives_the_batches_of_a_folder(image_folder: Path, shards: Path) -> None:
    own, folder, windowed = (
        batches(source, 1, 6)
        for source in (opened(shards, window=99), open_source(image_folder), opened(shards, window=3))
    )
    assert all(torch.equal(one.images, two.images) for one, two in zip(own, folder, strict=True))
    assert all(torch.equal(one.labels, two.labels) for one, two in zip(own, folder, strict=True))
    assert [batch.index.tolist() for batch in own] == [batch.index.tolist() for batch in folder]
    assert [batch.index.tolist() for batch in own] != [batch.index.tolist() for batch in windowed]


def test_stored_logits_are_bound_to_the_windows_that_mix_pictures(image_folder: Path, shards: Path) -> None:
    def told(where: Path | str, **how: Any) -> dict[str, Any]:
        source = open_source(where, DataConfig.model_validate(how))
        return fingerprint(with_cache(load_config("small-images")), scan(source, 16, in_memory=False), {}, 0)

    assert told(f"shards:{shards}", window=99) == told(image_folder)
    assert told(f"shards:{shards}", window=2) != told(f"shards:{shards}", window=3) != told(image_folder)


def test_they_pickle_small_and_are_read_again(shards: Path) -> None:
    split = opened(shards).train
    again = pickle.loads(pickle.dumps(split))
    assert [again.read(index) for index in range(9)] == [split.read(index) for index in range(9)]
    assert len(pickle.dumps(split)) < 5_000


# ---- behind an address ----


def test_what_was_fetched_is_read_without_the_address(elsewhere: str, shards: Path, tmp_path: Path) -> None:
    assert same_pictures(opened(elsewhere), opened(shards))
    source = opened(elsewhere)
    root = Place(elsewhere.removeprefix("shards:"))
    for name in root.names("train"):
        root.remove(f"train/{name}")
    assert same_pictures(source, opened(shards))
    index = json.loads((shards / "index.json").read_text())
    kept = [file for split in index["splits"].values() for file in (*split["shards"], split["table"], split["names"])]
    assert cached(tmp_path) == {file["sha256"]: file["bytes"] for file in kept}


def test_a_small_cache_stays_small_and_loses_nothing(elsewhere: str, shards: Path, tmp_path: Path) -> None:
    bound = 90_000
    source = opened(elsewhere, cache_gb=bound / 1e9, window=2)
    assert sum(path.stat().st_size for path in shards.rglob("*.tar")) > 2 * bound
    expected = opened(shards).train
    for start in range(0, len(source.train), 2):
        rows = np.arange(start, start + 2)
        source.train.bring(rows, lambda: None)
        assert [source.train.read(row) for row in rows] == [expected.read(row) for row in rows]
        assert sum(cached(tmp_path).values()) <= bound
    assert source.val.read(0) == opened(shards).val.read(0)  # one picture, and no shard for it
    before = cached(tmp_path)
    source.train.read(0)
    assert cached(tmp_path) == before


def test_transient_faults_are_tried_again_and_an_outage_ends_with_a_sentence(
    elsewhere: str, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, memory = opened(elsewhere), type(fsspec.filesystem("memory"))
    original, calls = memory.cat_file, 0

    def now_and_then(self: Any, path: str, *where: Any, **bounds: Any) -> bytes:
        nonlocal calls
        calls += 1
        if calls % 3 == 1:
            raise ConnectionResetError("cut")
        content = original(self, path, *where, **bounds)
        return content[: len(content) // 2 or 1] if calls % 3 == 2 else content  # a short answer

    monkeypatch.setattr(memory, "cat_file", now_and_then)
    assert same_pictures(source, opened(shards))
    assert calls > 30

    def never(self: Any, path: str, *where: Any, **bounds: Any) -> bytes:
        raise ConnectionRefusedError("nobody there")

    shutil.rmtree(Path(place_module.os.environ["XDG_CACHE_HOME"]))
    monkeypatch.setattr(memory, "cat_file", never)
    with pytest.raises(StorageError, match=r"train/\d+.tar' cannot be reached: nobody there; .*same command"):
        elsewhere_read(source.train).bring(np.arange(4), lambda: None)
    monkeypatch.setattr("coadvise.data.sources.shards.FIRST_WAITS", (0.0,))
    with pytest.raises(UserError, match=r"nobody answers for 'memory://.*': nobody there; check the address"):
        opened(elsewhere)


def elsewhere_read(split: Split) -> Split:
    """As another process has it, which has the table and nothing open."""
    assert isinstance(split, ShardSplit)
    again = pickle.loads(pickle.dumps(split))
    again.shards.__dict__["table"] = split.shards.table
    return again


# ---- what is wrong ----


@pytest.mark.parametrize("far", [False, True])
@pytest.mark.parametrize("damage", ["truncated", "changed"])
def test_a_damaged_shard_is_named(damage: str, far: bool, shards: Path, elsewhere: str, tmp_path: Path) -> None:
    own = tmp_path / "own"
    shutil.copytree(shards, own)
    where = Place(elsewhere.removeprefix("shards:")) if far else Place(str(own))
    content = where.read("train/000001.tar")
    middle = len(content) // 2
    source = opened(elsewhere if far else own)
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    where.write("train/000001.tar", content[:-700] if damage == "truncated" else flipped)
    said = f"{len(content) - 700} bytes, should be {len(content)}" if damage == "truncated" else "sha256 differs"
    with pytest.raises(UserError, match=rf"train/000001.tar' is not what its index says \({said}\).*coadvise shard"):
        elsewhere_read(source.train).bring(np.arange(len(source.train)), lambda: None)
    where.write("train/000001.tar", content)
    source.train.bring(np.arange(len(source.train)), lambda: None)


FAULTS: dict[str, tuple[str, dict[str, Any], str]] = {
    "no shards": ("shards:{folder}/none", {}, r"no shards at '.*none' \(no index.json\); write them with"),
    "no such protocol": ("shards:nowhere://x", {}, r"'nowhere://x' is no address of shards"),
    "depth": ("shards:{shards}", {"depth": 2}, r"data.depth=2 has no use"),
    "a class": ("shards:{shards}", {"classes": ["blu", "red"]}, r"'blu', did you mean 'blue'"),
    "a sampler": ("shards:{shards}", {"balance": "sampler", "window": 2}, r"draws from all.*data.balance=loss"),
    "a small cache": ("{far}", {"cache_gb": 1e-6, "window": 2}, r"data.window=2 needs 4 shards at a time, .* GB"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_what_cannot_be_opened_is_explained(fault: str, shards: Path, elsewhere: str, tmp_path: Path) -> None:
    where, how, said = FAULTS[fault]
    with pytest.raises(UserError, match=said):
        opened(where.format(folder=tmp_path, shards=shards, far=elsewhere), **how)


@pytest.mark.parametrize(
    "change",
    [
        {"format": 9}, {"classes": 3}, {"splits": {}}, {"splits": {"train": {}, "val": {}}},
        {"splits": {"train": {"shards": [], "table": {"bytes": 1, "sha256": "../../x"}}}},
    ],
)  # fmt: skip
def test_an_index_of_something_else_is_refused(shards: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    index = json.loads((shards / "index.json").read_text())
    (tmp_path / "index.json").write_text(json.dumps({**index, **change}))
    with pytest.raises(UserError, match=r"is no index of shards that this version reads"):
        opened(tmp_path)


def test_rows_end_within_their_shard() -> None:
    rows = np.zeros(1, ROW)
    rows["offset"], rows["length"] = 900, 100
    shards = [Kept("0.tar", 1000, "0" * 64)]
    check_rows("here", rows, shards, classes=1)
    for field, value in (("length", 101), ("length", 1001), ("offset", 901), ("shard", 1), ("label", 1)):
        beyond = rows.copy()
        beyond[field] = value
        with pytest.raises(UserError, match="names places that no shard has"):
            check_rows("here", beyond, shards, classes=1)


def test_names_and_sizes_are_known_without_a_picture(shards: Path, elsewhere: str, tmp_path: Path) -> None:
    assert typical_size(elsewhere) == 16
    assert short_name(elsewhere) == tmp_path.name
    assert short_name(f"shards:{shards}/") == "made"
    assert resolved(f"shards:{shards}/../made") == f"shards:{shards}"
    assert resolved("shards:s3://bucket/a") == "shards:s3://bucket/a"
    assert [is_here(f"shards:{where}") for where in (shards, shards / "none", "s3://bucket/a")] == [True, False, False]
