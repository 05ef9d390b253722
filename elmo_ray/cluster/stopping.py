"""Stopping of a run: a signal to the driver makes a stop file in the run's folder, for which workers look."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from pathlib import Path
from types import FrameType
from typing import TypeVar

from elmo_ray import storage
from elmo_ray.background import start_thread
from elmo_ray.storage import is_uri, join

logger = logging.getLogger(__name__)

T = TypeVar("T")

STOP_FILE = "stop"

_SIG_IGN = 1
"""SIG_IGN of C."""

WAIT_AFTER_STOP_S = 3.0
"""Seconds after a stop in which text may still come for the step that is being prepared."""


def stop_check(run_dir: str) -> Callable[[], bool]:
    """Return a function that returns True once the driver has asked to stop.

    It looks at the storage at most once a second, and at an object store at most every 5 seconds.
    """
    path = join(run_dir, STOP_FILE)
    if is_uri(path):
        return _store_check(path)
    seen, looked = False, -math.inf

    def stop_requested() -> bool:
        nonlocal seen, looked
        now = time.monotonic()
        if not seen and now - looked >= 1.0:
            looked = now
            seen = os.path.exists(path)
        return seen

    return stop_requested


def _store_check(path: str) -> Callable[[], bool]:
    """Return the function of `stop_check` for an object store: each look is a thread's, as a store may not answer."""
    seen, looked, look = False, -math.inf, None

    def exists() -> bool:
        with storage.at_once():
            return storage.exists(path)

    def stop_requested() -> bool:
        nonlocal seen, looked, look
        now = time.monotonic()
        if look is not None and look.done():
            seen = look.exception() is None and look.result()
            look = None
        if not seen and look is None and now - looked >= 5.0:
            looked, look = now, start_thread(exists, "stop-check")
        return seen

    return stop_requested


def for_seconds(asked: Callable[[], bool], seconds: float = WAIT_AFTER_STOP_S) -> Callable[[], bool]:
    """Return a function that returns True once `asked` has done so for some seconds."""
    since = math.inf

    def has_been_asked() -> bool:
        nonlocal since
        if not asked():
            return False
        since = min(since, time.monotonic())
        return time.monotonic() - since >= seconds

    return has_been_asked


@contextlib.contextmanager
def stop_on_signals(stop_file: str) -> Iterator[threading.Event]:
    """Yield an event that the first SIGINT or SIGTERM sets; it also makes the stop file.

    After it signals have their former effect. In an object store the caller makes the file, by `make_stop_file`.
    """
    if not is_uri(stop_file):
        os.makedirs(os.path.dirname(stop_file), exist_ok=True)
    _remove(stop_file)
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
        if not is_uri(stop_file):  # a signal's handler must not wait for a network
            make_stop_file(stop_file)
        logger.warning("%s: training stops after this step; once more to abort", signal.Signals(number).name)

    for number in before:
        signal.signal(number, ask)
    try:
        yield asked
    finally:
        restore()
        with contextlib.suppress(OSError), storage.at_once():
            _remove(stop_file)


def outlast_sigterm() -> None:
    """Let this process of Ray go on after SIGTERM, which the shutdown of a cluster sends to all processes at once.

    The command, which gets it as well, asks for a last checkpoint, and that needs this process. Whoever means this
    process alone, as Ray does, sends SIGKILL some seconds later.
    """
    # Python's own function is for main threads, and Ray calls ours in others.
    ctypes.CDLL(None).signal(signal.SIGTERM, ctypes.c_void_p(_SIG_IGN))


def make_stop_file(stop_file: str) -> None:
    """Make the stop file, if the storage answers."""
    with contextlib.suppress(OSError), storage.at_once():
        if is_uri(stop_file):
            storage.write_bytes(stop_file, b"")
        else:
            Path(stop_file).touch()


def _remove(stop_file: str) -> None:
    if is_uri(stop_file):
        storage.remove(stop_file)
    else:
        Path(stop_file).unlink(missing_ok=True)


def in_thread(run: Callable[[], T], meanwhile: Callable[[], None]) -> T:
    """Return the result of `run`, called in a thread; `meanwhile` is called in this thread every 0.2 seconds.

    Raises the exception of `run`.
    """
    # In the main thread Ray Train would set a SIGINT handler of its own, which aborts training.
    future = start_thread(run, "ray-train")
    while not future.done():
        wait([future], 0.2)  # signals are handled between two waits
        meanwhile()
    meanwhile()
    return future.result()
