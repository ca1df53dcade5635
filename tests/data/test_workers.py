"""A loader process that is killed, crashes or hangs ends the run in seconds, and the file it was at is named."""

import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from torch.utils.data import Dataset

from coadvise.data import workers
from coadvise.data.images import UnreadableImageError
from coadvise.data.workers import taking_up, worker_batches
from coadvise.errors import UserError

PATHS = tuple(Path(f"image {number}.png") for number in range(40))


class Files(Dataset[int]):
    """Forty files, one a batch. Something happens to the process that takes up number 7."""

    def __init__(self, happens: str = "nothing") -> None:
        self.happens = happens

    def __len__(self) -> int:
        return len(PATHS)

    def __getitem__(self, number: int) -> int:
        if number != 7:
            taking_up(number)
            return number
        if self.happens != "stopped between files":
            taking_up(number)
        if self.happens.startswith("stopped"):
            os.kill(os.getpid(), signal.SIGSTOP)
        elif self.happens == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.happens == "crashed":
            os._exit(3)
        elif self.happens == "slow":
            time.sleep(1.0)
        elif self.happens == "unreadable":
            raise UnreadableImageError(f"{str(PATHS[7])!r}: truncated")
        elif self.happens == "our fault":
            raise RuntimeError("assertion of ours")
        return number


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Looks often, and leaves PyTorch's handler of ended children as it found it."""
    monkeypatch.setattr(workers, "LOOK_EVERY", 0.3)
    before = signal.getsignal(signal.SIGCHLD)
    yield
    assert signal.getsignal(signal.SIGCHLD) == before


@pytest.mark.parametrize("processes", [0, 1, 3])
def test_batches_come_in_order(processes: int) -> None:
    assert list(worker_batches(Files(), processes, PATHS)) == list(range(40))


def test_more_processes_than_cores_are_not_started(recwarn: pytest.WarningsRecorder) -> None:
    cores = workers.useful_workers(10**6)
    assert 1 <= cores <= (os.cpu_count() or 1)
    assert [workers.useful_workers(asked) for asked in (0, 1, cores, cores + 1)] == [0, 1, cores, cores]
    assert list(worker_batches(Files(), cores + 3, PATHS)) == list(range(40))
    assert not recwarn.list  # PyTorch warns of more


@pytest.mark.parametrize(
    ("asked", "device", "seconds"),
    [(0, "cpu", 11.0), (0, "cuda", 11.0), (2, "cpu", 7.0), (2, "cuda", 4.0), (9, "cuda", 3.0)],
)
def test_processes_work_beside_a_gpu_and_share_a_cpu(
    asked: int, device: str, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "useful_workers", lambda asked: min(asked, 4))
    assert workers.seconds_with_workers(making=8.0, using=3.0, asked=asked, device=device) == seconds


@pytest.mark.parametrize(
    ("happens", "says"),
    [
        ("killed", r"loader process \d+ was ended by SIGKILL while it read 'image 7\.png'; run the same command again"),
        ("crashed", r"loader process \d+ crashed while it read 'image 7\.png'"),
        ("stopped", r"loader process \d+ has hung for 2 s while it read 'image 7\.png'; look after that file"),
    ],
)
def test_the_file_of_a_process_that_ends_or_hangs_is_named(
    happens: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if happens == "stopped":  # of the others none hangs, however long it takes to begin
        monkeypatch.setattr(workers, "PATIENCE", 2.0)
    with pytest.raises(UserError, match=says):
        list(worker_batches(Files(happens), 2, PATHS))


def test_a_process_that_hangs_before_it_takes_up_a_file_is_found_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "PATIENCE", 2.0)
    with pytest.raises(UserError, match="have hung for 2 s, none of them reading a file"):
        list(worker_batches(Files("stopped between files"), 2, PATHS))


def test_a_killed_process_is_noticed_while_the_training_process_does_something_else() -> None:
    """Not by an exception in the middle of a step or a save: by the next batch."""
    batches = worker_batches(Files("killed"), 2, PATHS)
    assert next(batches) == 0
    deadline = time.monotonic() + 1.0
    while time.monotonic() < deadline:
        sum(range(1000))
    with pytest.raises(UserError, match="SIGKILL"):
        list(batches)


def _let_go_and_end_later() -> None:
    os.closerange(3, 1024)  # the pipe that tells of the end among them
    time.sleep(0.5)
    os._exit(3)


def test_a_process_whose_pipes_are_closed_is_waited_for() -> None:
    process = multiprocessing.Process(target=_let_go_and_end_later)
    process.start()
    watch = workers._Watch([process], np.array([0.0, -1.0, np.inf]), PATHS)
    watch.wait_for_an_end()
    with pytest.raises(UserError, match=f"loader process {process.pid} crashed before it read a file"):
        watch.check()


def test_slow_is_not_dead() -> None:
    """Waiting goes on over several looks."""
    assert list(worker_batches(Files("slow"), 2, PATHS)) == list(range(40))


def test_a_training_process_that_takes_its_time_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may validate between two batches, while the loader processes have nothing to do."""
    watches: list[workers._Watch] = []
    monkeypatch.setattr(
        workers, "_Watch", lambda *given, kind=workers._Watch: watches.append(kind(*given)) or watches[0]
    )
    batches = worker_batches(Files(), 1, PATHS)
    assert next(batches) == 0
    deadline = time.monotonic() + 60
    while watches[0].rows[0, 1:].tolist() != [2, math.inf]:  # two batches more are made ahead
        assert time.monotonic() < deadline
        time.sleep(0.01)
    with monkeypatch.context() as patch:
        patch.setattr(workers, "PATIENCE", -1.0)  # whatever anybody waits for has taken too long
        assert watches[0]._hangs() == ""
    assert list(batches) == list(range(1, 40))


def test_the_user_s_errors_come_in_one_line_and_ours_whole() -> None:
    with pytest.raises(UserError) as caught:
        list(worker_batches(Files("unreadable"), 2, PATHS))
    assert str(caught.value) == "'image 7.png': truncated"
    with pytest.raises(RuntimeError, match=r"(?s)Traceback.*assertion of ours"):
        list(worker_batches(Files("our fault"), 2, PATHS))


def test_a_signal_to_the_whole_process_group_is_the_training_process_s_to_obey() -> None:
    others = multiprocessing.active_children()
    batches = worker_batches(Files(), 2, PATHS)
    found = [next(batches)]
    processes = [child for child in multiprocessing.active_children() if child not in others]
    for process in processes:
        assert process.pid is not None
        os.kill(process.pid, signal.SIGTERM)
    found += [next(batches) for _ in range(30)]
    assert found == list(range(31))
    batches.close()  # type: ignore[attr-defined]  # it is a generator
    for process in processes:
        process.join(timeout=30)
        assert not process.is_alive()


EXITS = """
import sys, time
import coadvise
from pathlib import Path
from torch.utils.data import Dataset
from coadvise.data.workers import worker_batches

class Files(Dataset):
    def __len__(self):
        return 100

    def __getitem__(self, number):
        time.sleep(600 if number == 3 else 0)
        return number

batches = worker_batches(Files(), 2, [Path("x")] * 100)
print(next(batches))
"""


def test_a_program_that_exits_with_batches_to_come_leaves_no_process(tmp_path: Path) -> None:
    """The one at file 3 is busy for ten minutes."""
    done = subprocess.run([sys.executable, "-c", EXITS], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "0\n"), done.stderr
