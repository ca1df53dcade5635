"""What findings say: three sentences, lines, JSON, and which pictures each kind leaves out."""

import json
from dataclasses import replace

import numpy as np

from coadvise.inspection.findings import KINDS, USUALLY, Findings
from coadvise.inspection.suspects import Doubts


def rows(found: Findings, *kinds: str) -> dict[str, set[str]]:
    names = {(place.split, place.row): place.name for place in found.places}
    names |= {(place.split, place.row): place.name for place, _ in found.pictures.unreadable}
    return {kind: {names[place] for place in places} for kind, places in found.left_out(kinds).items()}


def test_three_sentences_say_what_is_wrong_and_what_to_do(found: Findings) -> None:
    scores, labels, classes = found.sentences()
    assert "2 scored images" in scores
    assert "1 byte for byte, 1 resized or recompressed" in scores
    assert "--write cleaned.csv --leave-out unreadable,duplicates,two-labels,near" in scores
    assert "1 image under two labels" in labels
    assert "edges and colours" in labels
    assert "1 file cannot be read" in classes
    assert len([*found.lines()]) == 5


def test_three_sentences_of_faultless_data(found: Findings) -> None:
    none = Doubts(found.doubts.probabilities, found.doubts.ranking, (), 1.0)
    clean = replace(found, exact=(), near=(), doubts=none, pictures=replace(found.pictures, unreadable=()))
    assert clean.sentences() == (
        "Scores will be of images that no network was trained on.",
        "No image has two labels, and none has a label that predictions by edges and colours contradict.",
        "All files can be read, and no class is more than three times as large as another.",
    )


def test_classes_of_unequal_size_and_long_pictures_are_named(found: Findings) -> None:
    numbers = [n for n, place in enumerate(found.places) if place.label != 2 or place.split == "val" or n % 6 == 0]
    headers = [replace(found.pictures.headers[0], shape=(100, 20)), *found.pictures.headers[1:]]
    few = replace(
        found.pictures,
        places=tuple(found.places[n] for n in numbers),
        headers=tuple(headers[n] for n in numbers),
        unreadable=(),
    )
    sentence = replace(found, pictures=few, exact=(), near=()).sentences()[2]
    assert sentence.startswith("'red' has 2 training images and 'green' 13")
    assert "1 long image" in sentence
    none = replace(few, places=tuple(place for place in few.places if place.label != 2))
    assert replace(found, pictures=none, exact=(), near=()).sentences()[2].startswith("No image of 'red' can be")


def test_each_kind_leaves_out_its_pictures_and_keeps_scored_ones(found: Findings) -> None:
    left_out = rows(found, *KINDS)
    assert left_out.pop("suspects") <= {"train/red/wrong.png"}
    assert left_out == {
        "unreadable": {"train/red/broken.png"},
        "duplicates": {"train/red/0.png", "train/green/two.png"},
        "two-labels": {"train/blue/1.png"},
        "near": {"train/blue/0.png"},
    }
    assert rows(found, "two-labels") == {"two-labels": {"train/blue/1.png", "train/green/two.png"}}
    assert set(USUALLY) < set(KINDS)


def test_suspects_are_left_out_of_training_alone(found: Findings) -> None:
    numbers = [n for n, place in enumerate(found.places) if place.name.endswith("/3.png")]
    doubts = Doubts(np.ones((len(found.places), 3)), tuple(numbers), tuple(numbers), 0.5)
    assert rows(replace(found, doubts=doubts), "suspects") == {
        "suspects": {f"train/{name}/3.png" for name in found.classes}
    }


def test_everything_is_in_the_json(found: Findings) -> None:
    plain = json.loads(json.dumps(found.plain()))
    assert plain["splits"] == {
        "train": {"images": 38, "per_class": [12, 13, 13]},
        "val": {"images": 17, "per_class": [6, 5, 6]},
    }
    assert plain["unreadable"][0]["name"] == "train/red/broken.png"
    assert [[copy["split"] for copy in group] for group in plain["identical"]] == [["train", "train"], ["train", "val"]]
    assert [copy["label"] for copy in plain["two_labels"][0]] == ["blue", "green"]
    assert [copy["name"] for copy in plain["near"][0]] == ["train/blue/0.png", "val/blue/small.jpg"]
    assert plain["files"]["formats"] == {"PNG": 54, "JPEG": 1}
    assert plain["files"]["shorter_side"] == {"least": 36, "median": 48, "most": 48}
    first = plain["suspects"][0]
    assert first["probability_of_suggested"] > first["probability_of_label"]
    assert first["reason"].startswith(f"labelled '{first['label']}'")
