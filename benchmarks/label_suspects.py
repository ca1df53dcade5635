"""How many planted faults `coadvise check` finds: wrong labels, and resized or recompressed copies in another split.

    python -m benchmarks.label_suspects DATA --features FILE

    python -m benchmarks.label_suspects DATA --plant wrong.csv   # for teachers that have learned the wrong labels too
    coadvise fit wrong.csv --out RUN   # for the committed figures: --preset digits, both teachers for 25 epochs
    python -m benchmarks.label_suspects DATA --features FILE --run RUN

The share of labels that is made wrong (each another class, all equally likely) is looked for in the ranking of all
labels: by chance the first 5 % of a ranking hold 5 % of them. DATA's own wrong labels are in the ranking too and count
as mistakes. Copies of training images are put among the validation images. `--out` gets curve.json and curve.md.
"""

import argparse
import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from coadvise.config.reading import read_config
from coadvise.data.images import decode
from coadvise.data.sources import Source, Split, open_source
from coadvise.inspection.duplicates import exact_groups, near_groups
from coadvise.inspection.networks import network_named, teachers_of
from coadvise.inspection.pictures import Pictures, look_through
from coadvise.inspection.suspects import doubts
from coadvise.report.predictors import wilson_interval
from coadvise.runs.run import CONFIG

SHARES = (0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0)  # of the ranking
TEACHERS = "teachers trained on them"
Labels = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class WithCopies(Split):
    """A split and, behind it, copies of pictures of another; `rows` are the places in both."""

    split: Split
    copies: tuple[bytes, ...]
    rows: Labels
    labels: Labels

    def name(self, index: int) -> str:
        row, own = int(self.rows[index]), len(self.split)
        return self.split.name(row) if row < own else f"copy-{row - own}"

    def read(self, index: int) -> bytes:
        row, own = int(self.rows[index]), len(self.split)
        return self.split.read(row) if row < own else self.copies[row - own]

    def stamp(self, index: int) -> str:
        row, own = int(self.rows[index]), len(self.split)
        return self.split.stamp(row) if row < own else "made here"

    def subset(self, rows: Sequence[int] | Labels, labels: Labels | None = None) -> Split:
        chosen = np.asarray(rows, np.int64)
        return replace(self, rows=self.rows[chosen], labels=self.labels[chosen] if labels is None else labels)


def with_wrong_labels(labels: Labels, share: float, seed: int) -> tuple[Labels, Labels]:
    """The labels with a share of them wrong, and which these are."""
    rng = np.random.default_rng(seed)
    wrong = np.sort(rng.choice(len(labels), round(share * len(labels)), replace=False))
    planted, classes = labels.copy(), int(labels.max()) + 1
    planted[wrong] = (labels[wrong] + rng.integers(1, classes, len(wrong))) % classes
    return planted, wrong


def curve(found: Pictures, share: float, seeds: Sequence[int]) -> list[dict[str, float]]:
    """For each seed: the share of planted labels among the first of the ranking, by the share of the ranking.

    Under "train" and "val": of those of each split, among as many of the ranking as labels were planted.
    """
    groups = [*exact_groups(found.digests), *near_groups(found.digests, found.hashes, found.looks)]
    curves = []
    splits = np.array([place.split for place in found.places])
    for seed in seeds:
        labels, wrong = with_wrong_labels(found.labels, share, seed)
        rank = np.full(len(labels), len(labels))
        ranking = np.array(doubts(found.features, labels, groups).ranking, np.int64)
        rank[ranking] = np.arange(len(ranking))
        curves.append({f"{part:g}": float((rank[wrong] < part * len(labels)).mean()) for part in SHARES})
        for split in ("train", "val"):  # among as many as are wrong, of all
            some = wrong[splits[wrong] == split]
            curves[-1][split] = float((rank[some] < len(wrong)).mean())
    return curves


def copy_of(content: bytes, number: int, rng: np.random.Generator) -> bytes:
    """A picture at 0.4 to 1.4 times its size, as JPEG, WebP or PNG."""
    image, scale = decode(content, "original"), float(rng.uniform(0.4, 1.4))
    size = tuple(max(8, round(side * scale)) for side in image.size)
    ways = (Image.Resampling.BICUBIC, Image.Resampling.BILINEAR, Image.Resampling.LANCZOS)
    image = image.resize((size[0], size[1]), ways[number % 3])
    buffer, kind = io.BytesIO(), ("JPEG", "JPEG", "WEBP", "PNG")[number % 4]
    image.save(buffer, kind, **({} if kind == "PNG" else {"quality": int(rng.integers(50, 95))}))
    return buffer.getvalue()


def copies_found(source: Source, count: int, seed: int) -> dict[str, int]:
    """Plants copies of training pictures in val; counts those found, and near duplicates across splits in all."""
    rng = np.random.default_rng(seed)
    originals = rng.choice(len(source.train), count, replace=False)
    copies = tuple(copy_of(source.train.read(int(row)), number, rng) for number, row in enumerate(originals))
    labels = np.concatenate([source.val.labels, source.train.labels[originals]])
    val = WithCopies(source.val, copies, np.arange(len(labels)), labels)
    found = look_through(replace(source, val=val), None, None)
    where = {place.name: number for number, place in enumerate(found.places)}
    planted = {(where[source.train.name(int(row))], where[f"copy-{n}"]) for n, row in enumerate(originals)}
    groups = near_groups(found.digests, found.hashes, found.looks)
    across = [group for group in groups if len({found.places[number].split for number in group}) > 1]
    hits = [{pair for pair in planted if {*pair} <= {*group}} for group in across]
    return {"planted": count, "found": sum(map(len, hits)), "groups": len(across), "right": sum(map(bool, hits))}


def measure(
    data: str, features: str | None, run: Path | None, share: float, copies: int, seeds: Sequence[int]
) -> dict[str, Any]:
    """All figures, as curve.json holds them."""
    source = open_source(data)
    ways = {"edges and colours": look_through(source, None, None)}
    if features is not None:
        network = network_named(features)
        ways[Path(features).stem] = look_through(source, network, network.pixels)
    recall = {name: curve(found, share, seeds) for name, found in ways.items()}
    if run is not None:  # its teachers have learned the wrong labels of the first seed
        network = teachers_of(run)
        recall[TEACHERS] = curve(look_through(source, network, network.pixels), share, seeds[:1])
    return {
        "data": Path(data).name,
        "images": len(ways["edges and colours"]),
        "classes": len(source.classes),
        "wrong": share,
        "seeds": list(seeds),
        "recall": recall,
        "teachers": None if run is None else _about(run),
        "copies": [copies_found(source, copies, seed) for seed in seeds],
        "versions": {name: version(name) for name in ("cleanlab", "imagehash", "scikit-learn", "timm", "torch")},
    }


def _about(run: Path) -> str:
    config = read_config(run / CONFIG)
    epochs = ", ".join(f"{name} for {teacher.recipe.epochs} epochs" for name, teacher in config.teachers.items())
    return f"images of {config.data.image_size} pixels, {epochs}"


def document(found: dict[str, Any]) -> str:
    """curve.md."""
    names = list(found["recall"])
    lines = [
        "# Planted faults that `coadvise check` finds",
        "",
        f"{found['images']} images of {found['data']}, {found['wrong']:.0%} of the labels made wrong, seeds "
        f"{', '.join(map(str, found['seeds']))}. Share of the planted labels among the first of the ranking: mean, "
        "least and most over seeds.",
        "",
        f"| first of the ranking | {' | '.join(names)} |",
        f"| --- |{' --- |' * len(names)}",
    ]
    for share in SHARES:
        cells = []
        for name in names:
            values = [one[f"{share:g}"] for one in found["recall"][name]]
            cells.append(f"{mean(values):.1%} ({min(values):.1%} to {max(values):.1%})")
        lines.append(f"| {share:.0%} | {' | '.join(cells)} |")
    for split in ("train", "val"):
        cells = [f"{mean(one[split] for one in found['recall'][name]):.1%}" for name in names]
        lines.append(f"| {found['wrong']:.0%}: those in {split} | {' | '.join(cells)} |")
    if found["teachers"]:
        lines += ["", f"{TEACHERS[0].upper()}{TEACHERS[1:]}: {found['teachers']}, seed {found['seeds'][0]} alone."]
    totals = {key: sum(one[key] for one in found["copies"]) for key in ("planted", "found", "groups", "right")}
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    lines += [
        "",
        f"Resized or recompressed copies in another split, {found['copies'][0]['planted']} a seed:",
        "",
        f"- recall {_share(totals['found'], totals['planted'])}",
        f"- precision {_share(totals['right'], totals['groups'])}",
        "",
        f"Made by `python -m benchmarks.label_suspects`; {versions}.",
    ]
    return "\n".join(lines) + "\n"


def plant(data: str, share: float, seed: int, table: Path) -> None:
    """Writes the table of all images with the wrong labels of a seed."""
    source = open_source(data)
    splits = {"train": source.train, "val": source.val}
    labels, _ = with_wrong_labels(np.concatenate([split.labels for split in splits.values()]), share, seed)
    places = [(name, path) for name, split in splits.items() for path in split.names()]
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("path", "label", "split"))
        for (name, path), label in zip(places, labels.tolist(), strict=True):
            writer.writerow((Path(data, path).absolute(), source.classes[label], name))


def _share(part: int, whole: int) -> str:
    low, high = wilson_interval(part / whole, whole) if whole else (0.0, 1.0)
    return f"{part} of {whole} (95 % interval {low:.1%} to {high:.1%})"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.label_suspects", description=__doc__.partition("\n")[0])
    parser.add_argument("data")
    parser.add_argument("--features", help="as for 'coadvise check'")
    parser.add_argument("--plant", type=Path, help="only write this table with the wrong labels of the first seed")
    parser.add_argument("--run", type=Path, help="a run on that table")
    parser.add_argument("--wrong", type=float, default=0.05, help="share of the labels made wrong")
    parser.add_argument("--copies", type=int, default=30)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("results/label-suspects"))
    given = parser.parse_args()
    if given.plant is not None:
        plant(given.data, given.wrong, 0, given.plant)
        return
    found = measure(given.data, given.features, given.run, given.wrong, given.copies, range(given.seeds))
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "curve.json").write_text(json.dumps(found, indent=1) + "\n")
    (given.out / "curve.md").write_text(document(found))
    print(document(found))


if __name__ == "__main__":
    main()
