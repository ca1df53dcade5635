"""Networks trained as jobs of submitit, whose local executor stands for SLURM."""

import os
import signal
from collections.abc import Mapping
from pathlib import Path

import pytest
from tiny import Stopper, assert_same_run, never

from coadvise import fit
from coadvise.runs.executors import slurm

pytest.importorskip("submitit", reason="the extra 'slurm' is not installed")


def job_of(part: str, run: Path) -> list[int]:
    """The process of a job that writes into this run, found by the journal that it has open."""
    (token,) = (path.read_text() for path in (run / ".tasks").glob(f"{part.replace('/', '%2F')}.owner"))
    found = []
    for opened in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if opened.readlink() == run / ".tasks" / f"{token}.jsonl":
                found.append(int(opened.parts[2]))
        except OSError:  # ended meanwhile
            continue
    return [process for process in found if process != os.getpid()]


def test_a_job_at_its_time_limit_is_submitted_again_and_finds_the_numbers_of_this_machine(
    tiny_images: Path, tiny_preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm, "KIND", "local")
    monkeypatch.setattr(slurm, "PARAMETERS", {"timeout_min": 30})
    monkeypatch.setenv("PATH", "/usr/bin:/bin")  # without SLURM's own commands

    class TimeLimit(Stopper):
        """Signals one job once, as submitit does before a time limit."""

        signalled = 0

        def progress(self, part: str, done: int, total: int, figures: Mapping[str, float]) -> None:
            super().progress(part, done, total, figures)
            if part == "teachers/inv" and done >= 2 and not self.signalled:
                (self.signalled,) = job_of(part, tmp_path / "there")
                os.kill(self.signalled, signal.SIGUSR2)

    long = ["teachers.inv.recipe.epochs=300", "teachers.inv.recipe.evaluations=1", "engine.checkpoint_seconds=1000"]
    listener = TimeLimit(never)
    there = fit(tiny_images, tiny_preset, tmp_path / "there", listener, overrides=long, on="slurm")
    assert listener.signalled
    stops = [line for line in listener.said if "as its scheduler asked; it goes on" in line]
    assert len(stops) == 1
    step = stops[0].partition("stopped at step ")[2].split()[0]
    assert f"teachers/inv: going on from step {step}" in listener.said
    here = fit(tiny_images, tiny_preset, tmp_path / "here", overrides=long)
    assert_same_run(there, here, ("teachers/conv", "teachers/inv", "students/advised-0"))
    assert not (there / ".tasks").exists()
