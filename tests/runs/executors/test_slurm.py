"""What SLURM's commands are asked, and what follows from their answers. Programs of the same names stand for them."""

from pathlib import Path

import pytest

from coadvise.errors import UserError
from coadvise.runs.executors import slurm
from coadvise.runs.executors.cluster import Needs
from coadvise.runs.executors.slurm import Slurm
from coadvise.runs.run import TASKS

REFUSED = "sbatch: error: Requested node configuration is not available"


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of all programs there are."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


def write(folder: Path, name: str, text: str) -> None:
    """A program that first writes its arguments into a file beside it."""
    (folder / name).write_text(f'#!/bin/sh\necho "$@" >> {folder}/{name}.asked\n{text}\n')
    (folder / name).chmod(0o755)


def test_without_sbatch_or_a_fitting_node_nothing_begins(programs: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no 'sbatch' here; start the command on a login node"):
        Slurm(tmp_path / "run", Needs(1, 0), None)
    write(programs, "sbatch", f"echo '{REFUSED}' >&2; exit 1")
    with pytest.raises(UserError, match=f"no job with 64 processors and 1 GPU .{REFUSED}.; change engine.cpus"):
        Slurm(tmp_path / "run", Needs(64, 1), None)
    assert (programs / "sbatch.asked").read_text() == "--test-only --cpus-per-task=64 --gpus-per-node=1 --wrap=true\n"
    assert not (tmp_path / "run").exists()


def test_jobs_that_a_dead_command_left_are_ended_before_anything_else(
    programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm.time, "sleep", lambda seconds: None)
    write(programs, "sbatch", "exit 0")
    write(programs, "scancel", "exit 0")
    gone = "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1"
    write(programs, "squeue", f"[ -e {programs}/once ] && {{ {gone}; }}; : > {programs}/once; echo '7 main ending'")
    jobs = tmp_path / "run" / TASKS / "slurm"
    jobs.mkdir(parents=True)
    (jobs / "7_submitted.pkl").touch()
    cluster = Slurm(tmp_path / "run", Needs(1, 0), None)
    assert jobs.exists(), "another command may have the run directory"
    cluster.begin()
    assert (programs / "scancel.asked").read_text() == "7\n"
    assert (programs / "squeue.asked").read_text() == "--noheader --jobs 7\n" * 2
    assert not jobs.exists()


def test_a_controller_that_does_not_answer_ends_no_job(programs: Path) -> None:
    write(programs, "squeue", "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1")
    assert slurm._queued("7")
    write(programs, "squeue", "exit 0")
    assert not slurm._queued("7")
