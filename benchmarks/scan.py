"""How a start finds 1.3 million pictures, against torchvision's `ImageFolder`, which lists them and reads none.

The pictures are hard links to 100 JPEG files of 32 pixels, 1,000 classes in train/ and one picture a class in val/;
`--batch-size` gives another number of pictures. Every figure comes from a process of its own, one after the other. A
first start reads every header; a later start compares every file's size and times with what was kept. Memory is what a
start adds to a process that has imported everything, and what a loader process holds for itself after 20 batches of
64, less the same with 2,000 pictures. Goals: a first start 20,000 images/s, a later one 15 s, 200 MB, 20 MB.
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

# Run in a process of their own: argument 1 is the folder. Each prints [s, MB, MB of a loader process, processor s].
COMMON = """
import json, multiprocessing, sys, time
from pathlib import Path
def memory(pid="self"):
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    sizes = {line.split(":")[0]: int(line.split()[1]) / 1000 for line in lines}
    return sizes["Rss"], sizes["Private_Clean"] + sizes["Private_Dirty"]
"""
OURS = """
import numpy as np
from coadvise.config import AugmentConfig
from coadvise.data.scan import scan
from coadvise.data.sources import open_source
from coadvise.data.views import Views
from coadvise.data.workers import worker_batches
before, began, started = memory()[0], time.perf_counter(), time.process_time()
dataset = scan(open_source(sys.argv[1]), 32, in_memory=False)
seconds, added, used = time.perf_counter() - began, memory()[0] - before, time.process_time()
views = Views(dataset.train, AugmentConfig(kind="none"), len(dataset.classes), 32, seed=0)
requests = [views.request(0, np.arange(start, start + 64)) for start in range(0, 64 * 20, 64)]
for number, batch in enumerate(worker_batches(views, 1, views.split.name, sampler=requests)):
    if number == 15:
        worker = memory(multiprocessing.active_children()[0].pid)[1]
print(json.dumps([seconds, added, worker, used - started]))
"""
PEER = """
import coadvise.torchvision_guard, torch
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms.functional import pil_to_tensor
before, began, started = memory()[0], time.perf_counter(), time.process_time()
images = ImageFolder(Path(sys.argv[1], "train"), transform=pil_to_tensor)
seconds, added, used = time.perf_counter() - began, memory()[0] - before, time.process_time()
some = torch.randperm(len(images))[: 64 * 20].tolist()
for number, batch in enumerate(DataLoader(images, batch_size=64, sampler=some, num_workers=1)):
    if number == 15:
        worker = memory(multiprocessing.active_children()[0].pid)[1]
print(json.dumps([seconds, added, worker, used - started]))
"""


def run(setting: Setting) -> Table:
    count = setting.batch_size or PICTURES
    with tempfile.TemporaryDirectory() as folder:
        many, few, kept = (Path(folder, name) for name in ("many", "few", "kept"))
        make_links(many, count)
        make_links(few, FEW)
        peer, small_peer = (measured(PEER, place, kept) for place in (many, few))
        first, later = (measured(OURS, many, kept) for _ in range(2))
        small = measured(OURS, few, kept)
    rows = [
        Row("first start", "images/s", count / first[0], count / peer[0]),
        Row("later start", "images/s", count / later[0], count / peer[0]),
        Row("a process, after a later start", "MB", later[1], peer[1]),
        Row("a loader process", "MB", max(0.1, later[2] - small[2]), max(0.1, peer[2] - small_peer[2])),
    ]
    notes = [
        f"a {name} start took {found[0]:.1f} s, of which the processor worked {found[3]:.1f} s, and {found[1]:.0f} MB"
        for name, found in (("first", first), ("later", later))
    ]
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


def measured(code: str, folder: Path, kept: Path) -> list[float]:
    done = subprocess.run(
        [sys.executable, "-c", COMMON + code, folder],
        env={**os.environ, "XDG_CACHE_HOME": str(kept)}, stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    return json.loads(done.stdout)
