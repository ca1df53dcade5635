"""Shards against the folder they were written from: bytes alone, and training views, by one process with one thread.

Pictures are made as in `loader.py` (JPEGs of 500 x 375 pixels); `SHARDS_DATA` names a folder to take instead. Views are
DeiT's at 128 pixels. Shards have one megabyte, so that a small set has several windows of four.

    bytes               every picture's bytes in the order of an epoch, files in the page cache
    bytes, cold         the same after the system was told to forget the files' contents
    views, views, cold  the same with decoding, cropping and all else
    views, presized     shards of pictures whose shorter side is 160 pixels, in the page cache
    S3, first epoch     views from an S3 server on this machine (moto, a process of its own), nothing cached yet
    S3, later epochs    the same from the cache on the disk

The peer is the folder. The floor of bytes is reading the tar files from end to end, that of views decoding and cropping
alone. Goals: 1.2 times the folder from local shards, 0.8 from the server. Without moto and s3fs the last two are left
out.
"""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.loader import crops, photographs
from benchmarks.table import Row, Setting, Table, machine
from coadvise.config.schema import AugmentConfig, DataConfig
from coadvise.data.loader import TrainingLoader
from coadvise.data.scan import scan
from coadvise.data.shards.place import Place
from coadvise.data.shards.write import write_shards
from coadvise.data.sources import open_source
from coadvise.data.views import Views
from coadvise.evaluation.speed import interleaved
from coadvise.machine import keep_freed_memory

BATCH_SIZE, BATCHES = 64, 8
SIZE, PRESIZE, MEGABYTES, WINDOW = 128, 160, 1.0, 4
FAR = "shards:s3://pictures/set"
Call = Callable[[], object]


def views_of(data: str | Path) -> Views:
    """Views of DeiT's kind, of shards in windows."""
    source = open_source(data, DataConfig(window=WINDOW))
    split = scan(source, SIZE, in_memory=False).train
    return Views(split, AugmentConfig(kind="deit", erase=0.25), len(source.classes), SIZE, seed=0)


def bytes_of(views: Views) -> Call:
    order = views.order(0)

    def call() -> None:
        for start in range(0, len(order), BATCH_SIZE):
            rows = order[start : start + BATCH_SIZE]
            views.split.split.bring(rows, lambda: None)
            for row in rows.tolist():
                views.split.read(row)

    return call


def epoch_of(views: Views, batch_size: int) -> Call:
    loader = TrainingLoader(views, batch_size)
    return lambda: [None for _ in loader.steps(0, loader.steps_per_epoch)]


def cold(call: Call, folder: Path) -> Call:
    """After the system has forgotten what is in the files of a folder. What it takes to forget is counted."""
    files = [path for path in folder.rglob("*") if path.is_file()]

    def cold_call() -> None:
        for path in files:
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)
        call()

    return cold_call


def end_to_end(folder: Path) -> Call:
    return lambda: [path.read_bytes() for path in folder.glob("train/*.tar")]


def from_nothing(data: str, batch_size: int, cache: Path) -> Call:
    """The first epoch of a run whose node has nothing of the shards, from opening them on."""

    def first_call() -> None:
        for path in (cache / "coadvise/shards").glob("*"):
            path.unlink()
        epoch_of(views_of(data), batch_size)()

    return first_call


@contextmanager
def s3_server(cache: Path) -> Iterator[None]:
    """moto in a process of its own, with a bucket called pictures; the environment leads there."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-p", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }  # fmt: skip
    try:
        import s3fs

        for _ in range(100):
            try:
                s3fs.S3FileSystem(skip_instance_cache=True).mkdir("pictures")
                break
            except Exception:  # it is not there yet
                time.sleep(0.2)
        yield
    finally:
        server.terminate()
        server.wait()


def measured(setting: Setting, root: Path, cache: Path) -> tuple[list[Row], int]:
    batch_size = setting.batch_size or BATCH_SIZE
    given = os.environ.get("SHARDS_DATA")
    data = Path(given) if given else root / "photographs"
    source = open_source(data) if given else photographs(data, BATCHES * batch_size)
    local, small = root / "local", root / "small"
    write_shards(source, Place(str(local)), megabytes=MEGABYTES)
    write_shards(source, Place(str(small)), presize=PRESIZE, megabytes=MEGABYTES)
    folder, shards = views_of(data), views_of(f"shards:{local}")
    count = len(folder) // batch_size * batch_size
    paths = [data / folder.split.name(row) for row in range(len(folder))]
    bare = {"folder bytes": bytes_of(folder), "shards bytes": bytes_of(shards), "end": end_to_end(local)}
    full = {"folder": epoch_of(folder, batch_size), "shards": epoch_of(shards, batch_size)}
    calls: dict[str, Call] = {
        **bare,
        **full,
        "cold folder bytes": cold(bare["folder bytes"], data),
        "cold shards bytes": cold(bare["shards bytes"], local),
        "cold end": cold(bare["end"], local),
        "cold folder": cold(full["folder"], data),
        "cold shards": cold(full["shards"], local),
        "presized": epoch_of(views_of(f"shards:{small}"), batch_size),
        "decoding": crops(lambda: (np.array(Image.open(path).convert("RGB")) for path in paths)),
    }
    if find_spec("s3fs") and find_spec("moto"):
        with s3_server(cache):
            write_shards(source, Place(FAR.removeprefix("shards:")), megabytes=MEGABYTES)
            far = views_of(FAR)
            calls["S3 first"] = from_nothing(FAR, batch_size, cache)
            calls["S3 later"] = epoch_of(far, batch_size)
            seconds = interleaved(calls, setting.repeats, lambda: None)
    else:
        seconds = interleaved(calls, setting.repeats, lambda: None)

    def row(name: str, ours: str, peer: str, floor: str, goal: float) -> Row:
        pictures = len(folder) if "bytes" in peer else count
        ends = len(folder) / seconds[floor]
        return Row(name, "images/s", pictures / seconds[ours], pictures / seconds[peer], ends, goal)

    rows = [
        row("bytes", "shards bytes", "folder bytes", "end", 1.2),
        row("bytes, cold", "cold shards bytes", "cold folder bytes", "cold end", 1.2),
        row("views", "shards", "folder", "decoding", 1.2),
        row("views, cold", "cold shards", "cold folder", "decoding", 1.2),
        row("views, presized", "presized", "folder", "decoding", 1.2),
    ]
    if "S3 first" in seconds:
        rows.append(row("S3, first epoch", "S3 first", "folder", "decoding", 0.8))
        rows.append(row("S3, later epochs", "S3 later", "folder", "decoding", 0.8))
    return rows, len(folder)


def run(setting: Setting) -> Table:
    threads, kept = torch.get_num_threads(), dict(os.environ)
    keep_freed_memory()
    torch.set_num_threads(1)
    root = Path(tempfile.mkdtemp())
    try:
        os.environ["XDG_CACHE_HOME"] = str(root / "cache")
        rows, count = measured(setting, root, root / "cache")
        about = {**machine(setting), "batch": setting.batch_size or BATCH_SIZE, "pictures": count, "workers": 0}
    finally:
        shutil.rmtree(root)
        os.environ.clear()
        os.environ |= kept
        torch.set_num_threads(threads)
    return Table("pictures in shards against a folder of files", "folder", rows, about)
