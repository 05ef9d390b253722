"""Masks are a function of (seed, step, rank), fresh at every call, and of the right size."""

from __future__ import annotations

import torch

from elmo_ray.model.dropout import Dropout

CPU = torch.device("cpu")


def test_same_arguments_give_the_same_masks_in_the_same_order() -> None:
    ones = torch.ones(3, 4, 5)
    first, second = (Dropout(0.3, 7, 11, 2, CPU) for _ in range(2))
    torch.manual_seed(5)
    masks = [first(ones) for _ in range(3)]
    torch.manual_seed(6)
    assert all(torch.equal(mask, second(ones)) for mask in masks)
    assert not torch.equal(masks[0], masks[1]) and not torch.equal(masks[1], masks[2])


def test_seed_step_and_rank_each_change_the_mask() -> None:
    ones = torch.ones(200)
    seen = {
        tuple(Dropout(0.5, seed, step, rank, CPU)(ones).tolist())
        for seed in (0, 1, 2**31)
        for step in range(40)
        for rank in range(4)
    }
    assert len(seen) == 3 * 40 * 4


def test_scaled_so_that_the_mean_stays() -> None:
    ones = torch.ones(400, 500)
    dropped = Dropout(0.1, 1, 0, 0, CPU)(ones)
    assert sorted(set(dropped.flatten().tolist())) == [0.0, float(torch.tensor(1.0) / 0.9)]
    assert abs(float((dropped == 0).float().mean()) - 0.1) < 0.005
    assert abs(float(dropped.mean()) - 1.0) < 0.005


def test_neighbouring_steps_have_independent_masks() -> None:
    ones = torch.ones(20_000)
    kept = torch.stack([Dropout(0.5, 3, step, 0, CPU)(ones) > 0 for step in range(20)]).double()
    correlation = torch.corrcoef(kept) - torch.eye(20, dtype=torch.float64)
    assert float(correlation.abs().max()) < 0.04  # some 5 standard deviations


def test_gradient_passes_through_what_is_kept() -> None:
    x = torch.randn(50, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    Dropout(0.4, 1, 2, 3, CPU)(x).sum().backward()
    mask = Dropout(0.4, 1, 2, 3, CPU)(torch.ones(50, dtype=torch.float64))
    assert torch.equal(torch.as_tensor(x.grad), mask)


def test_the_two_directions_have_masks_of_their_own() -> None:
    kept = (Dropout(0.5, 3, 0, 0, CPU)(torch.ones(2, 20_000)) > 0).double()
    assert abs(float(torch.corrcoef(kept)[0, 1])) < 0.04
