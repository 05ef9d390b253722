"""Lock of a run in an object store: an object beside the run, which its holder renews.

No store has a lock that ends with its holder. So the lock is an object: it is made only if there is none, renewed every
20 s, and valid for 60 s after that. A second start waits that long for the lock of a process that was
killed, and is refused if the lock is renewed meanwhile. S3 tells two starts at the same moment apart. They can both
succeed in a store that cannot make an object "only if it is new", and in any store where a holder sleeps for more than
a minute and wakes up again. Even then no checkpoint is written by two: every start writes to names of its own attempt.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import socket
import time
from collections.abc import Iterator

from elmo_ray.background import repeating
from elmo_ray.errors import ConfigError
from elmo_ray.storage import places as storage
from elmo_ray.storage.retry import at_once

logger = logging.getLogger(__name__)

RENEW_S = 20.0
VALID_S = 60.0


@contextlib.contextmanager
def store_lock(place: str) -> Iterator[None]:
    """Hold the lock of the run at this URI.

    Raises ConfigError where another process holds it, and OSError where the store does not answer.
    """
    parent, _, name = place.rpartition("/")
    lock = storage.join(parent, f".{name}.lock")
    mine = secrets.token_hex(8)

    def text() -> bytes:
        return json.dumps({"id": mine, "host": socket.gethostname(), "pid": os.getpid(), "at": time.time()}).encode()

    _wait_for_end(lock, name)
    data = text()
    try:
        storage.write_bytes(lock, data, only_new=True)
    except FileExistsError:
        if storage.read_bytes(lock) != data:  # else the answer was lost, and it was written a second time
            raise _taken(name, lock) from None

    def renew() -> None:
        with contextlib.suppress(OSError), at_once():  # it is renewed the next time
            storage.write_bytes(lock, text())

    try:
        with repeating(renew, RENEW_S, "store-lock", patience_s=RENEW_S):
            yield
    finally:
        with contextlib.suppress(OSError), at_once():
            storage.remove(lock)


def _wait_for_end(lock: str, name: str) -> None:
    """Wait until there is no lock, and remove one that has not changed for VALID_S by this machine's clock.

    Raises ConfigError if the lock is renewed meanwhile.
    """
    seen, since = b"", time.monotonic()
    while True:
        asked = time.monotonic()
        try:
            now = storage.read_bytes(lock)
        except FileNotFoundError:
            return
        if time.monotonic() - asked > RENEW_S / 2:  # the store was away, perhaps for the lock's holder as well
            since = time.monotonic()
        if seen and now != seen:
            raise _taken(name, lock)
        if not seen:
            logger.info("%s: waiting up to %.0f s for the end of another start of this run", lock, VALID_S)
        if seen and time.monotonic() - since >= VALID_S:
            storage.remove(lock)
            return
        seen = now
        time.sleep(min(1.0, VALID_S / 4))


def _taken(name: str, lock: str) -> ConfigError:
    return ConfigError(f"run.name={name}: another process is running it ({lock}); wait for its end or stop it")
