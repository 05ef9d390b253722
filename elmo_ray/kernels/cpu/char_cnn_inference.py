"""The char CNN as it is now, on a CPU and without gradients: what depends on its parameters alone is worked out once.

A window's product with the filters is a sum of one row for each of its characters, and there are but a few hundred
characters for each place in a window: rows of a table are added instead, a quarter of the time. Shapes: U words, C
characters, W widest filter, F filters, P output.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from elmo_ray.data.characters import N_CHARACTERS
from elmo_ray.kernels.matmul import FusedProduct, apply, fused_product
from elmo_ray.kernels.threads import side_by_side
from elmo_ray.model.char_cnn import CharCnn, Highway

_MOST_BYTES = 1 << 28
_TILE, _ROWS = 128, 32
"""Most words of a product, and what their number is a multiple of, so that there are few kinds of products."""


class FixedCharCnn:
    """dtype: of the highways' and the projection's products; None: the parameters'."""

    @staticmethod
    def serves(cnn: CharCnn) -> bool:
        """Whether the tables are of a sensible size."""
        count = sum(count for _, count in cnn.config.filters)
        return 2 * cnn.widest * N_CHARACTERS * count * cnn.embedding.element_size() <= _MOST_BYTES

    @torch.no_grad()
    def __init__(self, cnn: CharCnn, dtype: torch.dtype | None = None):
        self.config, self.widest = cnn.config, cnn.widest
        self.low = cnn.embedding.dtype if dtype is None else dtype
        # [width * N_CHARACTERS, count]: what each character gives to each filter in each of a window's places
        self._narrow = [
            torch.einsum("ce,few->wcf", cnn.embedding, filters).flatten(0, 1).contiguous() for filters in cnn.filters
        ]
        missing = [self.widest * N_CHARACTERS - len(table) for table in self._narrow]
        self._joint = torch.cat([F.pad(t, (0, 0, 0, n)) for t, n in zip(self._narrow, missing, strict=True)], dim=1)
        self._bias = torch.cat(list(cnn.filter_biases))
        self._highways = [self._highway(highway) for highway in cnn.highways]  # type: ignore[arg-type]
        self._projection = None
        if cnn.projection_weight is not None:
            weight_PF = cnn.projection_weight.t().to(self.low)
            self._projection = fused_product(weight_PF, cnn.projection_bias, "none", _TILE)
        self._width = self._bias.numel() if cnn.projection_weight is None else cnn.projection_weight.shape[1]

    def _highway(self, highway: Highway) -> tuple[FusedProduct, FusedProduct]:
        return (
            fused_product(highway.carry_weight.t().to(self.low), highway.carry_bias, "sigmoid", _TILE),
            fused_product(highway.transform_weight.t().to(self.low), highway.transform_bias, "relu", _TILE),
        )

    @torch.no_grad()
    def encode(self, types_UC: NDArray[np.int16], classes: tuple[tuple[int, int], ...]) -> Tensor:
        """[U, P] vectors of words; arguments as of `CharCnn.forward`."""
        columns_U = np.repeat([columns for _, columns in classes], [count for count, _ in classes])
        result = self._joint.new_empty(len(types_UC), self._width)

        def run(part: int) -> None:
            # every other word, so that the halves have words of the same lengths
            for first in range(part, len(types_UC), 2 * _TILE):
                some = slice(first, first + 2 * _TILE, 2)
                result[some] = self._encode(types_UC[some], columns_U[some])

        side_by_side(run, 2, result.device)
        return result

    def _encode(self, types_UC: NDArray[np.int16], columns_U: NDArray[np.int64]) -> Tensor:
        n = len(types_UC)
        x = self._bias.new_zeros(-(-n // _ROWS) * _ROWS, len(self._bias))
        for columns in np.unique(columns_U).tolist():
            first, stop = np.searchsorted(columns_U, [columns, columns + 1])
            self._convolve(types_UC[first:stop, :columns], x[first:stop])
        x += self._bias
        x = x.relu_() if self.config.activation == "relu" else x.tanh_()
        for carry, transform in self._highways:
            low = x.to(self.low)
            x = torch.lerp(x, apply(transform, low).to(x.dtype), apply(carry, low).to(x.dtype))
        if self._projection is not None:
            x = apply(self._projection, x.to(self.low))
        return x[:n]

    def _convolve(self, types_UN: NDArray[np.int16], out_UF: Tensor) -> None:
        """Fills the maxima over the windows, see `CharCnn._convolve`."""
        if types_UN.shape[1] < self.config.max_characters:
            _largest(types_UN, self.widest, self._joint, out_UF)
            return
        outs = out_UF.split([count for _, count in self.config.filters], dim=1)
        for (width, _), table, out in zip(self.config.filters, self._narrow, outs, strict=True):
            _largest(types_UN, width, table, out)


def _largest(types_UN: NDArray[np.int16], width: int, table: Tensor, out_UF: Tensor) -> None:
    windows_UMW = np.lib.stride_tricks.sliding_window_view(types_UN, width, axis=1)
    u, m, _ = windows_UMW.shape
    rows = np.arange(width, dtype=np.int32) * N_CHARACTERS + windows_UMW
    sums = F.embedding_bag(torch.from_numpy(rows.reshape(u * m, width)), table, mode="sum")
    torch.amax(sums.view(u, m, -1), dim=1, out=out_UF)
