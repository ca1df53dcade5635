"""Tasks as jobs of SLURM, by submitit."""

import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

from coadvise.errors import UserError
from coadvise.runs.executors.base import Task
from coadvise.runs.executors.cluster import Cluster, Needs, Ticket, work

KIND = "slurm"  # of submitit's executors
# A job has the time limit of its partition or of SBATCH_TIMELIMIT; SIGUSR2 comes 90 seconds before it.
PARAMETERS: dict[str, Any] = {"slurm_time": None, "slurm_signal_delay_s": 90}
ASK_SECONDS = 20.0  # between two questions what became of a job; a job that ends by itself is known at once
END_SECONDS = 90.0  # that jobs of a command that died have to save and to end
_SUBMITTED = "_submitted.pkl"  # what submitit leaves of each job


class Slurm(Cluster):
    """Jobs of the SLURM that this machine submits to.

    Raises:
        UserError: there is no `sbatch` here, or SLURM has no node with the processors and the GPU.
    """

    def __init__(self, folder: Path, needs: Needs, jobs: int | None) -> None:
        super().__init__(folder, needs, jobs)
        if KIND == "slurm":
            self._check()

    def _check(self) -> None:
        if shutil.which("sbatch") is None:
            raise UserError("--on slurm: there is no 'sbatch' here; start the command on a login node of the cluster")
        wanted = [f"--cpus-per-task={self.needs.cpus}", *([f"--gpus-per-node={self.needs.gpus}"] * self.needs.gpus)]
        question = ["sbatch", "--test-only", *wanted, "--wrap=true"]
        tried = subprocess.run(question, capture_output=True, text=True, check=False)
        if tried.returncode:
            reason = tried.stderr.strip().rpartition("\n")[2]
            raise UserError(
                f"--on slurm: SLURM takes no job with {self.needs} ({reason}); change engine.cpus or engine.gpus, or "
                "choose a partition by SBATCH_PARTITION"
            )

    def submit(self, name: str, ticket: Ticket, task: Task) -> "_Handle":
        import submitit

        executor = submitit.AutoExecutor(self.folder / "slurm", cluster=KIND)
        gpus = {"gpus_per_node": self.needs.gpus} if self.needs.gpus else {}
        executor.update_parameters(name="coadvise", cpus_per_task=self.needs.cpus, **gpus, **PARAMETERS)
        try:
            return _Handle(executor.submit(work, ticket, Path.cwd(), self.needs, task))
        except submitit.core.utils.FailedJobError as error:
            raise UserError(f"{name}: SLURM did not take the job ({str(error).strip()})") from None

    def end_earlier(self) -> None:
        """Stops jobs that a command which died has left, and waits until they have saved their steps."""
        names = [path.name for path in (self.folder / "slurm").glob(f"*{_SUBMITTED}")]
        jobs = ",".join(name.removesuffix(_SUBMITTED) for name in names)
        if not jobs or shutil.which("scancel") is None:
            return
        subprocess.run(["scancel", *jobs.split(",")], capture_output=True, check=False)
        deadline = time.monotonic() + END_SECONDS
        while _queued(jobs) and time.monotonic() < deadline:
            time.sleep(1)


def _queued(jobs: str) -> bool:
    """Whether one of these jobs waits, runs or is about to end. A controller that does not answer means yes."""
    asked = subprocess.run(["squeue", "--noheader", "--jobs", jobs], capture_output=True, text=True, check=False)
    return bool(asked.stdout.strip() if not asked.returncode else "Invalid job id" not in asked.stderr)


class _Handle:
    def __init__(self, job: Any) -> None:
        self._job, self._asked = job, time.monotonic()

    def ended(self) -> str | None:
        """A job that ended by itself leaves a result. Of others submitit asks accounting, which not every SLURM has."""
        if not self._job.paths.result_pickle.exists() and not self._is_gone():
            return None
        log = (self._job.stderr() or "").strip().rpartition("\n")[2]
        return f"its job {self._job.job_id} ended" + (f" ({log})" if log else "")

    def _is_gone(self) -> bool:
        if shutil.which("squeue") is None:  # not SLURM, but submitit's stand-in for it
            return bool(self._job.done())
        if time.monotonic() - self._asked < ASK_SECONDS:
            return False
        self._asked = time.monotonic()
        return not _queued(self._job.job_id)

    def cancel(self) -> None:
        """A job that runs gets SIGTERM, and SLURM's KillWait to save."""
        self._job.cancel(check=False)
