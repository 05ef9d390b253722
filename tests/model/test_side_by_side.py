"""Directions beside each other and one after the other give the same bits."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import pytest
import torch

from elmo_ray.config import LstmConfig
from elmo_ray.model.lstm import BiLstm
from elmo_ray.model.parted import Parted
from elmo_ray.model.side_by_side import side_by_side, threads_for_parts

CPU = torch.device("cpu")


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_side_by_side_gives_the_same_bits(threads) -> None:
    lstm = BiLstm(LstmConfig(dim=64, projection_dim=32, n_layers=2), 2)
    lstm.reset_parameters(torch.Generator().manual_seed(1))
    x = torch.randn(2, 6, 5, 32, generator=torch.Generator().manual_seed(2)).requires_grad_()

    def gradients() -> tuple[torch.Tensor, ...]:
        outputs, state = lstm(x, lstm.zero_state(5, like=x))
        return (outputs[-1], *state, *torch.autograd.grad(outputs[-1].square().sum(), [x, *lstm.parameters()]))

    threads(1)
    alone = gradients()
    threads(2)
    together = gradients()
    assert torch.get_num_threads() == 2, "the caller keeps its threads"
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_an_error_in_a_direction_is_the_callers(threads) -> None:
    def work(direction: int) -> None:
        assert not torch.is_grad_enabled()
        if direction == 1:
            raise ValueError("of direction 1")

    for count in (1, 2):
        threads(count)
        with pytest.raises(ValueError, match="of direction 1"):
            side_by_side(work, 2, CPU)


def test_between_parts_there_is_one_thread_and_parts_have_all(threads) -> None:
    threads(2)
    seen = {}
    with threads_for_parts():
        seen["between"] = torch.get_num_threads()
        names: list[str] = ["", ""]

        def work(part: int) -> None:
            names[part] = threading.current_thread().name

        side_by_side(work, 2, CPU)
    assert seen["between"] == 1 and torch.get_num_threads() == 2
    assert len(set(names)) == 2, "each part has its own thread"


def test_parted_gives_values_and_gradients_of_the_parts(threads) -> None:
    threads(2)
    generator = torch.Generator().manual_seed(1)
    weight, frozen = (torch.randn(4, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    weight.requires_grad_()
    xs = torch.randn(2, 5, 4, generator=generator, dtype=torch.float64)

    def work(part: int, parameters: Sequence[torch.Tensor]) -> torch.Tensor:
        weight, frozen = parameters
        return torch.tanh(xs[part] @ weight) + xs[part] @ frozen

    whole = torch.tanh(xs @ weight) + xs @ frozen
    parts = torch.stack(Parted.apply(work, 2, 2, None, weight, frozen))
    assert torch.equal(parts, whole)
    (expected,) = torch.autograd.grad(whole.square().sum(), weight)
    loss = parts.square().sum()
    (once,) = torch.autograd.grad(loss, weight, retain_graph=True)
    (twice,) = torch.autograd.grad(loss, weight)
    torch.testing.assert_close(once, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(once, twice)


def test_a_hook_of_a_parameter_sees_one_gradient(threads) -> None:
    threads(2)
    weight = torch.ones(3, requires_grad=True)
    calls = []

    def hook(gradient: torch.Tensor) -> torch.Tensor:
        calls.append(threading.current_thread())
        return gradient * 0.1

    weight.register_hook(hook)
    parts = Parted.apply(lambda part, parameters: (part + 1.0) * parameters[0], 2, 1, None, weight)
    (parts[0].sum() + parts[1].sum()).backward()
    assert calls == [threading.current_thread()]
    torch.testing.assert_close(weight.grad, torch.full((3,), 0.3))


def test_all_parts_have_ended_when_one_fails(threads) -> None:
    threads(2)
    ended = []

    def work(part: int) -> None:
        if part == 0:
            raise ValueError("of part 0")
        time.sleep(0.2)
        ended.append(part)

    with pytest.raises(ValueError, match="of part 0"):
        side_by_side(work, 2, CPU)
    assert ended == [1]


def test_parts_have_slices_of_their_own_of_what_is_not_shared(threads) -> None:
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    shared, frozen, own, own_frozen = random(4, 3), random(3), random(2, 5, 4), random(2, 3)
    shared.requires_grad_()
    own.requires_grad_()

    def work(part: int, parameters: Sequence[torch.Tensor]) -> torch.Tensor:
        shared, frozen, own, own_frozen = parameters
        assert own.shape == (1, 5, 4) and own_frozen.shape == (1, 3)
        assert [p.requires_grad for p in parameters] == [torch.is_grad_enabled(), False, torch.is_grad_enabled(), False]
        return torch.tanh(own[0] @ shared + frozen) * own_frozen * (part + 1)

    whole = torch.tanh(own @ shared + frozen) * own_frozen[:, None] * torch.tensor([1.0, 2.0])[:, None, None]
    weights = random(2, 5, 3)
    expected = torch.autograd.grad((whole * weights).sum(), [shared, own])
    found = []
    for count in (1, 2):
        threads(count)
        parts = torch.stack(Parted.apply(work, 2, 2, None, shared, frozen, own, own_frozen))
        assert torch.equal(parts, whole)
        loss = (parts * weights).sum()
        found += [torch.autograd.grad(loss, [shared, own], retain_graph=True) for _ in range(2)]
    for gradients in found:
        for ours, first, reference in zip(gradients, found[0], expected, strict=True):
            assert torch.equal(ours, first) and ours.is_contiguous()
            torch.testing.assert_close(ours, reference, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        assert torch.equal(torch.stack(Parted.apply(work, 2, 2, None, shared, frozen, own, own_frozen)), whole)
