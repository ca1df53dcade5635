"""Registration with PyTorch of operators that inference takes: eager code and graphs see one node, without gradient."""

from collections.abc import Callable

import torch
from torch import Tensor

_library = torch.library.Library("coadvise", "FRAGMENT")


def register(
    schema: str, *, cpu: Callable[..., Tensor], plain: Callable[..., Tensor], empty: Callable[..., Tensor]
) -> None:
    """Define ``coadvise::<schema>``.

    Args:
        schema: Name, arguments and result as `torch.library.Library.define` takes them.
        cpu: Computes it from CPU tensors.
        plain: Computes it on any other device.
        empty: Makes a tensor of the result's shape, dtype and layout.
    """
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, cpu, "CPU")
    _library.impl(name, plain, "CompositeExplicitAutograd")
    torch.library.register_fake(f"coadvise::{name}", empty, lib=_library)
