"""What a run knows about itself besides tensors: step, best validation, running sums. Saved as progress.json."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

from elmo_ray.errors import CheckpointError


@dataclass
class Progress:
    """step: steps done. positions: trained on, one direction, all ranks. window_*: since the last log record.

    best_perplexity, best_step: of validation. skipped: steps without update. replaced: damaged places in the text.
    seconds: of training, over all attempts.
    """

    step: int = 0
    positions: int = 0
    window_positions: int = 0
    best_perplexity: float | None = None
    best_step: int | None = None
    last_valid: dict[str, Any] = field(default_factory=dict)
    skipped: int = 0
    replaced: int = 0
    seconds: float = 0.0
    finished: bool = False

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str) -> Progress:
        """Raises CheckpointError, naming `source`, where a value is missing or unknown."""
        names = {f.name for f in fields(cls)}
        if set(values) != names:
            raise CheckpointError(
                f"{source}: progress.json has other keys than this version writes: {sorted(set(values) ^ names)}"
            )
        return cls(**values)
