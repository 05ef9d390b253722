"""Freed memory that stays with the process, and threads and processes that let others go before."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from elmo_ray.machine import starting_in_background

SCRIPT = """
import resource, sys, torch
from elmo_ray.machine import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
def use():
    torch.ones(16 << 20)  # 64 MB
for _ in range(20):  # until there is room for a block and what aligns it
    use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(mode: str) -> int:
    done = subprocess.run([sys.executable, "-c", SCRIPT, mode], check=True, capture_output=True, text=True)
    return int(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_a_block_that_is_taken_again_is_not_cleared_again() -> None:
    given_back = page_faults("give back")
    if given_back < 1000:
        pytest.skip("this C library keeps big blocks by itself")
    assert page_faults("keep") < given_back / 100


_POLICY = "import os; from elmo_ray.machine import leave_background; "
_POLICY += "print(os.sched_getscheduler(0)); leave_background(); print(os.sched_getscheduler(0))"


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="Linux only")
def test_what_starts_in_the_background_may_leave_it() -> None:
    def started() -> list[int]:
        done = subprocess.run([sys.executable, "-c", _POLICY], check=True, capture_output=True, text=True)
        return [int(word) for word in done.stdout.split()]

    with pytest.raises(KeyError), starting_in_background():
        assert started() == [os.SCHED_BATCH, os.SCHED_OTHER]
        with starting_in_background():
            pass
        assert started() == [os.SCHED_BATCH, os.SCHED_OTHER], "the outer one holds on"
        raise KeyError
    assert started() == [os.SCHED_OTHER, os.SCHED_OTHER], "an error does not keep it"


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="Linux only")
def test_a_policy_that_a_user_chose_stays() -> None:
    script = """
import os
from elmo_ray.machine import leave_background, starting_in_background
os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
with starting_in_background():
    print(os.sched_getscheduler(0))
leave_background()
print(os.sched_getscheduler(0))
"""
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert [int(word) for word in done.stdout.split()] == [os.SCHED_IDLE] * 2
