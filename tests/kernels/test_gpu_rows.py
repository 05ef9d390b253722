"""Rows that many positions share on a GPU, against PyTorch's embedding."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers.gpu import DEVICE, Random, compare

from elmo_ray.kernels.gpu.rows import gather_rows, sort_positions

pytestmark = pytest.mark.gpu


def test_positions_are_sorted_by_row() -> None:
    ids = torch.tensor([[3, 0, 3], [1, 3, 0]], device=DEVICE)
    order, starts = sort_positions(ids, 5)
    assert order.dtype == starts.dtype == torch.int32
    assert order.tolist() == [1, 5, 3, 0, 2, 4]
    assert starts.tolist() == [0, 2, 3, 3, 6, 6], "rows 2 and 4 have no position"


@pytest.mark.parametrize("is_sorted", [True, False])
@pytest.mark.parametrize(("rows", "width", "shape"), [(12, 24, (2, 3, 5)), (1, 1, (1,)), (40, 1100, (50,))])
def test_rows_and_gradient(rows: int, width: int, shape: tuple[int, ...], is_sorted: bool) -> None:
    random = Random()
    ids = random.ids(max(rows - 1, 1), *shape)
    ids.view(-1)[: ids.numel() // 2] = 0  # a row with more positions than are added at once
    positions = sort_positions(ids, rows) if is_sorted else None
    compare(
        lambda table: gather_rows(table, ids, positions),
        lambda table: F.embedding(ids, table),
        [random.normal(rows, width)],
        1e-6,
    )


def test_same_bits() -> None:
    random = Random()
    table, ids = random.normal(5, 33).requires_grad_(), random.ids(5, 200)
    gradient = random.normal(200, 33)
    first, second = (torch.autograd.grad(gather_rows(table, ids), table, gradient)[0] for _ in range(2))
    assert torch.equal(first, second)
