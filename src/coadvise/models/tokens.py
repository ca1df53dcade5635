"""What makes a model a student: one answer for the label and one from each named token, for teachers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor, nn

from coadvise.advice import CLASS, check_names
from coadvise.errors import UserError

PAPER_TOKENS = ("conv", "inv")

# Names become parameter names (head_conv), so they may not be what a module has already.
_RESERVED = frozenset({"drop", *dir(nn.ModuleDict)})


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
            head.requires_grad_(name == CLASS)


def check_token_names(token_names: Sequence[str]) -> tuple[str, ...]:
    """Token names as a tuple.

    Raises:
        UserError: as `check_names`, or a name that a module has already.
    """
    names = check_names(token_names)
    if bad := sorted(_RESERVED & set(names)):
        raise UserError(f"token names {bad} are not allowed: they are words that PyTorch's modules use; choose others")
    return names
