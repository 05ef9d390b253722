"""State of a run as a checkpoint holds it: taken from the objects of a running worker, and put back into them.

`Progress` is a run's own numbers besides tensors (step, best validation, ...), saved as progress.json. `Snapshot` adds
the rows of a worker's streams and running sums. Rank 0 writes what all ranks share: model, optimizer's slots and texts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from elmo_ray.checkpoints.check import check_cursors, check_forms, check_slots
from elmo_ray.checkpoints.identity import check_identity
from elmo_ray.checkpoints.manifest import MODEL_FILE, OPTIMIZER_FILE, PROGRESS_FILE, is_count, streams_name
from elmo_ray.checkpoints.read import Checkpoint
from elmo_ray.config import PretrainConfig
from elmo_ray.data.streams import StreamCursors
from elmo_ray.data.vocabulary import Vocabulary
from elmo_ray.errors import CheckpointError
from elmo_ray.model.lstm import LstmState
from elmo_ray.training.step import TrainStep

_LATER: dict[str, Any] = {"initial": {}, "stale": 0, "rate_factor": 1.0, "plateau_best": None, "plateau_stale": 0}
"""Values of `Progress` for keys that earlier versions did not write."""

MOST_AMOUNT = 1e300
"""Perplexities from this on are treated as infinite."""


@dataclass
class Progress:
    """Progress of a run.

    step: number of steps done. positions: target words trained on, counted in one direction over all ranks.
    window_positions: those since the last log record. best_perplexity, best_step: of the best validation; last_valid:
    the newest validation's record. skipped: number of steps without update. seconds: time of training, summed over all
    attempts. initial: record of the validation before the first step, where there was one, and in which numbers the
    vocabulary differs from the source's. stale: number of validations in a row since the best one. rate_factor,
    plateau_best, plateau_stale: of optim.schedule.kind=plateau the factor of the learning rates so far, the perplexity
    of the last gain, and the number of validations since it or since the rates were lowered.
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
    rate_factor: float = 1.0
    plateau_best: float | None = None
    plateau_stale: int = 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str) -> Progress:
        """Return the progress with these values, from a file that may be a stranger's.

        Raises CheckpointError, naming `source`, where a value is missing, unknown, or of a wrong kind.
        """
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
    """Return True for a record of validation: names with a number each, or None where that was not finite."""
    return isinstance(value, dict) and all(item is None or _is_amount(item) for item in value.values())


_KINDS: dict[str, Callable[[object], bool]] = {
    "int": is_count,
    "int | None": lambda value: value is None or is_count(value),
    "float": _is_amount,
    "float | None": lambda value: value is None or _is_amount(value),
    "bool": lambda value: isinstance(value, bool),
    "dict[str, Any]": _is_record,
}


@dataclass
class Snapshot:
    """State of one worker besides its model and LSTM states.

    cursors: positions of its streams in the corpus. window_sums: [D + 1] float64, its sums of each direction's losses
    (in nats) and of positions since the last log record.
    """

    progress: Progress
    cursors: StreamCursors
    window_sums: Tensor

    def stream_tensors(self, state: LstmState, streams: range) -> dict[str, Mapping[str, Tensor]]:
        """Return the file of this worker's streams: file name -> tensor name -> tensor [streams, ...].

        The streams are the leading dimension, so that any worker can take any of them.
        """
        # Sums belong to a worker and not to a stream: they are stored in the row of its first stream.
        window = torch.zeros(len(streams), len(self.window_sums), dtype=torch.float64)
        window[0] = self.window_sums.cpu()
        tensors = {
            "hidden": state.hidden.permute(2, 0, 1, 3).contiguous(),
            "cell": state.cell.permute(2, 0, 1, 3).contiguous(),
            "window_sums": window,
            **{name: torch.from_numpy(values) for name, values in self.cursors.arrays().items()},
        }
        return {streams_name(streams.start, streams.stop): tensors}

    def model_tensors(self, step: TrainStep) -> dict[str, Mapping[str, Tensor]]:
        """Return the files of the tensors that all workers share, for rank 0 to write: file name -> tensors."""
        return {MODEL_FILE: dict(step.model.state_dict()), OPTIMIZER_FILE: step.optimizer.state_tensors()}

    def texts(self, config: PretrainConfig, vocabulary: Vocabulary) -> dict[str, str]:
        """Return the text files of the run, for rank 0 to write: file name -> text."""
        return {
            "config.yaml": config.to_yaml(),
            "vocab.txt": "".join(f"{word}\n" for word in vocabulary.words),
            PROGRESS_FILE: json.dumps(self.progress.to_dict()),
        }

    @classmethod
    def load(cls, checkpoint: Checkpoint, expected: Mapping[str, Any], step: TrainStep, streams: range) -> Snapshot:
        """Put a checkpoint's model, slots and LSTM states of `streams` into `step`, and return the rest.

        expected: this run's `identity`. Raises ConfigError naming the key where it differs from the checkpoint's, and
        CheckpointError where the content of a file is not valid.
        """
        check_identity(checkpoint, expected)
        load_model(checkpoint, step.model.state_dict())
        slots, parameters = checkpoint.tensors(OPTIMIZER_FILE), dict(step.model.named_parameters())
        check_slots(checkpoint.at(OPTIMIZER_FILE), slots, parameters)
        try:
            step.optimizer.load_state_tensors(slots)
        except (KeyError, RuntimeError) as problem:
            name = step.config.optim.name
            raise CheckpointError(
                f"{checkpoint.at(OPTIMIZER_FILE)}: does not fit optim.name={name}: {problem}"
            ) from None
        progress = Progress.from_dict(checkpoint.json(PROGRESS_FILE), checkpoint.place)
        if progress.step != checkpoint.step:
            raise CheckpointError(f"{checkpoint.at(PROGRESS_FILE)}: step is {progress.step}, not {checkpoint.step}")
        rows = checkpoint.stream_tensors(streams.start, streams.stop)
        state, place = step.state, f"{checkpoint.place}: streams {streams.start}..{streams.stop - 1}"
        shapes = {"hidden": tuple(state.hidden.permute(2, 0, 1, 3).shape)}
        shapes["cell"] = tuple(state.cell.permute(2, 0, 1, 3).shape)
        shapes["window_sums"] = (len(streams), step.model.directions + 1)
        check_forms(place, {key: rows[key] for key in shapes.keys() & rows.keys()}, shapes)
        check_cursors(place, rows)
        if not bool(torch.isfinite(rows["window_sums"]).all()):
            raise CheckpointError(f"{place}: window_sums are not finite")
        step.state = LstmState(
            rows["hidden"].permute(1, 2, 0, 3).to(state.hidden).contiguous(),
            rows["cell"].permute(1, 2, 0, 3).to(state.cell).contiguous(),
        )
        cursors = StreamCursors(*(rows[name].numpy().astype(np.int64) for name in StreamCursors.start(0).arrays()))
        return cls(progress, cursors, rows["window_sums"].sum(dim=0).to(step.device))


def load_model(checkpoint: Checkpoint, into: Mapping[str, Tensor]) -> None:
    """Copy a checkpoint's parameters into `into`, a model's by name; CheckpointError unless names and shapes agree."""
    saved = checkpoint.tensors(MODEL_FILE)
    check_forms(checkpoint.at(MODEL_FILE), saved, {key: tuple(p.shape) for key, p in into.items()})
    for key, target in into.items():
        with torch.no_grad():
            target.copy_(saved[key])
