"""What the demo shows of a picture: the answers of `predict`, maps, the run's own pictures or why there are none."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import OPINIONS, Stopper, make_images, never

from coadvise.data.images import UnreadableImageError
from coadvise.deploy.predict import load_from_run
from coadvise.deploy.viewer import Viewer, ending_of


def viewer_of(run: Path, part: str | None = None) -> tuple[Viewer, list[str]]:
    listener = Stopper(never)
    return Viewer(load_from_run(run, part), run, listener), listener.said


@pytest.fixture(scope="module")
def viewer(finished: Path) -> Viewer:
    return viewer_of(finished)[0]


def test_the_answers_are_those_of_predict(viewer: Viewer, finished: Path, tiny_images: Path) -> None:
    assert viewer.titles == list(OPINIONS)
    for path in (tiny_images / "val" / "red" / "0.png", tiny_images / "train" / "blue" / "3.png"):
        seen = viewer(path.read_bytes(), path.name)
        for title, answers in zip(viewer.titles, seen.answers, strict=True):
            part, answer = OPINIONS[title]
            (wanted,) = load_from_run(finished, part).predict(path, answer)
            assert answers == pytest.approx(wanted.probabilities, abs=1e-6)


def test_a_picture_is_nearest_to_itself_and_shown_as_it_is(viewer: Viewer, tiny_images: Path) -> None:
    path = tiny_images / "train" / "green" / "2.png"
    seen = viewer(path.read_bytes(), path.name)
    assert len(seen.nearest) == 8
    picture, caption = seen.nearest[0]
    assert caption == "green, 1.00"
    np.testing.assert_array_equal(picture, Image.open(path))
    assert [title for _, title in seen.attention] == ["input", "class token", "conv token", "inv token"]
    assert len({picture.size for picture, _ in seen.attention}) == 1
    assert "Of 24 training pictures" in viewer.neighbours


def test_examples_are_scored_pictures_of_all_classes(viewer: Viewer, tiny_images: Path) -> None:
    scored = sorted((tiny_images / "val").rglob("*.png"))  # 4 of each class
    examples = viewer.examples()
    assert [name for name, _ in examples] == [f"{row}.png" for row in (0, 2, 4, 6, 8, 10)]
    assert [content for _, content in examples] == [scored[row].read_bytes() for row in (0, 2, 4, 6, 8, 10)]


@pytest.mark.parametrize(("kind", "ending"), [("JPEG", "jpg"), ("WEBP", "webp"), ("TIFF", None), ("PPM", None)])
def test_examples_are_of_formats_that_browsers_show(kind: str, ending: str | None) -> None:
    content = io.BytesIO()
    Image.new("RGB", (8, 8)).save(content, kind)
    assert ending_of(content.getvalue()) == ending


def test_what_is_no_picture_is_named(viewer: Viewer) -> None:
    with pytest.raises(UnreadableImageError, match=r"'notes.jpg': not an image of a known format \(JPEG"):
        viewer(b"words", "notes.jpg")


def test_a_student_alone_is_shown_beside_the_teachers(finished: Path, tiny_images: Path) -> None:
    viewer, _ = viewer_of(finished, "students/alone-0")
    assert viewer.titles == ["conv teacher", "involution teacher", "class token"]
    assert "student alone" in viewer.about


def test_a_run_whose_data_are_gone_or_changed_is_shown_without_them(finished: Path, tmp_path: Path) -> None:
    data = make_images(tmp_path / "data", train=8, val=4)  # the pictures of `finished`
    run = shutil.copytree(finished, tmp_path / "run")
    about = json.loads((run / "data.json").read_text()) | {"folder": str(data)}
    (run / "data.json").write_text(json.dumps(about))
    content = (data / "val" / "red" / "0.png").read_bytes()
    assert viewer_of(run)[0].nearest is not None
    (data / "train" / "red" / "0.png").unlink()
    for why in ("was trained: training images: 1 removed", "does not exist"):
        viewer, said = viewer_of(run)
        assert said == [viewer.neighbours]
        assert why in viewer.neighbours
        assert viewer.examples() == viewer(content, "0.png").nearest == []
        assert len(viewer(content, "0.png").answers) == 6
        shutil.rmtree(data, ignore_errors=True)
        config = (run / "config.yaml").read_text().replace(about["root"], str(data))
        (run / "config.yaml").write_text(config)


def test_a_network_without_attention_is_shown_without_maps(finished: Path, tiny_images: Path) -> None:
    viewer, _ = viewer_of(finished, "teachers/conv")  # stands for a student that is a ResNet or a Mixer
    assert not viewer.looks
    seen = viewer((tiny_images / "val" / "red" / "0.png").read_bytes(), "0.png")
    assert seen.attention == []
    assert len(seen.nearest) == 8
