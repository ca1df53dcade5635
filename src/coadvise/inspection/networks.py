"""What a picture looks like to networks: what their classifiers are given."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image

from coadvise.config.reading import read_config
from coadvise.config.schema import HUB, EngineConfig, ImageSize, TeacherConfig
from coadvise.data.images import Pixels, fitted, to_array
from coadvise.errors import UserError
from coadvise.inspection.features import Floats
from coadvise.models.network import Network, load_network
from coadvise.models.pretrained import has_weights, load_start
from coadvise.runs.run import CONFIG, check_run, trained_parts
from coadvise.training.engine import Engine, for_this_machine

BATCH = 64


class NetworkFeatures:
    """Maps images to what the classifiers of networks are given.

    Attributes:
        image_size: pixels, of the first of them.
        what: the features in words.
    """

    def __init__(self, networks: Sequence[Network], what: str, config: EngineConfig) -> None:
        self.networks = [network.eval().requires_grad_(False) for network in networks]
        self.image_size: ImageSize = self.networks[0].image_size
        self.what, self.engine = what, Engine(for_this_machine(config))
        for network in self.networks:
            self.engine.prepare(network)

    def pixels(self, image: Image.Image) -> Pixels:
        """What the networks are given of an image, [3, H, W] uint8."""
        return to_array(fitted(image, self.image_size, self.networks[0].about.get("fit", "crop")))

    def __call__(self, images: Pixels) -> list[Floats]:
        """Features [B, D] float32 by each network, of images [B, 3, H, W] uint8."""
        batches = [images[start : start + BATCH] for start in range(0, len(images), BATCH)]
        parts = [[self._features(network, batch) for batch in batches] for network in self.networks]
        return [np.concatenate(part) for part in parts]

    def _features(self, network: Network, images: Pixels) -> Floats:
        placed = torch.from_numpy(images).to(self.engine.device).float().div_(255)
        with torch.inference_mode(), self.engine.autocast():
            given = network.features(placed.contiguous(memory_format=self.engine.memory_format))
        found: Floats = given.flatten(1).float().cpu().numpy()
        return found


def teachers_of(run: Path) -> NetworkFeatures:
    """The finished teachers of a run. Raises UserError if there is none."""
    check_run(run)
    parts = [part for part in trained_parts(run) if part.startswith("teachers/")]
    if not parts:
        raise UserError(f"'{run}' has no finished teacher yet; continue its 'coadvise fit', or leave out --run")
    names = " and ".join(part.partition("/")[2] for part in parts)
    what = f"features of the teacher{'s' * (len(parts) > 1)} {names} of '{run}'"
    return NetworkFeatures([load_network(run / part) for part in parts], what, read_config(run / CONFIG).engine)


def network_named(given: str) -> NetworkFeatures:
    """A timm model with published weights, a file of weights named after its model, or a folder of a network.

    Raises:
        UserError: none of these, or its weights could not be loaded.
    """
    path = Path(given)
    if path.is_dir():
        network = load_network(path)
    elif path.is_file():
        model = next((name for name in (path.stem, path.stem.rpartition("-")[0]) if timm.is_model(name)), None)
        if model is None:
            raise UserError(
                f"--features {given}: timm has no model '{path.stem}'; name the file after the model of its weights, "
                "such as resnet18.safetensors"
            )
        teacher = TeacherConfig(model=model, start=str(path.absolute()))
        network = load_start("", teacher, _usual_size(model), named=False)
    elif given.startswith(HUB) or (timm.is_model(given) and has_weights(given)):
        size = 224 if given.startswith(HUB) else _usual_size(given)
        network = load_start("", TeacherConfig(model=given, start=given), size, named=False)
    else:
        raise UserError(
            f"--features {given}: there is no such file or folder, and timm has no published weights of that name; "
            "give for instance resnet18, or the file resnet18.safetensors"
        )
    return NetworkFeatures([network], f"features of '{path.name}'", EngineConfig())


def _usual_size(model: str) -> int:
    settings = timm.get_pretrained_cfg(model)
    return settings.input_size[-1] if settings is not None else 224
