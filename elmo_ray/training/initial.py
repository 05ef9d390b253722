"""A checkpoint at which training can begin: a given model with given slots, zero states, no text read yet."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from elmo_ray.config import PretrainConfig
from elmo_ray.data.streams import StreamCursors
from elmo_ray.data.vocabulary import Vocabulary
from elmo_ray.errors import CheckpointError
from elmo_ray.model.bilm import BiLM
from elmo_ray.training.checkpoint import Checkpoint, commit, write_part
from elmo_ray.training.progress import Progress
from elmo_ray.training.snapshot import MODEL_FILE, OPTIMIZER_FILE, Snapshot


def write_initial(
    folder: Path,
    config: PretrainConfig,
    vocabulary: Vocabulary,
    model: BiLM,
    slots: Mapping[str, Tensor] | None,
    identity: Mapping[str, Any],
    step: int = 0,
    fields: Mapping[str, Any] | None = None,
) -> Checkpoint:
    """Write a whole checkpoint into `folder`, aside and renamed; what was there before is replaced.

    slots: as `Optimizer.state_tensors`; None: the checkpoint has none. fields: more for the manifest. Raises
    CheckpointError where it cannot be written.
    """
    streams = range(config.data.streams)
    snapshot = Snapshot(
        Progress(step=step), StreamCursors.start(len(streams)), torch.zeros(model.directions + 1, dtype=torch.float64)
    )
    state = model.lstm.zero_state(len(streams), like=next(model.parameters()).detach())
    tensors = snapshot.stream_tensors(state, streams)
    tensors[MODEL_FILE] = dict(model.state_dict())
    if slots is not None:
        tensors[OPTIMIZER_FILE] = slots
    aside = folder.with_name(f".{folder.name}.new")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        write_part(aside, 0, tensors, snapshot.texts(config, vocabulary))
        manifest = {"step": step, "streams": len(streams), "identity": dict(identity), **(fields or {})}
        checkpoint = commit(aside, 1, manifest, patience_s=0)
        if folder.exists():
            shutil.rmtree(folder)
        aside.rename(folder)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise CheckpointError(f"{folder}: cannot be written ({error.strerror or error})") from None
    return Checkpoint(folder, checkpoint.manifest)
