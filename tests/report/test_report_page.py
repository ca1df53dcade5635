"""The page: well-formed, self-contained, escaped, complete, and there even when most of the run is not."""

import base64
import html
import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from coadvise.report import write_report
from coadvise.report.answers import interval
from coadvise.report.disagreement import thumbnail
from coadvise.report.markup import Markup, percent, points
from coadvise.report.page import POLICY, SECTIONS
from coadvise.report.read import read_run
from coadvise.report.verdict import comparison, rows_of

VOID = {"meta", "img", "br"}
EVIL = "<script>alert('x')</script>"


class Page(HTMLParser):
    """Checks nesting while it parses; keeps elements, references, and the text by element."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.text, self.ids, self.pictures, self.references = [], [], {}, [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, name, attributes):
        assert len(dict(attributes)) == len(attributes), f"an attribute twice in {name}"
        self.elements.append(name)
        for key, value in attributes:
            assert not key.startswith("on"), f"{name} has a handler"
            if key == "id":
                self.ids.append(value)
            if key in ("src", "href", "xlink:href", "action", "data", "poster", "srcset"):
                (self.pictures if name == "img" else self.references).append(value)
        if name not in VOID:
            self.open.append(name)

    def handle_endtag(self, name):
        assert self.open, f"{name} closes nothing"
        assert self.open.pop() == name

    def handle_data(self, data):
        where = self.open[-1] if self.open else ""
        self.text[where] = self.text.get(where, "") + data

    @property
    def all_text(self):
        return " ".join(text for name, text in self.text.items() if name != "style")


def picture_of(run):
    """What reads the pictures of a made run, as the validation split does."""

    def read(row):
        data = json.loads((run / "data.json").read_text())
        return Path(data["root"], data["splits"]["val"]["paths"][row]).read_bytes()

    return read


def report(run):
    """Writes a run's report and parses it."""
    path = write_report(run, picture_of(run))
    assert path == run / "report.html"
    text = path.read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>")
    page = Page(text)
    assert f'<meta http-equiv="Content-Security-Policy" content="{html.escape(POLICY)}">' in text
    assert "script" not in page.elements
    assert page.elements.count("h1") == 1
    assert all(reference.startswith("#") and reference[1:] in page.ids for reference in page.references)
    assert all(picture.startswith("data:image/") for picture in page.pictures)
    assert "url(" not in page.text["style"]
    assert "@import" not in page.text["style"]
    assert [i for i in page.ids if i in {s[0] for s in SECTIONS}] == [s[0] for s in SECTIONS]
    return page


def test_a_complete_run(build):
    run = build()
    page = report(run)
    assert not page.text.get("p", "").count("not there yet")
    assert "Advice helped" in page.text["h1"]
    for text in ("conv teacher", "student co-advised (class token)", "cat", "val is every tenth image", "torch 2.13.0"):
        assert text in page.all_text
    assert "coadvise fit --preset tiny" in page.text["pre"]
    assert (run / "config.yaml").read_text() in page.text["pre"]
    assert "co-advised" in page.text["figcaption"]
    assert page.elements.count("article") == 8
    assert len(page.pictures) == 8
    assert (run / "report.html").stat().st_size < 1_000_000
    assert sorted(p.name for p in run.iterdir() if p.name.startswith(".")) == []


def test_calibration_and_distance_to_the_teachers_are_shown(build):
    run = build(seeds=(0, 1))
    text = report(run).all_text
    for figure in ("calibration error", "4.2\u00a0%", "log loss", "1.234", "How far from each teacher?"):
        assert figure in text
    assert "student co-advised, inv" in text
    assert "0.375" in text  # the mean of 0.25 and 0.50 over two seeds
    assert "0.875" in text
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for record in records:  # a run from before these were recorded
        for key in ("ece", "nll", "divergences"):
            record.pop(key, None)
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert "How far from each teacher?" not in report(run).all_text


def test_every_answer_is_set_against_the_student_alone(build):
    run = build(seeds=(0, 1))
    *records, verdict = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    mean = next(row["difference"]["mean"] for row in verdict["rows"] if row["answer"] == "average")
    spans = [" to ".join(points(mean + sign * half) for sign in (-1, 1)) for half in (0.019, 0.031)]
    text = report(run).all_text
    assert all(f"{points(mean)} ({span})" in text for span in spans)
    for row in verdict["rows"]:  # a run from before these were recorded
        row.pop("difference", None)
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in (*records, verdict)))
    text = report(run).all_text
    assert "to alone" not in text
    assert not any(span in text for span in spans)


def test_every_figure_of_the_verdict_stands_under_its_heading(build):
    run = build(epochs=2)
    *results, verdict = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    text = write_report(run).read_text(encoding="utf-8")

    def row(name, *cells, chief=""):
        texts = "".join(cell if cell.startswith("<td") else f"<td>{cell}</td>" for cell in cells)
        return f'<tr{chief}><th scope="row">{name}</th>{texts}</tr>'

    def span(found):
        return f"{points(found['mean'])} ({points(found['low'])} to {points(found['high'])})"

    for found in verdict["rows"]:
        gain, spread = found.get("difference"), found["spread"]
        cells = [percent(found["top1"]), "–" if spread is None else f"± {100 * spread:.1f}"]
        cells += [span(gain), span(gain["seeds"])] if gain else ["–", "–"]
        cells += ["1.2\u00a0M", "5,400"]
        chief = ' class="chief"' if found["name"] == "student co-advised (class token)" else ""
        assert row(found["name"], *cells, chief=chief) in text
    for found in (record for record in results if record["kind"] == "result"):
        cells = [f'<td class="text">{found["model"]}</td>']
        cells += [percent(found[score]["class"]) for score in ("top1", "top5", "ece")]
        cells += ["1.234", f"{found['parameters'] / 1e6:.3g}\u00a0M"]
        assert row(found["part"], *cells) in text
    difference = verdict["difference"]
    assert f'<b class="tone-gain">{points(difference["mean"])}</b>' in text
    for over, found in (("over images", difference), ("over 3 seeds", difference["seeds"])):
        drawn = re.search(rf'title="{over}">{over}</span><svg.*?</svg><span class="value">(.*?)</span>', text)
        assert drawn.group(1) == f"{points(found['low'])} to {points(found['high'])}"


def test_the_marks_of_the_comparison_are_those_of_its_legend(build):
    run = build(epochs=2)
    text = write_report(run).read_text(encoding="utf-8")
    looks = ("square tone-total", "ring tone-alone", "dot tone-student")
    for name, look in zip(("teacher", "student alone", "student co-advised"), looks, strict=True):
        assert re.search(rf'class="{look}"><title>{name}</title></\w+></svg> {name}</li>', text)
    assert [row.shape for row in rows_of(read_run(run))] == ["square", "square", "ring", *["dot"] * 4]


def test_the_comparison_s_bars_are_spread_and_interval(build, monkeypatch):
    run, drawn = read_run(build(epochs=2)), []
    monkeypatch.setattr(
        "coadvise.report.verdict.track", lambda x, dots, bars, **_: drawn.append((dots, bars)) or Markup()
    )
    comparison(run)
    for row, ((dot,), bars) in zip(rows_of(run), drawn, strict=True):
        band = [] if row.spread is None else [(row.top1 - row.spread, row.top1 + row.spread)]
        assert dot.value == row.top1
        assert [(bar.low, bar.high) for bar in bars] == [*band, interval(row.top1, 400)]


def test_the_same_run_gives_the_same_page(build):
    run = build(seeds=(0,), epochs=3)
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first


def test_hostile_names_stay_text(build):
    classes = (EVIL, "a&b", '"><img src=x onerror=alert(1)>', "</style>")
    paths = [f"</code>{EVIL}{n}\udcff.png" for n in range(60)]
    labels = np.arange(60) % 4
    run = build(seeds=(0,), epochs=2, classes=classes, labels=labels, paths=paths, unreadable=[f"<i>{EVIL}.jpg"])
    with (run / "metrics.jsonl").open("a") as file:
        nasty = {"kind": "eval", "part": f"teachers/{EVIL}", "epoch": 1.0, "top1": {"class": 0.5, EVIL: 0.1}}
        loss = {"kind": "train", "part": "students/advised-0", "epoch": 3.0, "losses": {EVIL: 0.5}}
        started = {"kind": "run", "command": EVIL, "device": "<b>", "versions": {"<u>": "<s>"}, "time": EVIL}
        file.write("".join(json.dumps(record) + "\n" for record in (nasty, loss, started)))
    (run / "config.yaml").write_text(f"name: {EVIL}</pre>")
    page = report(run)
    assert EVIL in page.text["h3"]
    assert f"<i>{EVIL}.jpg" in page.text["code"]
    assert f"name: {EVIL}</pre>" in page.text["pre"]
    assert not {"i", "u", "s"} & set(page.elements)


def test_pictures_are_the_validation_files(build, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for n in range(80):
        size = (16, 12) if n % 2 else (400, 300)
        Image.new("RGB", size, (n, 2 * n, 9)).save(folder / f"{n}.png")
    page = report(build(seeds=(0,), epochs=2, images=80, pictures=folder, paths=[f"{n}.png" for n in range(80)]))
    assert len(page.pictures) == 8
    for picture in page.pictures:
        kind, content = re.fullmatch(r"data:image/(png|jpeg);base64,(.*)", picture).groups()
        assert base64.b64decode(content).startswith(b"\x89PNG" if kind == "png" else b"\xff\xd8")


def test_missing_and_broken_pictures_leave_a_placeholder(build):
    run = build(seeds=(0,), epochs=2)
    for picture in (run / "pictures").iterdir():
        picture.write_bytes(picture.read_bytes()[:40])
    page = report(run)
    assert page.pictures == []
    assert page.text["div"].count("no picture") == 8
    shutil.rmtree(run / "pictures")
    assert report(run).text["div"].count("no picture") == 8


def test_without_the_pictures_a_line_says_so_and_no_program_is_started(build):
    run = build(seeds=(0,), epochs=2)
    page = Page(write_report(run).read_text(encoding="utf-8"))
    assert page.pictures == []
    assert "Thumbnails are left out" in page.text["p"]
    assert "no picture" not in page.all_text
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n"
    assert "<img" not in thumbnail(replace(read_run(run), picture=lambda row: postscript), 0, "ps.png")


def drop(run, *kinds, part=""):
    """Takes records out of metrics.jsonl."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    kept = [line for line in lines if json.loads(line)["kind"] not in kinds and (not part or part not in line)]
    (run / "metrics.jsonl").write_text("\n".join(kept) + "\n")


def test_a_remark_stands_beside_the_verdict(build):
    run = build(seeds=(0,), epochs=2)
    *records, verdict = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert "The conv teacher" not in report(run).text["p"]
    verdict["remark"] = "The conv teacher is <more> accurate."
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in (*records, verdict)))
    assert verdict["remark"] in report(run).text["p"]


def test_without_a_baseline_the_page_says_that_nothing_was_compared(build):
    run = build(seeds=(0,), epochs=2)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    verdict = lines[-1]
    verdict.update(difference=None, sentence="No baseline was trained.", remark="The conv teacher is more accurate.")
    verdict["rows"] = [row for row in verdict["rows"] if "alone" not in row["name"]]
    kept = [line for line in lines[:-1] if "alone" not in line.get("part", "")]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*kept, verdict]))
    (run / "predictions" / "students.alone-0.safetensors").unlink()
    page = report(run)
    assert page.text["h1"] == "No baseline was trained."
    assert "nothing to set the co-advised student against" in page.text["p"]
    assert "The conv teacher is more accurate." in page.text["p"]
    assert "A gain needs both a student alone and a co-advised one" in page.text["p"]


def test_an_interrupted_run_says_how_far_it_came(build):
    run = build(epochs=6)
    drop(run, "verdict", "result", part="students/advised")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "part": "students/ad')
    shutil.rmtree(run / "predictions")
    page = report(run)
    assert page.text["h1"] == "No verdict yet"
    assert "student alone, seed 0" in page.text["th"]
    assert "The latest top-1 of each part so far." in page.text["p"]
    assert "0 of 5 parts begun are finished; the last record is of students/alone-2 (epoch 6)." in page.text["p"]
    assert "No predictions have been saved yet" in page.text["p"]


@pytest.mark.parametrize("kinds", [("eval",), ("train",), ("train", "eval"), ("run", "result"), ("verdict",)])
def test_any_kind_of_record_may_be_missing(build, kinds):
    run = build(seeds=(0,), epochs=2)
    drop(run, *kinds)
    assert report(run).text["h1"]


@pytest.mark.parametrize("name", ["teachers.conv", "teachers.inv", "students.alone-0", "students.advised-0"])
def test_any_predictions_may_be_missing(build, name):
    run = build(seeds=(0,), epochs=2)
    (run / "predictions" / f"{name}.safetensors").unlink()
    assert report(run).text["h1"]


@pytest.mark.parametrize("name", ["config.yaml", "data.json", "metrics.jsonl"])
@pytest.mark.parametrize("content", [None, "", "[]", '{"classes": 3, "splits": {"val": [1]}, "kind": "verdict"}'])
def test_any_file_may_be_missing_or_hold_something_else(build, name, content):
    run = build(seeds=(0,), epochs=2)
    (run / name).unlink()
    if content is None:
        assert f"{name} is missing" in report(run).text["li"]
    else:
        (run / name).write_text(content)
        report(run)


def test_an_empty_directory_has_a_page(tmp_path):
    page = report(tmp_path)
    assert "Nothing has been trained yet." in page.text["p"]


def test_a_difference_that_is_none_or_a_loss_is_shown_as_such(build):
    run = build(seeds=(0,), epochs=2)
    for low, high, look in ((-0.02, 0.03, "tone-alone"), (-0.05, -0.01, "tone-loss"), (0.01, 0.02, "tone-gain")):
        difference = {"mean": (low + high) / 2, "low": low, "high": high, "over": "images", "seeds": None}
        verdict = {"kind": "verdict", "images": 400, "seeds": [0], "rows": [], "difference": difference}
        with (run / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({**verdict, "sentence": "x"}) + "\n")
        report(run)
        assert f'<b class="{look}">' in (run / "report.html").read_text()


def test_numbers_that_are_none_of_that_do_not_stop_the_page(build):
    run = build(seeds=(0,), epochs=2)
    with (run / "metrics.jsonl").open("a") as file:
        for kind in ("train", "eval", "result", "verdict", "run"):
            for value in (None, float("nan"), float("inf"), "text", [1], {"class": float("nan")}):
                record = dict.fromkeys(("epoch", "losses", "top1", "top5", "rows", "difference", "seeds"), value)
                file.write(json.dumps({"kind": kind, "part": "students/advised-0", **record}) + "\n")
    assert report(run).text["h1"]


def test_many_classes_show_the_ends_only_and_stay_small(build):
    classes = [f"class number {k}" for k in range(150)]
    run = build(seeds=(0, 1), classes=classes, images=1500, epochs=200)
    page = report(run)
    assert "The 20 that gained most" in page.text["h3"]
    assert "The 20 that gained least" in page.text["h3"]
    assert "Images of each of the 150 classes" in page.text["summary"]
    assert (run / "report.html").stat().st_size < 1_000_000


def test_any_teachers_are_possible(build):
    run = build(seeds=(0,), epochs=2)
    text = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(text.replace("teachers/inv", "teachers/mixer.b16-2"))
    (run / "predictions" / "teachers.inv.safetensors").rename(run / "predictions" / "teachers.mixer.b16-2.safetensors")
    page = report(run)
    assert "teachers/mixer.b16-2" in page.all_text
    assert read_run(run).parts[:2] == ["teachers/conv", "teachers/mixer.b16-2"]
    assert page.elements.count("article") == 8


def test_three_teachers_and_none(build):
    run = build(seeds=(0,), epochs=2)
    predictions = run / "predictions"
    shutil.copy(predictions / "students.alone-0.safetensors", predictions / "teachers.mixer.safetensors")
    page = report(run)
    assert "mixer teacher" in page.text["th"]
    assert page.elements.count("article") == 8
    for file in predictions.glob("teachers.*"):
        file.unlink()
    assert "This needs the predictions of two teachers" in report(run).text["p"]


def test_no_old_page_is_lost_when_writing_fails(build, monkeypatch):
    run = build(seeds=(0,), epochs=2)
    before = write_report(run).read_bytes()

    def fail(_):
        raise OSError("disk full")

    monkeypatch.setattr("coadvise.report.page.os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_report(run)
    assert (run / "report.html").read_bytes() == before
    assert [path.name for path in run.iterdir() if path.name.startswith(".")] == []


def test_a_run_s_beginning_is_that_of_its_first_command(build):
    folder = build()
    resumed = {"kind": "run", "time": "2026-11-24T09:00:00+00:00", "device": "cpu, 2 cores"}
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(resumed) + "\n")
    text = write_report(folder).read_text()
    assert "2026-11-23 18:00:00 UTC" in text
    assert "2026-11-24" not in text


def test_made_records_say_nothing_that_real_ones_do_not(build, finished):
    def keys(folder):
        found = {}
        for record in read_run(folder).records:
            found.setdefault(record["kind"], set()).update(record)
        return found

    real = keys(finished)
    for kind, made in keys(build()).items():
        assert made <= real[kind], kind


def test_images_are_counted_under_their_split(build):
    labels = np.repeat(np.arange(3), (2, 5, 1))
    run = build(
        seeds=(0,), epochs=2, classes=("a", "b", "c"), labels=labels, unreadable=[f"{n}.jpg" for n in range(203)]
    )
    data = json.loads((run / "data.json").read_text())
    data["splits"]["train"] |= {"images": 60, "per_class": [10, 20, 30]}
    (run / "data.json").write_text(json.dumps(data))
    text = write_report(run).read_text(encoding="utf-8")
    assert "3 classes; images: 60 in train, 8 in val; seen at 32 × 32 pixels." in text
    section = re.search(r'<section id="data">.*?</section>', text, re.DOTALL).group()
    assert re.findall(r'<th scope="col">(.*?)</th>', section) == ["class", "train", "val"]
    rows = re.findall(r'<th scope="row">(.*?)</th>(.*?)</tr>', section)
    cells = [(name, re.findall(r'style="--p:(.*?)%"><span>(.*?)</span>', row)) for name, row in rows]
    assert cells == [
        ("a", [("33.3", "10"), ("40.0", "2")]),
        ("b", [("66.7", "20"), ("100.0", "5")]),
        ("c", [("100.0", "30"), ("20.0", "1")]),
    ]
    assert "203 files of train could not be read and took no part" in section
    assert section.count(".jpg") == 200
    assert "and 3 more" in section
    assert "Every file of val could be read." in section
