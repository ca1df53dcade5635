"""`python -m chaos [--seed N] [--tries N] [CAMPAIGN ...]`: exit code 0 if nothing was lost."""

import argparse
import importlib
import sys
import tempfile
import time
from pathlib import Path

from chaos import CAMPAIGNS

parser = argparse.ArgumentParser(prog="chaos", description=__doc__)
parser.add_argument("campaigns", nargs="*", help=f"of {', '.join(CAMPAIGNS)}; all when none is given")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--tries", type=int, default=0, help="of each campaign; 0 is the full size")
chosen = parser.parse_args()
if unknown := set(chosen.campaigns) - CAMPAIGNS.keys():
    parser.error(f"no campaign {', '.join(unknown)}; there are {', '.join(CAMPAIGNS)}")

lost = 0
for name in chosen.campaigns or CAMPAIGNS:
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix=f"chaos-{name}-") as folder:
        tally = importlib.import_module(f"chaos.{name}").run(chosen.tries or CAMPAIGNS[name], chosen.seed, Path(folder))
    print(f"{tally}\n  {time.monotonic() - began:.0f} s, seed {chosen.seed}", flush=True)
    lost += len(tally.lost)
sys.exit(1 if lost else 0)
