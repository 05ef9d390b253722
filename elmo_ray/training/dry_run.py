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
from elmo_ray.data.vocabulary import Vocabulary
from elmo_ray.machine import available_cores
from elmo_ray.model.bilm import BiLM
from elmo_ray.model.components import component_of
from elmo_ray.storage import is_uri

BYTES_PER_POSITION = 5.5
"""Bytes of English text for one position; used where the corpus has not been counted yet."""


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
            "memory of a worker: "
            + ", ".join(f"{k} {_size(v)}" for k, v in self.memory.items())
            + f"; in all about {_size(sum(self.memory.values()))}",
            f"disk: {_size(self.checkpoint_bytes)} a checkpoint, {config.train.keep_last} kept, "
            "one being written and the best: "
            f"{_size(self.checkpoint_bytes * (config.train.keep_last + 2))}; "
            + ("in an object store" if self.disk_free is None else f"free {_size(self.disk_free)}"),
            f"devices seen: {', '.join(self.devices)}",
        ]
        if config.optim.name == "adamw":
            lines.append("optim.name=adamw trains the dense parameters; the word tables keep Adagrad (optim.table_lr)")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return the estimate as plain values."""
        return {**vars(self), "config": self.config.to_dict()}


def dry_run(config: PretrainConfig, directory: Path, tasks: int, bytes_to_read: int) -> DryRun:
    """Return the estimate of a run.

    directory: the prepared folder. tasks, bytes_to_read: the work that `prepare` still has to do. Raises ConfigError or
    DataError where a real run would refuse to start.
    """
    exact = tasks == 0 and (directory / "train.npz").exists() and _vocabulary_path(config, directory).exists()
    if config.data.vocab is not None:
        words = Vocabulary.read(config.data.vocab).size
    elif exact:
        words = Vocabulary.read(directory / "vocab.txt").size
    else:
        words = config.data.max_vocab or 100_000
    config.softmax.check_vocabulary(words)
    unroll, streams = config.train.unroll, config.data.streams
    if exact:
        plan = StreamPlan(Corpus.load(directory / "train.npz"), streams)
        positions, per_epoch = plan.positions, plan.steps(1, unroll)
        steps = plan.steps(config.train.duration.amount, unroll) if config.train.duration.unit == "epochs" else None
    else:
        positions = int(max(bytes_to_read, 1) / BYTES_PER_POSITION)
        per_epoch, steps = -(-positions // (streams * unroll)), None
    if steps is None:
        steps = config.train.duration.steps(streams * unroll, positions)
    with torch.device("meta"):
        model = BiLM(config.model, config.softmax, words)
    parameters: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        component = component_of(name)
        parameters[component] = parameters.get(component, 0) + parameter.numel()
    total = sum(parameters.values())
    width = 8 if config.train.precision == "fp64" else 4
    slots = 1 if config.optim.name == "adagrad" else 2
    rows = -(-streams // max(1, config.cluster.fewest_workers))
    lstm, directions = config.model.lstm, 2 if config.model.bidirectional else 1
    window = -(-rows // config.train.accumulate) * unroll * directions
    negatives = config.softmax.negatives if config.softmax.kind == "sampled" else words
    # tensors kept for backward: gates, their gradients, cells and outputs; logits and their gradient
    activations = window * lstm.n_layers * (10 * lstm.dim + 4 * lstm.projection_dim) + 3 * window * negatives
    memory = {
        "parameters": total * width,
        "optimizer": total * slots * width,
        "gradients": _dense(parameters) * width,
        "activations": activations * width,
        "text": words * (2 * config.model.char_cnn.max_characters + 150) + rows * 3 * config.data.block_bytes * 6,
    }
    state = streams * directions * lstm.n_layers * (lstm.dim + lstm.projection_dim) * width
    return DryRun(
        config,
        parameters,
        words,
        positions,
        exact,
        per_epoch,
        steps,
        memory,
        total * (1 + slots) * width + state,
        _free(config.run.storage_path),
        _devices(),
    )


def _free(storage_path: str) -> int | None:
    """Return the free bytes where runs are kept; None for an object store."""
    if is_uri(storage_path):
        return None
    storage = Path(os.path.abspath(storage_path))
    while not storage.exists():
        storage = storage.parent
    return shutil.disk_usage(storage).free


def _vocabulary_path(config: PretrainConfig, directory: Path) -> Path:
    given = config.data.vocab is not None and not is_uri(config.data.vocab)
    return Path(str(config.data.vocab)) if given else directory / "vocab.txt"


def _dense(parameters: dict[str, int]) -> int:
    return sum(count for component, count in parameters.items() if component not in ("softmax", "word_embedding"))


def _devices() -> list[str]:
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return [f"{available_cores()} CPU cores", *(gpus or ["no GPU"])]


def _size(count: int) -> str:
    value, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            break
        value /= 1000
    return f"{value:.3g} {unit}"
