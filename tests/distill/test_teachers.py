"""A teacher's logits: frozen, in float32, in the student's order of classes."""

from functools import partial
from pathlib import Path

import pytest
import torch

from coadvise.config.schema import EngineConfig, ModelConfig
from coadvise.data.views import Batch
from coadvise.distill.teachers import Teacher, Teachers, load_teachers
from coadvise.errors import UserError
from coadvise.models.network import Network, build_network
from coadvise.ops.batch_norm import switched_off
from coadvise.training.engine import Engine

CLASSES = ("ant", "bee", "cow")
CONV = ModelConfig(model="resnet_small", model_kwargs={"widths": [8, 16], "depths": [1, 1], "strides": [2, 2]})
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
    assert all(p.requires_grad for p in network.parameters()), "it is a copy"
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    images = torch.rand(4, 3, 16, 16)
    wanted = teacher(images.requires_grad_())
    assert not wanted.requires_grad
    assert not wanted.is_inference(), "it enters a student's loss"
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


@pytest.mark.parametrize("classes", [("ant", "bee", "cow", "dog"), ("ant", "bee", "dog"), ("ant", "bee", "bee")])
def test_other_classes_are_refused(network: Network, classes: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match=r"teacher 'conv' has 3 classes \(ant, bee, cow\)"):
        Teacher("conv", network, classes)


def test_it_uses_its_own_normalisation(network: Network) -> None:
    network = Network(network.model, {**network.about, "mean": [0.9, 0.1, 0.5], "std": [0.7, 0.7, 0.7]}).eval()
    teacher = Teacher("conv", network, CLASSES)
    images = torch.rand(4, 3, 16, 16)
    by_hand = network.model((images - network.mean) / 0.7)
    torch.testing.assert_close(teacher(images), by_hand)
    assert not torch.allclose(teacher(images), network.model(images))


def test_a_student_can_teach_by_its_class_token() -> None:
    student = build_network(STUDENT, CLASSES, 16, seed=0, tokens=("conv", "inv"))
    teacher = Teacher("vit", student, CLASSES)
    images = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(teacher(images), student.eval()(images)["class"])


def test_it_is_compiled_once_as_one_graph(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled, graphs = torch.compile, []

    def backend(graph: torch.fx.GraphModule, example: object) -> object:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(compiled, backend=backend, fullgraph=True))
    images = torch.rand(4, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    teacher = Teacher("conv", network, CLASSES[::-1])
    plain, asked = (Engine(EngineConfig(device="cpu", precision="bfloat16", compile=c)) for c in (False, True))
    plain.prepare(teacher)
    with plain.autocast(), switched_off():  # batch norm as a compiler sees it
        wanted = teacher(images)
    assert wanted.dtype == torch.float32
    torch.testing.assert_close(wanted, teacher(images), rtol=0.1, atol=0.05)
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


def test_a_missing_teacher_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no model in"):
        load_teachers({"conv": tmp_path}, CLASSES)
