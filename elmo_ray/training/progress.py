"""What a run knows about itself besides tensors: step, best validation, running sums. Saved as progress.json."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from elmo_ray.errors import CheckpointError
from elmo_ray.training.manifest import is_count

_LATER: dict[str, Any] = {"initial": {}, "stale": 0}
"""What checkpoints of earlier versions do not have."""

MOST_AMOUNT = 1e300
"""Of a perplexity that is worth keeping."""


@dataclass
class Progress:
    """step: steps done. positions: trained on, one direction, all ranks. window_*: since the last log record.

    best_perplexity, best_step: of validation. skipped: steps without update.
    seconds: of training, over all attempts. initial: the validation before the first step, where there was one.
    stale: validations in a row since the best one.
    """

    step: int = 0
    positions: int = 0
    window_positions: int = 0
    best_perplexity: float | None = None
    best_step: int | None = None
    last_valid: dict[str, Any] = field(default_factory=dict)
    skipped: int = 0
    seconds: float = 0.0
    finished: bool = False
    initial: dict[str, Any] = field(default_factory=dict)
    stale: int = 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str) -> Progress:
        """Raises CheckpointError, naming `source`, where a value is missing, unknown, or of a kind it cannot be."""
        names = {f.name for f in fields(cls)}
        values = {**_LATER, **values}
        if set(values) != names:
            raise CheckpointError(
                f"{source}: progress.json has other keys than this version writes: {sorted(set(values) ^ names)!s:.200}"
            )
        for f in fields(cls):
            value = values[f.name]
            if not _KINDS[str(f.type)](value):
                raise CheckpointError(f"{source}: progress.json: {f.name} is {value!r:.40}, which it cannot be")
        return cls(**values)


def _is_amount(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < MOST_AMOUNT  # false for NaN


def _is_record(value: object) -> bool:
    """Whether it is a record of validation: names with a number, or none where that was not finite."""
    return isinstance(value, dict) and all(item is None or _is_amount(item) for item in value.values())


_KINDS: dict[str, Callable[[object], bool]] = {
    "int": is_count,
    "int | None": lambda value: value is None or is_count(value),
    "float": _is_amount,
    "float | None": lambda value: value is None or _is_amount(value),
    "bool": lambda value: isinstance(value, bool),
    "dict[str, Any]": _is_record,
}
