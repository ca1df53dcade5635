"""Shards on a real S3 server, behind a proxy that injects faults: nothing is lost, nothing comes twice."""

import functools
import http.server
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from s3_server import Proxy, s3_server
from tiny import ONE_EPOCH, contents, make_images, records, write_preset

from coadvise import fit
from coadvise.config.schema import AugmentConfig, DataConfig
from coadvise.data.loader import TrainingLoader
from coadvise.data.scan import scan
from coadvise.data.shards import place as place_module
from coadvise.data.shards.place import Place
from coadvise.data.shards.write import write_shards
from coadvise.data.sources import Source, open_source
from coadvise.data.views import Batch, Views
from coadvise.errors import StorageError, UserError

SMALL = 0.012  # megabytes: about four pictures a shard
FAULTS = ("500", "cut", "half", "slow")


@pytest.fixture(scope="session")
def server() -> Iterator[int]:
    with s3_server() as port:
        yield port


@pytest.fixture
def s3(server: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """The way to the server, a bucket called pictures, an empty cache, and short waits between attempts."""
    proxy = Proxy(server)
    for name, value in (
        ("AWS_ENDPOINT_URL", proxy.address), ("AWS_ACCESS_KEY_ID", "key"), ("AWS_SECRET_ACCESS_KEY", "secret"),
        ("AWS_DEFAULT_REGION", "us-east-1"), ("XDG_CACHE_HOME", str(tmp_path / "cache")),
    ):  # fmt: skip
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(place_module, "WAITS", (0.01,) * 12)
    monkeypatch.setattr("coadvise.data.sources.shards.FIRST_WAITS", (0.01,) * 8)
    monkeypatch.setattr("coadvise.data.shards.write.FIRST_WAITS", (0.01,) * 8)
    forget()
    files, _ = place_module._file_system(place_module.os.getpid(), "s3://pictures")
    if files.exists("pictures"):
        files.rm("pictures", recursive=True)
    files.mkdir("pictures")
    proxy.seen.clear()
    yield proxy
    proxy.close()
    forget()


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("pictures"), train=12, val=6)


def forget() -> None:
    """The connections of this process, as if it began now."""
    place_module._file_system.cache_clear()


def opened(**how: object) -> Source:
    return open_source("shards:s3://pictures/set", DataConfig.model_validate(how))


def written(folder: Path, url: str = "s3://pictures/set") -> None:
    assert write_shards(open_source(folder), Place(url), megabytes=SMALL).missing == 0


def epochs(source: Source, workers: int) -> list[Batch]:
    split = scan(source, 16, in_memory=False).train
    views = Views(split, AugmentConfig(kind="deit", mixup=0.8), len(source.classes), 16, seed=0)
    return [step[0] for step in TrainingLoader(views, 6, workers=workers).steps(0, 12)]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("workers", [0, 2])
def test_nothing_is_lost_and_nothing_comes_twice(
    fault: str, workers: int, s3: Proxy, folder: Path, tmp_path: Path
) -> None:
    """Every third request meets a fault, while they are written and while they are read, with a cache of few."""
    s3.fault = lambda number, method, path: fault * (number % 3 == 1)
    written(folder)
    written(folder, str(tmp_path / "local"))
    local = contents(tmp_path / "local")
    place = Place("s3://pictures/set")
    assert {name: place.read(name) for name in local} == local
    source, expected = (
        opened(window=2, cache_gb=90e-6),
        open_source(f"shards:{tmp_path / 'local'}", DataConfig(window=2)),
    )
    found = epochs(source, workers)
    for one, other in zip(found, epochs(expected, 0), strict=True):
        assert one.index.tolist() == other.index.tolist()
        assert torch.equal(one.images, other.images)
    for epoch in (found[:6], found[6:]):
        assert sorted(torch.cat([batch.index for batch in epoch]).tolist()) == [*range(36)]
    kept = [path.stat().st_size for path in (tmp_path / "cache/coadvise/shards").glob("[!.]*")]
    assert sum(kept) <= 90_000
    assert [source.val.read(row) for row in range(18)] == [expected.val.read(row) for row in range(18)]
    assert sum(met == fault for *_, met in s3.seen) > 20


def test_a_run_ends_in_an_outage_and_goes_on_to_the_numbers_of_one_without(
    s3: Proxy, folder: Path, tmp_path: Path
) -> None:
    written(folder)
    preset = write_preset(tmp_path)
    words = ["augment.kind=deit", "augment.rand_augment=''", "data.workers=1", "engine.checkpoint_seconds=0.001"]
    words += ["data.window=2", "data.cache_gb=0.00009", *ONE_EPOCH]  # fetched again for each network
    write_shards(open_source(folder), Place(str(tmp_path / "local")), megabytes=SMALL)
    whole = fit(f"shards:{tmp_path / 'local'}", preset, tmp_path / "whole", overrides=words, jobs=1)
    s3.fault = lambda number, method, path: "cut" if path.endswith(".tar") and number > began + 25 else ""
    began = len(s3.seen)
    data = {"data": "shards:s3://pictures/set", "preset": preset, "out": tmp_path / "run", "jobs": 1}
    with pytest.raises(StorageError, match=r"/\d+.tar' cannot be reached: .*run the same command again") as end:
        fit(**data, overrides=words)
    assert end.value.exit_code == 74
    s3.fault = lambda number, method, path: ""
    run = fit(**data, overrides=words)
    for kind in ("train", "eval", "result"):
        assert records(run, kind) == records(whole, kind)


def test_what_cannot_be_used_is_refused_before_anything_is_written(
    s3: Proxy, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preset, out = write_preset(tmp_path), tmp_path / "run"

    def refused(said: str, data: str = "shards:s3://pictures/set") -> None:
        with pytest.raises(UserError, match=said):
            fit(data, preset, out)
        assert not out.exists()

    refused(r"no shards at 's3://pictures/set' \(no index.json\)")
    refused(r"no shards at 's3://no-such-bucket/x'", "shards:s3://no-such-bucket/x")
    written(folder)
    s3.fault = lambda number, method, path: "403"
    refused(r"'s3://pictures/set' may not be read: .*your credentials")
    with pytest.raises(UserError, match=r"'s3://pictures/other' may not be written"):
        written(folder, "s3://pictures/other")
    s3.fault = lambda number, method, path: "403" if path.endswith(".table") else ""
    refused(r"the index of 's3://pictures/set' cannot be read: .*train.table' may not be read")
    s3.fault = lambda number, method, path: ""
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    forget()
    refused(r"nobody answers for 's3://pictures/set': Could not connect.*check the address and the network")
    with pytest.raises(UserError, match=r"no shards can be written: .*Could not connect"):
        written(folder)


def test_a_run_has_the_numbers_of_one_on_the_folder_and_refuses_shards_of_other_data(
    s3: Proxy, folder: Path, tmp_path: Path
) -> None:
    data = {"data": "shards:s3://pictures/set", "preset": write_preset(tmp_path), "out": tmp_path / "run", "jobs": 1}
    written(folder)
    fit(**data, baseline=True)
    fit(folder, data["preset"], tmp_path / "folder", jobs=1, baseline=True)
    for kind in ("train", "eval", "result"):
        assert records(tmp_path / "run", kind) == records(tmp_path / "folder", kind)
    before = contents(tmp_path / "run")
    place = Place("s3://pictures/set")
    for name in ("", "train/", "val/"):
        for file in place.names(name):
            place.remove(name + file)
    written(make_images(tmp_path / "others", train=13, val=6))
    with pytest.raises(UserError, match=r"3 added.*--out"):
        fit(**data, baseline=True)
    assert contents(tmp_path / "run") == before


def test_a_cut_off_object_is_named(s3: Proxy, folder: Path) -> None:
    written(folder)
    place = Place("s3://pictures/set")
    content = place.read("train/000001.tar")
    place.write("train/000001.tar", content[:-700])
    with pytest.raises(
        UserError, match=rf"000001.tar' is not what its index says \({len(content) - 700} bytes, should"
    ):
        opened().train.bring(np.arange(36), lambda: None)


@pytest.mark.parametrize("ranges", [False, True])
def test_shards_are_read_from_a_web_server(ranges: bool, s3: Proxy, folder: Path, tmp_path: Path) -> None:
    """Python's own knows no ranges; moto serves a public bucket by http with them."""
    if ranges:
        written(folder)
        files, _ = place_module._file_system(place_module.os.getpid(), "s3://pictures")
        for path in files.find("pictures"):
            files.chmod(path, acl="public-read")
        _same_by_http(f"{s3.address}/pictures/set", folder)
        return
    written(folder, str(tmp_path / "set"))
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{web.server_address[1]}/set"
        _same_by_http(address, folder)
        with pytest.raises(UserError, match="such an address can only be read"):
            written(folder, address + "/below")
        web.shutdown()
    shutil.rmtree(tmp_path / "set")
    with pytest.raises(UserError, match="nobody answers"):
        open_source(f"shards:{address}")


def _same_by_http(address: str, folder: Path) -> None:
    found, expected = open_source(f"shards:{address}"), open_source(folder)
    for split, other in zip(found.splits.values(), expected.splits.values(), strict=True):
        assert split.names() == other.names()
        assert [split.read(row) for row in range(len(split))] == [other.read(row) for row in range(len(other))]
