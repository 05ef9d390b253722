"""What this process may use of the machine."""

from __future__ import annotations

import os


def available_cores() -> int:
    """CPU cores that the scheduler lets this process run on, or all of them where it does not say."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
