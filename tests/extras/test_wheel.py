"""The built wheel alone, in an empty environment, is enough to train, predict and read the report."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import coadvise

ROOT = Path(__file__).parents[2]
FEW_STEPS = [
    f"{network}.recipe.{key}=1"
    for network in ("teachers.conv", "teachers.inv", "student")
    for key in ("epochs", "evaluations")
]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, ROOT]
    subprocess.run(build, check=True)
    (built,) = folder.glob("*.whl")
    return built


def test_it_holds_what_is_not_python(wheel: Path) -> None:
    source = ROOT / "src"
    wanted = {
        path.relative_to(source).as_posix()
        for path in (source / "coadvise").rglob("*")
        if path.is_file() and path.suffix not in (".pyc", ".so")
    }
    names = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("coadvise/")}
    assert names == wanted
    assert coadvise.__version__ in wheel.name


def test_the_demonstration_runs_from_it(wheel: Path, tmp_path: Path) -> None:
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    python = environment / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints" / "cpu.txt", wheel]
    subprocess.run(install, check=True)
    subprocess.run([python, "-m", "pip", "check"], check=True)
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}

    def run(*words: object) -> str:
        command = [str(environment / "bin" / "coadvise"), *map(str, words)]
        done = subprocess.run(command, cwd=tmp_path, env=kept, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert run("--version") == f"coadvise {coadvise.__version__}\n"
    said = run("fit", "digits", "--baseline", "--out", "runs/demo", *FEW_STEPS)
    assert "student co-advised (class token)" in said
    assert "involution runs in plain PyTorch" not in said
    assert "<style>" in (tmp_path / "runs" / "demo" / "report.html").read_text()
    code = "from coadvise.data.sources import open_source as o; open('photo.png', 'wb').write(o('digits').val.read(0))"
    subprocess.run([python, "-c", code], cwd=tmp_path, env=kept, check=True)
    (answer,) = json.loads(run("predict", "runs/demo", "photo.png", "--json"))
    assert sum(answer["probabilities"].values()) == pytest.approx(1, abs=1e-4)
    assert "table7" in run("studies")
