"""Benchmarks, each against a named peer in the same process: `python -m benchmarks NAME [--json FILE]`.

Every module named in `NAMES` has a function `run(setting: Setting) -> Table`; its docstring says what is compared with
what. More tools live here: `networks.py` makes docs/MODELS.md, `same_numbers.py` compares two checkouts bit by bit,
`label_suspects.py` plants faults for `coadvise check` and makes results/label-suspects, `one_token.py` compares
finished runs with timm's distillation; `plan.py`, `ranks.py` and `scale.py` hold `coadvise plan` and docs/SCALE.md to
what is measured, and make results/plan.
"""

import coadvise.torchvision_guard  # noqa: F401  (before a benchmark imports timm)

NAMES = (
    "involution",
    "batch_norm",
    "step",
    "student",
    "export",
    "loader",
    "decode",
    "cache",
    "checkpoint",
    "startup",
    "scan",
    "shards",
)
