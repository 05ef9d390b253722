"""`run_tasks`: results, order, bounds, users' mistakes, defects and lost processes, in tasks and in actors."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from elmo_ray.cluster.session import check_room, device_for
from elmo_ray.cluster.tasks import run_tasks
from elmo_ray.config import ComputeConfig
from elmo_ray.errors import ConfigError, DataError, ElmoRayError

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray_session", "by_value")]


@pytest.fixture
def by_value() -> None:
    """Let the functions here travel as code: worker processes cannot import a test."""
    import ray

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


class Task:
    """An item is a word for what happens; `killed` is by SIGKILL, once, and `always killed` each time."""

    def __init__(self, folder: Path):
        self.folder, self.calls = folder, 0

    def __call__(self, item: str) -> tuple[str, int, int]:
        self.calls += 1
        word, _, number = item.partition("-")
        with contextlib.suppress(FileExistsError):
            (self.folder / item).touch(exist_ok=False)
            if word == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
        if word == "always killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if word == "slow":
            for _ in range(600):
                time.sleep(0.1)  # what cancels a task interrupts Python, not a call
        if word == "mistake":
            raise DataError(f"text.txt, line {number}: bad")
        if word == "defect":
            raise ZeroDivisionError("a defect")
        return item, os.getpid(), self.calls


@pytest.mark.parametrize("keep", [False, True], ids=["tasks", "actors"])
def test_results_come_by_number_and_lost_processes_are_replaced(
    keep: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    items = ["a", "b", "killed-1", "c", "killed-2", "d"]
    with caplog.at_level(logging.INFO, "elmo_ray"):
        results = dict(run_tasks(Task(tmp_path), items, workers=2, cpus=0.5, max_failures=1, keep=keep))
    assert [results[number][0] for number in range(len(items))] == items
    assert caplog.text.count("failure 1 of 1: a task lost its worker process and begins again") == 2
    most = max(calls for _, _, calls in results.values())
    assert most > 1 if keep else most == 1, "an actor's function keeps what it has; each task begins with a new one"


@pytest.mark.parametrize("keep", [False, True], ids=["tasks", "actors"])
def test_a_mistake_arrives_as_itself_and_ends_what_runs(keep: bool, tmp_path: Path) -> None:
    start = time.monotonic()
    with pytest.raises(DataError, match=r"^text\.txt, line 7: bad$") as caught:
        dict(run_tasks(Task(tmp_path), ["slow", "mistake-7", "late", "later"], workers=2, cpus=0.5, keep=keep))
    assert type(caught.value) is DataError
    import ray

    while ray.available_resources().get("CPU", 0.0) < 4:
        assert time.monotonic() < start + 50, "the slow task still has its CPU"
        time.sleep(0.1)
    assert not (tmp_path / "later").exists()


def test_a_defect_is_no_user_s_mistake(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError, match="a defect"):
        dict(run_tasks(Task(tmp_path), ["defect"], workers=1, cpus=0.5))


@pytest.mark.parametrize("keep", [False, True], ids=["tasks", "actors"])
def test_an_item_that_kills_every_process_ends_it_all(keep: bool, tmp_path: Path) -> None:
    with pytest.raises(ElmoRayError, match=r"more than cluster\.max_failures=1 times; .*\? wait a while; ") as caught:
        tasks = run_tasks(
            Task(tmp_path), ["always killed"], workers=1, cpus=0.5, max_failures=1, keep=keep, advice="wait a while"
        )
        dict(tasks)
    assert "\n" not in str(caught.value)


def test_results_do_not_pile_up(tmp_path: Path) -> None:
    items = [f"item-{number}" for number in range(9)]
    with contextlib.closing(run_tasks(Task(tmp_path), items, workers=2, cpus=0.5)) as results:
        next(results)
        time.sleep(2)
        assert len(list(tmp_path.iterdir())) <= 2


def test_actors_without_room_keep_nothing_waiting(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    items = [f"item-{number}" for number in range(5)]
    results = dict(run_tasks(Task(tmp_path), items, workers=3, cpus=3.0, keep=True))
    assert len({pid for _, pid, _ in results.values()}) == 1 and len(results) == 5
    assert "core_worker.cc" not in capfd.readouterr().err  # Ray warns of actors that it would restart by itself


def test_what_the_cluster_cannot_hold() -> None:
    check_room(ComputeConfig(workers=8, cpus_per_worker=0.5), 8)
    with pytest.raises(ConfigError, match=r"cluster\.workers=8 x .* room for 5; .* 4 on 1 node \(4\)"):
        check_room(ComputeConfig(workers=8, cpus_per_worker=0.75), 8)
    with pytest.raises(ConfigError, match=r"cluster\.cpus_per_worker=5\.0: no node has so many CPUs"):
        check_room(ComputeConfig(cpus_per_worker=5.0), 1)
    assert device_for(ComputeConfig(workers=2), 2) == "cpu"
    with pytest.raises(ConfigError, match=r"cluster\.device=gpu: cluster\.workers=2 needs a GPU each.* has 0"):
        device_for(ComputeConfig(workers=2, device="gpu"), 2)
