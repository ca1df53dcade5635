import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys, torch
from coadvise.machine import keep_freed_memory
kept = sys.argv[1] == "kept" and keep_freed_memory()
for turn in range(64):
    if turn == 4:  # the heap may have to grow more than once
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(10_000_000)
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


IN_A_LOADER = """
import resource, torch
from torch.utils.data import Dataset
from coadvise.data.workers import worker_batches

class Maps(Dataset):
    def __len__(self):
        return 64
    def __getitem__(self, number):
        torch.ones(10_000_000)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

counts = list(worker_batches(Maps(), 1, str))
print(True, counts[-1] - counts[4])
"""

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library is left as it is")


def faults(script: str, kind: str) -> int:
    """Pages fetched from the system while a process makes and leaves 60 maps of 40 MB."""
    out = subprocess.run([sys.executable, "-c", script, kind], capture_output=True, text=True, check=True).stdout
    kept, count = out.split()
    assert kept == str(kind == "kept")
    return int(count)


def test_kept_memory_is_not_fetched_from_the_system_again() -> None:
    given_back = faults(FAULTS, "given back")
    assert 10 * faults(FAULTS, "kept") < given_back
    assert 10 * faults(IN_A_LOADER, "kept") < given_back
