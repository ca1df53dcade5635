"""Tasks on a Ray cluster."""

import os
import socket
import warnings
from pathlib import Path
from typing import Any

from coadvise.errors import LostProcessError, UserError
from coadvise.runs.executors.base import Task
from coadvise.runs.executors.cluster import Cluster, Needs, Ticket, work
from coadvise.runs.options import RAY

CONNECT_SECONDS = 10.0
TRIES = 4  # to connect as a client, each of 30 seconds
# What a cluster that is started here does not do, unless the user's environment says otherwise: report its use to
# Ray's makers, and print that a process died, which `run_tasks` says.
_QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS_SKIP_REGEX": "A worker died or was killed"}


class Ray(Cluster):
    """A cluster that this process joins, or starts for itself. One that it is connected to already is used as it is.

    Args:
        on: "ray" for the cluster of RAY_ADDRESS or of this machine, or a new one here; or ray://HOST:PORT.

    Raises:
        UserError: it does not answer, or no node of it has the processors and the GPU.
    """

    def __init__(self, on: str, folder: Path, needs: Needs, jobs: int | None) -> None:
        super().__init__(folder, needs, jobs)
        for name, value in _QUIET.items():
            os.environ.setdefault(name, value)
        import ray

        self._ray: Any = ray
        self._joined = not ray.is_initialized()
        if self._joined:
            self._join(on)
        try:
            self._check(on)
        except BaseException:
            self._leave()
            raise

    def _join(self, on: str) -> None:
        address = os.environ.get("RAY_ADDRESS") if on == RAY else on
        host, _, port = (address or "").removeprefix("ray://").rpartition(":")
        try:
            if port.isdecimal():  # Ray itself tries for a minute, and then ends the process
                socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
            for left in reversed(range(TRIES)):
                try:
                    self._init(address)
                    break
                except ConnectionError:  # it answers, but has to start a process for each client
                    if not left or not on.startswith("ray://"):
                        raise
        except (OSError, RuntimeError, ValueError) as error:
            reason = str(error).partition("\n")[0]
            raise UserError(
                f"--on {on}: no Ray cluster answers at {address or 'this machine'} ({reason}); start one with "
                "'ray start --head', or give another address; if it asks for a token, set RAY_AUTH_MODE=token"
            ) from None

    def _init(self, address: str | None) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Ray Client connection timed out")
            self._ray.init(address, log_to_driver=False, logging_level="error", include_dashboard=False)

    def _check(self, on: str) -> None:
        """Raises UserError if no node is large enough."""
        found = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        if not any(n.get("CPU", 0) >= self.needs.cpus and n.get("GPU", 0) >= self.needs.gpus for n in found):
            cpus, gpus = (int(max((n.get(kind, 0) for n in found), default=0)) for kind in ("CPU", "GPU"))
            raise UserError(
                f"--on {on}: a network needs {self.needs}, but no node has more than {cpus} processors and {gpus} "
                "GPUs; change engine.cpus or engine.gpus"
            )

    def submit(self, name: str, ticket: Ticket, task: Task) -> "_Handle":
        remote = self._ray.remote(  # each task has a process of its own, as it has on this machine
            num_cpus=self.needs.cpus, num_gpus=self.needs.gpus, max_retries=0, max_calls=1
        )(work)
        return _Handle(self._ray, remote.options(name=name).remote(ticket, Path.cwd(), self.needs, task))

    def close(self) -> None:
        super().close()
        self._leave()

    def _leave(self) -> None:
        if self._joined:
            self._ray.shutdown()


class _Handle:
    def __init__(self, ray: Any, reference: Any) -> None:
        self._ray, self._reference = ray, reference

    def ended(self) -> str | None:
        errors = self._ray.exceptions
        try:
            if not self._ray.wait([self._reference], timeout=0)[0]:
                return None
            self._ray.get(self._reference)
        except errors.TaskCancelledError:
            return "it was taken out of the queue"
        except errors.RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise error.cause from None
            last = str(error.cause or error).strip().rpartition("\n")[2]
            raise UserError(
                f"a node of the Ray cluster cannot train ({last}); it needs the same versions of Python, Ray and "
                "coadvise"
            ) from None
        except errors.RayError as error:
            return f"its process or node died ({type(error).__name__})"
        except ConnectionError as error:
            raise LostProcessError(f"the Ray cluster no longer answers ({error}); run the same command again") from None
        return "its process ended"

    def cancel(self) -> None:
        """A task that runs gets SIGINT."""
        self._ray.cancel(self._reference)
