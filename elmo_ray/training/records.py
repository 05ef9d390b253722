"""The records of a run's metrics, from what the loop has counted. Their fields are described in `elmo_ray.metrics`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from elmo_ray.metrics import perplexity
from elmo_ray.training.perplexity import LossSums
from elmo_ray.training.progress import Progress


def train_record(
    progress: Progress,
    losses: Sequence[float],
    norm: float,
    lr: float,
    seconds: float,
    waited: float,
    replaced: int,
    memory: int,
) -> dict[str, Any]:
    """Of the steps since the last record: mean `losses` of each direction in nats, `seconds` of training, of which
    `waited` for text; `replaced` damaged places of the text so far; `memory` in bytes of worker 0."""
    mean = sum(losses) / len(losses)
    backward = losses[1] if len(losses) > 1 else None
    return {
        "kind": "train",
        "step": progress.step,
        "positions": progress.positions,
        "loss": mean,
        "loss_forward": losses[0],
        "loss_backward": backward,
        "perplexity_forward": perplexity(losses[0]),
        "perplexity_backward": None if backward is None else perplexity(backward),
        "perplexity": perplexity(mean),
        "grad_norm": norm,
        "lr": lr,
        "positions_per_second": progress.window_positions / seconds,
        "data_wait": waited / seconds,
        "memory": memory,
        "skipped": progress.skipped,
        "replaced": replaced,
    }


def valid_record(step: int, total: LossSums, seconds: float) -> dict[str, Any]:
    """Of a validation after `step` that took `seconds`."""
    return {
        "kind": "valid",
        "step": step,
        "positions": total.positions,
        "loss": sum(total.mean) / len(total.mean),
        **total.perplexities(),
        "seconds": seconds,
    }


def not_finite(step: int, norm: float, losses: Sequence[Sequence[float]], last: int | None) -> str:
    """Of a step without update: the gradient's norm, each worker's sums of losses, the step of the last checkpoint."""
    workers = [rank for rank, sums in enumerate(losses) if not all(map(math.isfinite, sums))]
    where = f"worker {', '.join(map(str, workers))}"
    if not workers:
        where = "all workers (the loss is finite, the gradient is not)"
    return (
        f"step {step}: not finite at {where}: gradient norm {norm}, loss sums {losses}; no update was made; "
        f"last good checkpoint: {'none' if last is None else f'step {last}'}"
    )
