"""What was found in some data, as plain values, as lines and as three sentences."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from coadvise.data.balance import unbalanced
from coadvise.data.sources import few
from coadvise.inspection.duplicates import Group
from coadvise.inspection.pictures import Header, Pictures, Place
from coadvise.inspection.suspects import Doubts

OBLONG = 2  # longer side over shorter, from which a centre crop leaves out half of the picture
_LATER = {"train": 0, "val": 1, "test": 2}  # a picture of a later split must not be in an earlier one

# What `--write` can leave out, and what the user reads. The first three are left out if nothing else is said.
KINDS = {
    "unreadable": "files that cannot be read",
    "duplicates": "further copies of a file, byte for byte",
    "two-labels": "identical files under two labels",
    "near": "resized or recompressed copies",
    "suspects": "training images whose labels are probably wrong",
}
USUALLY = ("unreadable", "duplicates", "two-labels")


@dataclass(frozen=True, eq=False)
class Findings:
    """All that `check` knows of some data.

    Attributes:
        exact, near: groups of pictures that are the same byte for byte, or that look the same.
        predictor: the predictions that the labels were judged by, in words.
        remark: how these are made, and what they are worth, in sentences.
    """

    pictures: Pictures
    exact: tuple[Group, ...]
    near: tuple[Group, ...]
    doubts: Doubts
    predictor: str
    remark: str

    @property
    def classes(self) -> tuple[str, ...]:
        return self.pictures.source.classes

    @property
    def places(self) -> tuple[Place, ...]:
        return self.pictures.places

    def label(self, number: int) -> str:
        return self.classes[self.places[number].label]

    @cached_property
    def two_labels(self) -> tuple[Group, ...]:
        """Identical files that stand in several classes."""
        return tuple(group for group in self.exact if self.labels_differ(group))

    def labels_differ(self, group: Group) -> bool:
        return len({self.places[number].label for number in group}) > 1

    def across_splits(self, group: Group) -> bool:
        return len({self.places[number].split for number in group}) > 1

    def scored_copies(self, groups: Sequence[Group]) -> list[int]:
        """Pictures that are in an earlier split too: scored ones that are trained on, test ones that are in val."""
        return [
            number
            for group in groups
            for number in group
            if _LATER[self.places[number].split] > min(_LATER[self.places[other].split] for other in group)
        ]

    def per_class(self, split: str) -> list[int]:
        """How many readable pictures each class has."""
        labels = [place.label for place in self.places if place.split == split]
        return np.bincount(labels, minlength=len(self.classes)).tolist()

    def suggested(self, number: int) -> str:
        """The class that the predictions prefer to the label."""
        return self.classes[int(self.doubts.probabilities[number].argmax())]

    def reason(self, number: int) -> str:
        """Why a label is doubted, in a sentence."""
        shares = self.doubts.probabilities[number]
        return (
            f"labelled '{self.label(number)}', which gets {shares[self.places[number].label]:.1%}; predicted "
            f"'{self.suggested(number)}' with {shares.max():.0%}"
        )

    # ---- what to leave out ----

    def left_out(self, kinds: Sequence[str]) -> dict[str, set[tuple[str, int]]]:
        """Split and row of what each kind of `KINDS` leaves out, beyond the kinds before it."""
        gone: set[tuple[str, int]] = set()
        found = {}
        for kind in KINDS:
            if kind in kinds:
                found[kind] = {(place.split, place.row) for place in self._of_kind(kind)} - gone
                gone |= found[kind]
        return found

    def _of_kind(self, kind: str) -> list[Place]:
        if kind == "unreadable":
            return [place for place, _ in self.pictures.unreadable]
        if kind == "suspects":
            return [p for p in (self.places[number] for number in self.doubts.suspects) if p.split == "train"]
        if kind == "two-labels":
            return [self.places[number] for group in self.two_labels for number in group]
        groups = self.exact if kind == "duplicates" else self.near
        return [self.places[number] for group in groups for number in group if number != self._kept(group)]

    def _kept(self, group: Group) -> int:
        """Which of several copies stays: a scored one, so that the scores are of what they were of."""
        return max(group, key=lambda number: (_LATER[self.places[number].split], -number))

    # ---- what to say ----

    def sentences(self) -> tuple[str, str, str]:
        """What is likely to go wrong, and what to do: about scores, labels, and classes and files."""
        return self._about_scores(), self._about_labels(), self._about_classes()

    def _about_scores(self) -> str:
        exact = set(self.scored_copies(self.exact))
        near = set(self.scored_copies(self.near)) - exact
        if not exact | near:
            inside = sum(len(group) - 1 for group in self.exact if not self.labels_differ(group))
            more = f", but images count more than once in {_count(inside, 'case')}" if inside else ""
            return f"Scores will be of images that no network was trained on{more}."
        parts = [f"{len(exact)} byte for byte"] * bool(exact) + [f"{len(near)} resized or recompressed"] * bool(near)
        kinds = " --leave-out unreadable,duplicates,two-labels,near" if near else ""
        return (
            f"Scores will be too high, since {_count(len(exact | near), 'scored image')} can be found in an earlier "
            f"split too ({', '.join(parts)}): leave the earlier copies out with --write cleaned.csv{kinds}."
        )

    def _about_labels(self) -> str:
        two, suspects = len(self.two_labels), len(self.doubts.suspects)
        parts = [f"{_count(two, 'image')} under two labels"] * bool(two)
        if suspects:
            parts.append(
                f"{_count(suspects, 'label')} ({suspects / len(self.pictures):.1%}) that {self.predictor} contradict "
                f"most strongly (they agree with {self.doubts.agreement:.0%} of all labels)"
            )
        if not parts:
            return f"No image has two labels, and none has a label that {self.predictor} contradict."
        return (
            f"Networks may learn wrong labels: look through the {' and the '.join(parts)}, and correct those that are "
            "wrong."
        )

    def _about_classes(self) -> str:
        parts = []
        if lost := self.pictures.unreadable:
            parts.append(f"{_count(len(lost), 'file')} cannot be read and will be left out, so restore what you can")
        counts = self.per_class("train")
        if empty := [name for name, count in zip(self.classes, counts, strict=True) if not count]:
            parts.append(f"no image of {few(empty)} can be trained on, so add some or leave the class out")
        elif unbalanced(counts):
            largest, smallest = (self.classes[counts.index(extreme(counts))] for extreme in (max, min))
            parts.append(
                f"'{smallest}' has {_count(min(counts), 'training image')} and '{largest}' {max(counts)}, so rare "
                "classes will be missed unless you set data.balance=loss"
            )
        if oblong := sum(max(header.shape) > OBLONG * min(header.shape) for header in self.pictures.headers):
            parts.append(
                f"the centre crop drops more than half of {_count(oblong, 'long image')} unless you set data.fit=pad"
            )
        if not parts:
            return "All files can be read, and no class is more than three times as large as another."
        text = "; ".join(parts)
        return f"{text[0].upper()}{text[1:]}."

    def lines(self) -> Iterator[str]:
        """The terminal's summary."""
        source = self.pictures.source
        counts = ", ".join(f"{sum(self.per_class(name))} {name}" for name in source.splits)
        yield f"{source.where}: {len(self.pictures)} readable images ({counts}), {len(self.classes)} classes"
        yield from source.remarks
        yield (
            f"{_count(len(self.pictures.unreadable), 'unreadable file')}, "
            f"{_count(len(self.exact), 'group')} of identical files ({len(self.two_labels)} under two labels), "
            f"{_count(len(self.near), 'group')} of near duplicates, "
            f"{_count(len(self.doubts.suspects), 'suspicious label')}"
        )
        yield from (f"{number}. {sentence}" for number, sentence in enumerate(self.sentences(), 1))

    def plain(self) -> dict[str, Any]:
        """Everything, for JSON."""
        headers = self.pictures.headers
        sides = sorted(min(header.shape) for header in headers)
        return {
            "data": self.pictures.source.where,
            "classes": list(self.classes),
            "note": self.pictures.source.note,
            "remarks": list(self.pictures.source.remarks),
            "sentences": list(self.sentences()),
            "splits": {
                name: {"images": sum(counts), "per_class": counts}
                for name in self.pictures.source.splits
                for counts in [self.per_class(name)]
            },
            "unreadable": [{**self._where(place), "reason": reason} for place, reason in self.pictures.unreadable],
            "identical": [self._group(group) for group in self.exact],
            "near": [self._group(group) for group in self.near],
            "two_labels": [self._group(group) for group in self.two_labels],
            "labels_judged_by": {
                "what": self.predictor,
                "agreement": _finite(self.doubts.agreement),
                "remark": self.remark,
            },
            "suspects": [
                {
                    **self._where(self.places[number]),
                    "suggested": self.suggested(number),
                    "probability_of_label": float(self.doubts.probabilities[number][self.places[number].label]),
                    "probability_of_suggested": float(self.doubts.probabilities[number].max()),
                    "reason": self.reason(number),
                }
                for number in self.doubts.suspects
            ],
            "files": {
                "formats": count_by(headers, "format"),
                "modes": count_by(headers, "mode"),
                "bits": count_by(headers, "bits"),
                "shorter_side": {"least": sides[0], "median": sides[len(sides) // 2], "most": sides[-1]},
            },
        }

    def _group(self, group: Group) -> list[dict[str, Any]]:
        return [self._where(self.places[number]) for number in group]

    def _where(self, place: Place) -> dict[str, Any]:
        return {"split": place.split, "name": place.name, "label": self.classes[place.label]}


def count_by(headers: Sequence[Header], what: str) -> dict[str, int]:
    """How many pictures have each value of a header's field, the most frequent first."""
    return dict(Counter(str(getattr(header, what)) for header in headers).most_common())


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None
