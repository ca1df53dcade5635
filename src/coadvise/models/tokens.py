"""What makes a model a student: logits for the labels, and logits of a named token for each teacher."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence

from torch import Tensor, nn

from coadvise.advice import check_names
from coadvise.errors import UserError

PAPER_TOKENS = ("conv", "inv")

# Names become parameter names (head_conv), so they must not be attributes of a module.
_RESERVED = frozenset({"drop", *dir(nn.ModuleDict)})


class TokenModel(ABC):
    """A classifier with named tokens that teachers can advise; a call returns the class token's logits alone.

    Attributes:
        token_names: Names of the tokens, in order, without the class token.
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

    def new_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that published weights do not have: those of the heads, and of what tokens need."""
        return [parameter for head in self.heads().values() for parameter in head.parameters()]

    def train_heads(self, names: Collection[str]) -> None:
        """Freeze all heads but these: the others get no gradient."""
        for name, head in self.heads().items():
            head.requires_grad_(name in names)


def check_token_names(token_names: Sequence[str]) -> tuple[str, ...]:
    """Return token names as a tuple.

    Raises:
        UserError: As `check_names`, or a name that is an attribute of PyTorch's modules.
    """
    names = check_names(token_names)
    if bad := sorted(_RESERVED & set(names)):
        raise UserError(
            f"token names {bad} are not allowed: PyTorch's modules have attributes of these names; choose others"
        )
    return names
