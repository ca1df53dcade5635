"""Training: the loop, what it stands on, and what it writes."""

from coadvise import torchvision_guard  # noqa: F401  # isort: skip  (before anything that imports torchvision)
