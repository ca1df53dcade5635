"""`coadvise shard`: data as tar shards, from the same words as `fit`."""

from collections.abc import Sequence
from pathlib import Path

from coadvise.config.reading import load_config
from coadvise.data.shards.write import ALL, MEGABYTES, Outcome, Part, write_shards
from coadvise.data.sources import source_of
from coadvise.data.sources.shards import PREFIX, place_of
from coadvise.errors import UserError
from coadvise.runs.plan import SMALL_IMAGES
from coadvise.training.listener import Listener, Silent


def shard(
    data: str, out: str, overrides: Sequence[str] = (), presize: int = 0, megabytes: float = MEGABYTES,
    part: str | None = None, listener: Listener | None = None,
) -> Outcome:  # fmt: skip
    """Writes data as tar shards, those that are not there yet.

    Args:
        data: as for `fit`.
        out: a folder, or an address that fsspec knows, such as s3://BUCKET/PATH.
        overrides: `data.KEY=value` or `seed=N`, as for `fit`.
        presize, megabytes: see `write_shards`.
        part: K/N; this process writes every N-th shard, from the K-th on.

    Raises:
        UserError, StorageError: as `write_shards`; data that cannot be used.
    """
    listener = listener or Silent()
    own = ALL if part is None else Part.parsed(part)
    if strange := [change for change in overrides if not change.startswith(("data.", "seed="))]:
        raise UserError(f"'{strange[0]}': shards are written by data.KEY=value and seed=N alone; leave it out")
    source = source_of(load_config(SMALL_IMAGES, overrides, source=data))  # presets do not differ in which pictures
    place = place_of(out)
    if place.local is not None and place.local.resolve().is_relative_to(Path(source.where).resolve()):
        raise UserError(f"--out {out} lies in the data; give a folder outside of them")
    for line in (f"data: {source.where}", f"split: {source.note}", *source.remarks):
        listener.say(line)
    done = write_shards(
        source, place, presize, megabytes, own, lambda done, total: listener.progress("shards", done, total, {})
    )
    listener.say(f"shards: {done.made} written now, {done.shards - done.made - done.missing} there already")
    if done.missing:
        listener.say(f"{done.missing} of {done.shards} are missing; the process that finds all writes the index")
    else:
        where = place.url if place.local is None else str(place.local)
        listener.say(f"{where}: {done.bytes / 1e6:.0f} MB in {done.shards} shards; use them as {PREFIX}{where}")
    return done
