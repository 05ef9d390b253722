"""What a caller may know already, so that a kernel need not compute it. Nothing but speed depends on it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class SortedPositions(NamedTuple):
    """Places of ids by row: those of row r are order[starts[r] : starts[r + 1]], in rising order.

    Kernels sum the gradients of a table row by row, in the order of the places. order: [N] int32 places in the flat
    tensor of ids; starts: [R + 1] int32.
    """

    order: Tensor
    starts: Tensor


class WindowCounts(NamedTuple):
    """Number of windows of each word, [U] int32, and a fixed number that is not less than their sum.

    Kernels look at a window for each character of a word and at one of padding; a word with 0 windows fills up a fixed
    shape and has no meaning.
    """

    counts_U: Tensor
    capacity: int
