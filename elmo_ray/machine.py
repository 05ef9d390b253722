"""What this process may use of the machine."""

from __future__ import annotations

import ctypes
import os
import resource
import sys

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
