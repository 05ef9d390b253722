"""What a worker is given: the run that it belongs to, and its own place and means."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from elmo_ray.config import PretrainConfig
from elmo_ray.data.streams import BlockSource


@dataclass(frozen=True)
class TrainPlan:
    """What to train, in plain values that travel to workers. Paths are absolute."""

    config: PretrainConfig
    run_dir: str
    corpus_path: str
    valid_path: str | None
    vocabulary_path: str

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "config": self.config.to_dict()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainPlan:
        return cls(**{**values, "config": PretrainConfig.from_dict(values["config"])})


@dataclass
class Worker:
    """This process's place and means.

    source: encodes blocks in order. register: every rank calls it with (step, path, metrics) of a committed checkpoint.
    stop_requested: whether somebody asked to stop.
    """

    rank: int
    world: int
    device: torch.device
    source: BlockSource
    register: Callable[[int, str, dict[str, Any]], None]
    stop_requested: Callable[[], bool]
