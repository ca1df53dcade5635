"""Which teacher advises which token of the student, and how strongly: λ and τ of Eq. (1) of the paper."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from coadvise.errors import UserError

CLASS = "class"  # the class token in every dict of logits
AVERAGE = "average"  # the mean of all tokens' probabilities, `average_probabilities`


@dataclass(frozen=True)
class Advice:
    """How one teacher advises.

    Attributes:
        weight: λ_k of Eq. (1).
        temperature: τ_k of Eq. (1).
        token: the student's token it advises, which may be "class", or several, each with λ_k and τ_k; "" is the token
            of the teacher's name.
        hard: cross-entropy against the teacher's most likely class (DeiT's hard distillation) in place of the KL term.
    """

    weight: float = 1.0
    temperature: float = 1.0
    token: str | tuple[str, ...] = ""
    hard: bool = False

    def tokens(self, name: str) -> tuple[str, ...]:
        """The tokens that a teacher of this name advises."""
        return (self.token or name,) if isinstance(self.token, str) else self.token


@dataclass(frozen=True)
class LossWeights:
    """λ_0 on the cross-entropy against the labels, and how each teacher advises.

    Attributes:
        label: λ_0.
        advice: one `Advice` per teacher, by the teacher's name.
        mean: teachers that share a token advise it by the mean of their probabilities, not by a term each. With equal λ
            the gradient of n terms is n times that of the mean, so this acts like a smaller λ.
        label_tokens: the tokens that learn from the labels, "class" among them. Labels are the third kind of teacher of
            section 3.2.
        standardise: the KL terms compare logits of mean 0 and deviation 1 over the classes, the student's and the
            teachers' (Sun et al. 2024).

    Raises:
        ValueError: teachers that advise by their mean have different temperatures, or are hard; or hard advice is to be
            standardised.
    """

    label: float = 1.0
    advice: Mapping[str, Advice] = field(default_factory=dict)
    mean: bool = False
    label_tokens: tuple[str, ...] = (CLASS,)
    standardise: bool = False

    def __post_init__(self) -> None:
        if self.standardise and (hard := [name for name, advice in self.advice.items() if advice.hard]):
            raise ValueError(
                f"hard advice has no logits to standardise (teacher {', '.join(hard)}); give hard=false, or leave out "
                "student.standardise"
            )
        for token, names in self.by_token.items() if self.mean else ():
            together = [self.advice[name] for name in names]
            if len(names) > 1 and (len({a.temperature for a in together}) > 1 or any(a.hard for a in together)):
                raise ValueError(
                    f"the teachers {', '.join(names)} advise token '{token}' by their mean, which needs soft advice at "
                    "one temperature; give them the same temperature and hard=false, or let them advise by the sum"
                )

    @property
    def by_token(self) -> dict[str, list[str]]:
        """The teachers of each advised token, in order."""
        teachers: dict[str, list[str]] = {}
        for name, advice in self.advice.items():
            for token in advice.tokens(name):
                teachers.setdefault(token, []).append(name)
        return teachers

    @property
    def trained_tokens(self) -> tuple[str, ...]:
        """The tokens whose logits are trained: "class", and each that labels or a teacher with λ > 0 advise."""
        labelled = self.label_tokens if self.label > 0 else ()
        return (CLASS, *(token for token in self.tokens if token in labelled or self._advised(token)))

    @property
    def tokens(self) -> tuple[str, ...]:
        """The tokens besides "class": those of teachers in the teachers' order, then those of labels alone."""
        return tuple(token for token in dict.fromkeys([*self.by_token, *self.label_tokens]) if token != CLASS)

    @property
    def without_advice(self) -> "LossWeights":
        """What trains the same student alone: the labels."""
        return LossWeights(label_tokens=self.label_tokens)

    def _advised(self, token: str) -> bool:
        return any(self.advice[name].weight > 0 for name in self.by_token.get(token, ()))

    @property
    def trains_class(self) -> bool:
        """Whether labels or a teacher train the class token."""
        return self.label > 0 or self._advised(CLASS)


def check_names(token_names: Sequence[str]) -> tuple[str, ...]:
    """Token names as a tuple.

    Raises:
        UserError: a repeated name, the class token's, or one that is not a lower-case identifier.
    """
    names = (token_names,) if isinstance(token_names, str) else tuple(token_names)
    if bad := [name for name in names if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or name == CLASS]:
        raise UserError(
            f"token names {bad} are not allowed: use lower-case letters, digits and _, and not {CLASS!r}, which is the "
            "class token's"
        )
    if len(set(names)) < len(names):
        raise UserError(f"token names {names} repeat a name; give each once")
    return names
