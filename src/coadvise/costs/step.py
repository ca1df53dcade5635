"""A training step apart from the loop, on real tensors or on PyTorch's fake ones, which have shapes and no numbers."""

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor, nn

from coadvise.config.schema import RecipeConfig
from coadvise.models.network import Network
from coadvise.training.engine import plain_attention
from coadvise.training.optim import average_of, make_optimiser

LAYOUT = torch.channels_last  # the engine's


class TrainingStep:
    """Forward, backward and update of a network, as `training/loop.py` makes them; the loss is a stand-in of one pass.

    Args:
        network: changed in place.
        recipe: how it is trained; None where only its head is, on features that are made without gradients.
        advisers: networks that are asked in every step.
        half: autocast to bfloat16.
        plain: attention is two products and a softmax, as the engine has it in bfloat16 on a CPU.
    """

    def __init__(
        self, network: Network, recipe: RecipeConfig | None, advisers: Sequence[Network] = (), half: bool = False,
        plain: bool = False,
    ) -> None:  # fmt: skip
        self.network, self.recipe, self.advisers, self.half = network, recipe, advisers, half
        for module in (network, *advisers) if plain else ():
            plain_attention(module)
        for adviser in advisers:
            adviser.requires_grad_(False).eval()
        self.optimiser = make_optimiser(network.model, recipe) if recipe else None
        self.averaged = average_of(network, recipe) if recipe else None

    def __call__(self, images: Tensor, micro_batches: int = 1) -> None:
        """One optimiser step on images [B, 3, H, W], taken again for each micro-batch."""
        autocast = torch.autocast(images.device.type, torch.bfloat16, self.half)
        if self.recipe is None or self.optimiser is None:
            with torch.inference_mode(), autocast:
                self.network.eval()(images)
            return
        self.network.train()
        for _ in range(micro_batches):
            with autocast:
                with torch.no_grad():
                    for adviser in self.advisers:
                        adviser(images)
                answers = self.network(images)
                loss = torch.stack([logits.float().logsumexp(-1).mean() for logits in answers.values()]).sum()
            loss.backward()
        self._clip(self.recipe.clip)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        if self.averaged is not None:
            self.averaged.update(self.network, 1)

    def _clip(self, largest: float) -> None:
        """As `training.optim.clip_gradient`, which takes each fake tensor by itself."""
        parameters = list(self.network.parameters())
        if largest:
            torch.nn.utils.clip_grad_norm_(parameters, largest, foreach=True)
        else:
            torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None], foreach=True)

    @property
    def kept(self) -> int:
        """Bytes that stay from step to step: weights, the optimiser's averages of gradients, averaged weights."""
        own = [*self.network.parameters(), *self.network.buffers()]
        others = list(chain.from_iterable([*a.parameters(), *a.buffers()] for a in self.advisers))
        averages = 2 * self.gradients if self.recipe else 0
        return _bytes(own) * (2 if self.averaged is not None else 1) + _bytes(others) + averages

    @property
    def gradients(self) -> int:
        """Bytes of the gradients, which several processes exchange in every step."""
        return _bytes([p for p in self.network.parameters() if p.requires_grad]) if self.recipe else 0

    @property
    def buffers(self) -> int:
        """Bytes of the buffers that rank 0 sends in every forward pass, such as batch norm's statistics."""
        return _bytes([*self.network.buffers()]) if self.recipe else 0


def materialise(network: nn.Module) -> None:
    """Gives a network on the meta device tensors of the mode that is on, in place: fake ones, or uninitialised ones."""
    for module in network.modules():
        for tensors in (module._parameters, module._buffers):
            for name, old in tensors.items():
                if old is None:
                    continue
                layout = LAYOUT if old.ndim == 4 else torch.contiguous_format
                new = torch.empty(old.shape, dtype=old.dtype, device="cpu", memory_format=layout)
                parameter = isinstance(old, nn.Parameter)
                tensors[name] = nn.Parameter(new, old.requires_grad) if parameter else new  # type: ignore[assignment]


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
