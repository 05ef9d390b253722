"""Losses of a whole held-out text by shard, with the counts needed to turn them into measures.

The text is read in one of two ways: as S streams of contiguous text with carried state, or sentence by sentence, each
from zero state. Rows of a batch never see each other. So a result depends on the model, the text and (for streams) S
only; the numbers of rows, positions of a window and workers change nothing but the rounding.

Shapes: D directions, B rows, T window.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Generator, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from elmo_ray.checkpoints.source import open_source
from elmo_ray.config import EvalConfig
from elmo_ray.data.corpus import Block, Corpus
from elmo_ray.data.encode import EncodedBlock, thread_source
from elmo_ray.data.measures import PositionCounter, PositionCounts
from elmo_ray.data.sentences import sentence_groups
from elmo_ray.data.streams import Batch, StreamCursors, StreamLoader, StreamPlan, split_evenly
from elmo_ray.data.text import OnError
from elmo_ray.data.vocabulary import Vocabulary
from elmo_ray.elmo.batch_size import positions_at_a_time, rows_for
from elmo_ray.elmo.scoring import FixedModel, character_table, stream_losses
from elmo_ray.errors import CheckpointError
from elmo_ray.machine import keep_freed_memory
from elmo_ray.model.bilm import BiLM

logger = logging.getLogger(__name__)

POSITIONS_PER_BATCH, ROWS = 4096, 128
"""Approximate numbers of positions in one direction, and of streams, that are computed at a time on a CPU: enough for
speed, few enough for memory."""

_LOOK_AHEAD = 4
_MAX_WINDOW = 256


@dataclass
class LossTotals:
    """Sums over some positions of a text, by shard. Leading axis [2]: sentences with an unknown word, and without.

    nats: float64 [2, D, shards], losses. positions, unknown, characters: int64 [2, shards]. characters are the code
    points of known words, so only those of sentences without an unknown word are complete.
    """

    nats: NDArray[np.float64]
    positions: NDArray[np.int64]
    unknown: NDArray[np.int64]
    characters: NDArray[np.int64]

    @classmethod
    def zero(cls, directions: int, shards: int) -> LossTotals:
        counts = (np.zeros((2, shards), np.int64) for _ in range(3))
        return cls(np.zeros((2, directions, shards)), *counts)

    def __add__(self, other: LossTotals) -> LossTotals:
        return LossTotals(
            self.nats + other.nats,
            self.positions + other.positions,
            self.unknown + other.unknown,
            self.characters + other.characters,
        )

    def add_losses(self, labels: NDArray[np.int64], losses: NDArray[np.float64]) -> None:
        """Add losses in nats [D, n] of n positions. labels: [n], 2 * shard + known; known is 1 for known sentences."""
        shards = self.nats.shape[2]
        for direction, values in enumerate(losses):
            sums = np.bincount(labels, values, minlength=2 * shards)
            self.nats[:, direction] += sums.reshape(shards, 2).T

    def add_counts(self, shard: int, counts: PositionCounts) -> None:
        """Add the counts of some positions of a shard."""
        for known, chosen in enumerate((~counts.known, counts.known)):
            self.positions[known, shard] += int(chosen.sum())
            self.unknown[known, shard] += int(counts.unknown[chosen].sum())
            self.characters[known, shard] += int(counts.characters[chosen].sum())


@dataclass(frozen=True)
class EvaluationJob:
    """Description of an evaluation, for any process that can read the files.

    checkpoint: a source, whose weights must have this fingerprint. options, vocab: files that belong to a source of
    another program.
    """

    checkpoint: str
    fingerprint: str | None
    corpus: Corpus
    settings: EvalConfig
    on_error: OnError
    options: str | None = None
    vocab: str | None = None

    def shares(self, workers: int) -> list[range]:
        """Return equal shares of the text for at most `workers` processes.

        A share is a range of streams, or of blocks with evaluate.reset=sentence.
        """
        if self.settings.reset == "never":
            return split_evenly(self.settings.streams, min(workers, self.settings.streams))
        ends = np.cumsum(self.corpus.block_positions)
        cuts = np.searchsorted(ends, self.corpus.positions * np.arange(1, workers) / workers, side="left")
        edges = [0, *cuts.tolist(), len(self.corpus)]
        return [range(a, b) for a, b in zip(edges[:-1], edges[1:], strict=True) if b > a]

    def measure(self, share: range, model: BiLM, vocabulary: Vocabulary) -> LossTotals:
        """Return the totals of one of the shares. model: on the device that computes them."""
        keep_freed_memory()
        dtype = torch.bfloat16 if self.settings.precision == "bf16" else None
        scorer = Scorer(model, vocabulary, self.corpus, self.on_error, dtype)
        rows = self.settings.rows or rows_for(scorer.positions, ROWS, scorer.device)
        if self.settings.reset == "sentence":
            return scorer.sentences(share, rows)
        if len(share) < rows // 2 and scorer.device.type == "cuda":
            logger.info(
                "evaluate.streams=%d gives this GPU %d streams at a time, and it can take %d: more of them are "
                "measured faster, and give a perplexity of their own",
                self.settings.streams,
                len(share),
                rows,
            )
        return scorer.streams(share, self.settings.streams, rows)


def measure_share(job: EvaluationJob, share: range, device: str) -> LossTotals:
    """Open the model and return the totals of one of the job's shares; for a process other than the driver.

    Raises CheckpointError where the checkpoint is no longer the one that the driver saw.
    """
    source = open_source(job.checkpoint, options=job.options, vocab=job.vocab, verify=False)
    if source.fingerprint != job.fingerprint:
        raise CheckpointError(f"{job.checkpoint}: was replaced by another checkpoint while it was evaluated; try again")
    return job.measure(share, source.model.to(device), source.vocabulary)


class Scorer:
    """Scorer of a text with a model, which must have a softmax and is used as it is, on its device.

    dtype: of the matrix products. positions: about how many are computed at a time; None: as many as suit the device.
    """

    def __init__(
        self,
        model: BiLM,
        vocabulary: Vocabulary,
        corpus: Corpus,
        on_error: OnError = "fail",
        dtype: torch.dtype | None = None,
        positions: int | None = None,
    ):
        self.model, self.vocabulary, self.corpus, self.on_error = model, vocabulary, corpus, on_error
        self.device = next(model.parameters()).device
        self.positions = positions or positions_at_a_time(self.device, model.config, POSITIONS_PER_BATCH)
        self.characters = character_table(model, vocabulary)
        self.counter = PositionCounter(vocabulary)
        self.fixed = FixedModel(model, dtype)

    def streams(self, streams: range, n_streams: int, rows: int) -> LossTotals:
        """Return the totals of some of the text's `n_streams` streams, read at most `rows` at a time."""
        totals = self._zero()
        plan = StreamPlan(self.corpus, n_streams, shuffle=False, epochs=1)
        for first in range(streams.start, streams.stop, rows):
            totals += self._stream_group(plan, range(first, min(first + rows, streams.stop)))
        return totals

    def sentences(self, blocks: range, rows: int) -> LossTotals:
        """Return the totals of the sentences in some blocks, each from zero state, at most `rows` at a time."""
        totals = self._zero()
        encoded = self._encode(self.corpus.block(i) for i in blocks)

        def labelled() -> Iterator[tuple[EncodedBlock, NDArray[np.int64]]]:
            for index, block in zip(blocks, encoded, strict=True):
                shard = int(self.corpus.block_shard[index])
                counts = self.counter.count(block)
                totals.add_counts(shard, counts)
                last_positions = np.cumsum(block.lengths.astype(np.int64) + 1) - 1
                yield block, 2 * shard + counts.known[last_positions]

        try:
            for group in sentence_groups(labelled(), self.vocabulary, rows):
                window = window_of(len(group.lengths), self.positions)
                batches = group.windows(window, self.vocabulary, self.characters, self.model.directions)
                for batch, losses in stream_losses(self.fixed, batches):
                    valid = np.arange(batch.targets.shape[2]) < batch.lengths[:, None]
                    self._add(totals, np.broadcast_to(group.labels[:, None], valid.shape), valid, losses)
        finally:
            encoded.close()
        return totals

    def _zero(self) -> LossTotals:
        return LossTotals.zero(self.model.directions, len(self.corpus.shards))

    def _encode(self, blocks: Iterator[Block]) -> Generator[EncodedBlock, None, None]:
        most = self.model.config.char_cnn.max_characters
        return thread_source(blocks, self.vocabulary, most, _LOOK_AHEAD, self.on_error)

    def _stream_group(self, plan: StreamPlan, streams: range) -> LossTotals:
        totals = self._zero()
        window = window_of(len(streams), self.positions)
        start = StreamCursors.start(len(streams))
        labels: list[deque[NDArray[np.int64]]] = [deque() for _ in streams]

        def source(blocks: Iterator[Block]) -> Iterator[EncodedBlock]:
            encoded = self._encode(blocks)
            try:
                # the loader requests the same shares of blocks in the same order
                for (_, share), block in zip(plan.requests(streams, start, window), encoded, strict=False):
                    shard = int(self.corpus.block_shard[share.block])
                    counts = self.counter.count(block).slice(share.first, share.last)
                    totals.add_counts(shard, counts)
                    labels[share.stream - streams.start].append(2 * shard + counts.known)
                    yield block
            finally:
                encoded.close()

        loader = StreamLoader(
            plan, streams, start, source, self.vocabulary, window, self.characters, self.model.directions
        )
        try:
            for batch, losses in stream_losses(self.fixed, iter(loader)):
                valid, labels_BT = _take_labels(batch, labels)
                self._add(totals, labels_BT, valid, losses)
        finally:
            loader.close()
        return totals

    @staticmethod
    def _add(
        totals: LossTotals, labels_BT: NDArray[np.int64], valid_BT: NDArray[np.bool_], losses_DBT: torch.Tensor
    ) -> None:
        values = losses_DBT.double().cpu().numpy()
        totals.add_losses(labels_BT[valid_BT], values[:, valid_BT])


def window_of(rows: int, positions: int) -> int:
    """Return the positions of a window for so many rows, in batches of about so many positions."""
    return max(16, min(_MAX_WINDOW, positions // rows))


def _take_labels(batch: Batch, labels: list[deque[NDArray[np.int64]]]) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Return two [B, T] arrays: True for positions of the text, and their labels, taken from each row's pieces."""
    shape = batch.targets.shape[1:]
    result = np.zeros(shape, np.int64)
    for row, length in enumerate(batch.lengths.tolist()):
        filled = 0
        while filled < length:
            piece = labels[row].popleft()
            n = min(length - filled, len(piece))
            result[row, filled : filled + n] = piece[:n]
            filled += n
            if n < len(piece):
                labels[row].appendleft(piece[n:])
    return np.arange(shape[1]) < batch.lengths[:, None], result
