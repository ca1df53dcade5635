"""What is likely to go wrong with some data: the command `check`."""

import coadvise.torchvision_guard  # noqa: F401  (before timm)
