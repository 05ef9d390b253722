"""What a checkpoint holds, between the objects of a running worker and the files of a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from elmo_ray.config import PretrainConfig
from elmo_ray.data.streams import StreamCursors
from elmo_ray.data.vocabulary import Vocabulary
from elmo_ray.errors import CheckpointError, ConfigError
from elmo_ray.model.lstm import LstmState
from elmo_ray.training.checkpoint import Checkpoint, streams_name
from elmo_ray.training.progress import Progress
from elmo_ray.training.step import TrainStep

MODEL_FILE, OPTIMIZER_FILE, PROGRESS_FILE = "model.safetensors", "optimizer.safetensors", "progress.json"


def identity(config: PretrainConfig, corpus_fingerprint: str, vocabulary_sha256: str) -> dict[str, Any]:
    """What a checkpoint must share with the run that goes on from it, by the key that would be to blame."""
    return {
        "data.streams": config.data.streams,
        "data.train": corpus_fingerprint,
        "data.vocab": vocabulary_sha256,
        "model": config.model.to_dict(),
        "softmax.tied": config.softmax.tied,
    }


@dataclass
class Snapshot:
    """A worker's progress, its streams' cursors, and [D] its loss sums since the last log record."""

    progress: Progress
    cursors: StreamCursors
    window_losses: Tensor

    def stream_tensors(self, step: TrainStep, streams: range) -> dict[str, Mapping[str, Tensor]]:
        """File name -> tensors of this worker's streams, streams first, so that any worker can take any of them."""
        # sums belong to a worker and not to a stream: they travel in the row of its first one
        window = torch.zeros(len(streams), len(self.window_losses), dtype=torch.float64)
        window[0] = self.window_losses.cpu()
        tensors = {
            "hidden": step.state.hidden.permute(2, 0, 1, 3).contiguous(),
            "cell": step.state.cell.permute(2, 0, 1, 3).contiguous(),
            "window_losses": window,
            **{name: torch.from_numpy(values) for name, values in self.cursors.arrays().items()},
        }
        return {streams_name(streams.start, streams.stop): tensors}

    def model_tensors(self, step: TrainStep) -> dict[str, Mapping[str, Tensor]]:
        """File name -> tensors that all workers share: rank 0's to write."""
        return {MODEL_FILE: dict(step.model.state_dict()), OPTIMIZER_FILE: step.optimizer.state_tensors()}

    def texts(self, config: PretrainConfig, vocabulary: Vocabulary) -> dict[str, str]:
        """File name -> text: rank 0's to write."""
        return {
            "config.yaml": config.to_yaml(),
            "vocab.txt": "".join(f"{word}\n" for word in vocabulary.words),
            PROGRESS_FILE: json.dumps(self.progress.to_dict()),
        }

    @classmethod
    def load(cls, checkpoint: Checkpoint, expected: Mapping[str, Any], step: TrainStep, streams: range) -> Snapshot:
        """Put a checkpoint's model, slots and states into `step`, and return the rest.

        expected: this run's `identity`. Raises ConfigError naming the key where it differs from the checkpoint's, and
        CheckpointError where a file does not hold what it should.
        """
        saved = checkpoint.manifest.get("identity", {})
        for key, value in expected.items():
            if saved.get(key) != value:
                raise ConfigError(
                    f"{key} is {value}, but the checkpoint {checkpoint.path.name} was made with {saved.get(key)}; "
                    "use the same, or --fresh, or another run.name"
                )
        load_model(checkpoint, step.model.state_dict())
        try:
            step.optimizer.load_state_tensors(checkpoint.tensors(OPTIMIZER_FILE))
        except (KeyError, RuntimeError) as problem:
            name = step.config.optim.name
            raise CheckpointError(
                f"{checkpoint.path}/{OPTIMIZER_FILE}: does not fit optim.name={name}: {problem}"
            ) from None
        progress = Progress.from_dict(checkpoint.json(PROGRESS_FILE), str(checkpoint.path))
        rows = checkpoint.stream_tensors(streams.start, streams.stop)
        state = step.state
        step.state = LstmState(
            rows["hidden"].permute(1, 2, 0, 3).to(state.hidden).contiguous(),
            rows["cell"].permute(1, 2, 0, 3).to(state.cell).contiguous(),
        )
        cursors = StreamCursors(*(rows[name].numpy().astype(np.int64) for name in StreamCursors.start(0).arrays()))
        return cls(progress, cursors, rows["window_losses"].sum(dim=0).to(step.device))


def load_model(checkpoint: Checkpoint, into: Mapping[str, Tensor]) -> None:
    """Copy a checkpoint's parameters into those of a model of the same sizes. Raises CheckpointError."""
    saved = checkpoint.tensors(MODEL_FILE)
    for key, target in into.items():
        if key not in saved or saved[key].shape != target.shape:
            raise CheckpointError(f"{checkpoint.path}/{MODEL_FILE}: {key} is missing or of another shape")
        with torch.no_grad():
            target.copy_(saved[key])
