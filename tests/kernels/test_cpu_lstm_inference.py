"""The CPU's LSTM without gradients against the one that trains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from elmo_ray import kernels
from elmo_ray.config.model import LstmConfig
from elmo_ray.kernels.cpu.lstm_inference import LstmInference
from elmo_ray.model.lstm import BiLstm, LstmState

pytest.importorskip("numba")


def case(
    rows: Sequence[int], directions: int, dtype: torch.dtype, **config: object
) -> tuple[BiLstm, torch.Tensor, LstmState]:
    config = dict(config)
    word_dim: Any = config.pop("word_dim", None)
    settings = LstmConfig.model_validate(
        {"dim": 12, "projection_dim": 8, "n_layers": 3, "cell_clip": 0.3, "proj_clip": 0.2, **config}
    )
    generator = torch.Generator().manual_seed(3)
    lstm = BiLstm(settings, directions, word_dim)
    lstm.reset_parameters(generator)
    with torch.no_grad():
        for parameter in lstm.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    lstm = lstm.to(dtype)
    size = word_dim or settings.projection_dim
    x = torch.randn(directions, sum(rows), size, generator=generator).to(dtype)
    like = lstm.zero_state(rows[0] + 2, like=x)  # two rows that have no position
    return lstm, x, LstmState(*(0.1 * torch.randn(s.shape, generator=generator).to(dtype) for s in like))


def inference(
    lstm: BiLstm, x: torch.Tensor, rows: Sequence[int], state: LstmState, dtype: torch.dtype | None = None
) -> tuple[list[torch.Tensor], LstmState]:
    layers = [layer.weights for layer in lstm.layers]
    config = lstm.config
    stack = LstmInference(layers, (config.cell_clip, config.proj_clip), config.use_skip_connections, dtype)
    outputs, *after = stack.run(*by_word(x), rows, *state)
    return outputs, LstmState(*after)


def by_word(x_DNP: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Words, each at one position, and their places, which are not in order."""
    words = x_DNP.flatten(0, 1)
    order = torch.randperm(len(words), generator=torch.Generator().manual_seed(5))
    return words[order], torch.argsort(order).view(x_DNP.shape[:2])


def expected(
    lstm: BiLstm, x_DNP: torch.Tensor, rows: Sequence[int], state: LstmState
) -> tuple[list[torch.Tensor], LstmState]:
    """By the layer that trains, in windows with padding."""
    b = state.hidden.shape[2]
    lengths = torch.tensor([sum(count > row for count in rows) for row in range(b)])
    padded = x_DNP.new_zeros(len(x_DNP), len(rows), b, x_DNP.shape[2])
    valid = torch.arange(len(rows))[:, None] < lengths
    padded[:, valid] = x_DNP
    with torch.no_grad(), kernels.using("off"):
        outputs, after = lstm(padded, state, lengths)
    return [output[:, valid] for output in outputs], after


@pytest.mark.parametrize("rows", [[5], [9, 9, 9], [16, 11, 11, 3, 1]])
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"projection_dim": 12},
        {"cell_clip": None, "proj_clip": None, "use_skip_connections": False},
        {"word_dim": 21},
    ],
    ids=["clips", "no projection", "no clips", "a wider input"],
)
def test_outputs_and_states(rows: list[int], directions: int, config: dict[str, object]) -> None:
    lstm, x, state = case(rows, directions, torch.float32, **config)
    before = [tensor.clone() for tensor in (x, *state)]
    found, after = inference(lstm, x, rows, state)
    reference, reference_after = expected(lstm, x, rows, state)
    for a, b in zip([*found, *after], [*reference, *reference_after], strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=0, atol=2e-6)
    assert all(torch.equal(a, b) for a, b in zip(before, (x, *state), strict=True)), "its arguments are not changed"


def test_bf16_is_close_and_its_cells_are_not_rounded() -> None:
    rows = [16, 16, 7]
    lstm, x, state = case(rows, 2, torch.float32, cell_clip=3.0, proj_clip=3.0)
    found, after = inference(lstm, x, rows, state, torch.bfloat16)
    reference, reference_after = inference(lstm, x, rows, state)
    for a, b in zip([*found, *after], [*reference, *reference_after], strict=True):
        assert a.dtype == torch.float32
        assert 0.0 < float((a - b).abs().max()) < 0.05
    assert not torch.equal(after.cell, after.cell.bfloat16().float())
