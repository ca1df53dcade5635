import os
import signal
import threading

import pytest
import torch
from torch import Tensor

from coadvise.config import EngineConfig, ModelConfig, RecipeConfig
from coadvise.data.views import Batch
from coadvise.errors import UserError
from coadvise.models.network import Network, build_network
from coadvise.training.engine import Engine, here, settled
from coadvise.training.optim import make_optimiser

STUDENT = ModelConfig(model="cit_micro_patch4_32", model_kwargs={"embed_dim": 24, "depth": 1})


def cpu(**more: object) -> Engine:
    return Engine(EngineConfig.model_validate({"device": "cpu", **more}))


def student() -> Network:
    return build_network(STUDENT, ("a", "b"), 16, seed=0, tokens=("conv",))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(UserError, match=r"engine.device=cuda, but PyTorch sees no CUDA device; use engine.device=cpu"):
        Engine(EngineConfig(device="cuda"))
    assert Engine(EngineConfig(device="auto")).device.type == "cpu"


def test_one_process_is_the_main_one() -> None:
    engine = cpu()
    assert (engine.rank, engine.processes, engine.is_main) == (0, 1, True)
    assert engine.describe().startswith("cpu, 1 threads")
    values = torch.tensor([1.0, 2.0])
    assert torch.equal(engine.mean(values), values)


def test_a_batch_is_laid_out_as_the_networks_run() -> None:
    batch = cpu().place(Batch(torch.rand(2, 3, 4, 4), torch.zeros(2, dtype=torch.int64), torch.arange(2), 0))
    assert batch.images.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_precision_is_the_forward_s_and_nothing_else_s(precision: str) -> None:
    engine, network = cpu(precision=precision), student()
    inside: list[torch.dtype] = []
    network.model.blocks[0].mlp.fc1.register_forward_hook(lambda module, args, out: inside.append(out.dtype))
    model, optimiser = engine.setup(network, make_optimiser(network.model, RecipeConfig()))
    logits = model(torch.rand(2, 3, 16, 16))
    assert inside == [getattr(torch, precision)]
    assert {value.dtype for value in logits.values()} == {torch.float32}
    engine.backward(sum(value.sum() for value in logits.values()))
    optimiser.step()
    assert {p.dtype for p in network.parameters()} == {torch.float32}
    state = [v for s in optimiser.state_dict()["state"].values() for v in s.values()]
    assert {value.dtype for value in state} == {torch.float32}


@pytest.mark.parametrize(("native", "precision"), [(True, "bfloat16"), (False, "float32")])
def test_auto_takes_bfloat16_where_the_processor_has_it(
    native: bool, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coadvise.engine._cpu_has_bfloat16", lambda: native)
    config = EngineConfig(device="cpu", precision="auto")
    assert settled(config).precision == precision
    assert Engine(config).half_precision == native
    assert settled(EngineConfig(device="cpu", precision="bfloat16")).precision == "bfloat16"


def test_deterministic_is_asked_of_cuda_alone() -> None:
    assert not torch.are_deterministic_algorithms_enabled()
    Engine(EngineConfig(device="cpu", deterministic=True))
    assert not torch.are_deterministic_algorithms_enabled()
    if torch.cuda.is_available():
        Engine(EngineConfig(device="cuda", deterministic=True))
        enabled = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(False)
        assert enabled


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1"])
def test_a_signal_asks_for_a_stop(name: str) -> None:
    engine, number = cpu(), getattr(signal, name)
    before = signal.getsignal(number)
    with engine.stops_gently():
        assert not engine.stop_requested
        os.kill(os.getpid(), number)
        assert engine.stop_requested
    assert signal.getsignal(number) is before


def test_in_another_thread_signals_are_left_alone() -> None:
    engine, seen, before = cpu(), [], signal.getsignal(signal.SIGTERM)

    def work() -> None:
        with engine.stops_gently():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


@pytest.mark.parametrize("other", ["the same", "another"])
def test_processes_find_out_whether_they_have_the_same(other: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(EngineConfig(device="cpu"))
    assert engine.alike("the same")
    seen: list[Tensor] = []
    monkeypatch.setattr(Engine, "_highest", lambda self, values: seen.append(values) or values)
    assert engine.alike(other)
    theirs = seen[0]
    monkeypatch.setattr(Engine, "_highest", lambda self, values: torch.maximum(values, theirs))
    assert engine.alike("the same") == (other == "the same")


def test_networks_trained_on_a_device_that_is_not_there_answer_on_one_that_is(monkeypatch: pytest.MonkeyPatch) -> None:
    trained = EngineConfig(device="cuda", precision="bfloat16")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("coadvise.engine._cpu_has_bfloat16", lambda: False)
    assert Engine(here(trained)).device.type == "cpu"
    assert settled(here(trained)).precision == "float32"
    exact = EngineConfig(device="cuda", precision="float32")
    assert here(exact) == EngineConfig(device="auto", precision="float32")
    own = EngineConfig(device="cpu", precision="bfloat16")
    assert here(own) == own
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert here(trained) == trained
