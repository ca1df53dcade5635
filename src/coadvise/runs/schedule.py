"""Which networks of a run are trained beside each other, and when all of them are done."""

from collections.abc import Mapping
from typing import NamedTuple

import torch

from coadvise.machine import shortcomings
from coadvise.runs.options import LOCAL
from coadvise.runs.plan import ADVISED, TEACHER, Part, RunPlan, adaptation
from coadvise.training.engine import Engine


class Phase(NamedTuple):
    """Networks of a run that are trained before the next phase begins, `jobs` at a time."""

    parts: tuple[Part, ...]
    jobs: int


def phases(plan: RunPlan, engine: Engine) -> list[Phase]:
    """One phase, in which students alone need not wait for teachers; or teachers, then students.

    Copying students and filling a cache need finished teachers. A single student has all cores to itself, unless the
    user says how many networks share them. A cluster gets all networks at once. The answer does not depend on what is
    finished, so that a run that was stopped goes on with the same threads, and so with the same bits.
    """
    mixed = plan.jobs is not None or plan.on != LOCAL or len(plan.students) > 1
    together = plan.reuse is None and plan.cache is None and mixed
    groups = [plan.parts] if together else [plan.teachers, plan.students]

    def jobs(parts: tuple[Part, ...]) -> int:
        if plan.on != LOCAL:
            return plan.jobs or len(parts)
        return plan.jobs or at_once(sum(adaptation(part, plan.config) != "none" for part in parts), engine)

    return [Phase(parts, jobs(parts)) for parts in groups if parts]


def at_once(networks: int, engine: Engine) -> int:
    """How many networks are trained at the same time where the user does not say: one a thread, or one a GPU.

    Threads of a small network wait for each other many times a step (`runs/executors/local.py`). One where processes
    could not keep out of each other's way.
    """
    if engine.processes > 1 or shortcomings():
        return 1
    places = torch.cuda.device_count() if engine.device.type == "cuda" else torch.get_num_threads()
    return max(1, min(places, networks))


def threads_of(jobs: int) -> int:
    """Threads of each of `jobs` networks that are trained at the same time."""
    return max(1, torch.get_num_threads() // jobs)


def duration(phase: Phase, seconds: Mapping[str, float]) -> float:
    """Seconds until all networks of a phase are trained, each as soon as it may be and a place is free.

    Args:
        seconds: of each network, by its name; networks that are not in it take none.
    """
    free = [0.0] * phase.jobs
    teachers_done = 0.0
    waiting = list(phase.parts)
    teachers = [part for part in waiting if part.role == TEACHER]
    while waiting:
        now = min(free)
        ready = [p for p in waiting if p.role != ADVISED or (not teachers and teachers_done <= now)]
        if not ready:  # advised students wait for a teacher that is still being trained
            free[free.index(now)] = min(time for time in (*free, teachers_done) if time > now)
            continue
        part = ready[0]
        waiting.remove(part)
        end = now + seconds.get(part.name, 0.0)
        free[free.index(now)] = end
        if part.role == TEACHER:
            teachers.remove(part)
            teachers_done = max(teachers_done, end)
    return max(free)
