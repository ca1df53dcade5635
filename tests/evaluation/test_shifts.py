"""ImageNet-A, -R and -C by the names of their folders."""

import shutil
from pathlib import Path

import pytest
from PIL import Image
from timm.data import ImageNetInfo

from coadvise.errors import UserError
from coadvise.evaluation.corruptions import CORRUPTIONS
from coadvise.evaluation.shifts import IMAGENET_A, IMAGENET_R, corrupted_splits, layout_of, subset, subset_split

IMAGENET = ImageNetInfo().label_names()


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (90, 120, 30)).save(path)


@pytest.fixture
def two_hundred(tmp_path: Path) -> Path:
    """ImageNet-R with an image a class, and the file that its archive has beside."""
    root = tmp_path / "r"
    for name in subset(IMAGENET_R):
        picture(root / name / "art_0.jpg")
    (root / "README.txt").write_text("about")
    return root


@pytest.fixture
def corrupted(tmp_path: Path) -> Path:
    for name in (*CORRUPTIONS, "speckle_noise"):
        for severity in range(1, 6):
            for label in ("n01", "n02"):
                picture(tmp_path / "c" / name / str(severity) / label / "0.jpg")
    return tmp_path / "c"


@pytest.mark.parametrize(
    ("layout", "first", "last"),
    [(IMAGENET_A, [6, 11, 13, 15], [986, 987, 988]), (IMAGENET_R, [1, 2, 4, 6], [981, 983, 988])],
)
def test_the_subsets_are_the_published_200_classes(layout: str, first: list[int], last: list[int]) -> None:
    places = [IMAGENET.index(name) for name in subset(layout)]  # the authors publish places in ImageNet-1k
    assert len(set(places)) == 200
    assert places == sorted(places)
    assert places[: len(first)] == first
    assert places[-len(last) :] == last


def test_layouts_are_recognised_and_no_other_folder_is(two_hundred: Path, corrupted: Path, tmp_path: Path) -> None:
    assert layout_of(two_hundred) == "imagenet-r"
    assert layout_of(corrupted) == "imagenet-c"
    for name in (*subset(IMAGENET_A), "__MACOSX"):
        (tmp_path / "a" / name).mkdir(parents=True)
    assert layout_of(tmp_path / "a") == "imagenet-a"
    (tmp_path / "a" / "n00000001").mkdir()  # another class of ImageNet's
    assert layout_of(tmp_path / "a") == "folder"
    (tmp_path / "a" / "n00000001").rmdir()
    (tmp_path / "a" / subset(IMAGENET_A)[0]).rmdir()
    with pytest.raises(UserError, match=f"lacks 1 of the 200 classes of imagenet-a: {subset(IMAGENET_A)[0]}"):
        layout_of(tmp_path / "a")
    for name in ("snow", "frost", "fog"):  # classes of weather, not corruptions
        picture(tmp_path / "weather" / name / "0.jpg")
    assert layout_of(tmp_path / "weather") == layout_of(tmp_path / "nothing") == "folder"


def test_labels_are_places_in_the_subset(two_hundred: Path) -> None:
    picture(two_hundred / "thumbnails" / "0.jpg")
    split = subset_split(two_hundred, IMAGENET_R, IMAGENET)
    assert split.labels.tolist() == list(range(200))
    assert [Path(name).parent.name for name in split.names()] == list(subset(IMAGENET_R))
    with pytest.raises(UserError, match=r"do not know 199 of the 200 classes of imagenet-r, .*'n0"):
        subset_split(two_hundred, IMAGENET_R, (subset(IMAGENET_R)[3], "dog"))
    shutil.rmtree(two_hundred / subset(IMAGENET_R)[7])
    with pytest.raises(UserError, match=rf"lacks 1 of the 200 classes of imagenet-r: {subset(IMAGENET_R)[7]}"):
        subset_split(two_hundred, IMAGENET_R, IMAGENET)


def test_imagenet_c_is_listed_and_what_it_lacks_is_named(corrupted: Path) -> None:
    splits = corrupted_splits(corrupted, ("n00", "n01", "n02"))
    assert list(splits) == [(name, severity) for name in CORRUPTIONS for severity in range(1, 6)]
    for (name, severity), split in splits.items():
        assert split.labels.tolist() == [1, 2]
        assert split.read(0) == (corrupted / name / str(severity) / "n01" / "0.jpg").read_bytes()
    shutil.rmtree(corrupted / "frost")
    shutil.rmtree(corrupted / "snow" / "4")
    with pytest.raises(UserError, match="lacks frost, snow/4 of ImageNet-C"):
        corrupted_splits(corrupted, ("n01", "n02"))
    with pytest.raises(UserError, match="does not exist"):
        corrupted_splits(corrupted / "nothing", ("n01",))
