import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

import coadvise.torchvision_guard  # noqa: F401  # isort: skip  (before anything imports timm)
from tiny import make_images, write_preset

from coadvise import fit
from coadvise.machine import cache_folder
from coadvise.ops import cpu, native

# Machines differ in speed and share their cores: no deadlines, and the same examples each time.
settings.register_profile(
    "coadvise", max_examples=25, deadline=None, derandomize=True, suppress_health_check=HealthCheck
)
settings.load_profile("coadvise")


@pytest.fixture(scope="session")
def reference() -> Path:
    """The folder of tensors that the published implementations computed; its README says what is in them."""
    return Path(__file__).with_name("reference")


@pytest.fixture(scope="session", autouse=True)
def _cache_of_its_own(tmp_path_factory: pytest.TempPathFactory):
    """Decoded images of made folders are nobody's to keep; compiled kernels, which take long to make, are shared."""
    usual, own = cache_folder(), tmp_path_factory.mktemp("cache") / "coadvise"
    own.mkdir()
    for library in usual.glob(f"{native.PREFIX}*.so") if usual else ():
        (own / library.name).symlink_to(library)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(own.parent))
        yield
    for library in own.glob(f"{native.PREFIX}*.so") if usual else ():
        if not library.is_symlink():
            beside = Path(tempfile.mkdtemp(dir=usual), library.name)
            shutil.copy(library, beside).rename(usual / library.name)
            beside.parent.rmdir()


@pytest.fixture
def fresh_kernel() -> Iterator[None]:
    """Forgets which native kernels this process has built, before and after the test."""
    kept = (cpu.native_kernel, native.load)
    for function in kept:
        function.cache_clear()
    yield
    for function in kept:
        function.cache_clear()


# The suite runs in several processes; more threads than cores only make them wait for each other. Set here and not
# only before each test: what the whole session shares (`finished`) is made earlier, and its bits depend on it.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # of programs that tests start


@pytest.fixture(autouse=True)
def _one_thread_each():
    """Whatever number of threads a test before this one set."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A made folder with train/ (24 images) and val/ (12 images) of three classes, 16 pixels."""
    return make_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with 36 and 18 images; to be read only."""
    return make_images(tmp_path_factory.mktemp("image_folder"), train=12, val=6)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mounts a real disk of a number of bytes, in memory; only root may."""
    mounted: list[Path] = []

    def mount(size: int) -> Path:
        folder = tmp_path / "disk"
        folder.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"no disk can be mounted here: {done.stderr.strip()}")
        mounted.append(folder)
        return folder

    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a small disk needs root")
    yield mount
    for folder in mounted:
        subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.fixture(scope="session")
def photos() -> Path:
    """A folder with train/ and test/ of three classes of small JPEG photographs."""
    return Path(__file__).parent / "photos"


@pytest.fixture(scope="session")
def tiny_preset(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A preset file of tiny networks, see `tiny.PRESET`."""
    return write_preset(tmp_path_factory.mktemp("preset"))


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_images: Path, tiny_preset: str) -> Path:
    """A finished run with its baseline, to be read only."""
    return fit(tiny_images, tiny_preset, tmp_path_factory.mktemp("runs") / "finished", baseline=True)
