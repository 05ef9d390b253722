"""The GPU's character convolutions against plain ones with autograd."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers.gpu import DEVICE, Random, compare, products, relative_error
from torch import Tensor

from elmo_ray.kernels.gpu.char_cnn import count_windows, largest_windows, serves

pytestmark = pytest.mark.gpu

PADDING = 20
FILTERS = {
    "ordinary": [(1, 4), (2, 8), (3, 20)],
    "wide first": [(5, 3), (1, 6)],
    "as wide as a word": [(12, 5), (2, 3)],
}
"""(width, count) of each."""


def plain_windows(
    types: Tensor, embedding: Tensor, bias: Tensor, filters: tuple[Tensor, ...], activation: str
) -> Tensor:
    x = F.embedding(types.long(), embedding).transpose(1, 2)
    y = torch.cat([F.conv1d(x, weight).amax(2) for weight in filters], 1) + bias
    return y.relu() if activation == "relu" else y.tanh()


def random_types(words: int, characters: int = 12) -> Tensor:
    """Words of any length: the first of padding alone, the last ones without padding, and almost."""
    random = Random(2)
    lengths = random.ids(characters - 1, words) + 1
    lengths[0] = 0
    lengths[-3:] = characters
    lengths[-4:-3] = characters - 1
    types = random.ids(PADDING, words, characters)
    types[torch.arange(characters, device=DEVICE) >= lengths[:, None]] = PADDING
    return types.to(torch.int16)


def random_leaves(filters: list[tuple[int, int]], size: int) -> list[Tensor]:
    """Embedding, bias and filters."""
    random = Random()
    weights = [random.normal(count, size, width, scale=(size * width) ** -0.5) for width, count in filters]
    return [random.normal(PADDING + 1, size), random.normal(sum(count for _, count in filters), scale=0.1), *weights]


@pytest.mark.parametrize("activation", ["relu", "tanh"])
@pytest.mark.parametrize("filters", FILTERS.values(), ids=FILTERS)
@pytest.mark.parametrize(("words", "size"), [(10, 16), (70, 5)])
def test_values_and_gradients(activation: str, filters: list[tuple[int, int]], words: int, size: int) -> None:
    types = random_types(words)
    compare(
        lambda e, b, *ws: largest_windows(types, e, ws, b, activation, None),
        lambda e, b, *ws: plain_windows(types, e, b, ws, activation),
        random_leaves(filters, size),
        2e-6,
    )


@products
def test_types(dtype: torch.dtype | None, tolerance: float) -> None:
    """In bf16 the maximum may be of another window, so values are compared and not the gradients."""
    types, (embedding, bias, *filters) = random_types(9), random_leaves(FILTERS["ordinary"], 16)
    found = largest_windows(types, embedding, filters, bias, "tanh", dtype)
    assert found.dtype == torch.float32
    assert relative_error(found, plain_windows(types, embedding, bias, tuple(filters), "tanh")) <= tolerance


@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_types_of_ids(kind: torch.dtype) -> None:
    types, (embedding, bias, *filters) = random_types(6), random_leaves(FILTERS["ordinary"], 16)
    found, expected = (largest_windows(x, embedding, filters, bias, "tanh", None) for x in (types.to(kind), types))
    assert torch.equal(found, expected)


def test_fixed_size() -> None:
    """With words that only fill up, and with room for more windows: nothing else changes."""
    types, leaves = random_types(12), random_leaves(FILTERS["ordinary"], 16)
    leaves = [x.requires_grad_() for x in leaves]
    embedding, bias, *filters = leaves
    expected = largest_windows(types, embedding, filters, bias, "tanh", None)
    filled = torch.cat([types, types[:5]])
    windows = count_windows(filled, PADDING)
    windows[12:] = 0
    found = largest_windows(filled, embedding, filters, bias, "tanh", None, windows, int(windows.sum()) + 37)
    assert relative_error(found[:12], expected) < 1e-6
    gradient = Random(5).normal(*expected.shape)
    gradients = torch.autograd.grad(found[:12], leaves, gradient)
    for ours, wanted in zip(gradients, torch.autograd.grad(expected, leaves, gradient), strict=True):
        assert relative_error(ours, wanted) < 1e-6


def test_ties_go_to_the_first_window() -> None:
    """A word of one character three times: the first two windows of width 1 and 2 are alike."""
    types = torch.tensor([[3, 3, 3, PADDING, PADDING]], device=DEVICE)
    embedding, bias, *filters = (x.requires_grad_() for x in random_leaves([(1, 2), (2, 2)], 16))
    with torch.no_grad():
        embedding[PADDING] = 0.0
        embedding[3] = 1.0
        for weight in filters:
            weight.fill_(0.1)
    found = largest_windows(types, embedding, filters, bias.detach() * 0, "relu", None)
    (gradient,) = torch.autograd.grad(found.sum(), embedding)
    # One window of width 1 with two filters, one of width 2 with two filters, each weight 0.1: all at character 3.
    assert torch.allclose(gradient[3], torch.full_like(gradient[3], 0.1 * (2 + 4)))
    assert float(gradient[PADDING].abs().max()) == 0.0


def test_long_words() -> None:
    """More than 256 windows, whose numbers do not fit into a byte: the maximum is at the very end."""
    types = torch.zeros(1, 270, dtype=torch.int64, device=DEVICE)
    types[0, 269] = 7
    leaves = random_leaves([(1, 3), (2, 3)], 16)
    leaves[0][7] *= 5
    compare(
        lambda e, b, *ws: largest_windows(types, e, ws, b, "tanh", None),
        lambda e, b, *ws: plain_windows(types, e, b, ws, "tanh"),
        leaves,
        2e-6,
    )


def test_windows_are_counted() -> None:
    types = torch.tensor([[1, 2, PADDING, PADDING], [1, 2, 3, PADDING], [1, 2, 3, 4], [PADDING] * 4])
    assert count_windows(types, PADDING).tolist() == [3, 4, 4, 1]


def test_nan_stays() -> None:
    types, (embedding, bias, *filters) = random_types(8), random_leaves(FILTERS["ordinary"], 16)
    embedding[int(types[5, 0])] = torch.nan
    for activation in ("relu", "tanh"):
        assert largest_windows(types, embedding, filters, bias, activation, None)[5].isnan().all()


def test_serves() -> None:
    embedding, filters = torch.zeros(PADDING + 1, 16), [torch.zeros(3, 16, 7)]
    assert serves(embedding, filters)
    assert not serves(embedding, [torch.zeros(3, 16, 70)])
    assert not serves(torch.zeros(PADDING + 1, 512), [torch.zeros(3, 512, 1)])
