"""Native CPU kernels: C sources, and C++ ones for PyTorch's dispatcher, built on first use.

A compiled library is cached in ``$XDG_CACHE_HOME/coadvise`` (``~/.cache/coadvise``) under a hash of everything that
shaped it. Without a C compiler, or with ``COADVISE_NATIVE=0``, there is none, and plain torch runs in its place.
"""

import atexit
import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import torch

from coadvise.machine import cache_folder, cache_path

PREFIX = "kernel-"  # of a library's name
# No -ffast-math: NaN and infinity must reach the result. -O2 compiles faster, but involution's backward pass is then
# 10-30 % slower.
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-ffp-contract=fast", "-fPIC")
COMPILERS = {".c": ("gcc", "cc", "clang"), ".cpp": ("g++", "c++", "clang++")}
TORCH = Path(torch.__file__).parent


@cache
def load(source: Path, without: str, *defines: str, parts: tuple[tuple[str, ...], ...] = ((),)) -> ctypes.CDLL | None:
    """The library of a source; None where it cannot be had, after one warning that begins with ``without``, if any."""
    if os.environ.get("COADVISE_NATIVE", "1") == "0":
        return None
    try:
        library = build(source, *defines, parts=parts)
        try:
            return ctypes.CDLL(str(library))
        except OSError:  # a damaged file, perhaps
            library.unlink()
            return ctypes.CDLL(str(build(source, *defines, parts=parts)))
    except (OSError, subprocess.SubprocessError) as error:
        lines = (getattr(error, "stderr", None) or str(error)).splitlines()
        reason = next((line for line in lines if "error" in line), lines[0] if lines else type(error).__name__)
        if without:
            _warn(f"{without}: its native kernel could not be built ({reason})")
        return None


def function(library: ctypes.CDLL | None, name: str, *arguments: Any) -> Callable[..., int] | None:
    """A library's function of these `ctypes` arguments that returns an int; None without the library."""
    if library is None:
        return None
    found: Any = getattr(library, name)
    found.argtypes, found.restype = list(arguments), ctypes.c_int
    kernel: Callable[..., int] = found
    return kernel


@cache
def _warn(message: str) -> None:
    warnings.warn(
        f"{message}. Install gcc or clang, or set COADVISE_NATIVE=0 to accept this silently.",
        RuntimeWarning,
        stacklevel=2,
    )


def build(source: Path, *defines: str, parts: tuple[tuple[str, ...], ...] = ((),)) -> Path:
    """Compiles a source unless a library for this source, compiler, processor, OpenMP runtime and torch is cached.

    Args:
        source: C, or C++ with PyTorch's headers and library.
        defines: Flags for the compiler.
        parts: The source is compiled once with each of these sets of flags, at the same time, and all make one library.
    """
    *others, last = names = COMPILERS[source.suffix]
    compiler = next((path for name in names if (path := shutil.which(name))), None)
    if compiler is None:
        raise FileNotFoundError(f"no {', '.join(others)} or {last} on PATH")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    runtime, flags, libraries = _openmp_runtime(), (*FLAGS, *defines), []
    if source.suffix == ".cpp":
        flags = (*flags, "-std=c++17", f"-I{TORCH / 'include'}")
        libraries = [f"-L{TORCH / 'lib'}", "-ltorch_cpu", f"-Wl,-rpath,{TORCH / 'lib'}"]
    made_of = (source.read_text(), version, _processor(), str(runtime), torch.__version__, *flags, repr(parts))
    key = hashlib.sha256("\0".join(made_of).encode()).hexdigest()[:24]
    name, there = f"{PREFIX}{key}.so", cache_path()
    if there is not None and (there / name).exists():  # also where the folder can only be read
        return there / name
    folder = cache_folder() or _private_folder()
    library = folder / name
    if not library.exists():
        with tempfile.TemporaryDirectory(
            dir=folder
        ) as scratch:  # renamed when whole: another process sees all or nothing
            linked = Path(scratch, "kernel.so")
            made = [Path(scratch, f"{number}.o") for number in range(len(parts))]

            def run(*arguments: str) -> None:
                subprocess.run([compiler, *arguments], capture_output=True, text=True, check=True, timeout=120)

            def compile_(part: tuple[str, ...], target: Path) -> None:
                run(*flags, *part, "-fopenmp", "-c", str(source), "-o", str(target))

            with ThreadPoolExecutor() as pool:
                list(pool.map(compile_, parts, made))
            # Linked by hand, since -fopenmp at this step would add the compiler's runtime beside torch's own. Clang's
            # calls, though, are not those of the runtime that torch brings.
            shared = runtime is not None and "clang" not in version
            openmp = [str(runtime), f"-Wl,-rpath,{runtime.parent}"] if shared and runtime else ["-fopenmp"]
            run("-shared", *map(str, made), *libraries, *openmp, "-o", str(linked))
            with linked.open("rb") as file:
                os.fsync(file.fileno())
            linked.replace(library)
    return library


@cache
def _private_folder() -> Path:
    """For this process alone, since what lies in it gets loaded; gone when it ends."""
    warnings.warn(
        f"'{cache_path() or '~/.cache/coadvise'}' cannot be written, so native kernels are built anew in every process,"
        " seconds each. Set XDG_CACHE_HOME to a folder that can be, or COADVISE_NATIVE=0 for plain torch.",
        RuntimeWarning,
        stacklevel=2,
    )
    folder = Path(tempfile.mkdtemp(prefix="coadvise-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _openmp_runtime() -> Path | None:
    """The OpenMP library in this process, torch's own if there are several: one thread pool, one thread count."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return None
    paths = {Path(line.split(maxsplit=5)[5]) for line in lines if line.count("/")}
    loaded = sorted(path for path in paths if path.name.startswith(("libgomp", "libiomp", "libomp")))
    return next((path for path in loaded if TORCH in path.parents), loaded[0] if loaded else None)


def _processor() -> str:
    """What ``-march=native`` means here: a cache in a shared home must not hand over instructions this CPU lacks."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return "\n".join(
        sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
    )
