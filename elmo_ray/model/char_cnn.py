"""Word inputs: the character CNN with highways and projection, and the word-id embedding. U words, C characters, P
output."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elmo_ray.config.model import CharCnnConfig
from elmo_ray.data.characters import N_CHARACTERS
from elmo_ray.kernels.cpu.char_cnn import CpuHighway, LargestProducts
from elmo_ray.kernels.cpu.loops import for_tensor
from elmo_ray.kernels.threads import Parted, has_threads_for

CARRY_BIAS = -2.0

_WORTH_PARTING = 64
"""Words: fewer are not computed in halves."""


Weights = Mapping[str, Tensor]
"""A CharCnn's parameters by their names, or what stands for them."""


class Highway(nn.Module):
    """y = g * relu(x Wt + bt) + (1 - g) * x with g = sigmoid(x Wc + bc); relu whatever the CNN uses (BILM.md,
    Model)."""

    def __init__(self, dim: int):
        super().__init__()
        self.carry_weight = nn.Parameter(torch.empty(dim, dim))
        self.carry_bias = nn.Parameter(torch.empty(dim))
        self.transform_weight = nn.Parameter(torch.empty(dim, dim))
        self.transform_bias = nn.Parameter(torch.empty(dim))

    def reset_parameters(self, generator: torch.Generator) -> None:
        with torch.no_grad():
            for weight in (self.carry_weight, self.transform_weight):
                weight.normal_(0.0, math.sqrt(1.0 / weight.shape[0]), generator=generator)
            self.carry_bias.fill_(CARRY_BIAS)
            self.transform_bias.zero_()


def _highway(x_UF: Tensor, weights: Weights, name: str, dtype: torch.dtype | None) -> Tensor:
    if for_tensor(x_UF):
        parts = (
            weights[f"{name}.{part}"] for part in ("carry_weight", "carry_bias", "transform_weight", "transform_bias")
        )
        y_UF: Tensor = CpuHighway.apply(x_UF, *parts, dtype)
        return y_UF
    # one product for both: a big one is faster, and the gradient of x comes from it without a sum
    both_weights, both_biases = (
        torch.cat([weights[f"{name}.carry_{kind}"], weights[f"{name}.transform_{kind}"]], dim=-1)
        for kind in ("weight", "bias")
    )
    carry, transform = _affine(x_UF, both_weights, both_biases, dtype).chunk(2, dim=1)
    return torch.lerp(x_UF, torch.relu(transform), torch.sigmoid(carry))


class CharCnn(nn.Module):
    """Characters of words to vectors: embedding, convolutions with maximum over positions, highways, projection.

    Filters are stored as [count, embedding_dim, width]. The projection exists only where the filters' sum is not P.
    Nothing is masked: padding has a learned vector and takes part, as in bilm-tf.
    """

    def __init__(self, config: CharCnnConfig, output_dim: int):
        super().__init__()
        self.config = config
        n_filters = sum(count for _, count in config.filters)
        self.embedding = nn.Parameter(torch.empty(N_CHARACTERS, config.embedding_dim))
        self.filters = nn.ParameterList(
            torch.empty(count, config.embedding_dim, width) for width, count in config.filters
        )
        self.filter_biases = nn.ParameterList(torch.empty(count) for _, count in config.filters)
        self.highways = nn.ModuleList(Highway(n_filters) for _ in range(config.n_highway))
        has_projection = n_filters != output_dim
        self.projection_weight = nn.Parameter(torch.empty(n_filters, output_dim)) if has_projection else None
        self.projection_bias = nn.Parameter(torch.empty(output_dim)) if has_projection else None

    @property
    def widest(self) -> int:
        return max(width for width, _ in self.config.filters)

    def reset_parameters(self, generator: torch.Generator) -> None:
        """Initial values as the original's (BILM.md, Model, Initial values)."""
        with torch.no_grad():
            self.embedding.uniform_(-1.0, 1.0, generator=generator)
            for weight, bias in zip(self.filters, self.filter_biases, strict=True):
                if self.config.activation == "relu":
                    weight.uniform_(-0.05, 0.05, generator=generator)
                else:
                    variance = 1.0 / (weight.shape[2] * self.config.embedding_dim)
                    weight.normal_(0.0, math.sqrt(variance), generator=generator)
                bias.zero_()
            for highway in self.highways:
                highway.reset_parameters(generator)  # type: ignore[operator]
            if self.projection_weight is not None and self.projection_bias is not None:
                fan_in = self.projection_weight.shape[0]
                self.projection_weight.normal_(0.0, math.sqrt(1.0 / fan_in), generator=generator)
                self.projection_bias.zero_()

    def forward(
        self, types_UC: Tensor, classes: tuple[tuple[int, int], ...] | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """[U, P] vectors of words.

        types_UC: character ids. classes: (words, columns) of consecutive groups whose words fit into fewer columns, see
        `word_types.TypeTable`; None takes all columns for all words. dtype: of the products; results are in the
        weights'.
        """
        if classes is None:
            classes = ((types_UC.shape[0], types_UC.shape[1]),)
        if types_UC.device.type != "cpu" or len(types_UC) < _WORTH_PARTING or not has_threads_for(2):
            return self._encode(types_UC, classes, dtype, dict(self.named_parameters()))
        return self._in_halves(types_UC, classes, dtype)

    def _in_halves(self, types_UC: Tensor, classes: tuple[tuple[int, int], ...], dtype: torch.dtype | None) -> Tensor:
        """Half of each class, and the other half, side by side."""
        halves: list[list[Tensor]] = [[], []]
        for words, (count, _) in zip(types_UC.split([count for count, _ in classes]), classes, strict=True):
            for half, some in zip(halves, words.split([count // 2, count - count // 2]), strict=True):
                half.append(some)
        sizes = [[len(words) for words in half] for half in halves]

        names = [name for name, _ in self.named_parameters()]

        def encode(part: int, parameters: Sequence[Tensor]) -> Tensor:
            own = tuple((size, columns) for size, (_, columns) in zip(sizes[part], classes, strict=True) if size)
            return self._encode(torch.cat(halves[part]), own, dtype, dict(zip(names, parameters, strict=True)))

        found = Parted.apply(encode, 2, len(names), None, *self.parameters())
        parts = [result.split(size) for result, size in zip(found, sizes, strict=True)]
        return torch.cat([some for pair in zip(*parts, strict=True) for some in pair])

    def _encode(
        self, types_UC: Tensor, classes: tuple[tuple[int, int], ...], dtype: torch.dtype | None, weights: Weights
    ) -> Tensor:
        groups = types_UC.split([count for count, _ in classes])
        x = self._convolve(
            [words[:, :columns] for words, (_, columns) in zip(groups, classes, strict=True)], dtype, weights
        )
        for number in range(len(self.highways)):
            x = _highway(x, weights, f"highways.{number}", dtype)
        if self.projection_weight is not None:
            x = _affine(x, weights["projection_weight"], weights["projection_bias"], dtype)
        return x

    def _convolve(self, groups: Sequence[Tensor], dtype: torch.dtype | None, weights: Weights) -> Tensor:
        """[U, F] of words in groups [., N], each with its own number of characters."""
        numbers, embedding = range(len(self.filters)), weights["embedding"]
        filters = [weights[f"filters.{number}"] for number in numbers]
        # Words that leave `widest` columns of padding: the windows that begin at their ids and the first of padding
        # alone hold every filter's maximum, so one product serves all filters, the narrow ones padded with zeros.
        narrow = [words for words in groups if words.shape[1] < self.config.max_characters]
        found: list[Tensor] = []
        if narrow:
            weight = torch.cat([F.pad(w, (0, self.widest - w.shape[2])) for w in filters])
            found = _windows(narrow, self.widest, embedding, weight, dtype)
        of_narrow = iter(found)
        results = [
            next(of_narrow)
            if words.shape[1] < self.config.max_characters
            else torch.cat([_windows([words], w.shape[2], embedding, w, dtype)[0] for w in filters], dim=1)
            for words in groups
        ]
        x = results[0] if len(results) == 1 else torch.cat(results)
        # bias and activation are monotone, so they may come after the maximum, on far fewer numbers
        x = x + torch.cat([weights[f"filter_biases.{number}"] for number in numbers])
        return torch.relu(x) if self.config.activation == "relu" else torch.tanh(x)


def _windows(
    groups: Sequence[Tensor], width: int, embedding: Tensor, weight_FEW: Tensor, dtype: torch.dtype | None
) -> list[Tensor]:
    """Of each group [U, F], the maximum over all windows of `width` characters of their products with the filters."""
    weight = weight_FEW.permute(2, 1, 0).reshape(-1, weight_FEW.shape[0])
    if for_tensor(embedding):
        together: Tensor = LargestProducts.apply(embedding, weight, width, dtype, *groups)
        return list(together.split([len(words) for words in groups]))
    low = embedding.dtype if dtype is None else dtype
    embedding_low, weight_low, found = embedding.to(low), weight.to(low), []
    for types_UN in groups:
        windows_UMW = types_UN.int().unfold(1, width, 1)
        u, m, _ = windows_UMW.shape
        x = F.embedding(windows_UMW, embedding_low).view(u * m, width * embedding.shape[1])
        product_UMF = torch.mm(x, weight_low).view(u, m, -1)
        found.append(product_UMF.max(dim=1).values.to(embedding.dtype))
    return found


def _affine(x: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype | None) -> Tensor:
    if dtype is None:
        return torch.addmm(bias, x, weight)
    return torch.mm(x.to(dtype), weight.to(dtype)).to(x.dtype) + bias
