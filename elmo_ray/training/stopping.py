"""How a signal to the driver becomes a stop flag that workers see: a file in the run's folder."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import TypeVar

logger = logging.getLogger(__name__)

T = TypeVar("T")

STOP_FILE = "stop"


def stop_check(run_dir: str) -> Callable[[], bool]:
    """Whether the driver has asked to stop; looks at the storage once a second at most."""
    path = os.path.join(run_dir, STOP_FILE)
    seen, looked = False, -math.inf

    def stop_requested() -> bool:
        nonlocal seen, looked
        now = time.monotonic()
        if not seen and now - looked >= 1:
            seen, looked = os.path.exists(path), now
        return seen

    return stop_requested


@contextlib.contextmanager
def stop_on_signals(stop_file: Path) -> Iterator[threading.Event]:
    """The first SIGINT or SIGTERM sets the event and makes the stop file; after it signals do again what they did
    before."""
    stop_file.parent.mkdir(parents=True, exist_ok=True)
    stop_file.unlink(missing_ok=True)
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked  # a sweep's trial: its driver is another process, and only a main thread may have handlers
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def ask(number: int, frame: FrameType | None) -> None:
        restore()
        asked.set()
        leave_note(stop_file)
        logger.warning("%s: training stops after this step; once more to abort", signal.Signals(number).name)

    for number in before:
        signal.signal(number, ask)
    try:
        yield asked
    finally:
        restore()
        with contextlib.suppress(OSError):
            stop_file.unlink(missing_ok=True)


def leave_note(stop_file: Path) -> None:
    with contextlib.suppress(OSError):
        stop_file.touch()


def in_thread(run: Callable[[], T], meanwhile: Callable[[], None]) -> T:
    """Run beside the main thread, where Ray Train would put a SIGINT handler of its own that aborts training."""
    results: list[T] = []
    problems: list[BaseException] = []

    def target() -> None:
        try:
            results.append(run())
        except BaseException as error:
            problems.append(error)

    thread = threading.Thread(target=target, name="ray-train", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.2)  # signals are handled between two joins
        meanwhile()
    meanwhile()
    if problems:
        raise problems[0]
    return results[0]
