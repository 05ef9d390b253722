"""Arguments of a worker: the run that it trains, and its own rank, device and callbacks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from elmo_ray.config import PretrainConfig
from elmo_ray.data.streams import BlockSource
from elmo_ray.training.cuda_graphs import Record


@dataclass(frozen=True)
class TrainPlan:
    """Description of the training, in plain values that are sent to workers. Paths are absolute."""

    config: PretrainConfig
    run_dir: str
    corpus_path: str
    valid_path: str | None
    vocabulary_path: str

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain values."""
        return {**vars(self), "config": self.config.to_dict()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainPlan:
        """Return the plan that `to_dict` turned into plain values."""
        return cls(**{**values, "config": PretrainConfig.from_dict(values["config"])})


@dataclass
class Worker:
    """This process's rank, device and callbacks.

    source: encodes blocks in order. register: called on every rank with (step, path, metrics) of a committed
    checkpoint. stop_requested: returns True once a stop was requested. save_requested: returns True where rank 0 is to
    save now, once for each request. record: captures the training steps; None: as the device allows. feed_process: a
    process of its own makes the inputs of steps; None: where a GPU repeats captured steps.
    """

    rank: int
    world: int
    device: torch.device
    source: BlockSource
    register: Callable[[int, str, dict[str, Any]], None]
    stop_requested: Callable[[], bool]
    record: Record | None = None
    save_requested: Callable[[], bool] = lambda: False
    feed_process: bool | None = None
