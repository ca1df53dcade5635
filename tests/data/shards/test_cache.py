import hashlib
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from coadvise.data.shards.cache import FileCache, Kept

CONTENTS = [bytes([number]) * 100 for number in range(12)]
FILES = [Kept(f"{number}.tar", 100, hashlib.sha256(content).hexdigest()) for number, content in enumerate(CONTENTS)]


def fetched(cache: FileCache, number: int) -> bytes:
    def read(start: int, stop: int) -> bytes:
        time.sleep(0.003)
        return CONTENTS[number][start:stop]

    with cache.open(FILES[number], "there", read, lambda: None) as file:
        return file.read()


def kept(cache: FileCache) -> int:
    """Bytes, of whole files and of those that are being fetched."""
    with cache._counted():
        return sum(path.stat().st_size for path in cache.folder.glob("[!.]*"))


@pytest.mark.parametrize("files", [1, 2, 5])
def test_however_many_fetch_at_once_the_cache_keeps_its_bounds(files: int, tmp_path: Path) -> None:
    """Who finds no room waits for what the others fetch, even where a single file is all that fits, or more."""
    cache = FileCache(tmp_path, 100 * files + 50)
    wanted = [*range(12)] * 4
    with ThreadPoolExecutor(6) as pool:
        tasks = [pool.submit(fetched, cache, number) for number in wanted]
        most = 0
        while not all(task.done() for task in tasks):
            most = max(most, kept(cache))
        assert [task.result() for task in tasks] == [CONTENTS[number] for number in wanted]
    assert 0 < most <= 100 * files
    assert not [*tmp_path.glob("*.part")]


def test_a_file_larger_than_the_cache_is_kept_alone(tmp_path: Path) -> None:
    cache = FileCache(tmp_path, 10)
    with ThreadPoolExecutor(4) as pool:
        assert [*pool.map(lambda number: fetched(cache, number), range(12))] == CONTENTS
    assert kept(cache) == 100


def test_what_a_dead_process_left_makes_room(tmp_path: Path) -> None:
    cache = FileCache(tmp_path, 100)
    (tmp_path / f"{FILES[0].sha256}.part").write_bytes(bytes(100))
    assert fetched(cache, 1) == CONTENTS[1]
    assert [path.name for path in tmp_path.glob("[!.]*")] == [FILES[1].sha256]
