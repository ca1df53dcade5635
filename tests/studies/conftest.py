"""One folder of made images and one study's folder for all tests of studies."""

import pytest
from studied import Studied
from tiny import make_images, write_preset


@pytest.fixture(scope="session")
def studied(tmp_path_factory: pytest.TempPathFactory) -> Studied:
    root = tmp_path_factory.mktemp("studied")
    return Studied(make_images(root / "data"), write_preset(root), root / "out")
