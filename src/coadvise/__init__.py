"""Co-advise: teachers of different inductive bias advise one vision transformer, each through a token of its own.

The public names below are loaded on first use, so `import coadvise` is light. `import coadvise.models` registers the
networks with timm.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

_HOME = {  # public name -> its module
    "Advice": "advice",
    "Interrupted": "errors",
    "LossWeights": "advice",
    "LostProcessError": "errors",
    "Prediction": "deploy.predict",
    "RunConfig": "config.schema",
    "StorageError": "errors",
    "TrainedStudent": "deploy.predict",
    "UserError": "errors",
    "build_cache": "runs.build_cache",
    "check": "inspection.check",
    "co_advise_loss": "distill.loss",
    "compare": "runs.compare",
    "export": "deploy.export",
    "fit": "runs.fit",
    "load": "deploy.publish",
    "load_config": "config.reading",
    "load_published": "models.published",
    "push": "deploy.publish",
}
__all__ = list(_HOME)

if TYPE_CHECKING:
    from coadvise.advice import Advice as Advice
    from coadvise.advice import LossWeights as LossWeights
    from coadvise.config.reading import load_config as load_config
    from coadvise.config.schema import RunConfig as RunConfig
    from coadvise.deploy.export import export as export
    from coadvise.deploy.predict import Prediction as Prediction
    from coadvise.deploy.predict import TrainedStudent as TrainedStudent
    from coadvise.deploy.publish import load as load
    from coadvise.deploy.publish import push as push
    from coadvise.distill.loss import co_advise_loss as co_advise_loss
    from coadvise.errors import Interrupted as Interrupted
    from coadvise.errors import LostProcessError as LostProcessError
    from coadvise.errors import StorageError as StorageError
    from coadvise.errors import UserError as UserError
    from coadvise.inspection.check import check as check
    from coadvise.models.published import load_published as load_published
    from coadvise.runs.build_cache import build_cache as build_cache
    from coadvise.runs.compare import compare as compare
    from coadvise.runs.fit import fit as fit


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'coadvise' has no attribute '{name}'")
    value = getattr(import_module(f"coadvise.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
