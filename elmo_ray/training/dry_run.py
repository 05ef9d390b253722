"""Estimate of a run without starting it: parameters, steps, memory and disk."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from elmo_ray.config import PretrainConfig
from elmo_ray.data.corpus import Corpus
from elmo_ray.data.streams import StreamPlan
from elmo_ray.machine import available_cores
from elmo_ray.storage import is_uri
from elmo_ray.training.optimizer import METHODS, count_slots
from elmo_ray.training.sizes import WorkerMemory, check_streams, show_bytes, worker_memory


@dataclass(frozen=True)
class DryRun:
    """Estimate of a run.

    parameters: by component. vocabulary: words. exact: positions and vocabulary are counted and not estimated. memory:
    bytes of a worker, by use. checkpoint_bytes: of one checkpoint. disk_free: bytes; None for an object store.
    """

    config: PretrainConfig
    parameters: dict[str, int]
    vocabulary: int
    positions_per_epoch: int
    exact: bool
    steps_per_epoch: int
    steps: int
    memory: dict[str, int]
    checkpoint_bytes: int
    disk_free: int | None
    devices: list[str]

    def summary(self) -> str:
        """Return the estimate as text for a person."""
        config, about = self.config, "" if self.exact else "about "
        step = config.data.streams * config.train.unroll
        lines = [config.to_yaml().rstrip(), "", "parameters:"]
        lines += [f"  {component:<24}{count:>15,}" for component, count in self.parameters.items()]
        lines += [f"  {'all':<24}{sum(self.parameters.values()):>15,}", ""]
        guessed = "" if self.exact else " (guessed from the files' sizes; `prepare` counts them)"
        lines += [
            f"vocabulary: {about}{self.vocabulary:,} words",
            f"positions of an epoch: {about}{self.positions_per_epoch:,}{guessed}",
            f"positions per step: {step:,} ({config.data.streams} streams x {config.train.unroll})",
            f"steps: {about}{self.steps_per_epoch:,} per epoch, {self.steps:,} in all "
            f"(train.duration={config.train.duration})",
            *self._memory_lines(),
            f"disk: {show_bytes(self.checkpoint_bytes)} a checkpoint, {config.train.keep_last} kept, "
            "one being written and the best: "
            f"{show_bytes(self.checkpoint_bytes * (config.train.keep_last + 2))}; "
            + ("in an object store" if self.disk_free is None else f"free {show_bytes(self.disk_free)}"),
            f"devices seen: {', '.join(self.devices)}",
        ]
        if not METHODS[config.optim.name].trains_tables:
            rest = "trains the dense parameters; the word tables keep Adagrad (optim.table_lr)"
            lines.append(f"optim.name={config.optim.name} {rest}")
        return "\n".join(lines)

    def _memory_lines(self) -> list[str]:
        memory = WorkerMemory(self.parameters, self.memory)
        if trains_on_gpu(self.config):
            return [f"memory of a worker's GPU: {memory.on_gpu}", f"memory of a worker on its host: {memory.on_host}"]
        return [f"memory of a worker: {memory}"]

    def to_dict(self) -> dict[str, Any]:
        """Return the estimate as plain values."""
        return {**vars(self), "config": self.config.to_dict()}


def dry_run(config: PretrainConfig, corpus: Corpus | None, positions: int, n_words: int) -> DryRun:
    """Return the estimate of a run.

    corpus: the training text, or None where it is not indexed yet. positions, n_words: of the training text and of the
    vocabulary, or estimates where there is no corpus. Raises ConfigError where a real run would refuse to start.
    """
    config.softmax.check_vocabulary(n_words)
    check_streams(config, positions, exact=corpus is not None)
    unroll, streams = config.train.unroll, config.data.streams
    if corpus is not None:
        plan = StreamPlan(corpus, streams)
        per_epoch = plan.steps(1, unroll)
        steps = plan.steps(config.train.duration.amount, unroll) if config.train.duration.unit == "epochs" else None
    else:
        per_epoch, steps = -(-positions // (streams * unroll)), None
    if steps is None:
        steps = config.train.duration.steps(streams * unroll, positions)
    memory = worker_memory(config, n_words, largest_block(corpus), trains_on_gpu(config))
    total = sum(memory.parameters.values())
    width = 8 if config.train.precision == "fp64" else 4
    slots = count_slots(config.optim)
    lstm, directions = config.model.lstm, 2 if config.model.bidirectional else 1
    state = streams * directions * lstm.n_layers * (lstm.dim + lstm.projection_dim) * width
    return DryRun(
        config,
        memory.parameters,
        n_words,
        positions,
        corpus is not None,
        per_epoch,
        steps,
        memory.uses,
        total * (1 + slots) * width + state,
        _free(config.run.storage_path),
        _devices(),
    )


def trains_on_gpu(config: PretrainConfig) -> bool:
    """Return whether workers have a GPU each, as far as this machine tells."""
    device = config.cluster.device
    return device == "gpu" or (device == "auto" and torch.cuda.device_count() >= max(1, config.cluster.fewest_workers))


def largest_block(corpus: Corpus | None) -> int | None:
    """Return the bytes of the largest block of a corpus, or None where there is no corpus."""
    return None if corpus is None else int((corpus.block_end - corpus.block_start).max())


def _free(storage_path: str) -> int | None:
    """Return the free bytes where runs are kept; None for an object store."""
    if is_uri(storage_path):
        return None
    storage = Path(os.path.abspath(storage_path))
    while not storage.exists():
        storage = storage.parent
    return shutil.disk_usage(storage).free


def _devices() -> list[str]:
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return [f"{available_cores()} CPU cores", *(gpus or ["no GPU"])]
