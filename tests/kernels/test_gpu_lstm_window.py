"""The GPU's window of an LSTM layer against a plain loop with autograd."""

from __future__ import annotations

import pytest
import torch
from helpers.gpu import DEVICE, INTERPRETED, PRODUCTS, Random, compare, products, relative_error
from torch import Tensor

from elmo_ray.kernels.gpu.lstm_window import split_product, splits_for, window

pytestmark = pytest.mark.gpu

CLIPS = {"both": (0.3, 0.4), "none": (None, None), "cell": (0.3, None), "projection": (None, 0.4), "rare": (3.0, 3.0)}
SHAPES = {
    "ordinary": (2, 3, 3, 24, 32, 20),
    "one of each": (1, 1, 1, 1, 1, 1),
    "one step": (2, 1, 3, 7, 40, 9),
    "one direction and odd sizes": (1, 4, 2, 11, 37, 5),
    "more than a block": (2, 2, 2, 6, 1030, 6),
}
"""D, T, B, P, H and I."""


def plain_window(
    x: Tensor,
    hidden: Tensor,
    memory: Tensor,
    input_kernel: Tensor,
    hidden_kernel: Tensor,
    bias: Tensor,
    projection: Tensor | None,
    clips: tuple[float | None, float | None],
) -> tuple[Tensor, Tensor]:
    """Outputs and memories, by the equations."""
    outputs, memories = [], []
    for step in range(x.shape[1]):
        gates = torch.bmm(x[:, step], input_kernel) + torch.bmm(hidden, hidden_kernel) + bias[:, None]
        i, j, f, o = gates.chunk(4, dim=-1)
        memory = torch.sigmoid(f + 1) * memory + torch.sigmoid(i) * torch.tanh(j)
        if clips[0] is not None:
            memory = memory.clamp(-clips[0], clips[0])
        hidden = torch.sigmoid(o) * torch.tanh(memory)
        if projection is not None:
            hidden = torch.bmm(hidden, projection)
            if clips[1] is not None:
                hidden = hidden.clamp(-clips[1], clips[1])
        outputs.append(hidden)
        memories.append(memory)
    return torch.stack(outputs, 1), torch.stack(memories, 1)


def random_layer(shape: tuple[int, ...], with_projection: bool = True) -> tuple[list[Tensor], list[Tensor]]:
    """The state, and x with the weights."""
    d, t, b, p, h, i = shape
    p, random = p if with_projection else h, Random()
    state = [random.normal(d, b, p, scale=0.3), random.normal(d, b, h, scale=0.3)]
    leaves = [
        random.normal(d, t, b, i),
        random.normal(d, i, 4 * h, scale=i**-0.5),
        random.normal(d, p, 4 * h, scale=p**-0.5),
        random.normal(d, 4 * h, scale=0.5),
    ]
    if with_projection:
        leaves.append(random.normal(d, h, p, scale=2 * h**-0.5))
    return state, leaves


def check(
    shape: tuple[int, ...],
    clips: tuple[float | None, float | None],
    with_projection: bool,
    dtype: torch.dtype | None,
    tolerance: float,
) -> None:
    (hidden, memory), leaves = random_layer(shape, with_projection)
    x, *weights = leaves
    last = () if with_projection else (None,)
    found = window(x, hidden, memory, *weights, *last, *clips, dtype)[1]
    expected = plain_window(x, hidden, memory, *weights, *last, clips)[1]
    assert found.dtype == torch.float32 and not found.requires_grad
    assert relative_error(found, expected) <= tolerance

    def ours(x: Tensor, *weights: Tensor) -> Tensor:
        outputs, memories = window(x, hidden, memory, *weights, *last, *clips, dtype)
        assert not memories.requires_grad
        return outputs

    def plain(x: Tensor, *weights: Tensor) -> Tensor:
        return plain_window(x, hidden.double(), memory.double(), *weights, *last, clips)[0]

    compare(ours, plain, leaves, tolerance)


@pytest.mark.parametrize("with_projection", [True, False])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shapes(shape: tuple[int, ...], with_projection: bool) -> None:
    check(shape, CLIPS["both"], with_projection, None, 2e-6)


@pytest.mark.parametrize("clips", CLIPS.values(), ids=CLIPS)
def test_clips(clips: tuple[float | None, float | None]) -> None:
    check(SHAPES["ordinary"], clips, True, None, 2e-6)


@pytest.mark.parametrize("clips", [(None, None), (3.0, 3.0)])
@pytest.mark.parametrize("with_projection", [True, False])
def test_bf16(clips: tuple[float | None, float | None], with_projection: bool) -> None:
    check(SHAPES["ordinary"], clips, with_projection, *PRODUCTS["bfloat16"])


@products
def test_gradient_at_a_bound_is_zero(dtype: torch.dtype | None, tolerance: float) -> None:
    """0.7 is rounded down in bf16, so an output at the bound is below it, and its gradient is still 0."""
    (hidden, memory), (x, *weights) = random_layer((1, 1, 2, 3, 8, 4))
    x.requires_grad_()
    outputs = window(x, hidden, memory, *weights[:-1], weights[-1] * 1e4, None, 0.7, dtype)[0]
    assert float((outputs.detach().abs() - 0.7).abs().max()) < 0.002
    (gradient,) = torch.autograd.grad(outputs.sum(), x)
    assert float(gradient.abs().max()) == 0.0


def test_sums_that_are_split() -> None:
    """Few rows and long sums: both products go through the split one."""
    d, t, b, p, h, i = shape = (1, 2, 3, 8, 4096, 4)
    # Triton's interpreter multiplies bf16 as if its bits were integers (`tl.dot` of 3.7).
    dtype = torch.float16 if INTERPRETED else torch.bfloat16
    assert (splits_for(b, h, dtype), splits_for(b, 4 * h, dtype)) == (8, 16)
    check(shape, CLIPS["rare"], True, dtype, 0.03)


def test_when_sums_are_split() -> None:
    assert splits_for(128, 16384, torch.float32) == 0, "in float32 the tiles are too big for most GPUs"
    assert splits_for(512, 16384, torch.bfloat16) == splits_for(128, 2048, torch.bfloat16) == 0
    assert splits_for(128, 4112, torch.bfloat16) == 0, "parts must be whole tiles"


@pytest.mark.parametrize(("rows", "length", "columns"), [(5, 256, 24), (130, 128, 70), (1, 384, 1)])
def test_split_product(rows: int, length: int, columns: int) -> None:
    """Of a view of a larger tensor, and a transposed weight."""
    random = Random()
    a, w = random.normal(2, 3, rows, length)[:, 1], random.normal(2, columns, length).transpose(1, 2)
    parts = torch.full((2, 2, rows, columns), torch.nan, device=DEVICE)
    split_product(parts, a, w)
    assert relative_error(parts.sum(0), torch.bmm(a.double(), w.double())) < 1e-6


def test_gradients_twice() -> None:
    """The backward pass overwrites the gates, so it must not where they are needed again."""
    (hidden, memory), leaves = random_layer(SHAPES["ordinary"])
    leaves = [x.requires_grad_() for x in leaves]
    outputs = window(leaves[0], hidden, memory, *leaves[1:], 0.3, 0.4, None)[0]
    first = torch.autograd.grad(outputs.sum(), leaves, retain_graph=True)
    second = torch.autograd.grad(outputs.sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(float(a.abs().max()) > 0 for a in first)


def test_nan_stays() -> None:
    (hidden, memory), (x, *weights) = random_layer(SHAPES["ordinary"])
    x[1, 1, 2, 3] = torch.nan
    outputs, memories = window(x, hidden, memory, *weights, 0.3, 0.4, None)
    assert outputs[1, 1:, 2].isnan().all() and memories[1, 1:, 2].isnan().all()
    assert outputs.isnan().sum() == 2 * outputs.shape[-1]
