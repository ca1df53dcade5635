"""A made run directory: numbers from a seeded generator, shaped as a real run leaves them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
TEACHERS = {"conv": "conv teacher", "inv": "involution teacher"}
TOKENS = ("class", *TEACHERS)


def make_run(
    path: Path,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    classes: Sequence[str] = CLASSES,
    images: int = 400,
    epochs: int = 40,
    pictures: Path | None = None,
    paths: Sequence[str] | None = None,
    labels: np.ndarray | None = None,
    unreadable: Sequence[str] = (),
) -> Path:
    """A complete run: two teachers, and for each seed a student alone and a co-advised one."""
    rng = np.random.default_rng(7)
    path.mkdir(parents=True)
    labels = rng.integers(0, len(classes), images) if labels is None else labels
    pictures = path / "pictures" if pictures is None else pictures
    if paths is None:
        paths = [f"{row:04d}.png" for row in range(len(labels))]
        pictures.mkdir()
        for name in paths[:400]:
            Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(pictures / name)
    _write_data(path, classes, labels, pictures, paths, unreadable)
    tops = _write_predictions(path, rng, labels, len(classes), seeds)
    (path / "config.yaml").write_text("# as run\nmodel: student_tiny\nloss: {conv: 1.0, inv: 1.0}\n", encoding="utf-8")
    records = [_run_record(seeds), *_learning(rng, tops, epochs), *_results(tops), _verdict(tops, seeds, len(labels))]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (path / "metrics.jsonl").write_text(lines, encoding="utf-8")
    return path


def _write_data(path: Path, classes, labels, pictures: Path, paths, unreadable) -> None:
    counts = np.bincount(labels, minlength=len(classes)).tolist()
    train = {"images": 500 * len(classes), "per_class": [500] * len(classes), "unreadable": list(unreadable)}
    val = {"images": len(labels), "per_class": counts, "unreadable": [], "paths": list(paths)}
    data = {
        "root": str(pictures),
        "classes": list(classes),
        "image_size": 32,
        "splits": {"train": train, "val": val},
        "note": "val is every tenth image, by the hash of its path",
    }
    (path / "data.json").write_text(json.dumps(data), encoding="utf-8")


def _write_predictions(path: Path, rng, labels, classes: int, seeds) -> dict[str, dict[str, float]]:
    """Predictions whose tokens lean on their teachers; returns part -> token -> top-1."""
    (path / "predictions").mkdir()
    shape = (len(labels), classes)
    truth = np.eye(classes)[labels] * rng.uniform(1.0, 4.2, (len(labels), 1))
    blur = rng.normal(0, 1, (classes, classes))[labels]
    views = {name: truth + 0.9 * rng.normal(0, 1.4, shape) + 0.4 * blur for name in TEACHERS}
    logits = {f"teachers/{name}": {"class": view} for name, view in views.items()}
    for seed in seeds:
        logits[f"students/alone-{seed}"] = {"class": 0.8 * truth + rng.normal(0, 1.15, shape) + 0.4 * blur}
        tokens = {name: 0.6 * view + 0.3 * truth + rng.normal(0, 0.9, shape) for name, view in views.items()}
        tokens["class"] = sum(tokens.values()) / 2 + rng.normal(0, 0.6, shape)
        logits[f"students/advised-{seed}"] = {name: tokens[name] for name in TOKENS}
    tops: dict[str, dict[str, float]] = {}
    for part, given in logits.items():
        arrays = {f"logits.{token}": 1.5 * value.astype(np.float32) for token, value in given.items()}
        save_file(
            {"labels": labels.astype(np.int64), **arrays},
            path / "predictions" / f"{part.replace('/', '.', 1)}.safetensors",
        )
        tops[part] = {token: float(np.mean(value.argmax(1) == labels)) for token, value in given.items()}
        if len(given) > 1:
            tops[part]["average"] = float(np.mean(sum(given.values()).argmax(1) == labels))
    return tops


def _run_record(seeds) -> dict:
    return {
        "kind": "run",
        "version": "0.1.0",
        "time": "2026-11-23T18:00:00+00:00",
        "versions": {"torch": "2.13.0", "timm": "1.0.24"},
        "device": "cpu, 2 cores",
        "seeds": list(seeds),
        "command": "coadvise fit --preset tiny data.root=pictures",
    }


def _learning(rng, tops, epochs: int) -> list[dict]:
    records = []
    for part, top in tops.items():
        where = {"part": part, "seed": int(part[-1]) if part[-1].isdecimal() else 0}
        for epoch in range(1, epochs + 1):
            done = 1 - np.exp(-4 * epoch / epochs)
            at = {**where, "step": 40 * epoch, "epoch": float(epoch)}
            losses = {
                name: float((2.3 if name == "class" else 1.5) * (1.15 - done) * rng.uniform(0.95, 1.05))
                for name in (TOKENS if "advised" in part else ("class",))
            }
            rate = {"learning_rate": 0.001, "images_per_second": 812.0}
            records.append({"kind": "train", **at, **rate, "losses": {"total": sum(losses.values()), **losses}})
            if epoch % 2 == 0 or epoch == epochs:
                low = 0.1
                scores = {
                    n: float(low + (v - low) * done / (1 - np.exp(-4)) + rng.normal(0, 0.008)) for n, v in top.items()
                }
                records.append({"kind": "eval", **at, "top1": scores})
    return records


def _results(tops) -> list[dict]:
    return [
        {
            "kind": "result",
            "part": part,
            "role": "teacher" if "teachers" in part else "advised" if "advised" in part else "alone",
            "name": TEACHERS.get(part.removeprefix("teachers/"), part),
            "model": "resnet_small" if part == "teachers/conv" else "rednet_small" if "inv" in part else "student_tiny",
            "seed": 0,
            "top1": top,
            "top5": {"class": min(1.0, top["class"] + 0.25)},
            "ece": {"class": 0.0417},
            "nll": {"class": 1.2345},
            "parameters": 4_912_330 if "teachers" in part else 1_203_446,
        }
        for part, top in tops.items()
    ]


def _verdict(tops, seeds, images: int) -> dict:
    def row(name: str, parts: list[str], answer: str) -> dict:
        values = [tops[part][answer] for part in parts]
        return {
            "name": name,
            "part": parts[0],
            "answer": answer,
            "top1": float(np.mean(values)),
            "spread": float(np.std(values, ddof=1)) if len(values) > 1 else None,
            "parameters": 1_203_446,
            "images_per_second": 5400.0,
        }

    alone, advised = ([f"students/{kind}-{seed}" for seed in seeds] for kind in ("alone", "advised"))
    rows = [row(name, [f"teachers/{token}"], "class") for token, name in TEACHERS.items()]
    rows.append(row("student alone", alone, "class"))
    for answer in (*TOKENS, "average"):
        label = answer if answer == "average" else f"{answer} token"
        rows.append(row(f"student co-advised ({label})", advised, answer))
    for each in rows[3:]:
        gain = each["top1"] - rows[2]["top1"]
        over_seeds = {"mean": gain, "low": gain - 0.031, "high": gain + 0.031, "n": len(seeds)}
        each["difference"] = {"mean": gain, "low": gain - 0.019, "high": gain + 0.019, "seeds": over_seeds}
    gain = rows[3]["top1"] - rows[2]["top1"]
    divergences = [
        {"part": part, "answer": answer, "teacher": teacher, "kl": 0.25 * (1 + place) + 0.5 * (teacher == "inv")}
        for place, part in enumerate(advised)
        for answer in TOKENS
        for teacher in TEACHERS
    ]
    seeds_too = {"mean": gain, "low": gain - 0.028, "high": gain + 0.028, "n": len(seeds)}
    low, high = gain - 0.017, gain + 0.017
    return {
        "kind": "verdict",
        "images": images,
        "seeds": list(seeds),
        "rows": rows,
        "difference": {"mean": gain, "low": low, "high": high, "over": "images", "seeds": seeds_too},
        "divergences": divergences,
        "sentence": (
            f"Advice helped: {100 * gain:+.1f} points (95\u00a0% interval {100 * low:.1f} to {100 * high:.1f}) "
            f"over the same student trained alone."
        ),
    }


@pytest.fixture
def build(tmp_path: Path) -> Callable[..., Path]:
    """Builds a made run below the test's own directory."""

    def builder(name: str = "run", **options) -> Path:
        return make_run(tmp_path / name, **options)

    return builder
