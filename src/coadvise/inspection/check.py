"""The command `check`: one pass over the data, then the page, and a table without what is wrong."""

import csv
import io
import os
from collections.abc import Sequence
from pathlib import Path

from coadvise.config.reading import load_config, nearest
from coadvise.data.sources import Source, resolved, source_of
from coadvise.data.sources.folder import FolderSplit
from coadvise.errors import UserError
from coadvise.inspection.duplicates import exact_groups, near_groups
from coadvise.inspection.findings import KINDS, Findings
from coadvise.inspection.page import render
from coadvise.inspection.pictures import look_through
from coadvise.inspection.suspects import FOLDS, doubts
from coadvise.runs.plan import default_preset
from coadvise.runs.run import CONFIG, check_run, written_data
from coadvise.storage import write_bytes, write_text
from coadvise.training.listener import Listener, Silent

_CHEAP = "Such predictions are weak, so take them as hints: the teachers of a run or another network judge better"


def check(
    data: str | Path,
    run: str | Path | None = None,
    overrides: Sequence[str] = (),
    features: str | None = None,
    listener: Listener | None = None,
) -> Findings:
    """Looks for what is likely to go wrong with some data. Trains no network and writes nothing.

    Args:
        data: as for `fit`.
        run: a run whose teachers judge the labels; data options and seed are then the run's.
        overrides: `data.KEY=value` or `seed=N`, as for `fit`.
        features: a network that judges the labels in place of a run's teachers, see `network_named`.

    Raises:
        UserError: as `fit` for data that cannot be used, a run without teachers, no such network, or a package of the
            extra `check` is missing.
    """
    return inspect(source_to_check(str(data), run, overrides), run, features, listener)


def source_to_check(data: str, run: str | Path | None, overrides: Sequence[str]) -> Source:
    """The images, with the same classes and splits as `fit` uses. Raises UserError as `check`."""
    for override in overrides:
        if not override.startswith(("data.", "seed=")):
            raise UserError(
                f"'{override}': checking data takes data.KEY=value and seed=N alone, as 'coadvise fit' does"
            )
    if run is None:
        return source_of(load_config(default_preset(data, overrides), overrides, source=data))
    check_run(Path(run))
    return source_of(load_config(str(Path(run, CONFIG)), overrides, source=data))


def inspect(source: Source, run: str | Path | None, features: str | None, listener: Listener | None = None) -> Findings:
    """As `check`, of an open source."""
    listener = listener or Silent()
    network, predictor, remark = None, "edges and colours", _CHEAP
    if run is not None or features is not None:
        from coadvise.inspection.networks import network_named, teachers_of

        if run is not None and features is not None:
            raise UserError("both --run and --features would judge the labels; give one of them")
        network = teachers_of(Path(run)) if run is not None else network_named(str(features))
        predictor = f"'{Path(str(features)).name}'" if run is None else "the run's teachers"
        remark = _remark(source, run)
    found = look_through(
        source,
        network,
        network.pixels if network else None,
        lambda done, total: listener.progress("images", done, total, {}),
    )
    exact = exact_groups(found.digests)
    near = near_groups(found.digests, found.hashes, found.looks)
    what = network.what if network else predictor
    listener.say(f"judging {len(found)} labels by {what}")
    judged = doubts(found.features, found.labels, [*exact, *near])
    how = f"Each label is judged by a logistic regression on {what} that has not seen it ({FOLDS} folds). {remark}."
    return Findings(found, tuple(exact), tuple(near), judged, f"predictions by {predictor}", how)


def _remark(source: Source, run: str | Path | None) -> str:
    """What predictions on features of networks are worth."""
    if run is None:
        return "The network is used as it is"
    if written_data(Path(run)).get("folder") != resolved(source.where):
        return "The run was on other data"
    return (
        "But the teachers were trained on the labels of the training images, so they may have learned wrong ones by "
        "heart; for all other images the predictions are out of sample"
    )


# ---- what is written ----


def check_outputs(source: Source, page: Path, cleaned: Path | None, kinds: Sequence[str] | None) -> None:
    """Raises UserError, before any image is read, for files and kinds that cannot be used."""
    if page.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--out {page}: the page is HTML; give a name ending in .html")
    for path in (page, cleaned):
        if path is not None and not path.absolute().parent.is_dir():
            raise UserError(f"'{path}': there is no folder '{path.parent}'; create it, or choose another name")
    if kinds is not None:
        if cleaned is None:
            raise UserError("--leave-out says what --write leaves out; give that too, such as --write cleaned.csv")
        for kind in kinds:
            if kind not in KINDS:
                raise UserError(f"--leave-out {kind}{nearest(kind, list(KINDS))}; there are {', '.join(KINDS)}")
    if cleaned is not None:
        if cleaned.suffix.lower() != ".csv":
            raise UserError(f"--write {cleaned}: the table is CSV; give a name ending in .csv")
        if cleaned.exists():
            raise UserError(f"--write {cleaned}: this file exists; choose another name, or delete it")
        for split in source.splits.values():
            _root(source, split)


def write_page(found: Findings, path: Path) -> None:
    """Writes or replaces the page. Raises StorageError."""
    write_bytes(path, render(found).encode("utf-8", errors="backslashreplace"))  # a name may not be valid Unicode


def write_cleaned(found: Findings, path: Path, kinds: Sequence[str]) -> dict[str, int]:
    """Writes a table of `path,label,split` for `fit`, with the same classes and splits, without what is wrong.

    Paths are relative to the table if the images lie in folders below it, and absolute if not.

    Args:
        kinds: what to leave out, of `KINDS`.

    Returns:
        How many images each kind left out.

    Raises:
        UserError: images that are no files, or a class without an image to train on, or nothing left to score on.
        StorageError: it cannot be written.
    """
    source = found.pictures.source
    left_out = found.left_out(kinds)
    gone = set().union(*left_out.values())
    beside = os.path.abspath(path.parent)  # noqa: PTH100 - links stay as they are
    lines = io.StringIO()
    table = csv.writer(lines, lineterminator="\n")
    table.writerow(("path", "label", "split"))
    for name, split in source.splits.items():
        root = os.path.abspath(_root(source, split))  # noqa: PTH100
        rows = [row for row in range(len(split)) if (name, row) not in gone]
        classes = {int(split.labels[row]) for row in rows}
        lost = [known for label, known in enumerate(found.classes) if label not in classes]
        if not rows or (lost and name == "train"):
            what = f"no {name} image" if not rows else f"class '{lost[0]}' without an image to train on"
            raise UserError(f"leaving out {', '.join(kinds)} leaves {what}; give fewer kinds with --leave-out")
        for row in rows:
            file = os.path.join(root, split.name(row))  # noqa: PTH118
            inside = os.path.commonpath([beside, file]) == beside
            table.writerow((os.path.relpath(file, beside) if inside else file, found.classes[split.labels[row]], name))
    write_text(path, lines.getvalue())
    return {kind: len(places) for kind, places in left_out.items()}


def _root(source: Source, split: object) -> Path:
    """The folder that a split's names are relative to."""
    if not isinstance(split, FolderSplit):
        raise UserError(
            f"the images of '{source.where}' are no files of their own, so no table of paths can name them; leave out "
            "--write"
        )
    return split.root
