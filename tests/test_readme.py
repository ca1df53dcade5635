"""The commands of the README and the guides run, and so does their Python; docs/RESULTS.md says what results/ says."""

import functools
import json
import re
import shlex
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from tests.tiny import make_images

import coadvise
from coadvise.cli import app
from coadvise.config.reading import load_config, read_config
from coadvise.data.sources import open_source
from coadvise.evaluation.verdict import seed_interval
from coadvise.runs.conclude import verdict_table
from coadvise.runs.experience import GAINS
from coadvise.runs.plan import MOST_ON_A_CORE
from coadvise.studies import runner
from coadvise.studies.plan import study_config
from coadvise.studies.result import markdown
from coadvise.training.metrics import last_of, read_records

FEW_STEPS = [
    f"{network}.recipe.{key}=1"
    for network in ("teachers.conv", "teachers.inv", "student")
    for key in ("epochs", "evaluations")
]
ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
RESULTS = (ROOT / "docs/RESULTS.md").read_text().replace("**", "")
PAGES = (
    "START", "PHOTOGRAPHS", "TABLES", "DATA", "TRAINING", "USING", "PARTS", "METHOD", "VERDICT", "DETERMINISM"
)  # fmt: skip
TEACHER = (ROOT / "docs/TEACHER.md").read_text()  # its Python goes on from block to block
GUIDES = "".join((ROOT / "docs" / f"{name}.md").read_text() for name in PAGES)


ONNX_ALONE = "import onnxruntime"  # in the block that needs nothing of coadvise


def _blocks(language: str) -> list[str]:
    return _blocks_of(README + GUIDES + RESULTS, language)


def _blocks_of(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def _commands(first: str) -> list[list[str]]:
    """Their `coadvise FIRST ...` lines as arguments, comments left out."""
    lines = "\n".join(_blocks("sh") + _blocks("text") + _blocks_of(TEACHER, "text")).splitlines()
    commands = [line.removeprefix("$ ").partition(" | ")[0] for line in lines if re.search(r"coadvise ", line)]
    found = [shlex.split(command, comments=True) for command in commands]
    return [words[1:] for words in found if Path(words[0]).name == "coadvise" and words[1] == first]


@pytest.fixture(scope="module")
def beside(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the pictures that the README names and the run that its Python makes, trained for a few steps."""
    folder = tmp_path_factory.mktemp("readme")
    digits = open_source("digits")
    for name in ("photo.png", "photo.jpg"):
        (folder / name).write_bytes(digits.val.read(0))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(coadvise, "fit", functools.partial(coadvise.fit, overrides=FEW_STEPS))
        for block in (*_blocks("python"), "".join(_blocks_of(TEACHER, "python"))):
            if ONNX_ALONE not in block:
                exec(block, {})
    make_images(folder / "trashnet")  # in place of the photographs, and of the run on them
    (folder / "runs/trashnet-photos-small-seed0").symlink_to(folder / "runs/demo")
    return folder


def test_python_leaves_a_report(beside: Path) -> None:
    assert (beside / "runs/demo/report.html").stat().st_size > 10_000


def test_commands_run(beside: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(beside)
    plain = ("evaluate", "predict", "export", "models", "presets", "studies")
    commands = [words for first in plain for words in _commands(first)]
    commands += [words for words in _commands("push") if "--dry-run" in words]
    commands += [["check", "trashnet"], ["compare", "runs/demo", "runs/likeness"]]
    commands += [["shard", "trashnet", "--out", "trashnet-shards"]]
    assert all(words in _commands(words[0]) for words in commands)
    assert len(commands) >= 14
    for words in commands:
        few = ["--images", "5", "--severities", "3"] if "--corruptions" in words else []
        app(words + few, standalone_mode=False)
        assert capsys.readouterr().out.strip(), words


def test_an_exported_file_answers_without_coadvise(
    beside: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxruntime", reason="the extra 'onnx' is not installed")
    monkeypatch.chdir(beside)
    (words,) = (words for words in _commands("export") if "--preprocess" in words)
    app(words, standalone_mode=False)
    capsys.readouterr()
    (block,) = (block for block in _blocks("python") if ONNX_ALONE in block)
    assert "coadvise" not in re.sub(r'"coadvise"', "", block)
    exec(block, {})
    label, probability = capsys.readouterr().out.split()
    expected = coadvise.load("runs/demo").predict("photo.png")[0]
    assert label == expected.label
    assert float(probability) == pytest.approx(expected.probability, abs=0.01)


def test_fit_commands_parse() -> None:
    commands = [
        words for words in _commands("fit") if "student.recipe.epoch=3" not in words and "mine.yaml" not in words
    ]
    assert len(commands) >= 12
    for words in commands:
        load_config("small-images", [word for word in words[2:] if "=" in word])


def test_study_commands_are_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    planned = []
    monkeypatch.setattr(runner, "run_study_of", lambda options, terminal: planned.append(study_config(options)))
    monkeypatch.setattr(runner, "estimate_study", lambda options, *tell: planned.append(study_config(options)))
    commands = [words for words in _commands("study") if "digits" in words]
    assert len(commands) >= 2
    for words in commands:
        app([word for word in words if word != "--dry-run"], standalone_mode=False)
    assert len(planned) == len(commands)


def test_the_readme_is_short_and_its_links_lead_somewhere() -> None:
    assert len(README.splitlines()) <= 200
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "docs").glob("notebooks/*.ipynb")):
        for link in re.findall(r"\]\((?!http)([^)#\s]+)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"^make ([a-z]+)", "\n".join(_blocks("sh")), re.M)) <= targets


def _percent(figure: dict[str, Any], key: str) -> str:
    spread = f" ± {100 * figure['spread']:.1f}" if figure["spread"] is not None else ""
    return f"{100 * figure[key]:.1f}{spread} %"


def _compared(name: str) -> dict[str, Any]:
    """What `coadvise compare --json` printed of committed runs."""
    return json.loads((ROOT / "results" / name / "compare.json").read_text())


def _verdict(name: str) -> dict[str, Any]:
    verdict = last_of(read_records(ROOT / "results" / name), "verdict")
    assert verdict is not None
    return verdict


def test_the_results_are_what_the_record_says() -> None:
    verdict = _verdict("cifar10-500")
    for row in verdict["rows"]:
        name = re.sub(r" \((.*)\)", r", \1", row["name"])
        figures = f"{_percent(row, 'top1')} | {row['parameters'] / 1e6:.2f} M | {row['images_per_second']:.0f}"
        assert f"| {name} | {figures} |" in RESULTS
    images, seeds = verdict["sentence"].replace("5000", "5,000").split(" images, ")
    assert f"{images} images, {seeds.replace('95 % interval ', '')}" in RESULTS
    tops = {r["part"]: r["top1"] for r in read_records(ROOT / "results/cifar10-500") if r["kind"] == "result"}
    gains = [tops[f"students/advised-{n}"]["average"] - tops[f"students/alone-{n}"]["class"] for n in verdict["seeds"]]
    average = str(seed_interval(gains)).replace("95 % interval ", "")
    assert f"in place of the class token: {average} over seeds" in " ".join(RESULTS.split())
    assert f"Unrounded, the first is {100 * verdict['difference']['mean']:.2f}." in RESULTS


def test_what_fit_prints_in_the_tutorials_is_what_its_records_say() -> None:
    first, last = (r for r in read_records(ROOT / "results/digits") if r["kind"] == "verdict")
    start, photographs = ((ROOT / f"docs/{name}.md").read_text() for name in ("START", "PHOTOGRAPHS"))
    for page, verdict in ((start, first), (photographs, _verdict("trashnet-128"))):
        table = verdict_table(verdict["rows"], with_macro=verdict["macro_difference"] is not None)
        assert "\n".join([*table, verdict["sentence"]]) in page
        assert verdict["remark"] in " ".join(page.split())
    assert last["sentence"] in start
    mean, low, high = (f"{100 * last['difference']['seeds'][key]:+.1f}" for key in ("mean", "low", "high"))
    assert f"with `--seeds 3` advice was worth {mean} points, {low} to {high} over seeds" in " ".join(README.split())
    shown = README.partition("like this:\n\n```text\n")[2].splitlines()
    assert [line[:-9] for line in verdict_table(first["rows"])] == [line[:-9] for line in shown[:9]]  # without speeds


PHOTOGRAPHS = [("clothing", "clothing"), ("trashnet", "waste"), ("trashnet-128", "waste at 128 pixels")]


@pytest.mark.parametrize(("data", "what"), PHOTOGRAPHS)
def test_the_results_on_photographs_are_what_the_record_says(data: str, what: str) -> None:
    verdict = _verdict(data)
    page = RESULTS.partition(f"## Photographs of {what}")[2].partition("\n## ")[0]
    for row in verdict["rows"]:
        name = re.sub(r" \((.*)\)", r", \1", row["name"])
        assert f"| {name} | {_percent(row, 'top1')} | {100 * row['macro_accuracy']:.1f} % |" in page
    assert verdict["sentence"] in page
    gain, low, high = (f"{100 * verdict['difference'][key]:+.1f}" for key in ("mean", "low", "high"))
    assert f"of {what} {gain} points ({low} to {high}" in " ".join(README.split())


def test_the_teacher_s_lead_on_clothing_is_what_the_record_says() -> None:
    page = RESULTS.partition("## Photographs of clothing")[2].partition("\n## ")[0]
    behind, bounds = re.findall(r"student: \+([\d.]+) points \(95 % interval (.*?)\)", _verdict("clothing")["remark"])[
        0
    ]
    assert f"The conv teacher is {behind} points ({bounds}) more accurate" in " ".join(page.split())


def test_what_is_said_of_the_default_for_photographs_is_what_its_records_say() -> None:
    page = " ".join(RESULTS.partition("## Photographs of waste at 128 pixels")[2].partition("\n## ")[0].split())
    shared = next(pair for pair in _verdict("trashnet-128")["overlaps"] if pair["tokens"] == ["conv", "inv"])
    assert f"share {100 * shared['last']:.0f} % of what they look at" in page
    patient = [r for r in read_records(ROOT / "results/trashnet-128-130-epochs") if r["kind"] == "eval"]
    tops = {(r["part"], r["epoch"]): r["top1"]["class"] for r in patient}
    assert f"had {100 * tops['students/advised-0', 60]:.1f} % after 60 epochs" in page
    assert f"alone {100 * tops['students/alone-0', 90]:.1f} % after 90" in page
    rows = [row for row in _verdict("trashnet-128")["rows"] if row["answer"] == "class"]
    said = {row["part"]: f"{100 * row['top1']:.1f}" for row in rows}
    brief = " ".join(README.replace("**", "").split())
    conv, inv, alone, advised = said.values()
    assert f"alone {alone} %, co-advised {advised} %, its teachers {conv} and {inv} %" in brief
    assert f"{MOST_ON_A_CORE:,} images a core" in " ".join((ROOT / "docs/TRAINING.md").read_text().split())


def test_when_to_co_advise_is_said_from_the_records() -> None:
    names = ("digits", "clothing", "trashnet", None, "cifar10-500")
    page = RESULTS.partition("## When to co-advise")[2].partition("\n## ")[0]
    said = [line.split(" | ") for line in page.splitlines() if line.startswith("| ") and " % |" in line]
    for name, (_, pictures, *cells) in zip(names, said, strict=True):
        if name is None:
            together = _compared("trashnet-128-splits")["pooled"]
            tops, gain = together["top1"], together["over_images"]["mean"]
        else:
            rows = [row for row in _verdict(name)["rows"] if row["answer"] == "class"]
            tops = {row["name"]: row["top1"] for row in rows}
            gain = _verdict(name)["difference"]["mean"]
        *_, alone, advised = tops.values()
        best = max([*tops.values()][:2])
        assert [*map(str.strip, cells)] == [
            f"{100 * alone:.1f} %", f"{100 * advised:.1f} %", f"{100 * gain:+.1f}", f"{100 * best:.1f} % |",
        ]  # fmt: skip
        known = {gained.record: gained.pictures for gained in GAINS}
        assert pictures.split(",")[0] == str(known[name or "trashnet-128"])
        assert best > advised, "the convolution teacher stays ahead in every row"
    gains = [float(cells[-2]) for name, cells in zip(names, said, strict=True) if name != "digits"]
    assert f"worth {min(gains):.0f} to {max(gains):.0f} points on photographs" in page
    tuned = max(row["top1"] for row in _verdict("trashnet-128-finetuned")["rows"] if row["name"].startswith("conv"))
    assert f"has {100 * tuned:.1f} % on waste" in page


def test_what_epochs_and_single_teachers_bring_is_said_from_the_records() -> None:
    page = " ".join(RESULTS.split())
    short, long = (100 * _verdict(f"cifar10-500-{name}")["difference"]["mean"] for name in ("width-96", "100-epochs"))
    assert f"student of width 96 gained {short:.1f} points with 50 epochs and {long:.1f} with 100" in page
    tables = {
        name: json.loads((ROOT / f"results/cifar10-500-tables/{name}.json").read_text())
        for name in ("table7", "table9")
    }
    tops = {row["name"]: 100 * row["figures"]["top1"]["mean"] for row in tables["table7"]["rows"]}
    inv = tops["1 token, RedNet-26"]
    assert f"alone added {inv - tops['1 token, ResNet-18']:.1f} points more than the convolution teacher" in page
    assert f"within noise, {tops['1 token, ResNet-18 + RedNet-26'] - inv:+.1f} points" in page
    errors = [
        claim["difference"]
        for claim in tables["table9"]["claims"]
        if claim["text"].startswith(("not advised", "advised")) and claim["difference"]
    ]
    assert f"differ by at most {100 * max(map(abs, errors)):.1f} points under corruptions" in page


def test_three_splits_of_the_photographs_together_are_what_their_records_say() -> None:
    names = ("trashnet-128", "trashnet-128-split1", "trashnet-128-split2")
    verdicts, together = [_verdict(name) for name in names], _compared("trashnet-128-splits")["pooled"]
    tops = [
        [row["top1"] for row in verdict["rows"] if row["part"] != "teachers" and row["answer"] == "class"]
        for verdict in verdicts
    ]
    means = [fmean(of_splits) for of_splits in zip(*tops, strict=True)]
    assert means == pytest.approx(list(together["top1"].values()))
    conv, inv, alone, advised = (f"{100 * mean:.1f}" for mean in means)
    brief, page = (" ".join(text.replace("**", "").split()) for text in (README, RESULTS))
    images, splits = (together[over] for over in ("over_images", "over_runs"))
    over_images = f"{100 * images['low']:+.1f} to {100 * images['high']:+.1f}"
    assert f"over three splits {100 * images['mean']:+.1f} points ({over_images}): alone {alone} %" in brief
    assert f"alone {alone} %, co-advised {advised} %, teachers {conv} and {inv} %" in brief
    assert f"conv {conv} %, inv {inv} %, alone {alone} %, co-advised {advised} %" in page
    assert (
        f"advice helped by {100 * splits['mean']:.1f} points ({over_images} over {together['images']:,} images" in page
    )
    assert f"{100 * splits['low']:+.1f} to {100 * splits['high']:+.1f} over splits" in page
    over = seed_interval([verdict["difference"]["mean"] for verdict in verdicts])
    assert over is not None
    assert (over.mean, over.low, over.high) == pytest.approx([splits[key] for key in ("mean", "low", "high")])
    for verdict in verdicts[1:]:
        assert verdict["sentence"] in RESULTS
        for row in verdict["rows"]:
            name = re.sub(r" \((.*)\)", r", \1", row["name"])
            assert f"| {name} | {_percent(row, 'top1')} | {100 * row['macro_accuracy']:.1f} % |" in RESULTS


def test_gains_over_pictures_and_epochs_are_what_the_study_found() -> None:
    folder = ROOT / "results/cifar10-500-gain"
    page = RESULTS.partition("## From 20 to 500 pictures a class")[2].partition("\n## ")[0]
    shown = [line for line in page.splitlines() if " a class, " in line and line.startswith("|")]
    measured = [
        line for line in (folder / "gain.md").read_text().splitlines() if " a class, " in line and " % |" in line
    ]
    assert shown == measured
    rows = json.loads((folder / "gain.json").read_text())["rows"]
    tops = {row["name"]: 100 * row["figures"]["top1"]["mean"] for row in rows if row["figures"]["top1"]["mean"]}
    epochs = [
        tops[f"{few} a class, 4 times as many, alone"] - tops[f"{few} a class, the preset's epochs, alone"]
        for few in (20, 50)
    ]
    assert f"brought {epochs[0]:.1f} and {epochs[1]:.1f} points alone" in " ".join(page.split())
    leads = {row["name"]: 100 * (row["figures"]["lead"]["mean"] or 0) for row in rows}
    for few, said in ((20, 37.2), (50, 48.7)):
        name = f"{few} a class, 4 times as many"
        assert said == pytest.approx(tops[f"{name}, alone"] + leads[f"{name}, co-advised"], abs=0.05)
        assert f"({said} %)" in page
    teacher, _, alone, advised = (
        100 * row["top1"] for row in _verdict("cifar10-500")["rows"] if row["answer"] == "class"
    )
    said = f"with all pictures it is {teacher - alone:.0f} points, and the gain {advised - alone:.1f}"
    assert said in " ".join(page.split())
    assert tops["20 a class, 4 times as many, alone"] > 37.2
    assert tops["50 a class, 4 times as many, co-advised"] > 48.7


def test_what_patience_brings_on_cifar_is_what_its_record_says() -> None:
    verdict, config = _verdict("cifar10-500-patient"), read_config(ROOT / "results/cifar10-500-patient/config.yaml")
    page = RESULTS.partition("### With six times the patience")[2].partition("\n#")[0]
    for part in ("augment", "student", "cache"):
        assert getattr(config, part) == getattr(load_config("small-images-patient"), part)
    for row in verdict["rows"]:
        name = re.sub(r" \((.*)\)", r", \1", row["name"])
        assert f"| {name} | {_percent(row, 'top1')} |" in page
    assert verdict["remark"] is None, "within chance of its best teacher"
    student = next(row for row in verdict["rows"] if row["name"] == "student co-advised (class token)")
    wanted = f"{100 * student['top1']:.1f} % where the short preset has {100 * _short_student():.1f}"
    assert wanted in " ".join(README.split())
    assert wanted in " ".join(RESULTS.split())
    assert f"took {_student_minutes(ROOT / 'results/cifar10-500-patient', 64):.0f} minutes" in page
    curve = {
        r["epoch"]: r["top1"]["class"]
        for r in read_records(ROOT / "results/cifar10-500-patient")
        if r["kind"] == "eval"
    }
    assert f"It had {100 * curve[160]:.1f} % after 160 epochs" in " ".join(page.split())


def _student_minutes(run: Path, batch: int) -> float:
    """From each start of a run to its student's last epoch; a recorded speed is the mean since the start."""
    seconds, first, last = 0.0, 0, None
    for record in [*read_records(run), {"kind": "run"}]:
        if record["kind"] == "run" and last:
            seconds += (last["step"] - first) * batch / last["images_per_second"]
            first, last = last["step"], None
        elif record["kind"] == "train" and record["part"].startswith("students/"):
            last = record
    return seconds / 60


def _short_student() -> float:
    return next(row["top1"] for row in _verdict("cifar10-500")["rows"] if row["name"].endswith("(class token)"))


def test_what_is_said_of_a_fine_tuned_teacher_is_what_its_record_says() -> None:
    verdict, before = _verdict("trashnet-128-finetuned"), _verdict("trashnet-128")
    page = " ".join(RESULTS.split())
    assert verdict["sentence"] in RESULTS
    for row in verdict["rows"]:
        name = re.sub(r" \((.*)\)", r", \1", row["name"])
        assert f"| {name} | {_percent(row, 'top1')} | {100 * row['macro_accuracy']:.1f} % |" in RESULTS
    kls = [
        next(f["kl"] for f in v["divergences"] if (f["answer"], f["teacher"]) == ("class", "conv"))
        for v in (verdict, before)
    ]
    assert "KL {:.2f} against {:.2f}".format(*kls) in page
    inv = [
        next(f["kl"] for f in v["divergences"] if (f["answer"], f["teacher"]) == ("class", "inv"))
        for v in (verdict, before)
    ]
    assert "involution teacher ({:.2f} against {:.2f})".format(*inv) in page
    differences = _compared("trashnet-128-finetuned")["runs"][1]["differences"]
    conv, advised = (
        (100 * found["mean"], 100 * (found["high"] - found["mean"]))
        for found in map(differences.get, ("teachers/conv", "advised"))
    )
    assert "The teacher is {:.1f} points better (+/- {:.1f})".format(*conv) in page
    assert f"its student {-advised[0]:.1f} points worse (+/- {advised[1]:.1f}" in page


def test_what_patience_brings_is_what_the_records_say() -> None:
    found, before = _compared("trashnet-128-patient-splits"), _compared("trashnet-128-splits")
    page = RESULTS.partition("### With three times the patience")[2].partition("\n### ")[0]
    records = sorted((ROOT / "results").glob("trashnet-128-patient*/metrics.jsonl"))
    assert len(records) == len(found["runs"])
    for record, row, short in zip(records, found["runs"], before["runs"], strict=False):
        tops = [row["top1"][name] for name in ("teachers/conv", "teachers/inv")]
        tops += [short["top1"]["advised"], row["top1"]["advised"]]
        assert f"| {' | '.join(f'{100 * top:.1f} %' for top in tops)} |" in page
        assert last_of(read_records(record.parent), "result")["top1"]["class"] == row["top1"]["advised"]
        config, preset = read_config(record.parent / "config.yaml"), load_config("photos-small-patient")
        for part in ("augment", "teachers", "student", "cache"):
            assert getattr(config, part) == getattr(preset, part)
    minutes = [_student_minutes(record.parent, 32) for record in records]
    assert f"took {min(minutes):.0f} to {max(minutes):.0f} minutes" in " ".join(page.split())
    assert found["lead"]["sentence"] in page
    over = found["lead"]["over_images"]
    gain = f"{100 * over['mean']:+.1f} points ({100 * over['low']:+.1f} to {100 * over['high']:+.1f})"
    assert f"above its best teacher, by {gain}" in " ".join(RESULTS.split())
    mean = fmean(row["top1"]["advised"] for row in found["runs"])
    brief = " ".join(README.replace("**", "").split())
    assert f"student has {100 * mean:.1f} %" in brief
    assert f"above both its teachers, {gain} against the better one" in brief


def test_the_comparison_with_one_token_is_what_its_record_says() -> None:
    found = ROOT / "results/one-token-trashnet"
    assert (found / "one-token.md").read_text().strip() in RESULTS
    rows = json.loads((found / "one-token.json").read_text())["rows"]
    for row in rows:
        results = [r for r in read_records(found / row["run"]) if r["kind"] == "result"]
        assert [r["top1"]["class"] for r in results] == [row["one_token"]]
    alone = _compared("trashnet-128-splits")["pooled"]["top1"]["alone"]
    peer = fmean(row["one_token"] for row in rows)
    assert f"has {100 * alone:.1f} %, the one of timm {100 * peer:.1f} %" in " ".join(RESULTS.split())


def test_what_check_finds_of_planted_labels_is_what_its_record_says() -> None:
    record = json.loads((ROOT / "results/label-suspects/curve.json").read_text())
    ways = record["recall"].values()
    cheap, network, teachers = (sum(seed["0.05"] for seed in seeds) / len(seeds) for seeds in ways)
    page = " ".join((ROOT / "docs/DATA.md").read_text().split())
    assert f"held {100 * network:.0f} % of them with an EfficientNet-Lite0" in page
    assert f"{100 * teachers:.0f} % with two small teachers" in page
    assert f"and {100 * cheap:.0f} % with edges and colours" in page


def test_the_readme_s_results_are_those_of_the_page() -> None:
    brief = README.partition("## Results\n")[2].partition("\n## ")[0].replace("**", "")
    lines = [line for line in brief.splitlines() if line.startswith(("| ", "Advice helped", "coadvise fit"))]
    assert len(lines) == 8
    assert set(lines) <= set(RESULTS.splitlines())


@pytest.mark.parametrize(
    "name", ["", "-xeon", "-epyc", "-one-seed", "-width-96", "-40-epochs", "-100-epochs", "-not-aligned"]
)
def test_the_table_of_records_is_what_they_say(name: str) -> None:
    verdict = _verdict(f"cifar10-500{name}")
    rows = {row["name"]: _percent(row, "top1") for row in verdict["rows"]}
    answers = [
        rows[key] for key in ("student alone", "student co-advised (class token)", "student co-advised (average)")
    ]
    interval = verdict["difference"]["seeds"] or verdict["difference"]
    over = "seeds" if verdict["difference"]["seeds"] else "images"
    mean, low, high = (f"{100 * interval[key]:+.1f}" for key in ("mean", "low", "high"))
    (line,) = [line for line in RESULTS.splitlines() if f"](../results/cifar10-500{name}/config.yaml) |" in line]
    epochs = read_config(ROOT / f"results/cifar10-500{name}/config.yaml").student.recipe.epochs
    assert line.startswith(f"| {epochs}, ")
    assert line.endswith(f"| {len(verdict['seeds'])} | {' | '.join(answers)} | {mean} ({low} to {high} over {over}) |")


@pytest.mark.parametrize("run", sorted((ROOT / "results").glob("*/config.yaml")), ids=lambda path: path.parent.name)
def test_a_record_s_configuration_is_a_preset_that_repeats_it(run: Path) -> None:
    config = read_config(run)
    assert load_config(str(run), source=config.data.source) == config


@pytest.mark.parametrize("page", sorted((ROOT / "results/deploy").glob("*.md")), ids=lambda path: path.stem)
def test_accuracy_over_speed_is_what_the_records_say(page: Path) -> None:
    shown = (ROOT / "docs/PERFORMANCE.md").read_text().splitlines()
    networks = json.loads(page.with_suffix(".json").read_text())["networks"]
    lines = [f"| {one['name']} | {one['top1']:.1f} % | {one['images_per_second']:g} |" for one in networks]
    assert len(lines) >= 5
    assert set(lines) <= {*shown} & {*page.read_text().splitlines()}


@pytest.mark.parametrize("page", sorted((ROOT / "results").glob("*-table*/*.md")), ids=lambda path: path.stem)
def test_the_paper_s_tables_are_what_their_records_say(page: Path) -> None:
    found = json.loads(page.with_suffix(".json").read_text())
    assert page.read_text() == "\n".join(markdown(found)) + "\n"
    lines = [line for line in page.read_text().replace("*", "").splitlines() if line.startswith("|")]
    shown = RESULTS if "cifar10" in page.parent.name else (ROOT / "docs/TABLES.md").read_text()
    assert set(lines) <= set(shown.replace("*", "").splitlines())
