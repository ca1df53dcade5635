"""The loop: interrupted anywhere it ends with the same bits, and a step is what the recipe says."""

import os
import shutil
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import CLASSES, CrashError, Stopper, assert_same_weights, make_images, never, records
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from coadvise import storage
from coadvise.advice import Advice, LossWeights
from coadvise.config.schema import AugmentConfig, EngineConfig, ModelConfig, RecipeConfig
from coadvise.data.scan import scan
from coadvise.data.scanned import Dataset
from coadvise.data.sources import open_source
from coadvise.data.views import Views
from coadvise.distill.loss import CoAdvice, co_advise_loss
from coadvise.distill.teachers import Teacher, Teachers
from coadvise.errors import Interrupted, UserError
from coadvise.evaluation.scores import predict_logits, top1
from coadvise.models.network import Network, build_network
from coadvise.storage import read_state, read_weights
from coadvise.training.checkpoint import Checkpoints, checkpoint_bytes
from coadvise.training.engine import Engine
from coadvise.training.loop import Progress, Training, train
from coadvise.training.metrics import Recorder
from coadvise.training.optim import learning_rate, make_optimiser

CONV = ModelConfig(model="resnet_small", model_kwargs={"widths": [8, 16], "depths": [1, 1], "strides": [2, 2]})
STUDENT = ModelConfig(model="cit_micro_patch4_32", model_kwargs={"embed_dim": 24, "depth": 2})
ALIGNED = ModelConfig(model="cit_micro_aligned_patch4_32", model_kwargs={"embed_dim": 24, "depth": 1})
DROPPING = STUDENT.model_copy(
    update={"model_kwargs": {**STUDENT.model_kwargs, "drop_rate": 0.2, "proj_drop_rate": 0.2, "drop_path_rate": 0.3}}
)
PLAIN, MIXED = AugmentConfig(), AugmentConfig(mixup=0.8, cutmix=1.0, erase=0.3, colour=0.2, rotate=10, smoothing=0.1)
NEVER_SAVE, EVERY_STEP = 1e9, 1e-9  # seconds between checkpoints


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """26 training images: an epoch is three batches of 8 and leaves out two images."""
    root = make_images(tmp_path_factory.mktemp("images"))
    for extra in ("a", "b"):
        shutil.copy(root / "train" / "red" / "0.png", root / "train" / "red" / f"{extra}.png")
    return scan(open_source(root), 16, in_memory=True)


class Poisoned(Teacher):
    """A teacher whose logits are NaN in some calls, counted from 1."""

    def __init__(self, calls: frozenset[int], *arguments: Any) -> None:
        super().__init__(*arguments)
        self.calls, self.count = calls, 0

    def forward(self, images: Tensor) -> Tensor:
        self.count += 1
        return super().forward(images) + (float("nan") if self.count in self.calls else 0.0)


@dataclass(frozen=True)
class Case:
    """One way of training; `start` runs it in a folder, from the checkpoint there."""

    model: ModelConfig = STUDENT
    recipe: dict[str, Any] = field(default_factory=dict)
    augment: AugmentConfig = PLAIN
    advised: bool = True
    engine: dict[str, Any] = field(default_factory=dict)
    workers: int = 0
    checkpoint_seconds: float = NEVER_SAVE
    label_weight: float = 1.0
    poisoned: frozenset[int] = frozenset()

    @property
    def weights(self) -> LossWeights:
        return LossWeights(self.label_weight, {"conv": Advice(2.0, 3.0), "inv": Advice(0.5)} if self.advised else {})

    def job(self, dataset: Dataset, engine: Engine | None = None) -> Training:
        engine = engine or Engine(EngineConfig(device="cpu"))
        recipe = RecipeConfig.model_validate(
            {"epochs": 3, "batch_size": 8, "warmup_epochs": 1, "evaluations": 3, "learning_rate": 0.01, **self.recipe}
        )
        tokens = ("conv", "inv") if "cit" in self.model.model else None
        network = build_network(self.model, CLASSES, 16, seed=5, tokens=tokens)
        teachers = {}
        for name, seed in (("conv", 11), ("inv", 12)) if self.advised else ():
            poisoned = self.poisoned if name == "conv" else frozenset()
            teachers[name] = Poisoned(poisoned, name, build_network(CONV, CLASSES, 16, seed), CLASSES)
            engine.prepare(teachers[name])
        views, labels = Views(dataset.train, self.augment, len(CLASSES), 16, seed=3), torch.tensor(dataset.val.labels)

        def evaluate(network: torch.nn.Module, step: int) -> dict[str, float]:
            return top1(predict_logits(network, dataset.val, 16, engine), labels, self.weights.trained_tokens)

        return Training(
            "part", 3, network, recipe, views, Teachers(teachers), CoAdvice(self.weights), evaluate, self.workers,
            self.checkpoint_seconds,
        )  # fmt: skip

    def start(self, dataset: Dataset, folder: Path, progress: Progress | None = None) -> Network:
        folder.mkdir(exist_ok=True)
        with Engine(EngineConfig(**{"device": "cpu", **self.engine})) as engine, engine.graceful_shutdown():
            return run(self.job(dataset, engine), folder, engine, progress)


def run(job: Training, folder: Path, engine: Engine, progress: Progress | None = None) -> Network:
    record = Recorder(folder, True, lambda text: None)
    return train(job, Checkpoints(folder / "checkpoints"), engine, record, progress or Stopper(never).progress)


def saved(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").glob("*"))


def snapshot(network: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


def assert_same_end(network: Network, stopped: Path, wanted: dict[str, Tensor], undisturbed: Path) -> None:
    assert_same_weights(network.state_dict(), wanted)
    assert records(stopped) == records(undisturbed)


# Stopped, killed, resumed

ALL_AT_ONCE = Case(DROPPING, {"ema": 0.9, "accumulate": 4, "clip": 1.0}, MIXED)
CASES = {
    "everything": ALL_AT_ONCE,
    "batch norm": Case(ALIGNED, {"ema": 0.9}, MIXED),
    "a teacher": Case(CONV, {"ema": 0.9}, advised=False),
    "bfloat16": Case(engine={"precision": "bfloat16"}),
    "a skipped step": Case(ALIGNED, augment=MIXED, poisoned=frozenset({2})),
    "heads first": Case(ALIGNED, {"head_epochs": 1, "layer_decay": 0.7, "ema": 0.9}),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_stopped_after_any_step_it_ends_with_the_same_bits(case: Case, dataset: Dataset, tmp_path: Path) -> None:
    stops = range(1, 9) if case is ALL_AT_ONCE else (2, 6)
    undisturbed, again = Stopper(never), Stopper(lambda part, step: step in stops)
    wanted = snapshot(case.start(dataset, tmp_path / "undisturbed", undisturbed.progress))
    for stop in stops:
        with pytest.raises(Interrupted, match=f"step {stop} of 9 of part"):
            case.start(dataset, tmp_path / "stopped", again.progress)
        case = replace(case, poisoned=frozenset())  # a new teacher counts from 1 again
    network = case.start(dataset, tmp_path / "stopped", again.progress)
    assert again.steps == undisturbed.steps
    assert_same_end(network, tmp_path / "stopped", wanted, tmp_path / "undisturbed")


@pytest.mark.parametrize("case", [Case(), Case(ALIGNED), Case(CONV, advised=False)], ids=["tokens", "stems", "teacher"])
def test_in_the_first_epochs_only_what_is_new_is_trained(case: Case, dataset: Dataset, tmp_path: Path) -> None:
    case = replace(case, recipe={"head_epochs": 2})
    job = case.job(dataset)
    before = snapshot(job.network)
    names = {name for name, _ in job.network.named_parameters()}
    changed: dict[int, set[str]] = {}

    def look(part: str, step: int, *_: object) -> None:
        changed[step] = {name for name in names if not torch.equal(job.network.state_dict()[name], before[name])}

    run(job, tmp_path, Engine(EngineConfig(device="cpu")), look)
    new = {name for name in names if ".head" in name or ".fc." in name or "reg_token" in name or ".stems." in name}
    assert changed[6] == new, "decay and momentum change nothing else either"
    assert changed[9] == names


def test_resumed_with_another_number_of_workers_it_ends_with_the_same_bits(dataset: Dataset, tmp_path: Path) -> None:
    case = Case(augment=MIXED, recipe={"epochs": 2})
    wanted = snapshot(case.start(dataset, tmp_path / "undisturbed"))
    with pytest.raises(Interrupted):
        replace(case, workers=2).start(dataset, tmp_path / "stopped", Stopper(lambda part, step: step == 4).progress)
    network = replace(case, workers=1).start(dataset, tmp_path / "stopped")
    assert_same_end(network, tmp_path / "stopped", wanted, tmp_path / "undisturbed")


@pytest.mark.parametrize("seconds", [0, EVERY_STEP], ids=["each epoch", "by time"])
@pytest.mark.parametrize("crash", [2, 8])
def test_killed_it_goes_on_from_the_last_checkpoint_and_ends_with_the_same_bits(
    seconds: float, crash: int, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checkpoints by time come inside an epoch too: a kill costs the step it came in, here."""
    monkeypatch.setattr("coadvise.training.checkpoint.WRITING_SHARE", 0)
    case = Case(DROPPING, {"ema": 0.9, "epochs": 3}, MIXED, checkpoint_seconds=seconds)
    wanted = snapshot(replace(case, checkpoint_seconds=NEVER_SAVE).start(dataset, tmp_path / "undisturbed"))
    assert not saved(tmp_path / "undisturbed")

    def fail(part: str, step: int, *_: object) -> None:
        if step == crash:  # before the step's own checkpoint
            raise CrashError

    with pytest.raises(CrashError):
        case.start(dataset, tmp_path / "killed", fail)
    last = crash - 1 if seconds else (crash - 1) // 3 * 3
    kept = [step for step in ((last - 1, last) if seconds else (last - 3, last)) if step > 0]
    assert saved(tmp_path / "killed") == [f"step-{step:08d}" for step in kept]
    if len(kept) == 2:  # and if that one is damaged, from the one before
        newest = tmp_path / "killed" / "checkpoints" / f"step-{last:08d}" / "state.pt"
        newest.write_bytes(newest.read_bytes()[:-1])
        last = kept[0]
    rest = Stopper(never)
    network = case.start(dataset, tmp_path / "killed", rest.progress)
    assert rest.steps[0] == ("part", last + 1)
    assert_same_end(network, tmp_path / "killed", wanted, tmp_path / "undisturbed")


def test_a_checkpoint_that_is_due_in_one_process_is_written_by_all(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Engine, "any_rank", lambda self, stop, due: (stop, True))  # another process says so
    Case(advised=False).start(dataset, tmp_path)
    assert saved(tmp_path) == ["step-00000007", "step-00000008"]


def test_signals_inside_an_accumulation_window_and_while_saving_wait(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first comes after the third of four micro-batches of step 5, others at every fsync of the save."""
    wanted, before = snapshot(ALL_AT_ONCE.start(dataset, tmp_path / "undisturbed")), signal.getsignal(signal.SIGTERM)
    backward, fsync, calls, saves = Engine.backward, storage.fsync, [], []

    def signal_in_the_window(self: Engine, loss: Tensor) -> None:
        backward(self, loss)
        calls.append(loss)
        if len(calls) == 4 * 4 + 3:
            os.kill(os.getpid(), signal.SIGUSR1)

    def signal_in_the_save(path: Path) -> None:
        saves.append(path)
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        fsync(path)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "backward", signal_in_the_window)
        patch.setattr(storage, "fsync", signal_in_the_save)
        with pytest.raises(Interrupted, match="stopped at step 5 of 9"):
            ALL_AT_ONCE.start(dataset, tmp_path / "stopped")
    assert len(calls) == 5 * 4
    assert saves
    assert signal.getsignal(signal.SIGTERM) is before
    assert saved(tmp_path / "stopped") == ["step-00000005"]
    network = ALL_AT_ONCE.start(dataset, tmp_path / "stopped")
    assert_same_end(network, tmp_path / "stopped", wanted, tmp_path / "undisturbed")


def test_a_stop_asked_for_in_the_last_step_lets_it_finish(dataset: Dataset, tmp_path: Path) -> None:
    Case(recipe={"epochs": 1}).start(dataset, tmp_path, Stopper(lambda part, step: step == 3).progress)
    assert not saved(tmp_path)


def test_a_changed_configuration_holds_from_where_training_goes_on(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The optimiser's settings are the new ones; an average begins with the weights at that step."""
    made: list[torch.optim.Optimizer] = []
    monkeypatch.setattr(
        sys.modules["coadvise.training.loop"], "make_optimiser", lambda *a: made.append(make_optimiser(*a)) or made[-1]
    )
    with pytest.raises(Interrupted):
        Case().start(dataset, tmp_path, Stopper(lambda part, step: step == 8).progress)
    before = load_file(tmp_path / "checkpoints" / "step-00000008" / "model.safetensors")
    changed = {"weight_decay": 0.5, "betas": (0.8, 0.95)}
    averaged = Case(recipe={"ema": 0.999, **changed}).start(dataset, tmp_path)  # one step: 1 - 8 ** (-2 / 3) is 3/4
    assert {group["weight_decay"] for group in made[-1].param_groups} == {0.0, 0.5}
    assert {group["betas"] for group in made[-1].param_groups} == {(0.8, 0.95)}
    raw = Case(recipe=changed).start(dataset, tmp_path)
    for name, value in averaged.model.state_dict().items():
        wanted = before[name] + (raw.model.state_dict()[name] - before[name]) / 4
        torch.testing.assert_close(value, wanted, rtol=1e-4, atol=1e-6, msg=name)


# Numbers that are not finite


@pytest.mark.parametrize(("seconds", "last"), [(0, 3), (EVERY_STEP, 4)], ids=["each epoch", "by time"])
def test_while_steps_are_skipped_the_last_finite_checkpoint_is_kept(
    seconds: float, last: int, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coadvise.training.checkpoint.WRITING_SHARE", 0)
    case = Case(checkpoint_seconds=seconds, poisoned=frozenset(range(5, 10)))
    with pytest.raises(UserError, match=r"part: the loss is no longer finite: up to step 9, .*conv.*learning_rate"):
        case.start(dataset, tmp_path)
    assert saved(tmp_path)[-1] == f"step-{last:08d}"
    weights = load_file(tmp_path / "checkpoints" / saved(tmp_path)[-1] / "model.safetensors")
    assert all(value.isfinite().all() for value in weights.values())


# What a step is


def plain_descent(model: torch.nn.Module, recipe: RecipeConfig) -> torch.optim.Optimizer:
    """A step of rate 1 moves the weights by their gradient."""
    return torch.optim.SGD(model.parameters(), lr=1.0, fused=True)


def gradients(case: Case, dataset: Dataset, folder: Path) -> dict[str, Tensor]:
    before = dict(case.job(dataset).network.model.named_parameters())
    after = dict(case.start(dataset, folder).model.named_parameters())
    return {name: (before[name] - after[name]).detach() / 0.01 for name in before}


ONE_STEP = {"epochs": 1, "batch_size": 24, "warmup_epochs": 0}


@pytest.mark.parametrize("augment", [AugmentConfig(), MIXED], ids=["labels", "mixed labels"])
def test_accumulated_gradients_are_the_full_batch_s(
    augment: AugmentConfig, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coadvise.training.loop.make_optimiser", plain_descent)
    case = Case(recipe=ONE_STEP, augment=augment, label_weight=0.7)
    full, job = gradients(case, dataset, tmp_path / "1"), case.job(dataset)
    batch = job.views[(0, np.arange(24))]  # the same, written out
    co_advise_loss(job.network(batch.images), job.teachers(batch), batch.labels, case.weights)["total"].backward()
    for name, parameter in job.network.model.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > 1e-6, f"{name} gets no gradient, so nothing would be compared"
        torch.testing.assert_close(full[name], parameter.grad, rtol=1e-3, atol=2e-5, msg=name)
    split = gradients(replace(case, recipe={**ONE_STEP, "accumulate": 8}), dataset, tmp_path / "8")
    for name in full:
        torch.testing.assert_close(split[name], full[name], rtol=1e-3, atol=2e-5, msg=name)
    got, wanted = (records(tmp_path / run, "train")[0]["losses"] for run in ("8", "1"))
    assert got == pytest.approx(wanted, rel=1e-4)


def test_a_gradient_is_clipped_as_a_whole_before_the_step(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coadvise.training.loop.make_optimiser", plain_descent)
    recipe = {**ONE_STEP, "accumulate": 2}
    free = gradients(Case(recipe=recipe), dataset, tmp_path / "free")
    norm = torch.stack([gradient.norm() for gradient in free.values()]).norm().item()
    for largest, scale in ((norm / 3, 1 / 3), (2 * norm, 1.0)):
        clipped = gradients(Case(recipe={**recipe, "clip": largest}), dataset, tmp_path / f"{scale}")
        for name in free:
            torch.testing.assert_close(clipped[name], scale * free[name], rtol=1e-3, atol=2e-5, msg=name)


def test_training_lowers_the_loss_and_records_each_epoch(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, modes = Case(recipe={"epochs": 8, "evaluations": 2}, augment=AugmentConfig(kind="none")), []
    with Engine(EngineConfig(device="cpu")) as engine:
        job = case.job(dataset, engine)
        network = run(job, tmp_path, engine, lambda *_: modes.append(job.network.training))
    assert modes == [True] * 24, "also after an evaluation"
    assert not network.training
    epochs = records(tmp_path, "train")
    assert [(r["epoch"], r["step"]) for r in epochs] == [(n, 3 * n) for n in range(1, 9)]
    assert set(epochs[0]["losses"]) == {"total", "class", "conv", "inv"}
    assert [r["learning_rate"] for r in epochs] == [learning_rate(3 * n - 1, 3, job.recipe) for n in range(1, 9)]
    for r in epochs:  # Eq. (1)
        parts = r["losses"]
        assert parts["total"] == pytest.approx(parts["class"] + 2 * parts["conv"] + 0.5 * parts["inv"], rel=1e-5)
    assert epochs[-1]["losses"]["class"] < 0.5 * epochs[0]["losses"]["class"]
    evaluations = records(tmp_path, "eval")
    assert [r["epoch"] for r in evaluations] == [4, 8]
    assert set(evaluations[0]["top1"]) == {"class", "conv", "inv", "average"}


def test_the_average_of_the_weights_after_each_step_is_evaluated_and_returned(dataset: Dataset, tmp_path: Path) -> None:
    evaluated, steps = [], []
    with Engine(EngineConfig(device="cpu")) as engine:
        job = Case(recipe={"ema": 0.6, "epochs": 5, "evaluations": 2}).job(dataset, engine)
        job = replace(job, evaluate=lambda network, step: evaluated.append((network, step)) or {"class": 0.0})
        network = run(job, tmp_path, engine, lambda *_: steps.append(snapshot(job.network.model)))
    average = steps[0]
    decays = [min(0.6, 1 - max(1, step) ** (-2 / 3)) for step in range(len(steps))]  # timm's, with warm-up
    for decay, weights in zip(decays, steps, strict=True):
        average = {name: decay * average[name] + (1 - decay) * value for name, value in weights.items()}
    for name, value in network.model.state_dict().items():
        torch.testing.assert_close(value, average[name], rtol=1e-4, atol=1e-6, msg=name)
    assert evaluated == [(network, 9), (network, 15)]


def test_a_checkpoint_holds_the_student_alone_and_is_as_large_as_foreseen(dataset: Dataset, tmp_path: Path) -> None:
    case = Case(recipe={"ema": 0.9})
    with pytest.raises(Interrupted):
        case.start(dataset, tmp_path, Stopper(lambda part, step: step == 1).progress)
    folder, job = tmp_path / "checkpoints" / "step-00000001", case.job(dataset)
    weights, state = read_weights(folder), read_state(folder)
    assert weights.keys() == job.network.model.state_dict().keys()
    averages = [v for of in state["optimiser"]["state"].values() for name, v in of.items() if name != "step"]
    tensors = [*weights.values(), *state["ema"].values(), *averages]
    assert checkpoint_bytes(job.network, job.recipe) == sum(tensor.nbytes for tensor in tensors)


def test_dropout_differs_by_seed_step_and_process(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def seeds(name: str, seed: int, steps: int) -> list[int]:
        """What torch is seeded with before each of so many steps."""
        found: list[int] = []

        def noted(number: int) -> None:
            found.append(number)
            if len(found) == steps:
                raise CrashError

        (tmp_path / name).mkdir()
        job, engine = replace(Case(advised=False).job(dataset), seed=seed), Engine(EngineConfig(device="cpu"))
        with monkeypatch.context() as patch:
            patch.setattr(torch, "manual_seed", noted)
            with pytest.raises(CrashError):
                run(job, tmp_path / name, engine)
        return found

    one = seeds("one", 3, 4)
    assert seeds("again", 3, 4) == one
    other = seeds("seed", 4, 4)
    monkeypatch.setattr(Engine, "rank", 1)
    monkeypatch.setattr(Engine, "processes", 2)
    assert len({*one, *other, *seeds("rank", 3, 1)}) == 4 + 4 + 1


# Speed and devices


def test_compiled_training_is_the_same_training(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled, calls = torch.compile, []
    monkeypatch.setattr(torch, "compile", lambda m, **_: calls.append(m) or compiled(m, backend="eager"))
    recipe = {"epochs": 1, "ema": 0.9}
    plain = Case(recipe=recipe).start(dataset, tmp_path / "plain")
    assert not calls
    case = Case(recipe=recipe, engine={"compile": True})
    with pytest.raises(Interrupted):
        case.start(dataset, tmp_path / "compiled", Stopper(lambda part, step: step == 1).progress)
    network = case.start(dataset, tmp_path / "compiled")
    assert calls
    assert network.state_dict().keys() == plain.state_dict().keys()
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(network.state_dict()[name], value, rtol=1e-4, atol=1e-5, msg=name)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the operations so far that hand a value of the device to Python, for which a GPU is waited for."""
    found: list[str] = []
    aten = torch.ops.aten

    class Operators(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func in (aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default):
                found.append(str(func))
            return func(*args, **(kwargs or {}))

    def noted(name: str) -> Any:
        method = getattr(Tensor, name)
        return lambda self, *args, **kwargs: found.append(name) or method(self, *args, **kwargs)

    for name in ("tolist", "cpu"):  # not operators on a CPU
        monkeypatch.setattr(Tensor, name, noted(name))
    with Operators():
        yield found


def test_the_device_is_waited_for_at_the_end_of_an_epoch_only(
    waits: list[str], dataset: Dataset, tmp_path: Path
) -> None:
    seen = []

    def look(part: str, step: int, *_: object) -> None:
        seen.append(bool(waits))
        waits.clear()

    assert torch.ones(1).item() == torch.ones(1).tolist()[0] == 1
    assert len(waits) == 2, "they are not noticed"
    Case(ALIGNED, {"epochs": 2, "ema": 0.9, "clip": 1.0, "accumulate": 2}).start(dataset, tmp_path / "run", look)
    assert seen[1:] == [False, True, False, False, True], "the set-up comes before the first step"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_it_trains_and_goes_on_on_a_gpu(precision: str, dataset: Dataset, tmp_path: Path) -> None:
    case = replace(ALL_AT_ONCE, engine={"device": "cuda", "precision": precision})
    with pytest.raises(Interrupted):
        case.start(dataset, tmp_path, Stopper(lambda part, step: step == 4).progress)
    network = case.start(dataset, tmp_path)
    assert next(network.parameters()).is_cuda
    assert len(records(tmp_path, "train")) == 3
