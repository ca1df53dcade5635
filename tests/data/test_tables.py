"""Tables of paths and labels: columns, splits, where images are looked for, and what is wrong with a table."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from pyarrow import Table, parquet
from tiny import make_images, records

from coadvise import fit
from coadvise.config.schema import DataConfig
from coadvise.data.sources import Source, evaluation_split, open_source, typical_size
from coadvise.errors import UserError
from coadvise.runs.evaluate import evaluate_run

Row = tuple[str, ...]
PAIRS = [(f"images/{number}.png", "ab"[number % 2]) for number in range(8)]


def opened(data: Path, **how: Any) -> Source:
    return open_source(data, DataConfig.model_validate(how), 0)


def labels(source: Source) -> dict[str, str]:
    """The label of each picture by its name."""
    splits = [split for split in (source.train, source.val, source.test) if split is not None]
    return {split.name(i): source.classes[split.labels[i]] for split in splits for i in range(len(split))}


def write_csv(path: Path, head: Row, rows: Sequence[Row], mark: str = ",") -> Path:
    path.write_text("\n".join(mark.join(row) for row in (head, *rows)) + "\n")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for path, _ in PAIRS:
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).touch()
    return tmp_path


def _jsonl(path: Path, head: Row, rows: Sequence[Row]) -> Path:
    path.write_text("\n".join(json.dumps(dict(zip(head, row, strict=True))) for row in rows))
    return path


def _parquet(path: Path, head: Row, rows: Sequence[Row]) -> Path:
    parquet.write_table(Table.from_pylist([dict(zip(head, row, strict=True)) for row in rows]), path)
    return path


WRITERS: dict[str, Callable[[Path, Row, Sequence[Row]], Path]] = {
    "t.csv": write_csv,
    "semicolon.csv": lambda path, head, rows: write_csv(path, head, rows, ";"),
    "t.tsv": lambda path, head, rows: write_csv(path, head, rows, "\t"),
    "t.jsonl": _jsonl,
    "t.parquet": _parquet,
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("head", [("image", "label"), ("File Name", "Category"), ("filepath", "species")])
def test_every_format_with_any_usual_columns(folder: Path, name: str, head: Row) -> None:
    source = opened(WRITERS[name](folder / name, head, PAIRS), val_fraction=0.5)
    assert labels(source) == dict(PAIRS)
    assert source.classes == ("a", "b")
    assert (len(source.train), len(source.val)) == (4, 4)
    assert source.note.startswith("no splits in the table: 50%")
    assert source.train.read(0) == b""


def test_columns_that_are_named(folder: Path) -> None:
    rows = [(path, "x", label, "learn" if number < 6 else "check") for number, (path, label) in enumerate(PAIRS)]
    table = write_csv(folder / "t.csv", ("picture", "label", "what", "use"), rows)
    how = {
        "image_column": "picture", "label_column": "what", "split_column": "use",
        "splits": {"train": "learn", "val": "check"},
    }  # fmt: skip
    source = opened(table, **how)
    assert labels(source) == dict(PAIRS)
    assert (len(source.train), len(source.val)) == (6, 2)
    assert source.note == "trained on learn, scored on check"
    assert len(evaluation_split(table, ("a", "b"), DataConfig.model_validate(how))) == 2


def test_splits_of_a_column_are_known_by_usual_values(folder: Path) -> None:
    kinds = ["Train"] * 4 + ["valid"] * 2 + ["TEST"] * 2
    table = write_csv(folder / "t.csv", ("path", "label", "set"), [(*p, k) for p, k in zip(PAIRS, kinds, strict=True)])
    source = opened(table)
    assert source.test is not None
    assert [len(split) for split in (source.train, source.val, source.test)] == [4, 2, 2]
    assert source.note == "trained on Train, scored on TEST, learning curves on valid"


@pytest.mark.parametrize("paths", ["{0}", "{0}.png", "images/{0}", "./images/{0}.png", "{root}/images/{0}.png"])
def test_images_are_found_wherever_they_lie(folder: Path, paths: str) -> None:
    rows = [(paths.format(number, root=folder), label) for number, (_, label) in enumerate(PAIRS)]
    assert labels(opened(write_csv(folder / "t.csv", ("id", "label"), rows))) == dict(PAIRS)
    elsewhere = folder / "tables"
    elsewhere.mkdir()
    table = write_csv(elsewhere / "t.csv", ("id", "label"), rows)
    assert labels(opened(table, root=str(folder))) == dict(PAIRS)


def test_two_spellings_of_a_path_are_one_picture(folder: Path) -> None:
    (name, label), *others = PAIRS
    rows = [(name, label), (f"images/../{name}", "another"), *others]
    remarks = opened(write_csv(folder / "t.csv", ("path", "label"), rows)).remarks
    assert any("more than one label" in line or "two labels" in line or "disagree" in line for line in remarks), remarks


def test_a_line_of_json_ends_where_json_says(folder: Path) -> None:
    rows = [{"path": path, "label": f"{label}\u2028x"} for path, label in PAIRS]
    (folder / "t.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    assert set(opened(folder / "t.jsonl").classes) == {f"{label}\u2028x" for _, label in PAIRS}


def test_a_folder_with_metadata_or_with_lists(folder: Path) -> None:
    write_csv(folder / "metadata.csv", ("file_name", "label"), PAIRS)
    assert labels(opened(folder)) == dict(PAIRS)
    (folder / "metadata.csv").unlink()
    for name, rows, mark in (("train.txt", PAIRS[:6], ", "), ("val.txt", PAIRS[6:], " ")):
        (folder / name).write_text("\n".join(mark.join(row) for row in rows) + "\n\n")
    source = opened(folder)
    assert labels(source) == dict(PAIRS)
    assert (len(source.train), len(source.val)) == (6, 2)
    (folder / "train.txt").write_text("just-one-word\n")
    with pytest.raises(UserError, match=r"train.txt', line 1: 'just-one-word' is not 'path, label'"):
        opened(folder)


def test_lists_beside_class_folders_are_not_used(tmp_path: Path) -> None:
    for name in ("cats/1.png", "cats/2.png", "dogs/1.png", "dogs/2.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for name in ("train.txt", "test.txt", "eval.txt"):
        (tmp_path / name).write_text("cats/1\n")
    assert opened(tmp_path).classes == ("cats", "dogs")


def test_what_does_not_fit_together_is_counted_and_named(folder: Path) -> None:
    rows = [
        *PAIRS[:6],
        ("images/none.png", "a"),
        ("images/0.png", "a"),
        ("images/1.png", "a"),
        ("images/6.png", "Skip"),
    ]
    source = opened(write_csv(folder / "t.csv", ("image", "label"), rows), exclude=["Skip"])
    assert labels(source) == {path: label for path, label in PAIRS[:6] if path != "images/1.png"}
    assert source.remarks == (
        "left out, without a file: 1 row(s), 'images/none.png'",
        "left out, since their rows disagree: 1 image(s), 'images/1.png'",
        "not in the table: 1 image(s), 'images/7.png'",
    )
    other = DataConfig(exclude=("Skip", "not there"))  # a network's own choice, in data that may lack a label
    assert len(evaluation_split(folder / "t.csv", ("a", "b"), other)) == 5
    merged = opened(folder / "t.csv", classes={"x": ["a"], "y": ["b", "Skip"]})
    assert merged.classes == ("x", "y")


HEAD, WITH = ("image", "label"), ("image", "label", "split")
FAULTS: dict[str, tuple[Row, Sequence[Row], dict[str, Any], str]] = {
    "no image column": (("where", "label"), PAIRS, {}, r"usually the image's.*where, label.*image_column"),
    "no label column": (("image", "what"), PAIRS, {}, r"no column that is usually the label's.*data.label_column"),
    "no such column": (HEAD, PAIRS, {"label_column": "lable"}, r"no column 'lable', did you mean 'label'"),
    "no file": (HEAD, [("x.png", "a"), ("y.png", "b")], {}, r"none of its 2 images exists.*'x.png'.*data.root"),
    "no folder": (HEAD, PAIRS, {"root": "nowhere"}, r"data.root=nowhere"),
    "no label": (HEAD, [*PAIRS, ("images/7.png", "")], {}, r"1 row\(s\) have no label.*'images/7.png'.*data.exclude"),
    "one label": (HEAD, [(path, "a") for path, _ in PAIRS], {}, r"one label that is used, 'a'.*label_column"),
    "a label each": (HEAD, [(path, path) for path, _ in PAIRS], {}, r"8 of its 8 classes have one image"),
    "no such label": (HEAD, PAIRS, {"exclude": ["c"]}, r"data.exclude names 1 class.*'c'; its classes are 'a', 'b'"),
    "all excluded": (HEAD, PAIRS, {"exclude": ["a", "b"]}, r"no row with a label that is used"),
    "unknown split": (WITH, [(*p, "fold1") for p in PAIRS], {}, r"'fold1' in 8 row\(s\); usual are train.*data.splits"),
    "no split": (WITH, [(*p, "test" if i else "") for i, p in enumerate(PAIRS)], {}, r"'' in 1 row\(s\); usual are"),
    "train alone": (WITH, [(*p, "train") for p in PAIRS], {}, r"'train', so none to score on"),
    "no file of a class": (WITH, [("no.png", "a", "train"), (*PAIRS[1], "train"), (*PAIRS[0], "test")], {},
        r"no image of 'a' to train on, but some in test.*left out, without a file: 1 row\(s\), 'no.png'"),
    "empty": (HEAD, [], {}, r"has no rows"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_table_is_explained(folder: Path, fault: str) -> None:
    head, rows, how, says = FAULTS[fault]
    with pytest.raises(UserError, match=says) as caught:
        opened(write_csv(folder / "t.csv", head, rows), **how)
    assert "t.csv" in str(caught.value) or "data.root" in str(caught.value)


def test_a_name_that_could_be_several_files_is_refused(folder: Path) -> None:
    (folder / "more").mkdir()
    (folder / "more" / "0.png").touch()
    with pytest.raises(UserError, match=r"'0' could be 'images/0.png', 'more/0.png'"):
        opened(write_csv(folder / "t.csv", ("id", "label"), [("0", "a"), ("1", "b")]))


BROKEN = {
    "list.jsonl": ("[1]\n", "line 1: each line must be an object"),
    "json.jsonl": ('{"image": "x", "label": "a"}\n{\n', "line 2: .*at its character 2"),
    "t.parquet": ("no", "cannot be read"),
    "latin.csv": ("image,label\n\xff,a\n", "not UTF-8 text; save it as UTF-8"),
    "quote.csv": ('image,label\n"1,a\n2,b\n', "line 3: .*check quotes"),
    "long.csv": ("image,label\n1,a,b\n", "line 2: 3 values, and there are 2 columns"),
    "twice.csv": ("image,label,label\n1,a,b\n", "2 columns 'label'; rename one"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_table_that_cannot_be_read_says_where(folder: Path, name: str) -> None:
    content, says = BROKEN[name]
    (folder / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=f"table '.*{name}' cannot be read: .*{says}" if says[:3] != "can" else says):
        opened(folder / name)


def test_records_may_lack_keys_and_a_label_is_one_value(folder: Path) -> None:
    lines = [{"image": path, "label": label, "split": "train"} for path, label in PAIRS]
    del lines[0]["split"]  # it has a column of splits all the same
    (folder / "t.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(UserError, match=r"'' in 1 row\(s\)"):
        opened(folder / "t.jsonl")
    (folder / "t.jsonl").write_text(json.dumps({"image": "images/0.png", "label": ["a", "b"]}))
    with pytest.raises(UserError, match=r"'label' has \['a', 'b'\], and an image needs one label"):
        opened(folder / "t.jsonl")


def test_scoring_takes_the_rows_of_one_split(folder: Path) -> None:
    rows = [(*pair, "test" if number < 2 else "other") for number, pair in enumerate(PAIRS)]
    rows[7] = (*rows[7][:1], "unknown to the student", "other")
    table = write_csv(folder / "t.csv", WITH, rows)
    assert evaluation_split(table, ("a", "b")).names() == ["images/0.png", "images/1.png"]
    with pytest.raises(UserError, match=r"'other', so none to score on"):
        evaluation_split(write_csv(table, WITH, rows[2:]), ("a", "b"))


def test_labels_of_other_splits_are_no_classes(folder: Path) -> None:
    splits = ["learn"] * 4 + ["check"] * 2 + ["later"] * 2
    rows = [(path, "c" if use == "later" else label, use) for (path, label), use in zip(PAIRS, splits, strict=True)]
    table = write_csv(folder / "t.csv", WITH, rows)
    assert opened(table, splits={"train": "learn", "val": "check"}).classes == ("a", "b")


def test_the_order_is_a_folders(tmp_path: Path) -> None:
    for name in ("a-b/1.png", "a/2.png", "a.png"):
        for label in ("x", "y"):
            (tmp_path / label / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / label / name).touch()
    rows = [(str(path.relative_to(tmp_path)), path.relative_to(tmp_path).parts[0]) for path in tmp_path.rglob("*.png")]
    table = write_csv(tmp_path / "t.csv", HEAD, rows)
    assert evaluation_split(table, ("x", "y")).names() == evaluation_split(tmp_path, ("x", "y")).names()


def test_a_folder_and_its_tables_train_the_same_networks(tmp_path: Path, tiny_preset: str) -> None:
    """For the same pictures in the same order, metrics are equal bit by bit."""
    images = make_images(tmp_path / "data")
    rows = [
        (str(path.relative_to(images)), path.parent.name, path.parent.parent.name)
        for path in sorted(images.rglob("*.png"))
    ]
    found = {"folder": fit(images, preset=tiny_preset, out=tmp_path / "folder")}
    for name in ("t.csv", "t.parquet"):
        table = WRITERS[name](images / name, ("path", "label", "split"), rows)
        found[name] = fit(table, preset=tiny_preset, out=tmp_path / name.replace(".", "-"))
    kinds = ("train", "eval", "result", "verdict")
    wanted = records(found["folder"], *kinds)
    assert wanted
    assert all(records(run, *kinds) == wanted for run in found.values())
    assert typical_size(images / "t.csv") == 16
    scored = [evaluate_run(run)["parts"] for run in found.values()]
    assert all(parts == scored[0] for parts in scored)
