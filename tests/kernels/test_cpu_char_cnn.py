"""A CPU's compiled character CNN against the plain one: values, gradients, what is frozen, what is not finite."""

from __future__ import annotations

from typing import Literal

import pytest
import torch

from elmo_ray import kernels
from elmo_ray.config.model import CharCnnConfig
from elmo_ray.data.characters import N_CHARACTERS
from elmo_ray.kernels.cpu import loops as cpu_kernels
from elmo_ray.kernels.cpu.char_cnn import _largest
from elmo_ray.model.char_cnn import CharCnn

pytestmark = pytest.mark.skipif(cpu_kernels.numba is None, reason="Numba is not installed")

PADDING = 260


def random_cnn(activation: Literal["relu", "tanh"] = "relu", n_highway: int = 2) -> CharCnn:
    """With 45 filters, and a projection."""
    config = CharCnnConfig(
        filters=((1, 7), (2, 11), (5, 27)),
        activation=activation,
        embedding_dim=5,
        max_characters=20,
        n_highway=n_highway,
    )
    cnn, generator = CharCnn(config, 13), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in cnn.parameters():
            parameter.normal_(0.0, 0.5, generator=generator)
    return cnn


def random_types(words: int) -> tuple[torch.Tensor, tuple[tuple[int, int], ...]]:
    """Words of which the first third fits into 12 columns, with the widest filter's window of padding."""
    generator = torch.Generator().manual_seed(2)
    types = torch.randint(0, 256, (words, 20), generator=generator)
    short = words // 3
    types[:short, 7:] = PADDING
    types[short:, 17:] = PADDING
    return types, ((short, 12), (words - short, 20)) if short else ((words, 20),)


def results(cnn: CharCnn, words: int, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    types, classes = random_types(words)
    vectors = cnn(types, classes, dtype)
    weights = torch.randn(vectors.shape, generator=torch.Generator().manual_seed(3))
    parameters = {name: p for name, p in cnn.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad((vectors * weights).sum(), list(parameters.values()))
    return {"vectors": vectors.detach()} | dict(zip(parameters, gradients, strict=True))


@pytest.fixture
def plain():
    """`results` by the plain model."""

    def of(*arguments) -> dict[str, torch.Tensor]:
        with kernels.using("off"):
            return results(*arguments)

    return of


@pytest.mark.parametrize("words", [1, 31, 33, 63, 64, 101, 130])
@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_values_and_gradients(activation: Literal["relu", "tanh"], words: int, plain) -> None:
    cnn = random_cnn(activation)
    for dtype, tolerance in ((None, 1e-5), (torch.bfloat16, 0.03)):
        ours, reference = results(cnn, words, dtype), plain(cnn, words, dtype)
        for name, expected in reference.items():
            assert ours[name].dtype == torch.float32 and ours[name].shape == expected.shape, name
            assert float((ours[name] - expected).norm()) <= tolerance * float(expected.norm()), name


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_graph_that_is_kept_gives_the_same_gradients_again(dtype: torch.dtype | None) -> None:
    cnn = random_cnn()
    types, classes = random_types(70)
    loss = cnn(types, classes, dtype).square().sum()
    first, again = (torch.autograd.grad(loss, list(cnn.parameters()), retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("words", [40, 70])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_frozen_weights_change_no_other_gradient(dtype: torch.dtype | None, words: int) -> None:
    cnn = random_cnn()
    whole = results(cnn, words, dtype)
    for kept in ({"embedding"}, {"filters.1"}, {"highways.0.carry_bias", "highways.1.transform_weight"}):
        for name, parameter in cnn.named_parameters():
            parameter.requires_grad_(name in kept)
        found = results(cnn, words, dtype)
        assert found.keys() == {"vectors", *kept}
        assert all(torch.equal(found[name], whole[name]) for name in found)
    types, classes = random_types(words)
    with torch.no_grad():
        assert torch.equal(cnn(types, classes, dtype), whole["vectors"])


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(
    "where",
    [
        "embedding",
        "filters.2",
        "filter_biases.0",
        "highways.0.carry_weight",
        "highways.1.transform_bias",
        "projection_weight",
    ],
)
def test_what_is_not_finite_is_seen(where: str, bad: float, dtype: torch.dtype | None, plain) -> None:
    """Vectors that are not finite on the plain path are not finite here, and some gradient is not."""
    cnn = random_cnn()
    types, _ = random_types(70)
    with torch.no_grad():
        dict(cnn.named_parameters())[where].view(-1)[int(types[40, 3]) * 5 if where == "embedding" else 3] = bad
    ours, reference = results(cnn, 70, dtype), plain(cnn, 70, dtype)
    assert torch.equal(ours["vectors"].isfinite(), reference["vectors"].isfinite())
    if bad != bad:
        assert torch.equal(ours["vectors"].isnan(), reference["vectors"].isnan())
        assert bool(ours["vectors"].isnan().any())
        assert any(bool(ours[name].isnan().any()) for name in ours if name != "vectors")


def of_one_thread_and_two(dtype: torch.dtype | None) -> list[dict[str, torch.Tensor]]:
    cnn, before, found = random_cnn(), torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(results(cnn, 130, dtype))
    finally:
        torch.set_num_threads(before)
    return found


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_one_thread_takes_the_whole(dtype: torch.dtype | None) -> None:
    one, two = of_one_thread_and_two(dtype)
    near = 1e-5 if dtype is None else 0.03
    for name, whole in one.items():
        torch.testing.assert_close(two[name], whole, rtol=near, atol=near * float(whole.abs().max()))


@pytest.mark.parametrize("windows", [1, 256, 257, 998])
def test_words_of_many_windows(windows: int) -> None:
    generator = torch.Generator().manual_seed(4)
    types = torch.randint(0, N_CHARACTERS, (3, windows + 2), generator=generator)
    embedding = torch.randn(N_CHARACTERS, 4, generator=generator).requires_grad_()
    filters = torch.randn(300, 4, 3, generator=generator).requires_grad_()
    weight = filters.permute(2, 1, 0).reshape(12, 300)
    found = _largest([types], embedding, filters, None)
    expected = (torch.nn.functional.embedding(types.unfold(1, 3, 1), embedding).flatten(2) @ weight).max(dim=1).values
    torch.testing.assert_close(found, expected)
    gradient = torch.randn(found.shape, generator=generator)
    for ours, reference in zip(
        *(torch.autograd.grad(x, [embedding, filters], gradient) for x in (found, expected)), strict=True
    ):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-5)
