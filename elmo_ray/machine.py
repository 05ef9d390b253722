"""What this process may use of the machine."""

from __future__ import annotations

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
