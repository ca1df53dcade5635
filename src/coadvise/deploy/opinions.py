"""What each token of a student, and each teacher of its run, says of images."""

import csv
import io
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch

from coadvise.advice import AVERAGE
from coadvise.deploy.predict import Answering, TrainedStudent, load_from_run
from coadvise.errors import CodeNotKeptError, UserError
from coadvise.runs.run import check_run, trained_parts
from coadvise.storage import write_bytes

BATCH = 64  # images at a time


def opinions(student: TrainedStudent, run: Path) -> dict[str, Answering]:
    """Who is asked, each a module from images [B, 3, H, W] in 0..1 to probabilities [B, K].

    Tokens have their own names, with several also "average"; teachers are "teachers/NAME". Teachers of which only the
    weights are kept are left out.

    Raises:
        UserError: As `load_from_run`.
    """
    check_run(run)
    several = (*student.tokens, AVERAGE) if len(student.tokens) > 1 else student.tokens
    asked = {answer: student.answering(answer) for answer in several}
    for teacher in (name for name in trained_parts(run) if name.startswith("teachers/")):
        with suppress(CodeNotKeptError):
            asked[teacher] = load_from_run(run, teacher).answering()
    return asked


def write_opinions(student: TrainedStudent, run: Path, images: Sequence[Path], out: Path) -> None:
    """Writes a table of all `opinions`: a row an image; of each opinion its class and the probability of that.

    Args:
        student: The network of the run whose tokens are asked.
        run: Run directory.
        images: Files.
        out: The CSV file.

    Raises:
        UserError: As `opinions`, an image that cannot be read, or a folder that is not there.
    """
    if not out.absolute().parent.is_dir():
        raise UserError(f"'{out.parent}' is not a folder; create it, or choose another path")
    asked = opinions(student, run)
    table = io.StringIO()
    rows = csv.writer(table, lineterminator="\n")
    rows.writerow(["image", *(column for name in asked for column in (name, f"{name} probability"))])
    classes = {name: module.classes for name, module in asked.items()}
    for start in range(0, len(images), BATCH):
        batch = images[start : start + BATCH]
        with torch.inference_mode():
            seen = student.batch(batch)
            found = {name: module(seen).max(-1) for name, module in asked.items()}
        for place, image in enumerate(batch):
            cells = [
                cell
                for name, (values, best) in found.items()
                for cell in (classes[name][int(best[place])], f"{values[place].item():.4f}")
            ]
            rows.writerow([str(image), *cells])
    write_bytes(out, table.getvalue().encode(errors="backslashreplace"))  # a name may not be valid Unicode
