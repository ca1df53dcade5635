"""Datasets of Hugging Face: saved to disk, in Parquet or Arrow files, and by name; what is wrong with them."""

import hashlib
import io
import json
import os
import pickle
import re
import subprocess
import sys
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, List, Value, load_dataset
from PIL import Image as Pillow
from tiny import ONE_EPOCH, make_images, records, run_program

from coadvise import fit
from coadvise.config.reading import read_config, with_cache
from coadvise.config.schema import DataConfig
from coadvise.data.loader import still_batches
from coadvise.data.scan import scan, scan_split
from coadvise.data.sources import (
    Source,
    evaluation_remarks,
    evaluation_split,
    open_source,
    resolved,
    short_name,
    source_of,
    typical_size,
)
from coadvise.distill.logit_cache import fingerprint
from coadvise.errors import UserError
from coadvise.runs.evaluate import evaluate_run
from coadvise.runs.fit import describe

IMAGE, LABEL = Image(), ClassLabel(names=["dog", "cat"])
STRUCT = {"bytes": Value("binary"), "path": Value("string")}  # an image to tools other than `datasets`
Columns = Mapping[str, tuple[Any, list[Any]]]  # a feature and the values, by name


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `datasets` makes of Parquet files goes to a folder of the test."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


def opened(data: str | Path, **how: Any) -> Source:
    return open_source(data, DataConfig.model_validate(how), 0)


def image(number: int, path: str | None = None) -> dict[str, Any]:
    buffer = io.BytesIO()
    Pillow.new("RGB", (8, 12), (number, 0, 0)).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": path}


def images(count: int, first: int = 0) -> list[dict[str, Any]]:
    return [image(number) for number in range(first, first + count)]


def dataset(columns: Columns) -> Dataset:
    values = {name: column for name, (_, column) in columns.items()}
    return Dataset.from_dict(values, Features({name: feature for name, (feature, _) in columns.items()}))


def in_turn(count: int, first: int = 0) -> Dataset:
    """Dogs and cats in turn, without paths."""
    return dataset({"image": (IMAGE, images(count, first)), "label": (LABEL, [n % 2 for n in range(count)])})


def saved(data: Dataset | Mapping[str, Dataset], folder: Path) -> Path:
    (data if isinstance(data, Dataset) else DatasetDict(data)).save_to_disk(str(folder))
    return folder


def labels(source: Source) -> dict[str, str]:
    """The label of each picture by its name."""
    splits = [split for split in (source.train, source.val, source.test) if split is not None]
    return {split.name(i): source.classes[split.labels[i]] for split in splits for i in range(len(split))}


def three_splits() -> dict[str, Dataset]:
    return {"train": in_turn(8), "validation": in_turn(4, 8), "test": in_turn(2, 12)}


def test_a_folder_its_tables_and_its_datasets_train_the_same_networks(tmp_path: Path, tiny_preset: str) -> None:
    """For the same pictures in the same order, metrics are equal bit by bit, and so is a logit cache's fingerprint."""
    folder = make_images(tmp_path / "data")
    table = folder / "t.csv"
    rows = [f"{p.relative_to(folder)},{p.parent.name},{p.parent.parent.name}" for p in folder.rglob("*.png")]
    table.write_text("\n".join(["path,label,split", *rows]))
    Dataset.from_csv(str(table)).to_parquet(str(folder / "t.parquet"))
    hub = load_dataset("imagefolder", data_dir=str(folder))
    for name, part in hub.items():
        part.shuffle(seed=1).to_parquet(str(tmp_path / "shards" / f"{name}-00000-of-00001.parquet"))
    sources = {
        "folder": str(folder), "table": str(table), "parquet": str(folder / "t.parquet"),
        "saved": str(saved(hub, tmp_path / "saved")), "shards": f"hf:{tmp_path / 'shards'}",
    }  # fmt: skip
    found = {}
    for name, data in sources.items():
        out = tmp_path / "runs" / name
        run = fit(data, tiny_preset, out, overrides=ONE_EPOCH, jobs=2 if name == "saved" else 1)
        config = read_config(run / "config.yaml")
        pictures = scan(source_of(config), config.data.image_size, config.in_memory)
        teachers = {teacher: run / "teachers" / teacher for teacher in config.teachers}
        found[name] = (
            sorted(records(run, "train", "eval", "result", "verdict"), key=lambda record: record.get("part", "")),
            fingerprint(with_cache(config), pictures, teachers, 0),
            evaluate_run(run, data)["parts"],
        )
    assert found["folder"][0]
    assert [name for name in found if found[name] != found["folder"]] == []


def test_three_splits_in_any_form_are_the_same_source(tmp_path: Path) -> None:
    splits = three_splits()
    for name, part in splits.items():
        (tmp_path / "folders" / name).mkdir(parents=True)
        part.to_parquet(str(tmp_path / "folders" / name / "0000.parquet"))
        part.to_parquet(str(tmp_path / "hub" / "data" / f"{name}-00000-of-00001.parquet"))
    whole = saved(splits, tmp_path / "saved")
    (tmp_path / "arrow [1]").mkdir()
    for name in splits:
        (whole / name / "data-00000-of-00001.arrow").rename(tmp_path / "arrow [1]" / f"pets-{name}.arrow")
    saved(splits, tmp_path / "saved again")
    for data in ("folders", "hub", "arrow [1]", "saved again"):
        source = opened(tmp_path / data)
        assert source.where == str(tmp_path / data)
        assert source.classes == ("cat", "dog")
        assert source.note == "trained on train, scored on test, learning curves on validation"
        assert source.train.names() == [f"train/00000{row}" for row in (1, 3, 5, 7, 0, 2, 4, 6)]
        assert source.train.labels.tolist() == [0] * 4 + [1] * 4
        assert [source.train.read(i) for i in (0, 7)] == [image(1)["bytes"], image(6)["bytes"]]
        assert (len(source.val), source.test is not None and source.test.names()) == (4, ["test/000001", "test/000000"])
        assert evaluation_split(tmp_path / data, ("cat", "dog")).names() == ["test/000001", "test/000000"]
        assert evaluation_remarks(tmp_path / data) == source.remarks == ()
        assert typical_size(tmp_path / data) == 8
    other = opened(tmp_path / "saved again", splits={"train": "validation", "val": "train"})
    assert other.note == "trained on validation, scored on train"
    assert "'test' (2 rows)" in other.remarks[0]


def test_one_split_is_divided_and_a_column_of_splits_is_used(tmp_path: Path) -> None:
    rows = {"image": (IMAGE, images(10)), "label": (LABEL, [0, 1] * 5)}
    source = opened(saved(dataset(rows), tmp_path / "one"), val_fraction=0.2)
    assert (len(source.train), len(source.val), source.note[:24]) == (8, 2, "no splits in the dataset")
    for kind, where in ((Value("string"), "a"), (ClassLabel(names=["dev", "train"]), "b")):
        splits = ["dev", "train", *["train"] * 8]
        split_rows = {**rows, "split": (kind, splits)}
        source = opened(saved(dataset(split_rows), tmp_path / where))
        assert source.note == "trained on train, scored on dev"
        assert source.val.names() == ["dev/000000"]
    bad = saved(dataset({**rows, "split": (Value("string"), ["fold1"] * 10)}), tmp_path / "bad")
    with pytest.raises(UserError, match=r"'fold1' in 10 row.*; usual are train, val and test.*data.splits"):
        opened(bad)
    with pytest.raises(UserError, match=r"'fold1', so none to score on"):
        evaluation_split(bad, ("cat", "dog"))


def test_pictures_have_their_stored_paths_as_names_and_are_in_their_order(tmp_path: Path) -> None:
    paths = ["b.png", "a/2.png", "a-b/1.png", "c.png"]
    rows = {"image": (STRUCT, [image(i, path) for i, path in enumerate(paths)]), "label": (LABEL, [0, 0, 0, 1])}
    everything = evaluation_split(saved(dataset(rows), tmp_path / "unique"), ("dog", "cat"))
    assert everything.names() == ["a/2.png", "a-b/1.png", "b.png", "c.png"]  # as a folder has them
    rows["image"] = IMAGE, [image(0, "x"), image(1, "y"), image(2, "z"), image(3, "x")]
    assert evaluation_split(saved(dataset(rows), tmp_path / "classes"), ("dog", "cat")).names() == [
        "train/dog/x", "train/dog/y", "train/dog/z", "train/cat/x",
    ]  # fmt: skip
    rows["image"] = IMAGE, [image(0, "y"), image(1, "x"), image(2, "x"), image(3, "x")]
    assert evaluation_split(saved(dataset(rows), tmp_path / "numbers"), ("dog", "cat")).names() == [
        "train/000001", "train/000002", "train/000000", "train/000003",
    ]  # fmt: skip


def test_pictures_without_bytes_are_read_from_their_path_and_those_without_both_are_left_out(tmp_path: Path) -> None:
    files = [tmp_path / f"{number}.png" for number in range(5)]
    for number, file in enumerate(files):
        file.write_bytes(image(number)["bytes"])
    pictures = [*({"bytes": None, "path": file.name} for file in files), None]
    data = dataset({"image": (STRUCT, pictures), "label": (Value("string"), list("aababb"))})
    data.to_parquet(str(tmp_path / "t.parquet"))
    split = evaluation_split(tmp_path / "t.parquet", ("a", "b"))
    assert split.names() == ["0.png", "1.png", "3.png", "train/000005", "2.png", "4.png"]
    assert split.read(2) == files[3].read_bytes()
    before = split.stamp(0)
    os.utime(files[0], (1, 1))
    assert split.stamp(0) != before
    scanned = scan_split(split, 8, in_memory=False)
    assert len(scanned) == 5
    assert scanned.unreadable == ("'train/000005': the row has no image",)


def test_a_column_of_bytes_holds_images_too(tmp_path: Path) -> None:
    pictures = [picture["bytes"] for picture in images(4)]
    data = dataset({"id": (Value("binary"), pictures), "kind": (Value("int64"), [2, 1, 2, 1])})
    data.to_parquet(str(tmp_path / "t.parquet"))
    split = evaluation_split(tmp_path / "t.parquet", ("1", "2"))
    assert [split.read(index) for index in range(4)] == [pictures[row] for row in (1, 3, 0, 2)]


def test_rows_are_read_in_other_processes_and_their_stamps_change_with_them(tmp_path: Path) -> None:
    split = opened(saved(three_splits(), tmp_path / "saved")).train
    again = pickle.loads(pickle.dumps(split))
    assert [again.read(i) for i in range(8)] == [split.read(i) for i in range(8)]
    assert len(pickle.dumps(split)) < 20_000
    scanned = scan_split(split, 8, in_memory=False)
    here, there = (torch.cat(list(still_batches(scanned, 8, 4, workers=workers))) for workers in (0, 2))
    assert torch.equal(here, there)
    assert [again.stamp(i) for i in range(8)] == [split.stamp(i) for i in range(8)]
    assert len({split.stamp(i) for i in range(8)}) == 8
    changed = opened(saved({**three_splits(), "train": in_turn(8, 20)}, tmp_path / "saved again")).train
    assert not {changed.stamp(i) for i in range(8)} & {split.stamp(i) for i in range(8)}


def test_labels_may_be_class_labels_texts_or_numbers_and_classes_are_chosen_as_elsewhere(tmp_path: Path) -> None:
    pictures = IMAGE, images(8)
    numbers = saved(dataset({"img": pictures, "target": (Value("int64"), [7, 10] * 4)}), tmp_path / "numbers")
    assert opened(numbers).classes == ("10", "7")
    named = ClassLabel(names=["paper", "metal", "Skip", "glass", "none such"])
    rows = {"picture": pictures, "mask": pictures, "label": (Value("string"), ["?"] * 8)}
    rows |= {"fine": (named, [0, 1, 2, 3] * 2), "coarse": (named, [0, 1, 0, 1] * 2)}
    data = saved(dataset(rows), tmp_path / "several")
    with pytest.raises(UserError, match=r"2 columns of images, 'picture', 'mask'; name one with data.image_column"):
        opened(data)
    with pytest.raises(UserError, match=r"2 columns of labels, 'fine', 'coarse'; name one with data.label_column"):
        opened(data, image_column="mask")
    columns = {"image_column": "mask", "label_column": "fine"}
    assert opened(data, **columns).classes == ("Skip", "glass", "metal", "paper")
    assert opened(data, **columns).remarks == ("left out, without an image: class(es) 'none such'",)
    merged = opened(data, **columns, classes={"bin": ["metal", "glass"], "paper": ["paper"]}, val_fraction=0.5)
    assert merged.classes == ("bin", "paper")
    assert labels(merged) == {
        f"train/00000{row}": "paper" if row % 4 == 0 else "bin" for row in range(8) if row % 4 != 2
    }
    assert "2 chosen classes" in merged.note
    assert opened(data, **columns, exclude=["Skip"]).classes == ("glass", "metal", "paper")
    with pytest.raises(UserError, match=r"'pape', did you mean 'paper'"):
        opened(data, **columns, classes=["pape", "metal"])
    with pytest.raises(UserError, match="does not know: 'Skip'"):
        evaluation_split(data, ("glass", "metal", "paper"), DataConfig(**columns))


def test_rows_without_a_label(tmp_path: Path) -> None:
    parts = three_splits()
    parts["test"] = dataset({"image": (IMAGE, images(3)), "label": (LABEL, [-1] * 3)})
    source = opened(saved(parts, tmp_path / "no test labels"))
    assert source.note == "trained on train, scored on validation"
    assert source.remarks == ("left out, without labels: split 'test' (3 images)",)
    assert len(evaluation_split(tmp_path / "no test labels", ("cat", "dog"))) == 4
    rows = {"image": (IMAGE, images(6)), "label": (LABEL, [0, 1, 0, 1, None, -1])}
    some = saved(dataset(rows), tmp_path / "some")
    with pytest.raises(UserError, match=r"2 row\(s\) have no label.*'train/000004'.*data.exclude=\[''\]"):
        opened(some)
    assert len(labels(opened(some, exclude=[""], val_fraction=0.5))) == 4


TEXT, BOTH = Value("string"), {"image": (IMAGE, images(4)), "label": (LABEL, [0, 1, 0, 1])}
FAULTS: dict[str, tuple[dict[str, Columns], dict[str, Any], str]] = {
    "no image": ({"train": {"image": (TEXT, ["a"]), "label": (LABEL, [0])}}, {},
        r"no image feature; its columns are image \(string\), label \(ClassLabel\).*data.image_column.*cast_column"),
    "not an image": ({"train": BOTH}, {"image_column": "label"}, r"its column 'label' holds no images"),
    "no such column": ({"train": BOTH}, {"image_column": "imagee"}, r"no column 'imagee', did you mean 'image'"),
    "no label": ({"train": {"image": (IMAGE, images(2)), "text": (TEXT, ["a", "b"])}}, {},
        r"no column that is usually the label's.*image, text.*data.label_column"),
    "several labels": ({"train": {"image": (IMAGE, images(2)), "labels": (List(TEXT), [["a"], ["b"]])}}, {},
        r"'labels' holds List, and an image needs one label"),
    "one label": ({"train": {"image": (IMAGE, images(2)), "label": (TEXT, ["a", "a"])}}, {}, r"one label that is used"),
    "unknown splits": ({"train": BOTH, "extra": BOTH}, {}, r"'train', 'extra'; one is needed to train on.*data.splits"),
    "no such split": ({"train": BOTH, "test": BOTH}, {"splits": {"train": "train", "val": "tset"}}, r"mean 'test'"),
    "a column of splits": ({"train": BOTH, "test": BOTH}, {"split_column": "label"}, r"has no use; leave it out"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_dataset_is_explained(tmp_path: Path, fault: str) -> None:
    parts, how, says = FAULTS[fault]
    data = saved({name: dataset(columns) for name, columns in parts.items()}, tmp_path / "pets")
    with pytest.raises(UserError, match=says) as caught:
        opened(data, **how)
    assert "pets" in str(caught.value)


def test_what_cannot_be_opened_is_explained(tmp_path: Path) -> None:
    data = saved(three_splits(), tmp_path / "pets")
    (data / "test" / "data-00000-of-00001.arrow").unlink()
    with pytest.raises(UserError, match=r"dataset '.*pets' cannot be opened: .*data-00000-of-00001.arrow"):
        opened(data)
    (tmp_path / "bad.arrow").write_bytes(b"no")
    with pytest.raises(UserError, match=r"dataset '.*bad.arrow' cannot be opened: .*; write it again"):
        opened(tmp_path / "bad.arrow")
    with pytest.raises(UserError, match=r"dataset '.*empty' has no rows"):
        opened(saved({}, tmp_path / "empty"))
    with pytest.raises(UserError, match=r"'hf:' names no dataset; give hf:NAME"):
        opened("hf:")
    in_turn(4).to_parquet(str(tmp_path / "shards" / "train.parquet"))
    with pytest.raises(UserError, match=r"cannot be opened: .*'small' not found.*'default'.*hf:NAME:CONFIGURATION"):
        opened(f"hf:{tmp_path / 'shards'}:small")
    assert (short_name("hf:org/pets:small"), resolved("hf:org/pets")) == ("pets-small", "hf:org/pets")


class _Hub(BaseHTTPRequestHandler):
    """As much of the hub as `datasets` asks for: org/pets with three files, org/gated, and nothing else."""

    files: ClassVar[dict[str, bytes]] = {}

    def do_GET(self) -> None:
        place = re.fullmatch(r"(?:/api)?/datasets/org/(\w+)(?:/(\w+)/\w+)?(?:/(.+?))?(?:\?.*)?", self.path)
        name, what, path = place.groups() if place else ("", "", "")
        if name != "pets":
            self.answer(403 if name == "gated" else 404, error="GatedRepo" if name == "gated" else "RepoNotFound")
        elif what == "resolve":
            known = path in self.files
            self.answer(200 if known else 404, self.files.get(path, b""), "" if known else "EntryNotFound")
        elif what == "tree":
            there = {"data": {"type": "directory", "size": 0}} if path is None else {}
            there |= {file: {"type": "file", "size": len(content)} for file, content in self.files.items() if path}
            self.answer(
                200, json.dumps([{**about, "path": file, "oid": file} for file, about in there.items()]).encode()
            )
        else:
            self.answer(200, json.dumps({"id": "org/pets", "sha": "a" * 40, "siblings": []}).encode())

    def do_HEAD(self) -> None:
        self.do_GET()

    def answer(self, code: int, content: bytes = b"", error: str = "") -> None:
        self.send_response(code)
        about = {"X-Repo-Commit": "a" * 40, "ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Error-Code": error}
        for key, value in {**about, "Content-Type": "application/json", "Content-Length": len(content)}.items():
            self.send_header(key, str(value))
        self.end_headers()
        self.wfile.write(content if self.command == "GET" else b"")

    def log_message(self, *about: Any) -> None:
        pass


OPEN = """
import sys
from coadvise.data.sources import open_source
from coadvise.errors import UserError
for data in sys.argv[1:]:
    try:
        source = open_source(data)
        print(source.where, *source.classes, source.note, source.train.names()[0])
    except UserError as error:
        print(error)
"""


def test_a_dataset_of_the_hub_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server of this machine stands in for the hub."""
    for name, part in three_splits().items():
        part.to_parquet(str(tmp_path / "part"))
        _Hub.files[f"data/{name}-00000-of-00001.parquet"] = (tmp_path / "part").read_bytes()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")

    def said(*names: str) -> list[str]:
        run = subprocess.run([sys.executable, "-c", OPEN, *names], capture_output=True, text=True, check=True)
        return run.stdout.splitlines()

    found = said("hf:org/pets", "hf:org/missing", "hf:org/gated", "hf:org/pets:small")
    server.shutdown()
    assert found[0] == (
        "hf:org/pets cat dog trained on train, scored on test, learning curves on validation train/000001"
    )
    for line, name in zip(found[1:3], ("missing", "gated"), strict=True):
        assert line.startswith(f"dataset 'hf:org/{name}' cannot be opened: ")
        assert "check its name; " in line
    assert "'small' not found" in found[3]
    assert "hf:NAME:CONFIGURATION" in found[3]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    again = said("hf:org/pets", "hf:org/other")
    assert again[0] == found[0]  # from the cache
    assert "connect to the network once" in again[1]
    done = run_program("fit", "hf:org/other", cwd=tmp_path / "home")
    assert (done.returncode, len(done.stderr.strip().splitlines())) == (2, 1)
    assert "dataset 'hf:org/other' cannot be opened" in done.stderr
    assert not (tmp_path / "home" / "runs").exists()


def test_what_is_said_of_it_first(tmp_path: Path) -> None:
    data = saved(three_splits(), tmp_path / "pets")
    assert next(describe(scan(opened(data), 8, in_memory=False))) == f"data: {data}, 2 classes (cat, dog)"
