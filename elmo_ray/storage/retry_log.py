"""Log of requests to S3 that are tried again: the store's library does so for minutes and says nothing by itself."""

from __future__ import annotations

import logging
import time

from elmo_ray.errors import short
from elmo_ray.storage.retry import PATIENCE_S, waits_for

logger = logging.getLogger(__name__)

MESSAGE_EVERY_S = 10.0
"""Seconds between two lines of the log."""

# The loggers of botocore's two ways to retry (AWS_RETRY_MODE). Only they know of each single retry.
_LOGGERS = ("botocore.retryhandler", "botocore.retries.standard")


class _RetryLog(logging.Handler):
    """Handler of the library's debug messages that makes warnings of some."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self._reason, self._count, self._told = "", 0, -MESSAGE_EVERY_S

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if text.startswith("retry needed"):  # the reason, just before the decision
            self._reason = text.partition(": ")[2]
        elif text.startswith("Retry needed") and isinstance(record.args, tuple) and record.args:
            self._count += 1
            if time.monotonic() - self._told < MESSAGE_EVERY_S:
                return
            logger.warning(
                "the object store does not answer well (%s): trying again in %.1f s%s; %d such requests since the last "
                "message",
                short(self._reason, 200),
                record.args[0],
                f", for up to {PATIENCE_S / 60:.0f} minutes" if waits_for("s3") else "",
                self._count,
            )
            self._told, self._count = time.monotonic(), 0


def log_retries() -> None:
    """Let this process log a warning when requests to S3 are tried again; do nothing if it does so already."""
    for name in _LOGGERS:
        library = logging.getLogger(name)
        if not any(isinstance(handler, _RetryLog) for handler in library.handlers):
            library.addHandler(_RetryLog())
            library.setLevel(logging.DEBUG)
            library.propagate = False  # its debug messages are for this handler alone
