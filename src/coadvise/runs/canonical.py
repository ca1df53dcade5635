"""What of a configuration decides the numbers of one network: equal canonical configurations give equal networks."""

from typing import Any

from coadvise.advice import CLASS
from coadvise.config.schema import RunConfig, StudentConfig, TeacherConfig
from coadvise.runs.plan import ALONE, TEACHER

# Every field of a teacher counts, but for two cases. Its advice has no effect on its own network:
ADVICE_FIELDS = frozenset({"token", "weight", "temperature", "hard"})
# and where the fingerprint of its weights is compared, how these came about has no effect on its student:
NETWORK_FIELDS = frozenset({"model", "model_kwargs", "recipe", "augment", "start", "adapt", "finetune"})

# Stand-ins for networks that are never built: a teacher's student, and the teachers of a student alone.
NO_STUDENT, _NO_TEACHER = StudentConfig(model="cit_micro_patch4_32"), TeacherConfig(model="resnet_small")


def strip_advice(teacher: TeacherConfig) -> TeacherConfig:
    """A teacher's configuration with default advice."""
    defaults = {name: field.default for name, field in TeacherConfig.model_fields.items() if name in ADVICE_FIELDS}
    return teacher.model_copy(update=defaults)


def advice_of(teacher: dict[str, Any], fingerprint: object) -> dict[str, Any]:
    """A teacher's configuration, as plain values, with the fingerprint of its weights in place of its network."""
    return {"network": fingerprint, **{key: teacher[key] for key in teacher if key not in NETWORK_FIELDS}}


def canonical_config(config: RunConfig, role: str, teacher: str = "") -> RunConfig:
    """Resets everything that has no effect on the numbers of one network.

    Args:
        role: the network's role (`plan.TEACHER`, `ADVISED` or `ALONE`). An advised student depends on everything.
        teacher: the name of the teacher, if it is one.

    Returns:
        A configuration that trains the same network, given the same images and seed, and for an advised student the
        same teachers.
    """
    if role == TEACHER:
        own = strip_advice(config.teachers[teacher])
        augment = own.augment or config.augment
        own = own.model_copy(update={"augment": augment})
        same = {"teachers": {teacher: own}, "student": NO_STUDENT, "augment": augment, "cache": None}
        return config.model_copy(update=same)
    if role == ALONE:  # teachers decide which tokens it has
        advice = config.loss_weights.advice
        tokens = {n: _NO_TEACHER.model_copy(update={"token": _token(n, a.tokens(n))}) for n, a in advice.items()}
        only_term = {"weight": 1.0, "combine": "sum", "standardise": False}
        student = config.student.model_copy(update=only_term)
        return config.model_copy(update={"teachers": tokens, "student": student, "cache": None})
    return config


def _token(name: str, tokens: tuple[str, ...]) -> str | tuple[str, ...] | None:
    """One spelling of `TeacherConfig.token`, without the class token, which every student has."""
    advised = tuple(token for token in tokens if token != CLASS) or (CLASS,)
    if len(advised) > 1:
        return advised
    return None if advised[0] == name else advised[0]
