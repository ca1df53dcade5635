"""What makes a model a student: one answer for the label and one from each named token, for teachers."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor, nn

from coadvise.errors import UserError

CLASS_TOKEN = "class"
PAPER_TOKENS = ("conv", "inv")

# Names become parameter names (head_conv), so they may not be what a module has already.
_RESERVED = frozenset({CLASS_TOKEN, "drop", *dir(nn.ModuleDict)})


class TokenModel(ABC):
    """A classifier with named tokens, which teachers can advise; called, it gives the class token's answer alone.

    Attributes:
        token_names: Of the tokens beside the class token, in order.
    """

    token_names: tuple[str, ...]

    @abstractmethod
    def heads(self) -> dict[str, nn.Module]:
        """Return every token's head by name, the class token's first."""

    @abstractmethod
    def forward_tokens(self, x: Tensor) -> dict[str, Tensor]:
        """Map images [B, C, H, W] to logits [B, num_classes] by token: ``"class"``, then ``token_names`` in order."""

    @abstractmethod
    def for_inference(self) -> nn.Module:
        """Return a frozen copy that maps images to the class token's logits alone, equal to float error."""

    def freeze_advised_heads(self) -> None:
        """Freeze the heads that only a teacher's advice gives a gradient to, for a student that has no teachers."""
        for name, head in self.heads().items():
            head.requires_grad_(name == CLASS_TOKEN)


def check_token_names(token_names: Sequence[str]) -> tuple[str, ...]:
    """Return the names as a tuple.

    Raises:
        UserError: A name twice, a reserved one, or one that is not a lower-case identifier.
    """
    names = (token_names,) if isinstance(token_names, str) else tuple(token_names)
    bad = [name for name in names if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or name in _RESERVED]
    if bad:
        raise UserError(
            f"token names {bad} are not allowed: use lower-case letters, digits and _, and not a reserved word such as "
            f"{CLASS_TOKEN!r} or 'type'"
        )
    if len(set(names)) < len(names):
        raise UserError(f"token names {names} name one token twice; name each once")
    return names
