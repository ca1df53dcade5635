from pathlib import Path

import pytest
import torch

from coadvise.config import ModelConfig
from coadvise.data.views import Batch
from coadvise.errors import UserError
from coadvise.networks import Network, build_network
from coadvise.teachers import Teacher, Teachers, load_teachers

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


def test_it_evaluates_without_gradients_from_its_construction_on(network: Network) -> None:
    teacher = Teacher("conv", network, CLASSES)
    assert not any(module.training for module in teacher.modules())
    assert not any(p.requires_grad for p in teacher.parameters())
    logits = teacher(torch.rand(4, 3, 16, 16, requires_grad=True))
    assert not logits.requires_grad
    assert logits.dtype == torch.float32


def test_nothing_puts_it_back_into_training_mode(network: Network) -> None:
    teacher = Teacher("conv", network, CLASSES)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    images = torch.rand(4, 3, 16, 16)
    wanted = teacher(images)
    for call in (teacher.train, torch.nn.ModuleList([teacher]).train, lambda: teacher.train(True), teacher.eval):
        call()
        assert not any(module.training for module in teacher.modules())
        assert torch.equal(teacher(images), wanted)
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_classes_are_put_into_the_student_s_order_by_name(network: Network) -> None:
    images = torch.rand(4, 3, 16, 16)
    own = network.eval()(images)["class"]
    other_order = ("cow", "ant", "bee")
    teacher = Teacher("conv", network, other_order)
    for position, name in enumerate(other_order):
        torch.testing.assert_close(teacher(images)[:, position], own[:, CLASSES.index(name)])
    torch.testing.assert_close(Teacher("conv", network, CLASSES)(images), own)


@pytest.mark.parametrize(
    "classes",
    [("ant", "bee"), ("ant", "bee", "cow", "dog"), ("ant", "bee", "dog"), ("ant", "bee", "bee"), ("1", "2", "3")],
)
def test_other_classes_are_refused(network: Network, classes: tuple[str, ...]) -> None:
    with pytest.raises(
        UserError, match=rf"teacher 'conv' answers for 3 classes \(ant, bee, cow\), the data has {len(classes)}"
    ):
        Teacher("conv", network, classes)


def test_it_uses_its_own_normalisation(network: Network) -> None:
    network = Network(network.model, {**network.about, "mean": [0.9, 0.1, 0.5], "std": [0.7, 0.7, 0.7]}).eval()
    teacher = Teacher("conv", network, CLASSES)
    images = torch.rand(4, 3, 16, 16)
    by_hand = network.model((images - network.mean) / 0.7)
    torch.testing.assert_close(teacher(images), by_hand)
    assert not torch.allclose(teacher(images), network.model(images))


def test_in_bfloat16_it_still_answers_in_float32(network: Network) -> None:
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


def test_teachers_answer_by_token(network: Network, tmp_path: Path) -> None:
    for token, seed in (("conv", 0), ("inv", 1)):
        build_network(CONV, CLASSES, 16, seed=seed).save(tmp_path / token)
    teachers = load_teachers({"conv": tmp_path / "conv", "inv": tmp_path / "inv"}, CLASSES)
    advice = teachers(batch_of(torch.rand(2, 3, 16, 16)))
    assert {name: logits.shape for name, logits in advice.items()} == {"conv": (2, 3), "inv": (2, 3)}
    assert not torch.equal(advice["conv"], advice["inv"])


def test_no_teachers_answer_with_nothing() -> None:
    assert Teachers({})(batch_of(torch.rand(2, 3, 16, 16))) == {}


def test_a_folder_without_a_teacher_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no model in"):
        load_teachers({"conv": tmp_path}, CLASSES)


def test_a_changed_teacher_is_refused(tmp_path: Path) -> None:
    build_network(CONV, CLASSES, 16, seed=0).save(tmp_path / "conv")
    file = tmp_path / "conv" / "model.safetensors"
    damaged = bytearray(file.read_bytes())
    damaged[-1] ^= 1
    file.write_bytes(damaged)
    with pytest.raises(UserError, match=r"model\.safetensors: its contents changed"):
        load_teachers({"conv": tmp_path / "conv"}, CLASSES)
