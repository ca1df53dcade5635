"""How a start finds 1.3 million pictures, against torchvision's `ImageFolder`, which lists them and reads none.

The pictures are hard links to 100 JPEG files of 32 pixels, 1,000 classes in train/ and one picture a class in val/;
`--batch-size` gives another number of pictures. Every figure comes from a process of its own, one after the other. A
first start reads every header; a later start compares every file's size and times with what was kept. Memory is what a
start adds to a process that has imported everything, and what a loader process holds for itself after 20 batches of
64, less the same with 2,000 pictures. The floor is every file's size and times, and for a first start its bytes; the
names' bytes; a page of memory. Goals: a first start 20,000 images/s, a later one 15 s, 200 MB, 20 MB.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.table import Row, Setting, Table, machine

PICTURES, FEW, CLASSES, FILES = 1_300_000, 2_000, 1_000, 100
PAGE = 0.0041  # MB

# Run in a process of their own; arguments 1 and 2 are the folders of many and of few pictures. They print [seconds, MB,
# MB of a loader process].
COMMON = """
import json, multiprocessing, sys, time
from pathlib import Path
def memory(pid="self"):
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    sizes = {line.split(":")[0]: int(line.split()[1]) / 1000 for line in lines}
    return sizes["Rss"], sizes["Private_Clean"] + sizes["Private_Dirty"]
def worker_of(batches):
    for number, batch in enumerate(batches):
        if number < 16:
            own = memory(multiprocessing.active_children()[0].pid)[1]
    return own
def report(start, read):
    few = worker_of(read(start(sys.argv[2])))
    before, began = memory()[0], time.perf_counter()
    data = start(sys.argv[1])
    found = [time.perf_counter() - began, memory()[0] - before]
    print(json.dumps([*found, worker_of(read(data)) - few]))
"""
OURS = """
import numpy as np
from coadvise.config.schema import AugmentConfig
from coadvise.data.scan import scan
from coadvise.data.sources import open_source
from coadvise.data.views import Views
from coadvise.data.workers import worker_batches
def start(folder):
    return scan(open_source(folder), 32, in_memory=False)
def read(dataset):
    views = Views(dataset.train, AugmentConfig(kind="none"), len(dataset.classes), 32, seed=0)
    some = np.arange(min(64 * 20, len(views)))
    requests = [views.request(0, part) for part in np.array_split(some, -(-len(some) // 64))]
    return worker_batches(views, 1, views.split.name, sampler=requests)
report(start, read)
"""
PEER = """
import coadvise.torchvision_guard, torch
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms.functional import pil_to_tensor
def start(folder):
    return ImageFolder(Path(folder, "train"), transform=pil_to_tensor)
def read(images):
    some = torch.randperm(len(images))[: 64 * 20].tolist()
    return DataLoader(images, batch_size=64, sampler=some, num_workers=1)
report(start, read)
"""
# What no start can do without: every file's size and times; and for a first one, its bytes. Also the names.
FLOOR = """
import json, os, sys, time
names = 0
def files(folder):
    global names
    for entry in os.scandir(folder):
        if entry.is_dir():
            yield from files(entry.path)
        else:
            names += len(entry.name)
            yield entry
began = time.perf_counter()
for entry in files(sys.argv[1] + "/train"):
    entry.stat()
listed = time.perf_counter()
for entry in files(sys.argv[1] + "/train"):
    entry.stat()
    with open(entry.path, "rb", buffering=0) as file:
        file.read(65537)
print(json.dumps([listed - began, time.perf_counter() - listed, names / 2e6]))
"""


def run(setting: Setting) -> Table:
    count = setting.batch_size or PICTURES
    with tempfile.TemporaryDirectory() as folder:
        many, few, kept = (Path(folder, name) for name in ("many", "few", "kept"))
        make_links(many, count)
        make_links(few, FEW)
        listed, read, names = measured(FLOOR, many, few, kept)
        peer, first, later = (measured(COMMON + code, many, few, kept) for code in (PEER, OURS, OURS))
    rows = [
        Row("first start", "images/s", count / first[0], count / peer[0], count / read),
        Row("later start", "images/s", count / later[0], count / peer[0], count / listed),
        Row("a process, after a later start", "MB", max(0.1, later[1]), max(0.1, peer[1]), names),
        Row("a loader process", "MB", max(0.1, later[2]), max(0.1, peer[2]), PAGE),
    ]
    notes = [f"a first start took {first[0]:.1f} s and {first[1]:.0f} MB, a later one {later[0]:.1f} s"]
    about = {**machine(setting), "pictures": count, "cores": os.cpu_count() or 1}
    return Table("finding pictures at a start", "ImageFolder", rows, about, notes)


def make_links(root: Path, count: int) -> None:
    """`count` pictures in train/, 1,000 classes, one of each in val/; links, since a file may have 65,000."""
    (root / "files").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (FILES, 8, 8, 3), dtype=np.uint8)
    for number, small in enumerate(pixels):
        Image.fromarray(small).resize((32, 32)).save(root / "files" / f"{number}.jpg")
    made = 0
    for split, images in (("train", count), ("val", CLASSES)):
        for label in range(CLASSES):
            folder = root / split / f"n{label:08d}"
            folder.mkdir(parents=True)
            for number in range(label, images, CLASSES):
                os.link(root / "files" / f"{made % FILES}.jpg", folder / f"n{label:08d}_{number}.JPEG")
                made += 1


def measured(code: str, many: Path, few: Path, kept: Path) -> list[float]:
    done = subprocess.run(
        [sys.executable, "-c", code, many, few],
        env={**os.environ, "XDG_CACHE_HOME": str(kept)}, stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    return json.loads(done.stdout)
