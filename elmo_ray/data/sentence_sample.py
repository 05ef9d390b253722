"""A sample of a text's sentences by their hashes, which tells how many sentences stand in two texts.

Of each text the sentences with the smallest hashes are kept (Broder 1997). A sentence that stands in two texts has the
same hash in both, so the samples meet: below the lower of the two limits, all sentences of both texts are there.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

# Shorter lines ("yes , please .") stand in any two texts of a language.
SHORTEST_BYTES = 20
# Sentences of one segment (64 MB of text); 100 GB of text keep 200 MB.
KEPT = 16384
EVERYTHING = 2**64 - 1

UInt64 = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class SentenceSample:
    """Distinct sentences of a text whose hashes are at most `limit`: all of them, as uint64 [n] in rising order."""

    hashes: UInt64
    limit: int = EVERYTHING


class SentenceSampler:
    """Collector of a sample of at most `kept` sentences; short ones are left out."""

    def __init__(self, kept: int = KEPT) -> None:
        self._kept = kept
        self._hashes: set[int] = set()
        self._limit = EVERYTHING

    def add(self, data: bytes) -> None:
        """Add the sentences of whole lines of text."""
        crc32, highest = zlib.crc32, self._limit >> 32
        for line in data.splitlines():
            line = line.strip()
            if b"  " in line or b"\t" in line:
                line = b" ".join(line.split())  # as the words are the same
            # The CRC decides which sentences are sampled, as it is cheap; the rest of the hash tells them apart.
            if len(line) >= SHORTEST_BYTES and (crc := crc32(line)) <= highest:
                rest = hashlib.blake2b(line, digest_size=4).digest()
                self._hashes.add(crc << 32 | int.from_bytes(rest, "little"))
        if len(self._hashes) > 2 * self._kept:
            self._shrink()

    def sample(self) -> SentenceSample:
        """Return the sample of what was added so far."""
        self._shrink()
        return SentenceSample(np.array(sorted(self._hashes), np.uint64), self._limit)

    def _shrink(self) -> None:
        if len(self._hashes) > self._kept:
            smallest = sorted(self._hashes)[: self._kept]
            self._hashes, self._limit = set(smallest), smallest[-1]


@dataclass(frozen=True)
class Shared:
    """Sentences of one text that stand in another, too: `found` of `looked_up` sampled ones."""

    found: int
    looked_up: int

    @property
    def share(self) -> float:
        """Estimated share of the sentences."""
        return self.found / self.looked_up if self.looked_up else 0.0


def shared_sentences(text: Sequence[SentenceSample], other: Sequence[SentenceSample]) -> Shared:
    """Return how many distinct sentences of `text` stand in `other`; each text is given as the samples of its parts."""
    if not text or not other:
        return Shared(0, 0)
    limit = np.uint64(min(sample.limit for sample in (*text, *other)))
    wanted = np.unique(np.concatenate([_up_to(sample, limit) for sample in text]))
    found = np.zeros(len(wanted), np.bool_)
    for sample in other:
        found |= np.isin(wanted, _up_to(sample, limit), assume_unique=True)
    return Shared(int(found.sum()), len(wanted))


def _up_to(sample: SentenceSample, limit: np.uint64) -> UInt64:
    return sample.hashes[: np.searchsorted(sample.hashes, limit, side="right")]
