"""The char CNN as it is now, on a CPU and without gradients: what depends on its parameters alone is computed once.

A window's product with the filters is a sum of one row for each of its characters, and there are but a few hundred
characters for each place in a window: rows of a table are added instead, in a quarter of the time. Shapes: U words, C
characters, N columns that a group of words has, E embedding, F filters, P output.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from elmo_ray.kernels.matmul import FusedProduct, apply, fused_product
from elmo_ray.kernels.threads import run_parallel

_MOST_BYTES = 1 << 28
_TILE, _ROWS = 128, 32
"""Most words of a product, and what their number is a multiple of, so that there are few kinds of products."""


class FixedCharCnn:
    """The char CNN with its parameters as they are now.

    embedding: [characters, E]; filters: [F, E, width] each; highways: carry weight, carry bias, transform weight and
    transform bias of each; projection: weight [F, P] and bias, or None. full: columns of whole words. dtype: of the
    highways' and the projection's products; None: the parameters'.
    """

    @staticmethod
    def serves(embedding: Tensor, filters: Sequence[Tensor]) -> bool:
        """Return whether the tables are of a sensible size."""
        count, widest = sum(map(len, filters)), max(weight.shape[2] for weight in filters)
        return 2 * widest * len(embedding) * count * embedding.element_size() <= _MOST_BYTES

    @torch.no_grad()
    def __init__(
        self,
        embedding: Tensor,
        filters: Sequence[Tensor],
        biases: Sequence[Tensor],
        highways: Sequence[Sequence[Tensor]],
        projection: Sequence[Tensor] | None,
        activation: str,
        full: int,
        dtype: torch.dtype | None = None,
    ):
        self._characters, self._activation, self._full = len(embedding), activation, full
        self._widths, self._counts = [w.shape[2] for w in filters], [len(w) for w in filters]
        self.low = embedding.dtype if dtype is None else dtype
        # [width * characters, F]: what each character gives to each filter in each of a window's places
        self._narrow = [torch.einsum("ce,few->wcf", embedding, w).flatten(0, 1).contiguous() for w in filters]
        missing = [max(self._widths) * self._characters - len(table) for table in self._narrow]
        self._joint = torch.cat([F.pad(t, (0, 0, 0, n)) for t, n in zip(self._narrow, missing, strict=True)], dim=1)
        self._bias = torch.cat(list(biases))
        self._highways = [
            (self._product(carry, carry_bias, "sigmoid"), self._product(transform, transform_bias, "relu"))
            for carry, carry_bias, transform, transform_bias in highways
        ]
        self._projection = None if projection is None else self._product(projection[0], projection[1], "none")
        self._width = self._bias.numel() if projection is None else projection[0].shape[1]

    def _product(self, weight: Tensor, bias: Tensor, activation: str) -> FusedProduct:
        return fused_product(weight.t().to(self.low), bias, activation, _TILE)  # type: ignore[arg-type]

    @torch.no_grad()
    def encode(self, types_UC: NDArray[np.int16], classes: tuple[tuple[int, int], ...]) -> Tensor:
        """Return [U, P] vectors of words; arguments as of `CharCnn.forward`."""
        columns_U = np.repeat([columns for _, columns in classes], [count for count, _ in classes])
        result = self._joint.new_empty(len(types_UC), self._width)

        def run(branch: int) -> None:
            # every other word, so that the halves have words of the same lengths
            for first in range(branch, len(types_UC), 2 * _TILE):
                some = slice(first, first + 2 * _TILE, 2)
                result[some] = self._encode(types_UC[some], columns_U[some])

        run_parallel(run, 2, result.device)
        return result

    def _encode(self, types_UC: NDArray[np.int16], columns_U: NDArray[np.int64]) -> Tensor:
        n = len(types_UC)
        x = self._bias.new_zeros(-(-n // _ROWS) * _ROWS, len(self._bias))
        for columns in np.unique(columns_U).tolist():
            first, stop = np.searchsorted(columns_U, [columns, columns + 1])
            self._convolve(types_UC[first:stop, :columns], x[first:stop])
        x += self._bias
        x = x.relu_() if self._activation == "relu" else x.tanh_()
        for carry, transform in self._highways:
            low = x.to(self.low)
            x = torch.lerp(x, apply(transform, low).to(x.dtype), apply(carry, low).to(x.dtype))
        if self._projection is not None:
            x = apply(self._projection, x.to(self.low))
        return x[:n]

    def _convolve(self, types_UN: NDArray[np.int16], out_UF: Tensor) -> None:
        """Fill the maxima over the windows; words with padding to spare need no more than the widest filter's."""
        if types_UN.shape[1] < self._full:
            self._largest(types_UN, max(self._widths), self._joint, out_UF)
            return
        for width, table, out in zip(self._widths, self._narrow, out_UF.split(self._counts, dim=1), strict=True):
            self._largest(types_UN, width, table, out)

    def _largest(self, types_UN: NDArray[np.int16], width: int, table: Tensor, out_UF: Tensor) -> None:
        windows_UMW = np.lib.stride_tricks.sliding_window_view(types_UN, width, axis=1)
        u, m, _ = windows_UMW.shape
        rows = np.arange(width, dtype=np.int32) * self._characters + windows_UMW
        sums = F.embedding_bag(torch.from_numpy(rows.reshape(u * m, width)), table, mode="sum")
        torch.amax(sums.view(u, m, -1), dim=1, out=out_UF)
