"""`python -m benchmarks NAME`: one benchmark's table, or with `networks` that of docs/MODELS.md."""

import argparse
import sys
from pathlib import Path

from benchmarks import NAMES, run_benchmark
from benchmarks.networks import default_setting, document, measure
from coadvise.errors import UserError


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("name", help=", ".join((*NAMES, "networks")))
    parser.add_argument("--precision", default="float32", help="float32 or bfloat16")
    parser.add_argument("--batch-size", type=int, default=0, help="images; 0 is the benchmark's own choice")
    parser.add_argument("--repeats", type=int, default=9, help="timed calls of each; figures are medians")
    parser.add_argument("--compile", action="store_true", help="compile all networks, the peer's too")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--json", type=Path, help="write the table to this file as well")
    given = parser.parse_args()
    if given.json is not None and not given.json.absolute().parent.is_dir():  # before minutes of measuring
        parser.error(f"'{given.json.parent}' is no folder; make it, or write elsewhere")
    if given.name == "networks":
        setting = default_setting()
        print("\n".join(document(measure(setting), setting)))
        return
    try:
        table = run_benchmark(given.name, given.precision, given.batch_size, given.repeats, given.compile, given.device)
    except UserError as error:
        parser.error(str(error))
    print("\n".join(table.lines()))
    if given.json is not None:
        table.write(given.json)


if __name__ == "__main__":
    sys.exit(main())
