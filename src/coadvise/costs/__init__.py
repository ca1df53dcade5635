"""What training will cost, before it is paid: counted operations, a machine's rates, time, memory and bytes."""

from coadvise import torchvision_guard  # noqa: F401  (before anything that imports timm)
