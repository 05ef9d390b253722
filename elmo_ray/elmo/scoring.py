"""Held-out losses of a model over streams of text, with the full softmax and carried state that begins at zero.

Validation inside training and `evaluate` share this file. A row of a batch never sees another. So the result depends on
the model, the text and the number of streams only; the numbers of rows and workers change nothing but the rounding.

Shapes: D directions, B rows, T window, U distinct words, N packed positions, P projection.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from elmo_ray.data.measures import perplexity
from elmo_ray.data.streams import Batch, BlockSource, StreamCursors, StreamLoader, StreamPlan
from elmo_ray.data.vocabulary import Vocabulary
from elmo_ray.data.word_types import TypeTable
from elmo_ray.elmo.encoder import PackedLstm
from elmo_ray.elmo.word_cache import WordCache
from elmo_ray.kernels.threads import threads_for_branches
from elmo_ray.model.bilm import BiLM
from elmo_ray.model.lstm import LstmState


@dataclass
class LossSums:
    """Sums of losses. nats: summed over positions, for each direction. positions: of one direction."""

    nats: list[float]
    positions: int

    @property
    def mean(self) -> list[float]:
        """Mean loss of each direction in nats per position."""
        return [n / max(1, self.positions) for n in self.nats]

    def perplexities(self) -> dict[str, float | None]:
        """Return the perplexities by name.

        They are `perplexity_forward`, `perplexity_backward` (None for a forward-only model), `perplexity` = exp of the
        mean loss of the directions, and `perplexity_mean`, the mean of both directions' perplexities (the published
        39.7 is one).
        """
        each = [perplexity(m) for m in self.mean]
        return {
            "perplexity_forward": each[0],
            "perplexity_backward": each[1] if len(each) > 1 else None,
            "perplexity": perplexity(sum(self.mean) / len(each)),
            "perplexity_mean": sum(each) / len(each),
        }


def character_table(model: BiLM, vocabulary: Vocabulary) -> TypeTable | None:
    """Return the table of character ids that a StreamLoader needs for this model; None for word input."""
    if model.char_cnn is None:
        return None
    return TypeTable(vocabulary, model.config.char_cnn.max_characters, model.char_cnn.widest)


class FixedModel:
    """A model for measuring, whose parameters must not change: word vectors and converted weights are made once.

    dtype: of the matrix products.
    """

    def __init__(self, model: BiLM, dtype: torch.dtype | None = None):
        self.model, self.dtype = model, dtype
        self.words = WordCache(model, dtype)
        self.lstm = PackedLstm(model, dtype)

    @cached_property
    def softmax(self) -> Any:
        """The exact losses of the model's softmax."""
        if not self.model.has_softmax:
            raise ValueError("this model has no softmax")
        return self.model.softmax_kind.exact(self.model, self.dtype)

    @torch.no_grad()
    def losses(self, batch: Batch, state: LstmState | None) -> tuple[Tensor, LstmState]:
        """Return [D, B, T] losses in nats, 0 where there is no position, and the state after the batch.

        state: None for zeros.
        """
        types_UP = self.words.vectors(batch.types, batch.type_classes)
        losses = types_UP.new_zeros(batch.targets.shape)
        directions, rows, window = losses.shape
        if state is None:
            state = self.model.lstm.zero_state(rows, like=types_UP)
        # positions in packed order: time by time, and at each time the rows that are long enough, longest first
        by_length = np.argsort(-batch.lengths, kind="stable")
        goes_on_TB = np.arange(window)[:, None] < batch.lengths[by_length]
        times, ranks = np.nonzero(goes_on_TB)
        if not len(times):
            return losses, state
        at = by_length[ranks], times
        inputs_DN, targets_DN = (
            torch.from_numpy(a[:, at[0], at[1]]).to(losses.device) for a in (batch.inputs, batch.targets)
        )
        packed = self.lstm.current(types_UP)
        if packed is not None:
            counts = goes_on_TB.sum(axis=1)
            order = torch.from_numpy(by_length).to(losses.device)
            outputs, *after = packed.run(types_UP, inputs_DN, counts[counts > 0].tolist(), *state.rows(order))
            x_DNP, state = outputs[-1], LstmState(*after).rows(torch.argsort(order))
        else:
            inputs_DBT, lengths = torch.from_numpy(batch.inputs), torch.from_numpy(batch.lengths)
            x_DTBP = F.embedding(inputs_DBT.to(losses.device).transpose(1, 2), types_UP)
            outputs, state = self.model.lstm(x_DTBP, state, lengths.to(losses.device), dtype=self.dtype)
            x_DNP = outputs[-1][:, at[1], at[0]]
        found_N = self.softmax.losses(x_DNP.flatten(0, 1), targets_DN.flatten())
        losses[:, at[0], at[1]] = found_N.view(directions, -1)
        return losses, state


def stream_losses(model: FixedModel, batches: Iterator[Batch]) -> Iterator[tuple[Batch, Tensor]]:
    """Yield each batch with its [D, B, T] losses in nats (in the model's own type, 0 where there is no position).

    State is carried from batch to batch and begins at zero. The model's training flag, parameters and noise are not
    changed. Losses should be summed in float64.
    """
    state: LstmState | None = None
    for batch in batches:
        with threads_for_branches():  # a generator's decorator does not hold between its yields
            losses, state = model.losses(batch, state)
        yield batch, losses


class Validation:
    """A held-out text, cut into streams, on which a model is measured repeatedly during training.

    positions: the number to read at most, the first ones of each stream. streams: those of this worker.
    dtype: of the matrix products.
    """

    def __init__(
        self,
        plan: StreamPlan,
        streams: range,
        source: BlockSource,
        vocabulary: Vocabulary,
        unroll: int,
        positions: int,
        model: BiLM,
        dtype: torch.dtype | None,
    ):
        self.plan, self.streams, self.source, self.vocabulary = plan, streams, source, vocabulary
        self.unroll, self.dtype, self.model = unroll, dtype, model
        self.characters = character_table(model, vocabulary)
        per_stream = -(-min(positions, plan.positions) // plan.n_streams)
        self.windows = -(-per_stream // unroll)

    def losses(self) -> LossSums:
        """Return the sums of this worker's streams."""
        totals = np.zeros(self.model.directions)
        positions = 0
        if len(self.streams):
            loader = StreamLoader(
                self.plan,
                self.streams,
                StreamCursors.start(len(self.streams)),
                self.source,
                self.vocabulary,
                self.unroll,
                self.characters,
                self.model.directions,
            )
            try:
                batches = (loader.next_batch() for _ in range(self.windows))
                for batch, losses in stream_losses(FixedModel(self.model, self.dtype), batches):
                    totals += losses.sum(dim=(1, 2), dtype=torch.float64).cpu().numpy()
                    positions += batch.positions
            finally:
                loader.close()
        return LossSums(totals.tolist(), positions)
