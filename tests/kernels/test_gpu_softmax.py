"""The GPU's sampled softmax against a plain one with autograd."""

from __future__ import annotations

import pytest
import torch
from helpers.gpu import Random, compare, products, relative_error
from torch import Tensor

from elmo_ray.kernels.gpu.rows import sort_positions
from elmo_ray.kernels.gpu.softmax import column_sums, sampled_losses, serves

pytestmark = pytest.mark.gpu

SHAPES = {
    "ordinary": (2, 21, 24, 20, 60),
    "one of each": (1, 1, 1, 1, 1),
    "one direction": (1, 12, 33, 129, 140),
    "many positions": (2, 70, 8, 5, 7),
}
"""D, N, P, K and R."""


def plain_losses(
    x: Tensor,
    rows: Tensor,
    bias: Tensor,
    targets: Tensor,
    target_counts: Tensor,
    negatives: Tensor,
    negative_counts: Tensor,
    mask_hits: bool,
) -> Tensor:
    losses = []
    for d in range(len(x)):
        true = (x[d] * rows[targets[d]]).sum(1) + bias[targets[d]] - target_counts[d]
        others = x[d] @ rows[negatives[d]].t() + bias[negatives[d]] - negative_counts[d]
        if mask_hits:
            others = others.masked_fill(targets[d][:, None] == negatives[d], -torch.inf)
        losses.append(torch.cat([true[:, None], others], dim=1).logsumexp(1) - true)
    return torch.stack(losses)


def random_softmax(shape: tuple[int, ...]) -> tuple[list[Tensor], list[Tensor]]:
    """x, rows and bias; targets and negatives with their log counts.

    Row 0 is the target of many positions of both directions, and so are rows that are negatives; the last row, where
    there are rows enough, is neither.
    """
    (d, n, p, k, r), random = shape, Random()
    touched = max(r - 1, 1)
    targets = random.ids(touched, d, n)
    targets[:, : n // 3] = 0
    negatives = torch.stack([random.distinct(touched, k) for _ in range(d)])
    targets[0, -1] = negatives[0, -1]
    leaves = [random.normal(d, n, p), random.normal(r, p, scale=p**-0.5), random.normal(r)]
    return leaves, [targets, random.normal(d, n), negatives, random.normal(d, k)]


def check(
    shape: tuple[int, ...], dtype: torch.dtype | None, tolerance: float, mask_hits: bool, is_sorted: bool
) -> None:
    leaves, given = random_softmax(shape)
    positions = sort_positions(given[0], shape[-1]) if is_sorted else None
    exact = [x.double() if x.is_floating_point() else x for x in given]

    def ours(*leaves: Tensor) -> Tensor:
        return sampled_losses(*leaves, *given, dtype, mask_hits, positions)

    compare(ours, lambda *leaves: plain_losses(*leaves, *exact, mask_hits), leaves, tolerance)


@pytest.mark.parametrize("mask_hits", [True, False])
@pytest.mark.parametrize("shape", [shape for name, shape in SHAPES.items() if name != "one of each"])
def test_losses_and_gradients(shape: tuple[int, ...], mask_hits: bool) -> None:
    check(shape, None, 2e-6, mask_hits, is_sorted=False)


@products
def test_types(dtype: torch.dtype | None, tolerance: float) -> None:
    check(SHAPES["ordinary"], dtype, tolerance, mask_hits=True, is_sorted=True)


def test_one_of_each() -> None:
    """The only negative is the target: without the mask the loss is that of two alike, with it there is none."""
    leaves, given = random_softmax(SHAPES["one of each"])
    given[3].copy_(given[1])
    assert float(sampled_losses(*leaves, *given, None, False)) == pytest.approx(0.6931472)
    leaves = [x.requires_grad_() for x in leaves]
    loss = sampled_losses(*leaves, *given, None, True)
    assert float(loss.detach()) == pytest.approx(0.0, abs=1e-6)
    for gradient in torch.autograd.grad(loss.sum(), leaves):
        assert float(gradient.abs().max()) == 0.0


def test_row_without_a_position() -> None:
    """It gets a gradient of zeros, not what was in memory, and no NaN either."""
    leaves, given = random_softmax(SHAPES["ordinary"])
    leaves = [x.requires_grad_() for x in leaves]
    _, d_rows, d_bias = torch.autograd.grad(sampled_losses(*leaves, *given).sum(), leaves)
    assert float(d_rows[-1].abs().max()) == float(d_bias[-1].abs()) == 0.0
    assert float(d_rows[0].abs().max()) > 0


def test_positions_without_a_target() -> None:
    """They have target row 0 and a gradient of 0: nothing of them is in any gradient."""
    leaves, given = random_softmax(SHAPES["ordinary"])
    leaves = [x.requires_grad_() for x in leaves]
    losses = sampled_losses(*leaves, *given)
    counts = torch.ones_like(losses)
    counts[:, :5] = 0.0
    gradients = torch.autograd.grad(losses, leaves, counts)
    without = [leaves[0][:, 5:].detach().requires_grad_(), *leaves[1:]]
    rest = [given[0][:, 5:], given[1][:, 5:], *given[2:]]
    expected = torch.autograd.grad(sampled_losses(*without, *rest).sum(), without)
    assert float(gradients[0][:, :5].abs().max()) == 0.0
    assert relative_error(gradients[0][:, 5:], expected[0]) < 1e-6
    assert all(relative_error(a, b) < 1e-6 for a, b in zip(gradients[1:], expected[1:], strict=True))


@pytest.mark.parametrize("spoilt", [torch.nan, torch.inf])
def test_what_is_not_finite_is_seen(spoilt: float) -> None:
    leaves, given = random_softmax(SHAPES["ordinary"])
    leaves[0][0, 3, 2] = spoilt
    losses = sampled_losses(*leaves, *given)
    assert not losses[0, 3].isfinite()
    assert losses.isfinite().sum() == losses.numel() - 1


@pytest.mark.parametrize(("n", "k"), [(1, 1), (65, 130), (600, 7)])
def test_column_sums(n: int, k: int) -> None:
    random = Random()
    x, scale = random.normal(2, n, k), random.normal(2, n)
    assert relative_error(column_sums(x, scale), (x.double() * scale.double()[:, :, None]).sum(1)) < 1e-6


def test_serves() -> None:
    negatives = torch.zeros(1, 4, dtype=torch.int64)
    assert serves(negatives) and not serves(negatives.repeat(1, 1 << 15))
