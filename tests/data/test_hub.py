"""Which files and folders are datasets of Hugging Face, without the package that reads them; tests/extras has it."""

import sys
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from coadvise.config.schema import DataConfig
from coadvise.data.sources import open_source
from coadvise.data.sources.hub import dataset_in
from coadvise.errors import UserError

BYTES = pyarrow.array([{"bytes": b"x", "path": None}])


@pytest.mark.parametrize(
    ("columns", "how", "is_one"),
    [
        ({"image": BYTES, "label": ["a"]}, {}, True),
        ({"any": BYTES, "path": ["a"]}, {}, True),
        ({"any": BYTES, "path": ["a"]}, {"image_column": "path"}, False),  # a table of paths, as is said
        ({"image": [b"x"], "label": ["a"]}, {}, True),
        ({"path": ["a"], "digest": [b"x"]}, {}, False),
        ({"path": ["a"], "digest": [b"x"]}, {"image_column": "digest"}, True),
        ({"image": ["a"], "label": ["a"]}, {}, False),
    ],
)
def test_a_parquet_file_with_the_images_themselves_is_a_dataset(
    tmp_path: Path, columns: dict[str, Any], how: dict[str, Any], is_one: bool
) -> None:
    file = tmp_path / "t.parquet"
    parquet.write_table(pyarrow.table(columns), file)
    for data in (file, tmp_path):
        assert (dataset_in(data, DataConfig(**how)) is not None) == is_one


def test_class_folders_are_the_data_whatever_lies_beside_them(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table({"image": BYTES}), tmp_path / "train.parquet")
    assert dataset_in(tmp_path, DataConfig()) is not None
    for name in ("cats", "dogs"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").touch()
    assert dataset_in(tmp_path, DataConfig()) is None
    assert dataset_in(tmp_path / "missing", DataConfig()) is None


def test_without_the_package_its_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "saved").mkdir()
    for name in ("dataset_info.json", "state.json"):
        (tmp_path / "saved" / name).write_text("{}")
    (tmp_path / "t.arrow").touch()
    for data in ("hf:pets", tmp_path / "saved", tmp_path / "t.arrow"):
        with pytest.raises(UserError, match=r"^'.*' is a dataset of Hugging Face.*pip install 'coadvise\[datasets\]'$"):
            open_source(data)
