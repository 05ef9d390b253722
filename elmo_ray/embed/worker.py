"""Workers of `embed`: the model makes unit after unit, in this process or in a Ray actor; and the progress of a job.

Also here are the context-independent vectors of a vocabulary's words, which are bilm-tf's token cache
(`dump_token_embeddings`). Shapes: B sentences, T positions with the markers, L layers, D dimensions; V words.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch import Tensor

from elmo_ray.checkpoints.source import Source, open_source
from elmo_ray.data.vocabulary import SPECIAL_WORDS, Vocabulary
from elmo_ray.elmo.batch_size import positions_at_a_time
from elmo_ray.elmo.encoder import SentenceEncoder, encode_sentences
from elmo_ray.elmo.language_model import LanguageModel
from elmo_ray.elmo.layer_choice import batches_by_length, choose_layers, layer_factors
from elmo_ray.embed.record import BATCH_POSITIONS, EmbedJob
from elmo_ray.embed.sentences import read_kinds
from elmo_ray.embed.shards import Row, shard_writer
from elmo_ray.embed.units import Unit, read_columns, read_sentences
from elmo_ray.errors import ConfigError, DataError
from elmo_ray.model.lstm import LstmState
from elmo_ray.storage.files import atomic_write
from elmo_ray.training.metrics import clock

logger = logging.getLogger("elmo_ray.embed")

_LINE_EVERY_S = 10.0
_BAR_WIDTH = 30

_OF_LAYERS = ("vectors", "means")
"""Outputs that are made of the layers themselves."""

_WORDS_AT_A_TIME = 4096
_WINDOW_POSITIONS = 1 << 14
"""Positions that are read before their sentences are sorted by length; they are written together."""
_MOST_POSITIONS = 1 << 14
"""Positions that a GPU computes at a time at most: their vectors go through the memory of its host."""


class Progress:
    """Progress of a job: a bar in a terminal, otherwise a line of the log every ten seconds. done: sentences before."""

    def __init__(self, sentences: int, done: int):
        self.total, self.before = max(sentences, 1), done
        self.now, self.words = done, 0
        self.start = self.shown = time.monotonic()
        self.is_terminal = sys.stderr.isatty()

    def add(self, sentences: int, words: int) -> None:
        """Count a finished unit."""
        self.now += sentences
        self.words += words
        if self.is_terminal or time.monotonic() - self.shown >= _LINE_EVERY_S:
            self._show()

    def close(self) -> None:
        """End the line of the bar."""
        if self.is_terminal and self.words:
            sys.stderr.write("\n")

    @property
    def values(self) -> dict[str, Any]:
        seconds = max(time.monotonic() - self.start, 1e-9)
        return {"words": self.words, "seconds": seconds, "words_per_second": self.words / seconds}

    def _show(self) -> None:
        self.shown = time.monotonic()
        speed = self.values["words_per_second"]
        left = (self.total - self.now) * (self.shown - self.start) / max(self.now - self.before, 1)
        text = f"{self.now:,}/{self.total:,} sentences  {speed:,.0f} words/s  {clock(left)} left"
        if self.is_terminal:
            filled = _BAR_WIDTH * self.now // self.total
            sys.stderr.write(f"\r[{'#' * filled}{'.' * (_BAR_WIDTH - filled)}] {text}   ")
            sys.stderr.flush()
        else:
            logger.info("%s", text)


def write_token_vectors(source: Source, vocab: str, out: Path, precision: str = "fp32") -> int:
    """Write `embedding` [V, D] float32, with a row for each line of the vocabulary; return V.

    `Elmo.from_token_vectors` and bilm-tf run from this file. Raises ConfigError for a model with word input, DataError
    if the vocabulary cannot be read or the disk is full.
    """
    embedder = source.model.token_embedder
    if source.model.char_cnn is None and embedder is None:
        raise ConfigError(f"{source.path}: embed.tokens is for a model with characters; this one has a table of words")
    vocabulary = Vocabulary.read(vocab, SPECIAL_WORDS[:2])  # the cache has no softmax, so it needs no <UNK>
    dtype = torch.bfloat16 if precision == "bf16" else None
    encoder = SentenceEncoder(source.model, dtype)
    table_VC = vocabulary.characters(source.config.char_cnn.max_characters)
    with atomic_write(out, also=(RuntimeError,)) as temporary, h5py.File(temporary, "w") as file, torch.no_grad():
        shape = (vocabulary.size, source.config.word_dim)
        vectors = file.create_dataset("embedding", shape, dtype="float32", track_times=False)
        if embedder is not None:
            vectors[:] = embedder.vectors_of(vocabulary, dtype).numpy()
            return vocabulary.size
        for first in range(0, vocabulary.size, _WORDS_AT_A_TIME):
            rows = slice(first, first + _WORDS_AT_A_TIME)
            vectors[rows] = encoder.word_vectors(table_VC[rows]).float().cpu().numpy()
    return vocabulary.size


class EmbedWorker:
    """Model of a job on its device. The result of a unit depends on this unit only, not on the units before it."""

    def __init__(self, job: EmbedJob, source: Source | None = None):
        """Open the model, unless this process has it already as `source`. Raises the errors of `open_source`."""
        self.job = job
        if source is None:
            source = open_source(job.source, job.checkpoint, job.options, job.vocab, verify=False)
        self.vocabulary = source.words
        self.model = source.model.to(job.device)
        self._positions, self._window = job.batch_positions or BATCH_POSITIONS, _WINDOW_POSITIONS
        if job.batch_positions is None:
            most = positions_at_a_time(torch.device(job.device), source.config, BATCH_POSITIONS)
            self._positions = min(most, _MOST_POSITIONS)
            self._window = max(_WINDOW_POSITIONS, 4 * self._positions)
        self.language_model = (
            LanguageModel(self.model, source.vocabulary) if job.output in ("substitutes", "surprisal") else None
        )
        of_layers = job.output in _OF_LAYERS
        self._factors = layer_factors(job.layers, source.config, "embed.layers") if of_layers else None

    def make(self, unit: Unit) -> dict[str, Any]:
        """Write the shard of a unit; return its number, words and seconds. Raises DataError for unreadable text."""
        start = time.monotonic()
        # A new cache of word vectors: those of earlier units come from products of other sizes, with other last bits.
        self.encoder = SentenceEncoder(self.model, torch.bfloat16 if self.job.precision == "bf16" else None)
        words = done = 0
        columns = read_columns(unit, read_kinds(self.job.kept)) if self.job.has_documents else None
        with shard_writer(self.job, unit) as writer:
            for sentences, rows in self._rows(read_sentences(unit, self.job.on_error)):
                beside = columns.rows(done, done + len(rows)) if columns is not None else {}
                writer.write(unit.first + done, sentences, rows, beside)
                words += sum(map(len, sentences))
                done += len(rows)
            if done != unit.count:
                raise DataError(f"{unit.path}: has changed since it was counted; embed it anew with --fresh")
        return {"unit": unit.number, "words": words, "seconds": time.monotonic() - start}

    def _rows(self, sentences: Iterator[list[str]]) -> Iterator[tuple[list[list[str]], list[Row]]]:
        state = None
        for window in _windows(sentences, self._window):
            rows: list[Row] = [np.zeros(0)] * len(window)
            if self.job.carry:
                for number, words in enumerate(window):
                    (rows[number],), state = self._batch([words], state)
            else:
                for numbers in batches_by_length(window, self._positions):
                    found, _ = self._batch([window[number] for number in numbers], None)
                    for number, row in zip(numbers, found, strict=True):
                        rows[number] = row
            yield window, rows

    @torch.no_grad()
    def _batch(self, batch: list[list[str]], state: LstmState | None) -> tuple[list[Row], LstmState]:
        inputs = encode_sentences(self.encoder, self.vocabulary, batch)
        layers, after = self.encoder.layers(*inputs, state)
        if self.language_model is not None:
            k, model = self.job.k, self.language_model
            if self.job.output == "substitutes":
                return [model.substitutes_of(top, len(ws), k) for top, ws in zip(layers[-1], batch, strict=True)], after
            return [model.surprisal_of(top, words) for top, words in zip(layers[-1], batch, strict=True)], after
        chosen = choose_layers(layers, self._factors)[:, :, 1:-1]
        if self.job.output == "means":
            # Positions after the words of a sentence are not all zero: the first of them is the end marker.
            lengths = torch.tensor([len(words) for words in batch], device=chosen.device)
            inside = (torch.arange(chosen.shape[2], device=chosen.device) < lengths[:, None])[..., None]
            sums = torch.where(inside, chosen, 0.0).sum(dim=2)
            means = self._array(sums / lengths.clamp_min(1)[:, None])
            return [means[:, row] for row in range(len(batch))], after
        vectors = self._array(chosen)
        return [vectors[:, row, : len(words)] for row, words in enumerate(batch)], after

    def _array(self, values: Tensor) -> np.ndarray:
        return values.to(torch.float16 if self.job.dtype == "float16" else torch.float32).cpu().numpy()


def check_layers(job: EmbedJob, source: Source) -> None:
    """Raise ConfigError if the factors are not as many as the model's layers, or its layers have several sizes."""
    if job.output in _OF_LAYERS:
        layer_factors(job.layers, source.config, "embed.layers")


def _windows(sentences: Iterator[list[str]], most: int) -> Iterator[list[list[str]]]:
    while True:
        window: list[list[str]] = []
        positions = 0
        for words in sentences:
            window.append(words)
            positions += len(words) + 2
            if positions >= most:
                break
        if not window:
            return
        yield window


class EmbedTask:
    """Function for any process that makes the units of a job; the model is opened there at the first unit."""

    def __init__(self, job: EmbedJob):
        self.job = job
        self.worker: EmbedWorker | None = None

    def __call__(self, unit: Unit) -> dict[str, Any]:
        """Return the result of `EmbedWorker.make`; raises the same errors."""
        if self.worker is None:
            self.worker = EmbedWorker(self.job)
        return self.worker.make(unit)
