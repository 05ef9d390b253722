"""Two further ways to use the biLM, by the names that AllenNLP gave them.

`ElmoEmbedder` turns tokenised sentences into arrays, without a task's model; `ElmoTokenEmbedder` is a module that gives
a task's model one representation of each word.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from elmo_ray.elmo.bilm import ElmoBiLm, Path, Precision
from elmo_ray.elmo.layer import Elmo, batch_to_ids
from elmo_ray.errors import ConfigError

_PUBLISHED = (
    "https://allennlp.s3.amazonaws.com/models/elmo/2x4096_512_2048cnn_2xhighway/elmo_2x4096_512_2048cnn_2xhighway_"
)
DEFAULT_OPTIONS_FILE, DEFAULT_WEIGHT_FILE = f"{_PUBLISHED}options.json", f"{_PUBLISHED}weights.hdf5"


class ElmoEmbedder:
    """Embedder of tokenised sentences with a published pair of files, each a path or a URL.

    cuda_device: the number of a GPU, or -1 for the CPU. State is carried from batch to batch as in `Elmo`;
    stateful=False begins every sentence at zero, so that its vectors do not depend on the sentences before.
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
        """Return [B, layers, T, dim] without sentence markers, 0 for padding, and the mask [B, T]."""
        output: dict[str, Any] = self.elmo_bilm(batch_to_ids(batch, self.elmo_bilm.max_characters))
        mask = output["mask"][:, 2:]
        layers = [torch.where(mask[..., None], layer[:, 1:-1], 0.0) for layer in output["activations"]]
        return torch.stack(layers, dim=1), mask

    def embed_sentence(self, sentence: Sequence[str]) -> NDArray[np.float32]:
        """Return [layers, words, dim] of one tokenised sentence."""
        return self.embed_batch([sentence])[0]

    def embed_batch(self, batch: Sequence[Sequence[str]]) -> list[NDArray[np.float32]]:
        """Return [layers, words, dim] of each sentence.

        A sentence without words has a row of state like any other; a batch of nothing but one such sentence is not
        computed, as in AllenNLP.
        """
        if all(not sentence for sentence in batch) and len(batch) < 2:
            return [np.zeros((self.layers, 0, self.elmo_bilm.get_output_dim()), np.float32) for _ in batch]
        embeddings, _ = self.batch_to_embeddings(batch)
        arrays = embeddings.float().cpu().numpy()
        return [row[:, : len(words)].copy() for row, words in zip(arrays, batch, strict=True)]

    def embed_sentences(
        self, sentences: Iterable[Sequence[str]], batch_size: int = 64
    ) -> Iterator[NDArray[np.float32]]:
        """Yield the arrays of `embed_batch` for any number of sentences, in their order.

        Raises ConfigError for a batch_size below 1.
        """
        if batch_size < 1:
            raise ConfigError(f"batch_size={batch_size}: must be 1 or more")
        waiting = iter(sentences)
        while batch := list(itertools.islice(waiting, batch_size)):
            yield from self.embed_batch(batch)


class ElmoTokenEmbedder(nn.Module):
    """`Elmo` with one mixture, and a linear layer to `projection_dim` if given. Other arguments as in `Elmo`."""

    def __init__(
        self,
        options_file: Path = DEFAULT_OPTIONS_FILE,
        weight_file: Path = DEFAULT_WEIGHT_FILE,
        do_layer_norm: bool = False,
        dropout: float = 0.5,
        requires_grad: bool = False,
        projection_dim: int | None = None,
        vocab_to_cache: Sequence[str] | None = None,
        scalar_mix_parameters: Sequence[float] | None = None,
        **settings: Any,
    ):
        super().__init__()
        self._elmo = Elmo(
            options_file,
            weight_file,
            1,
            requires_grad=requires_grad,
            do_layer_norm=do_layer_norm,
            dropout=dropout,
            vocab_to_cache=vocab_to_cache,
            scalar_mix_parameters=scalar_mix_parameters,
            **settings,
        )
        self.output_dim = projection_dim or self._elmo.get_output_dim()
        self._projection = nn.Linear(self._elmo.get_output_dim(), projection_dim) if projection_dim else None

    def get_output_dim(self) -> int:
        """Return the size of a word's vector."""
        return self.output_dim

    def forward(self, elmo_tokens: Tensor, word_inputs: Tensor | None = None) -> Tensor:
        """Return [B, T, get_output_dim()]; arguments as for `Elmo`."""
        representation: Tensor = self._elmo(elmo_tokens, word_inputs)["elmo_representations"][0]
        return representation if self._projection is None else self._projection(representation)
