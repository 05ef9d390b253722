"""What every kernel of the LSTM needs to know beside its tensors."""

from __future__ import annotations

from typing import NamedTuple

FORGET_BIAS = 1.0


class Clips(NamedTuple):
    """Bounds of the cell and of the projection's result; None: no clip."""

    cell: float | None
    projection: float | None
