"""The character CNN: characters of words to vectors, by convolutions, highways and a projection.

Shapes: U words, C characters of the longest word, N characters that a group of words is given with, E embedding, M
windows of W characters, K numbers of a window, F filters, P output.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elmo_ray import kernels
from elmo_ray.config.model import CharCnnConfig
from elmo_ray.data.characters import N_CHARACTERS
from elmo_ray.kernels.hints import WindowCounts
from elmo_ray.model.product import affine, product

CARRY_BIAS = -2.0


def highway(
    x_UF: Tensor,
    carry_weight: Tensor,
    carry_bias: Tensor,
    transform_weight: Tensor,
    transform_bias: Tensor,
    dtype: torch.dtype | None,
) -> Tensor:
    """Return g * relu(x Wt + bt) + (1 - g) * x with g = sigmoid(x Wc + bc); relu whatever the CNN uses (BILM.md)."""
    gate = torch.sigmoid(affine(x_UF, carry_weight, carry_bias, dtype))
    return gate * torch.relu(affine(x_UF, transform_weight, transform_bias, dtype)) + (1.0 - gate) * x_UF


class Highway(nn.Module):
    """A highway layer of F numbers."""

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

    @property
    def weights(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.carry_weight, self.carry_bias, self.transform_weight, self.transform_bias

    def forward(self, x_UF: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        run = kernels.highway(x_UF) or highway
        return run(x_UF, *self.weights, dtype)


def largest_windows(
    groups: Sequence[Tensor], embedding: Tensor, filters: Sequence[Tensor], full: int, dtype: torch.dtype | None
) -> Tensor:
    """Return [U, F]: of each word and filter the largest product over all windows of the word's characters.

    groups: [., N] character ids of words that have the same N; filters: [F, E, width] each. full: the number of
    columns of whole words, which kernels need to know. dtype: of the products. Nothing is masked: padding has a learned
    vector and takes part, as in bilm-tf.
    """
    found = []
    for words_UN in groups:
        x_UNE = F.embedding(words_UN.int(), embedding)
        largest = []
        for weight_FEW in filters:
            windows_UMK = x_UNE.unfold(1, weight_FEW.shape[2], 1).flatten(2)
            weight_KF = weight_FEW.flatten(1).t()
            products = product(windows_UMK, weight_KF if dtype is None else weight_KF.to(dtype))
            largest.append(products.max(dim=1).values)
        found.append(torch.cat(largest, dim=1))
    return torch.cat(found)


class CharCnn(nn.Module):
    """Embedding, convolutions with their maximum over positions, highways, and a projection to P.

    Filters are stored as [count, embedding_dim, width]. The projection exists only where the filters' sum is not P.
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
        """Characters of the widest filter."""
        return max(width for width, _ in self.config.filters)

    def reset_parameters(self, generator: torch.Generator) -> None:
        """Draw initial values as the original does (BILM.md, Model, Initial values)."""
        with torch.no_grad():
            self.embedding.uniform_(-1.0, 1.0, generator=generator)
            for weight, bias in zip(self.filters, self.filter_biases, strict=True):
                if self.config.activation == "relu":
                    weight.uniform_(-0.05, 0.05, generator=generator)
                else:
                    variance = 1.0 / (weight.shape[2] * self.config.embedding_dim)
                    weight.normal_(0.0, math.sqrt(variance), generator=generator)
                bias.zero_()
            for layer in self.highways:
                layer.reset_parameters(generator)  # type: ignore[operator]
            if self.projection_weight is not None and self.projection_bias is not None:
                fan_in = self.projection_weight.shape[0]
                self.projection_weight.normal_(0.0, math.sqrt(1.0 / fan_in), generator=generator)
                self.projection_bias.zero_()

    def forward(
        self,
        types_UC: Tensor,
        classes: tuple[tuple[int, int], ...] | None = None,
        dtype: torch.dtype | None = None,
        windows: WindowCounts | None = None,
    ) -> Tensor:
        """Return [U, P] vectors of words.

        types_UC: character ids. classes: (words, columns) of consecutive groups whose words fit into fewer columns, see
        `word_types.TypeTable`; None takes all columns for all words. dtype: of the products; results are in the
        weights'. windows: for kernels that would have to count them.
        """
        if classes is None:
            classes = ((types_UC.shape[0], types_UC.shape[1]),)
        filters, biases = tuple(self.filters), list(self.filter_biases)
        if at_once := kernels.word_features(self.embedding, filters):
            counts, capacity = windows or (None, self._most_windows(types_UC.shape[1], classes))
            bias = torch.cat(biases)
            x = at_once(types_UC, self.embedding, filters, bias, self.config.activation, dtype, counts, capacity)
        else:
            words = types_UC.split([count for count, _ in classes])
            groups = [some[:, :columns] for some, (_, columns) in zip(words, classes, strict=True)]
            run = kernels.largest_windows(self.embedding) or largest_windows
            x = run(groups, self.embedding, filters, self.config.max_characters, dtype)
            # bias and activation are monotone, so they may come after the maximum, on far fewer numbers
            x = x + torch.cat(biases)
            x = torch.relu(x) if self.config.activation == "relu" else torch.tanh(x)
        for layer in self.highways:
            x = layer(x, dtype)
        if self.projection_weight is None or self.projection_bias is None:
            return x
        return affine(x, self.projection_weight, self.projection_bias, dtype)

    def _most_windows(self, characters: int, classes: tuple[tuple[int, int], ...]) -> int:
        """Return how many windows the words of these classes have at most, for a GPU that nobody should wait for."""
        # a class of fewer columns than all has room for the widest filter behind its longest word
        return sum(n * (columns if columns >= characters else columns - self.widest + 1) for n, columns in classes)
