"""Autograd of parts that run side by side, gradients made together with results, and work that is put off."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch.autograd.function import once_differentiable

from elmo_ray.kernels.threads import Parted, place_for, put_off


@pytest.fixture
def threads() -> Iterator[Any]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


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


class _Product(torch.autograd.Function):
    """x @ weight, whose weight's gradient is put off."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, weight = ctx.saved_tensors
        into = place_for(weight)
        into.fill_(float("nan"))  # what nobody may read before it is done
        put_off(lambda: into.copy_((x.transpose(-1, -2) @ grads[0]).view(into.shape)))
        return grads[0] @ weight.transpose(-1, -2), into


def _model(count: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    shared, own = torch.randn(4, 6, generator=generator), torch.randn(2, 6, 3, generator=generator)
    return [x.requires_grad_() for x in (shared, own)], torch.randn(2, 5, 4, generator=generator)


@pytest.mark.parametrize("count", [1, 2])
def test_gradients_made_with_the_results_are_those_made_after_them(threads, count: int) -> None:
    threads(count)
    found = []
    for scale in (None, 0.7):
        (shared, own), xs = _model(count)

        def work(part: int, given: Sequence[torch.Tensor], xs: torch.Tensor = xs) -> torch.Tensor:
            return torch.tanh(_Product.apply(torch.tanh(_Product.apply(xs[part : part + 1], given[0])), given[1]))

        results = torch.cat(Parted.apply(work, 2, 1, scale, shared, own))
        (results.sum() * 0.7).backward()
        found.append((results.detach(), shared.grad, own.grad))
    (shared, own), xs = _model(count)
    expected = torch.tanh(torch.tanh(xs @ shared) @ own)
    (expected.sum() * 0.7).backward()
    for results, d_shared, d_own in found:
        torch.testing.assert_close(results, expected.detach())
        torch.testing.assert_close(d_shared, shared.grad)
        torch.testing.assert_close(d_own, own.grad)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("given", [0.5, 0.7])
def test_another_scale_than_was_said_is_an_error(threads, given: float) -> None:
    threads(2)
    (shared, own), xs = _model(2)
    results = Parted.apply(lambda part, ps: xs[part] @ ps[0] @ ps[1][0], 2, 1, 0.7, shared, own)
    loss = torch.stack(results).sum() * given
    if given == 0.7:
        loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="scale of 0.7"):
        loss.backward()


def test_a_parameter_used_twice_cannot_put_its_gradient_off(threads) -> None:
    threads(2)
    weight = torch.eye(3).expand(2, 3, 3).contiguous().requires_grad_()
    x = torch.ones(1, 2, 3)

    def work(part: int, given: Sequence[torch.Tensor]) -> torch.Tensor:
        return _Product.apply(_Product.apply(x, given[0]), given[0])

    results = Parted.apply(work, 2, 0, None, weight)
    with pytest.raises(RuntimeError, match="used twice"):
        torch.stack(results).sum().backward()
