"""Co-advise: teachers of different inductive bias advise one vision transformer, each through a token of its own."""

from coadvise import _torchvision  # noqa: F401  # isort: skip  (before anything that imports torchvision)

from coadvise.cache_build import build_cache
from coadvise.config import RunConfig, load_config
from coadvise.errors import Interrupted, LostProcessError, StorageError, UserError
from coadvise.fit import fit
from coadvise.loss import Advice, LossWeights, co_advise_loss
from coadvise.models.published import load_published
from coadvise.portable import export
from coadvise.predict import Prediction, TrainedStudent, load

__all__ = [
    "Advice", "Interrupted", "LossWeights", "LostProcessError", "Prediction", "RunConfig", "StorageError",
    "TrainedStudent", "UserError", "build_cache", "co_advise_loss", "export", "fit", "load", "load_config",
    "load_published",
]  # fmt: skip
__version__ = "0.1.0"
