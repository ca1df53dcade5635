"""SIGKILL at random places of a run, half of them inside what reads and writes; then the same call goes on."""

import random
import shutil
from pathlib import Path

from chaos.victim import FINISHED, Outcome, Place, Tally, Victims, result

from coadvise.training.checkpoint import Checkpoints


def run(tries: int, seed: int, folder: Path) -> Tally:
    """Kills runs `tries` times in all; each goes on until it is finished, and is compared with an undisturbed one.

    Lost is a kill after which the run did not go on from its newest whole checkpoint, or ended differently.
    """
    draw, tally, victims = random.Random(seed), Tally(), Victims(folder)
    counted = victims.start(folder / "undisturbed", count=True)
    assert counted.code == FINISHED, counted.message
    wanted = result(folder / "undisturbed")
    while tally.tried < tries:
        path, kills, code = folder / "run", [], -9
        shutil.rmtree(path, ignore_errors=True)
        while code == -9:
            saving = draw.random() < 0.5
            place = Place(draw.randrange(1, counted.calls["saving" if saving else "any"]), saving)
            saved = _saved(path)
            outcome = victims.start(path, place if tally.tried < tries else None)
            if fault := _went_on(saved, outcome):
                tally.lost.append(f"{kills[-1] if kills else 'start'}: {fault}")
            if (code := outcome.code) == -9:
                kills.append(place)
                tally.tried += 1
                tally.note("inside a save" if saving else "anywhere")
        if code != FINISHED or result(path) != wanted:
            tally.lost.append(f"{kills}: {outcome.message or 'another result'}")
    return tally


def _saved(path: Path) -> dict[str, int]:
    """The step of each network's newest whole checkpoint."""
    steps = {}
    for folder in (path / "checkpoints").glob("*"):
        newest, _ = Checkpoints(folder).latest()
        if newest is not None:
            steps[folder.name.replace(".", "/")] = int(newest.name.removeprefix("step-"))
    return steps


def _went_on(saved: dict[str, int], outcome: Outcome) -> str:
    """What is wrong with where a run went on, or nothing."""
    if any("damaged" in text for text in outcome.said):
        return f"a kill has damaged something: {outcome.said}"
    for part, step in dict(reversed(outcome.steps)).items():  # each network's first step
        if step != saved.get(part, 0) + 1:
            return f"{part} went on at step {step}, its checkpoint was of step {saved.get(part, 0)}"
    return ""
