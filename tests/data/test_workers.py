"""A loader process that is killed, crashes or hangs ends the run in seconds, and the picture it read is named."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from torch.utils.data import Dataset

from coadvise.data import workers
from coadvise.data.images import UnreadableImageError
from coadvise.data.workers import mark_reading, worker_batches
from coadvise.errors import UserError

HAPPENS: dict[str, Callable[[], object]] = {
    "nothing": lambda: None,
    "stopped": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "crashed": lambda: os._exit(3),
    "slow": lambda: time.sleep(0.7),
}


class Pictures(Dataset[int]):
    """Forty pictures, one a batch. Something happens to the process that reads number 7."""

    def __init__(self, happens: str = "nothing", error: Exception | None = None) -> None:
        self.happens, self.error = happens, error

    def __len__(self) -> int:
        return 40

    def __getitem__(self, number: int) -> int:
        if number != 7 or "between" not in self.happens:
            mark_reading(number)
        if number == 7:
            HAPPENS[self.happens.partition(" ")[0]]()
            if self.error:
                raise self.error
        return number


def name(number: int) -> str:
    return f"image {number}.png"


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Checks often; afterwards no handler and no process is left."""
    monkeypatch.setattr(workers, "LOOK_EVERY", 0.2)
    before = signal.getsignal(signal.SIGCHLD)
    yield
    assert signal.getsignal(signal.SIGCHLD) == before
    for process in multiprocessing.active_children():
        process.join(timeout=10)
        assert not process.is_alive()


@pytest.mark.parametrize("processes", [0, 1, 3])
def test_batches_come_in_order(processes: int) -> None:
    assert list(worker_batches(Pictures(), processes, name)) == list(range(40))


def test_more_processes_than_cores_are_not_started(recwarn: pytest.WarningsRecorder) -> None:
    cores = workers.useful_workers(10**6)
    assert 1 <= cores <= (os.cpu_count() or 1)
    assert [workers.useful_workers(asked) for asked in (0, 1, cores, cores + 1)] == [0, 1, cores, cores]
    assert list(worker_batches(Pictures(), cores + 3, name)) == list(range(40))
    assert not recwarn.list  # PyTorch warns of more


@pytest.mark.parametrize(
    ("asked", "device", "seconds"),
    [(0, "cpu", 11.0), (0, "cuda", 11.0), (2, "cpu", 7.0), (2, "cuda", 4.0), (9, "cuda", 3.0)],
)
def test_processes_run_beside_a_gpu_and_share_a_cpu(
    asked: int, device: str, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "useful_workers", lambda asked: min(asked, 4))
    assert workers.seconds_with_workers(making=8.0, using=3.0, asked=asked, device=device) == seconds


@pytest.mark.parametrize(
    ("happens", "says"),
    [
        ("killed", r"was ended by SIGKILL while it read 'image 7\.png'; run the same command again"),
        ("crashed", r"crashed .*'image 7\.png'"),
        ("stopped", r"has hung for 1 s while it read 'image 7\.png'"),
        ("stopped between pictures", r"has hung for 1 s while it read no picture"),
    ],
)
def test_the_picture_of_a_process_that_ends_or_hangs_is_named(
    happens: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the next batch, and not in the middle of something else."""
    batches = worker_batches(Pictures(happens), 2, name)
    assert next(batches) == 0
    time.sleep(0.3)
    monkeypatch.setattr(workers, "PATIENCE", 1.0)
    with pytest.raises(UserError, match=rf"loader process \d+ {says}"):
        list(batches)


def test_slow_is_not_dead() -> None:
    """Waiting goes on after several checks."""
    assert list(worker_batches(Pictures("slow"), 2, name)) == list(range(40))


def test_a_training_process_that_takes_long_between_batches_finds_its_processes_alive(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(workers, "PATIENCE", 0.2)
    batches = worker_batches(Pictures(), 1, name)
    assert next(batches) == 0
    time.sleep(0.7)  # it validates, say
    monkeypatch.setattr(workers, "PATIENCE", 30.0)
    assert list(batches) == list(range(1, 40))


def test_the_user_s_errors_come_in_one_line_and_ours_whole() -> None:
    with pytest.raises(UserError, match=r"^'image 7.png': truncated$"):
        list(worker_batches(Pictures(error=UnreadableImageError(f"{name(7)!r}: truncated")), 2, name))
    with pytest.raises(RuntimeError, match=r"(?s)Traceback.*assertion of ours"):
        list(worker_batches(Pictures(error=RuntimeError("assertion of ours")), 2, name))


def test_a_signal_to_the_whole_process_group_is_the_training_process_s_to_handle() -> None:
    batches = worker_batches(Pictures(), 2, name)
    found = [next(batches)]
    for process in multiprocessing.active_children():
        os.kill(process.pid, signal.SIGTERM)
    found += [next(batches) for _ in range(30)]
    assert found == list(range(31))
    batches.close()  # type: ignore[attr-defined]  # it is a generator


EXITS = """
import time
import coadvise
from torch.utils.data import Dataset
from coadvise.data.workers import worker_batches

class Pictures(Dataset):
    def __len__(self):
        return 100

    def __getitem__(self, number):
        time.sleep(600 if number == 3 else 0)
        return number

batches = worker_batches(Pictures(), 2, str)
print(next(batches))
"""


def test_a_program_that_exits_with_batches_to_come_leaves_no_process(tmp_path: Path) -> None:
    """The one at picture 3 is busy for ten minutes."""
    done = subprocess.run([sys.executable, "-c", EXITS], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "0\n"), done.stderr
