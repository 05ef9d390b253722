"""Machines that are taken away with a notice, as spot machines are: checkpoints between the notice and the end.

Ray passes the notice of a cloud on as the draining of a node with a deadline. Ray Train tells its workers, lets them
train until the deadline, and then starts them again on the nodes that are left.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from typing import Any

logger = logging.getLogger(__name__)

WITHOUT_DEADLINE_S = 120.0
"""Seconds that Ray Train waits after a notice without a deadline."""

_LEAST_S = 2.0
"""Seconds between two checkpoints, and between the last one and the deadline."""


class SaveRequests:
    """Requests for checkpoints before the workers' end: one with the notice, then whenever half of the rest is over.

    deadline: returns the time of the end by `clock`, in seconds, None where nothing has been announced.
    """

    # Whatever is trained after the last checkpoint is lost. By halves it becomes little without many checkpoints.

    def __init__(self, deadline: Callable[[], float | None], clock: Callable[[], float] = time.monotonic) -> None:
        self._deadline, self._clock = deadline, clock
        self._next = -math.inf

    def __call__(self) -> bool:
        """Return True if a checkpoint is to be made now."""
        deadline = self._deadline()
        now = self._clock()
        if deadline is None or now < self._next or deadline - now < _LEAST_S:
            return False
        self._next = now + max(_LEAST_S, (deadline - now) / 2)
        return True


def announced_end() -> Callable[[], float | None]:
    """Return a function for a worker of Ray Train that returns when it ends, by time.monotonic(), or None."""
    # Ray's public function is a barrier of all workers, too slow for each step. This is where it finds its own part.
    from ray.train.v2._internal.execution.context import get_train_context

    context = get_train_context()  # that of this thread: the loop asks from another one
    return announced_by(lambda: context.preemption_context.preemption_info)


def announced_by(announcement: Callable[[], Any]) -> Callable[[], float | None]:
    """Return the function of `announced_end`. announcement: returns Ray's PreemptionInfo, or None."""
    seen: Any = None
    end = 0.0

    def deadline() -> float | None:
        nonlocal seen, end
        info = announcement()
        if info is None:
            return None
        if seen is None or info.deadline_ms != seen.deadline_ms:
            # The clock is read once, as it may be set meanwhile.
            left = _seconds_left(info)
            # A deadline that is over by this host's clock only says that the clock is wrong.
            seen, end = info, time.monotonic() + (left if left >= _LEAST_S else WITHOUT_DEADLINE_S)
        return end

    return deadline


def _seconds_left(info: Any) -> float:
    return info.deadline_ms / 1000 - time.time() if info.deadline_ms else WITHOUT_DEADLINE_S


def describe(info: Any, hosts: dict[str, str]) -> str:
    """Return a line for the log. info: Ray's PreemptionInfo. hosts: names of the nodes by their ids."""
    names = ", ".join(hosts.get(node, node) for node in info.preempted_node_ids)
    return (
        f"{names}: announced to be taken away in {max(0.0, _seconds_left(info)):.0f} s, with worker "
        f"{', '.join(map(str, info.preempted_ranks))}: checkpoints are made until then, and all workers start again"
    )
