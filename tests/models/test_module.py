"""Teachers that are plain modules of Python, used as they are or adapted."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import records, run_program
from torch import Tensor, nn

from coadvise import UserError, fit
from coadvise.data.images import read_image
from coadvise.evaluation.scores import load_predictions
from coadvise.models.network import load_network
from coadvise.models.staged import IMAGENET_MEAN, IMAGENET_STD

FEW = ["student.recipe.epochs=1", "teachers.inv.recipe.epochs=1"]


class Plain(nn.Module):
    """Knows nothing of timm; the mean colours, and from them some numbers."""

    def __init__(self, outputs: int, pooled: bool = True) -> None:
        super().__init__()
        torch.manual_seed(outputs)
        self.layer, self.pooled = nn.Conv2d(3, outputs, 1), pooled

    def forward(self, images: Tensor) -> Tensor:
        seen = self.layer(images)
        return seen.mean(dim=(2, 3)) if self.pooled else seen


def test_a_module_that_knows_the_classes_advises_as_it_is(tiny_images: Path, tiny_preset: str, tmp_path: Path) -> None:
    teacher = Plain(3)
    run = fit(tiny_images, tiny_preset, tmp_path / "run", teachers={"conv": teacher}, overrides=FEW, baseline=True)
    logits, _ = load_predictions(run, "teachers/conv")
    first = sorted((tiny_images / "val" / "blue").iterdir())[0]
    pixels = torch.from_numpy(np.array(read_image(first))).permute(2, 0, 1)[None] / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    torch.testing.assert_close(logits["class"][:1], teacher((pixels - mean) / std).detach())
    rows = [row["name"] for row in records(run, "verdict")[-1]["rows"]]
    assert rows[0] == "conv teacher (given)"
    again = fit(tiny_images, tiny_preset, run, teachers={"conv": Plain(3)}, overrides=FEW, baseline=True)
    assert again == run, "equal weights are the same teacher"
    with torch.no_grad():
        teacher.layer.bias += 1
    with pytest.raises(UserError, match=r"teachers.conv.start: python_Plain_.* -> python_Plain_"):
        fit(tiny_images, tiny_preset, run, teachers={"conv": teacher}, overrides=FEW, baseline=True)


@pytest.mark.parametrize("adapt", ["probe", "finetune"])
def test_a_module_that_answers_features_learns_the_classes(
    adapt: str, tiny_images: Path, tiny_preset: str, tmp_path: Path
) -> None:
    teacher = Plain(5, pooled=False)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    overrides = [*FEW, f"teachers.conv.adapt={adapt}", "teachers.conv.finetune.epochs=2"]
    overrides.append("teachers.conv.finetune.batch_size=8")
    run = fit(tiny_images, tiny_preset, tmp_path / "run", teachers={"conv": teacher}, overrides=overrides)
    learned = load_network(run / "teachers" / "conv")
    head = learned.model.get_submodule("head")
    assert isinstance(head, nn.Linear)
    assert (head.in_features, head.out_features) == (5, 3)
    same = [torch.equal(learned.model.state_dict()[f"body.{name}"], value) for name, value in before.items()]
    assert same == [adapt == "probe"] * 2
    assert all(torch.equal(teacher.state_dict()[name], value) for name, value in before.items()), "the user's own stays"


def test_without_its_code_a_module_is_left_out_and_named(tiny_images: Path, tiny_preset: str, tmp_path: Path) -> None:
    run = fit(tiny_images, tiny_preset, tmp_path / "run", teachers={"conv": Plain(3)}, overrides=FEW)
    done = run_program("evaluate", run, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "teachers/conv is left out: 'python_Plain_" in " ".join(done.stderr.split())
    assert "students/advised-0" in done.stdout
    done = run_program("predict", run, tiny_images / "val" / "red", "--part", "teachers/conv", cwd=tmp_path)
    assert done.returncode == 2
    assert "a run keeps its weights and not its code: give it again" in done.stderr
    start = f"teachers.conv.start={load_network(run / 'teachers' / 'conv').about['model']}"
    done = run_program("fit", tiny_images, start, "--preset", tiny_preset, "--out", tmp_path / "other", cwd=tmp_path)
    assert (done.returncode, (tmp_path / "other").exists()) == (2, False)


@pytest.mark.parametrize(
    ("teacher", "options", "said"),
    [
        (Plain(4), {}, r"'conv' \(Plain\) answers 4 numbers an image, the data have 3 classes; .* blue, green, red"),
        (nn.Linear(2, 3), {}, r"'conv' \(Linear\) fails on images \[2, 3, 16, 16\]: "),
        (nn.Flatten(0), {}, r"answers \[1536\]; give a module that answers logits or features \[B, N\]"),
        (Plain(3), {"jobs": 2}, "jobs=2: teachers given as modules are only known to this process"),
    ],
)  # fmt: skip
def test_a_module_that_cannot_advise_is_named_and_nothing_is_written(
    teacher: nn.Module, options: dict[str, int], said: str, tiny_images: Path, tiny_preset: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=said):
        fit(tiny_images, tiny_preset, tmp_path / "run", teachers={"conv": teacher}, **options)
    assert not (tmp_path / "run").exists()
