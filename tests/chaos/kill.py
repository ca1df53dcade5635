"""SIGKILL at random places of a run, half of them inside what reads and writes; then the same call goes on."""

import random
import shutil
from pathlib import Path

from chaos import Tally
from chaos.victim import FINISHED, Outcome, Place, Victims, result
from coadvise.training.checkpoint import Checkpoints


def run(tries: int, seed: int, folder: Path) -> Tally:
    """Kills runs until `tries` were killed; each goes on until it is finished, and is held against an undisturbed one.

    Lost is a kill after which the run did not go on from its newest whole checkpoint, or did not come to the same end.
    """
    draw, tally, victims = random.Random(seed), Tally("kill"), Victims(folder)
    undisturbed = folder / "undisturbed"
    counted = victims.start(undisturbed, count=True)
    assert counted.code == FINISHED, counted.message
    wanted = result(undisturbed)
    while tally.tried < tries:
        path, kills = folder / "run", []
        shutil.rmtree(path, ignore_errors=True)
        while True:
            saving = draw.random() < 0.5
            place = Place(draw.randrange(1, counted.calls["saving" if saving else "any"]), saving)
            saved = _saved(path)
            outcome = victims.start(path, place if tally.tried < tries else None)
            if fault := _went_on(saved, outcome):
                tally.lost.append(f"{kills[-1] if kills else 'start'}: {fault}")
            if outcome.code != -9:
                break
            kills.append(place)
            tally.tried += 1
            tally.note("inside a save" if saving else "anywhere")
        if outcome.code != FINISHED:
            tally.lost.append(f"{kills}: {outcome.message}")
        elif result(path) != wanted:
            tally.lost.append(f"{kills}: another result")
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
