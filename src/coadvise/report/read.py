"""Reads a run directory in whatever state it is: complete, still running, or interrupted in the middle of a line."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

Record = Mapping[str, Any]
Floats = npt.NDArray[np.floating[Any]]
Ints = npt.NDArray[np.integer[Any]]

AVERAGE = "average"
# Groups: parts that differ in their seed alone.
ADVISED, ALONE, START = "students/advised", "students/alone", "students/start"


def number(value: object) -> float | None:
    """The value if it is a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def mapping(value: object) -> Record:
    """The value if it is a mapping, else an empty one."""
    return value if isinstance(value, Mapping) else {}


def sequence(value: object) -> list[Any]:
    """The value if it is a list, else an empty one."""
    return value if isinstance(value, list) else []


def softmax(logits: Floats) -> Floats:
    """Probabilities [..., K] of logits [..., K], in float64; zero where the logits are not finite."""
    shares = logits.astype(np.float64)
    with np.errstate(invalid="ignore"):
        shares -= shares.max(axis=-1, keepdims=True)
        np.exp(shares, out=shares)
        shares /= shares.sum(axis=-1, keepdims=True)
    return np.nan_to_num(shares, copy=False)


@dataclass(frozen=True)
class Predictions:
    """The predictions of one network for the validation images.

    Logits stay in the file: [N, K] of several tokens and networks may not fit in memory.
    """

    path: Path
    labels: Ints  # [N]
    predicted: Mapping[str, Ints]  # token -> class [N]; with several tokens also "average"
    confidence: Mapping[str, Floats]  # token -> probability of that class [N]
    classes: int  # how many the network knows

    @classmethod
    def read(cls, path: Path) -> Predictions:
        """Reads a file one token at a time.

        Raises:
            ValueError: there are no logits, or their shapes do not match the labels.
        """
        predicted, confidence = {}, {}
        with safe_open(path, framework="numpy") as file:
            labels = file.get_tensor("labels").astype(np.int64)
            tokens = [name.removeprefix("logits.") for name in file.keys() if name.startswith("logits.")]  # noqa: SIM118
            tokens.sort(key=lambda token: token != "class")  # the class token first
            total: Floats | None = None
            for token in tokens:
                logits = file.get_tensor(f"logits.{token}")
                if logits.ndim != 2 or labels.shape != logits.shape[:1] or 0 in logits.shape:
                    raise ValueError(f"labels {labels.shape} do not match logits.{token} {logits.shape}")
                shares = softmax(logits)
                predicted[token], confidence[token] = shares.argmax(axis=1), shares.max(axis=1)
                total = shares if total is None else np.add(total, shares, out=total)
        if total is None:
            raise ValueError("it holds no logits")
        if len(tokens) > 1:
            predicted[AVERAGE], confidence[AVERAGE] = total.argmax(axis=1), total.max(axis=1) / len(tokens)
        return cls(path, labels, predicted, confidence, total.shape[1])

    def probabilities(self, rows: Ints) -> dict[str, Floats]:
        """token -> probabilities [len(rows), K]. Reads these rows alone."""
        with safe_open(self.path, framework="numpy") as file:
            slices = {token: file.get_slice(f"logits.{token}") for token in self.predicted if token != AVERAGE}
            return {
                token: softmax(np.concatenate([piece[int(row) : int(row) + 1] for row in rows]))
                for token, piece in slices.items()
            }


@dataclass(frozen=True)
class Run:
    """What a run directory holds; `faults` names what could not be read.

    `picture` returns the encoded validation image of a row, or raises; None if the images could not be opened.
    `attention` returns the same by token, dark where it does not look; None if that is not known.
    """

    path: Path
    config: str | None
    data: Record
    records: tuple[Record, ...]
    predictions: Mapping[str, Predictions]  # by part
    faults: tuple[str, ...]
    picture: Callable[[int], bytes] | None = None
    attention: Callable[[int], Mapping[str, bytes]] | None = None

    @property
    def classes(self) -> list[str]:
        """The class names in the order of the labels."""
        return [str(name) for name in sequence(self.data.get("classes"))]

    def class_name(self, label: int) -> str:
        """The name of a class, or its number if data.json has no name."""
        return self.classes[label] if 0 <= label < len(self.classes) else f"class {label}"

    def split(self, name: str) -> Record:
        """One split of data.json; empty if it is missing."""
        return mapping(mapping(self.data.get("splits")).get(name))

    @property
    def scored(self) -> str:
        """What the images are called that finished networks are scored on."""
        return "test" if self.split("test") else "validation"

    @property
    def scored_split(self) -> Record:
        return self.split("test") or self.split("val")

    def of(self, kind: str) -> list[Record]:
        """All records of one kind, oldest first."""
        return [record for record in self.records if record.get("kind") == kind]

    def last(self, kind: str) -> Record:
        """The last record of one kind; empty if there is none."""
        return next(reversed(self.of(kind)), {})

    @property
    def begun(self) -> str:
        """When the run was first started; empty if that is not recorded."""
        return str(next(iter(self.of("run")), {}).get("time") or "")

    @cached_property
    def results(self) -> dict[str, Record]:
        """part -> its last result."""
        return {str(record.get("part")): record for record in self.of("result")}

    @cached_property
    def parts(self) -> list[str]:
        """Every part with records or predictions: teachers, students alone, then co-advised, each by seed."""
        named = {str(r["part"]) for r in self.records if r.get("kind") in ("train", "eval", "result") and "part" in r}
        order = {part: place for place, part in enumerate(dict.fromkeys(str(r.get("part")) for r in self.records))}
        return sorted(named | set(self.predictions), key=lambda part: (*rank(part), order.get(part, len(order)), part))

    @cached_property
    def tokens(self) -> list[str]:
        """The tokens that teachers advise, in the order that decides their colours on the page."""
        named = [part.removeprefix("teachers/") for part in self.parts if part.startswith("teachers/")]
        for record in self.records:
            if str(record.get("part", "")).startswith(ADVISED):
                named += map(str, (*mapping(record.get("top1")), *mapping(record.get("losses"))))
        for part, predictions in self.predictions.items():
            named += predictions.predicted if part.startswith(ADVISED) else ()
        return [token for token in dict.fromkeys(named) if token not in ("class", "total", AVERAGE)]


def group_of(part: str) -> tuple[str, int | None]:
    """A part's group and its seed: students/advised-3 is ('students/advised', 3); teachers have no seed."""
    stem, dash, seed = part.rpartition("-")
    return (stem, int(seed)) if part.startswith("students/") and dash and seed.isdecimal() else (part, None)


def rank(part: str) -> tuple[int, int]:
    """The sort key of a part: teachers, students alone, co-advised students; by seed within each."""
    group, seed = group_of(part)
    place = 0 if group.startswith("teachers/") else {ALONE: 1, ADVISED: 2}.get(group, 3)
    return place, seed if seed is not None else -1


def read_run(path: Path) -> Run:
    """Reads what is there. Raises ValueError only if `path` is not a directory."""
    if not path.is_dir():
        raise ValueError(f"{path} is not a directory; give a run directory, as `coadvise fit` writes one")
    faults: list[str] = []
    config = _text(path / "config.yaml", faults)
    text = _text(path / "data.json", faults)
    data: Record = {}
    if text is not None:
        try:
            data = mapping(json.loads(text))
        except ValueError as error:
            faults.append(f"data.json could not be read: {error}")
    predictions = {}
    for file in sorted((path / "predictions").glob("*.safetensors")):
        try:
            predictions[file.stem.replace(".", "/", 1)] = Predictions.read(file)
        except (OSError, ValueError, SafetensorError) as error:
            faults.append(f"predictions/{file.name} could not be read: {error}")
    return Run(path, config, data, _records(path / "metrics.jsonl", faults), predictions, tuple(faults))


def _text(path: Path, faults: list[str]) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        faults.append(f"{path.name} is missing")
        return None


def _records(path: Path, faults: list[str]) -> tuple[Record, ...]:
    """The records of metrics.jsonl. An incomplete last line is ignored: an interruption leaves one."""
    lines = (_text(path, faults) or "").split("\n")
    records = []
    for place, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError:
            if line.strip() and place < len(lines):
                faults.append(f"metrics.jsonl, line {place}: not a JSON object")
            continue
        if isinstance(record, dict):
            records.append(record)
    return tuple(records)
