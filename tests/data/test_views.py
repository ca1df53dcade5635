"""Views are pure functions of (seed, epoch, position), and look as the configuration says."""

import hashlib
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import EVERYTHING, NOTHING, files, joined, made_split, made_views, same
from tiny import make_images
from torch import Tensor

from coadvise.config.schema import AugmentConfig, ImageSize, sides
from coadvise.data import draws
from coadvise.data import views as views_module
from coadvise.data.scan import scan, scan_split
from coadvise.data.scanned import ScannedSplit
from coadvise.data.sources import open_source
from coadvise.data.views import VIEWS, Views, light_views
from coadvise.errors import UserError

DEIT = AugmentConfig(kind="deit", erase=0.3, mixup=0.8, cutmix=1.0, smoothing=0.1)
AUGMENTS = {
    "none": NOTHING,
    "light": AugmentConfig(),
    "turned": AugmentConfig(zoom=0.3, rotate=30),
    "coloured": AugmentConfig(colour=0.4),
    "erased": AugmentConfig(kind="none", erase=0.7),
    "mixup": AugmentConfig(kind="none", mixup=0.2),
    "cutmix": AugmentConfig(kind="none", cutmix=1.0),
    "everything": EVERYTHING,
}
seeds = st.integers(0, 2**31 - 1)


@pytest.fixture(scope="module")
def on_disk(image_folder: Path) -> ScannedSplit:
    return scan(open_source(image_folder), 16, in_memory=False).train


@pytest.mark.parametrize("name", AUGMENTS)
@given(seed=seeds, epoch=st.integers(0, 1000), images=st.integers(1, 17), data=st.data())
def test_views_do_not_depend_on_batch_layout(
    name: str, seed: int, epoch: int, images: int, data: st.DataObject
) -> None:
    size = data.draw(st.sampled_from([12, (8, 13)]))
    views = made_views(images, AUGMENTS[name], size, seed=seed)
    whole = views[epoch, np.arange(images)]
    assert whole.images.shape == (images, 3, *sides(size))
    assert sorted(whole.index.tolist()) == list(range(images))
    cuts = sorted(data.draw(st.sets(st.integers(1, images - 1), max_size=4))) if images > 1 else []
    again = made_views(images, AUGMENTS[name], size, seed=seed)  # another object, as in another process
    assert same(joined(again[epoch, part] for part in np.split(np.arange(images), cuts)), whole)
    scattered = np.array(data.draw(st.lists(st.integers(0, images - 1), min_size=1, max_size=6)))
    some = again[epoch, scattered]
    assert torch.equal(some.images, whole.images[scattered])
    assert torch.equal(some.labels, whole.labels[scattered])


@pytest.mark.parametrize("name", [name for name in AUGMENTS if name != "none"])
def test_another_seed_or_epoch_gives_other_views(name: str) -> None:
    by_image = []
    for seed, epoch in ((0, 0), (1, 0), (0, 1)):
        batch = made_views(24, AUGMENTS[name], seed=seed)[epoch, np.arange(24)]
        by_image.append(batch.images[batch.index.argsort()])
    for other in by_image[1:]:
        changed = (other != by_image[0]).flatten(1).any(1)
        assert changed.float().mean() > 0.5


@pytest.mark.parametrize("name", AUGMENTS)
@given(recycle=st.integers(1, 9), epoch=st.integers(0, 100))
def test_recycled_epochs_are_earlier_ones_again(name: str, recycle: int, epoch: int) -> None:
    endless, again = (
        made_views(9, AUGMENTS[name].model_copy(update={"recycle": times}), seed=2) for times in (0, recycle)
    )
    positions = np.arange(9)
    assert np.array_equal(again.order(epoch), endless.order(epoch % recycle))
    assert same(again[epoch, positions], endless[epoch % recycle, positions]), "and say which epoch's they are"


def test_views_are_those_of_their_version() -> None:
    """Caches hold logits for views by number: views that look otherwise need another `VIEWS`, and a new sum here."""
    whole = hashlib.sha256()
    for seed, epoch in ((0, 0), (7, 3)):
        batch = made_views(33, AugmentConfig(shift=0.2, cutmix=1.0, erase=0.5), seed=seed)[epoch, np.arange(33)]
        whole.update(batch.index.numpy().tobytes())
        whole.update(batch.images.mul(255).round().to(torch.int16).numpy().tobytes())
    assert (VIEWS, whole.hexdigest()[:16]) == (1, "60d985060cd817f8")
    # What blends pixels is rounded as the processor does it; each number has a weight of its own.
    batch = made_views(33, EVERYTHING, seed=1)[2, np.arange(33)]
    rng = np.random.default_rng(0)
    sums = [float((torch.from_numpy(rng.random(part.shape)) * part).sum()) for part in (batch.images, batch.labels)]
    assert sums == pytest.approx([3396.66404, 15.5439467], rel=1e-6)


def test_without_augmentation_the_view_is_the_image() -> None:
    split = made_split(10)
    for augment in (NOTHING, AugmentConfig(flip=False, shift=0)):
        batch = Views(split, augment, 3, 12, 0)[2, np.arange(10)]
        assert torch.equal(batch.images, torch.from_numpy(split.pixels[batch.index]).float() / 255)
        assert batch.labels.tolist() == (batch.index % 3).tolist()
        assert batch.labels.dtype == batch.index.dtype == torch.int64
        assert batch.images.dtype == torch.float32


def test_pixels_in_memory_and_on_disk_give_the_same_views(image_folder: Path, on_disk: ScannedSplit) -> None:
    in_memory = scan(open_source(image_folder), 16, in_memory=True).train
    positions = np.arange(len(on_disk))
    for augment in (NOTHING, EVERYTHING):
        assert same(Views(in_memory, augment, 3, 16, 5)[3, positions], Views(on_disk, augment, 3, 16, 5)[3, positions])


# light --------------------------------------------------------------------------------------------------------------


def test_shifts_are_whole_pixels_over_mirrored_borders_and_all_equally_likely() -> None:
    split = made_split(1500, size=8)
    batch = Views(split, AugmentConfig(flip=False, shift=0.25), 3, 8, 0)[0, np.arange(1500)]
    found: Counter[tuple[int, int]] = Counter()
    for image, index in zip(batch.images, batch.index, strict=True):
        padded = np.pad(split.pixels[index], ((0, 0), (2, 2), (2, 2)), mode="symmetric").astype(np.float32) / 255
        fits = [
            (y, x) for y in range(5) for x in range(5) if np.array_equal(padded[:, y : y + 8, x : x + 8], image.numpy())
        ]
        assert len(fits) == 1
        found.update(fits)
    along = np.zeros((5, 5))
    for place, count in found.items():
        along[place] = count / 1500
    # Rounding gives the outermost of the five steps half the share of the others.
    expected = np.outer([1, 2, 2, 2, 1], [1, 2, 2, 2, 1]) / 64
    assert np.abs(along - expected).max() < 5 * np.sqrt(expected / 1500).max()


def centred(rows: int = 1) -> draws.Array:
    """Draws in the middle of their ranges: nothing is changed."""
    return np.full((rows, 9), 0.5)


def test_turning_by_a_right_angle_is_exact() -> None:
    images = torch.rand(2, 3, 9, 9)
    u = centred(2)
    u[:, 2] = 0.75, 0.25  # half of the range either way
    turned = light_views(images, AugmentConfig(flip=False, shift=0, rotate=180), u)
    assert torch.allclose(turned[0], images[0].rot90(1, (1, 2)), atol=1e-5)
    assert torch.allclose(turned[1], images[1].rot90(-1, (1, 2)), atol=1e-5)


@given(st.floats(0, 180), st.sampled_from([(20, 20), (20, 44), (44, 20)]))
def test_a_disc_stays_a_disc_whatever_the_shape_of_the_image(degrees: float, size: tuple[int, int]) -> None:
    rows, columns = (torch.arange(side) - (side - 1) / 2 for side in size)
    away = rows[:, None] ** 2 + columns**2
    disc = (-away / 18).exp().expand(1, 3, -1, -1).contiguous()
    u = centred()
    u[:, 2] = 1
    turned = light_views(disc, AugmentConfig(flip=False, shift=0, rotate=degrees), u)
    assert (turned - disc)[..., away < 81].abs().max() < 0.06  # what the interpolation blurs; further out is mirrored


def test_shifts_are_shares_of_each_side() -> None:
    images, u = torch.rand(1, 3, 10, 40), centred()
    u[:, 3:5] = 1, 1  # to the left and up, as far as possible
    moved = light_views(images, AugmentConfig(flip=False, shift=0.1), u)
    assert torch.equal(moved[:, :, :9, :36], images[:, :, 1:, 4:])


@given(seeds, st.floats(0, 0.5), st.floats(0, 0.9), st.floats(0, 180))
def test_light_views_stay_within_range(seed: int, shift: float, zoom: float, rotate: float) -> None:
    u = draws.uniforms(seed, draws.GEOMETRY, 0, np.arange(4), 9)
    images = torch.rand(4, 3, 10, 10, generator=torch.Generator().manual_seed(seed))
    moved = light_views(images, AugmentConfig(shift=shift, zoom=zoom, rotate=rotate), u)
    assert moved.min() >= images.min() - 1e-5
    assert moved.max() <= images.max() + 1e-5


def test_brightness_contrast_and_saturation() -> None:
    images = torch.rand(1, 3, 8, 8) / 2 + 0.1
    still = AugmentConfig(flip=False, shift=0, colour=0.2)
    mean, grey = images.mean(), images.mean(1, keepdim=True)
    expected = {5: images * 1.2, 6: mean + 1.2 * (images - mean), 7: grey + 1.2 * (images - grey)}
    for column, image in expected.items():
        u = centred()
        u[:, column] = 1
        assert torch.allclose(light_views(images, still, u), image.clamp(0, 1), atol=1e-5)


# erasing ------------------------------------------------------------------------------------------------------------


def erased(probability: float, images: int, size: ImageSize, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Views and a mask [N, H, W] of what was erased from images that are 0 all over."""
    split = made_split(images, size)
    split.pixels[:] = 0
    batch = Views(split, AugmentConfig(kind="none", erase=probability), 3, size, seed)[0, np.arange(images)]
    return batch.images, (batch.images != 0).any(1)


@given(seeds, st.integers(4, 40), st.integers(4, 40))
def test_what_is_erased_is_one_rectangle_inside_the_image(seed: int, tall: int, wide: int) -> None:
    _, mask = erased(1.0, 6, (tall, wide), seed)
    for one in mask:
        rows, columns = one.any(1).nonzero()[:, 0], one.any(0).nonzero()[:, 0]
        height, width = len(rows), len(columns)
        assert one.sum() == height * width
        assert rows[-1] - rows[0] + 1 == height
        assert columns[-1] - columns[0] + 1 == width
        assert height < tall
        assert width < wide
        assert (height - 0.5) * (width - 0.5) <= tall * wide / 3
        least = min((height + 0.5) * (width + 0.5), (height + 0.5) * wide, (width + 0.5) * tall)
        assert least >= 0.02 * tall * wide


def test_how_often_how_much_and_with_what_is_erased() -> None:
    views, mask = erased(0.3, 2000, 32)
    hit = mask.flatten(1).any(1)
    assert abs(hit.float().mean() - 0.3) < 4 * (0.3 * 0.7 / 2000) ** 0.5
    area = mask[hit].float().mean((1, 2))
    assert abs(area.mean() - (0.02 + 1 / 3) / 2) < 0.02
    place = mask[hit].float().mean(0)  # up and down, left and right, equally often
    assert (place - place.flip(0)).abs().max() < 0.15
    assert (place - place.T).abs().max() < 0.15
    noise = views.movedim(1, -1)[mask]
    assert torch.allclose(noise.mean(0), torch.tensor([0.485, 0.456, 0.406]), atol=0.01)
    assert torch.allclose(noise.std(0), torch.tensor([0.229, 0.224, 0.225]), atol=0.01)


# mixing -------------------------------------------------------------------------------------------------------------


def numbered(images: int, augment: AugmentConfig, size: ImageSize = 16, seed: int = 0) -> Views:
    """Image n is n + 1 all over (before division by 255) and of class n, so a view's pixels tell whose they are."""
    split = made_split(images, size, classes=images)
    split.pixels[:] = (np.arange(images) + 1)[:, None, None, None]
    return Views(split, augment, images, size, seed)


@given(seeds, st.integers(1, 12), st.floats(0.1, 4), st.floats(0, 1))
def test_cutmix_labels_are_the_shares_of_pixels(seed: int, images: int, alpha: float, probability: float) -> None:
    augment = AugmentConfig(kind="none", cutmix=alpha, mix_probability=probability)
    views = numbered(images, augment, 16 if seed % 2 else (9, 31), seed)
    batch = views[1, np.arange(images)]
    owner = (batch.images[:, 0] * 255).round().long() - 1
    share = F.one_hot(owner.flatten(1), images).float().mean(1)
    assert torch.allclose(batch.labels, share, atol=1e-6)
    assert torch.equal(batch.images[:, 0], (owner + 1).float() / 255)  # nothing is blended
    other = (owner != batch.index[:, None, None]).int()  # and what is not the image's own is one box
    assert torch.equal(other, other.amax(1, keepdim=True) * other.amax(2, keepdim=True))


@given(seeds, st.integers(1, 12), st.floats(0.1, 4), st.floats(0, 1))
def test_mixup_labels_are_the_shares_of_light(seed: int, images: int, alpha: float, probability: float) -> None:
    views = numbered(images, AugmentConfig(kind="none", mixup=alpha, mix_probability=probability), seed=seed)
    batch = views[1, np.arange(images)]
    expected = batch.labels @ torch.arange(1, images + 1).float() / 255
    assert torch.allclose(batch.images, expected[:, None, None, None].expand_as(batch.images), atol=1e-6)


@given(seed=seeds, images=st.integers(1, 15))
def test_mixed_labels_are_distributions_over_two_neighbours(seed: int, images: int) -> None:
    augment = EVERYTHING.model_copy(update={"smoothing": 0.0})
    labels = numbered(images, augment, seed=seed)[0, np.arange(images)].labels
    assert torch.allclose(labels.sum(1), torch.ones(images), atol=1e-6)
    assert (labels >= 0).all()
    order = numbered(images, NOTHING, seed=seed).order(0)
    for position, row in enumerate(labels):
        partner = position ^ 1 if position ^ 1 < images else position  # the last of an odd number is left alone
        assert set(row.nonzero()[:, 0].tolist()) <= {order[position], order[partner]}


def test_smoothing_is_pytorchs() -> None:
    batch = made_views(9, AugmentConfig(kind="none", smoothing=0.2))[0, np.arange(9)]
    logits = torch.randn(9, 3)
    expected = F.cross_entropy(logits, batch.index % 3, label_smoothing=0.2)
    assert F.cross_entropy(logits, batch.labels) == pytest.approx(expected.item(), rel=1e-6)


# deit ---------------------------------------------------------------------------------------------------------------


def global_state() -> str:
    name, keys, *rest = np.random.get_state()
    return repr((random.getstate(), name, keys.tolist(), rest, torch.get_rng_state().tolist()))


def test_deit_views_neither_disturb_nor_heed_global_random_state(on_disk: ScannedSplit, tmp_path: Path) -> None:
    lost = ScannedSplit(split := files(tmp_path / "gone.png"), split.labels, None, (), Counter())
    results = []
    for seed in (1, 2):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        before = global_state()
        results.append(Views(on_disk, DEIT, 3, 16, 0)[4, np.arange(8)])
        with pytest.raises(ValueError, match=r"gone\.png"):
            Views(lost, DEIT, 3, 16, 0)[0, np.arange(1)]
        assert global_state() == before
    assert same(*results)
    assert not torch.equal(Views(on_disk, DEIT, 3, 16, 0)[5, np.arange(8)].images, results[0].images)


# where views are made -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", AUGMENTS)
def test_all_of_a_view_is_made_where_the_pixels_are(name: str) -> None:
    """On the meta device, which has shapes only, so any tensor of the CPU's that gets mixed in is an error."""
    views = made_views(9, AUGMENTS[name])
    expected = views[0, np.arange(6)]
    assert same(views.resident(torch.device("cpu"))[0, np.arange(6)], expected)
    batch = views.resident(torch.device("meta"))[0, np.arange(6)]
    assert batch.images.device == batch.labels.device == torch.device("meta")
    assert torch.equal(batch.index, expected.index)
    for got, wanted in ((batch.images, expected.images), (batch.labels, expected.labels)):
        assert (got.shape, got.dtype) == (wanted.shape, wanted.dtype)


def test_without_a_cuda_device_views_stay_where_they_are(on_disk: ScannedSplit) -> None:
    views = made_views(4, NOTHING)
    assert views.on(torch.device("cpu")) is views
    assert Views(on_disk, DEIT, 3, 16, 0).on(torch.device("cuda")).device.type == "cpu"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", AUGMENTS)
def test_a_cuda_device_makes_the_cpu_s_views_up_to_rounding(name: str) -> None:
    views = made_views(64, AUGMENTS[name], size=32)
    there = views.on(torch.device("cuda"))[1, np.arange(64)]
    here = views[1, np.arange(64)]
    assert there.images.device.type == there.labels.device.type == "cuda"
    assert torch.allclose(there.images.cpu(), here.images, atol=1e-4)
    assert torch.allclose(there.labels.cpu().double(), here.labels.double(), atol=1e-6)


# files that disappear ------------------------------------------------------------------------------------------------


def vanishing(folder: Path, lost: set[int]) -> ScannedSplit:
    """Twelve image files of which some were lost after the scan, for different reasons."""
    paths = sorted(make_images(folder, train=4, val=0, size=12).rglob("*.png"))
    split = scan_split(files(*paths, labels=[n % 3 for n in range(12)]), 12, in_memory=False)
    for number in lost:
        path = Path(split.name(number))
        content = path.read_bytes()
        path.unlink()
        if number % 3 == 1:
            path.write_bytes(content[:40])
        elif number % 3 == 2:
            path.write_bytes(b"<!DOCTYPE html><html>503</html>")
    return split


@pytest.mark.parametrize("augment", [NOTHING, EVERYTHING, DEIT], ids=["none", "light", "deit"])
@settings(max_examples=8)
@given(lost=st.sets(st.integers(0, 11), min_size=1, max_size=8), epoch=st.integers(0, 100), data=st.data())
def test_another_training_image_s_own_view_stands_where_a_file_is_lost(
    tmp_path_factory: pytest.TempPathFactory, augment: AugmentConfig, lost: set[int], epoch: int, data: st.DataObject
) -> None:
    split = vanishing(tmp_path_factory.mktemp("vanishing"), lost)
    views = Views(split, augment, 3, 12, 5)
    batch = views[epoch, np.arange(12)]
    order = views.order(epoch)
    stand_in = [next(i % 12 for i in range(n, n + 12) if i % 12 not in lost) for n in range(12)]
    assert batch.index.tolist() == [stand_in[number] for number in order]
    assert set(batch.unreadable) == lost
    for number, line in batch.unreadable.items():
        assert line.startswith(f"{split.name(number)!r}: ")

    # Whatever batches it is asked for in, here or in another process, it is the same.
    cuts = sorted(data.draw(st.sets(st.integers(1, 11), max_size=3)))
    again = Views(split, augment, 3, 12, 5)
    assert same(joined(again[epoch, part] for part in np.split(np.arange(12), cuts)), batch)

    # Unmixed, a view that stands in is the very view that its image has of its own in that epoch.
    alone = augment.model_copy(update={"mixup": 0.0, "cutmix": 0.0, "smoothing": 0.0})
    unmixed = Views(split, alone, 3, 12, 5)[epoch, np.arange(12)]
    own = {int(i): view for i, view, n in zip(unmixed.index, unmixed.images, order, strict=True) if int(n) == int(i)}
    for i, view, label in zip(unmixed.index.tolist(), unmixed.images, unmixed.labels.tolist(), strict=True):
        assert torch.equal(view, own[i])
        assert label == i % 3


def test_a_disk_that_has_gone_is_not_searched_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split = vanishing(tmp_path, set(range(12)))
    monkeypatch.setattr(views_module, "MOST_SKIPPED", 5)
    with pytest.raises(UserError, match=r"5 training images in a row.*png"):
        Views(split, NOTHING, 3, 12, 0)[0, np.arange(3)]


def test_very_many_pictures_have_an_order_that_is_not_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draws, "LARGE", 8)
    views = made_views(9, AUGMENTS["mixup"], seed=2)
    rows = [views.request(1, np.array([place])).rows[0] for place in range(9)]
    assert sorted(rows) == list(range(9))
    assert np.array_equal(rows, draws.shuffled(2, draws.ORDER, 1, 9, np.arange(9)))
    views[1, np.arange(9)]
    assert views._order[0] == -1, "no order was made"
