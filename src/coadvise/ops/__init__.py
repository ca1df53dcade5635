"""Involution, the operator and its layer, and batch norm with what follows it."""

from coadvise.ops.batch_norm import NormedSequential, normed
from coadvise.ops.involution import Involution2d, involution2d

__all__ = ["Involution2d", "NormedSequential", "involution2d", "normed"]
