"""The machine as this process sees it: its cores, its memory, and its priority."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import torch


def available_cores() -> int:
    """Return the number of CPU cores that this process may run on, or of all cores where the system does not say."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_in_use(device: torch.device) -> int:
    """Return the bytes of memory that this process holds now; for a GPU, the most that its tensors have taken.

    Outside of Linux it is the most that the process has ever held.
    """
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # There is no /proc here.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, other systems kilobytes.


def total_memory() -> int:
    """Return the bytes of memory that this process may use: those of the machine, or its limit if that is lower.

    The limit is that of its control group, as in a container or a Slurm job, or of its address space (`ulimit -v`).
    """
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *_group_limits()]
    address_space = resource.getrlimit(resource.RLIMIT_AS)[0]
    return min(limits if address_space == resource.RLIM_INFINITY else [*limits, address_space])


def _group_limits() -> Iterator[int]:
    """Yield the limits, in bytes, of this process's control group and of those around it."""
    paths = [Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")]
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            number, _, group = line.split(":", 2)
            if number == "0":
                inside = Path("/sys/fs/cgroup") / group.lstrip("/")
                paths += [folder / "memory.max" for folder in (inside, *inside.parents)]
    for path in paths:
        with contextlib.suppress(OSError, ValueError):  # "max" is no number
            yield int(path.read_text())


_M_MXFAST, _M_TRIM_THRESHOLD, _M_MMAP_MAX = 1, -1, -4  # Numbers of these parameters in malloc.h.


def keep_freed_memory() -> None:
    """Let this process keep the memory that it frees, instead of returning it to the system.

    It holds until the process ends. Does nothing where the C library is not glibc.
    """
    # A training step allocates and frees the same blocks every time, and glibc returns big ones at once: at the sizes
    # of the original model the system cleared a gigabyte in each step, which was a fifth of the step's time.
    # Threads keep arenas of their own: with a single arena the threads of `run_parallel` would wait for its lock.
    # Blocks above 64 MB that such a thread allocates itself are still returned to the system.
    _set_malloc((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1))


def join_freed_memory() -> None:
    """Let this process join each small block of memory that it frees to its neighbours at once, not thousands later.

    It holds until the process ends. Does nothing where the C library is not glibc.
    """
    # By default they are joined when a block above a kilobyte is asked for. After the small calls of a step that took
    # up to half a millisecond, for five kilobytes.
    _set_malloc((_M_MXFAST, 0))


def _set_malloc(*values: tuple[int, int]) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        for parameter, value in values:
            mallopt(parameter, value)


@contextlib.contextmanager
def starting_in_background() -> Iterator[None]:
    """Start the processes and threads of this context under Linux's scheduling policy SCHED_BATCH.

    When they wake they do not take the core from a process that computes, but wait until one is free or their turn
    comes. Their children inherit the policy. Does nothing where the system has no such policy.
    """
    # It is for Ray's own processes: a dozen, and each of them looks for work a hundred times a second.
    changed = _change_policy("SCHED_BATCH", instead_of="SCHED_OTHER")
    try:
        yield
    finally:
        if changed:
            leave_background()


def leave_background() -> None:
    """Put this thread, and those that it starts, back under the usual policy, as if never started in the background."""
    _change_policy("SCHED_OTHER", instead_of="SCHED_BATCH")


def _change_policy(policy: str, instead_of: str) -> bool:
    """Give this thread `policy` if it has `instead_of` now; return whether that was done."""
    # Where the system is not Linux, or a container forbids the change, everything runs without it.
    with contextlib.suppress(AttributeError, OSError):
        if os.sched_getscheduler(0) == getattr(os, instead_of):
            os.sched_setscheduler(0, getattr(os, policy), os.sched_param(0))
            return True
    return False


@contextlib.contextmanager
def signals_blocked(*signals: signal.Signals) -> Iterator[None]:
    """Let the processes that start in this context, and all that they start, never receive these signals."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
