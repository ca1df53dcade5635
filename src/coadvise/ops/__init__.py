"""Involution, the operator and its layer, and batch norm with what follows it."""

from coadvise.ops.batch_norm import FusedSequential, batch_norm_relu
from coadvise.ops.involution import Involution2d, involution2d

__all__ = ["FusedSequential", "Involution2d", "batch_norm_relu", "involution2d"]
