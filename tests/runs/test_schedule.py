"""Which networks are trained beside each other, with how many threads, and when all are done."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from coadvise.runs.options import FitOptions
from coadvise.runs.plan import RunPlan, plan_fit
from coadvise.runs.schedule import Phase, at_once, duration, phases, threads_of
from coadvise.training.engine import Engine


@pytest.fixture
def plan(tiny_images: Path, tiny_preset: str) -> RunPlan:
    """Two teachers, an advised student and one alone, as many at a time as the machine is good for."""
    return plan_fit(FitOptions.of(data=tiny_images, preset=tiny_preset, baseline=True))


def _names(phase: Phase) -> list[str]:
    return [part.name for part in phase.parts]


def test_a_single_student_has_all_threads_and_several_share_them(plan: RunPlan, monkeypatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    engine = Engine(plan.config.engine)
    (all_at_once,) = phases(plan, engine)
    assert (_names(all_at_once), all_at_once.jobs) == ([part.name for part in plan.parts], 2)
    lonely = replace(plan, parts=(*plan.teachers, plan.students[0]))
    teachers, student = phases(lonely, engine)
    assert (_names(teachers), teachers.jobs) == (["teachers/conv", "teachers/inv"], 2)
    assert (_names(student), student.jobs) == (["students/advised-0"], 1)
    assert [threads_of(jobs) for jobs in (1, 2, 3)] == [2, 1, 1]
    assert [phase.jobs for phase in phases(replace(lonely, jobs=3), engine)] == [3], "as the user says"
    copying = phases(replace(plan, reuse=Path("other")), engine)
    assert [_names(phase)[0].split("/")[0] for phase in copying] == ["teachers", "students"]
    monkeypatch.setattr(Engine, "processes", 2)
    assert [phase.jobs for phase in phases(plan, engine)] == [1], "torchrun's processes share one network"


def test_teachers_that_are_given_take_no_place(plan: RunPlan, finished: Path, monkeypatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    given = {
        name: teacher.model_copy(update={"start": str(finished / "teachers" / name)})
        for name, teacher in plan.config.teachers.items()
    }
    config = plan.config.model_copy(update={"teachers": given})
    (phase,) = phases(replace(plan, config=config), Engine(config.engine))
    assert phase.jobs == at_once(2, Engine(config.engine)) == 2


@pytest.mark.parametrize(
    ("seconds", "jobs", "wanted"),
    [
        ((10, 20, 30, 40), 1, 100),
        # conv 0-10, alone 10-50, inv 0-20, advised 20-50
        ((10, 20, 30, 40), 2, 50),
        # the advised student waits for inv; alone takes the free place meanwhile: conv 0-5, alone 5-7, inv 0-20
        ((5, 20, 30, 2), 2, 50),
        # a place for each: advised 20-50
        ((5, 20, 30, 2), 8, 50),
        ((0, 0, 30, 40), 2, 40),  # trained already
    ],
)
def test_all_are_done_when_the_last_is(plan: RunPlan, seconds: tuple[float, ...], jobs: int, wanted: float) -> None:
    assert [part.role for part in plan.parts] == ["teacher", "teacher", "advised", "alone"]
    named = dict(zip((part.name for part in plan.parts), seconds, strict=True))
    assert duration(Phase(plan.parts, jobs), named) == wanted
