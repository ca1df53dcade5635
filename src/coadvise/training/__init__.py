"""Training: the loop, the engine it runs on, checkpoints and the record."""

from coadvise import torchvision_guard  # noqa: F401  # isort: skip  (before anything that imports torchvision)
