"""Reading a run directory, and the arithmetic on its predictions."""

import json

import numpy as np
import pytest
from made_run import one_hot, read_lines, save

from coadvise.report.curves import curves, group_series, learning, mean_curve
from coadvise.report.disagreement import shown_classes
from coadvise.report.markup import Markup
from coadvise.report.predictors import (
    agreement,
    choose_examples,
    class_accuracy,
    comparable,
    disputed,
    predictors,
    wilson_interval,
)
from coadvise.report.read import AVERAGE, group_of, read_run, softmax
from coadvise.report.verdict import rows_of, state_of


def test_average_is_the_mean_of_probabilities(build):
    run = read_run(build(seeds=(0,), epochs=2))
    predictions = run.predictions["students/advised-0"]
    shares = predictions.probabilities(np.arange(len(predictions.labels)))
    mean = sum(shares.values()) / len(shares)
    np.testing.assert_array_equal(predictions.predicted["average"], mean.argmax(1))
    np.testing.assert_allclose(predictions.confidence["average"], mean.max(1))
    assert list(predictions.predicted) == ["class", "conv", "inv", "average"]
    assert list(run.predictions["teachers/conv"].predicted) == ["class"]


def test_softmax_of_large_and_non_finite_logits():
    shares = softmax(np.array([[1e4, 0.0], [np.nan, 0.0], [np.inf, 1.0]], np.float32))
    np.testing.assert_array_equal(shares[0], [1, 0])
    assert np.isfinite(shares).all()


def test_a_token_has_its_teacher_s_colour(five):
    found = predictors(five)
    assert [predictor.name for predictor in found] == [
        "conv teacher", "inv teacher", "student alone",
        "student, class token", "student, conv token", "student, inv token", "student, average"]  # fmt: skip
    shares = agreement(five, found)  # of equal predictions
    np.testing.assert_array_equal(np.diag(shares), 1)
    assert (shares[0, 1], shares[0, 3]) == (pytest.approx(1 / 5), pytest.approx(4 / 5))
    looks = {predictor.name: predictor.tone for predictor in found}
    assert np.isnan(class_accuracy(five.predictions["students/advised-0"], 4)).tolist() == [False] * 3 + [True]
    assert looks["conv teacher"] == looks["student, conv token"] != looks["inv teacher"]
    assert looks["inv teacher"] == looks["student, inv token"]


def test_disagreements_are_sorted_by_the_less_confident_teacher_and_examples_take_turns(five):
    found = predictors(five)
    assert disputed(five, found[:2]).tolist() == [0, 3, 2, 4]
    assert disputed(five, found[:1]).tolist() == []
    student = next(predictor for predictor in found if predictor.name == "student, class token")
    # conv right: 0 and 4; neither right: 3 (student right); inv right: 2 (student wrong)
    assert choose_examples(five, found[:2], student) == [0, 3, 2, 4]
    assert choose_examples(five, found[:2], student, most=2) == [0, 3]


def test_only_predictors_of_the_same_images_and_classes_are_compared(tmp_path, five):
    save(tmp_path, "teachers/conv", [0, 0, 0], **{"class": one_hot([0, 1, 0], 2)})
    save(tmp_path, "teachers/inv", [0, 1, 2, 0, 1], **{"class": one_hot([0, 1, 0, 1, 1], 2, known=7)})
    other = read_run(tmp_path)
    assert all(not predictor.is_teacher for predictor in comparable(other, predictors(other)))
    assert len(comparable(five, predictors(five))) == 7


def test_shown_classes_contain_the_true_and_every_predicted_class():
    first, second = np.array([0.7, 0.2, 0.1, 0.0, 0.0, 0.0]), np.array([0.1, 0.1, 0.2, 0.5, 0.1, 0.0])
    assert shown_classes(5, [first, second], most=4) == [0, 3, 1, 5]
    assert shown_classes(0, [first], most=1) == [0]
    assert shown_classes(99, [first], most=2) == [0, 1]  # a label out of range


def test_wilson_interval_of_known_cases():
    assert wilson_interval(0.5, 100) == (pytest.approx(0.4038, abs=1e-4), pytest.approx(0.5962, abs=1e-4))
    assert wilson_interval(1.0, 10)[1] == pytest.approx(1.0)
    assert wilson_interval(0.0, 10)[0] == pytest.approx(0.0)


def test_parts_are_sorted_by_role_and_seed(build):
    assert group_of("students/advised-12") == ("students/advised", 12)
    assert group_of("teachers/resnet-18") == ("teachers/resnet-18", None)
    assert group_of("students/advised") == ("students/advised", None)
    assert read_run(build(seeds=(0, 10, 2), epochs=2)).parts == [
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
    assert "finished" in state_of(run)
    assert not any("metrics" in fault for fault in run.faults)  # an interruption leaves an incomplete last line


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"kind": "run"}\n{oops\n{"kind": "eval"}\n[1]\n')
    run = read_run(tmp_path)
    assert [record["kind"] for record in run.records] == ["run", "eval"]
    assert any("metrics.jsonl, line 2" in fault for fault in run.faults)


def test_unreadable_predictions_are_faults_not_crashes(build, tmp_path):
    path = build(seeds=(0,), epochs=2)
    (path / "predictions" / "teachers.conv.safetensors").write_bytes(b"torn")
    save(path, "teachers/inv", [0, 1], **{"class": one_hot([0, 1, 2], 1)})
    save(path, "students/alone-0", [0, 1])
    run = read_run(path)
    assert list(run.predictions) == ["students/advised-0"]
    assert len(run.faults) == 3
    with pytest.raises(ValueError, match="none is not a directory"):
        read_run(tmp_path / "none")


def test_the_mean_over_seeds_is_taken_at_shared_epochs():
    assert mean_curve([{1.0: 0.2, 2.0: 0.4, 3.0: 0.9}, {2.0: 0.6, 1.0: 0.4}]) == [(1.0, pytest.approx(0.3)), (2.0, 0.5)]
    assert mean_curve([]) == []
    found = {"students/alone-0": {1.0: 0.2}, "students/alone-1": {1.0: 0.4}, "teachers/conv": {1.0: 1.0}}
    mean, *faint = group_series(found, "students/alone", "alone", "tone-alone")
    assert mean.points == [(1.0, pytest.approx(0.3))]
    assert [line.faint for line in faint] == [True, True]


def test_every_curve_is_that_of_its_name(build, monkeypatch):
    run, drawn = build(seeds=(0,), epochs=4), []

    def draw(series, levels=(), **_):
        drawn.append(({line.label: line.points for line in series}, {level.label: level.value for level in levels}))
        return Markup()

    monkeypatch.setattr("coadvise.report.curves.line_chart", draw)
    learning(read_run(run))
    records = read_lines(run)

    def lines(part, kind, field, **labels):
        own = [record for record in records if (record["kind"], record.get("part")) == (kind, part)]
        return {label: [(record["epoch"], record[field][name]) for record in own] for name, label in labels.items()}

    conv, inv, alone, advised = "teachers/conv", "teachers/inv", "students/alone-0", "students/advised-0"
    tokens = {"class": "class token", "conv": "conv token", "inv": "inv token", AVERAGE: "average"}
    teachers = {"conv": "conv teacher", "inv": "involution teacher"}
    final = {f"{teachers[r['part'][9:]]}, final": r["top1"]["class"] for r in records if r.get("role") == "teacher"}
    assert [curves for curves, _ in drawn] == [
        lines(advised, "eval", "top1", **tokens),
        lines(conv, "eval", "top1", **{"class": "conv teacher"})
        | lines(inv, "eval", "top1", **{"class": "involution teacher"}),
        lines(advised, "train", "losses", **{name: name for name in ("class", "conv", "inv", "total")}),
        *(lines(part, "train", "losses", **{"class": "class"}) for part in (conv, inv, alone)),  # class is the total
        lines(advised, "eval", "top1", **{"class": "co-advised"}) | lines(alone, "eval", "top1", **{"class": "alone"}),
    ]
    assert [levels for _, levels in drawn] == [{}] * 6 + [final]
