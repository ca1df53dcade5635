"""Native CPU kernels: C sources that are compiled on first use.

A compiled library is cached in ``$XDG_CACHE_HOME/coadvise`` (``~/.cache/coadvise``) under a hash of everything that
shaped it. Without a C compiler, or with ``COADVISE_NATIVE=0``, there is no library, and the caller does without.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

from coadvise.machine import cache_folder, cache_path, processor_facts

PREFIX = "kernel-"  # of a library's file name
COMPILERS = ("gcc", "cc", "clang")
# No -ffast-math: NaN and infinity must reach the result. -O2 compiles faster, but makes involution's backward pass
# 10 to 30 % slower.
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-ffp-contract=fast", "-fPIC", "-fopenmp")


@cache
def load(source: Path, without: str, *flags: str) -> ctypes.CDLL | None:
    """The compiled library of a C source, or None where it could not be built.

    Args:
        source: The C file.
        without: What happens without the library; a warning begins with it, once.
        flags: Further flags for the compiler.
    """
    if os.environ.get("COADVISE_NATIVE", "1") == "0":
        return None
    try:
        library = build(source, *flags)
        try:
            return ctypes.CDLL(str(library))
        except OSError:  # a damaged file, perhaps
            library.unlink()
            return ctypes.CDLL(str(build(source, *flags)))
    except (OSError, subprocess.SubprocessError) as error:
        lines = (getattr(error, "stderr", None) or str(error)).splitlines()
        reason = next((line for line in lines if "error" in line), lines[0] if lines else type(error).__name__)
        warnings.warn(
            f"{without}: its native kernel could not be built ({reason}). Install gcc or clang, or set "
            "COADVISE_NATIVE=0 to accept this silently.",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def function(library: ctypes.CDLL | None, name: str, *arguments: Any) -> Callable[..., int] | None:
    """A library's function that takes these `ctypes` arguments and returns an int; None without the library."""
    if library is None:
        return None
    found: Any = getattr(library, name)
    found.argtypes, found.restype = list(arguments), ctypes.c_int
    kernel: Callable[..., int] = found
    return kernel


def build(source: Path, *flags: str) -> Path:
    """Compiles a C source, unless the cache has a library of it.

    That is one of this source and the headers beside it, this compiler, processor, OpenMP and PyTorch.
    """
    compiler = next((path for name in COMPILERS if (path := shutil.which(name))), None)
    if compiler is None:
        raise FileNotFoundError(f"no {', '.join(COMPILERS)} on PATH")
    version = _run(compiler, "--version")
    runtime = _openmp_runtime()
    headers = sorted(source.parent.glob("*.h"))
    texts = [file.read_text() for file in (source, *headers)]
    made_of = (*texts, version, _processor(), str(runtime), torch.__version__, *FLAGS, *flags)
    name = f"{PREFIX}{hashlib.sha256(chr(0).join(made_of).encode()).hexdigest()[:24]}.so"
    cached = cache_path()
    if cached is not None and (cached / name).exists():  # also where the folder can only be read
        return cached / name
    folder = cache_folder() or _process_folder()
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        compiled, linked = Path(scratch, "kernel.o"), Path(scratch, "kernel.so")
        _run(compiler, *FLAGS, *flags, "-c", str(source), "-o", str(compiled))
        # -fopenmp at this step would link the compiler's runtime beside PyTorch's. Clang's calls need its own.
        shared = runtime is not None and "clang" not in version
        openmp = [str(runtime), f"-Wl,-rpath,{runtime.parent}"] if shared and runtime else ["-fopenmp"]
        _run(compiler, "-shared", str(compiled), *openmp, "-o", str(linked))
        with linked.open("rb") as file:
            os.fsync(file.fileno())
        linked.replace(folder / name)  # when complete: another process sees the whole file or none
    return folder / name


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=600).stdout


@cache
def _process_folder() -> Path:
    """A folder for this process alone, where the cache cannot be written."""
    warnings.warn(
        f"'{cache_path() or '~/.cache/coadvise'}' cannot be written, so every process compiles native kernels again, "
        "which takes seconds. Set XDG_CACHE_HOME to a writable folder, or COADVISE_NATIVE=0 for plain PyTorch.",
        RuntimeWarning,
        stacklevel=2,
    )
    folder = tempfile.TemporaryDirectory(prefix="coadvise-")
    _process_folders.append(folder)
    return Path(folder.name)


_process_folders: list[tempfile.TemporaryDirectory[str]] = []  # removed when the process ends


def _openmp_runtime() -> Path | None:
    """The OpenMP library in this process, PyTorch's own if there are several: one thread pool, one thread count."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return None
    paths = {Path(line.split(maxsplit=5)[5]) for line in lines if line.count("/")}
    loaded = sorted(path for path in paths if path.name.startswith(("libgomp", "libiomp", "libomp")))
    own = Path(torch.__file__).parent
    return next((path for path in loaded if own in path.parents), loaded[0] if loaded else None)


def _processor() -> str:
    """What ``-march=native`` means here: a cache in a shared home must not offer instructions that this CPU lacks."""
    told = ("model name", "flags", "Features", "CPU part")
    known = "\n".join(sorted({line for line in processor_facts() if line.startswith(told)}))
    return known or platform.processor() or platform.machine()
