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
from tiny import Stopper, assert_same_weights, make_images, never, records
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from coadvise import storage as checkpoint
from coadvise.advice import Advice, LossWeights
from coadvise.config import AugmentConfig, EngineConfig, ModelConfig, RecipeConfig
from coadvise.data.scan import Dataset, scan
from coadvise.data.sources import open_source
from coadvise.data.views import Views
from coadvise.distill.loss import co_advise_loss
from coadvise.distill.teachers import Teacher, Teachers
from coadvise.errors import Interrupted, UserError
from coadvise.evaluation.scores import predict_logits
from coadvise.models.network import Network, build_network
from coadvise.storage import read_weights
from coadvise.training.checkpoint import Checkpoints, read_state
from coadvise.training.engine import Engine
from coadvise.training.loop import Progress, Training, checkpoint_bytes, seconds_between, train
from coadvise.training.metrics import Recorder
from coadvise.training.optim import learning_rate, make_optimiser

CLASSES = ("blue", "green", "red")
CONV = ModelConfig(model="resnet_small", model_kwargs={"widths": [8, 16], "depths": [1, 1], "strides": [2, 2]})
STUDENT = ModelConfig(model="cit_micro_patch4_32", model_kwargs={"embed_dim": 24, "depth": 2})
ALIGNED = ModelConfig(model="cit_micro_aligned_patch4_32", model_kwargs={"embed_dim": 24, "depth": 1})
DROPPING = STUDENT.model_copy(
    update={"model_kwargs": {**STUDENT.model_kwargs, "drop_rate": 0.2, "proj_drop_rate": 0.2, "drop_path_rate": 0.3}}
)
LIGHT = AugmentConfig()
MIXED = AugmentConfig(mixup=0.8, cutmix=1.0, erase=0.3, colour=0.2, rotate=10, smoothing=0.1)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """26 training images: an epoch of three batches of 8, and two images left out of each epoch."""
    root = make_images(tmp_path_factory.mktemp("images"))
    for extra in ("a", "b"):
        (root / "train" / "red" / f"{extra}.png").write_bytes((root / "train" / "red" / "0.png").read_bytes())
    return scan(open_source(root, 0.2, 0), 16, in_memory=True)


@dataclass(frozen=True)
class Case:
    """One way of training; `start` runs it in a folder, going on from what is there."""

    model: ModelConfig = STUDENT
    recipe: dict[str, Any] = field(default_factory=dict)
    augment: AugmentConfig = LIGHT
    advised: bool = True
    engine: dict[str, Any] = field(default_factory=dict)
    workers: int = 0
    checkpoint_seconds: float = 1e9
    label_weight: float = 1.0

    def job(self, dataset: Dataset) -> Training:
        recipe = RecipeConfig.model_validate(
            {"epochs": 3, "batch_size": 8, "warmup_epochs": 1, "evaluations": 3, "learning_rate": 0.01, **self.recipe}
        )
        student = "cit" in self.model.model
        network = build_network(self.model, CLASSES, 16, seed=5, tokens=("conv", "inv") if student else None)
        teachers, weights = Teachers({}), LossWeights(self.label_weight)
        if self.advised:
            teachers = Teachers({t: Teacher(t, build_network(CONV, CLASSES, 16, seed=s), CLASSES) for t, s in TEACHERS})
            weights = LossWeights(self.label_weight, {"conv": Advice(2.0, 3.0), "inv": Advice(0.5)})
        views = Views(dataset.train, self.augment, len(CLASSES), 16, seed=3)
        return Training(
            "part", 3, network, recipe, views, dataset.val, teachers, weights, self.workers, self.checkpoint_seconds
        )

    def ready_job(self, dataset: Dataset, engine: Engine) -> Training:
        job = self.job(dataset)
        for teacher in job.teachers.by_name.values():
            engine.prepare(teacher)
        return job

    def start(self, dataset: Dataset, folder: Path, progress: Progress | None = None) -> Network:
        folder.mkdir(exist_ok=True)
        engine = Engine(EngineConfig(device="cpu", **self.engine))
        with engine.stops_gently():
            return train(
                self.ready_job(dataset, engine),
                Checkpoints(folder / "checkpoints"),
                engine,
                Recorder(folder, True, lambda text: None),
                progress or Stopper(never).progress,
            )


TEACHERS = (("conv", 11), ("inv", 12))
CASES = {
    "advised": Case(),
    "alone": Case(advised=False),
    "average": Case(recipe={"ema": 0.9}),
    "accumulated, clipped": Case(recipe={"accumulate": 2, "clip": 0.5}),
    "dropout, all at once": Case(DROPPING, {"ema": 0.9, "accumulate": 4, "clip": 1.0}, MIXED),
    "batch norm": Case(ALIGNED, {"ema": 0.9}, MIXED),
    "a teacher": Case(CONV, {"ema": 0.9}, advised=False),
    "bfloat16": Case(engine={"precision": "bfloat16"}),
    "workers": Case(workers=2, recipe={"epochs": 2}),
}


def snapshot(network: Network) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_stopped_after_any_step_it_ends_bit_for_bit_the_same(case: Case, dataset: Dataset, tmp_path: Path) -> None:
    undisturbed = Stopper(never)
    wanted = snapshot(case.start(dataset, tmp_path / "undisturbed", undisturbed.progress))
    last = len(undisturbed.steps)
    assert last == 3 * (2 if case.workers else 3)
    for stop in range(1, last) if case is CASES["dropout, all at once"] else (2, 3, last - 1):
        folder = tmp_path / f"stopped-{stop}"
        with pytest.raises(Interrupted, match=f"step {stop} of {last} of part"):
            case.start(dataset, folder, Stopper(lambda part, step, stop=stop: step == stop).progress)
        rest = Stopper(never)
        network = case.start(dataset, folder, rest.progress)
        assert rest.steps == undisturbed.steps[stop:]
        assert_same_weights(network.state_dict(), wanted)
        assert records(folder) == records(tmp_path / "undisturbed")


def test_stopped_after_every_step_it_ends_bit_for_bit_the_same(dataset: Dataset, tmp_path: Path) -> None:
    case = CASES["dropout, all at once"]
    wanted = snapshot(case.start(dataset, tmp_path / "undisturbed"))
    for _ in range(8):
        with pytest.raises(Interrupted):
            case.start(dataset, tmp_path / "stopped", Stopper(lambda part, step: True).progress)
    assert_same_weights(case.start(dataset, tmp_path / "stopped").state_dict(), wanted)
    assert records(tmp_path / "stopped") == records(tmp_path / "undisturbed")


def test_signals_inside_an_accumulation_window_and_while_saving_wait_their_turn(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first comes after the third of four micro-batches of step 5, others at every fsync of the save."""
    case = CASES["dropout, all at once"]
    wanted = snapshot(case.start(dataset, tmp_path / "undisturbed"))
    backward, fsync, calls, saves = Engine.backward, checkpoint.fsync, [], []

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
        patch.setattr(checkpoint, "fsync", signal_in_the_save)
        with pytest.raises(Interrupted, match="stopped at step 5 of 9"):
            case.start(dataset, tmp_path / "stopped")
    assert len(calls) == 5 * 4
    assert saves
    found, faults = Checkpoints(tmp_path / "stopped" / "checkpoints").latest()
    assert found is not None
    assert (found.name, faults) == ("step-00000005", [])
    assert_same_weights(case.start(dataset, tmp_path / "stopped").state_dict(), wanted)
    assert records(tmp_path / "stopped") == records(tmp_path / "undisturbed")


def test_another_number_of_workers_goes_on_bit_for_bit(dataset: Dataset, tmp_path: Path) -> None:
    before, after = Case(augment=MIXED, workers=2), Case(augment=MIXED, workers=1)
    wanted = snapshot(Case(augment=MIXED).start(dataset, tmp_path / "undisturbed"))
    with pytest.raises(Interrupted):
        before.start(dataset, tmp_path / "stopped", Stopper(lambda part, step: step == 4).progress)
    assert_same_weights(after.start(dataset, tmp_path / "stopped").state_dict(), wanted)
    assert records(tmp_path / "stopped") == records(tmp_path / "undisturbed")


class Poisoned(Teacher):
    """A teacher that answers NaN in some calls, counted from 1."""

    def __init__(self, calls: set[int], *arguments: Any) -> None:
        super().__init__(*arguments)
        self.calls, self.count = calls, 0

    def forward(self, images: Tensor) -> Tensor:
        self.count += 1
        return super().forward(images) + (float("nan") if self.count in self.calls else 0.0)


def poisoned(dataset: Dataset, folder: Path, steps: set[int], progress: Progress, **more: Any) -> Network:
    job = Case(ALIGNED, augment=MIXED, **more).job(dataset)
    teachers = dict(job.teachers.by_name)
    teachers["conv"] = Poisoned(steps, "conv", teachers["conv"].network, CLASSES)
    job = replace(job, teachers=Teachers(teachers))
    quiet, engine = Recorder(folder, True, lambda text: None), Engine(EngineConfig(device="cpu"))
    with engine.stops_gently():
        return train(job, Checkpoints(folder / "checkpoints"), engine, quiet, progress)


def test_a_teacher_s_nan_costs_its_step_and_no_other(dataset: Dataset, tmp_path: Path) -> None:
    network = poisoned(dataset, tmp_path, {2, 5}, Stopper(never).progress)
    assert all(value.isfinite().all() for value in network.state_dict().values())
    skipped, terms = records(tmp_path, "skipped"), ["conv teacher's logits", "total loss", "conv loss", "gradient"]
    assert [(r["part"], r["step"], r["terms"]) for r in skipped] == [("part", 2, terms), ("part", 5, terms)]
    losses = [value for r in records(tmp_path, "train") for value in r["losses"].values()]
    assert len(losses) == 3 * 4
    assert np.isfinite(losses).all()


def test_stopped_after_a_skipped_step_it_ends_bit_for_bit_the_same(dataset: Dataset, tmp_path: Path) -> None:
    for name in ("undisturbed", "stopped"):
        (tmp_path / name).mkdir()
    wanted = snapshot(poisoned(dataset, tmp_path / "undisturbed", {2}, Stopper(never).progress))
    with pytest.raises(Interrupted):
        poisoned(dataset, tmp_path / "stopped", {2}, Stopper(lambda part, step: step == 2).progress)
    network = poisoned(dataset, tmp_path / "stopped", set(), Stopper(never).progress)
    assert_same_weights(network.state_dict(), wanted)
    assert records(tmp_path / "stopped") == records(tmp_path / "undisturbed")


def test_while_steps_are_skipped_the_last_finite_checkpoint_is_kept(dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"part: the loss is no longer finite: up to step 9 a whole epoch skipped for .*conv"
    ):
        poisoned(dataset, tmp_path, set(range(6, 10)), Stopper(never).progress, checkpoint_seconds=0)
    found, faults = Checkpoints(tmp_path / "checkpoints").latest()
    assert found is not None
    assert (found.name, faults) == ("step-00000003", [])
    assert all(value.isfinite().all() for value in load_file(found / "model.safetensors").values())


class CrashError(Exception):
    pass


@pytest.mark.parametrize("crash", range(1, 9))
def test_after_a_crash_it_goes_on_from_the_last_checkpoint(crash: int, dataset: Dataset, tmp_path: Path) -> None:
    case = Case(DROPPING, {"ema": 0.9}, checkpoint_seconds=0)
    wanted = snapshot(case.start(dataset, tmp_path / "undisturbed"))

    def fail(part: str, step: int, *_: object) -> None:
        if step == crash:
            raise CrashError

    with pytest.raises(CrashError):
        case.start(dataset, tmp_path / "crashed", fail)
    rest = Stopper(never)
    network = case.start(dataset, tmp_path / "crashed", rest.progress)
    saved = (crash - 1) // 3 * 3  # the step's own progress comes before its checkpoint
    assert rest.steps[0] == ("part", saved + 1)
    assert_same_weights(network.state_dict(), wanted)
    assert records(tmp_path / "crashed") == records(tmp_path / "undisturbed")


def test_a_changed_configuration_of_the_optimiser_holds_from_where_it_goes_on(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[torch.optim.Optimizer] = []

    def kept(*arguments: Any) -> torch.optim.Optimizer:
        made.append(make_optimiser(*arguments))
        return made[-1]

    monkeypatch.setattr(sys.modules["coadvise.training.loop"], "make_optimiser", kept)
    with pytest.raises(Interrupted):
        Case().start(dataset, tmp_path, Stopper(lambda part, step: step == 2).progress)
    Case(recipe={"weight_decay": 0.5, "betas": (0.8, 0.95)}).start(dataset, tmp_path)
    assert {group["weight_decay"] for group in made[-1].param_groups} == {0.0, 0.5}
    assert {group["betas"] for group in made[-1].param_groups} == {(0.8, 0.95)}


def test_an_average_that_is_asked_for_later_begins_with_the_weights_there(dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        Case().start(dataset, tmp_path, Stopper(lambda part, step: step == 8).progress)
    saved = load_file(tmp_path / "checkpoints" / "step-00000008" / "model.safetensors")
    network = Case(recipe={"ema": 0.999}).start(dataset, tmp_path)  # its only step: 1 - 8 ** (-2 / 3) is 3/4
    shutil.rmtree(tmp_path / "checkpoints")
    raw = Case().start(dataset, tmp_path)
    for name, value in network.model.state_dict().items():
        wanted = saved[name] + (raw.model.state_dict()[name] - saved[name]) / 4
        torch.testing.assert_close(value, wanted, rtol=1e-4, atol=1e-6, msg=name)


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(dataset: Dataset, tmp_path: Path) -> None:
    case = Case(recipe={"ema": 0.9}, checkpoint_seconds=0)
    wanted = snapshot(case.start(dataset, tmp_path / "undisturbed"))
    with pytest.raises(Interrupted):
        case.start(dataset, tmp_path / "stopped", Stopper(lambda part, step: step == 7).progress)
    newest = tmp_path / "stopped" / "checkpoints" / "step-00000007" / "state.pt"
    newest.write_bytes(newest.read_bytes()[:-1])
    rest = Stopper(never)
    network = case.start(dataset, tmp_path / "stopped", rest.progress)
    assert rest.steps[0] == ("part", 7)
    assert_same_weights(network.state_dict(), wanted)
    assert records(tmp_path / "stopped") == records(tmp_path / "undisturbed")


def test_a_stop_asked_for_in_the_last_step_lets_it_finish(dataset: Dataset, tmp_path: Path) -> None:
    wanted = snapshot(Case().start(dataset, tmp_path / "undisturbed"))
    network = Case().start(dataset, tmp_path / "stopped", Stopper(lambda part, step: step == 9).progress)
    assert_same_weights(network.state_dict(), wanted)


def test_checkpoints_come_at_epochs_ends_when_due(dataset: Dataset, tmp_path: Path) -> None:
    seen: list[set[str]] = []

    def look(*_: object) -> None:
        folder = tmp_path / "run" / "checkpoints"
        seen.append({path.name for path in folder.iterdir()} if folder.exists() else set())

    Case(checkpoint_seconds=0).start(dataset, tmp_path / "run", look)
    three, six = "step-00000003", "step-00000006"
    assert seen == [set()] * 3 + [{three}] * 3 + [{three, six}] * 3
    Case(checkpoint_seconds=1e9).start(dataset, tmp_path / "rare")
    assert not (tmp_path / "rare" / "checkpoints").exists()


def test_a_checkpoint_that_is_due_on_one_process_is_written_on_all(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Engine, "stop_requested", False)
    monkeypatch.setattr(Engine, "agreed", lambda self, answer: True)  # another one said so
    Case(advised=False, checkpoint_seconds=1e9).start(dataset, tmp_path)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"step-00000003", "step-00000006"}


def test_after_a_checkpoint_the_next_one_waits(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coadvise.training.loop.seconds_between", lambda least, took: 1e9)
    Case(advised=False, checkpoint_seconds=0).start(dataset, tmp_path)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"step-00000003"}


@pytest.mark.parametrize(("least", "took", "seconds"), [(60, 0.1, 60), (60, 3, 150), (0, 3, 0)])
def test_checkpoints_take_a_fiftieth_of_the_time(least: float, took: float, seconds: float) -> None:
    assert seconds_between(least, took) == seconds


def plain_descent(model: torch.nn.Module, recipe: RecipeConfig) -> torch.optim.Optimizer:
    """A step of rate 1 moves the weights by their gradient."""
    return torch.optim.SGD(model.parameters(), lr=1.0, fused=True)


def gradients(case: Case, dataset: Dataset, folder: Path) -> dict[str, Tensor]:
    before = dict(case.job(dataset).network.model.named_parameters())
    after = dict(case.start(dataset, folder).model.named_parameters())
    return {name: (before[name] - after[name]).detach() / 0.01 for name in before}


@pytest.mark.parametrize("augment", [AugmentConfig(), MIXED], ids=["labels", "mixed labels"])
def test_accumulated_gradients_are_the_full_batch_s(
    augment: AugmentConfig, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coadvise.training.loop.make_optimiser", plain_descent)
    recipe = {"epochs": 1, "batch_size": 24, "warmup_epochs": 0}
    full = gradients(Case(recipe=recipe, augment=augment, label_weight=0.7), dataset, tmp_path / "1")
    for accumulate in (2, 4, 8):
        case = Case(recipe={**recipe, "accumulate": accumulate}, augment=augment, label_weight=0.7)
        split = gradients(case, dataset, tmp_path / f"{accumulate}")
        for name in full:
            torch.testing.assert_close(split[name], full[name], rtol=1e-3, atol=2e-5, msg=name)
        got, wanted = (records(tmp_path / run, "train")[0]["losses"] for run in (f"{accumulate}", "1"))
        assert got == pytest.approx(wanted, rel=1e-4)

    job = Case(recipe=recipe, augment=augment, label_weight=0.7).job(dataset)  # the same, written out
    batch = job.views[(0, np.arange(24))]
    co_advise_loss(job.network(batch.images), job.teachers(batch), batch.labels, job.weights)["total"].backward()
    for name, parameter in job.network.model.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > 1e-6, f"{name} gets no gradient, so it would be compared with nothing"
        torch.testing.assert_close(full[name], parameter.grad, rtol=1e-3, atol=2e-5, msg=name)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_gradient_is_clipped_as_a_whole_before_the_step(
    accumulate: int, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coadvise.training.loop.make_optimiser", plain_descent)
    recipe = {"epochs": 1, "batch_size": 24, "warmup_epochs": 0, "accumulate": accumulate}
    free = gradients(Case(recipe=recipe), dataset, tmp_path / "free")
    norm = torch.stack([gradient.norm() for gradient in free.values()]).norm().item()
    for largest, scale in ((norm / 3, 1 / 3), (2 * norm, 1.0)):
        clipped = gradients(Case(recipe={**recipe, "clip": largest}), dataset, tmp_path / f"{scale}")
        for name in free:
            torch.testing.assert_close(clipped[name], scale * free[name], rtol=1e-3, atol=2e-5, msg=name)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_teachers_leave_as_they_came(precision: str, dataset: Dataset, tmp_path: Path) -> None:
    case = Case(recipe={"ema": 0.9}, augment=MIXED, engine={"precision": precision})
    job = case.job(dataset)
    before = {name: snapshot(teacher.network) for name, teacher in job.teachers.by_name.items()}
    engine = Engine(EngineConfig(device="cpu", precision=precision))
    quiet = Stopper(never)
    train(job, Checkpoints(tmp_path / "c"), engine, Recorder(tmp_path, True, quiet.say), quiet.progress)
    for name, teacher in job.teachers.by_name.items():
        assert_same_weights(teacher.network.state_dict(), before[name])
        assert not any(module.training for module in teacher.modules())
        assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
        assert {p.dtype for p in teacher.parameters()} == {torch.float32}


def test_the_student_s_checkpoint_holds_the_student_alone(dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        Case().start(dataset, tmp_path / "run", Stopper(lambda part, step: step == 1).progress)
    saved = load_file(next((tmp_path / "run" / "checkpoints").glob("step-*")) / "model.safetensors")
    assert saved.keys() == Case().job(dataset).network.model.state_dict().keys()


@pytest.mark.parametrize("recipe", [{}, {"ema": 0.9}], ids=["plain", "average"])
def test_a_checkpoint_is_as_large_as_was_foreseen(recipe: dict[str, Any], dataset: Dataset, tmp_path: Path) -> None:
    case = Case(CONV, recipe, advised=False)
    with pytest.raises(Interrupted):
        case.start(dataset, tmp_path, Stopper(lambda part, step: step == 1).progress)
    folder, job = tmp_path / "checkpoints" / "step-00000001", case.job(dataset)
    state = read_state(folder)
    averages = [v for of in state["optimiser"]["state"].values() for name, v in of.items() if name != "step"]
    tensors = [*read_weights(folder).values(), *(state["ema"] or {}).values(), *averages]
    assert checkpoint_bytes(job.network, job.recipe) == sum(tensor.nbytes for tensor in tensors)


def test_the_averaged_weights_answer_where_the_recipe_has_them(dataset: Dataset, tmp_path: Path) -> None:
    raw = Case().start(dataset, tmp_path / "raw")
    averaged = Case(recipe={"ema": 0.9}).start(dataset, tmp_path / "averaged")
    assert not averaged.training
    assert not torch.equal(raw.model.state_dict()["head.weight"], averaged.model.state_dict()["head.weight"])
    raw_records, averaged_records = records(tmp_path / "raw", "train"), records(tmp_path / "averaged", "train")
    assert raw_records == averaged_records, "averaging must not change what is trained"


def test_the_average_is_of_the_weights_after_each_step_and_is_what_is_evaluated(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models: list[torch.nn.Module] = []
    evaluated: list[torch.nn.Module] = []
    steps: list[dict[str, Tensor]] = []

    def kept(model: torch.nn.Module, recipe: RecipeConfig) -> torch.optim.Optimizer:
        models.append(model)
        return make_optimiser(model, recipe)

    def noted(network: torch.nn.Module, *arguments: Any) -> dict[str, Tensor]:
        evaluated.append(network)
        return predict_logits(network, *arguments)

    monkeypatch.setattr("coadvise.training.loop.make_optimiser", kept)
    monkeypatch.setattr("coadvise.training.loop.predict_logits", noted)
    case = Case(recipe={"ema": 0.6, "epochs": 5, "evaluations": 2})
    network = case.start(dataset, tmp_path, lambda *_: steps.append(snapshot(models[0])))
    average = steps[0]
    decays = [min(0.6, 1 - max(1, step) ** (-2 / 3)) for step in range(len(steps))]  # timm's, with warm-up
    for decay, weights in zip(decays, steps, strict=True):
        average = {name: decay * average[name] + (1 - decay) * value for name, value in weights.items()}
    for name, value in network.model.state_dict().items():
        torch.testing.assert_close(value, average[name], rtol=1e-4, atol=1e-6, msg=name)
    assert [r["epoch"] for r in records(tmp_path, "eval")] == [3, 5]
    assert evaluated == [network, network]


def dropout_seeds(job: Training, folder: Path, steps: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What torch is seeded with before each of so many steps."""
    seeds: list[int] = []

    def seed(number: int) -> None:
        seeds.append(number)
        if len(seeds) == steps:
            raise CrashError

    folder.mkdir()
    quiet, engine = Stopper(never), Engine(EngineConfig(device="cpu"))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "manual_seed", seed)
        with pytest.raises(CrashError):
            train(job, Checkpoints(folder / "c"), engine, Recorder(folder, True, quiet.say), quiet.progress)
    return seeds


def test_dropout_differs_by_seed_step_and_process(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(advised=False)
    one = dropout_seeds(case.job(dataset), tmp_path / "one", 4, monkeypatch)
    assert dropout_seeds(case.job(dataset), tmp_path / "again", 4, monkeypatch) == one
    other = dropout_seeds(replace(case.job(dataset), seed=4), tmp_path / "seed", 4, monkeypatch)
    monkeypatch.setattr(Engine, "rank", 1)
    monkeypatch.setattr(Engine, "processes", 2)
    second = dropout_seeds(case.job(dataset), tmp_path / "rank", 1, monkeypatch)
    assert len({*one, *other, *second}) == 4 + 4 + 1


def test_training_lowers_the_loss_and_records_each_epoch(dataset: Dataset, tmp_path: Path) -> None:
    case = Case(recipe={"epochs": 8, "evaluations": 2}, augment=AugmentConfig(kind="none"))
    case.start(dataset, tmp_path / "run")
    epochs = records(tmp_path / "run", "train")
    assert [(r["epoch"], r["step"]) for r in epochs] == [(n, 3 * n) for n in range(1, 9)]
    assert set(epochs[0]["losses"]) == {"total", "class", "conv", "inv"}
    recipe = case.job(dataset).recipe
    assert [r["learning_rate"] for r in epochs] == [learning_rate(3 * n - 1, 3, recipe) for n in range(1, 9)]
    for r in epochs:  # Eq. (1)
        parts = r["losses"]
        assert parts["total"] == pytest.approx(parts["class"] + 2 * parts["conv"] + 0.5 * parts["inv"], rel=1e-5)
    assert epochs[-1]["losses"]["class"] < 0.5 * epochs[0]["losses"]["class"]
    evaluations = records(tmp_path / "run", "eval")
    assert [r["epoch"] for r in evaluations] == [4, 8]
    assert set(evaluations[0]["top1"]) == {"class", "conv", "inv", "average"}


def test_every_step_is_taken_in_training_mode_also_after_an_evaluation(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models: list[torch.nn.Module] = []
    modes: list[bool] = []

    def kept(model: torch.nn.Module, recipe: RecipeConfig) -> torch.optim.Optimizer:
        models.append(model)
        return make_optimiser(model, recipe)

    monkeypatch.setattr("coadvise.training.loop.make_optimiser", kept)
    network = Case(CONV, advised=False).start(dataset, tmp_path, lambda *_: modes.append(models[0].training))
    assert modes == [True] * 9
    assert not network.training


def test_alone_nothing_advises(dataset: Dataset, tmp_path: Path) -> None:
    Case(advised=False).start(dataset, tmp_path / "run")
    assert all(set(r["losses"]) == {"total", "class"} for r in records(tmp_path / "run", "train"))
    assert all(set(r["top1"]) == {"class"} for r in records(tmp_path / "run", "eval"))


@pytest.mark.parametrize("augment", [AugmentConfig(), AugmentConfig(kind="deit", erase=0.5, cutmix=1.0)])
def test_workers_change_nothing(augment: AugmentConfig, dataset: Dataset, tmp_path: Path) -> None:
    networks = [
        Case(DROPPING, {"epochs": 2, "accumulate": 2}, augment, workers=n).start(dataset, tmp_path / f"{n}")
        for n in (0, 2)
    ]
    assert_same_weights(networks[1].state_dict(), networks[0].state_dict())
    assert records(tmp_path / "2") == records(tmp_path / "0")


def test_a_network_that_answers_nan_has_no_score(dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"part: after step 3 its answers .* are not finite .*lower learning_rate"):
        Case(recipe={"learning_rate": 1e30}).start(dataset, tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_the_signals_handlers_are_put_back(dataset: Dataset, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted):
        Case().start(dataset, tmp_path / "run", Stopper(lambda part, step: True).progress)
    assert signal.getsignal(signal.SIGTERM) is before


def test_compiled_training_is_the_same_training(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled, calls = torch.compile, []

    def compile_without_code(module: torch.nn.Module, **_: Any) -> Any:
        calls.append(module)
        return compiled(module, backend="eager")

    monkeypatch.setattr(torch, "compile", compile_without_code)
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

    for name in ("tolist", "cpu"):  # which are no operators on a CPU
        monkeypatch.setattr(Tensor, name, noted(name))
    with Operators():
        yield found


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_device_is_waited_for_at_the_end_of_an_epoch_only(
    precision: str, waits: list[str], dataset: Dataset, tmp_path: Path
) -> None:
    seen = []

    def look(part: str, step: int, *_: object) -> None:
        seen.append(bool(waits))
        waits.clear()

    assert torch.ones(1).item() == torch.ones(1).tolist()[0] == 1
    assert len(waits) == 2, "they are not seen"
    case = Case(ALIGNED, {"epochs": 2, "ema": 0.9, "clip": 1.0, "accumulate": 2}, engine={"precision": precision})
    case.start(dataset, tmp_path / "run", look)
    assert seen[1:] == [False, True, False, False, True], "the first step has making everything in it"


@pytest.mark.parametrize("student", [STUDENT, ALIGNED, DROPPING], ids=["plain", "aligned", "dropping"])
def test_a_student_trains_as_one_graph(student: ModelConfig) -> None:
    network = build_network(student, CLASSES, 16, seed=0, tokens=("conv", "inv")).train()
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")  # it fails where a graph would break
    images = torch.rand(4, 3, 16, 16)
    got = []
    for forward in (compiled, network):
        torch.manual_seed(0)
        network.zero_grad()
        sum(logits.square().mean() for logits in forward(images).values()).backward()
        got.append({name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None})
    assert got[0].keys() == dict(network.named_parameters()).keys()
    if student is not DROPPING:  # dropout draws in another order there
        torch.testing.assert_close(got[0], got[1], rtol=1e-3, atol=1e-5)


@pytest.mark.skipif(not (shutil.which("c++") or shutil.which("g++")), reason="needs a C++ compiler")
def test_compiled_code_trains(dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch._inductor.config.compile_threads", 1)
    small = STUDENT.model_copy(update={"model_kwargs": {"embed_dim": 24, "depth": 1}})
    recipe = {"epochs": 1, "batch_size": 12, "evaluations": 1}
    Case(small, recipe).start(dataset, tmp_path / "plain")
    Case(small, recipe, engine={"compile": True}).start(dataset, tmp_path / "compiled")
    got, wanted = (records(tmp_path / name, "train")[0]["losses"] for name in ("compiled", "plain"))
    assert got == pytest.approx(wanted, rel=1e-3, abs=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_it_trains_and_goes_on_on_a_gpu(precision: str, dataset: Dataset, tmp_path: Path) -> None:
    case = Case(DROPPING, {"ema": 0.9, "accumulate": 2, "clip": 1.0}, MIXED)

    def start(progress: Progress) -> Network:
        engine = Engine(EngineConfig(device="cuda", precision=precision))
        with engine.stops_gently():
            record = Recorder(tmp_path, True, lambda text: None)
            return train(
                case.ready_job(dataset, engine), Checkpoints(tmp_path / "checkpoints"), engine, record, progress
            )

    with pytest.raises(Interrupted):
        start(Stopper(lambda part, step: step == 4).progress)
    network = start(Stopper(never).progress)
    assert next(network.parameters()).is_cuda
    assert len(records(tmp_path, "train")) == 3
