"""Reading a run directory and the arithmetic on its predictions."""

import json
import re

import numpy as np
import pytest
from safetensors.numpy import save_file

from coadvise.report.answers import agreement, choose, comparable, disputed, interval, per_class, voices
from coadvise.report.classes import agreements, class_gains
from coadvise.report.curves import curves, group_series, learning, mean_curve
from coadvise.report.disagreement import disagreements, shown_classes
from coadvise.report.markup import Markup, percent
from coadvise.report.read import AVERAGE, group_of, read_run, softmax
from coadvise.report.verdict import rows_of, state_of


def save(run, part, labels, **tokens):
    """Predictions given as answers: each token is sure of its answer by its strength."""
    (run / "predictions").mkdir(parents=True, exist_ok=True)
    arrays = {f"logits.{token}": np.asarray(value, np.float32) for token, value in tokens.items()}
    name = f"{part.replace('/', '.', 1)}.safetensors"
    save_file({"labels": np.asarray(labels, np.int64), **arrays}, run / "predictions" / name)


def sure(answers, strength, classes=3):
    """Logits of these answers; `strength` is one number or one for each."""
    return np.eye(classes)[answers] * np.broadcast_to(strength, len(answers))[:, None]


@pytest.fixture
def run(tmp_path):
    """Five images of three classes, on four of which the two teachers disagree."""
    labels = [0, 1, 2, 0, 1]
    save(tmp_path, "teachers/conv", labels, **{"class": sure([0, 1, 0, 2, 1], [5, 9, 5, 5, 1])})
    save(tmp_path, "teachers/inv", labels, **{"class": sure([1, 1, 2, 1, 0], [5, 9, 4, 6, 9])})
    student = {"class": sure([0, 1, 0, 0, 1], 3), "conv": sure([0, 1, 0, 2, 1], 3), "inv": sure([1, 1, 2, 1, 1], 3)}
    save(tmp_path, "students/advised-0", labels, **student)
    save(tmp_path, "students/alone-0", labels, **{"class": sure([0, 0, 0, 0, 0], 3)})
    return read_run(tmp_path)


def test_average_is_the_mean_of_probabilities(build):
    run = read_run(build(seeds=(0,), epochs=2))
    predictions = run.predictions["students/advised-0"]
    rows = np.arange(len(predictions.labels))
    shares = predictions.probabilities(rows)
    mean = sum(shares.values()) / len(shares)
    np.testing.assert_array_equal(predictions.answers["average"], mean.argmax(1))
    np.testing.assert_allclose(predictions.confidence["average"], mean.max(1))
    np.testing.assert_allclose(shares["class"].sum(1), 1)
    assert list(predictions.answers) == ["class", "conv", "inv", "average"]
    assert list(run.predictions["teachers/conv"].answers) == ["class"]


def test_softmax_survives_large_and_broken_logits():
    shares = softmax(np.array([[1e4, 0.0], [np.nan, 0.0], [np.inf, 1.0]], np.float32))
    np.testing.assert_array_equal(shares[0], [1, 0])
    assert np.isfinite(shares).all()


def test_per_class_is_nan_where_there_are_no_images(run):
    accuracy = per_class(run.predictions["students/advised-0"], "class", 4)
    np.testing.assert_array_equal(accuracy[:3], [1.0, 1.0, 0.0])
    assert np.isnan(accuracy[3])


def test_voices_are_teachers_then_alone_then_tokens(run):
    assert [voice.name for voice in voices(run)] == [
        "conv teacher", "inv teacher", "student alone",
        "student, class token", "student, conv token", "student, inv token", "student, average"]  # fmt: skip
    looks = {voice.name: voice.tone for voice in voices(run)}
    assert looks["conv teacher"] == looks["student, conv token"] == "tone-0"
    assert looks["inv teacher"] == looks["student, inv token"] == "tone-1"


def test_agreement_counts_same_answers(run):
    found = voices(run)
    shares = agreement(run, found)
    np.testing.assert_array_equal(np.diag(shares), 1)
    np.testing.assert_array_equal(shares, shares.T)
    assert shares[0, 1] == pytest.approx(1 / 5)
    assert shares[0, 3] == pytest.approx(4 / 5)


def test_disputes_are_ordered_by_the_less_sure_teacher(run):
    teachers = voices(run)[:2]
    assert disputed(run, teachers).tolist() == [0, 3, 2, 4]
    assert disputed(run, teachers[:1]).tolist() == []


def test_chosen_images_take_turns_between_the_cases(run):
    found = voices(run)
    student = next(voice for voice in found if voice.name == "student, class token")
    # conv right: 0 and 4; nobody right: 3 (student right); inv right: 2 (student wrong)
    assert choose(run, found[:2], student) == [0, 3, 2, 4]
    assert choose(run, found[:2], student, most=2) == [0, 3]


def test_only_those_with_the_same_images_and_classes_are_compared(tmp_path, run):
    save(tmp_path, "teachers/conv", [0, 0, 0], **{"class": sure([0, 1, 0], 2)})
    save(tmp_path, "teachers/inv", [0, 1, 2, 0, 1], **{"class": sure([0, 1, 0, 1, 1], 2, classes=7)})
    other = read_run(tmp_path)
    assert all(not voice.teaches for voice in comparable(other, voices(other)))
    assert len(comparable(run, voices(run))) == 7


def test_shown_classes_hold_the_truth_and_every_answer():
    first, second = np.array([0.7, 0.2, 0.1, 0.0, 0.0, 0.0]), np.array([0.1, 0.1, 0.2, 0.5, 0.1, 0.0])
    assert shown_classes(5, [first, second], most=4) == [0, 3, 1, 5]
    assert shown_classes(0, [first], most=1) == [0]
    assert shown_classes(99, [first], most=2) == [0, 1]  # a label out of range


def test_wilson_interval_of_a_known_case():
    low, high = interval(0.5, 100)
    assert (low, high) == (pytest.approx(0.4038, abs=1e-4), pytest.approx(0.5962, abs=1e-4))
    assert interval(1.0, 10)[1] == pytest.approx(1.0)
    assert interval(0.0, 10)[0] == pytest.approx(0.0)


@pytest.mark.parametrize(
    ("part", "group"),
    [
        ("students/advised-12", ("students/advised", 12)),
        ("students/alone-0", ("students/alone", 0)),
        ("teachers/resnet-18", ("teachers/resnet-18", None)),
        ("students/advised", ("students/advised", None)),
    ],
)
def test_group_of(part, group):
    assert group_of(part) == group


def test_parts_stand_in_reading_order(build):
    run = read_run(build(seeds=(0, 10, 2), epochs=2))
    assert run.parts == [
        "teachers/conv", "teachers/inv", "students/alone-0", "students/alone-2", "students/alone-10",
        "students/advised-0", "students/advised-2", "students/advised-10"]  # fmt: skip


def test_the_later_record_of_an_epoch_and_of_a_part_counts(tmp_path):
    records = [
        {"kind": "eval", "part": "students/alone-0", "epoch": 1.0, "top1": {"class": 0.1}},
        {"kind": "eval", "part": "students/alone-0", "epoch": 1.0, "top1": {"class": 0.2}},
        {"kind": "eval", "part": "students/alone-0", "epoch": 2.0, "top1": {"class": None}},
        {"kind": "result", "part": "students/alone-0", "top1": {"class": 0.3}},
        {"kind": "result", "part": "students/alone-0", "top1": {"class": 0.4}},
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)) + '\n{"kind": "ev')
    run = read_run(tmp_path)
    assert curves(run, "eval", "top1", "class") == {"students/alone-0": {1.0: 0.2}}
    assert [row.top1 for row in rows_of(run)] == [0.4]
    assert state_of(run) == "Every part begun is finished (1); the verdict has not been written."
    assert not any("metrics" in fault for fault in run.faults)  # a torn last line is what an interruption leaves


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"kind": "run"}\n{oops\n{"kind": "eval"}\n[1]\n')
    run = read_run(tmp_path)
    assert [record["kind"] for record in run.records] == ["run", "eval"]
    assert "metrics.jsonl, line 2: not a JSON object" in run.faults


def test_the_mean_over_seeds_is_taken_where_all_have_a_value():
    assert mean_curve([{1.0: 0.2, 2.0: 0.4, 3.0: 0.9}, {2.0: 0.6, 1.0: 0.4}]) == [
        (1.0, pytest.approx(0.3)),
        (2.0, 0.5),
    ]
    assert mean_curve([]) == []
    found = {"students/alone-0": {1.0: 0.2}, "students/alone-1": {1.0: 0.4}, "teachers/conv": {1.0: 1.0}}
    mean, *faint = group_series(found, "students/alone", "alone", "tone-alone")
    assert mean.points == [(1.0, pytest.approx(0.3))]
    assert [line.faint for line in faint] == [True, True]


def test_unreadable_predictions_are_faults_not_crashes(build):
    path = build(seeds=(0,), epochs=2)
    (path / "predictions" / "teachers.conv.safetensors").write_bytes(b"torn")
    save(path, "teachers/inv", [0, 1], **{"class": sure([0, 1, 2], 1)})
    save(path, "students/alone-0", [0, 1])
    run = read_run(path)
    assert list(run.predictions) == ["students/advised-0"]
    assert len(run.faults) == 3


def test_a_run_must_be_a_directory(tmp_path):
    with pytest.raises(ValueError, match="is not a directory: give a run directory"):
        read_run(tmp_path / "none")


def rows_of_plot(markup):
    """(name, value) of each line of a dot plot that has a name."""
    return re.findall(r'<span class="name" title="[^"]*">(.*?)</span>.*?<span class="value">(.*?)</span>', markup)


def test_classes_stand_by_their_gain_over_all_seeds(tmp_path, run, monkeypatch):
    save(
        tmp_path, "students/alone-0", run.predictions["students/alone-0"].labels, **{"class": sure([2, 0, 2, 0, 0], 3)}
    )
    save(tmp_path, "students/advised-1", [0, 1, 2, 0, 1], **{"class": sure([0, 1, 2, 0, 1], 3)})
    other = read_run(tmp_path)
    text = class_gains(other)
    assert "2 of 3 classes gained from advice and 1 lost." in text
    assert "The most: class 1 (+100.0 points); the least: class 2 (−50.0)." in text
    assert rows_of_plot(text) == [("class 1", "+100.0"), ("class 0", "+50.0"), ("class 2", "−50.0")]
    assert re.findall(r"change tone-\w+", text) == ["change tone-gain", "change tone-gain", "change tone-loss"]
    assert re.findall(r'x="([^"]*)"[^>]*><title>class 2, (.*?)\u00a0%</title>', text) == [
        ("0%", "conv teacher: 0.0"), ("100%", "inv teacher: 100.0"),
        ("100%", "student alone: 100.0"), ("50%", "student co-advised: 50.0"),
    ]  # fmt: skip
    monkeypatch.setattr("coadvise.report.classes.MOST_CLASSES", 2)
    assert [name for name, _ in rows_of_plot(class_gains(other))] == ["class 1", "class 2"]


def test_an_agreement_stands_where_its_two_voices_meet(run):
    found, text = voices(run), agreements(run)
    shares = agreement(run, found)
    heads = re.findall(r'<th scope="(?:col|row)">(.*?)</th>', text)
    assert heads == [voice.name for voice in (*found[:-1], *found[1:])]
    assert re.findall(r'title="(.*?)">(.*?)</td>', text) == [
        (f"{found[i].name} and {found[j].name}", percent(shares[i, j], 0)) for i in range(len(found)) for j in range(i)
    ]


def test_of_disputed_images_it_is_counted_who_is_right_and_who_is_followed(run):
    text = disagreements(run)
    assert f"different answers on 4 of 5 validation images ({percent(0.8)}). On those:" in text
    right, follows = (rows_of_plot(figure) for figure in re.findall(r"<figure.*?</figure>", text))
    assert [(name, value[:-2]) for name, value in right] == [
        ("conv teacher", "50"), ("inv teacher", "25"), ("student alone", "50"), ("student, class token", "75"),
        ("student, conv token", "50"), ("student, inv token", "50"),
    ]  # fmt: skip
    assert [(name, value[:-2]) for name, value in follows] == [
        ("conv teacher", "75"), ("inv teacher", "0"), ("nobody", "25"),
    ]  # fmt: skip


def test_a_card_is_of_one_image_throughout(tmp_path, run):
    data = {"splits": {"val": {"paths": [f"{row}.png" for row in range(5)]}}}
    (tmp_path / "data.json").write_text(json.dumps(data))
    cards = re.findall(r"<article.*?</article>", disagreements(read_run(tmp_path)))
    said = [re.search(r"<h3>(.*?)</h3><p>(.*?)</p><code>(.*?)</code>", card).groups() for card in cards]
    assert said == [
        ("class 0", "conv teacher is right; the student is right", "0.png"),
        ("class 0", "no teacher is right; the student is right", "3.png"),
        ("class 2", "inv teacher is right; the student is wrong", "2.png"),
        ("class 1", "conv teacher is right; the student is right", "4.png"),
    ]
    found = [voice for voice in voices(run) if voice.teaches or voice.token in ("class", "conv", "inv")]
    found = [voice for voice in found if voice.shape != "ring"]
    for card, row in zip(cards, (0, 3, 2, 4), strict=True):
        lines = re.findall(r'<tr><th scope="row" title="class (\d)">(.*?)</th>(.*?)</tr>', card)
        assert [int(k) for k, name, _ in lines if "✓" in name] == [run.predictions[found[0].part].labels[row]]
        cells = {int(k): re.findall(r'<td class="(.*?)" style="--p:(.*?)%">', line) for k, _, line in lines}
        for column, voice in enumerate(found):
            (shares,) = run.predictions[voice.part].probabilities([row])[voice.token]
            shown = {k: line[column] for k, line in cells.items()}
            assert {k: share for k, (_, share) in shown.items()} == {k: f"{100 * shares[k]:.1f}" for k in shown}
            assert [k for k, (look, _) in shown.items() if "answer" in look.split()] == [shares.argmax()]


def test_every_curve_is_that_of_its_name(tmp_path, monkeypatch):
    numbers, records = (n / 100 for n in range(1, 100)), []
    conv, inv, alone, advised = "teachers/conv", "teachers/inv", "students/alone-0", "students/advised-0"
    answering = {conv: ["class"], inv: ["class"], alone: ["class"], advised: ["class", "conv", AVERAGE]}
    for part, tokens in answering.items():
        for epoch in (1.0, 2.0):
            at = {"part": part, "epoch": epoch, "step": 40 * epoch}
            losses = {name: next(numbers) for name in tokens if name != AVERAGE}
            losses["total"] = losses["class"] if part in (conv, inv) else next(numbers)
            records += [
                {"kind": "train", **at, "losses": losses},
                {"kind": "eval", **at, "top1": {name: next(numbers) for name in tokens}},
            ]
    records.append({"kind": "result", "part": "teachers/conv", "top1": {"class": 0.91}, "top5": {"class": 0.99}})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    drawn = {}

    def draw(series, title, levels=(), **_):
        drawn[title] = ({line.label: line.points for line in series}, {level.label: level.value for level in levels})
        return Markup()

    monkeypatch.setattr("coadvise.report.curves.line_chart", draw)
    learning(read_run(tmp_path))

    def points(part, kind, field, name):
        own = [record for record in records if (record["kind"], record["part"]) == (kind, part)]
        return [(record["epoch"], record[field][name]) for record in own]

    tokens = {"class": "class token", "conv": "conv token", AVERAGE: "average"}
    assert drawn == {
        "Accuracy of the student’s class token on the validation images": (
            {
                "co-advised": points(advised, "eval", "top1", "class"),
                "alone": points(alone, "eval", "top1", "class"),
            },
            {"conv teacher, final": 0.91},
        ),
        "Accuracy: co-advised student": (
            {label: points(advised, "eval", "top1", token) for token, label in tokens.items()}, {}
        ),
        "Accuracy: teachers": (
            {f"{part[9:]} teacher": points(part, "eval", "top1", "class") for part in (conv, inv)}, {}
        ),
        "Losses: co-advised student": (
            {name: points(advised, "train", "losses", name) for name in ("class", "conv", "total")}, {}
        ),
        "Loss: conv teacher": ({"class": points(conv, "train", "losses", "class")}, {}),
        "Loss: inv teacher": ({"class": points(inv, "train", "losses", "class")}, {}),
        "Losses: student alone": ({name: points(alone, "train", "losses", name) for name in ("class", "total")}, {}),
    }  # fmt: skip
