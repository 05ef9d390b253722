"""Waiting for object stores that are away: requests to them are made again until they answer.

A store is *away* while it does not answer, or answers that it cannot serve requests now. The store's own library makes
a request again for about half a minute. What it gives up is made again here, for a quarter of an hour: a run of weeks
must outlast the restart of a server or of a network.

A store that has never answered this process is not waited for, because its address may be wrong, and a user must be
told soon. The processes of a command that has begun know that the address is right: they call `expect_answers`.
"""

from __future__ import annotations

import contextlib
import contextvars
import errno
import logging
import math
import os
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from elmo_ray.errors import short

T = TypeVar("T")

logger = logging.getLogger(__name__)

PATIENCE_S = 900.0
"""Seconds for which a request is made again, and for which a store may be away before it is given up."""

PAUSE_S = 5.0
"""Seconds between two tries, each of which is some tries of the store's library."""

TELL_EVERY_S = 20.0
"""Seconds, at least, between two lines of the log about one store."""

_UNREACHABLE = (errno.EHOSTUNREACH, errno.EHOSTDOWN, errno.ENETUNREACH, errno.ENETDOWN)
# Parts of the names of exceptions, as each store's library has its own ones for a connection that fails.
_OF_NETWORKS = ("Connection", "Timeout", "HTTPClientError", "IncompleteRead", "PayloadError", "TransportError")
# S3's words, in refusals, for what passes: a slow connection, and a clock that is wrong by more than 15 minutes.
_PASSING = ("RequestTimeout", "RequestTimeTooSkewed")


class StoreAway(OSError):
    """Error of an object store that does not answer, or says that it cannot serve requests now."""


class _Store:
    """What this process knows of a store, by its name such as `s3://bucket`.

    away_since: when the first request began that it has not answered since its last answer, None while it answers.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.has_answered = False
        self.away_since: float | None = None
        self._told = -math.inf

    def answers(self) -> None:
        """Note an answer."""
        since, self.away_since, self.has_answered = self.away_since, None, True
        if since is not None and self._told >= since:
            logger.info("%s answers again after %.0f s", self.name, time.monotonic() - since)

    def fails(self, asked_at: float, begun: float, error: StoreAway) -> float:
        """Note and log that a try failed; return the seconds that are left for the request.

        asked_at: when this try began. begun: when the first try of the request began.
        """
        now = time.monotonic()
        since = self.away_since = asked_at if self.away_since is None else self.away_since
        left = min(begun, since) + PATIENCE_S - now
        if now - self._told >= TELL_EVERY_S:
            self._told = now
            then = f"trying again for {left / 60:.0f} minutes" if left > 0 else "giving up"
            logger.warning(
                "%s has been away for %.0f s (%s): %s", self.name, now - since, short(str(error.strerror), 200), then
            )
        return left


_stores: dict[str, _Store] = {}
_expected = False
_at_once = contextvars.ContextVar("at_once", default=False)


def expect_answers() -> None:
    """Let this process wait for stores from its first request on.

    For workers and tasks: the driver has reached the stores before it started them.
    """
    global _expected
    _expected = True


def waits_for(protocol: str) -> bool:
    """Return whether this process waits for stores of a protocol such as `s3`."""
    return _expected or any(s.has_answered for s in list(_stores.values()) if s.name.startswith(f"{protocol}://"))


@contextlib.contextmanager
def at_once() -> Iterator[None]:
    """Let requests inside this context and thread fail at once: those that are made from time to time anyway."""
    before = _at_once.set(True)
    try:
        yield
    finally:
        _at_once.reset(before)


def retried(name: str, request: Callable[[], T]) -> T:
    """Return the result of a request to the store of this name, which is made again while it raises StoreAway.

    Raises StoreAway where the store is not waited for, or for too long already. Other errors are raised at once.
    """
    store = _stores.setdefault(name, _Store(name))
    begun = time.monotonic()
    while True:
        asked_at = time.monotonic()
        try:
            result = request()
        except (FileNotFoundError, FileExistsError, PermissionError):
            store.answers()
            raise
        except StoreAway as error:
            if not (_expected or store.has_answered):
                raise
            if store.fails(asked_at, begun, error) <= 0 or _at_once.get():
                raise
            time.sleep(PAUSE_S)
        else:
            store.answers()
            return result


# ---------------------------------------------------------------- which errors mean that a store is away


def is_away(error: BaseException) -> bool:
    """Return whether an exception of a store's library means that the store is away.

    A refusal (a wrong key, no such bucket, an invalid request) does not, nor does an error of this machine.
    """
    chain = [error, *filter(None, [error.__cause__])]
    if any(_is_of_network(each) or any(word in str(each) for word in _PASSING) for each in chain):
        return "CERTIFICATE_VERIFY_FAILED" not in str(error)
    return any(status >= 500 or status in (408, 429) for status in map(_http_status, chain) if status is not None)


def _is_of_network(error: BaseException) -> bool:
    if isinstance(error, socket.gaierror) or (isinstance(error, OSError) and error.errno in _UNREACHABLE):
        return True
    names = [kind.__name__ for kind in type(error).__mro__]
    return any(part in name for part in _OF_NETWORKS for name in names)


def _http_status(error: BaseException) -> int | None:
    """Return the HTTP status of an error, which libraries keep in different places; None if it has none."""
    response: Any = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore
        found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return found if isinstance(found, int) else None
    for holder in (error, response):
        for name in ("status_code", "status", "code"):
            found = getattr(holder, name, None)
            if isinstance(found, int) and 100 <= found < 600:
                return found
    return None


def store_name(place: str | os.PathLike[str]) -> str:
    """Return the name of the store of a URI: its protocol and bucket."""
    return "/".join(os.fspath(place).split("/")[:3])
