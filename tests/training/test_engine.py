"""The engine: nothing changes before it is entered, precision stays where it belongs, signals ask for a stop."""

import logging
import os
import signal
import threading

import pytest
import torch

from coadvise.config.schema import EngineConfig, ModelConfig, RecipeConfig
from coadvise.data.views import Batch
from coadvise.errors import UserError
from coadvise.models.network import build_network
from coadvise.training.engine import Engine, for_this_machine, resolve_precision
from coadvise.training.optim import make_optimiser


def cpu(**more: object) -> Engine:
    return Engine(EngineConfig.model_validate({"device": "cpu", **more}))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(UserError, match=r"engine.device=cuda, but PyTorch sees no CUDA device"):
        Engine(EngineConfig(device="cuda"))
    assert Engine(EngineConfig(device="auto")).device.type == "cpu"


def settings() -> dict[str, object]:
    """What an engine may change in its process."""
    signals = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    return {
        "environment": dict(os.environ),
        "algorithms": torch.are_deterministic_algorithms_enabled(),
        "benchmark": torch.backends.cudnn.benchmark,
        "logging": logging.getLogger("lightning_fabric").level,
        "threads": torch.get_num_threads(),
        "signals": signals,
    }


def test_building_an_engine_changes_nothing_and_leaving_it_restores_what_entering_changed(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("coadvise.training.engine.keep_freed_memory", lambda: kept.append(True))
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    before, kept = settings(), list[bool]()
    engine = cpu(precision="bfloat16", deterministic=True)
    engine._deterministic = True  # as on CUDA, the only device that this is asked of
    assert settings() == before
    assert not kept
    with engine:
        assert kept == [True]
        inside = settings()
        changed = {name for name in before if inside[name] != before[name]}
        assert changed == {"environment", "algorithms", "benchmark", "logging"}
    assert settings() == before
    with cpu(deterministic=True):  # a CPU's algorithms always give the same bits
        assert not torch.are_deterministic_algorithms_enabled()
    assert capfd.readouterr() == ("", ""), "lightning-fabric announces nothing"


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_precision_is_of_the_forward_pass_alone(precision: str) -> None:
    engine = cpu(precision=precision)
    student = ModelConfig(model="cit_micro_patch4_32", model_kwargs={"embed_dim": 24, "depth": 1})
    network = build_network(student, ("a", "b"), 16, seed=0, tokens=("conv",))
    inside: list[torch.dtype] = []
    network.model.blocks[0].mlp.fc1.register_forward_hook(lambda module, args, out: inside.append(out.dtype))
    model, optimiser = engine.setup(network, make_optimiser(network.model, RecipeConfig()))
    batch = engine.place(Batch(torch.rand(2, 3, 16, 16), torch.zeros(2, dtype=torch.int64), torch.arange(2), 0))
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    logits = model(batch.images)
    assert inside == [getattr(torch, precision)]
    engine.backward(sum(value.sum() for value in logits.values()))
    optimiser.step()
    state = [v for s in optimiser.state_dict()["state"].values() for v in s.values()]
    assert {value.dtype for value in (*logits.values(), *network.parameters(), *state)} == {torch.float32}


@pytest.mark.parametrize(("native", "precision"), [(True, "bfloat16"), (False, "float32")])
def test_auto_is_bfloat16_where_the_processor_has_it(
    native: bool, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coadvise.training.engine._cpu_has_bfloat16", lambda: native)
    config = EngineConfig(device="cpu", precision="auto")
    assert resolve_precision(config).precision == precision
    assert Engine(config).half_precision == native


def test_networks_trained_on_a_device_that_is_not_there_run_on_one_that_is(monkeypatch: pytest.MonkeyPatch) -> None:
    trained = EngineConfig(device="cuda", precision="bfloat16")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert Engine(for_this_machine(trained)).device.type == "cpu"
    assert for_this_machine(trained).precision == "auto"
    by_default = EngineConfig(device="auto", precision="bfloat16")  # what a run by `auto` on a GPU keeps
    assert for_this_machine(by_default).precision == "auto"
    exact = EngineConfig(device="cpu", precision="float32")
    assert for_this_machine(exact).precision == "float32"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert for_this_machine(trained) == trained


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2"])
def test_a_signal_asks_for_a_stop(name: str) -> None:
    engine, number = cpu(), getattr(signal, name)
    before = signal.getsignal(number)
    with engine.graceful_shutdown():
        assert not engine.stop_requested
        os.kill(os.getpid(), number)
        assert engine.stop_requested
    assert signal.getsignal(number) is before


def test_in_another_thread_signals_are_left_alone() -> None:
    seen, before = list[object](), signal.getsignal(signal.SIGTERM)

    def work() -> None:
        with cpu().graceful_shutdown():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]
