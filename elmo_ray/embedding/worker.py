"""What one worker does: it holds the model and makes unit after unit. Needs no Ray; `embed` puts it in an actor."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from elmo_ray.embedding.job import EmbedJob
from elmo_ray.embedding.parts import Row, part_writer
from elmo_ray.embedding.texts import Unit, read_sentences
from elmo_ray.errors import ConfigError, DataError
from elmo_ray.language_model import LanguageModel
from elmo_ray.model.lstm import LstmState
from elmo_ray.model.sentence_encoder import SentenceEncoder
from elmo_ray.model.sentence_words import encode_sentences
from elmo_ray.source import Source, open_source

_WINDOW_WORDS = 1 << 14
"""Words that are read before their sentences are sorted by length, and written together."""


class EmbedWorker:
    """The model of a job on its device. A unit's result depends on the unit alone and not on the ones before."""

    def __init__(self, job: EmbedJob, source: Source | None = None):
        """source: the opened model, where this process has it already. Raises ElmoRayErrors as `open_source`."""
        self.job = job
        if job.threads is not None:
            torch.set_num_threads(job.threads)
        if source is None:
            source = open_source(job.source, job.checkpoint, job.options, job.vocab, verify=False)
        self.vocabulary = source.words
        self.model = source.model.to(job.device)
        self.language_model = (
            LanguageModel(self.model, source.vocabulary) if job.output in ("substitutes", "surprisal") else None
        )
        self._weights = _layer_weights(job.layers, source.config.lstm.n_layers + 1)

    def make(self, unit: Unit) -> dict[str, Any]:
        """Writes a unit's part; its number, words and seconds. Raises DataError for text that cannot be read."""
        start = time.monotonic()
        # The vectors of words that an earlier unit had would come from products of another size, with other last bits.
        self.encoder = SentenceEncoder(self.model, torch.bfloat16 if self.job.precision == "bf16" else None)
        words = done = 0
        with part_writer(self.job, unit) as writer:
            for sentences, rows in self._rows(read_sentences(unit, self.job.column, self.job.on_error)):
                writer.write(unit.first + done, sentences, rows)
                words += sum(map(len, sentences))
                done += len(rows)
            if done != unit.count:
                raise DataError(f"{unit.path}: has changed since it was counted; embed it anew with --fresh")
        return {"unit": unit.number, "words": words, "seconds": time.monotonic() - start}

    def _rows(self, sentences: Iterator[list[str]]) -> Iterator[tuple[list[list[str]], list[Row]]]:
        state = None
        for window in _windows(sentences):
            rows: list[Row] = [np.zeros(0)] * len(window)
            if self.job.carry:
                for number, words in enumerate(window):
                    (rows[number],), state = self._batch([words], state)
            else:
                for numbers in _batches(window, self.job.batch_positions):
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
        chosen = self._chosen(layers)[:, :, 1:-1]
        if self.job.output == "means":
            # positions after a sentence's words are not all zero: its end marker is one of them
            lengths = torch.tensor([len(words) for words in batch], device=chosen.device)
            inside = (torch.arange(chosen.shape[2], device=chosen.device) < lengths[:, None])[..., None]
            sums = torch.where(inside, chosen, 0.0).sum(dim=2)
            means = self._array(sums / lengths.clamp_min(1)[:, None])
            return [means[:, row] for row in range(len(batch))], after
        vectors = self._array(chosen)
        return [vectors[:, row, : len(words)] for row, words in enumerate(batch)], after

    def _chosen(self, layers: Sequence[Tensor]) -> Tensor:
        """[L, B, T, D] all layers, or one that they make."""
        if self._weights is None:
            return torch.stack(list(layers))
        mixed = torch.zeros_like(layers[0])
        for weight, layer in zip(self._weights, layers, strict=True):
            if weight:
                mixed = mixed + weight * layer
        return mixed[None]

    def _array(self, values: Tensor) -> np.ndarray:
        return values.to(torch.float16 if self.job.dtype == "float16" else torch.float32).cpu().numpy()


def _layer_weights(layers: tuple[float, ...] | str, count: int) -> list[float] | None:
    if layers == "all":
        return None
    if layers == "top":
        return [0.0] * (count - 1) + [1.0]
    if layers == "average":
        return [1 / count] * count
    if len(layers) != count:
        raise ConfigError(f"embed.layers={list(layers)}: the model has {count} layers, the word vectors included")
    return [float(weight) for weight in layers]


def check_layers(job: EmbedJob, source: Source) -> None:
    """Raises ConfigError for factors that are not as many as the model's layers."""
    _layer_weights(job.layers, source.config.lstm.n_layers + 1)


def _windows(sentences: Iterator[list[str]]) -> Iterator[list[list[str]]]:
    while True:
        window: list[list[str]] = []
        positions = 0
        for words in sentences:
            window.append(words)
            positions += len(words) + 2
            if positions >= _WINDOW_WORDS:
                break
        if not window:
            return
        yield window


def _batches(window: Sequence[Sequence[str]], most: int) -> Iterator[list[int]]:
    """Numbers of sentences of like length, longest first, `most` positions with padding at a time; one at least."""
    order = sorted(range(len(window)), key=lambda number: -len(window[number]))
    waiting = iter(order)
    for number in waiting:
        rows = max(1, most // (len(window[number]) + 2))
        yield [number, *itertools.islice(waiting, rows - 1)]
