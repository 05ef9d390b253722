"""Who runs a run that is in an object store: a note beside it, which its holder renews.

No store has a lock that goes with its holder. The note is made only where there is none, is renewed every 20 s, and
counts for 60 s after that: a second start waits so long for the note of one that was killed, and is refused where the
note is renewed meanwhile. S3 tells two starts of the same moment apart; a store that cannot make an object "only if it
is new" does not, and neither does any where a holder sleeps for more than a minute and wakes up again. Even then no
checkpoint is written by two: every start writes to names of its own attempt.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator

from elmo_ray.errors import ConfigError
from elmo_ray.storage import places as storage

logger = logging.getLogger(__name__)

RENEW_S = 20.0
COUNTS_S = 60.0


@contextlib.contextmanager
def store_lock(place: str) -> Iterator[None]:
    """Keep others out of the run at this URI. Raises ConfigError where another has it, OSError where the store does
    not answer."""
    parent, _, name = place.rpartition("/")
    note = storage.join(parent, f".{name}.lock")
    mine = secrets.token_hex(8)

    def text() -> bytes:
        return json.dumps({"id": mine, "host": socket.gethostname(), "pid": os.getpid(), "at": time.time()}).encode()

    _wait_for_end(note, name)
    try:
        storage.write_bytes(note, text(), only_new=True)
    except FileExistsError:
        raise _taken(name, note) from None
    ended = threading.Event()

    def renew() -> None:
        while not ended.wait(RENEW_S):
            with contextlib.suppress(OSError):  # renewed the next time
                storage.write_bytes(note, text())

    thread = threading.Thread(target=renew, name="store-lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(timeout=RENEW_S)
        with contextlib.suppress(OSError):
            storage.remove(note)


def _wait_for_end(note: str, name: str) -> None:
    """Until there is no note that counts; one that has not changed for COUNTS_S by our clock is removed."""
    seen, since = b"", time.monotonic()
    while True:
        try:
            now = storage.read_bytes(note)
        except FileNotFoundError:
            return
        if seen and now != seen:
            raise _taken(name, note)
        if not seen:
            logger.info("%s: waiting up to %.0f s for the end of another start of this run", note, COUNTS_S)
        if seen and time.monotonic() - since >= COUNTS_S:
            storage.remove(note)
            return
        seen = now
        time.sleep(min(1.0, COUNTS_S / 4))


def _taken(name: str, note: str) -> ConfigError:
    return ConfigError(f"run.name={name}: another process is running it ({note}); wait for its end or stop it")
