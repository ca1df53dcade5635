import pytest
import torch

from coadvise.config.schema import EngineConfig
from coadvise.evaluation.speed import images_per_second
from coadvise.training.engine import Engine


class Sleeper(torch.nn.Module):
    """Takes a given time on a clock of the test's own."""

    def __init__(self, clock: list[float], *seconds: float) -> None:
        super().__init__()
        self.clock, self.seconds, self.calls = clock, seconds, []

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        self.clock[0] += self.seconds[len(self.calls) % len(self.seconds)]
        self.calls.append((tuple(images.shape), torch.is_grad_enabled(), self.clock[0]))
        return {"class": images}


def test_it_is_the_median_of_interleaved_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    fast, slow = Sleeper(clock, 9.0, 0.5, 0.5, 7.0, 0.5, 0.5), Sleeper(clock, 2.0)
    engine = Engine(EngineConfig(device="cpu"))
    speeds = images_per_second({"fast": fast, "slow": slow}, 8, engine, 10, repeats=5, enough_seconds=100)
    assert speeds == {"fast": 20.0, "slow": 5.0}, "neither the warm-up nor one slow moment counts"
    assert {call[:2] for call in fast.calls + slow.calls} == {((10, 3, 8, 8), False)}
    order = sorted([(when, "fast") for *_, when in fast.calls] + [(when, "slow") for *_, when in slow.calls])
    assert [name for _, name in order] == ["fast", "slow"] * 6
    for enough_seconds, calls in ((0, 2), (11, 3), (100, 16)):  # slow networks are timed less often
        slow = Sleeper(clock, 4.0)
        assert images_per_second({"slow": slow}, 8, engine, 10, enough_seconds=enough_seconds) == {"slow": 2.5}
        assert len(slow.calls) == calls
