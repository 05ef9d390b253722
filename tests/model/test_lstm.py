"""The LSTM stack against a slow reference: projection, clips, skip connections, directions, lengths, carried states."""

from __future__ import annotations

import pytest
import torch
from helpers import naive_bilm
from helpers.naive_bilm import close, stacked, state_of

from elmo_ray.config.model import LstmConfig, ModelConfig
from elmo_ray.model.lstm import BiLstm, LstmState

CASES = {
    "as the original": LstmConfig(dim=6, projection_dim=4, n_layers=2, cell_clip=0.4, proj_clip=0.3),
    "no clips": LstmConfig(dim=6, projection_dim=4, n_layers=2, cell_clip=None, proj_clip=None),
    "cell clip alone": LstmConfig(dim=6, projection_dim=4, n_layers=2, cell_clip=0.4, proj_clip=None),
    "projection clip alone": LstmConfig(dim=6, projection_dim=4, n_layers=2, cell_clip=None, proj_clip=0.3),
    "no skip connections": LstmConfig(
        dim=6, projection_dim=4, n_layers=3, cell_clip=0.4, proj_clip=0.3, use_skip_connections=False
    ),
    "three layers": LstmConfig(dim=5, projection_dim=3, n_layers=3, cell_clip=0.5, proj_clip=0.5),
    "no projection": LstmConfig(dim=4, projection_dim=4, n_layers=1, cell_clip=0.3, proj_clip=0.1),
    "no projection, two layers": LstmConfig(dim=4, projection_dim=4, n_layers=2, cell_clip=None, proj_clip=0.1),
}


def random_lstm(config: LstmConfig, directions: int) -> BiLstm:
    lstm = BiLstm(config, directions).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in lstm.parameters():
            parameter.normal_(0.0, 0.8, generator=generator)
    return lstm


def random_state(lstm: BiLstm, rows: int) -> LstmState:
    generator = torch.Generator().manual_seed(2)
    zero = lstm.zero_state(rows, like=torch.zeros(1, dtype=torch.float64))
    return LstmState(*(torch.empty_like(x).uniform_(-0.3, 0.3, generator=generator) for x in zero))


def inputs_of(rows: int, window: int, config: LstmConfig, directions: int) -> torch.Tensor:
    """[D, T, B, P]"""
    generator = torch.Generator().manual_seed(3)
    return torch.randn(directions, window, rows, config.projection_dim, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("config", CASES.values(), ids=CASES)
def test_values_states_and_gradients(config: LstmConfig, directions: int) -> None:
    rows, window, lengths = 3, 4, [4, 2, 0]
    lstm = random_lstm(config, directions)
    x = inputs_of(rows, window, config, directions).requires_grad_()
    state = random_state(lstm, rows)
    outputs, new = lstm(x, state, torch.tensor(lengths))

    model = ModelConfig(lstm=config, bidirectional=directions == 2)
    reference = {f"lstm.{name}": p.detach().clone().requires_grad_() for name, p in lstm.named_parameters()}
    x_reference = x.detach().clone().requires_grad_()
    vectors = x_reference.transpose(1, 2).flatten(0, 2)
    places = torch.arange(len(vectors)).view(directions, rows, window)
    expected, expected_state = naive_bilm.run(reference, model, list(vectors), places, state_of(*state), lengths)

    generator = torch.Generator().manual_seed(4)
    total, total_reference = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for layer in range(config.n_layers):
        for d in range(directions):
            for b, length in enumerate(lengths):
                for t in range(length):
                    close(outputs[layer][d, t, b], expected[layer][d][b][t])
                    weight = torch.randn(config.projection_dim, dtype=torch.float64, generator=generator)
                    total = total + (outputs[layer][d, t, b] * weight).sum()
                    total_reference = total_reference + (expected[layer][d][b][t] * weight).sum()
    hidden, cells = stacked(expected_state)
    close(new.hidden, hidden)
    close(new.cell, cells)
    assert not new.hidden.requires_grad and not new.cell.requires_grad
    assert torch.equal(new.hidden[:, :, 2], state.hidden[:, :, 2]) and torch.equal(
        new.cell[:, :, 2], state.cell[:, :, 2]
    )
    if config.cell_clip is not None:
        clipped = (cells.abs() == config.cell_clip).float().mean()
        assert 0.05 < clipped < 0.95, "the cell clip must act on some values"
    if config.proj_clip is not None and config.dim != config.projection_dim:
        assert 0.05 < (hidden.abs() == config.proj_clip).float().mean() < 0.95
    if config.dim == config.projection_dim:
        assert float(hidden.abs().max()) > 0.1, "without a projection there is no proj_clip"

    total.backward()
    total_reference.backward()
    assert x.grad is not None and x_reference.grad is not None
    close(x.grad, x_reference.grad)
    for name, parameter in lstm.named_parameters():
        gradient = reference[f"lstm.{name}"].grad
        assert parameter.grad is not None and gradient is not None, name
        close(parameter.grad, gradient)


def test_windows_do_not_matter_for_values() -> None:
    config = CASES["as the original"]
    lstm = random_lstm(config, 2)
    x = inputs_of(3, 6, config, 2)
    whole, end = lstm(x, random_state(lstm, 3))
    state, parts = random_state(lstm, 3), []
    for first, last in ((0, 1), (1, 4), (4, 6)):
        outputs, state = lstm(x[:, first:last], state)
        parts.append(outputs[-1])
    close(torch.cat(parts, dim=1), whole[-1], 1e-14)
    close(state.cell, end.cell, 1e-14)


def test_rows_and_directions_do_not_see_each_other() -> None:
    config = CASES["as the original"]
    lstm = random_lstm(config, 2)
    x, state = inputs_of(4, 3, config, 2), random_state(lstm, 4)
    before, _ = lstm(x, state)
    x[1, 0, 2] += 1.0
    after, _ = lstm(x, state)
    changed = (after[-1] != before[-1]).any(dim=3).nonzero().tolist()
    assert changed == [[1, t, 2] for t in range(3)]


def test_reset_rows_start_from_zero() -> None:
    config = CASES["as the original"]
    lstm = random_lstm(config, 2)
    x, state = inputs_of(3, 4, config, 2), random_state(lstm, 3)
    reset = torch.tensor([False, True, False])
    zeroed = state.zero_rows(reset)
    assert torch.equal(zeroed.hidden[:, :, ::2], state.hidden[:, :, ::2]) and not zeroed.cell[:, :, 1].any()
    outputs, _ = lstm(x, zeroed)
    fresh, _ = lstm(x, lstm.zero_state(3, like=x))
    carried, _ = lstm(x, state)
    close(outputs[-1][:, :, 1], fresh[-1][:, :, 1], 1e-14)
    close(outputs[-1][:, :, 0], carried[-1][:, :, 0], 1e-14)
    assert float((fresh[-1] - carried[-1]).abs().max()) > 0.01
    bad = LstmState(torch.full_like(state.hidden, torch.nan), torch.full_like(state.cell, torch.inf))
    assert not bad.zero_rows(torch.ones(3, dtype=torch.bool)).cell.any(), "0 * nan is nan"


def test_bf16_is_close_to_fp32_with_states_in_fp32() -> None:
    config = LstmConfig(dim=32, projection_dim=16, n_layers=2)
    lstm = BiLstm(config, 2)
    lstm.reset_parameters(torch.Generator().manual_seed(0))
    x = torch.randn(2, 8, 4, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
    results = []
    for dtype in (None, torch.bfloat16):
        outputs, state = lstm(x, lstm.zero_state(4, like=x), None, None, dtype)
        assert outputs[-1].dtype == state.cell.dtype == state.hidden.dtype == torch.float32
        gradients = torch.autograd.grad(outputs[-1].square().sum(), [x, *lstm.parameters()])
        assert all(g.dtype == torch.float32 for g in gradients)
        results.append([outputs[-1].detach(), state.cell, *gradients])
    for exact, low in zip(*results, strict=True):
        assert not torch.equal(exact, low)
        assert float((exact - low).norm()) < 0.03 * float(exact.norm())


def test_initial_values_are_the_originals() -> None:
    lstm = BiLstm(LstmConfig(dim=64, projection_dim=32, n_layers=2), 2)
    lstm.reset_parameters(torch.Generator().manual_seed(0))
    for layer in lstm.layers:
        bound = (6 / (32 + 32 + 256)) ** 0.5  # glorot over the whole kernel [input + recurrent, 4 * dim]
        for kernel in (layer.input_kernel, layer.hidden_kernel):
            assert isinstance(kernel, torch.Tensor)
            assert 0.98 * bound < float(kernel.abs().max()) <= bound and abs(float(kernel.mean())) < 0.01
        assert isinstance(layer.projection, torch.Tensor)
        assert 0.95 * 0.25 < float(layer.projection.abs().max()) <= 0.25
        assert not torch.as_tensor(layer.bias).any(), "the forget bias of 1 is not stored"


def test_a_graph_that_is_kept_gives_the_same_gradients_again() -> None:
    lstm = random_lstm(CASES["as the original"], 2)
    x = inputs_of(3, 5, CASES["as the original"], 2).requires_grad_()
    outputs, _ = lstm(x, random_state(lstm, 3))
    loss = outputs[-1].square().sum()
    first, again = (torch.autograd.grad(loss, [x, *lstm.parameters()], retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
