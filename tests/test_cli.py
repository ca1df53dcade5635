"""The program as a user types it: what it prints, in which form, and its exit codes."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
import yaml
from tiny import ONE_EPOCH, contents, make_images, records, request_stop

import coadvise
from coadvise.cli import app, main
from coadvise.config.reading import preset_names
from coadvise.deploy.publish import load
from coadvise.errors import UserError
from coadvise.models import MODELS
from coadvise.runs.options import FitOptions, RunOptions, StudyOptions
from coadvise.studies import STUDIES

Outcome = tuple[int, str, str]  # exit code, stdout, stderr
Cli = Callable[..., Outcome]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """The program, run in this process."""

    def run(*arguments: str | Path) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["coadvise", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
        return code, *capsys.readouterr()

    return run


def refused(outcome: Outcome, *pieces: str) -> None:
    """Exit code 2, at most the data's description on stdout, one line on stderr that names these things."""
    code, out, err = outcome
    assert code == 2, err
    assert out == "" or (out.startswith("data: ") and len(out.splitlines()) == 4)
    assert err.startswith("coadvise: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    for piece in pieces:
        assert piece in err


# Quick answers


QUICK = """
import json, sys
from coadvise.cli import main
loaded = {}
for words in json.loads(sys.argv[1]):
    sys.argv = ["coadvise", *words]
    try:
        main()
    except SystemExit as end:
        code = end.code or 0
    heavy = {"torch", "timm", "torchvision", "sklearn", "scipy", "lightning_fabric", "safetensors"} & sys.modules.keys()
    loaded[" ".join(words)] = [code, sorted(heavy)]
print(json.dumps(loaded))
"""


def test_quick_commands_import_nothing_heavy(tiny_images: Path, tmp_path: Path) -> None:
    asked = {
        0: ["--help", "--version", "fit --help", "presets", "presets photos", "studies", "studies table9"],
        2: [
            f"fit {tmp_path}/none", f"fit {tmp_path}", f"fit {tiny_images} no.such.key=1", "fit digits --preset digit",
            f"fit {tiny_images} --seeds 0", "study tabel7", f"study table7 --data {tmp_path}/none",
        ],
    }  # fmt: skip
    commands = json.dumps([words.split() for of in asked.values() for words in of])
    done = subprocess.run([sys.executable, "-c", QUICK, commands], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {words: [code, []] for code, of in asked.items() for words in of}
    assert f"coadvise {coadvise.__version__}\n" in done.stdout


def test_help_lists_every_command_and_option_in_groups(cli: Cli) -> None:
    code, out, _ = cli("--help")
    assert code == 0
    assert "--install-completion" in out
    for command in app.registered_commands:
        name = command.name or command.callback.__name__  # type: ignore[union-attr]
        assert name in out
        assert cli(name, "--help")[0] == 0
    for name, options in (("fit", FitOptions), ("study", StudyOptions)):
        text = cli(name, "--help")[1]
        assert re.findall(r"^(\w+):$", text, re.M) == ["Data", "Training", "Output", "Options"]
        for field in dataclasses.fields(options):
            assert field.name.replace("_", "-").removesuffix("s") in text


@pytest.mark.parametrize(
    ("command", "wanted"),
    [
        (
            "fit d a.b=1 c.d=2 --preset p --out o --seed 3 --seeds 2 --jobs 4 --baseline --cache c --allow-changes "
            "--reuse r",
            FitOptions(
                data="d", overrides=("a.b=1", "c.d=2"), preset="p", out=Path("o"), seed=3, seeds=2, jobs=4,
                baseline=True, cache=Path("c"), allow_changes=True, reuse=Path("r"),
            ),
        ),
        (
            "study table7 a.b=1 --data d --preset p --seed 0 --seeds 2 --out o --jobs 3 --cache --shift s --shift t "
            "--reuse r --allow-changes --networks paper --weights w --paper-rows --so-far",
            StudyOptions(
                name="table7", overrides=("a.b=1",), data="d", preset="p", seed=0, seeds=2, out=Path("o"), jobs=3,
                cache=True, shifts=("s", "t"), reuse=Path("r"), allow_changes=True, networks="paper", weights="w",
                paper_rows=True, so_far=True,
            ),
        ),
        ("fit d", FitOptions(data="d")),
        ("study table7", StudyOptions(name="table7")),
    ],
)  # fmt: skip
def test_every_option_is_passed_on(command: str, wanted: RunOptions, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[RunOptions] = []

    def planned(options: RunOptions) -> None:
        given.append(options)
        raise UserError("stop here")

    monkeypatch.setattr("coadvise.runs.plan.plan_fit", planned)
    monkeypatch.setattr("coadvise.studies.plan.study_config", planned)
    refused(cli(*command.split()), "stop here")
    assert given == [wanted]


# fit


def test_fit_prints_sentences_or_json(cli: Cli, tiny_images: Path, tiny_preset: str, tmp_path: Path) -> None:
    common = ("fit", tiny_images, *ONE_EPOCH, "--preset", tiny_preset, "--out", tmp_path / "run")
    code, out, err = cli(*common, "--seed", "4", "--dry-run")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert [line.partition(":")[0] for line in lines[:4]] == ["data", "split", "train", "validation"]
    assert len(lines) == 4 + 4, "three networks and the sum"
    code, out, err = cli(*common, "--seed", "4")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert str(tiny_images) in lines[0]
    assert f"run directory: {tmp_path / 'run'}" in lines
    assert lines[-1].endswith(str(tmp_path / "run" / "report.html"))
    assert not re.search(r"[\r\x1b]", out), "progress bars are for terminals"
    code, out, err = cli(*common, "--seed", "4", "--seeds", "2", "--json")
    assert code == 0
    answer = json.loads(out)
    assert (answer["run"], answer["seeds"]) == (str(tmp_path / "run"), [4, 5])
    assert answer["sentence"] == records(tmp_path / "run", "verdict")[-1]["sentence"]
    assert "run directory" in err, "sentences go to stderr, so that stdout is one JSON object"


def test_names_that_would_command_the_terminal_are_shown_as_text(
    cli: Cli, tiny_preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    red = "\x1b[31mred\x07"
    data = make_images(tmp_path / "data", classes=("<script>alert(1)<", red, "caf\udce9"))
    (data / "train" / red / "\x1b[2J\n.png").write_bytes(b"")
    (data / "train" / red / "photograph.CR2").touch()
    monkeypatch.chdir(tmp_path)
    code, out, err = cli("fit", "data", "--preset", tiny_preset, *ONE_EPOCH)
    assert (code, err) == (0, "")
    assert "\\x1b[31mred" in out
    assert "1 .cr2" in out
    run, image = Path("runs/data-tiny-seed0"), data / "val" / red / "0.png"
    for output in (out, cli("predict", run, image)[1], cli("evaluate", run)[1], cli("predict", run, image.parent)[1]):
        assert output
        assert all(line.isprintable() for line in output.split("\n"))
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "&lt;script&gt;" in page


# What is done with a run


def test_evaluate(cli: Cli, finished: Path, tmp_path: Path) -> None:
    code, out, err = cli("evaluate", finished)
    assert (code, err) == (0, "")
    assert all(name in out for name in ("teachers/conv", "students/advised-0", "average", "students/alone-0"))
    data = make_images(tmp_path / "data", 1, 2)
    (data / "val" / "red" / "0.png").write_bytes(b"no image")
    code, out, err = cli("evaluate", finished, "--data", data)
    assert code == 2
    assert "red/0.png" in out.splitlines()[-1]
    assert "red/0.png" in err
    assert cli("evaluate", finished, "--data", data, "--allow-unreadable") == (0, out, "")
    with_json = cli("evaluate", finished, "--data", data, "--json")
    code, out, err = cli("evaluate", finished, "--data", data, "--json", "--allow-unreadable")
    assert (code, err) == (0, "")
    assert with_json[:2] == (2, out)
    answer = json.loads(out)
    assert answer["images"] == 5
    assert set(answer["parts"]["students/advised-0"]) == {"class", "conv", "inv", "average"}


def test_predict(cli: Cli, finished: Path, tiny_images: Path, tmp_path: Path) -> None:
    images = sorted((tiny_images / "val" / "red").iterdir())[:2]
    wanted = load(finished).predict(images)
    code, out, err = cli("predict", finished, *images)
    assert (code, err) == (0, "")
    shown = [line.split(": ") for line in out.splitlines()]
    assert [(name, text.split()[0]) for name, text in shown] == [
        (str(i), p.label) for i, p in zip(images, wanted, strict=True)
    ]
    rows = json.loads(cli("predict", finished, *images, "--json")[1])
    assert [row["probabilities"] for row in rows] == [p.probabilities for p in wanted]
    for options, other in (
        (("--answer", "average"), load(finished).predict(images[0], "average")),
        (("--part", "teachers/conv"), load(finished, "teachers/conv").predict(images[0])),
    ):
        out = cli("predict", finished, images[0], *options, "--json")[1]
        assert json.loads(out)[0]["probabilities"] == other[0].probabilities

    bad = tmp_path / "page.jpg"
    bad.write_text("<html>")
    refused(cli("predict", finished, images[0], bad), str(bad))
    rows = json.loads(cli("predict", finished, bad, images[0], "--allow-unreadable", "--json")[1])
    assert [row.get("image") for row in rows] == [str(images[0]), None]
    assert str(bad) in rows[1]["unreadable"]


def test_cache(cli: Cli, finished: Path, tmp_path: Path) -> None:
    arguments = ["cache", finished, "--out", tmp_path / "cache", "--epochs", "1", "--seeds", "2", "--json"]
    code, out, _ = cli(*arguments)
    assert (code, json.loads(out)) == (0, {"cache": str(tmp_path / "cache")})
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {"seed-0", "seed-1"}


def test_export(cli: Cli, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "student.pt2"
    code, said, err = cli("export", finished, "--out", out)
    assert (code, err) == (0, "")
    assert said.startswith(f"{out}: students/advised-0, ")
    code, said, _ = cli("export", finished, "--out", out, "--part", "teachers/conv", "--json")
    about = json.loads(said)
    assert (code, about["part"], about["bytes"]) == (0, "teachers/conv", out.stat().st_size)
    refused(cli("export", finished, "--out", tmp_path / "student.bin"), ".onnx", ".pt2")


def test_convert(cli: Cli, tmp_path: Path) -> None:
    deit = timm.create_model("deit_tiny_distilled_patch16_224", depth=1, embed_dim=64, num_heads=1, num_classes=3)
    torch.save({"model": deit.state_dict()}, tmp_path / "deit.pth")
    out = tmp_path / "student.safetensors"
    code, said, err = cli("convert", tmp_path / "deit.pth", "--out", out, "--distillation-token", "inv")
    assert (code, err) == (0, "")
    model = eval(said.splitlines()[-1], {"timm": timm})
    assert torch.equal(model.head_inv.weight, deit.head_dist.weight)
    code, said, _ = cli("convert", tmp_path / "deit.pth", "--out", out, "token_names=[a, b]", "num_heads=2", "--json")
    answer = json.loads(said)
    assert (code, answer["model"], answer["out"]) == (0, "cit_tiny_patch16_224", str(out))
    assert (answer["arguments"]["token_names"], answer["arguments"]["num_heads"]) == (["a", "b"], 2)
    refused(cli("convert", tmp_path / "none.pth", "--out", out), "none.pth")


def test_lists_of_models_presets_and_studies(cli: Cli, tiny_preset: str) -> None:
    out = cli("models")[1]
    assert [line.split()[0] for line in out.splitlines()[1:-2]] == list(MODELS)
    assert [row["model"] for row in json.loads(cli("models", "--json")[1])] == list(MODELS)
    for command, names in (("presets", preset_names()), ("studies", list(STUDIES))):
        assert [line.split()[0] for line in cli(command)[1].splitlines()] == names
        headers = json.loads(cli(command, "--json")[1])
        assert list(headers) == names
        assert all(len(header) > 20 for header in headers.values())
    for name, study in STUDIES.items():
        described = json.loads(cli("studies", name, "--json")[1])
        assert described == {"name": name, **study.described()}
        text = cli("studies", name)[1]
        assert all(row.name in text for row in study.rows)
        assert all(claim.text in text for claim in study.claims)
    assert re.search(r"^ResNet-50 +75\.57 +2\.60 +35\.61 +59\.15$", cli("studies", "table1")[1], re.M)
    refused(cli("studies", "tabel1"), "'tabel1', did you mean 'table1'")
    for name in preset_names():
        assert yaml.safe_load(cli("presets", name)[1])["student"]["model"]
        assert json.loads(cli("presets", name, "--json")[1])["student"]["model"]
    assert cli("presets", tiny_preset)[1].strip() == Path(tiny_preset).read_text().strip()


# Exit codes


def test_a_users_errors_are_one_line_each(
    cli: Cli, finished: Path, tiny_images: Path, tiny_preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run, nothing, before = tmp_path / "run", tmp_path / "nothing", contents(finished)

    def fit(*arguments: str | Path, data: Path = tiny_images, preset: str = tiny_preset, out: Path = run) -> Outcome:
        return cli("fit", data, "--preset", preset, "--out", out, *arguments)

    refused(cli("fit", nothing), str(nothing))
    refused(fit(preset="digit"), "'digits'", "small-images")
    refused(fit("student.recipe.epochs=0", "augment.kind=dark"), "'student.recipe.epochs' is 0", "'augment.kind'")
    refused(fit("--jobs", "0", "--dry-run"), "jobs=0")
    refused(cli("study", "table7", "--jobs", "0"), "jobs=0")
    refused(fit("engine.device=cuda"), "engine.device=cpu")
    refused(fit("student.weight=2", out=finished), f"'{finished}'", "student.weight: 1.0 -> 2.0")
    assert contents(finished) == before
    other = make_images(tmp_path / "other", 2, 1, classes=("cat", "dog"))
    refused(fit(f"teachers.conv.start={finished}/teachers/conv", data=other), "blue, green, red", "cat, dog")
    assert not run.exists()
    good = next((tiny_images / "val" / "red").iterdir())
    (tmp_path / "phone").mkdir()
    (tmp_path / "phone" / "1.CR2").touch()
    refused(cli("predict", finished, tmp_path / "phone"), str(tmp_path / "phone"), "1 .cr2")
    refused(cli("predict", finished, good, "--answer", "best"), "'best'", "class, conv, inv")
    refused(cli("predict", finished, good, "--part", "teachers/con"), "'teachers/con'", "teachers/conv, teachers/inv")
    for command in (("predict", nothing, good), ("evaluate", nothing), ("cache", nothing), ("demo", nothing)):
        refused(cli(*command), "is no run directory")
    refused(cli("presets", "photo"), "'photo', did you mean 'photos'?")
    code, _, err = cli("fitt")
    assert (code, "fitt" in err) == (2, True)


def test_a_stop_is_exit_code_75(
    cli: Cli, tiny_images: Path, tiny_preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coadvise.terminal.Terminal.progress", lambda *_: request_stop())
    code, _, err = cli("fit", tiny_images, "--preset", tiny_preset, "--out", tmp_path / "run")
    assert code == 75
    assert err.startswith("coadvise: stopped at step 1 of 4 of teachers/conv; ")
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_broken_pipe_is_exit_code_1_without_a_message(unbuffered: str) -> None:
    program = [sys.executable, "-m", "coadvise", "presets"]
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    process = subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == ""
    assert process.wait() == 1
