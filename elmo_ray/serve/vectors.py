"""The model of a replica: the vectors of several requests, computed together.

Shapes: B sentences, T positions with the markers, L layers, D dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from elmo_ray.checkpoints.source import open_source
from elmo_ray.elmo.encoder import SentenceEncoder, encode_sentences
from elmo_ray.elmo.layer_choice import batches_by_length, choose_layers
from elmo_ray.errors import ConfigError
from elmo_ray.serve.config import ServeOptions
from elmo_ray.serve.messages import Wanted


@dataclass(frozen=True)
class ServeJob:
    """Description of the model for a replica, on any machine that sees the source.

    source, checkpoint, options, vocab: as for `open_source`, with absolute paths. fingerprint: that of a checkpoint's
    weights, or None. device: torch's name. threads: the number of torch's threads, None for a share of the machine's
    cores. share: the largest number of replicas on a machine.
    """

    source: str
    checkpoint: str
    options: str | None
    vocab: str | None
    fingerprint: str | None
    device: str
    threads: int | None
    share: int
    serve: ServeOptions


class ServedModel:
    """Model on its device that gives vectors of sentences. Every sentence begins with zero state."""

    def __init__(self, job: ServeJob):
        """Open the model. Raises the errors of `open_source`, and ConfigError if it is not the one of the start."""
        source = open_source(job.source, job.checkpoint, job.options, job.vocab, verify=False)
        if source.fingerprint != job.fingerprint:
            raise ConfigError(f"{job.source}: has another model than at the start of serve; start serve again")
        self.config, self.vocabulary, self.title = source.config, source.words, source.describe()
        self._positions = job.serve.batch_positions
        self._encoder = SentenceEncoder(
            source.model.to(job.device), torch.bfloat16 if job.serve.precision == "bf16" else None
        )

    @torch.no_grad()
    def vectors(self, requests: Sequence[Wanted]) -> list[list[NDArray[np.float32]]]:
        """Return for each request the vectors [L, words, D] of its sentences, with L = 1 for a sum of layers."""
        sentences = [words for request in requests for words in request.sentences]
        factors = [request.factors for request in requests for _ in request.sentences]
        found: list[NDArray[np.float32]] = [np.zeros(0, np.float32)] * len(sentences)
        for numbers in batches_by_length(sentences, self._positions):
            batch = encode_sentences(self._encoder, self.vocabulary, [sentences[number] for number in numbers])
            layers, _ = self._encoder.layers(*batch)
            for choice in {factors[number] for number in numbers}:
                chosen = choose_layers(layers, choice)[:, :, 1:-1].float().cpu().numpy()
                for row, number in enumerate(numbers):
                    if factors[number] == choice:
                        found[number] = chosen[:, row, : len(sentences[number])]
        rest = iter(found)
        return [[next(rest) for _ in request.sentences] for request in requests]
