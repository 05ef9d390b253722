"""Where a worker writes what is appended to: metrics, TensorBoard, logs.

In the run's folder, or, for a run in an object store, in a folder of its own that is sent there from time to time and
before each checkpoint."""

from __future__ import annotations

import logging
from pathlib import Path

from elmo_ray.mirror import mirror_of
from elmo_ray.storage import Place, is_uri

logger = logging.getLogger(__name__)


class Outbox:
    """folder: where to write; what matches `patterns` is sent."""

    def __init__(self, run_dir: Place, *patterns: str) -> None:
        self.patterns = patterns
        self._mirror = mirror_of(run_dir) if is_uri(run_dir) else None
        self.folder = Path(run_dir) if self._mirror is None else self._mirror.folder
        if self._mirror is not None:
            self._mirror.push_always(*patterns)

    def send(self) -> None:
        """Send what is new, if there is anywhere to send it; OSError."""
        if self._mirror is not None:
            self._mirror.push(*self.patterns)

    def close(self) -> None:
        """Send the rest; a store that does not answer is a warning."""
        try:
            if self._mirror is not None:
                self._mirror.rest()
            self.send()
        except OSError as error:
            logger.warning("%s: cannot be sent (%s)", error.filename, error.strerror or error)
