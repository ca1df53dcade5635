"""`python -m chaos [kill] [corrupt] [--seed N] [--tries N]` damages runs at random; exits with 1 if any was lost."""

import argparse
import sys
import tempfile
import time
from pathlib import Path

from chaos import corrupt, kill

CAMPAIGNS = {"kill": kill.run, "corrupt": corrupt.run}

parser = argparse.ArgumentParser(prog="chaos", description="Kills and damages runs at random.")
parser.add_argument("campaigns", nargs="*", metavar="kill|corrupt", help="both if none is given")
parser.add_argument("--seed", type=int, default=0, help="the same seed makes the same tries")
parser.add_argument("--tries", type=int, default=50, help="of each campaign")
chosen = parser.parse_args()
if unknown := set(chosen.campaigns) - CAMPAIGNS.keys():
    parser.error(f"no campaign {', '.join(unknown)}; there are {', '.join(CAMPAIGNS)}")

lost = 0
for name in chosen.campaigns or CAMPAIGNS:
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix=f"chaos-{name}-") as folder:
        tally = CAMPAIGNS[name](chosen.tries, chosen.seed, Path(folder))
    print(f"{name}: {tally}\n  {time.monotonic() - began:.0f} s, seed {chosen.seed}", flush=True)
    lost += len(tally.lost)
sys.exit(1 if lost else 0)
