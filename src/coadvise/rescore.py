"""Scores a finished run's networks again, on its own validation images or on other data."""

from pathlib import Path
from typing import Any

import torch
import yaml

from coadvise.config import parse_config
from coadvise.data.audit import audit_split
from coadvise.data.sources import evaluation_split, open_source
from coadvise.engine import Engine
from coadvise.errors import UserError
from coadvise.evaluate import in_order, predict_logits, top1
from coadvise.loss import CLASS
from coadvise.networks import load_network
from coadvise.predict import trained_parts


def evaluate_run(run: Path, data: str | None = None) -> dict[str, Any]:
    """Top-1 of every trained network of a run.

    Args:
        data: a folder of class folders, or one with val/, valid/ or test/; the run's own validation images when None.

    Returns:
        {"data", "images": how many were scored, "unreadable": files that were not, "parts": {part: {token: top-1}}}.

    Raises:
        UserError: no run, nothing trained yet, or data of other classes.
    """
    if not (run / "config.yaml").is_file():
        raise UserError(f"'{run}' is no run directory (no config.yaml); give the folder that 'coadvise fit' printed")
    parts = trained_parts(run)
    if not parts:
        raise UserError(f"'{run}' has no finished network yet; run the same 'coadvise fit' again to go on")
    config = parse_config(yaml.safe_load((run / "config.yaml").read_text()))
    engine = Engine(config.engine)
    networks = {part: load_network(run / part) for part in parts}
    for network in networks.values():
        engine.prepare(network)
    classes = networks[parts[-1]].classes
    if data is None:
        files = open_source(config.data.source, config.data.val_fraction, config.seed).val
    else:
        files = evaluation_split(data, classes)
    split = audit_split(files, config.data.image_size, in_memory=config.in_memory)
    if not len(split):
        raise UserError(f"none of the {len(files)} images can be read; first fault: {split.unreadable[0]}")
    labels = torch.from_numpy(split.labels)
    scores = {}
    for part, network in networks.items():
        logits = predict_logits(network, split, config.data.image_size, engine, config.data.workers)
        logits = in_order(logits, network.classes, classes)
        scores[part] = top1(logits, labels, tuple(logits) if part.startswith("students/advised") else (CLASS,))
    source = data or f"{config.data.source} (validation)"
    return {"data": source, "images": len(split), "unreadable": list(split.unreadable), "parts": scores}
