"""The time steps in PyTorch's operations: bf16 products next to float32's, and directions as one batch."""

from __future__ import annotations

import pytest
import torch

from elmo_ray.config.model import LstmConfig
from elmo_ray.kernels import recurrence
from elmo_ray.kernels.recurrence import Recurrence
from elmo_ray.model import lstm


def results(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype | None, batched: bool) -> list[torch.Tensor]:
    """Outputs, state and gradients; batched: of all directions at once, as on a GPU."""
    with monkeypatch.context() as patch:
        patch.setattr(lstm, "CpuRecurrence", Recurrence)
        if batched:
            patch.setattr(recurrence, "by_direction", lambda work, *_: work(slice(None)))
        model = lstm.BiLstm(LstmConfig(dim=96, projection_dim=32, n_layers=2), 2)
        model.reset_parameters(torch.Generator().manual_seed(1))
        x = torch.randn(2, 6, 5, 32, generator=torch.Generator().manual_seed(2)).requires_grad_()
        outputs, state = model(x, model.zero_state(5, like=x), None, None, dtype)
        gradients = torch.autograd.grad(outputs[-1].square().sum(), [x, *model.parameters()])
    return [outputs[-1].detach(), *state, *gradients]


@pytest.mark.parametrize("batched", [False, True])
def test_bf16_products_are_close_to_float32s(batched: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    full, low = (results(monkeypatch, dtype, batched) for dtype in (None, torch.bfloat16))
    for a, b in zip(full, low, strict=True):
        assert a.dtype == b.dtype == torch.float32
        assert 0 < float((a - b).norm() / a.norm()) < 0.02


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_directions_as_one_batch(dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch) -> None:
    apart, together = (results(monkeypatch, dtype, batched) for batched in (False, True))
    for a, b in zip(apart, together, strict=True):
        assert float((a - b).norm() / a.norm()) < (1e-5 if dtype is None else 0.01)
