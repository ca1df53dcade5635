"""Shards are the same bytes whoever writes them, and what is whole is not written again."""

import io
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny import contents

from coadvise.data.scan import scan
from coadvise.data.shards.place import Place
from coadvise.data.shards.write import Outcome, Part, write_shards
from coadvise.data.sources import open_source
from coadvise.errors import StorageError, UserError
from coadvise.runs.shard import shard

SMALL = 0.02


def written(data: Path, out: Path, **options: Any) -> Outcome:
    return write_shards(open_source(data), Place(str(out)), **{"megabytes": SMALL, **options})


def what_is_read(out: Path) -> dict[str, bytes]:
    """Without what only matters to who goes on writing, which depends on the files' times."""
    return {name: content for name, content in contents(out).items() if "/" not in name or name.endswith(".tar")}


@pytest.fixture(scope="module")
def once(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("once")
    done = written(image_folder, out)
    assert done.shards == done.made == len([*out.rglob("*.tar")]) > 7
    assert done.missing == 0
    return out


def test_a_shard_is_webdataset_s_form_a_sample_of_all_classes_and_of_the_size_asked_for(
    image_folder: Path, once: Path
) -> None:
    found, source = dict[str, bytes](), open_source(image_folder)
    for path in sorted((once / "train").glob("*.tar")):
        assert path.stat().st_size < 2e6 * SMALL
        with tarfile.open(path) as tar:
            members = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
        assert len(members) == len({*members}) == 2 * len({name.partition(".")[0] for name in members})
        for name, content in members.items():
            if name.endswith(".json"):
                about = json.loads(content)
                assert source.classes[about["label"]] == about["class"]
                found[about["name"]] = members[name.replace(".json", ".png")]
    assert found == {name: source.train.read(row) for row, name in enumerate(source.train.names())}
    largest = max((once / "train").glob("*.tar"), key=lambda path: path.stat().st_size)
    with tarfile.open(largest) as tar:
        rows = [int(name.partition(".")[0]) for name in tar.getnames()]
    assert rows != sorted(rows)


def test_several_processes_write_what_one_writes(image_folder: Path, once: Path, tmp_path: Path) -> None:
    first = written(image_folder, tmp_path, part=Part.parsed("1/2"))
    assert first.made == -(-first.shards // 2)
    assert first.missing == first.shards - first.made
    assert not (tmp_path / "index.json").exists()
    second = written(image_folder, tmp_path, part=Part.parsed("2/2"))
    assert (second.made, second.missing) == (first.missing, 0)
    assert contents(tmp_path) == contents(once)


def test_what_is_whole_stays_and_what_is_not_is_written_again(image_folder: Path, once: Path, tmp_path: Path) -> None:
    data, out = tmp_path / image_folder.name, tmp_path / "out"
    shutil.copytree(image_folder, data)
    assert written(data, out).made > 0
    assert written(data, out).made == 0
    for damage in (lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:-1])):
        damage(out / "train/000002.tar")
        assert written(data, out).made == 1
        assert what_is_read(out) == what_is_read(once)
    (out / "val/000000.json").write_text("{")
    assert written(data, out).made == 1
    Image.new("RGB", (16, 16), "red").save(data / "train/red/0.png")
    assert written(data, out).made == 1
    row = open_source(data).train.names().index("train/red/0.png")
    assert open_source(f"shards:{out}").train.read(row) == (data / "train/red/0.png").read_bytes()


def test_an_end_in_between_leaves_no_index_and_the_same_command_goes_on(
    image_folder: Path, once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Place.write

    def full(place: Place, name: str, content: bytes) -> None:
        if name == "train/000002.tar":
            raise StorageError("the disk is full")
        original(place, name, content)

    with monkeypatch.context() as patch:
        patch.setattr(Place, "write", full)
        with pytest.raises(StorageError):
            written(image_folder, tmp_path)
    assert not (tmp_path / "index.json").exists()
    with pytest.raises(UserError, match="or wait until that has ended"):
        open_source(f"shards:{tmp_path}")
    assert 0 < written(image_folder, tmp_path).made < len([*once.rglob("*.tar")])
    assert contents(tmp_path) == contents(once)


def test_presized_pictures_are_smaller_and_what_is_known_of_them_is_true(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    shapes = {"big.jpg": (80, 60), "small.jpg": (20, 30), "big.png": (50, 64), "wide.png": (40, 40)}
    for split in ("train", "val"):
        for label in ("a", "b"):
            folder = tmp_path / "data" / split / label
            folder.mkdir(parents=True)
            for name, shape in shapes.items():
                values = rng.integers(0, 256, (*shape, 3), np.uint8)
                image = Image.fromarray(values[..., 0].astype(np.uint16) * 9 if "wide" in name else values)
                image.save(folder / name)
    written(tmp_path / "data", tmp_path / "out", presize=32)
    source, original = open_source(f"shards:{tmp_path / 'out'}"), open_source(tmp_path / "data")
    assert "resized to 32 px" in source.note
    for row, name in enumerate(source.val.names()):
        content = source.val.read(row)
        with Image.open(io.BytesIO(content)) as image:
            assert image.format == ("JPEG" if name.endswith("jpg") else "PNG")
            assert min(image.size) == {"big": 32, "small": 20, "wide": 40}[Path(name).stem]
        if "big" not in name:
            assert content == original.val.read(row)
    facts = source.val.facts(np.arange(len(source.val)))
    assert facts is not None
    seen = scan(source, 16, in_memory=True).val  # which reads the pictures
    assert np.array_equal(seen.digests, facts["digest"])
    assert np.array_equal(seen.contents, facts["content"])
    assert sum(seen.sizes.values()) == len(facts)
    assert seen.sizes == scan(source, 16, in_memory=False).val.sizes


def test_what_cannot_be_written_is_explained(image_folder: Path, once: Path, tmp_path: Path) -> None:
    for options, said in (
        ({"presize": 8}, r"another presize \(0, now 8\); give another --out"),
        ({"megabytes": 1}, r"another megabytes \(0.02, now 1\)"),
    ):
        with pytest.raises(UserError, match=said):
            written(image_folder, once, **options)
    with pytest.raises(UserError, match="another data behind them"):
        written(image_folder / "train", once)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="no shards can be written"):
        written(image_folder, tmp_path / "file" / "below")
    for arguments, said in (
        ({"part": "3/2"}, "give K/N"),
        ({"overrides": ["student.weight=1"]}, "data.KEY=value and seed=N alone"),
        ({"out": str(image_folder / "out")}, "lies in the data"),
    ):
        with pytest.raises(UserError, match=said):
            shard(str(image_folder), **{"out": str(tmp_path / "out"), **arguments})
    assert not (tmp_path / "out").exists()
