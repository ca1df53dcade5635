"""The page: well-formed, self-contained, escaped, complete, and rendered even if most of the run is missing."""

import base64
import html
import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
from made_run import read_lines, write_lines
from PIL import Image

from coadvise.report import write_report
from coadvise.report.classes import class_gains, confusions
from coadvise.report.disagreement import disagreements
from coadvise.report.document import POLICY
from coadvise.report.markup import percent, points
from coadvise.report.page import SECTIONS
from coadvise.report.predictors import predictors
from coadvise.report.read import read_run

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


def pictures(run):
    """The validation images of a made run, by row."""
    return lambda row: (run / "pictures" / f"{row:04d}.png").read_bytes()


def report(run):
    """Writes a run's report and parses it."""
    text = write_report(run, pictures(run)).read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>")
    page = Page(text)
    assert f'<meta http-equiv="Content-Security-Policy" content="{html.escape(POLICY)}">' in text.replace(
        "&#39;", "&#x27;"
    )
    assert "script" not in page.elements
    assert page.elements.count("h1") == 1
    assert all(reference.startswith("#") and reference[1:] in page.ids for reference in page.references)
    assert all(picture.startswith("data:image/") for picture in page.pictures)
    assert "url(" not in page.text["style"]
    assert "@import" not in page.text["style"]
    assert [i for i in page.ids if i in {s[0] for s in SECTIONS}] == [s[0] for s in SECTIONS]
    return page


@pytest.fixture
def small(build):
    """A made run of one seed and two epochs."""
    return build(seeds=(0,), epochs=2, images=100)


def test_a_complete_run(build):
    run = build()
    page = report(run)
    assert "not there yet" not in page.text["p"]
    assert "Advice helped" in page.text["h1"]
    for text in ("conv teacher", "student co-advised (class token)", "cat", "val is every tenth image", "torch 2.13.0"):
        assert text in page.all_text
    assert "coadvise fit --preset tiny" in page.text["pre"]
    assert (run / "config.yaml").read_text() in page.text["pre"]
    assert page.elements.count("article") == len(page.pictures) == 8
    assert (run / "report.html").stat().st_size < 1_000_000
    before = (run / "report.html").read_bytes()
    assert write_report(run, pictures(run)).read_bytes() == before
    assert "Thumbnails are left out" in Page(write_report(run).read_text()).text["p"]


def test_the_shape_of_the_images_and_how_they_are_fitted_are_said(small):
    assert "resolution: 32 × 32 pixels." in report(small).all_text
    data = json.loads((small / "data.json").read_text())
    (small / "data.json").write_text(json.dumps({**data, "image_size": [64, 256], "fit": "pad"}))
    assert "resolution: 64 × 256 pixels (height × width), fitted by pad." in report(small).all_text


def test_every_figure_of_the_verdict_is_below_its_heading(build):
    run = build(epochs=2)
    *results, verdict = read_lines(run)
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
        chief = ' class="chief"' if found["name"] == "student co-advised (class token)" else ""
        assert row(found["name"], *cells, "1.2\u00a0M", "5,400", chief=chief) in text
    for found in (record for record in results if record["kind"] == "result"):
        cells = [f'<td class="text">{found["model"]}</td>']
        cells += [percent(found[score]["class"]) for score in ("top1", "top5", "ece")]
        assert row(found["part"], *cells, "1.234", f"{found['parameters'] / 1e6:.3g}\u00a0M") in text
    assert row("student co-advised, inv", "0.500", "1.000") in text  # KL, the mean over seeds


def test_hostile_names_stay_text(build):
    classes = (EVIL, "a&b", '"><img src=x onerror=alert(1)>', "</style>")
    paths = [f"</code>{EVIL}{n}\udcff.png" for n in range(60)]
    labels = np.arange(60) % 4
    run = build(seeds=(0,), epochs=2, classes=classes, labels=labels, paths=paths, unreadable=[f"<i>{EVIL}.jpg"])
    nasty = {"kind": "eval", "part": f"teachers/{EVIL}", "epoch": 1.0, "top1": {"class": 0.5, EVIL: 0.1}}
    loss = {"kind": "train", "part": "students/advised-0", "epoch": 3.0, "losses": {EVIL: 0.5}}
    started = {"kind": "run", "command": EVIL, "device": "<b>", "versions": {"<u>": "<s>"}, "time": EVIL}
    write_lines(run, [*read_lines(run), nasty, loss, started])
    (run / "config.yaml").write_text(f"name: {EVIL}</pre>")
    page = report(run)
    assert EVIL in page.text["h3"]
    assert f"<i>{EVIL}.jpg" in page.text["code"]
    assert f"name: {EVIL}</pre>" in page.text["pre"]
    assert not {"i", "u", "s"} & set(page.elements)


def test_pictures_are_small_and_of_their_own_format(small):
    for n, path in enumerate(sorted((small / "pictures").iterdir())):
        Image.new("RGB", (16, 12) if n % 2 else (400, 300), (n % 256, 7, 9)).save(path)
    page = report(small)
    assert len(page.pictures) == 8
    for picture in page.pictures:
        kind, content = re.fullmatch(r"data:image/(png|jpeg);base64,(.*)", picture).groups()
        assert base64.b64decode(content).startswith(b"\x89PNG" if kind == "png" else b"\xff\xd8")


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n"  # Pillow would start a program for it


@pytest.mark.parametrize("content", [None, b"", b"\x89PNG broken", POSTSCRIPT])
def test_missing_broken_and_dangerous_pictures_leave_a_placeholder(small, content):
    for path in (small / "pictures").iterdir():
        path.unlink() if content is None else path.write_bytes(content)
    page = report(small)
    assert page.pictures == []
    assert page.text["div"].count("no image") == 8


def test_without_a_baseline_the_page_says_that_there_is_nothing_to_compare(small):
    *records, verdict = read_lines(small)
    verdict.update(difference=None, sentence="No baseline was trained.", remark="The teacher is <more> accurate.")
    verdict["rows"] = [row for row in verdict["rows"] if "alone" not in row["name"]]
    write_lines(small, [*(record for record in records if "alone" not in record.get("part", "")), verdict])
    (small / "predictions" / "students.alone-0.safetensors").unlink()
    page = report(small)
    assert page.text["h1"] == "No baseline was trained."
    assert "no baseline" in page.text["p"]
    assert verdict["remark"] in page.text["p"]


def test_an_interrupted_run_says_how_far_it_got(build):
    run = build(epochs=6)
    kept = [r for r in read_lines(run) if r["kind"] not in ("verdict", "result")]
    write_lines(run, [record for record in kept if not record.get("part", "").startswith("students/advised")])
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "part": "students/ad')
    shutil.rmtree(run / "predictions")
    page = report(run)
    assert page.text["h1"] == "No verdict yet"
    assert "student alone, seed 0" in page.text["th"]
    assert re.search(r"0 of 5 .* students/alone-2 \(epoch 6\)", page.text["p"])


@pytest.mark.parametrize("kinds", [("eval",), ("train",), ("train", "eval"), ("run", "result"), ("verdict",)])
def test_any_kind_of_record_and_any_predictions_may_be_missing(small, kinds):
    write_lines(small, [record for record in read_lines(small) if record["kind"] not in kinds])
    for path in sorted((small / "predictions").iterdir()):
        assert report(small).text["h1"]
        path.unlink()
    assert report(small).text["h1"]


@pytest.mark.parametrize("name", ["config.yaml", "data.json", "metrics.jsonl"])
@pytest.mark.parametrize("content", [None, "", '{"classes": 3, "splits": {"val": [1]}, "kind": "verdict"}'])
def test_any_file_may_be_missing_or_contain_something_else(small, name, content):
    (small / name).unlink()
    if content is None:
        assert f"{name} is missing" in report(small).text["li"]
    else:
        (small / name).write_text(content)
        report(small)


def test_an_empty_directory_has_a_page(tmp_path):
    assert "Nothing has been trained yet." in report(tmp_path).text["p"]


def test_a_difference_that_is_none_or_a_loss_is_shown_as_such(small):
    for low, high, look in ((-0.02, 0.03, "tone-alone"), (-0.05, -0.01, "tone-loss"), (0.01, 0.02, "tone-gain")):
        difference = {"mean": (low + high) / 2, "low": low, "high": high, "over": "images", "seeds": None}
        verdict = {"kind": "verdict", "images": 400, "seeds": [0], "rows": [], "difference": difference}
        write_lines(small, [*read_lines(small), verdict])
        report(small)
        assert f'<b class="{look}">' in (small / "report.html").read_text()


def test_values_of_the_wrong_type_do_not_stop_the_page(small):
    records = read_lines(small)
    for kind in ("train", "eval", "result", "verdict", "run"):
        for value in (None, float("nan"), float("inf"), "text", [1], {"class": float("nan")}):
            record = dict.fromkeys(("epoch", "losses", "top1", "top5", "rows", "difference", "seeds"), value)
            records.append({"kind": kind, "part": "students/advised-0", **record})
    write_lines(small, records)
    assert report(small).text["h1"]


def test_any_number_of_teachers_of_any_name(small):
    predictions = small / "predictions"
    shutil.copy(predictions / "students.alone-0.safetensors", predictions / "teachers.mixer.b16-2.safetensors")
    page = report(small)
    assert "mixer.b16-2 teacher" in page.text["th"]
    assert read_run(small).parts[:3] == ["teachers/conv", "teachers/inv", "teachers/mixer.b16-2"]
    assert page.elements.count("article") == 8
    for file in predictions.glob("teachers.*"):
        file.unlink()
    assert "predictions of two teachers" in report(small).text["p"]


def test_no_old_page_is_lost_when_writing_fails(small, monkeypatch):
    before = write_report(small).read_bytes()

    def fail(_):
        raise OSError("disk full")

    monkeypatch.setattr("coadvise.report.page.os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_report(small)
    assert (small / "report.html").read_bytes() == before
    assert [path.name for path in small.iterdir() if path.name.startswith(".")] == []


def test_made_records_have_the_keys_of_real_ones(small, finished):
    def keys(folder):
        found = {}
        for record in read_run(folder).records:
            found.setdefault(record["kind"], set()).update(record)
        return found

    real = keys(finished)
    for kind, made in keys(small).items():
        assert made <= real[kind], kind


def test_images_are_counted_by_class_and_split(build):
    labels = np.repeat(np.arange(3), (2, 5, 1))
    run = build(seeds=(0,), epochs=2, classes="abc", labels=labels, unreadable=[f"{n}.jpg" for n in range(203)])
    data = json.loads((run / "data.json").read_text())
    data["splits"]["train"] |= {"images": 60, "per_class": [10, 20, 30]}
    (run / "data.json").write_text(json.dumps(data))
    section = re.search(r'<section id="data">.*?</section>', write_report(run).read_text(), re.DOTALL).group()
    assert "60 in train, 8 in val" in section
    rows = re.findall(r'<th scope="row">(.*?)</th>(.*?)</tr>', section)
    cells = [(name, re.findall(r'style="--p:(.*?)%"><span>(.*?)</span>', row)) for name, row in rows]
    assert cells == [
        ("a", [("33.3", "10"), ("40.0", "2")]),
        ("b", [("66.7", "20"), ("100.0", "5")]),
        ("c", [("100.0", "30"), ("20.0", "1")]),
    ]
    assert "203 files" in section
    assert section.count(".jpg") == 200
    assert "and 3 more" in section


def plot_rows(markup):
    """(name, value) of each named row of a dot plot."""
    return re.findall(r'<span class="name" title="[^"]*">(.*?)</span>.*?<span class="value">(.*?)</span>', markup)


def test_classes_are_sorted_by_their_gain_over_all_seeds(five, monkeypatch):
    text = class_gains(five)
    assert plot_rows(text) == [("class 1", "+100.0"), ("class 0", "+50.0"), ("class 2", "−50.0")]
    assert re.findall(r"change tone-\w+", text) == ["change tone-gain", "change tone-gain", "change tone-loss"]
    assert re.findall(r'x="([^"]*)"[^>]*><title>class 2, (.*?)\u00a0%</title>', text) == [
        ("0%", "conv teacher: 0.0"), ("100%", "inv teacher: 100.0"),
        ("100%", "student alone: 100.0"), ("50%", "student co-advised: 50.0"),
    ]  # fmt: skip
    monkeypatch.setattr("coadvise.report.classes.MOST_CLASSES", 2)
    assert [name for name, _ in plot_rows(class_gains(five))] == ["class 1", "class 2"]


def test_mistakes_are_counted_in_a_matrix_or_listed(build, monkeypatch):
    run = read_run(build(seeds=(0,), epochs=2, classes="abc", labels=np.repeat(np.arange(3), (4, 4, 2))))
    run.predictions["students/advised-0"].predicted["class"][:] = [0, 0, 0, 1, 1, 1, 2, 2, 2, 2]
    rows = re.findall(r'<th scope="row">(.*?)</th>(.*?)</tr>', str(confusions(run)))
    cells = [(name, re.findall(r"<td[^>]*>(.*?)</td>", row)) for name, row in rows]
    assert [(name, [cell.replace("\u00a0", " ") for cell in row]) for name, row in cells] == [
        ("a", ["75 %", "100 %", "86 %", "3", "1", "·"]),
        ("b", ["50 %", "67 %", "57 %", "·", "2", "2"]),
        ("c", ["100 %", "50 %", "67 %", "·", "·", "2"]),
    ]
    monkeypatch.setattr("coadvise.report.classes.MOST_CONFUSED", 2)
    listed = re.findall(r'<th scope="row">(.*?)</th><td>(.*?)</td><td>(.*?)</td>', str(confusions(run)))
    assert listed == [("b", "c", "2"), ("a", "b", "1")]


def test_on_disputed_images_the_right_and_the_followed_are_counted(five):
    text = disagreements(five)
    assert f"4 of 5 validation images ({percent(0.8)})" in text
    right, follows = (plot_rows(figure) for figure in re.findall(r"<figure.*?</figure>", text))
    assert [value[:-2] for _, value in right] == ["50", "25", "50", "75", "50", "50"]
    assert [value[:-2] for _, value in follows] == ["75", "0", "25"]  # conv, inv, neither


def test_a_card_is_of_one_image_throughout(five):
    cards = re.findall(r"<article.*?</article>", disagreements(five))
    heads = [re.search(r"<h3>(.*?)</h3><p>(.*?)</p><code>(.*?)</code>", card).groups() for card in cards]
    assert heads == [
        ("class 0", "conv teacher is right; the student is right", "0.png"),
        ("class 0", "no teacher is right; the student is right", "3.png"),
        ("class 2", "inv teacher is right; the student is wrong", "2.png"),
        ("class 1", "conv teacher is right; the student is right", "4.png"),
    ]
    found = [p for p in predictors(five) if p.is_teacher or (p.shape == "dot" and p.token != "average")]
    for card, row in zip(cards, (0, 3, 2, 4), strict=True):
        lines = re.findall(r'<tr><th scope="row" title="class (\d)">(.*?)</th>(.*?)</tr>', card)
        assert [int(k) for k, name, _ in lines if "✓" in name] == [five.predictions[found[0].part].labels[row]]
        cells = {int(k): re.findall(r'<td class="(.*?)" style="--p:(.*?)%">', line) for k, _, line in lines}
        for column, predictor in enumerate(found):
            (shares,) = five.predictions[predictor.part].probabilities([row])[predictor.token]
            shown = {k: line[column] for k, line in cells.items()}
            assert {k: share for k, (_, share) in shown.items()} == {k: f"{100 * shares[k]:.1f}" for k in shown}
            assert [k for k, (look, _) in shown.items() if "answer" in look.split()] == [shares.argmax()]
