"""Steps with NaN or infinity: all processes skip them, and the record names them."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from coadvise.errors import UserError
from coadvise.training.engine import Engine
from coadvise.training.metrics import Recorder

READ_EVERY = 16  # steps between reports; a skipped step changes nothing, so its report may come late
IN_A_ROW = 10  # skipped steps that end the run


class NonFiniteGuard:
    """Makes the optimiser skip a step in which anything is not finite, and averages an epoch's losses over the others.

    The decision is made on the device, by `found_inf`, which PyTorch's fused optimisers know from loss scaling, so
    training does not wait for it. A skipped step leaves the weights, the optimiser's state and floating-point buffers
    (batch norm's statistics) as they were.

    Args:
        part: the network's name in the record.
        optimiser: a fused one of PyTorch, not wrapped.
    """

    def __init__(
        self, part: str, network: nn.Module, optimiser: torch.optim.Optimizer, engine: Engine, record: Recorder
    ) -> None:
        self.part, self.engine, self.record = part, engine, record
        self.sums: dict[str, Tensor] = {}  # of the epoch's losses, without skipped steps
        self.skipped, self.in_a_row = 0, 0  # steps: in this epoch, and without a finite one since
        self._finite: dict[str, Tensor] = {}  # of this step: term -> whether it is finite
        self._losses: dict[str, Tensor] = {}  # of this step
        self._unread: list[tuple[int, Tensor]] = []
        self._skip = torch.zeros((), device=engine.device)
        optimiser.grad_scale, optimiser.found_inf = None, self._skip  # type: ignore[attr-defined]
        self._buffers = [buffer for buffer in network.buffers() if buffer.is_floating_point()]
        self._buffers_before = self._flat_buffers()

    def observe(self, advice: Mapping[str, Tensor], losses: Mapping[str, Tensor], micro_batches: int) -> None:
        """Notes the teachers' logits and the losses of one of the step's micro-batches."""
        for teacher, logits in advice.items():
            self._note(f"{teacher} teacher's logits", logits)
        for name, value in losses.items():
            self._note(f"{name} loss", value)
            self._losses[name] = self._losses.get(name, torch.zeros_like(value)) + value.detach() / micro_batches

    def decide(self, step: int, gradient: Tensor) -> None:
        """Decides whether the optimiser takes the step, by what was observed and the gradient's norm.

        An infinite norm of finite gradients counts as infinite.

        Args:
            step: counted from 1.
        """
        self._note("gradient", gradient)
        faults = self.engine.any_rank_on_device(~torch.stack(list(self._finite.values())))
        skip = faults.any()
        self._skip.copy_(skip)
        for name, value in self._losses.items():
            self.sums[name] = self.sums.get(name, torch.zeros_like(value)) + value.masked_fill(skip, 0.0)
        if self._buffers:
            self._buffers_before = torch.where(skip, self._buffers_before, self._flat_buffers())
            parts = self._buffers_before.split([buffer.numel() for buffer in self._buffers])
            for buffer, before in zip(self._buffers, parts, strict=True):
                buffer.copy_(before.view_as(buffer))
        self._unread.append((step, faults))
        self._names = tuple(self._finite)
        self._finite.clear()
        self._losses.clear()
        if len(self._unread) >= READ_EVERY:
            self.report()

    def report(self) -> None:
        """Records the steps skipped since the last report. This waits for the device, as does `mean_losses`.

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
                raise self._diverged(step, f"{IN_A_ROW} steps in a row", terms)

    def mean_losses(self, steps: int, step: int) -> dict[str, float]:
        """Ends an epoch of `steps` steps. Returns its mean losses over all processes.

        Raises:
            UserError: every step was skipped, or too many in a row.
        """
        self.report()
        if self.skipped == steps:
            raise self._diverged(step, "a whole epoch", list(self.sums))
        means = self.engine.mean(torch.stack(list(self.sums.values())) / (steps - self.skipped)).tolist()
        losses = dict(zip(self.sums, means, strict=True))
        self.sums.clear()
        self.skipped = 0
        return losses

    def state_dict(self) -> dict[str, Any]:
        return {"sums": dict(self.sums), "skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores `state_dict`'s values, after the network's own."""
        self.sums.update({name: value.to(self.engine.device) for name, value in state["sums"].items()})
        self.skipped, self.in_a_row = state.get("skipped", 0), state.get("in_a_row", 0)  # format 1 had neither
        self._buffers_before = self._flat_buffers()

    def _note(self, term: str, values: Tensor) -> None:
        finite = torch.isfinite(values.detach()).all()
        self._finite[term] = self._finite[term] & finite if term in self._finite else finite

    def _flat_buffers(self) -> Tensor:
        return torch.cat([buffer.flatten() for buffer in self._buffers]) if self._buffers else torch.zeros(0)

    def _diverged(self, step: int, lasting: str, terms: list[str]) -> UserError:
        return UserError(
            f"{self.part}: the loss is no longer finite: up to step {step}, {lasting} skipped because of "
            f"{', '.join(terms)}; lower learning_rate or set clip, and go on from the last checkpoint with "
            "--allow-changes, or start again"
        )
