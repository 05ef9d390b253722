"""The CPU's compiled loops by themselves: roundings, activations, bounds, ties; and a Python without Numba."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from elmo_ray import kernels
from elmo_ray.kernels.cpu import loops as cpu_kernels
from elmo_ray.kernels.cpu.char_cnn import backward_highway, forward_highway, largest_of_windows, spread_to_windows
from elmo_ray.kernels.cpu.loops import as_array, bound_of
from elmo_ray.kernels.cpu.lstm import backward_gates, backward_projection, forward_gates, forward_projection

needs_numba = pytest.mark.skipif(cpu_kernels.numba is None, reason="Numba is not installed")

BF16 = torch.bfloat16


def test_only_float32_on_a_cpu() -> None:
    for question in (kernels.lstm_window, kernels.highway, kernels.dropout, kernels.adagrad):
        assert (question(torch.zeros(1)) is not None) == (cpu_kernels.numba is not None)
        assert question(torch.zeros(1, dtype=torch.float64)) is None
        assert question(torch.zeros(1, device="meta")) is None
        with kernels.using("off"):
            assert question(torch.zeros(1)) is None


def bit_patterns() -> torch.Tensor:
    """Every bfloat16 and float32 numbers next to it and halfway to the next: NaN, infinities, subnormals, ties."""
    high = np.arange(1 << 16, dtype=np.uint32)[:, None] << 16
    low = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=np.uint32)
    return torch.from_numpy((high | low).view(np.float32))


@needs_numba
def test_bfloat16_is_rounded_as_torch_does() -> None:
    x = bit_patterns()
    output, low = torch.empty_like(x), torch.zeros(len(x), x.shape[1] + 3, dtype=BF16)
    forward_projection(as_array(x), as_array(output), as_array(low), bound_of(None))
    assert torch.equal(as_bits(output), as_bits(x)) and not low[:, :3].any()
    rounded = low[:, 3:]
    assert torch.equal(rounded.isnan(), x.isnan())
    assert torch.equal(as_bits(rounded)[~x.isnan()], as_bits(x.to(BF16))[~x.isnan()])


@needs_numba
def test_every_bfloat16_is_read_as_it_is() -> None:
    x = bit_patterns()[:, :1].contiguous()
    low, output = x.to(BF16), torch.empty_like(x)
    forward_projection(as_array(low), as_array(output), as_array(torch.empty_like(x)), bound_of(None))
    assert torch.equal(output.isnan(), x.isnan())
    assert torch.equal(as_bits(output)[~x.isnan()], as_bits(x)[~x.isnan()])


def as_bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.int16 if x.dtype == BF16 else torch.int32)


def activated(x: torch.Tensor, bound: float | None = None) -> list[torch.Tensor]:
    """The gates i, j, f, o of x in each, a cell that starts from 0, and o * tanh(cell)."""
    gates, before = torch.empty(4 * len(x)), torch.zeros_like(x)
    cell, gated = torch.empty_like(x), torch.empty_like(x)
    arrays = (x.repeat(4), torch.zeros_like(gates), before, gates, cell, gated)
    sums, bias, *rest = map(as_array, arrays)
    forward_gates(sums[None], bias, *(array[None] for array in rest), bound_of(bound))
    return [*gates.chunk(4), cell, gated]


@needs_numba
def test_activations_are_close_to_float64s() -> None:
    x = torch.cat([torch.linspace(-100, 100, 200_001), torch.linspace(-1e-3, 1e-3, 2001)])
    i, j, f, o, cell, gated = activated(x)
    sigmoid, tanh = torch.sigmoid(x.double()), torch.tanh(x.double())
    assert torch.equal(i, f) and torch.equal(i, o)
    assert float((i - sigmoid).abs().max()) < 1.2e-7 and float((j - tanh).abs().max()) < 2.4e-7
    inner = x.abs() < 80
    assert float((i / sigmoid - 1)[inner].abs().max()) < 4e-7, "far from 0 as well, which gradients need"
    assert float(i.min()) > 0 and float(i.max()) == 1 and j.min() == -1 and j.max() == 1
    expected = sigmoid * tanh
    assert float((cell - expected).abs().max()) < 3e-7
    assert float((gated - sigmoid * torch.tanh(expected)).abs().max()) < 5e-7


@needs_numba
def test_the_exponential_is_right_to_its_last_places() -> None:
    for x in np.linspace(-79.9, 79.9, 20_001, dtype=np.float32):
        assert abs(float(cpu_kernels.exp(x)) / np.exp(np.float64(x)) - 1) < 2.5e-7, x


@needs_numba
def test_what_is_not_a_number_stays_so_and_infinities_saturate() -> None:
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, 3e38, -3e38] * 9)
    for bound in (None, 0.25):
        i, j, f, o, cell, gated = activated(x, bound)
        for found in (i, j, f, o, cell, gated):
            assert torch.equal(found.isnan(), x.isnan())
        assert i[1] == i[3] == j[1] == j[3] == 1 and j[2] == j[4] == -1 and 0 <= i[2] < 1e-34
        assert cell[1] == (1 if bound is None else bound) and abs(float(cell[2])) < 1e-34
    output, low = torch.empty_like(x), torch.empty(1, len(x), dtype=BF16)
    forward_projection(as_array(x)[None], as_array(output)[None], as_array(low), bound_of(3.0))
    assert output[1:5].tolist() == [3.0, -3.0, 3.0, -3.0] and torch.equal(output.isnan(), x.isnan())
    assert torch.equal(low[0].isnan(), x.isnan())


@needs_numba
@pytest.mark.parametrize("low", [torch.float32, BF16])
def test_no_gradient_passes_where_a_projection_is_at_its_bound(low: torch.dtype) -> None:
    below = float(np.nextafter(np.float32(0.3), np.float32(0)))
    bound = float(np.float32(0.3))
    output = torch.tensor([[bound, -bound, below, -below, 0.0, torch.nan, 2 * bound] * 5])
    gradient, recurrent = torch.full_like(output, 0.5), torch.full_like(output, 0.25).to(low)
    d_raw = torch.empty_like(output, dtype=low)
    backward_projection(*map(as_array, (gradient, recurrent, output, d_raw)), bound_of(0.3))
    assert d_raw.tolist() == [[0, 0, 0.75, 0.75, 0.75, 0.75, 0] * 5]
    backward_projection(*map(as_array, (gradient, recurrent, output, d_raw)), bound_of(None))
    assert bool((d_raw == 0.75).all())


@needs_numba
@pytest.mark.parametrize("low", [torch.float32, BF16])
@pytest.mark.parametrize("clip", [0.3, None])
def test_gradients_of_gates_are_autograds_in_place_and_elsewhere(low: torch.dtype, clip: float | None) -> None:
    rows, h = 3, 19
    generator = torch.Generator().manual_seed(1)
    sums, before = torch.randn(rows, 4 * h, generator=generator), torch.randn(rows, h, generator=generator)
    sums[0, :4], sums[1, h : h + 2] = torch.tensor([60.0, -60.0, 90.0, -90.0]), torch.tensor([50.0, -50.0])
    d_gated, d_after = (torch.randn(rows, h, generator=generator) for _ in range(2))
    d_gated = d_gated.to(low)
    gates, cell, gated = torch.empty_like(sums), torch.empty_like(before), torch.empty_like(before)
    bias = torch.zeros(4 * h)
    forward_gates(*map(as_array, (sums, bias, before, gates, cell, gated)), bound_of(clip))

    exact, exact_before = sums.double().requires_grad_(), before.double().requires_grad_()
    i, j, f, o = exact.chunk(4, dim=1)
    c = torch.sigmoid(f) * exact_before + torch.sigmoid(i) * torch.tanh(j)
    if clip is not None:
        inside = c.detach().abs() < clip
        assert 0.2 < float(inside.double().mean()) < 0.8
        c = torch.where(inside, c, c.detach().clamp(-clip, clip))
    m = torch.sigmoid(o) * torch.tanh(c)
    total = (m * d_gated.double()).sum() + (c * d_after.double()).sum()
    expected, expected_before = torch.autograd.grad(total, [exact, exact_before])
    torch.testing.assert_close(cell.double(), c.detach(), rtol=0, atol=1e-6)
    torch.testing.assert_close(gated.double(), m.detach(), rtol=0, atol=1e-6)

    for in_place in (True, False) if low == torch.float32 else (False,):
        states, d_cell, d_gates = gates.clone(), d_after.clone(), torch.empty_like(gates, dtype=low)
        into = None if in_place else as_array(d_gates)
        d_bias = torch.ones(4 * h)
        arrays = (d_gated, states, before, cell, d_cell)
        backward_gates(*map(as_array, arrays), into, as_array(d_bias), bound_of(clip))
        if not in_place:
            assert torch.equal(states, gates), "the gates are needed again"
        tolerance = 1e-6 if low == torch.float32 else 0.01
        found = states if in_place else d_gates
        torch.testing.assert_close(d_bias.double() - 1, expected.sum(dim=0), rtol=1e-5, atol=tolerance)
        torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(d_cell.double(), expected_before, rtol=1e-6, atol=1e-6)


@needs_numba
@pytest.mark.parametrize("low", [torch.float32, BF16])
def test_ties_go_to_the_first_window(low: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    products = torch.randint(-1, 2, (5, 7, 33), generator=generator).to(low)
    products[0, :, 0], products[0, :, 1] = -torch.inf, torch.inf
    products[1, :, 0] = torch.tensor([-0.0, 0.0, -0.0, 0.0, 0.0, -0.0, 0.0])
    largest, which = torch.empty(5, 33), torch.empty(5, 33, dtype=torch.int16)
    largest_of_windows(*map(as_array, (products, largest, which)))
    expected = products.float().numpy()
    assert np.array_equal(which.numpy(), expected.argmax(axis=1)) and np.array_equal(largest, expected.max(axis=1))

    gradient, spread = torch.randn(5, 33, generator=generator).to(low).float(), torch.empty_like(products)
    spread_to_windows(*map(as_array, (gradient, which, spread)))
    assert torch.equal(spread.float().sum(dim=1), gradient)
    assert torch.equal(spread.float().gather(1, which.long()[:, None])[:, 0], gradient)
    assert int((spread != 0).sum()) == int((gradient != 0).sum())


@needs_numba
def test_a_window_that_is_not_a_number_is_the_maximum() -> None:
    products = torch.zeros(1, 4, 4)
    products[0].fill_diagonal_(torch.nan)
    products[0, 3] = 5.0
    largest, which = torch.empty(1, 4), torch.empty(1, 4, dtype=torch.int16)
    largest_of_windows(*map(as_array, (products, largest, which)))
    assert largest.isnan().tolist() == [[True, True, True, False]] and which.tolist() == [[0, 1, 2, 3]]


@needs_numba
@pytest.mark.parametrize("low", [torch.float32, BF16])
def test_a_highway_and_its_gradients_are_autograds(low: torch.dtype) -> None:
    words, filters = 5, 37
    generator = torch.Generator().manual_seed(3)
    x, carry, transform, dy = (3 * torch.randn(words, filters, generator=generator) for _ in range(4))
    b_carry, b_transform = (torch.randn(filters, generator=generator) for _ in range(2))
    carry, transform = carry.to(low), transform.to(low)
    carry[0, :2], transform[1, :3] = torch.tensor([200.0, -200.0]), -b_transform[:3].to(low)
    b_transform[:3] = -transform[1, :3].float()  # exactly 0 before the relu
    gate, other, y = (torch.empty_like(x) for _ in range(3))
    forward_highway(*map(as_array, (x, carry, transform, b_carry, b_transform, gate, other, y)))
    exact = [t.double().requires_grad_() for t in (x, carry, transform)]
    g, t = torch.sigmoid(exact[1] + b_carry.double()), torch.relu(exact[2] + b_transform.double())
    expected = g * t + (1 - g) * exact[0]
    torch.testing.assert_close(y.double(), expected.detach(), rtol=1e-6, atol=2e-6)
    (d_x, *others) = torch.autograd.grad(expected, exact, dy.double())
    found = torch.empty_like(carry), torch.empty_like(transform), torch.empty_like(x)
    backward_highway(*map(as_array, (dy, x, gate, other, *found)))
    torch.testing.assert_close(found[2].double(), d_x, rtol=1e-6, atol=2e-6)
    for ours, reference in zip(found, others, strict=False):
        tolerance = 2e-6 if low == torch.float32 else 0.01
        torch.testing.assert_close(ours.double(), reference, rtol=tolerance, atol=2e-6)
    assert not found[1][1, :3].any()
    x[2, 0] = carry[2, 1] = transform[2, 2] = torch.nan
    forward_highway(*map(as_array, (x, carry, transform, b_carry, b_transform, gate, other, y)))
    assert y.isnan().nonzero().tolist() == [[2, 0], [2, 1], [2, 2]]


_BOTH = """
import sys
if sys.argv[2] == "without":
    sys.modules["numba"] = None
import torch
from safetensors.torch import save_file
from elmo_ray.config.model import CharCnnConfig
from elmo_ray.config.model import LstmConfig
from elmo_ray.data.characters import N_CHARACTERS
from elmo_ray.kernels.cpu import loops as cpu_kernels
from elmo_ray.model.char_cnn import CharCnn
from elmo_ray.model.lstm import BiLstm
assert (cpu_kernels.numba is None) == (sys.argv[2] != "with")
torch.set_num_threads(2)
lstm, cnn = BiLstm(LstmConfig(dim=24, projection_dim=12, n_layers=2, cell_clip=0.3, proj_clip=0.2), 2), CharCnn(
    CharCnnConfig(filters=((1, 8), (3, 9)), embedding_dim=4, max_characters=12, n_highway=1), 12)
generator = torch.Generator().manual_seed(1)
for module in (lstm, cnn):
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.5, generator=generator)
found = {}
for dtype in (None, torch.bfloat16):
    words = cnn(torch.randint(0, N_CHARACTERS, (70, 12), generator=torch.Generator().manual_seed(2)), None, dtype)
    outputs, state = lstm(words.view(2, 7, 5, 12), lstm.zero_state(5, like=words), None, None, dtype)
    gradients = torch.autograd.grad(outputs[-1].square().sum(), [*lstm.parameters(), *cnn.parameters()])
    for number, tensor in enumerate((outputs[-1].detach(), *state, *gradients)):
        found[f"{dtype} {number}"] = tensor.contiguous()
save_file(found, sys.argv[1])
"""


@pytest.mark.slow
@needs_numba
def test_without_numba_there_is_one_warning_and_the_same_results(tmp_path: Path) -> None:
    results = []
    for how in ("with", "without", "disabled"):
        command = [sys.executable, "-c", _BOTH, str(tmp_path / how), how]
        environment = {**os.environ, **({"NUMBA_DISABLE_JIT": "1"} if how == "disabled" else {})}
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
        assert done.returncode == 0, done.stderr
        assert len(done.stderr.strip().splitlines()) == (how != "with"), done.stderr
        assert ("no Numba here" in done.stderr) == (how != "with")
        results.append(load_file(tmp_path / how))
    ours, plain, disabled = results
    assert all(torch.equal(plain[name], disabled[name]) for name in plain)
    assert len(ours) == len(plain) > 40
    for name, tensor in ours.items():
        tolerance = 1e-5 if name.startswith("None") else 0.1
        assert float((tensor - plain[name]).norm()) <= tolerance * float(plain[name].norm()), name
