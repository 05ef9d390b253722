"""Counts of words in bounded memory."""

import collections
import logging
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

logger = logging.getLogger(__name__)


class WordCounter:
    """Counter of at most `cap` distinct words; each takes some 170 bytes.

    When there are more, it is pruned: the counts of 1 are dropped, then those of 2 and so on, until at most half of
    `cap` words are left. The loss is bounded: a word's count is too small by at most `max_missing`, so every word that
    occurs more often is there. Without pruning all counts are exact.

    max_missing:    the sum over all prunings of the highest count dropped.
    pruned_entries: how many times a word was dropped (a word may come back and be dropped again).
    pruned_tokens:  the occurrences that were dropped with them.
    """

    def __init__(self, cap: int) -> None:
        self.cap = cap
        self.counts: collections.Counter[str] = collections.Counter()
        self.pruned_entries = 0
        self.pruned_tokens = 0
        self.max_missing = 0

    def add(self, words: Iterable[str]) -> None:
        """Count each of `words` once. The cap holds only between calls, so `words` should be few beside it."""
        self.counts.update(words)
        self._prune()

    def merge(self, other: "WordCounter") -> None:
        """Add the counts of another counter, and its losses."""
        self.merge_counts(other.counts)
        self.pruned_entries += other.pruned_entries
        self.pruned_tokens += other.pruned_tokens
        self.max_missing += other.max_missing

    def merge_counts(self, counts: Mapping[str, int]) -> None:
        """Add the counts of a mapping."""
        self.counts.update(counts)
        self._prune()

    def subtract(self, words: Iterable[str]) -> None:
        """Take back one occurrence for each of `words`; a word that is no longer counted is ignored."""
        for word, number in collections.Counter(words).items():
            left = self.counts.get(word, 0) - number
            if left > 0:
                self.counts[word] = left
            else:
                self.counts.pop(word, None)

    def to_arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Return the counter as arrays for `from_arrays`: words in UTF-8, each ended by \\n; counts; other fields."""
        words = "".join(f"{word}\n" for word in self.counts).encode()
        return {
            "words": np.frombuffer(words, dtype=np.uint8),
            "word_counts": np.fromiter(self.counts.values(), dtype=np.int64, count=len(self.counts)),
            "pruned": np.array([self.pruned_entries, self.pruned_tokens, self.max_missing], dtype=np.int64),
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, npt.NDArray[Any]], cap: int) -> "WordCounter":
        """Return the counter of these arrays from `to_arrays`, with this cap."""
        counter = cls(cap)
        counter.pruned_entries, counter.pruned_tokens, counter.max_missing = arrays["pruned"].tolist()
        words = arrays["words"].tobytes().decode().split("\n")[:-1]
        counter.counts = collections.Counter(dict(zip(words, arrays["word_counts"].tolist(), strict=True)))
        return counter

    def by_falling_count(self, min_count: int = 1, limit: int | None = None) -> list[tuple[str, int]]:
        """Return at most `limit` pairs (word, count) with counts of at least `min_count`, by falling count.

        Words of equal count are in alphabetical order (by code points).
        """
        kept = [item for item in self.counts.items() if item[1] >= min_count]
        kept.sort(key=lambda item: (-item[1], item[0]))
        return kept[:limit]

    def _prune(self) -> None:
        if len(self.counts) <= self.cap:
            return
        values = np.fromiter(self.counts.values(), dtype=np.int64, count=len(self.counts))
        # This is the smallest threshold with at most cap // 2 counts above it.
        keep = self.cap // 2
        threshold = int(np.partition(values, len(values) - keep - 1)[len(values) - keep - 1])
        dropped = values[values <= threshold]
        self.counts = collections.Counter({word: n for word, n in self.counts.items() if n > threshold})
        self.pruned_entries += len(dropped)
        self.pruned_tokens += int(dropped.sum())
        self.max_missing += threshold
        logger.info("more than %d distinct words: dropped %d with counts up to %d", self.cap, len(dropped), threshold)
