"""Bytes on disks and on the network: the store, a logit cache, checkpoints, and what processes send in a step."""

from dataclasses import dataclass

from coadvise.config.schema import CacheConfig, RunConfig, sides
from coadvise.costs.count import Counted
from coadvise.data.store import presized_size, table_bytes
from coadvise.distill.logit_cache import Form
from coadvise.training.checkpoint import KEEP

SHAPE = (400, 300)  # whose width and height have the ratio of a usual photograph
NODE_NETWORK = 12.5e9  # bytes a second between nodes where nothing is said: 100 Gbit/s


@dataclass(frozen=True)
class Disk:
    """Bytes on disks.

    Attributes:
        store: of what the scan found of the training pictures, and of their pixels where they are kept.
        cache: of all teachers' logits for all views, if `--cache` is given; 0 where balance forbids one.
        cache_epoch: those of one epoch, which each process that learns from them holds in memory.
        checkpoints: of the network with the largest ones, while one is written.
    """

    store: int
    cache: int
    cache_epoch: int
    checkpoints: int


def store_bytes(config: RunConfig, images: int) -> int:
    """The store of the training pictures, as photographs of three by four are presized."""
    if config.in_memory:
        height, width = sides(config.data.image_size)
        pixels = height * width
    else:
        width, height = presized_size(SHAPE, config.data.presize) if config.data.presize < min(SHAPE) else SHAPE
        pixels = width * height if config.data.presize else 0
    return table_bytes(images) + 3 * pixels * images


def cache_bytes(config: RunConfig, images: int, classes: int) -> int:
    """An epoch of all teachers' logits."""
    form = Form(classes, (config.cache or CacheConfig()).top_k)
    return images * len(config.teachers) * form.bytes_an_answer


def disk(config: RunConfig, images: int, classes: int, seeds: int, checkpoint: int) -> Disk:
    """All of it.

    Args:
        checkpoint: bytes of the largest one.
    """
    epoch = cache_bytes(config, images, classes)
    epochs = config.augment.recycle or config.student.recipe.epochs
    return Disk(store_bytes(config, images), epoch * epochs * seeds, epoch, (KEEP + 1) * checkpoint)


def sent(counted: Counted, processes: int) -> float:
    """Bytes that each process sends in a step: a ring's share of all gradients, and rank 0's buffers passed on."""
    if processes == 1:
        return 0.0
    return 2 * (processes - 1) / processes * counted.gradients + counted.buffers


def exchange_seconds(counted: Counted, processes: int, nodes: int, link: float, network: float) -> float:
    """Seconds of that at the speed of links in a node and of the network between nodes.

    Args:
        link: bytes a second that a process sends to another of its node.
        network: bytes a second that a node sends to another.
    """
    size = sent(counted, processes)
    within = size / link if processes > nodes else 0.0
    return max(within, size / network) if nodes > 1 else within
