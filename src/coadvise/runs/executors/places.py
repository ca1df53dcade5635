"""From the word behind `--on` to an executor."""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from coadvise.config.schema import RunConfig
from coadvise.errors import UserError
from coadvise.runs.executors.cluster import Cluster, needs_of
from coadvise.runs.options import LOCAL, SLURM
from coadvise.training.engine import Engine


@contextmanager
def cluster_of(on: str, folder: Path, config: RunConfig, engine: Engine, jobs: int | None) -> Iterator[Cluster | None]:
    """The cluster that `--on` names, connected; None for this machine. Writes nothing.

    Args:
        folder: the run directory or the study's folder.
        jobs: networks at the same time, at most; None: as many as there is room for.

    Raises:
        UserError: its extra is not installed, it does not answer, or no machine of it has what a network needs.
    """
    if on == LOCAL:
        yield None
        return
    if engine.processes > 1:
        raise UserError(f"--on {on} trains several networks, torchrun one network on several processes; use only one")
    needs = needs_of(config, engine)
    if on == SLURM:
        from coadvise.runs.executors.slurm import Slurm

        with closing(Slurm(folder, needs, jobs)) as slurm:
            yield slurm
        return
    from coadvise.runs.executors.ray import Ray

    with closing(Ray(on, folder, needs, jobs)) as ray:
        yield ray
