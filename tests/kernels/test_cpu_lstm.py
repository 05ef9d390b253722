"""A CPU's compiled LSTM against the plain one: values, states, gradients, clips, what is frozen, what is not finite."""

from __future__ import annotations

import pytest
import torch

from elmo_ray import kernels
from elmo_ray.config.model import LstmConfig
from elmo_ray.kernels.cpu import loops as cpu_kernels
from elmo_ray.model.lstm import BiLstm, LstmState

pytestmark = pytest.mark.skipif(cpu_kernels.numba is None, reason="Numba is not installed")

# dim, projection_dim, rows, window; the last is large enough for packed products, of one direction and of two
SIZES = [(37, 11, 3, 5), (5, 5, 1, 4), (1, 1, 2, 1), (65, 64, 7, 3), (512, 256, 3, 3)]
CLIPS = {"no clips": (None, None), "wide": (3.0, 3.0), "tight": (0.2, 0.1), "cell": (0.2, None), "output": (None, 0.1)}
LAYERS = 2


def random_lstm(dim: int, projection_dim: int, clips: str, directions: int) -> BiLstm:
    cell_clip, proj_clip = CLIPS[clips]
    config = LstmConfig(
        dim=dim, projection_dim=projection_dim, n_layers=LAYERS, cell_clip=cell_clip, proj_clip=proj_clip
    )
    model, generator = BiLstm(config, directions), torch.Generator().manual_seed(1)
    model.reset_parameters(generator)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5).add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def random_inputs(model: BiLstm, rows: int, window: int) -> tuple[torch.Tensor, LstmState]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(model.directions, window, rows, model.config.projection_dim, generator=generator)
    state = model.zero_state(rows, like=x)
    # a sentence's state lies within the clips, but not another model's
    return x, LstmState(*(0.2 * torch.randn(part.shape, generator=generator) for part in state))


def results(
    model: BiLstm, x: torch.Tensor, state: LstmState, dtype: torch.dtype | None = None
) -> dict[str, torch.Tensor]:
    """Outputs of all layers, states and gradients."""
    x = x.clone().requires_grad_()
    outputs, after = model(x, state, None, None, dtype)
    found = {f"output {layer}": output.detach() for layer, output in enumerate(outputs)}
    found |= {"hidden": after.hidden, "cell": after.cell}
    weights = torch.randn(outputs[0].shape, generator=torch.Generator().manual_seed(3))
    total = sum((output * weights.roll(layer)).sum() for layer, output in enumerate(outputs))
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad(total, [x, *parameters.values()])  # type: ignore[arg-type]
    return found | dict(zip(("d_x", *parameters), gradients, strict=True))


@pytest.fixture
def plain():
    """`results` by the plain model."""

    def of(*arguments) -> dict[str, torch.Tensor]:
        with kernels.using("off"):
            return results(*arguments)

    return of


@pytest.mark.parametrize("word_dim", [3, 40])
def test_an_input_of_another_size_than_the_output(word_dim: int, plain) -> None:
    config = LstmConfig(dim=12, projection_dim=8, n_layers=2, cell_clip=0.4, proj_clip=0.3)
    model, generator = BiLstm(config, 2, word_dim), torch.Generator().manual_seed(1)
    model.reset_parameters(generator)
    _, state = random_inputs(model, 5, 4)
    x = torch.randn(2, 4, 5, word_dim, generator=generator)
    found, expected = results(model, x, state), plain(model, x, state)
    assert found["d_x"].shape == x.shape
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("clips", CLIPS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_values_states_and_gradients(size: tuple[int, int, int, int], clips: str, directions: int, plain) -> None:
    dim, projection_dim, rows, window = size
    model = random_lstm(dim, projection_dim, clips, directions)
    x, state = random_inputs(model, rows, window)
    exact = plain(model.double(), x.double(), LstmState(*(part.double() for part in state)))
    model.float()
    for dtype in (None, torch.bfloat16):
        ours, reference = results(model, x, state, dtype), plain(model, x, state, dtype)
        assert ours.keys() == exact.keys()
        for name, expected in exact.items():
            assert ours[name].dtype == torch.float32 and ours[name].shape == expected.shape, name
            error, usual = (float((found[name] - expected).norm() / expected.norm()) for found in (ours, reference))
            # what is at a bound by a hair may be so with one rounding and not with another, and its gradient is 0
            assert error <= (1e-5 if dtype is None else 0.04 + 1.5 * usual), (name, dtype, usual)
    cell_clip, proj_clip = CLIPS[clips]
    if dim > 5:
        if cell_clip == 0.2:
            assert 0.05 < float((ours["cell"].abs() == torch.tensor(0.2)).float().mean()) < 0.95
        if proj_clip == 0.1:
            assert 0.05 < float((ours["hidden"].abs() == torch.tensor(0.1)).float().mean()) < 0.97


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_graph_that_is_kept_gives_the_same_gradients_again(dtype: torch.dtype | None) -> None:
    model = random_lstm(37, 11, "tight", 2)
    x, state = random_inputs(model, 3, 5)
    x.requires_grad_()
    loss = model(x, state, None, None, dtype)[0][-1].square().sum()
    gradients = [torch.autograd.grad(loss, [x, *model.parameters()], retain_graph=times < 2) for times in range(3)]
    for again in gradients[1:]:
        assert all(torch.equal(a, b) for a, b in zip(gradients[0], again, strict=True))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_frozen_weights_and_inputs_change_no_other_gradient(dtype: torch.dtype | None) -> None:
    model = random_lstm(37, 11, "wide", 2)
    x, state = random_inputs(model, 3, 5)
    whole = results(model, x, state, dtype)
    for kept in ({"layers.0.bias"}, {"layers.1.projection", "layers.0.input_kernel"}, {"layers.1.hidden_kernel"}):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in kept)
            parameter.grad = None
        outputs, _ = model(x, state, None, None, dtype)  # x has no gradient
        weights = torch.randn(outputs[0].shape, generator=torch.Generator().manual_seed(3))
        torch.autograd.backward(sum((o * weights.roll(k)).sum() for k, o in enumerate(outputs)))  # type: ignore[arg-type]
        for name, parameter in model.named_parameters():
            assert (parameter.grad is not None) == (name in kept), name
            assert parameter.grad is None or torch.equal(parameter.grad, whole[name]), name
    with torch.no_grad():
        outputs, after = model(x, state, None, None, dtype)
    assert not outputs[-1].requires_grad and torch.equal(outputs[-1], whole["output 1"])
    assert torch.equal(after.cell, whole["cell"])


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("clips", ["tight", "no clips"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["x", "hidden", "cell", "weight", "projection", "bias"])
def test_what_is_not_finite_is_seen(where: str, bad: float, clips: str, dtype: torch.dtype | None, plain) -> None:
    """NaN goes where it goes on the plain path. Infinities go on but from gates that are 0 there, and 1e-35 here."""
    model = random_lstm(37, 11, clips, 2)
    x, state = random_inputs(model, 3, 5)
    with torch.no_grad():
        if where == "x":
            x[1, 2, 1, 3] = bad
        elif where == "hidden":
            state.hidden[0, 1, 1, 3] = bad
        elif where == "cell":
            state.cell[0, 1, 1, 3] = bad
        elif where == "bias":
            model.layers[0].bias[1, 37 + 3] = bad  # type: ignore[index,operator]
        else:
            getattr(model.layers[0], "projection" if where == "projection" else "hidden_kernel")[1, 3, 5] = bad
    ours, reference = results(model, x, state, dtype), plain(model, x, state, dtype)
    for name, expected in reference.items():
        assert bool(ours[name][0].isfinite().all()) or name in ("hidden", "cell"), "the other direction"
        if bad != bad:
            assert torch.equal(ours[name].isnan(), expected.isnan()), name
    seen, expected_seen = (
        any(not bool(found[name].isfinite().all()) for name in ("output 1", "d_x", *dict(model.named_parameters())))
        for found in (ours, reference)
    )
    assert seen == expected_seen
    if bad != bad:
        assert all(bool(ours[name][1].isnan().any()) for name in ("output 1", "d_x", "layers.1.bias"))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_saturated_gates(dtype: torch.dtype | None, plain) -> None:
    model = random_lstm(37, 11, "wide", 2)
    with torch.no_grad():
        for layer in model.layers:
            layer.bias[:, ::3] += 40.0  # type: ignore[operator]
            layer.bias[:, 1::3] -= 60.0  # type: ignore[operator]
            layer.bias[:, 2::9] -= 200.0  # type: ignore[operator]
    x, state = random_inputs(model, 3, 5)
    ours, reference = results(model, x, state, dtype), plain(model, x, state, dtype)
    for name, expected in reference.items():
        assert bool(ours[name].isfinite().all()), name
        tolerance = 2e-5 if dtype is None else 0.06
        assert float((ours[name] - expected).norm()) <= tolerance * float(expected.norm()) + 1e-6, name


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_one_thread_and_two_give_the_same_bits(dtype: torch.dtype | None) -> None:
    model = random_lstm(512, 256, "wide", 2)
    x, state = random_inputs(model, 3, 3)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(results(model, x, state, dtype))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_rows_of_a_view_are_read_as_they_lie() -> None:
    model = random_lstm(37, 11, "wide", 2)
    x, state = random_inputs(model, 3, 5)
    expected = results(model, x, state)
    turned = LstmState(*(part.transpose(2, 3).contiguous().transpose(2, 3) for part in state))
    found = results(model, x.transpose(1, 2).contiguous().transpose(1, 2), turned)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
