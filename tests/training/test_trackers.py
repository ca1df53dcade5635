"""What trackers get of a run, whatever one of them does. The real ones are tried in tests/extras."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from tiny import Stopper, never, records

from coadvise import Interrupted, fit
from coadvise.training import trackers

Calls = list[tuple[Any, ...]]


class Fake:
    """Keeps what it gets; fails where it is told to."""

    def __init__(self, calls: Calls, fails: str, run: Path, config: Mapping[str, Any], identity: str | None) -> None:
        self.calls, self.fails, self.identity = calls, fails, identity or "first"
        self._do("start", config["seed"], identity)

    def _do(self, what: str, *values: Any) -> None:
        if what == self.fails:
            raise ConnectionError(f"no {what}")
        self.calls.append((what, *values))

    def track(self, figures: Mapping[str, float], part: str, step: int | None) -> None:
        self._do("track", dict(figures), part, step)

    def tell(self, name: str, text: str) -> None:
        self._do("tell", name, text)

    def attach(self, paths: Sequence[Path]) -> None:
        self._do("attach", *paths)

    def close(self) -> None:
        self._do("close")


@pytest.fixture
def faked(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Calls]:
    """Puts a fake in the place of a tracker; returns what it will have got."""

    def fake(name: str, fails: str = "") -> Calls:
        calls: Calls = []
        start = lambda run, config, identity: Fake(calls, fails, run, config, identity)  # noqa: E731
        monkeypatch.setitem(trackers._TRACKERS, name, start)
        monkeypatch.setattr(trackers, "find_spec", lambda name: name)
        return calls

    return fake


ALL = "engine.trackers=[wandb, mlflow]"


@pytest.mark.parametrize("jobs", [1, 2])
def test_each_record_comes_once_and_in_order(
    jobs: int, faked: Callable[..., Calls], tiny_images: Path, tiny_preset: str, tmp_path: Path
) -> None:
    calls = faked("wandb")
    faked("mlflow")
    run = fit(tiny_images, tiny_preset, tmp_path / "run", overrides=[ALL], baseline=True, jobs=jobs)
    written = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    wanted = [(dict(trackers._figures(r)), r["part"], r.get("step")) for r in written if "part" in r]
    tracked = [call[1:] for call in calls if call[0] == "track"]
    of_parts = [call for call in tracked if call[1] in {part for _, part, _ in wanted}]
    for part in {part for _, part, _ in wanted}:
        assert [call for call in of_parts if call[1] == part] == [call for call in wanted if call[1] == part]
    train = next(r for r in written if r["kind"] == "train")
    figures = next(figures for figures, part, step in tracked if (part, step) == (train["part"], train["step"]))
    assert figures["losses/total"] == train["losses"]["total"]
    verdict = written[-1]
    assert ("tell", "verdict", verdict["sentence"]) in calls
    assert [call for call in calls if call[0] in ("start", "attach", "close")] == [
        ("start", 0, None), ("attach", run / "report.html", run / "metrics.jsonl"), ("close",),
    ]  # fmt: skip


def test_a_resumed_run_is_the_same_tracked_run(
    faked: Callable[..., Calls], tiny_images: Path, tiny_preset: str, tmp_path: Path
) -> None:
    calls = faked("mlflow")
    stopper = Stopper(lambda part, step: (part, step) == ("teachers/inv", 3))
    options: dict[str, Any] = {"overrides": ["engine.trackers=[mlflow]"], "out": tmp_path / "run"}
    with pytest.raises(Interrupted):
        fit(tiny_images, tiny_preset, listener=stopper, **options)
    assert calls[-1] == ("close",), "what it has is whole"
    run = fit(tiny_images, tiny_preset, **options)
    assert [call[2] for call in calls if call[0] == "start"] == [None, "first"]
    assert json.loads((run / "trackers.json").read_text()) == {"mlflow": "first"}


@pytest.mark.parametrize("fails", ["start", "track", "tell", "attach", "close"])
def test_a_tracker_that_fails_is_named_once_and_stops_nothing(
    fails: str, faked: Callable[..., Calls], tiny_images: Path, tiny_preset: str, finished: Path, tmp_path: Path
) -> None:
    faked("wandb", fails)
    other = faked("mlflow")
    listener = Stopper(never)
    run = fit(tiny_images, tiny_preset, tmp_path / "run", listener, overrides=[ALL], baseline=True)
    said = [line for line in listener.said if "no " + fails in line]
    assert said == [f"wandb: no {fails}; the run goes on without it, and metrics.jsonl has all that it lacks"]
    assert other[-1] == ("close",)
    for kind in ("train", "eval", "result", "verdict"):
        assert records(run, kind) == records(finished, kind)


def test_a_run_of_before_says_tensorboard_in_its_own_way(tmp_path: Path, tiny_preset: str) -> None:
    from coadvise.config.reading import deciding_values, load_config, read_config

    old = tmp_path / "old.yaml"
    text = Path(tiny_preset).read_text().replace("engine: {", "engine: {tensorboard: true, ")
    old.write_text(text)
    assert read_config(old).engine.trackers == ("tensorboard",)
    old.write_text(text.replace("true", "false"))
    assert read_config(old) == load_config(tiny_preset)
    tracked = load_config(tiny_preset, ["engine.trackers=[mlflow]"])
    assert deciding_values(tracked) == deciding_values(load_config(tiny_preset))
