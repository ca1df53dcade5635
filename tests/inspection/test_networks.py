"""Features by networks: what the classifier is given, of a run's teachers, a file or a folder."""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from coadvise.errors import UserError
from coadvise.inspection.check import check
from coadvise.inspection.networks import network_named, teachers_of
from coadvise.models.network import load_network

IMAGES = np.random.default_rng(0).integers(0, 256, (5, 3, 16, 16), dtype=np.uint8)


def test_teachers_give_what_their_classifiers_are_given(finished: Path) -> None:
    features = teachers_of(finished)
    assert (features.image_size, features.what) == (16, f"features of the teachers conv and inv of '{finished}'")
    for name, got in zip(("conv", "inv"), features(IMAGES), strict=True):
        network = load_network(finished / "teachers" / name)
        x = (torch.from_numpy(IMAGES).float() / 255 - network.mean) / network.std
        with torch.no_grad():
            wanted = network.model.forward_head(network.model.forward_features(x), pre_logits=True)
        np.testing.assert_allclose(got, wanted.numpy(), rtol=1e-4, atol=1e-5)


def test_a_run_s_teachers_judge_labels(finished: Path, tiny_images: Path) -> None:
    found = check(tiny_images, run=finished)
    assert found.predictor == "predictions by the run's teachers"
    assert "features of the teachers conv and inv" in found.remark
    assert "learned wrong ones by heart" in found.remark
    assert len(found.pictures.features) == 2
    assert len(found.doubts.ranking) == 36


def test_a_folder_and_a_file_named_after_its_model(finished: Path, tmp_path: Path) -> None:
    (folder,) = network_named(str(finished / "teachers" / "conv"))(IMAGES)
    np.testing.assert_allclose(folder, teachers_of(finished)(IMAGES)[0])
    model = timm.create_model("mobilenetv3_small_050", num_classes=1000)
    save_file(model.state_dict(), tmp_path / "mobilenetv3_small_050-1a2b.safetensors")
    network = network_named(str(tmp_path / "mobilenetv3_small_050-1a2b.safetensors"))
    assert network.image_size == 224
    (got,) = network(IMAGES.repeat(4, 2).repeat(4, 3))
    assert got.shape == (5, 1024)


def test_what_is_no_network_is_refused(finished: Path, tiny_images: Path, tmp_path: Path) -> None:
    (tmp_path / "weights.pth").write_bytes(b"")
    with pytest.raises(UserError, match=r"no model 'weights'.*resnet18.safetensors"):
        network_named(str(tmp_path / "weights.pth"))
    with pytest.raises(UserError, match="no such file or folder"):
        network_named("nowhere")
    with pytest.raises(UserError, match="no run directory"):
        teachers_of(tmp_path)
    with pytest.raises(UserError, match="give one of them"):
        check(tiny_images, run=finished, features="resnet18")
