"""Initialization of a run from a trained model (SOURCE), for a vocabulary that may differ from the source's.

Words that both vocabularies have keep their rows of the tables. Where the source has a softmax, k new words begin as
its <UNK>: with its weights and vector, and with an equal share of its probability, by a bias that is log(k + 1) lower,
also for <UNK> itself. So all other words keep the probabilities that the source gives them. Without a softmax in the
source, weights and biases begin as in pretraining.

`write_initial` writes the checkpoint from which training begins: the model and the slots that it is given, zero LSTM
states, and no text read yet.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from elmo_ray.checkpoints.manifest import MODEL_FILE, OPTIMIZER_FILE
from elmo_ray.checkpoints.read import Checkpoint
from elmo_ray.checkpoints.stores import store_of
from elmo_ray.checkpoints.write import commit, write_rank_files
from elmo_ray.config import PretrainConfig
from elmo_ray.data.streams import StreamCursors
from elmo_ray.data.vocabulary import Vocabulary
from elmo_ray.errors import CheckpointError, ConfigError
from elmo_ray.model.bilm import TABLES, BiLM
from elmo_ray.storage import Place
from elmo_ray.training.optimizer import methods_of
from elmo_ray.training.snapshot import Progress, Snapshot
from elmo_ray.training.step import DTYPES


@dataclass(frozen=True)
class WordCounts:
    """Numbers of words: carried over from the source, new in the new vocabulary, and left out of the source's."""

    carried: int
    new: int
    left_out: int

    def describe(self, has_softmax: bool) -> str:
        """Return the counts as a line for the log; has_softmax: whether the source has a softmax."""
        rule = "which begin as its <UNK>" if has_softmax else "as all rows of a softmax that the source does not have"
        new = f"{self.new:,} new ones, {rule}" if self.new else "none new"
        return f"{self.carried:,} words carried over from the source, {new}; {self.left_out:,} of the source's left out"


def source_rows(source: Vocabulary, target: Vocabulary) -> Tensor:
    """Return [V] int64: for each id of `target` the source's id of that word, or -1 where the source lacks it."""
    return torch.tensor([source.ids.get(word, -1) for word in target.words], dtype=torch.int64)


def initial_model(
    config: PretrainConfig, source: BiLM, rows: Tensor | None, vocabulary: Vocabulary, source_unk: int
) -> tuple[BiLM, WordCounts]:
    """Return a model of `config` for `vocabulary` with the source's parameters, and the numbers of words.

    rows: from `source_rows`; None if the source has no tables from which to take rows. source_unk: the source's id of
    <UNK>. Raises ConfigError for another vocabulary than the source's where its softmax has no table of single words.
    """
    model = BiLM(config.model, config.softmax, vocabulary.size).to(DTYPES[config.train.precision])
    model.reset_parameters(config.run.seed)
    given = dict(source.named_parameters())
    left = sorted(given.keys() - dict(model.named_parameters()).keys())
    if left:
        raise ConfigError(
            f"softmax.kind={config.softmax.kind}: has no place for the SOURCE's {left[0]}; "
            "leave softmax.kind as it is in the SOURCE"
        )
    if rows is not None and source.has_softmax and not source.has_table:
        if not torch.equal(rows, torch.arange(source.n_words)):
            raise ConfigError(
                "data.vocab: must be the SOURCE's vocabulary, as its softmax has no table of single words"
            )
    new = torch.zeros(vocabulary.size, dtype=torch.bool) if rows is None else rows < 0
    count = int(new.sum())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name not in given:
                continue  # the softmax, where the source has none
            values = given[name].to(parameter)
            if name in TABLES:
                assert rows is not None
                values = values[torch.where(new, source_unk, rows)]
                if name == "softmax_bias" and count:
                    new_or_unk = new.clone()
                    new_or_unk[vocabulary.unk] = True
                    values[new_or_unk] -= math.log(count + 1)
            parameter.copy_(values)
    words = given.keys() & set(TABLES)
    if rows is None or not words:
        return model, WordCounts(0, vocabulary.size, 0)
    size = next(len(given[name]) for name in words)
    return model, WordCounts(vocabulary.size - count, count, size - len(torch.unique(rows[~new])))


def initial_slots(
    config: PretrainConfig, model: BiLM, kept: Mapping[str, Tensor] | None, rows: Tensor | None
) -> dict[str, Tensor]:
    """Return the optimizer's slots at the start, named as in `Optimizer.state_tensors`.

    kept: the source's slots, of which the rows of new words begin anew; None: all slots begin anew. rows: as for
    `initial_model`. Raises ConfigError where `kept` comes from another optimizer.
    """
    parameters = dict(model.named_parameters())
    of_dense, of_tables = methods_of(config.optim)
    kinds = {name: (of_tables if name in TABLES else of_dense).slots for name in parameters}
    slots = {
        f"{kind}.{name}": torch.full_like(parameters[name], first).detach()
        for name, firsts in kinds.items()
        for kind, first in firsts.items()
        if first is not None  # the optimizer makes these in its first step
    }
    if kept is None:
        return slots
    for name, parameter in parameters.items():
        in_table = name in TABLES
        for kind, first in kinds[name].items():
            key = f"{kind}.{name}"
            slot = kept.get(key)
            if slot is None:
                if first is not None and not in_table:
                    raise ConfigError(
                        f"init.optimizer=keep: the source has no slots of optim.name={config.optim.name} for {name}; "
                        "set init.optimizer=reset"
                    )
                continue
            if kind != "step":
                slot = slot.to(parameter.dtype)
            if in_table:
                assert rows is not None
                fresh = (rows < 0).view(-1, *[1] * (slot.ndim - 1))
                slot = torch.where(fresh, first or 0.0, slot[rows.clamp_min(0)])
            slots[key] = slot.contiguous()
    left = sorted(kept.keys() - slots.keys())
    if left:
        raise ConfigError(
            f"init.optimizer=keep: optim.name={config.optim.name} has no place for the source's {left[0]}; "
            "set init.optimizer=reset"
        )
    return slots


def write_initial(
    place: Place,
    config: PretrainConfig,
    vocabulary: Vocabulary,
    model: BiLM,
    slots: Mapping[str, Tensor] | None,
    identity: Mapping[str, Any],
    step: int = 0,
    fields: Mapping[str, Any] | None = None,
) -> Checkpoint:
    """Write a whole checkpoint at `place`, a path or URI, and replace an older one there; return the new one.

    slots: as from `Optimizer.state_tensors`; None for a checkpoint without slots. fields: more values for the manifest.
    Raises CheckpointError where it cannot be written.
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
    target = os.fspath(place)
    try:
        with store_of(target).replacing(target) as new:
            write_rank_files(new, 0, tensors, snapshot.texts(config, vocabulary))
            manifest = {"step": step, "streams": len(streams), "identity": dict(identity), **(fields or {})}
            checkpoint = commit(new, 1, manifest, patience_s=0)
    except OSError as error:
        raise CheckpointError(f"{target}: cannot be written ({error.strerror or error})") from None
    return Checkpoint(target, checkpoint.manifest)
