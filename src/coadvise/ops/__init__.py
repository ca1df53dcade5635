"""Involution: the operator and its layer. Beside it, a convolution that inference takes."""

from coadvise.ops.involution import Involution2d, involution2d

__all__ = ["Involution2d", "involution2d"]
