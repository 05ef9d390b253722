"""Work in a thread beside this one: once, for its result, or again and again while a context lasts."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def start_thread(work: Callable[[], T], name: str) -> Future[T]:
    """Call `work` in a daemon thread, and return the future of its result or exception."""
    # The threads of an executor would keep the process alive: a call that never returns must not do that.
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future


@contextlib.contextmanager
def repeating(work: Callable[[], object], every_s: float, name: str, patience_s: float | None = None) -> Iterator[None]:
    """Call `work` every `every_s` seconds, in a thread, while this context lasts; the first call comes after one pause.

    The end waits for a call that is under way, for patience_s seconds at most (None: however long it takes).
    """
    ended = threading.Event()

    def run() -> None:
        while not ended.wait(every_s):
            work()

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(patience_s)
