import importlib
import inspect
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
import yaml
from tiny import contents, make_images, records, request_stop, run_program

from coadvise.cli import app, main
from coadvise.config import preset_names
from coadvise.deploy.predict import Prediction, load
from coadvise.errors import UserError
from coadvise.evaluation.corruptions import CORRUPTIONS
from coadvise.models import MODELS

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


ONCE = [f"{part}.recipe.epochs=1" for part in ("teachers.conv", "teachers.inv", "student")]


def test_fit_says_what_it_does_and_quietly(cli: Cli, tiny_images: Path, tiny_preset: str, tmp_path: Path) -> None:
    code, out, err = cli("fit", tiny_images, *ONCE, "--preset", tiny_preset, "--out", tmp_path / "run", "--baseline")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == f"data: {tiny_images}, 3 classes (blue, green, red)"
    assert f"run directory: {tmp_path / 'run'}" in lines
    assert lines[-1] == f"report: {tmp_path / 'run' / 'report.html'}"
    assert any(line.startswith("student co-advised (seed 0): top-1 class") for line in lines)
    assert (tmp_path / "run" / "report.html").read_text().startswith("<!doctype html>")
    assert "\r" not in out, "progress bars are for terminals"
    assert "\x1b" not in out
    assert len(lines) < 30


def test_fit_as_json(cli: Cli, tiny_images: Path, tiny_preset: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    code, out, err = cli(
        "fit", tiny_images, "--preset", tiny_preset, "--out", run, "--seed", "4", "--seeds", "2", "--json", *ONCE
    )
    assert code == 0
    answer = json.loads(out)
    assert answer["run"] == str(run)
    assert answer["seeds"] == [4, 5]
    assert answer["sentence"] == records(run, "verdict")[-1]["sentence"]
    assert "run directory" in err, "sentences go to stderr, so that stdout is one JSON object"
    assert yaml.safe_load((run / "config.yaml").read_text())["seed"] == 4


def test_a_dry_run_of_fit(cli: Cli, tiny_images: Path, tiny_preset: str, tmp_path: Path) -> None:
    options = ("fit", tiny_images, "--preset", tiny_preset, "--out", tmp_path / "run", "--baseline", "--dry-run")
    code, out, err = cli(*options)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert [line.split("min  ")[1] for line in lines] == [
        "conv teacher", "involution teacher", "student co-advised (seed 0)", "student alone (seed 0)",
        "in all, one network after the other",
    ]  # fmt: skip
    code, out, err = cli(*options, "--json")
    assert (code, err) == (0, "")
    assert [network["seconds"] > 0 for network in json.loads(out)] == [True] * 4


def test_a_relative_folder_and_the_default_out(
    cli: Cli, tiny_images: Path, tiny_preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_images, tmp_path / "shapes")
    (tmp_path / "shapes" / "train" / "red" / "photograph.HEIC").touch()
    monkeypatch.chdir(tmp_path)
    code, out, _ = cli("fit", "shapes", "--preset", tiny_preset, *ONCE)
    assert out.splitlines()[2] == "  left out, no image by its name: 1 .heic"
    assert code == 0
    assert "run directory: runs/shapes-tiny-seed0" in out.splitlines()
    assert cli("evaluate", "runs/shapes-tiny-seed0")[0] == 0


def test_evaluate(cli: Cli, finished: Path, tmp_path: Path) -> None:
    code, out, err = cli("evaluate", finished)
    assert (code, err) == (0, "")
    assert out.splitlines()[0].startswith("12 images of ")
    lines = [line.split() for line in out.splitlines()]
    assert lines[1] == ["answer", "top-1", "top-5", "ECE", "NLL"]
    assert [line[0] for line in lines[2:9]] == [
        "teachers/conv", "teachers/inv", "students/advised-0", "conv", "inv", "average", "students/alone-0",
    ]  # fmt: skip
    assert [line[0] for line in lines[11:16]] == ["students/advised-0", "conv", "inv", "average", "students/alone-0"]
    assert len(lines) == 11 + 5 + 2 + 4 * 3 / 2  # six pairs of class answers at the end
    data = make_images(tmp_path / "data", 1, 2)
    (data / "val" / "red" / "0.png").write_bytes(b"no image")
    code, out, err = cli("evaluate", finished, "--data", data)
    assert out.splitlines()[0] == f"5 images of {data}"
    assert "not scored, cannot be read" in out.splitlines()[-1]
    assert "red/0.png" in out.splitlines()[-1]
    assert code == 2
    assert err.startswith("coadvise: 1 image(s) cannot be read and are not in these scores")
    assert cli("evaluate", finished, "--data", data, "--allow-unreadable") == (0, out, "")
    (data / "val" / "red" / "1.heic").touch()
    told = "left out, no image by its name: 1 .heic\n"
    assert cli("evaluate", finished, "--data", data, "--allow-unreadable") == (0, out, told)
    (data / "val" / "red" / "1.heic").unlink()
    refused_json = cli("evaluate", finished, "--data", data, "--json")
    code, out, err = cli("evaluate", finished, "--data", data, "--json", "--allow-unreadable")
    assert (code, err) == (0, "")
    assert (refused_json[0], refused_json[1]) == (2, out)
    answer = json.loads(out)
    assert answer["images"] == 5
    assert set(answer["parts"]["students/advised-0"]) == {"class", "conv", "inv", "average"}


def test_evaluate_under_corruptions(cli: Cli, finished: Path) -> None:
    code, out, err = cli("evaluate", finished, "--corruptions", "--severities", "1,4", "--images", 6)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    first = next(n for n, line in enumerate(lines) if line.startswith("top-1 of class answers"))
    assert lines[first].startswith("top-1 of class answers, mean over severities 1, 4; 6 images each, ")
    assert lines[first + 1].split() == ["conv", "inv", "advised-0", "alone-0"]
    assert [line.split()[0] for line in lines[first + 2 : first + 17]] == list(CORRUPTIONS)
    assert lines[first + 17].startswith("mean corruption error ")
    assert re.match(r"mean corruption error of advised-0: class .*%, conv .*%, inv .*%, average .*%$", lines[-1])
    code, out, err = cli("evaluate", finished, "--corruptions", "--severities", "4", "--images", 6, "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["corruptions"]["severities"] == [4]


def test_predict_names_what_it_cannot_read_and_answers_for_nothing_else_in_its_place(
    cli: Cli, finished: Path, tiny_images: Path, tmp_path: Path
) -> None:
    good, bad = sorted((tiny_images / "val" / "red").iterdir())[0], tmp_path / "page.jpg"
    bad.write_text("<html>")
    code, out, err = cli("predict", finished, good, bad)
    assert (code, out) == (2, "")
    assert f"cannot read image '{bad}'" in err
    code, out, err = cli("predict", finished, bad, good, "--allow-unreadable")
    assert (code, err) == (0, "")
    assert out.splitlines()[0] == cli("predict", finished, good)[1].rstrip("\n")
    assert out.splitlines()[1].startswith(f"cannot be read: '{bad}': ")
    rows = json.loads(cli("predict", finished, bad, good, "--allow-unreadable", "--json")[1])
    assert [row.get("image") for row in rows] == [str(good), None]
    assert rows[1]["unreadable"].startswith(f"'{bad}': ")
    code, out, err = cli("predict", finished, bad, "--allow-unreadable")
    assert (code, err) == (0, "")
    assert len(out.splitlines()) == 1


def test_names_that_would_command_the_terminal_are_shown_as_text(cli: Cli, tiny_preset: str, tmp_path: Path) -> None:
    red = "\x1b[31mred\x07"
    data = make_images(tmp_path / "data", classes=("<script>alert(1)<", red, "caf\udce9"))
    (data / "train" / red / "\x1b[2J\n.png").write_bytes(b"")
    run = tmp_path / "run"
    code, out, err = cli("fit", data, "--preset", tiny_preset, "--out", run, *ONCE)
    assert (code, err) == (0, "")
    assert "\\x1b[31mred" in out
    image = data / "val" / red / "0.png"
    for output in (out, cli("predict", run, image)[1], cli("evaluate", run)[1], cli("predict", run, image.parent)[1]):
        assert output
        assert all(line.isprintable() for line in output.split("\n"))
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "&lt;script&gt;" in page


def test_predict(cli: Cli, finished: Path, tiny_images: Path) -> None:
    images = sorted((tiny_images / "val" / "red").iterdir())[:2]
    wanted = load(finished).predict(images)
    code, out, err = cli("predict", finished, *images)
    assert (code, err) == (0, "")
    assert [line.split(": ")[0] for line in out.splitlines()] == [str(image) for image in images]
    assert [line.split(": ")[1].split()[0] for line in out.splitlines()] == [p.label for p in wanted]
    code, out, _ = cli("predict", finished, *images, "--json")
    assert json.loads(out) == [
        {"image": str(image), "label": p.label, "probabilities": p.probabilities}
        for image, p in zip(images, wanted, strict=True)
    ]
    (tiny_images / "val" / "red" / "notes.txt").touch()
    everything = cli("predict", finished, tiny_images / "val" / "red")[1]
    files = sorted(path for path in (tiny_images / "val" / "red").iterdir() if path.suffix == ".png")
    assert everything == cli("predict", finished, *files)[1]
    _, out, _ = cli("predict", finished, images[0], "--answer", "average", "--json")
    assert json.loads(out)[0]["probabilities"] == load(finished).predict(images[0], "average")[0].probabilities
    _, out, _ = cli("predict", finished, images[0], "--part", "teachers/conv", "--json")
    assert json.loads(out)[0]["probabilities"] == load(finished, "teachers/conv").predict(images[0])[0].probabilities
    code, _, err = cli("predict", finished, images[0], "--part", "teachers/con")
    assert code == 2
    assert "no finished network 'teachers/con'; it has teachers/conv, teachers/inv" in err


def test_cache(cli: Cli, finished: Path, tmp_path: Path) -> None:
    arguments = ["cache", finished, "--out", tmp_path / "cache", "--epochs", "3", "--seeds", "2"]
    code, out, err = cli(*arguments)
    assert (code, err) == (0, "")
    first, last = out.splitlines()
    assert first.startswith(f"logit cache {tmp_path / 'cache'}: views of 6 epochs (2 seeds) x 24 images, 2 teachers, ")
    assert last == f"logit cache {tmp_path / 'cache'}: 6 epochs (2 seeds), all stored"
    code, out, err = cli(*arguments, "--json")
    assert (code, json.loads(out)) == (0, {"cache": str(tmp_path / "cache")})
    assert err.endswith("all stored; no teacher is asked\n")


FIT = {"data": "d", "preset": "p", "out": "o", "seed": 3, "baseline": True, "seeds": 2, "overrides": ["a.b=1"]}
STUDY = {"name": "tokens", "data": "d", "preset": "p", "seeds": 2, "out": "o", "overrides": ["a.b=1"], "cache": True}


@pytest.mark.parametrize(
    ("function", "command", "wanted"),
    [
        (
            "fit.fit",
            "fit d a.b=1 --preset p --out o --seed 3 --seeds 2 --jobs 4 --baseline --cache c --allow-changes --reuse r",
            {**FIT, "jobs": 4, "cache": "c", "allow_changes": True, "reuse": Path("r")},
        ),
        (
            "fit.foresee_fit",
            "fit d a.b=1 --preset p --out o --seed 3 --seeds 2 --baseline --cache c --dry-run",
            {**FIT, "cache": "c"},
        ),
        (
            "cache_build.build_cache",
            "cache r --out o --seeds 2 --epochs 5 --jobs 3 --top-k 4",
            {"run": Path("r"), "out": Path("o"), "seeds": 2, "epochs": 5, "jobs": 3, "top_k": 4},
        ),
        (
            "study.run_study",
            "study tokens a.b=1 --data d --preset p --seeds 2 --out o --jobs 3 --cache --shift s --shift t --reuse r",
            {**STUDY, "jobs": 3, "shifts": ["s", "t"], "reuse": Path("r")},
        ),
        (
            "study.foresee_study",
            "study tokens a.b=1 --data d --preset p --seeds 2 --out o --cache --dry-run",
            STUDY,
        ),
    ],
)
def test_all_that_is_asked_for_is_passed_on(
    function: str, command: str, wanted: dict[str, Any], cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, _, name = function.partition(".")
    parent = importlib.import_module(f"coadvise.{module}")
    signature = inspect.signature(getattr(parent, name))

    def ask(*arguments: Any, **keywords: Any) -> None:
        passed = signature.bind(*arguments, **keywords).arguments
        assert {key: value for key, value in passed.items() if key != "listener"} == wanted
        raise UserError("as it was asked")

    monkeypatch.setattr(parent, name, ask)
    refused(cli(*command.split()), "as it was asked")


def test_models_and_presets(cli: Cli) -> None:
    code, out, _ = cli("models")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()[1:-1]] == list(MODELS)
    assert [row["model"] for row in json.loads(cli("models", "--json")[1])] == list(MODELS)
    code, out, _ = cli("presets")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == preset_names()
    headers = json.loads(cli("presets", "--json")[1])
    assert list(headers) == preset_names()
    assert all(len(header) > 20 for header in headers.values())
    for name in preset_names():
        assert yaml.safe_load(cli("presets", name)[1])["student"]["model"]
        assert json.loads(cli("presets", name, "--json")[1])["student"]["model"]


def test_convert(cli: Cli, tmp_path: Path) -> None:
    deit = timm.create_model("deit_tiny_distilled_patch16_224", depth=1, embed_dim=64, num_heads=1, num_classes=3)
    torch.save({"model": deit.state_dict()}, tmp_path / "deit.pth")
    out = tmp_path / "student.safetensors"
    code, said, err = cli("convert", tmp_path / "deit.pth", "--out", out, "--distillation-token", "inv")
    assert (code, err) == (0, "")
    first, note, call = said.splitlines()
    assert first.startswith(f"{tmp_path / 'deit.pth'}: distilled DeiT, ")
    assert note == "token 'conv' is freshly initialised: its vector, its position and its head"
    model = eval(call, {"timm": timm})
    assert torch.equal(model.head_inv.weight, deit.head_dist.weight)
    code, said, _ = cli("convert", tmp_path / "deit.pth", "--out", out, "token_names=[a, b]", "num_heads=2", "--json")
    answer = json.loads(said)
    assert (code, answer["model"], answer["out"]) == (0, "cit_tiny_patch16_224", str(out))
    assert (answer["arguments"]["token_names"], answer["arguments"]["num_heads"]) == (["a", "b"], 2)
    assert answer["notes"] == ["token 'b' is freshly initialised: its vector, its position and its head"]
    out.unlink()
    torch.save({"model": {**deit.state_dict(), "neck.weight": torch.zeros(1)}}, tmp_path / "deit.pth")
    refused(cli("convert", tmp_path / "deit.pth", "--out", out), "keys without a place here: neck.weight;")
    refused(cli("convert", tmp_path / "none.pth", "--out", out), "no checkpoint")
    refused(cli("convert", tmp_path / "deit.pth", "num_heads", "--out", out), "'num_heads' is not an override")
    assert not out.exists()


def test_a_preset_file_is_printed_too(cli: Cli, tiny_preset: str) -> None:
    code, out, _ = cli("presets", tiny_preset)
    assert code == 0
    assert out.strip() == Path(tiny_preset).read_text().strip()


def test_help(cli: Cli) -> None:
    code, out, _ = cli("--help")
    assert code == 0
    names = [command.name or command.callback.__name__ for command in app.registered_commands]  # type: ignore[union-attr]
    assert len(names) >= 11
    for name in names:
        assert name in out
        assert cli(name, "--help")[0] == 0


def test_export(cli: Cli, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "student.pt2"
    code, said, err = cli("export", finished, "--out", out)
    assert (code, err) == (0, "")
    assert said.startswith(f"{out}: students/advised-0, ")
    assert "\nin: images, float32 [batch, 3, 16, 16], RGB in 0..1" in said
    assert "\nout: probabilities [batch, 3]; " in said
    assert "\nchecked: probabilities as the network's" in said
    code, said, _ = cli("export", finished, "--out", out, "--part", "teachers/conv", "--json")
    assert code == 0
    about = json.loads(said)
    assert about["part"] == "teachers/conv"
    assert about["bytes"] == out.stat().st_size
    refused(cli("export", finished, "--out", tmp_path / "student.bin"), "must end in .onnx or .pt2")


def refused(outcome: Outcome, *pieces: str) -> None:
    """Exit code 2, at most the data's description on stdout, one line on stderr that says these things."""
    code, out, err = outcome
    assert code == 2, err
    assert out == "" or (out.startswith("data: ") and len(out.splitlines()) == 4)
    assert err.startswith("coadvise: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    for piece in pieces:
        assert piece in err


def test_the_users_errors_are_one_line_each(
    cli: Cli, finished: Path, tiny_images: Path, tiny_preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"

    def fit(*arguments: str | Path, data: Path = tiny_images, preset: str = tiny_preset, out: Path = run) -> Outcome:
        return cli("fit", data, "--preset", preset, "--out", out, *arguments)

    nothing = tmp_path / "nothing"
    refused(fit(data=nothing), f"'{nothing}' does not exist", "give a folder of class folders")
    refused(cli("fit", nothing), "does not exist")
    refused(fit(preset="digit"), "unknown preset 'digit', did you mean 'digits'?", "small-images")
    refused(fit(preset="gone.yaml"), "no preset file 'gone.yaml'")
    refused(fit("student.recipe.epoch=3"), "unknown key 'student.recipe.epoch', did you mean 'epochs'?")
    refused(fit("teachers.conv.recipes.epochs=3"), "'teachers.conv.recipes', did you mean 'recipe'?")
    refused(fit("student.recipe.epochs=many"), "'student.recipe.epochs' is 'many'")
    refused(
        fit("student.recipe.epochs=0", "augment.kind=dark"), "'student.recipe.epochs' is 0", "'augment.kind' is 'dark'"
    )
    refused(fit("epochs"), "'epochs' is not an override; write key=value")
    refused(fit("--seeds", "0"), "at least one student is needed")
    for options in ((), ("--dry-run",)):
        refused(fit("--jobs", "0", *options), "jobs=0; at least one network must be trained")
        refused(cli("study", "tokens", "--jobs", "0", *options), "jobs=0; at least one network must be trained")
    refused(cli("bench", "involution", "--json", nothing / "x.json"), f"'{nothing}' is no folder; make it")
    refused(fit("engine.device=cuda"), "PyTorch sees no CUDA device")
    assert not run.exists()

    before = contents(finished)
    refused(fit("student.weight=2", out=finished), f"'{finished}' holds another run", "student.weight: 1.0 -> 2.0")
    assert contents(finished) == before
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years")
    refused(fit(out=tmp_path / "thesis"), "exists and is no run directory; choose another --out")

    other = make_images(tmp_path / "other", 2, 1, classes=("cat", "dog"))
    given = f"teachers.conv.checkpoint={finished}/teachers/conv"
    refused(fit(given, data=other), "has 3 classes (blue, green, red)", "the data has 2 (cat, dog)")
    assert not run.exists()

    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no image")
    good = next((tiny_images / "val" / "red").iterdir())
    refused(cli("predict", finished, good, bad), f"cannot read image '{bad}'")
    (tmp_path / "phone").mkdir()
    (tmp_path / "phone" / "1.HEIC").touch()
    refused(
        cli("predict", finished, tmp_path / "phone"), "'{}' holds no image (.bmp".format(tmp_path / "phone"), "1 .heic"
    )
    refused(cli("predict", finished, good, "--answer", "best"), "no answer 'best'; this network has class, conv, inv")
    refused(cli("predict", nothing, good), "is no run directory")
    refused(cli("evaluate", nothing), "is no run directory")
    refused(cli("cache", nothing), "is no run directory")
    refused(fit("cache.top_k=5"), "students are advised by stored logits", "give --cache DIR")
    refused(cli("evaluate", finished, "--data", other), "classes the student does not know: 'cat', 'dog'")
    refused(cli("evaluate", finished, "--severities", "mild"), "--severities mild is no list of numbers")
    (tmp_path / "c" / "fog" / "1" / "red").mkdir(parents=True)
    refused(cli("evaluate", finished, "--data", tmp_path / "c"), "lacks gaussian_noise, ", "fog/2, fog/3", "ImageNet-C")
    refused(cli("presets", "photo"), "unknown preset 'photo', did you mean 'photos'?")


def test_a_command_that_does_not_exist_is_exit_code_2(cli: Cli) -> None:
    code, _, err = cli("fitt")
    assert code == 2
    assert "fitt" in err


def test_a_stop_is_exit_code_75(
    cli: Cli, tiny_images: Path, tiny_preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coadvise.terminal.Terminal.progress", lambda *_: request_stop())
    arguments = ["fit", tiny_images, "--preset", tiny_preset, "--out", tmp_path / "run"]
    code, _, err = cli(*arguments)
    assert code == 75
    assert err == "coadvise: stopped at step 1 of 4 of teachers/conv; run the same command again to go on\n"
    monkeypatch.undo()
    monkeypatch.setattr(sys, "argv", ["coadvise", *map(str, arguments)])
    main_code = cli(*arguments)[0]
    assert main_code == 0
    assert (tmp_path / "run" / "report.html").is_file()


def test_the_module_is_the_program_and_quick_to_say_help(tmp_path: Path) -> None:
    done = run_program("--help", cwd=tmp_path)
    assert done.returncode == 0
    assert "Train teachers and a co-advised student" in done.stdout
    done = run_program("predict", "nowhere", "x.png", cwd=tmp_path)
    refused((done.returncode, done.stdout, done.stderr), "'nowhere' is no run directory")


def test_a_reader_that_goes_away_is_exit_code_1_without_a_word(tmp_path: Path) -> None:
    program = [sys.executable, "-m", "coadvise", "presets"]
    process = subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == ""
    assert process.wait() == 1


def test_what_is_foreseen_is_said_in_minutes_and_added_up(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    networks = [("one", 90.0), ("two", 0.0), ("three", 30.0)]
    monkeypatch.setattr(importlib.import_module("coadvise.runs.fit"), "foresee_fit", lambda *_: iter(networks))
    assert [line.split(maxsplit=2) for line in cli("fit", "d", "--dry-run")[1].splitlines()] == [
        ["1.5", "min", "one"], ["done", "two"], ["0.5", "min", "three"],
        ["2.0", "min", "in all, one network after the other"],
    ]  # fmt: skip
    assert json.loads(cli("fit", "d", "--dry-run", "--json")[1])[0] == {"network": "one", "seconds": 90.0}


def test_predict_says_the_three_likeliest(cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    answer = Prediction("c", 0.5, {"a": 0.125, "b": 0.25, "c": 0.5, "d": 0.0625, "e": 0.0625})
    student = SimpleNamespace(predict=lambda images, answer_by: [answer] * len(images))
    monkeypatch.setattr("coadvise.deploy.predict.load", lambda run, part: student)
    (tmp_path / "x.png").touch()
    assert cli("predict", "run", tmp_path / "x.png") == (0, f"{tmp_path / 'x.png'}: c 50.0%, b 25.0%, a 12.5%\n", "")
