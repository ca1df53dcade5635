"""`python -m benchmarks NAME` prints the table of a benchmark; `networks` prints docs/MODELS.md."""

import argparse
from importlib import import_module
from pathlib import Path

import torch

from benchmarks import NAMES
from benchmarks.networks import document
from benchmarks.table import Setting


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("name", choices=(*NAMES, "networks"))
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--batch-size", type=int, default=0, help="in images; 0 means the benchmark's default")
    parser.add_argument("--repeats", type=int, default=9, help="timed calls of each contestant; figures are medians")
    parser.add_argument("--compile", action="store_true", help="compile all networks, the peer's too")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--json", type=Path, help="also write the table to this file")
    given = parser.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda, but PyTorch finds no CUDA device; use cpu or auto")
    if given.json is not None and not given.json.absolute().parent.is_dir():  # before minutes of measuring
        parser.error(f"--json: the folder '{given.json.parent}' does not exist")
    if given.name == "networks":
        print("\n".join(document()))
        return
    device = torch.device("cuda" if given.device != "cpu" and torch.cuda.is_available() else "cpu")
    setting = Setting(device, given.precision, given.batch_size, given.repeats, given.compile)
    table = import_module(f"benchmarks.{given.name}").run(setting)
    print("\n".join(table.lines()))
    if given.json is not None:
        table.write(given.json)


if __name__ == "__main__":
    main()
