"""Freed memory that stays with the process."""

from __future__ import annotations

import subprocess
import sys

import pytest

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


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_a_block_that_is_taken_again_is_not_cleared_again() -> None:
    given_back = page_faults("give back")
    if given_back < 1000:
        pytest.skip("this C library keeps big blocks by itself")
    assert page_faults("keep") < given_back / 100
