"""A plan's question from the options of the command line."""

import torch

from coadvise.config.reading import load_config
from coadvise.costs.foresee import Question, with_pixels
from coadvise.costs.gpus import GPUS, gpu_named, gpu_of
from coadvise.costs.machine import CALIBRATE, PCIE, Target, of_calibration, of_sheet, read
from coadvise.errors import UserError
from coadvise.runs.options import PlanOptions


def question(asked: PlanOptions) -> Question:
    """Raises UserError for what cannot be planned: a preset, a count, a GPU, figures of one, a calibration."""
    if asked.preset is None or asked.images is None:
        raise UserError("give a preset and --images N: coadvise plan photos --images 10000")
    counts = ("images", asked.images, 1), ("classes", asked.classes, 2), ("nodes", asked.nodes, 1)
    for name, value, least in (*counts, ("seeds", asked.seeds, 1)):
        if value < least:
            raise UserError(f"--{name} {value}; give {least} or more")
    if asked.network <= 0:
        raise UserError(f"--network {asked.network:g}; give Gbit/s, above 0")
    config = with_pixels(load_config(asked.preset, asked.overrides), asked.pixels)
    target = _target(asked)
    there = torch.cuda.device_count() if asked.gpu is None and asked.calibration is None and target.gpu else None
    gpus = asked.gpus if asked.gpus is not None else (there if there is not None else int(target.gpu))
    if asked.gpus is not None and (asked.gpus < 1 or (there is not None and asked.gpus > there)):
        raise UserError(f"--gpus {asked.gpus}; give 1 or more{'' if there is None else f', this machine has {there}'}")
    if asked.gpus is not None and not target.gpu:
        raise UserError(f"--gpus {asked.gpus}, but {target.name} has no GPU; name one: --gpu H100")
    return Question(
        config, asked.images, asked.classes, target, gpus, asked.nodes, asked.seeds, asked.baseline,
        network=asked.network * 1e9 / 8,
    )  # fmt: skip


def _target(asked: PlanOptions) -> Target:
    figures = {
        "--gpu-tflops": asked.gpu_tflops,
        "--gpu-memory": asked.gpu_memory,
        "--gpu-bandwidth": asked.gpu_bandwidth,
    }
    given = {name: value for name, value in figures.items() if value is not None}
    if given and len(given) < len(figures):
        missing = ", ".join(name for name in figures if name not in given)
        raise UserError(f"{', '.join(given)} without {missing}; give all three, or the name of a known GPU: --gpu H100")
    if below := [f"{name} {value:g}" for name, value in given.items() if value <= 0]:
        raise UserError(f"{below[0]}; give a figure above 0")
    if asked.calibration is not None and (asked.gpu or given):
        raise UserError("--calibration FILE has its own device; leave out --gpu and its figures")
    if given:
        return of_sheet(gpu_of(asked.gpu or "GPU", *given.values()), read(None))
    if asked.gpu is not None:
        return of_sheet(gpu_named(asked.gpu), read(None))
    found = read(asked.calibration)
    if found is None:
        raise UserError(
            f"this machine has not been measured; run {CALIBRATE} once (two minutes), or name a GPU: --gpu H100"
        )
    links = [gpu.link for gpu in GPUS if found.gpu and gpu.name.lower() in found.name.lower()]
    return of_calibration(found, links[0] if links else PCIE)
