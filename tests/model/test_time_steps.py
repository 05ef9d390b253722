"""The time steps as TorchScript and in Python, with packed kernels and plain ones, in bf16 and float32."""

from __future__ import annotations

import pytest
import torch

from elmo_ray.config import LstmConfig
from elmo_ray.model import recurrence
from elmo_ray.model.lstm import BiLstm
from elmo_ray.model.products import can_pack, factor_of
from elmo_ray.model.time_steps import backward_steps, forward_steps

BF16_HERE = can_pack(torch.zeros(2, 2, dtype=torch.bfloat16))


def results(dtype: torch.dtype | None) -> tuple[torch.Tensor, ...]:
    """Outputs, state and gradients of a model whose recurrent kernels are worth packing."""
    lstm = BiLstm(LstmConfig(dim=512, projection_dim=128, n_layers=2), 2)
    lstm.reset_parameters(torch.Generator().manual_seed(1))
    x = torch.randn(2, 6, 5, 128, generator=torch.Generator().manual_seed(2)).requires_grad_()
    outputs, state = lstm(x, lstm.zero_state(5, like=x), None, None, dtype)
    return (outputs[-1], *state, *torch.autograd.grad(outputs[-1].square().sum(), [x, *lstm.parameters()]))


def test_torchscript_runs_here_and_gives_the_bits_of_python(monkeypatch: pytest.MonkeyPatch) -> None:
    if not hasattr(torch.jit, "script"):
        pytest.skip("this torch has no TorchScript")
    assert isinstance(recurrence._forward_steps(), torch.jit.ScriptFunction)
    for dtype in (None, torch.bfloat16):
        script = results(dtype)
        with monkeypatch.context() as patch:
            patch.setattr(recurrence, "_forward_steps", lambda: forward_steps)
            patch.setattr(recurrence, "_backward_steps", lambda: backward_steps)
            python = results(dtype)
        assert all(torch.equal(a, b) for a, b in zip(script, python, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.skipif(
    not BF16_HERE, reason="this CPU has no bf16 products"))])  # fmt: skip
@pytest.mark.parametrize("transposed", [False, True])
def test_a_packed_factor_is_the_matrix(dtype: torch.dtype, transposed: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(256, 1024, generator=generator).to(dtype)
    factor = factor_of(weight, 32, transposed)
    assert factor.packed
    plain = weight.t() if transposed else weight
    x = torch.randn(32, plain.shape[0], generator=generator).to(dtype)
    found = torch.ops.mkldnn._linear_pointwise(x, factor.matrix, None, "none", [], "")
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(found, x @ plain, rtol=tolerance, atol=tolerance * 30)


def test_what_gains_nothing_is_not_packed() -> None:
    assert not factor_of(torch.zeros(16, 64), 32).packed
    assert not factor_of(torch.zeros(512, 1024, dtype=torch.float64), 32).packed
    assert not factor_of(torch.zeros(2, 512, 1024), 32).packed


def test_bf16_products_are_close_to_float32s() -> None:
    full, low = results(None), results(torch.bfloat16)
    for a, b in zip(full, low, strict=True):
        assert float((a - b).detach().norm() / a.detach().norm()) < 0.02
