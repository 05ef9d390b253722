"""What this process may use of the machine."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import sys
from collections.abc import Iterator

import torch


def available_cores() -> int:
    """CPU cores that the scheduler lets this process run on, or all of them where it does not say."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_in_use(device: torch.device) -> int:
    """Bytes of memory that this process holds now, or, for a GPU, the most that its tensors have taken."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # no Linux: the most so far, in kilobytes but on a Mac
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024


_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h


def keep_freed_memory() -> None:
    """Lets this process keep memory that it frees, instead of giving it back to the system to ask for it anew.

    A step of training takes and frees the same blocks every time, and glibc gives big ones back at once: at the
    original's sizes the system cleared a gigabyte a step, a fifth of its time. Threads keep arenas of their own (with
    one for all, those of `side_by_side` wait for its lock), but for blocks above 64 MB that they take themselves, which
    glibc still gives back. It holds until the process ends. Does nothing where the C library is not glibc.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1)):
            mallopt(parameter, value)


@contextlib.contextmanager
def starting_in_background() -> Iterator[None]:
    """Processes and threads that are started within this get a core when one is free, or when their turn comes, and do
    not take it at once from one that computes when they wake (Linux's SCHED_BATCH). Children of theirs do the same.

    For Ray's own processes, a dozen, each of which looks a hundred times a second whether there is something to do.
    Does nothing where the system has no such thing.
    """
    changed = _schedule("SCHED_BATCH", instead_of="SCHED_OTHER")
    try:
        yield
    finally:
        if changed:
            leave_background()


def leave_background() -> None:
    """This thread, and those that it starts, as if no `starting_in_background` had been around its process."""
    _schedule("SCHED_OTHER", instead_of="SCHED_BATCH")


def _schedule(policy: str, instead_of: str) -> bool:
    """Whether this thread had the other of the system's policies and has this one now."""
    with contextlib.suppress(AttributeError, OSError):  # no Linux, or a container that forbids it: all runs without
        if os.sched_getscheduler(0) == getattr(os, instead_of):
            os.sched_setscheduler(0, getattr(os, policy), os.sched_param(0))
            return True
    return False
