"""A step with anything not finite is skipped and named; too many of them end the run."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import records
from torch import Tensor, nn

from coadvise.config.schema import EngineConfig
from coadvise.errors import UserError
from coadvise.training.engine import Engine
from coadvise.training.metrics import Recorder, read_records
from coadvise.training.nonfinite import IN_A_ROW, NonFiniteGuard

NAN, INF = float("nan"), float("inf")
FINE = {"total": 1.0, "class": 1.0, "conv": 1.0}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)


class Loop:
    """Trains a few numbers; a step's images, losses, teacher's logits or gradient can be poisoned."""

    def __init__(self, folder: Path) -> None:
        self.said: list[str] = []
        self.model, self.record = network(), Recorder(folder, True, self.said.append)
        self.optimiser = adam(self.model)
        self.guard = NonFiniteGuard("part", self.model, self.optimiser, Engine(EngineConfig(device="cpu")), self.record)
        self.done = 0

    def step(self, images: float = 1.0, logits: float = 0.0, gradient: float = 1.0, **losses: float) -> None:
        self.done += 1
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(self.done)) * images
        self.model(x).square().mean().backward()
        given = {name: torch.tensor(value) for name, value in {**FINE, **losses}.items()}
        self.guard.observe({"conv": torch.full((2, 2), logits)}, given, 1)
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        self.guard.decide(self.done, norm * gradient)
        self.optimiser.step()
        self.optimiser.zero_grad()

    def all(self) -> dict[str, Tensor]:
        """Weights, batch norm's statistics and the optimiser's averages and steps."""
        state = {f"{n}.{k}": v for n, s in self.optimiser.state_dict()["state"].items() for k, v in s.items()}
        tensors = {**self.model.state_dict(), **state}
        return {name: value.clone() for name, value in tensors.items() if "num_batches_tracked" not in name}


POISONS: dict[str, tuple[dict[str, float], list[str]]] = {
    "a teacher's logit": ({"logits": NAN}, ["conv teacher's logits"]),
    "an infinite logit": ({"logits": -INF}, ["conv teacher's logits"]),
    "a loss": ({"conv": NAN, "total": NAN}, ["total loss", "conv loss"]),
    "an infinite loss": ({"class": INF}, ["class loss"]),
    "the gradient": ({"gradient": INF}, ["gradient"]),
    "images": ({"images": NAN}, ["gradient"]),
}


@pytest.mark.parametrize("poison", POISONS)
def test_a_poisoned_step_changes_nothing_and_is_named(poison: str, tmp_path: Path) -> None:
    loop, (values, terms) = Loop(tmp_path), POISONS[poison]
    loop.step()
    before = loop.all()
    loop.step(**values)
    after = loop.all()
    assert [name for name in before if not torch.equal(after[name], before[name])] == []
    loop.step()
    later = loop.all()
    assert [name for name in before if torch.equal(later[name], before[name])] == []
    assert all(value.isfinite().all() for value in later.values())
    loop.guard.report()
    assert records(tmp_path) == [{"kind": "skipped", "part": "part", "step": 2, "terms": terms}]
    assert loop.said == [f"part: step 2 skipped, not finite: {', '.join(terms)}"]


def test_a_fault_of_any_micro_batch_is_the_step_s(tmp_path: Path) -> None:
    loop, fine = Loop(tmp_path), {name: torch.tensor(value) for name, value in FINE.items()}
    for logits in (-INF, 0.0):  # which may leave the loss finite
        loop.guard.observe({"conv": torch.full((2, 2), logits)}, fine, 2)
    loop.guard.decide(1, torch.tensor(1.0))
    loop.guard.report()
    assert [r["terms"] for r in records(tmp_path, "skipped")] == [["conv teacher's logits"]]


@given(st.lists(st.booleans(), min_size=1, max_size=45), st.integers(0, 45))
def test_reports_are_as_if_every_step_were_looked_at(
    tmp_path_factory: pytest.TempPathFactory, faults: list[bool], resumed_at: int
) -> None:
    """Also if training goes on from a checkpoint in between."""
    folder = tmp_path_factory.mktemp("run")
    row, ended_at, skipped = 0, 0, []
    for step, fault in enumerate(faults, 1):
        row = row + 1 if fault else 0
        skipped += [step] if fault else []
        if row == IN_A_ROW:
            ended_at = step
            break
    loop, message, means = Loop(folder), "", {}
    try:
        for step, fault in enumerate(faults, 1):
            loop.step(total=NAN if fault else float(step))
            if step == resumed_at:
                loop.guard.report()
                resumed = Loop(folder)
                resumed.done = step
                resumed.guard.load_state_dict(loop.guard.state_dict())
                loop = resumed
        means = loop.guard.mean_losses(len(faults), len(faults))
    except UserError as error:
        message = str(error)
    assert [r["step"] for r in read_records(folder)] == skipped
    if ended_at or all(faults):
        assert (
            f"step {ended_at}, {IN_A_ROW} steps in a row" if ended_at else f"step {len(faults)}, a whole ep"
        ) in message
        assert "lower learning_rate or set clip" in message
    else:
        fine = [step for step, fault in enumerate(faults, 1) if not fault]
        assert message == ""
        assert means["total"] == pytest.approx(sum(fine) / len(fine))
        assert loop.guard.state_dict() == {"sums": {}, "skipped": 0, "in_a_row": row}


def test_a_poisoned_first_step_after_a_checkpoint_leaves_its_buffers_as_they_were(tmp_path: Path) -> None:
    first, again = Loop(tmp_path), Loop(tmp_path)
    for _ in range(3):
        first.step()
    again.model.load_state_dict(first.model.state_dict())
    again.guard.load_state_dict(first.guard.state_dict())
    before = {name: value.clone() for name, value in again.model.state_dict().items() if "running" in name}
    again.step(logits=NAN)
    assert all(torch.equal(again.model.state_dict()[name], value) for name, value in before.items())
