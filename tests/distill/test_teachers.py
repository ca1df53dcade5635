"""A teacher's logits: frozen, in float32, in the student's order of classes."""

from functools import partial
from pathlib import Path
from typing import Literal

import pytest
import torch

from coadvise.config import EngineConfig, ModelConfig
from coadvise.data.views import Batch
from coadvise.distill.loss import advice_divergence
from coadvise.distill.teachers import Teacher, Teachers, load_teachers
from coadvise.errors import UserError
from coadvise.models.network import Network, build_network
from coadvise.training.engine import Engine

CLASSES = ("ant", "bee", "cow")
CONV = ModelConfig(model="resnet_small", model_kwargs={"widths": [8, 16], "depths": [1, 1], "strides": [2, 2]})
INV = ModelConfig(model="rednet_small", model_kwargs={"widths": [64], "depths": [1], "strides": [2], "kernel_size": 3})
STUDENT = ModelConfig(model="cit_micro_patch4_32", model_kwargs={"embed_dim": 24, "depth": 1, "drop_rate": 0.5})


@pytest.fixture
def network() -> Network:
    network = build_network(CONV, CLASSES, 16, seed=0)
    for _ in range(3):
        network(torch.rand(8, 3, 16, 16))
    return network.train()


def batch_of(images: torch.Tensor) -> Batch:
    return Batch(images, torch.zeros(len(images), dtype=torch.int64), torch.arange(len(images)), 0)


def test_it_stays_in_evaluation_mode_without_gradients(network: Network) -> None:
    teacher = Teacher("conv", network, CLASSES)
    assert not any(p.requires_grad for p in teacher.parameters())
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    images = torch.rand(4, 3, 16, 16)
    wanted = teacher(images.requires_grad_())
    assert not wanted.requires_grad
    assert wanted.dtype == torch.float32
    for call in (teacher.train, torch.nn.ModuleList([teacher]).train, lambda: teacher.train(True), teacher.eval):
        call()
        assert not any(module.training for module in teacher.modules())
        assert torch.equal(teacher(images), wanted)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_classes_are_mapped_to_the_student_s_by_name(network: Network) -> None:
    images = torch.rand(4, 3, 16, 16)
    own = network.eval()(images)["class"]
    other_order = ("cow", "ant", "bee")
    teacher = Teacher("conv", network, other_order)
    for position, name in enumerate(other_order):
        torch.testing.assert_close(teacher(images)[:, position], own[:, CLASSES.index(name)])
    torch.testing.assert_close(Teacher("conv", network, CLASSES)(images), own)
    torch.testing.assert_close(Teacher("conv", network, ("cow", "ant"))(images), own[:, [2, 0]])
    assert not torch.allclose(own[:, 0], own[:, 2])


@pytest.mark.parametrize(
    "classes",
    [("ant", "bee", "cow", "dog"), ("ant", "bee", "dog"), ("ant", "bee", "bee")],
)
def test_other_classes_are_refused(network: Network, classes: tuple[str, ...]) -> None:
    with pytest.raises(
        UserError, match=rf"teacher 'conv' has 3 classes \(ant, bee, cow\), the data has {len(classes)}"
    ):
        Teacher("conv", network, classes)


def test_it_uses_its_own_normalisation(network: Network) -> None:
    network = Network(network.model, {**network.about, "mean": [0.9, 0.1, 0.5], "std": [0.7, 0.7, 0.7]}).eval()
    teacher = Teacher("conv", network, CLASSES)
    images = torch.rand(4, 3, 16, 16)
    by_hand = network.model((images - network.mean) / 0.7)
    torch.testing.assert_close(teacher(images), by_hand)
    assert not torch.allclose(teacher(images), network.model(images))


def test_its_logits_are_float32_under_autocast_too(network: Network) -> None:
    teacher = Teacher("conv", network, CLASSES)
    images = torch.rand(4, 3, 16, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = teacher(images)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, teacher(images), rtol=0.1, atol=0.05)


def test_a_student_can_teach_by_its_class_token() -> None:
    student = build_network(STUDENT, CLASSES, 16, seed=0, tokens=("conv", "inv"))
    teacher = Teacher("vit", student, CLASSES)
    images = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(teacher(images), student.eval()(images)["class"])


@pytest.mark.parametrize("config", [CONV, INV], ids=["conv", "inv"])
def test_it_gives_the_logits_of_its_network(config: ModelConfig) -> None:
    network = build_network(config, CLASSES, 16, seed=0)
    for _ in range(3):
        network(torch.rand(8, 3, 16, 16) * 2)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    teacher = Teacher("conv", network, CLASSES)
    images = torch.rand(4, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(teacher(images), network.eval()(images)["class"], rtol=1e-5, atol=1e-5)
    assert _norms(teacher) < _norms(network)
    assert teacher.network.about == network.about
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(p.requires_grad for p in network.parameters())


def _norms(module: torch.nn.Module) -> int:
    return sum(isinstance(part, torch.nn.BatchNorm2d) for part in module.modules())


def test_its_logits_enter_a_student_s_loss(network: Network) -> None:
    logits = Teacher("conv", network, CLASSES)(torch.rand(4, 3, 16, 16))
    assert not logits.is_inference()
    student = torch.randn(4, 3, requires_grad=True)
    advice_divergence(student, logits).backward()
    wanted = (student.softmax(-1) - logits.softmax(-1)) / 4
    assert student.grad is not None
    torch.testing.assert_close(student.grad, wanted.detach())


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_it_is_compiled_once_as_one_graph(
    precision: Literal["float32", "bfloat16"], network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled, graphs = torch.compile, []

    def backend(graph: torch.fx.GraphModule, example: object) -> object:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(compiled, backend=backend, fullgraph=True))
    images = torch.rand(4, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    teacher = Teacher("conv", network, CLASSES[::-1])
    plain, asked = (Engine(EngineConfig(device="cpu", precision=precision, compile=c)) for c in (False, True))
    plain.prepare(teacher)
    with plain.autocast():
        wanted = teacher(images)
    assert not graphs
    for _ in range(2):  # a run prepares its teachers for each student
        asked.prepare(teacher)
        with asked.autocast():
            torch.testing.assert_close(teacher(images), wanted)
    assert len(graphs) == 1
    assert isinstance(teacher, Teacher)


def test_teachers_give_logits_by_name(network: Network, tmp_path: Path) -> None:
    for token, seed in (("conv", 0), ("inv", 1)):
        build_network(CONV, CLASSES, 16, seed=seed).save(tmp_path / token)
    teachers = load_teachers({"conv": tmp_path / "conv", "inv": tmp_path / "inv"}, CLASSES)
    advice = teachers(batch_of(torch.rand(2, 3, 16, 16)))
    assert {name: logits.shape for name, logits in advice.items()} == {"conv": (2, 3), "inv": (2, 3)}
    assert not torch.equal(advice["conv"], advice["inv"])
    assert Teachers({})(batch_of(torch.rand(2, 3, 16, 16))) == {}


def test_a_changed_or_missing_teacher_is_refused(tmp_path: Path) -> None:
    build_network(CONV, CLASSES, 16, seed=0).save(tmp_path / "conv")
    file = tmp_path / "conv" / "model.safetensors"
    damaged = bytearray(file.read_bytes())
    damaged[-1] ^= 1
    file.write_bytes(damaged)
    with pytest.raises(UserError, match=r"model\.safetensors: its contents changed"):
        load_teachers({"conv": tmp_path / "conv"}, CLASSES)
    with pytest.raises(UserError, match="no model in"):
        load_teachers({"conv": tmp_path}, CLASSES)
