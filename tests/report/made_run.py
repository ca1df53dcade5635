"""A made run directory: numbers from a seeded generator, in the format of a real run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.numpy import save_file

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
TEACHERS = {"conv": "conv teacher", "inv": "involution teacher"}
TOKENS = ("class", *TEACHERS)


def read_lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def write_lines(run: Path, records: Sequence[dict]) -> None:
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def save(run: Path, part: str, labels, **logits) -> None:
    """Writes the predictions of a part; `logits` by token."""
    (run / "predictions").mkdir(parents=True, exist_ok=True)
    arrays = {f"logits.{token}": np.asarray(value, np.float32) for token, value in logits.items()}
    name = f"{part.replace('/', '.', 1)}.safetensors"
    save_file({"labels": np.asarray(labels, np.int64), **arrays}, run / "predictions" / name)


def one_hot(classes, strength, known=3):
    """Logits of these classes; `strength` is one number or one for each."""
    return np.eye(known)[classes] * np.broadcast_to(strength, len(classes))[:, None]


def make_run(
    path: Path,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    classes: Sequence[str] = CLASSES,
    images: int = 400,
    epochs: int = 40,
    paths: Sequence[str] | None = None,
    labels: np.ndarray | None = None,
    unreadable: Sequence[str] = (),
) -> Path:
    """A complete run: two teachers, and for each seed a student alone and a co-advised one."""
    rng = np.random.default_rng(7)
    path.mkdir(parents=True)
    labels = rng.integers(0, len(classes), images) if labels is None else labels
    paths = [f"{row:04d}.png" for row in range(len(labels))] if paths is None else paths
    (path / "pictures").mkdir()
    for row in range(min(400, len(labels))):
        image = Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8))
        image.save(path / "pictures" / f"{row:04d}.png")
    counts = np.bincount(labels, minlength=len(classes)).tolist()
    train = {"images": 500 * len(classes), "per_class": [500] * len(classes), "unreadable": list(unreadable)}
    val = {"images": len(labels), "per_class": counts, "unreadable": [], "paths": list(paths)}
    data = {
        "root": str(path / "pictures"),
        "classes": list(classes),
        "image_size": 32,
        "splits": {"train": train, "val": val},
    }
    (path / "data.json").write_text(json.dumps({**data, "note": "val is every tenth image, by the hash of its path"}))
    (path / "config.yaml").write_text("# as run\nmodel: student_tiny\nloss: {conv: 1.0, inv: 1.0}\n", encoding="utf-8")
    tops = _write_predictions(path, rng, labels, len(classes), seeds)
    began = {
        "kind": "run", "version": "0.1.0", "time": "2026-11-23T18:00:00+00:00", "device": "cpu, 2 cores",
        "versions": {"torch": "2.13.0", "timm": "1.0.24"}, "seeds": list(seeds),
        "command": "coadvise fit --preset tiny data.root=pictures",
    }  # fmt: skip
    results = [_result(part, top) for part, top in tops.items()]
    write_lines(path, [began, *_learning(rng, tops, epochs), *results, _verdict(tops, seeds, len(labels))])
    return path


def _write_predictions(path: Path, rng, labels, classes: int, seeds) -> dict[str, dict[str, float]]:
    """Predictions whose tokens resemble their teachers. Returns part -> token -> top-1."""
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
        save(path, part, labels, **{token: 1.5 * value for token, value in given.items()})
        tops[part] = {token: float(np.mean(value.argmax(1) == labels)) for token, value in given.items()}
        if len(given) > 1:
            tops[part]["average"] = float(np.mean(sum(given.values()).argmax(1) == labels))
    return tops


def _learning(rng, tops, epochs: int) -> list[dict]:
    records = []
    for part, top in tops.items():
        where = {"part": part, "seed": int(part[-1]) if part[-1].isdecimal() else 0}
        for epoch in range(1, epochs + 1):
            done = 1 - np.exp(-4 * epoch / epochs)
            at = {**where, "step": 40 * epoch, "epoch": float(epoch)}
            names = TOKENS if "advised" in part else ("class",)
            losses = {name: float(2 * (1.15 - done) * rng.uniform(0.95, 1.05)) for name in names}
            rate = {"learning_rate": 0.001, "images_per_second": 812.0}
            records.append({"kind": "train", **at, **rate, "losses": {"total": sum(losses.values()), **losses}})
            if epoch % 2 == 0 or epoch == epochs:
                scores = {name: float(0.1 + (value - 0.1) * done) for name, value in top.items()}
                records.append({"kind": "eval", **at, "top1": scores})
    return records


def _result(part: str, top: dict[str, float]) -> dict:
    teacher = part.startswith("teachers/")
    return {
        "kind": "result", "part": part, "role": "teacher" if teacher else "advised" if "advised" in part else "alone",
        "name": TEACHERS.get(part.removeprefix("teachers/"), part), "model": "teacher" if teacher else "student_tiny",
        "seed": 0, "top1": top, "top5": {"class": min(1.0, top["class"] + 0.25)}, "ece": {"class": 0.0417},
        "nll": {"class": 1.2345}, "parameters": 4_912_330 if teacher else 1_203_446,
    }  # fmt: skip


def _verdict(tops, seeds, images: int) -> dict:
    def row(name: str, parts: list[str], answer: str) -> dict:
        values = [tops[part][answer] for part in parts]
        spread = float(np.std(values, ddof=1)) if len(values) > 1 else None
        figures = {"top1": float(np.mean(values)), "spread": spread, "parameters": 1_203_446}
        return {"name": name, "part": parts[0], "answer": answer, **figures, "images_per_second": 5400.0}

    def interval(gain: float, half: float) -> dict:
        return {"mean": gain, "low": gain - half, "high": gain + half}

    alone, advised = ([f"students/{kind}-{seed}" for seed in seeds] for kind in ("alone", "advised"))
    rows = [row(name, [f"teachers/{token}"], "class") for token, name in TEACHERS.items()]
    rows.append(row("student alone", alone, "class"))
    for answer in (*TOKENS, "average"):
        label = answer if answer == "average" else f"{answer} token"
        rows.append(row(f"student co-advised ({label})", advised, answer))
    for each in rows[3:]:
        gain = each["top1"] - rows[2]["top1"]
        each["difference"] = {**interval(gain, 0.019), "seeds": {**interval(gain, 0.031), "n": len(seeds)}}
    gain = rows[3]["top1"] - rows[2]["top1"]
    divergences = [
        {"part": part, "answer": answer, "teacher": teacher, "kl": 0.25 * (1 + place) + 0.5 * (teacher == "inv")}
        for place, part in enumerate(advised)
        for answer in TOKENS
        for teacher in TEACHERS
    ]
    difference = {**interval(gain, 0.017), "over": "images", "seeds": {**interval(gain, 0.028), "n": len(seeds)}}
    about = {"images": images, "seeds": list(seeds), "sentence": f"Advice helped: {100 * gain:+.1f} points."}
    return {"kind": "verdict", **about, "rows": rows, "difference": difference, "divergences": divergences}
