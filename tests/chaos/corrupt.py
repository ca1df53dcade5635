"""One random byte of a stopped run changed, or a file cut, emptied or removed; then the same call goes on."""

import random
import shutil
from pathlib import Path

from chaos.victim import FINISHED, REFUSED, STOPPED, Tally, Victims, result

STOP = ("students/advised-0", 5)  # in the middle of an epoch: teachers are finished, two checkpoints exist


def run(tries: int, seed: int, folder: Path) -> Tally:
    """Damages one file of checkpoints, finished networks or predictions in each try.

    Survived is a run with the same result, or one that refused with a message that names the file. All else is lost.
    """
    draw, tally, victims = random.Random(seed), Tally(), Victims(folder)
    undisturbed, stopped, path = folder / "undisturbed", folder / "stopped", folder / "run"
    assert victims.start(undisturbed).code == FINISHED
    assert victims.start(stopped, stop_at=lambda *where: where == STOP).code == STOPPED
    wanted = result(undisturbed)
    kinds = ("checkpoints", "teachers", "predictions")
    files = sorted(file for kind in kinds for file in (stopped / kind).rglob("*") if file.is_file())
    for _ in range(tries):
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(stopped, path)
        name = str(draw.choice(files).relative_to(stopped))
        damage = _damage(path / name, draw)
        outcome = victims.start(path)
        tally.tried += 1
        if outcome.code == REFUSED and name in outcome.message:
            tally.note("refused, file named")
        elif outcome.code == FINISHED and result(path) == wanted:
            tally.note("reported" if any(name in text for text in outcome.said) else "not needed")
        else:
            tally.lost.append(f"{name}, {damage}: {outcome.message.strip() or 'another result'}")
    return tally


def _damage(file: Path, draw: random.Random) -> str:
    whole = bytearray(file.read_bytes())
    kind = draw.choice(["byte"] * 7 + ["cut", "emptied", "removed"])
    place = draw.randrange(len(whole))
    if kind == "byte":
        whole[place] ^= draw.randrange(1, 256)
        file.write_bytes(whole)
        return f"byte {place} changed"
    if kind == "removed":
        file.unlink()
    else:
        file.write_bytes(whole[:place] if kind == "cut" else b"")
    return kind
