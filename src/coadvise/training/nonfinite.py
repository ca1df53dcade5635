"""Numbers that are no longer finite: their step is skipped on all processes alike, and named."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from coadvise.errors import UserError
from coadvise.training.engine import Engine
from coadvise.training.metrics import Recorder

READ_EVERY = 16  # steps between two looks at the device; a skipped step changes nothing, so hearing of it may wait
IN_A_ROW = 10  # skipped steps that end the run


class Watch:
    """Sums an epoch's losses, and keeps the optimiser from a step in which anything is not finite.

    Whether to skip is decided on the device (`found_inf`, which PyTorch's fused optimisers know from loss scaling), so
    training does not wait for the answer. A skipped step leaves weights, the optimiser's state and batch norm's running
    figures as they were.

    Args:
        part: the network's name in the record.
        optimiser: a fused one of PyTorch, not wrapped.
    """

    def __init__(
        self, part: str, network: nn.Module, optimiser: torch.optim.Optimizer, engine: Engine, record: Recorder
    ) -> None:
        self.part, self.engine, self.record = part, engine, record
        self.sums: dict[str, Tensor] = {}  # of the losses since the epoch began, without those of skipped steps
        self.skipped, self.in_a_row = 0, 0  # steps: of this epoch, and lately
        self._finite: dict[str, Tensor] = {}  # of this step: term -> whether all of it is
        self._losses: dict[str, Tensor] = {}  # of this step
        self._unread: list[tuple[int, Tensor]] = []
        self._skip = torch.zeros((), device=engine.device)
        optimiser.grad_scale, optimiser.found_inf = None, self._skip  # type: ignore[attr-defined]
        norms = [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        self._running = [b for module in norms for b in module.buffers() if b.is_floating_point()]
        self._running_before = self._flat()

    def see(self, advice: Mapping[str, Tensor], losses: Mapping[str, Tensor], micro_batches: int) -> None:
        """Takes the teachers' logits and the losses of one of the step's micro-batches."""
        for teacher, logits in advice.items():
            self._note(f"{teacher} teacher's logits", logits)
        for name, value in losses.items():
            self._note(f"{name} loss", value)
            self._losses[name] = self._losses.get(name, torch.zeros_like(value)) + value.detach() / micro_batches

    def judge(self, step: int, gradient: Tensor) -> None:
        """Decides whether the optimiser takes the step (counted from 1): by all that was seen and the gradient's norm.

        An infinite norm of finite gradients counts as infinite.
        """
        self._note("gradient", gradient)
        faults = self.engine.anywhere(~torch.stack(list(self._finite.values())))
        skip = faults.any()
        self._skip.copy_(skip)
        for name, value in self._losses.items():
            self.sums[name] = self.sums.get(name, torch.zeros_like(value)) + value.masked_fill(skip, 0.0)
        if self._running:
            self._running_before = torch.where(skip, self._running_before, self._flat())
            parts = self._running_before.split([b.numel() for b in self._running])
            torch._foreach_copy_(self._running, [p.view_as(b) for p, b in zip(parts, self._running, strict=True)])
        self._unread.append((step, faults))
        self._names = tuple(self._finite)
        self._finite.clear()
        self._losses.clear()
        if len(self._unread) >= READ_EVERY:
            self.read()

    def read(self) -> None:
        """Names the steps skipped since the last call. Training waits for the device here, and in `mean_losses`.

        Raises:
            UserError: too many in a row.
        """
        if not self._unread:
            return
        rows = torch.stack([faults for _, faults in self._unread]).tolist()
        steps = [step for step, _ in self._unread]
        self._unread.clear()
        for step, row in zip(steps, rows, strict=True):
            terms = [name for name, fault in zip(self._names, row, strict=True) if fault]
            self.in_a_row = self.in_a_row + 1 if terms else 0
            if terms:
                self.skipped += 1
                self.record.add("skipped", part=self.part, step=step, terms=terms)
                self.record.say(f"{self.part}: step {step} skipped, not finite: {', '.join(terms)}")
            if self.in_a_row >= IN_A_ROW:
                raise self._ended(step, f"{IN_A_ROW} steps in a row", terms)

    def mean_losses(self, steps: int, step: int) -> dict[str, float]:
        """The mean losses of an epoch of `steps` steps over all processes; the next one begins.

        Raises:
            UserError: every one of its steps was skipped.
        """
        self.read()
        if self.skipped == steps:
            raise self._ended(step, "a whole epoch", list(self.sums))
        means = self.engine.mean(torch.stack(list(self.sums.values())) / (steps - self.skipped)).tolist()
        losses = dict(zip(self.sums, means, strict=True))
        self.sums.clear()
        self.skipped = 0
        return losses

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"sums": dict(self.sums), "skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.sums.update({name: value.to(self.engine.device) for name, value in state["sums"].items()})
        self.skipped, self.in_a_row = state.get("skipped", 0), state.get("in_a_row", 0)  # format 1 had neither
        self._running_before = self._flat()  # the checkpoint's, which the network has by now

    def _note(self, term: str, values: Tensor) -> None:
        finite = torch.isfinite(values.detach()).all()
        self._finite[term] = self._finite[term] & finite if term in self._finite else finite

    def _flat(self) -> Tensor:
        return torch.cat([b.flatten() for b in self._running]) if self._running else torch.zeros(0)

    def _ended(self, step: int, lasting: str, terms: list[str]) -> UserError:
        return UserError(
            f"{self.part}: the loss is no longer finite: up to step {step} {lasting} skipped for {', '.join(terms)}; "
            "lower learning_rate or set clip, and go on from the last checkpoint with --allow-changes, or start anew"
        )
