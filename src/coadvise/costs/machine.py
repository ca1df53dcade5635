"""What a plan is made for: this machine by its calibration, a GPU by its data sheet, or one by its own calibration."""

import hashlib
import json
import math
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from coadvise.costs.gpus import Gpu
from coadvise.costs.rates import Rates
from coadvise.errors import UserError
from coadvise.machine import available_cores, cache_folder, cache_path, processor_facts
from coadvise.storage import write_text

FORMAT = 1
HALF, SINGLE = "bfloat16", "float32"
CALIBRATE = "coadvise plan --calibrate"
PCIE = 32e9  # bytes a second in one direction, sixteen lanes of PCIe 4; for GPUs of unknown links
CONTEXT = 0.7e9  # bytes that CUDA and its libraries keep of a GPU; assumed


@dataclass(frozen=True)
class Views:
    """Seconds of one core for a view: `fixed` and so much for each of its pixels."""

    fixed: float
    pixel: float

    def seconds(self, pixels: int) -> float:
        return self.fixed + self.pixel * pixels


@dataclass(frozen=True)
class Calibration:
    """What a machine attained.

    Attributes:
        name: of the device.
        gpu: whether networks run on a GPU.
        memory: bytes of one GPU, or of the machine.
        rates: by precision and threads, such as "bfloat16, 2"; of a GPU by precision alone.
        views: by kind: "light", "deit" from files, "presized".
    """

    name: str
    gpu: bool
    memory: float
    rates: Mapping[str, Rates]
    views: Mapping[str, Views]

    def rates_of(self, precision: str, threads: int) -> Rates:
        """Of a CPU with other threads than were measured, between those that were, by a power of the threads.

        Raises:
            UserError: a precision that was not measured.
        """
        if self.gpu and precision in self.rates:
            return self.rates[precision]
        of = [key for key in self.rates if key.startswith(f"{precision}, ")]
        known = {int(key.partition(", ")[2]): self.rates[key] for key in of}
        if not known or self.gpu:
            raise UserError(
                f"the calibration of {self.name} is of {'; '.join(self.rates)}, not of {precision}; give "
                f"engine.precision, or measure again with {CALIBRATE}"
            )
        one, most = known[1], max(known)
        if threads in known or most == 1:
            return known.get(threads, one)
        power = math.log(known[most].scale / one.scale) / math.log(most)
        return replace(one, scale=one.scale * threads**power)


# Of one core of an AMD EPYC, as `--calibrate` measured it on 2026-11-30: for plans of GPUs on machines not measured.
USUAL_VIEWS = {"light": Views(2.2e-5, 3.6e-8), "deit": Views(2.4e-3, 5.4e-8), "presized": Views(6e-4, 3.9e-8)}


@dataclass(frozen=True)
class Target:
    """The machine of a plan.

    Attributes:
        name: what the user reads.
        gpu: whether networks run on GPUs.
        memory: bytes for one network: of a GPU, or of this machine.
        views: of one of its cores.
        link: bytes a second between GPUs of a node, in one direction.
        assumed: what about it is assumed and not measured; "" for nothing.
    """

    name: str
    gpu: bool
    memory: float
    views: Mapping[str, Views]
    link: float
    assumed: str
    calibration: Calibration | None = None
    sheet: Gpu | None = None

    def rates(self, half: bool, threads: int) -> Rates:
        if self.calibration is not None:
            return self.calibration.rates_of(HALF if half else SINGLE, threads)
        assert self.sheet is not None
        return self.sheet.rates(half)

    def has_half(self) -> bool:
        """Whether `engine.precision=auto` means bfloat16 there."""
        if self.calibration is not None:
            return any(key.startswith(HALF) for key in self.calibration.rates)
        assert self.sheet is not None
        return self.sheet.half > 0


def of_calibration(found: Calibration, link: float) -> Target:
    memory = found.memory - (CONTEXT if found.gpu else 0)
    return Target(found.name, found.gpu, memory, found.views, link, "", calibration=found)


def of_sheet(gpu: Gpu, views: Calibration | None) -> Target:
    """A GPU by its data sheet; views are made by cores like this machine's, if it has been measured."""
    cores = "cores like this machine's" if views else "cores of an AMD EPYC"
    assumed = f"assumed: {gpu.share:.0%} of its arithmetic is attained; views are made by {cores}"
    made = views.views if views else USUAL_VIEWS
    return Target(gpu.name, True, gpu.memory - CONTEXT, made, gpu.link, assumed, sheet=gpu)


def this_device() -> tuple[str, bool, float]:
    """Name, whether it is a GPU, and bytes of memory, of what networks run on here."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name(), True, float(torch.cuda.get_device_properties(0).total_memory)
    memory = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return f"{_processor()}, {available_cores()} cores", False, memory


def _processor() -> str:
    named = (line.partition(":")[2].strip() for line in processor_facts() if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def calibration_path(file: Path | None = None) -> Path:
    """A given file, or that of this machine in the user's cache folder. Raises UserError without such a folder."""
    if file is not None:
        return file
    folder = cache_path()
    if folder is None:
        raise UserError("there is no folder for the calibration; give a file: --calibration FILE")
    return folder / f"calibration-{hashlib.sha256(this_device()[0].encode()).hexdigest()[:12]}.json"


def save(found: Calibration, file: Path | None = None) -> Path:
    """Writes a calibration. Raises UserError where that is not possible."""
    path = calibration_path(file)
    if file is None:
        cache_folder()
    rates = {key: rate.plain() for key, rate in found.rates.items()}
    views = {kind: asdict(cost) for kind, cost in found.views.items()}
    values = {"format": FORMAT, "name": found.name, "gpu": found.gpu, "memory": found.memory}
    try:
        write_text(path, json.dumps({**values, "rates": rates, "views": views}, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"'{path}' cannot be written: {error.strerror}; give a file: --calibration FILE") from None
    return path


def read(file: Path | None = None) -> Calibration | None:
    """A calibration; None where this machine has none. Raises UserError for a given file that is missing or damaged."""
    path = calibration_path(file)
    try:
        values: Any = json.loads(path.read_text())
        if values["format"] != FORMAT:
            raise ValueError(f"format {values['format']!r}")
        rates = {str(key): Rates.of(rate) for key, rate in values["rates"].items()}
        views = {str(kind): Views(float(v["fixed"]), float(v["pixel"])) for kind, v in values["views"].items()}
        _ = [views[kind] for kind in USUAL_VIEWS]
        return Calibration(str(values["name"]), bool(values["gpu"]), float(values["memory"]), rates, views)
    except FileNotFoundError:
        if file is None:
            return None
        raise UserError(f"there is no calibration '{file}'; {CALIBRATE} --calibration FILE writes one") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        said = " ".join(str(error).split())[:100]
        raise UserError(f"'{path}' is no calibration ({said}); measure again: {CALIBRATE}") from None
