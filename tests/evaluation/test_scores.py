"""Scores against the plainest possible loop."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file
from sklearn.metrics import confusion_matrix, f1_score, precision_recall_fscore_support, recall_score
from torch import Tensor, nn

from coadvise.config.schema import EngineConfig
from coadvise.data.images import fitted, to_array
from coadvise.data.loader import still_batches
from coadvise.data.scan import scan
from coadvise.data.scanned import ScannedSplit
from coadvise.data.sources import open_source
from coadvise.evaluation.scores import (
    class_scores,
    confusion,
    load_predictions,
    predict_each,
    predict_logits,
    predictions_path,
    save_predictions,
    scores,
    top1,
)
from coadvise.storage import DamagedError
from coadvise.training.engine import Engine


class TwoTokens(nn.Module):
    """Tokens "class" and "conv"; batch norm makes the training mode different."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.layer = nn.BatchNorm1d(3 * 16), nn.Linear(3 * 16, 6)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        values = self.layer(self.norm(images.mean(3).flatten(1)))
        return {"class": values[:, :3], "conv": values[:, 3:]}


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(EngineConfig(device="cpu"))


@pytest.fixture(scope="module")
def val(image_folder: Path) -> ScannedSplit:
    return scan(open_source(image_folder), 16, in_memory=True).val


@pytest.mark.parametrize("training", [True, False])
def test_logits_against_a_loop_over_files(engine: Engine, val: ScannedSplit, training: bool) -> None:
    torch.manual_seed(0)
    network = TwoTokens().train(training)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    logits = predict_logits(network, val, 16, engine)
    half = predict_logits(network, val, 16, Engine(EngineConfig(device="cpu", precision="bfloat16")))
    assert network.training is training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    network.eval()
    for number in range(len(val)):
        image = torch.from_numpy(to_array(fitted(val.picture(number), 16)))[None] / 255
        with torch.no_grad():
            for name, values in network(image).items():
                assert torch.allclose(logits[name][number], values[0], atol=1e-5)
    assert {value.dtype for value in (*logits.values(), *half.values())} == {torch.float32}


def test_untrained_tokens_are_left_out() -> None:
    logits = {"class": torch.eye(4), "conv": -torch.eye(4), "inv": torch.eye(4)}
    assert top1(logits, torch.arange(4), ("class",)) == {"class": 1.0}
    assert top1(logits, torch.arange(4), ("class", "conv")).keys() == {"class", "conv", "average"}


def test_several_networks_answer_for_the_same_images_as_one_by_one(engine: Engine, val: ScannedSplit) -> None:
    torch.manual_seed(0)
    networks = {"a": TwoTokens(), "b": TwoTokens().eval()}
    batches = still_batches(val, 16, batch_size=5)
    together = predict_each(networks, batches, engine)
    assert [network.training for network in networks.values()] == [True, False]
    for part, network in networks.items():
        alone = predict_logits(network, val, 16, engine)
        assert together[part].keys() == alone.keys()
        assert all(torch.allclose(together[part][name], alone[name], atol=1e-6) for name in alone)


@given(st.integers(1, 40), st.integers(2, 12), st.floats(0.1, 4), st.integers(0, 10**6))
def test_scores_against_the_plainest_loop(images: int, classes: int, sharpness: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = {name: sharpness * torch.randn(images, classes, generator=generator) for name in ("class", "conv")}
    labels = torch.randint(classes, (images,), generator=generator)
    found = scores(logits, labels)
    shares = {name: values.double().softmax(-1) for name, values in logits.items()}
    shares["average"] = (shares["class"] + shares["conv"]) / 2
    assert found.keys() == shares.keys()
    for name, rows in shares.items():
        bins: list[list[tuple[float, bool]]] = [[] for _ in range(15)]
        loss = 0.0
        for row, label in zip(rows.tolist(), labels.tolist(), strict=True):
            confidence = max(row)
            bins[math.ceil(confidence * 15) - 1].append((confidence, row.index(confidence) == label))
            loss -= math.log(max(row[label], 1e-300)) / images
        gap = sum(abs(sum(c for c, _ in b) - sum(hit for _, hit in b)) for b in bins) / images
        assert found[name].nll == pytest.approx(loss, rel=1e-4, abs=1e-5)
        assert found[name].ece == pytest.approx(gap, abs=1e-5)
        assert found[name].top1 == pytest.approx(sum(hit for b in bins for _, hit in b) / images)
        assert found[name].top1 == top1(logits, labels, ("class", "conv"))[name]
        best = [sorted(range(classes), key=lambda k: -row[k])[:5] for row in rows.tolist()]
        said = [max(range(classes), key=row.__getitem__) for row in rows.tolist()]
        there = sorted({*labels.tolist()})
        assert found[name].macro_accuracy == pytest.approx(recall_score(labels, said, labels=there, average="macro"))
        assert found[name].macro_f1 == pytest.approx(f1_score(labels, said, labels=there, average="macro"))
        five = sum(label in five for label, five in zip(labels.tolist(), best, strict=True))
        assert found[name].top5 == pytest.approx(five / images)


def test_scores_by_class_are_scikit_learn_s() -> None:
    logits, labels = torch.randn(200, 5, generator=torch.Generator().manual_seed(0)), torch.arange(200) % 4
    counts = confusion(logits, labels)
    assert counts.tolist() == confusion_matrix(labels, logits.argmax(-1), labels=range(5)).tolist()
    wanted = precision_recall_fscore_support(labels, logits.argmax(-1), labels=range(5), zero_division=0)
    for row, precision, recall, f1, images in zip(class_scores(counts), *wanted, strict=True):
        assert (row.images, row.precision, row.recall, row.f1) == pytest.approx((images, precision, recall, f1))


def test_predictions_are_written_and_read_and_damage_is_found(tmp_path: Path) -> None:
    logits = {"class": torch.randn(5, 6).T, "conv": torch.randn(6, 5)}
    labels = torch.arange(6)
    for _ in range(2):
        save_predictions(tmp_path, "students/advised-0", logits, labels)
    read, read_labels = load_predictions(tmp_path, "students/advised-0")
    assert torch.equal(read_labels, labels)
    assert read.keys() == logits.keys()
    assert all(torch.equal(read[name], logits[name]) for name in logits)
    path = predictions_path(tmp_path, "students/advised-0")
    assert list(path.parent.iterdir()) == [path]
    whole = path.read_bytes()
    save_file({**load_file(path)}, path)  # as earlier versions did, without a sum
    assert torch.equal(load_predictions(tmp_path, "students/advised-0")[1], labels)
    for content in (b"", b"\0" * 8, save({"logits.class": torch.ones(1, 2)}), whole[:-1] + bytes([whole[-1] ^ 1])):
        path.write_bytes(content)
        with pytest.raises(DamagedError, match=path.name):
            load_predictions(tmp_path, "students/advised-0")
