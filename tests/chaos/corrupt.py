"""One random byte of a stopped run changed, or a file cut, emptied or removed; then the same call goes on."""

import random
import shutil
from pathlib import Path

from chaos import Tally
from chaos.victim import FINISHED, REFUSED, STOPPED, Victims, result

STOP = ("students/advised-0", 5)  # in the middle of an epoch; teachers are finished, two checkpoints are there


def run(tries: int, seed: int, folder: Path) -> Tally:
    """Damages checkpoints, finished networks and predictions, one file a try.

    Survived is a run that came to the same end, or that refused in a sentence which names the file. Lost is another
    end, or another error.
    """
    draw, tally, victims = random.Random(seed), Tally("corrupt"), Victims(folder)
    wanted_at, stopped, path = folder / "undisturbed", folder / "stopped", folder / "run"
    assert victims.start(wanted_at).code == FINISHED
    assert victims.start(stopped, stop_at=lambda *where: where == STOP).code == STOPPED
    wanted = result(wanted_at)
    files = sorted(
        str(file.relative_to(stopped))
        for kind in ("checkpoints", "teachers", "predictions")
        for file in (stopped / kind).rglob("*")
        if file.is_file()
    )
    while tally.tried < tries:
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(stopped, path)
        name = draw.choice(files)
        damage = _damage(path / name, draw)
        outcome = victims.start(path)
        tally.tried += 1
        if outcome.code == REFUSED and name in outcome.message:
            tally.note("refused, file named")
        elif outcome.code == FINISHED and result(path) == wanted:
            said = any(name in text for text in outcome.said)
            tally.note("said, and the same end" if said else "not needed, and the same end")
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
