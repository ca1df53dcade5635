"""timm's distillation by one token: its loss is Eq. (1) of one teacher and one token, and its student ours in size."""

from pathlib import Path

import pytest
import torch
from benchmarks.one_token import TimmLoss, best_teacher, intervals, lines, pair_of, peer_of, train_peer

from coadvise.advice import Advice, LossWeights
from coadvise.data.views import Batch
from coadvise.distill.loss import co_advise_loss
from coadvise.distill.teachers import Teacher
from coadvise.models.network import load_network
from coadvise.training.listener import Silent


def test_timms_loss_is_eq_1_with_one_teacher_on_one_token(finished: Path) -> None:
    student, name = load_network(finished / "students" / "advised-0"), best_teacher(finished)
    teacher = Teacher(name, load_network(finished / "teachers" / name), student.classes)
    peer = peer_of(student, seed=0).train()
    images, labels = torch.rand(4, 3, 16, 16), torch.rand(4, 3).softmax(1)
    batch = Batch(images, labels, torch.arange(4), 0, {})
    found = TimmLoss(peer, teacher, 0.5, 2.0, 4.0)(peer, batch, {})
    main, distilled = peer(images)["class"]
    expected = co_advise_loss(
        {"class": main, name: distilled}, {name: teacher(images)}, labels, LossWeights(0.5, {name: Advice(2.0, 4.0)})
    )
    torch.testing.assert_close(found["total"], expected["total"])
    hard = TimmLoss(peer, teacher, 0.5, 2.0, 4.0)(peer, Batch(images, torch.tensor([0, 2, 1, 1]), labels, 0, {}), {})
    assert torch.isfinite(hard["total"])
    blocks = [sum(p.numel() for p in network.model.blocks.parameters()) for network in (student, peer)]
    assert blocks[0] == blocks[1]


def test_a_peer_is_trained_and_compared_with_the_students_of_a_run(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    train_peer(finished, out, 0, Silent())
    pair = pair_of(finished, out, 0)
    assert len(pair.pictures) == len(pair.ours) == len(pair.peer) == 12
    over_images, over_pairs, images = intervals([pair])
    assert (over_images.mean, over_pairs, images) == (pytest.approx(pair.gain), None, 12)
    twice, over_pairs, images = intervals([pair, pair])  # a picture that two students were scored on counts once
    assert (twice, images) == (over_images, 12)
    assert over_pairs is not None
    assert any(f"| finished | 0 | {pair.teacher:.1%} |" in line for line in lines([pair]))
