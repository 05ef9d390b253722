"""Positions sorted by the row of a table that they read, so that gradients are summed row by row in a fixed order."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class SortedPositions(NamedTuple):
    """Places of ids by row: those of row r are order[starts[r] : starts[r + 1]], in rising order.

    order: [N] int32 places in the flat tensor of ids; starts: [R + 1] int32.
    """

    order: Tensor
    starts: Tensor
