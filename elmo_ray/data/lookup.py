"""Look-up of the words of a UTF-8 block with array operations, without making a Python string of every word.

A word of up to 24 bytes is taken as three 64-bit numbers, zero-padded, and a hash table with open addressing gives its
vocabulary id. The result is exact, because numbers and lengths are compared, not hashes. Longer words are left to the
caller.
"""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

MISSING = -1

_SPACES = np.zeros(256, dtype=bool)
# These ASCII characters are spaces for str.split.
_SPACES[[9, 10, 11, 12, 13, 28, 29, 30, 31, 32]] = True
# _MASKS[n] selects the bits of the first n bytes in a group of eight.
_MASKS = np.array([(1 << (8 * count)) - 1 for count in range(9)], dtype=np.uint64)
_FACTORS = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0xD6E8FEB86659FD93], dtype=np.uint64)

Int64 = npt.NDArray[np.int64]
UInt64 = npt.NDArray[np.uint64]


def word_bounds(data: npt.NDArray[np.uint8]) -> tuple[Int64, Int64]:
    """Return the starts and ends, in bytes, of the words in UTF-8 text whose only spaces are ASCII ones."""
    spaces = np.empty(len(data) + 2, dtype=bool)
    spaces[0] = spaces[-1] = True
    np.take(_SPACES, data, out=spaces[1:-1])
    edges = np.flatnonzero(spaces[1:] != spaces[:-1])
    return edges[::2], edges[1::2]


class WordTable:
    """Hash table from the bytes of words to the ids that `ids` gives them.

    Words of more than LONGEST bytes are not in it.
    """

    LONGEST = 24
    """Bytes of the longest word in the table: three numbers of 8 bytes."""
    PADDING = 40
    """Bytes that `find` may read after the last word, with up to 8 more that make the whole a multiple of 8."""

    def __init__(self, ids: Mapping[str, int]) -> None:
        spelt = [(word.encode("utf-8", "surrogatepass"), number) for word, number in ids.items()]
        spelt = [(word, number) for word, number in spelt if 0 < len(word) <= self.LONGEST]
        self._ids = np.array([number for _, number in spelt] or [MISSING], dtype=np.int32)
        self._lengths = np.array([len(word) for word, _ in spelt] or [0], dtype=np.int64)
        padded = b"".join(word.ljust(self.LONGEST, b"\0") for word, _ in spelt) or bytes(self.LONGEST)
        self._keys = np.ascontiguousarray(np.frombuffer(padded, dtype="<u8").reshape(-1, 3).T)
        bits = max(4, (4 * len(spelt)).bit_length())
        self._shift = np.uint64(64 - bits)
        self._mask = (1 << bits) - 1
        self._slots = self._fill(np.arange(len(spelt)))

    def find(self, data: npt.NDArray[np.uint8], starts: Int64, lengths: Int64) -> npt.NDArray[np.int32]:
        """Return the id of each word data[start : start + length], or MISSING for a word that is not in the table.

        `data` is UTF-8 text without NULs, then PADDING bytes less the length of the text modulo 8.
        """
        words_8 = data.view("<u8")
        first, shift = starts >> 3, ((starts & 7) << 3).view(np.uint64)
        keys = [self._load(words_8, first, shift, lengths)]
        hashes = keys[0] * _FACTORS[0]
        longer = np.flatnonzero(lengths > 8)
        for group in (1, 2):
            key = self._load(words_8, first[longer] + group, shift[longer], lengths[longer] - 8 * group)
            hashes[longer] += key * _FACTORS[group]
            keys.append(key)
        slots = (hashes >> self._shift).view(np.int64)
        entries = self._slots[slots]
        # An entry of -1 reads the numbers of the last word, so it must be excluded from what is equal.
        equal = (self._keys[0][entries] == keys[0]) & (self._lengths[entries] == lengths) & (entries >= 0)
        equal[longer] &= self._same_rest(entries[longer], keys, slice(None))
        found = np.where(equal, self._ids[entries], MISSING)
        pending = np.flatnonzero(~equal & (entries >= 0))
        rank = np.searchsorted(longer, pending).clip(max=len(longer) - 1)
        slots = slots[pending]
        while len(pending):
            slots = (slots + 1) & self._mask
            entries = self._slots[slots]
            equal = (self._keys[0][entries] == keys[0][pending]) & (self._lengths[entries] == lengths[pending])
            long = np.flatnonzero(equal & (lengths[pending] > 8))
            equal[long] &= self._same_rest(entries[long], keys, rank[long])
            equal &= entries >= 0
            found[pending[equal]] = self._ids[entries[equal]]
            left = ~equal & (entries >= 0)
            pending, slots, rank = pending[left], slots[left], rank[left]
        found[lengths > self.LONGEST] = MISSING
        return found

    def _same_rest(
        self, entries: npt.NDArray[np.int32], keys: list[UInt64], chosen: slice | Int64
    ) -> npt.NDArray[np.bool_]:
        """Return whether the bytes from the ninth on are the same, for `chosen` of the longer words."""
        same: npt.NDArray[np.bool_] = self._keys[1][entries] == keys[1][chosen]
        return same & (self._keys[2][entries] == keys[2][chosen])

    @staticmethod
    def _load(words_8: UInt64, first: Int64, shift: UInt64, lengths: Int64) -> UInt64:
        """Return eight bytes from any address, with 0 beyond the first `lengths` (clipped to 0 to 8) of them."""
        low = words_8[first] >> shift
        # There are two shifts because a shift by 64 is not defined.
        high = (words_8[first + 1] << (np.uint64(63) - shift)) << np.uint64(1)
        loaded: UInt64 = (low | high) & _MASKS[np.clip(lengths, 0, 8)]
        return loaded

    def _fill(self, entries: Int64) -> npt.NDArray[np.int32]:
        """Return the table of entry numbers, -1 for a free slot."""
        table = np.full(self._mask + 1, -1, dtype=np.int32)
        hashes = (self._keys * _FACTORS[:, None]).sum(axis=0, dtype=np.uint64)
        slots = (hashes[entries] >> self._shift).astype(np.int64)
        # Each round puts entries into free slots. Earlier entries, the frequent words, get the slots tried first.
        while len(entries):
            free = table[slots] < 0
            # Of several entries for one slot the first one stays, because it is written last.
            table[slots[free][::-1]] = entries[free][::-1]
            placed = table[slots] == entries
            entries, slots = entries[~placed], (slots[~placed] + 1) & self._mask
        return table
