"""Tokenised sentences to arrays, without a task's model: what AllenNLP's `ElmoEmbedder` was."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from elmo_ray.elmo import batch_to_ids
from elmo_ray.elmo_bilm import ElmoBiLm, Path, Precision

_PUBLISHED = (
    "https://allennlp.s3.amazonaws.com/models/elmo/2x4096_512_2048cnn_2xhighway/elmo_2x4096_512_2048cnn_2xhighway_"
)
DEFAULT_OPTIONS_FILE, DEFAULT_WEIGHT_FILE = f"{_PUBLISHED}options.json", f"{_PUBLISHED}weights.hdf5"


class ElmoEmbedder:
    """Embeds sentences with a published pair of files, each a path or a URL.

    cuda_device: a GPU's number, -1 for the CPU. State is carried from batch to batch as in `Elmo`; stateful=False
    begins every sentence at zero, so that its vectors do not depend on what came before.
    """

    def __init__(
        self,
        options_file: Path = DEFAULT_OPTIONS_FILE,
        weight_file: Path = DEFAULT_WEIGHT_FILE,
        cuda_device: int = -1,
        *,
        stateful: bool = True,
        precision: Precision = "fp32",
    ):
        self.elmo_bilm = ElmoBiLm(options_file, weight_file, stateful=stateful, precision=precision)
        if cuda_device >= 0:
            self.elmo_bilm = self.elmo_bilm.cuda(cuda_device)
        self.cuda_device = cuda_device

    @property
    def layers(self) -> int:
        return self.elmo_bilm.num_layers

    def reset_states(self) -> None:
        """Forget the carried state."""
        self.elmo_bilm.reset_states()

    @torch.no_grad()
    def batch_to_embeddings(self, batch: Sequence[Sequence[str]]) -> tuple[Tensor, Tensor]:
        """[B, layers, T, dim] without sentence markers, 0 for padding, and the mask [B, T]."""
        output: dict[str, Any] = self.elmo_bilm(batch_to_ids(batch, self.elmo_bilm.max_characters))
        mask = output["mask"][:, 2:]
        layers = [torch.where(mask[..., None], layer[:, 1:-1], 0.0) for layer in output["activations"]]
        return torch.stack(layers, dim=1), mask

    def embed_sentence(self, sentence: Sequence[str]) -> NDArray[np.float32]:
        """[layers, words, dim] of one tokenised sentence."""
        return self.embed_batch([sentence])[0]

    def embed_batch(self, batch: Sequence[Sequence[str]]) -> list[NDArray[np.float32]]:
        """[layers, words, dim] of each sentence. One without words has a row of state like any other, but alone it is
        not computed, as in AllenNLP."""
        if all(not sentence for sentence in batch) and len(batch) < 2:
            return [np.zeros((self.layers, 0, self.elmo_bilm.get_output_dim()), np.float32) for _ in batch]
        embeddings, _ = self.batch_to_embeddings(batch)
        arrays = embeddings.float().cpu().numpy()
        return [row[:, : len(words)].copy() for row, words in zip(arrays, batch, strict=True)]

    def embed_sentences(
        self, sentences: Iterable[Sequence[str]], batch_size: int = 64
    ) -> Iterator[NDArray[np.float32]]:
        """`embed_batch` of any number of sentences, in their order."""
        waiting = iter(sentences)
        while batch := list(itertools.islice(waiting, batch_size)):
            yield from self.embed_batch(batch)
