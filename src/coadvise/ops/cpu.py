"""The native CPU path of involution: builds ``involution_cpu.c`` on first use and calls it on channels-last memory.

The compiled library is cached in ``$XDG_CACHE_HOME/coadvise`` (``~/.cache/coadvise``) under a hash of everything that
shaped it. Without a C compiler, or with ``COADVISE_NATIVE=0``, plain torch runs in its place.
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

import torch
from torch import Tensor

from coadvise.cache_folder import cache_folder
from coadvise.ops.reference import (
    involution2d_backward_reference,
    involution2d_reference,
    like_weight,
    memory_format,
    pixel_major,
)

SOURCE = Path(__file__).with_name("involution_cpu.c")
DTYPES = (torch.float32, torch.bfloat16)
# No -ffast-math: NaN and infinity must reach the result. -O2 compiles faster, but its backward pass is 10-30 % slower.
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-ffp-contract=fast", "-fPIC")


def involution2d_cpu(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """Involution on CPU tensors: [B, C, H, W] and [B, G, K, K, h, w] to [B, C, h, w] in the memory order of ``x``."""
    kernel = native_kernel(_lanes(x, weight)) if x.dtype in DTYPES else None
    if kernel is None:
        return involution2d_reference(x, weight, stride)
    height, width = weight.shape[-2:]
    out = torch.empty((x.shape[0], x.shape[1], height, width), dtype=x.dtype, memory_format=torch.channels_last)
    image, pixels = x.contiguous(memory_format=torch.channels_last), pixel_major(weight).contiguous()
    _call(kernel, _sizes(x, weight, stride), image, pixels, out, None, None, None)
    return out.contiguous(memory_format=memory_format(x))


def involution2d_backward_cpu(grad: Tensor, x: Tensor, weight: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """Gradients of ``x`` and ``weight``, each in the shape, dtype and memory order of its tensor."""
    kernel = native_kernel(_lanes(x, weight)) if x.dtype in DTYPES else None
    if kernel is None:
        return involution2d_backward_reference(grad, x, weight, stride)
    grad, image = (t.contiguous(memory_format=torch.channels_last) for t in (grad, x))
    pixels = pixel_major(weight).contiguous()
    grad_x, grad_pixels = torch.empty_like(image, memory_format=torch.channels_last), torch.empty_like(pixels)
    _call(kernel, _sizes(x, weight, stride), image, pixels, None, grad, grad_x, grad_pixels)
    return grad_x.contiguous(memory_format=memory_format(x)), like_weight(grad_pixels, weight)


def _lanes(x: Tensor, weight: Tensor) -> int:
    """How many channels a vector holds: the wider one unless it would be padded more than the narrower."""
    group_width = x.shape[1] // weight.shape[1]
    return 16 if -group_width % 16 == -group_width % 8 else 8


def _sizes(x: Tensor, weight: Tensor, stride: int) -> tuple[int, ...]:
    batch, channels, height, width = x.shape
    _, groups, kernel, _, out_height, out_width = weight.shape
    bf16 = int(x.dtype == torch.bfloat16)
    sizes = (batch, height, width, groups, channels // groups, kernel, stride, out_height, out_width)
    return *sizes, bf16, torch.get_num_threads()


def _call(kernel: Callable[..., int], sizes: tuple[int, ...], *tensors: Tensor | None) -> None:
    pointers = [None if t is None else t.data_ptr() for t in tensors]
    if kernel((ctypes.c_int64 * len(sizes))(*sizes), *pointers):
        raise MemoryError(
            f"no memory for the involution kernel's buffers at sizes {sizes}; use a smaller batch or image"
        )


# ---- building ----


@cache
def native_kernel(lanes: int) -> Callable[..., int] | None:
    """The compiled function for vectors of ``lanes`` floats; None, after one warning, where it cannot be had."""
    if os.environ.get("COADVISE_NATIVE", "1") == "0":
        return None
    try:
        kernel = ctypes.CDLL(str(_build(lanes))).involution
    except (OSError, subprocess.SubprocessError) as error:
        lines = (getattr(error, "stderr", None) or str(error)).splitlines()
        reason = next((line for line in lines if "error" in line), lines[0] if lines else type(error).__name__)
        _warn(f"involution runs in plain torch, many times slower: its native kernel could not be built ({reason})")
        return None
    kernel.argtypes, kernel.restype = [ctypes.c_void_p] * 7, ctypes.c_int
    return kernel


@cache
def _warn(message: str) -> None:
    warnings.warn(
        f"{message}. Install gcc or clang, or set COADVISE_NATIVE=0 to accept this silently.",
        RuntimeWarning,
        stacklevel=2,
    )


def _build(lanes: int) -> Path:
    """Compiles the source unless a library for this source, compiler, processor and OpenMP runtime is cached."""
    compiler = next((path for name in ("gcc", "cc", "clang") if (path := shutil.which(name))), None)
    if compiler is None:
        raise FileNotFoundError("no gcc, cc or clang on PATH")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    runtime, flags = _openmp_runtime(), (*FLAGS, f"-DLANES={lanes}")
    parts = (SOURCE.read_text(), version, _processor(), str(runtime), *flags)
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
    folder = cache_folder() or Path(tempfile.mkdtemp(prefix="coadvise-"))  # private, since what lies in it gets loaded
    library = folder / f"involution-{key}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(
            dir=folder
        ) as scratch:  # renamed when whole: another process sees all or nothing
            made, linked = Path(scratch, "involution.o"), Path(scratch, "involution.so")
            # Linked by hand, since -fopenmp at this step would add the compiler's runtime beside torch's own. Clang's
            # calls, though, are not those of the runtime that torch brings.
            shared = runtime is not None and "clang" not in version
            openmp = [str(runtime), f"-Wl,-rpath,{runtime.parent}"] if shared and runtime else ["-fopenmp"]
            compile_ = [*flags, "-fopenmp", "-c", str(SOURCE), "-o", str(made)]
            for arguments in (compile_, ["-shared", str(made), *openmp, "-o", str(linked)]):
                subprocess.run([compiler, *arguments], capture_output=True, text=True, check=True, timeout=120)
            linked.replace(library)
    return library


def _openmp_runtime() -> Path | None:
    """The OpenMP library in this process, torch's own if there are several: one thread pool, one thread count."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return None
    paths = {Path(line.split(maxsplit=5)[5]) for line in lines if line.count("/")}
    loaded = sorted(path for path in paths if path.name.startswith(("libgomp", "libiomp", "libomp")))
    home = Path(torch.__file__).parent
    return next((path for path in loaded if home in path.parents), loaded[0] if loaded else None)


def _processor() -> str:
    """What ``-march=native`` means here: a cache in a shared home must not hand over instructions this CPU lacks."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return "\n".join(
        sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
    )
