"""Settings that take a number or something else: when states are reset, and how many workers there are."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import PlainValidator

from elmo_ray.config_schema import Allowed


def _reset(value: Any) -> float | str:
    if value in ("never", "block"):
        return str(value)
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1:
        return float(value)
    raise ValueError("not a way to reset states")


Reset = Annotated[
    float | Literal["never", "block"], PlainValidator(_reset), Allowed("never, block or a probability from 0 to 1")
]


_MOST_WORKERS = 1 << 16


def _workers(value: Any) -> int | tuple[int, int]:
    """A number, or [min, max] with 1 <= min <= max."""
    if isinstance(value, list | tuple):
        least, most = map(_workers, value)  # ValueError for another length
        if isinstance(least, int) and isinstance(most, int) and 1 <= least <= most:
            return least, most
    elif isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= _MOST_WORKERS:
        if value == int(value):
            return int(value)
    raise ValueError("not a number of workers")


Workers = Annotated[
    int | tuple[int, int],
    PlainValidator(_workers),
    Allowed(f"an integer >= 0 and <= {_MOST_WORKERS}, or [min, max]"),
]
