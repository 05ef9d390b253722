"""A cache of word vectors, which computes the vector of each word once.

Shapes: U words of a batch, C characters, P projection.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from elmo_ray import kernels
from elmo_ray.model.bilm import BiLM

_MAX_BYTES = 1 << 30


class WordCache:
    """Vectors of words for a model whose parameters do not change.

    The keys are the characters of words, so known and unknown words are treated alike. Only new words go through the
    char CNN. When the cache is full, all vectors are dropped. With word input nothing is kept. max_bytes: the limit of
    the vectors, exceeded only if the words of one batch need more. dtype: of the matrix products.
    """

    def __init__(self, model: BiLM, dtype: torch.dtype | None = None, max_bytes: int = _MAX_BYTES):
        self.model, self.dtype = model, dtype
        reference = next(model.parameters())
        width = model.config.word_dim
        self.device = reference.device
        self._max_rows = max(1, max_bytes // (width * reference.element_size()))
        self._rows: dict[bytes, int] = {}
        self._table = reference.detach().new_empty(0, width)
        self._fixed: Any = None
        if (cnn := model.char_cnn) is not None and (fixed := kernels.fixed_char_cnn(cnn.embedding, tuple(cnn.filters))):
            self._fixed = fixed(
                cnn.embedding,
                cnn.filters,
                cnn.filter_biases,
                [layer.weights for layer in cnn.highways],
                None if cnn.projection_weight is None else (cnn.projection_weight, cnn.projection_bias),
                cnn.config.activation,
                cnn.config.max_characters,
                dtype,
            )

    @torch.no_grad()
    def vectors(self, types: np.ndarray, classes: tuple[tuple[int, int], ...]) -> Tensor:
        """Return the [U, P] vectors of words.

        types: [U, C] character ids, sorted by length class as in `streams.Batch`, or [U] vocabulary ids for word input;
        a word may occur more than once. classes: the number of words and of columns of each class.
        """
        if self.model.char_cnn is None:
            return self.model.encode_types(torch.from_numpy(types).to(self.device))
        types_UC = np.ascontiguousarray(types)
        row_bytes = np.dtype((np.void, types_UC.shape[1] * types_UC.itemsize))
        keys: list[bytes] = types_UC.view(row_bytes).ravel().tolist()  # type: ignore[assignment]
        if len(self._rows) + len(keys) > self._max_rows:
            self._rows.clear()
        first = len(self._rows)
        new: list[int] = []
        for number, key in enumerate(keys):
            if key not in self._rows:
                self._rows[key] = first + len(new)
                new.append(number)
        if new:
            self._reserve(first, first + len(new))
            self._table[first : first + len(new)] = self._encode(types_UC, classes, new)
        return self._table[torch.tensor([self._rows[key] for key in keys]).to(self.device)]

    def _encode(self, types_UC: np.ndarray, classes: tuple[tuple[int, int], ...], chosen: list[int]) -> Tensor:
        # types are sorted by class, and so are the chosen ones
        ends = np.cumsum([count for count, _ in classes])
        counts = np.bincount(np.searchsorted(ends, chosen, side="right"), minlength=len(classes))
        kept = tuple((int(n), columns) for n, (_, columns) in zip(counts, classes, strict=True) if n)
        if self._fixed is not None:
            return self._fixed.encode(types_UC[chosen], kept)
        return self.model.encode_types(torch.from_numpy(types_UC[chosen]).to(self.device), kept, dtype=self.dtype)

    def _reserve(self, used: int, wanted: int) -> None:
        if wanted <= len(self._table):
            return
        table = self._table.new_empty(max(min(self._max_rows, 2 * len(self._table)), wanted), self._table.shape[1])
        table[:used] = self._table[:used]
        self._table = table
