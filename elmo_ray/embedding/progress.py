"""How far an embedding job is: a bar in a terminal, a line now and then elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from typing import Any

from elmo_ray.metrics import clock

logger = logging.getLogger("elmo_ray.embed")

_EVERY_S = 10.0
_WIDTH = 30


class Progress:
    """Counts units and sentences; `done` of them were finished before."""

    def __init__(self, sentences: int, done: int):
        self.total, self.before = max(sentences, 1), done
        self.now, self.words = done, 0
        self.start = self.shown = time.monotonic()
        self.is_terminal = sys.stderr.isatty()

    def add(self, sentences: int, words: int) -> None:
        """A unit is finished."""
        self.now += sentences
        self.words += words
        if self.is_terminal or time.monotonic() - self.shown >= _EVERY_S:
            self._show()

    def close(self) -> None:
        """Ends the bar's line."""
        if self.is_terminal and self.words:
            sys.stderr.write("\n")

    @property
    def values(self) -> dict[str, Any]:
        seconds = max(time.monotonic() - self.start, 1e-9)
        return {"words": self.words, "seconds": seconds, "words_per_second": self.words / seconds}

    def _show(self) -> None:
        self.shown = time.monotonic()
        speed = self.values["words_per_second"]
        left = (self.total - self.now) * (self.shown - self.start) / max(self.now - self.before, 1)
        text = f"{self.now:,}/{self.total:,} sentences  {speed:,.0f} words/s  {clock(left)} left"
        if self.is_terminal:
            filled = _WIDTH * self.now // self.total
            sys.stderr.write(f"\r[{'#' * filled}{'.' * (_WIDTH - filled)}] {text}   ")
            sys.stderr.flush()
        else:
            logger.info("%s", text)
