"""One pass over all files: headers, digests, and what cannot be read."""

import builtins
from pathlib import Path

import numpy as np
import pytest
from made_pictures import encoded
from PIL import Image

from coadvise.data.images import fitted, to_array
from coadvise.data.sources import open_source
from coadvise.errors import UserError
from coadvise.inspection.findings import Findings
from coadvise.inspection.pictures import look_through


def test_every_file_is_a_picture_or_unreadable(found: Findings) -> None:
    pictures = found.pictures
    assert len(pictures) == 36 + 15 + 4
    assert [(place.split, place.name) for place, _ in pictures.unreadable] == [("train", "train/red/broken.png")]
    assert "not an image" in pictures.unreadable[0][1]
    assert [place.split for place in pictures.places] == ["train"] * 38 + ["val"] * 17
    assert pictures.read(0) == Path(pictures.source.where, pictures.places[0].name).read_bytes()
    assert (
        len({pictures.looks.shape[0], *map(len, pictures.features), len(pictures.hashes), len(pictures.headers)}) == 1
    )


def test_a_header_says_format_mode_depth_and_size(tmp_path: Path) -> None:
    wide = Image.fromarray(np.arange(64 * 32, dtype=np.uint16).reshape(32, 64) * 31)
    files = {
        "deep.png": encoded(wide),
        "grey.jpg": encoded(Image.new("L", (20, 30), 90), "JPEG"),
        "two.png": encoded(Image.new("1", (20, 20))),
        "seen.png": encoded(Image.new("RGBA", (20, 20), "red")),
    }
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        for name, content in files.items():
            (tmp_path / folder / name).write_bytes(content)
    done = []
    pictures = look_through(open_source(tmp_path), None, None, lambda *progress: done.append(progress))
    headers = {Path(place.name).name: header for place, header in zip(pictures.places, pictures.headers, strict=True)}
    told = {name: (header.format, header.mode, header.bits, header.shape) for name, header in headers.items()}
    assert told == {
        "deep.png": ("PNG", "I;16", 16, (64, 32)),
        "grey.jpg": ("JPEG", "L", 8, (20, 30)),
        "two.png": ("PNG", "1", 1, (20, 20)),
        "seen.png": ("PNG", "RGBA", 8, (20, 20)),
    }
    assert done[-1] == (8, 8)


def test_networks_are_given_the_readable_pictures_in_order(faulty: Path) -> None:
    given = []

    def network(images: np.ndarray) -> list[np.ndarray]:
        given.append(images)
        return [images.mean((2, 3), dtype=np.float32), np.ones((len(images), 1), np.float32)]

    pictures = look_through(open_source(faulty), network, lambda image: to_array(fitted(image, 16)))
    assert {images.shape[1:] for images in given} == {(3, 16, 16)}
    means, ones = pictures.features
    assert ones.shape == (55, 1)
    assert (means[pictures.labels == 0].mean(0).argmax(), means[pictures.labels == 2].mean(0).argmax()) == (2, 0)


def test_no_readable_picture_and_a_missing_package_are_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a/1.png", "a/2.png", "b/1.png", "b/2.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"nothing")
    with pytest.raises(UserError, match="none of the 4 images"):
        look_through(open_source(tmp_path), None, None)
    usual = builtins.__import__

    def without(name: str, *rest: object) -> object:
        if name == "imagehash":
            raise ImportError
        return usual(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"coadvise\[check\]"):
        look_through(open_source(tmp_path), None, None)
