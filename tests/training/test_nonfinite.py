"""A step with anything not finite is not taken, on any process; it is named; too many of them end the run."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import records
from torch import Tensor, nn

from coadvise.config import EngineConfig
from coadvise.errors import UserError
from coadvise.training.engine import Engine
from coadvise.training.metrics import Recorder, read_records
from coadvise.training.nonfinite import IN_A_ROW, Watch

NAN, INF = float("nan"), float("inf")
FINE = {"total": 1.0, "class": 1.0, "conv": 1.0}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)


class Loop:
    """A training of a few numbers: any step's images, losses, teacher's logits or gradient can be poisoned."""

    def __init__(self, folder: Path) -> None:
        self.said: list[str] = []
        self.model, self.record = network(), Recorder(folder, True, self.said.append)
        self.optimiser = adam(self.model)
        self.watch = Watch("part", self.model, self.optimiser, Engine(EngineConfig(device="cpu")), self.record)
        self.done = 0

    def step(self, images: float = 1.0, logits: float = 0.0, gradient: float = 1.0, **losses: float) -> None:
        self.done += 1
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(self.done)) * images
        self.model(x).square().mean().backward()
        given = {name: torch.tensor(value) for name, value in {**FINE, **losses}.items()}
        self.watch.see({"conv": torch.full((2, 2), logits)}, given, 1)
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        self.watch.judge(self.done, norm * gradient)
        self.optimiser.step()
        self.optimiser.zero_grad()

    def all(self) -> dict[str, Tensor]:
        """Weights, running figures and the optimiser's averages and steps."""
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
    loop.watch.read()
    assert records(tmp_path) == [{"kind": "skipped", "part": "part", "step": 2, "terms": terms}]
    assert loop.said == [f"part: step 2 skipped, not finite: {', '.join(terms)}"]


def test_a_fault_of_any_micro_batch_is_the_step_s(tmp_path: Path) -> None:
    loop, fine = Loop(tmp_path), {name: torch.tensor(value) for name, value in FINE.items()}
    for logits in (-INF, 0.0):  # which may leave the loss finite
        loop.watch.see({"conv": torch.full((2, 2), logits)}, fine, 2)
    loop.watch.judge(1, torch.tensor(1.0))
    loop.watch.read()
    assert [r["terms"] for r in records(tmp_path, "skipped")] == [["conv teacher's logits"]]


def test_without_poison_it_is_the_optimiser_s_own_training(tmp_path: Path) -> None:
    loop, plain = Loop(tmp_path), network()
    optimiser = adam(plain)
    for step in range(1, 6):
        loop.step()
        plain(torch.randn(8, 3, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        optimiser.step()
        optimiser.zero_grad()
    for name, value in plain.state_dict().items():
        assert torch.equal(loop.model.state_dict()[name], value)


@given(st.lists(st.booleans(), min_size=1, max_size=45), st.integers(0, 45))
def test_it_counts_as_one_who_looks_at_every_step(
    tmp_path_factory: pytest.TempPathFactory, faults: list[bool], taken_up: int
) -> None:
    """Also when the training is taken up again in between."""
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
            if step == taken_up:
                loop.watch.read()
                resumed = Loop(folder)
                resumed.done = step
                resumed.watch.load_state(loop.watch.state())
                loop = resumed
        means = loop.watch.mean_losses(len(faults), len(faults))
    except UserError as error:
        message = str(error)
    assert [r["step"] for r in read_records(folder)] == skipped
    if ended_at or all(faults):
        assert (
            f"step {ended_at} {IN_A_ROW} steps in a row" if ended_at else f"step {len(faults)} a whole ep"
        ) in message
        assert "lower learning_rate or set clip" in message
    else:
        fine = [step for step, fault in enumerate(faults, 1) if not fault]
        assert message == ""
        assert means["total"] == pytest.approx(sum(fine) / len(fine))
        assert loop.watch.state() == {"sums": {}, "skipped": 0, "in_a_row": row}


# Rank 1 alone sees a fault in its step 2; both must skip it, and say the same.
TWO_RANKS = """
import sys, torch
from pathlib import Path
from coadvise.config import EngineConfig
from coadvise.engine import Engine
from coadvise.record import Recorder
from coadvise.watch import Watch
engine = Engine(EngineConfig(device="cpu"))
weight = torch.nn.Parameter(torch.zeros(2))
optimiser = torch.optim.AdamW([weight], lr=0.1, fused=True)
folder = Path(sys.argv[1], str(engine.rank))
folder.mkdir()
watch = Watch("part", torch.nn.Identity(), optimiser, engine, Recorder(folder, True, lambda text: None))
for step in (1, 2, 3):
    weight.grad = torch.ones(2)
    fault = engine.rank == 1 and step == 2
    watch.see({}, {"total": torch.tensor(float("nan") if fault else 1.0)}, 1)
    watch.judge(step, weight.grad.norm())
    optimiser.step()
watch.read()
torch.save([weight.detach(), optimiser.state[weight]["step"]], folder / "end.pt")
"""


def test_what_one_process_sees_all_skip(tmp_path: Path) -> None:
    script = tmp_path / "two.py"
    script.write_text(TWO_RANKS)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run([sys.executable, *launcher, script, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ends: list[Any] = [torch.load(tmp_path / rank / "end.pt") for rank in "01"]
    assert torch.equal(ends[0][0], ends[1][0])
    assert [end[1].item() for end in ends] == [2, 2]
    for rank in "01":
        assert records(tmp_path / rank) == [{"kind": "skipped", "part": "part", "step": 2, "terms": ["total loss"]}]


def test_taken_up_again_a_poisoned_first_step_leaves_the_checkpoint_s_running_figures(tmp_path: Path) -> None:
    first, again = Loop(tmp_path), Loop(tmp_path)
    for _ in range(3):
        first.step()
    again.model.load_state_dict(first.model.state_dict())
    again.watch.load_state(first.watch.state())
    before = {name: value.clone() for name, value in again.model.state_dict().items() if "running" in name}
    again.step(logits=NAN)
    assert all(torch.equal(again.model.state_dict()[name], value) for name, value in before.items())
