"""Losses against a slow reference, and the draws of negatives."""

from __future__ import annotations

import math
from typing import get_args

import numpy as np
import pytest
import torch
from helpers import naive_bilm
from helpers.naive_bilm import close

from elmo_ray.config.softmax import SOFTMAX_KINDS, SoftmaxConfig
from elmo_ray.kernels.full_softmax import CHUNK, FullSoftmax
from elmo_ray.model.softmax import KINDS, full_losses, sampled_losses
from elmo_ray.training.noise import draw_negatives, log_expected_count


def one_direction(x, weight, bias, targets, target_logs, negatives, negative_logs, *more):
    arguments = (targets, target_logs, negatives, negative_logs)
    return sampled_losses(x[None], weight, bias, *(a[None] for a in arguments), *more)[0]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def test_each_kind_that_can_be_set_has_its_class_and_its_facts() -> None:
    settable = get_args(SoftmaxConfig.model_fields["kind"].annotation)
    assert list(settable) == list(SOFTMAX_KINDS) == list(KINDS)


@pytest.mark.parametrize("k", [1, 3, 8])
def test_sampled_losses_and_gradients(k: int) -> None:
    n, p, words = 6, 4, 12
    targets, negatives = [3, 0, 5, 3, 11, 7], [3, 5, 9, 0, 1, 2, 4, 10][:k]
    ours = [random(n, p, seed=1), random(words, p, seed=2), random(words, seed=3)]
    reference = [t.detach().clone().requires_grad_() for t in ours]
    logs = torch.log(0.05 + 0.07 * torch.arange(words, dtype=torch.float64))
    found = one_direction(
        ours[0], ours[1], ours[2], torch.tensor(targets), logs[targets], torch.tensor(negatives), logs[negatives]
    )
    x, weight, bias = reference
    expected = torch.stack(
        [
            naive_bilm.sampled_loss(x[i], weight, bias, t, negatives, logs[t].item(), logs[negatives].tolist())
            for i, t in enumerate(targets)
        ]
    )
    close(found, expected)
    if k == 1:
        assert float(found[0].detach()) == 0.0, "the only negative is the target: nothing is left to tell apart"
    scale = random(n, seed=4).detach()
    (found * scale).sum().backward()
    (expected * scale).sum().backward()
    for a, b in zip(ours, reference, strict=True):
        assert a.grad is not None and b.grad is not None and bool(a.grad.isfinite().all())
        close(a.grad, b.grad)


def test_full_losses_and_gradients() -> None:
    n, p, words = 5, 4, 7
    targets = [6, 0, -1, 3, 3]
    ours = [random(n, p, seed=1), random(words, p, seed=2), random(words, seed=3)]
    reference = [t.detach().clone().requires_grad_() for t in ours]
    found = full_losses(ours[0], ours[1], ours[2], torch.tensor(targets))
    expected = torch.stack(
        [
            naive_bilm.full_loss(reference[0][i], reference[1], reference[2], t) if t >= 0 else reference[0].sum() * 0.0
            for i, t in enumerate(targets)
        ]
    )
    close(found, expected)
    (found * torch.arange(1.0, 6.0)).sum().backward()
    (expected * torch.arange(1.0, 6.0)).sum().backward()
    for a, b in zip(ours, reference, strict=True):
        assert a.grad is not None and b.grad is not None
        close(a.grad, b.grad)


@pytest.mark.parametrize("words", [5, CHUNK, CHUNK + 1, 2 * CHUNK + 77])
def test_chunks_of_evaluation_give_the_full_softmax(words: int) -> None:
    x, weight, bias = (t.detach() for t in (random(9, 6, seed=1), random(words, 6, seed=2), random(words, seed=3)))
    targets = torch.tensor([0, words - 1, -1, words // 2, 1, 2, 3, -1, 4])
    softmax = FullSoftmax(weight, bias)
    close(softmax.losses(x, targets), full_losses(x, weight, bias, targets), 1e-12)
    big = softmax.losses(x * 1e4, targets)
    assert bool(big.isfinite().all()), "logits beyond exp's range"
    close(big, full_losses(x * 1e4, weight, bias, targets), 1e-12)
    single = FullSoftmax(weight.float(), bias.float()).losses(x.float(), targets)
    close(single.double(), full_losses(x, weight, bias, targets), 1e-5)
    low = FullSoftmax(weight.float(), bias.float(), torch.bfloat16).losses(x.float(), targets)
    assert low.dtype == torch.float32
    close(low.double(), full_losses(x, weight, bias, targets), 0.05)


def test_bf16_losses_are_close_to_fp32() -> None:
    x, weight, bias = (t.detach().float() for t in (random(20, 32, seed=1), random(60, 32, seed=2), random(60, seed=3)))
    targets, negatives, logs = torch.arange(20), torch.arange(15, 45), torch.zeros(60)
    exact = one_direction(x, weight, bias, targets, logs[targets], negatives, logs[negatives])
    low = one_direction(x, weight, bias, targets, logs[targets], negatives, logs[negatives], torch.bfloat16)
    assert low.dtype == torch.float32 and not torch.equal(low, exact)
    assert float((low - exact).abs().max()) < 0.15
    whole, whole_low = full_losses(x, weight, bias, targets), full_losses(x, weight, bias, targets, torch.bfloat16)
    assert float((whole - whole_low).abs().max()) < 0.15


def test_draws_are_distinct_and_a_function_of_their_arguments() -> None:
    first = draw_negatives(5, 9, 0, 1000, 64)
    assert len(set(first.ids.tolist())) == 64 and first.tries >= 64
    assert first.ids.min() >= 0 and first.ids.max() < 1000 and first.ids.dtype == np.int64
    again = draw_negatives(5, 9, 0, 1000, 64)
    assert again.ids.tolist() == first.ids.tolist() and again.tries == first.tries
    others = [draw_negatives(*a, 1000, 64).ids.tolist() for a in ((5, 9, 1), (5, 10, 0), (6, 9, 0), (5, 8, 1))]
    assert all(o != first.ids.tolist() for o in others)
    assert len({tuple(o) for o in others}) == 4


@pytest.mark.parametrize("count", [1, 2, 10, 63])
def test_fewer_negatives_are_the_first_of_more(count: int) -> None:
    more, fewer = draw_negatives(1, 2, 1, 300, 64), draw_negatives(1, 2, 1, 300, count)
    assert fewer.ids.tolist() == more.ids[:count].tolist()
    assert count <= fewer.tries < more.tries


@pytest.mark.parametrize("n_words", [1, 2, 3, 40])
def test_as_many_negatives_as_words(n_words: int) -> None:
    drawn = draw_negatives(3, 4, 0, n_words, n_words)
    assert sorted(drawn.ids.tolist()) == list(range(n_words)) and drawn.tries >= n_words


def test_negatives_are_the_first_distinct_draws() -> None:
    """One draw after another, also where many more than usual are needed, and in a table that was used before."""
    n_words, table = 200, np.full(200, -7)
    for step, count in ((0, 1), (1, 30), (2, 150), (3, 200)):
        random = np.random.Generator(np.random.Philox(key=[5, 2 * step + 1]))
        found: list[int] = []
        tries = 0
        while len(found) < count:
            draw = int(np.expm1(random.random() * math.log1p(n_words)))
            tries += 1
            if draw not in found:
                found.append(draw)
        for drawn in (draw_negatives(5, step, 1, n_words, count, table), draw_negatives(5, step, 1, n_words, count)):
            assert drawn.ids.tolist() == found and drawn.tries == tries


def test_draws_follow_the_log_uniform_law() -> None:
    n_words, n = 50, 40_000
    first = np.array([draw_negatives(1, step, 0, n_words, 1).ids[0] for step in range(n // 10)])
    expected = np.log1p(1.0 / (np.arange(n_words) + 1.0)) / np.log1p(n_words)
    assert abs(expected.sum() - 1.0) < 1e-12
    found = np.bincount(first, minlength=n_words) / len(first)
    sd = np.sqrt(expected * (1 - expected) / len(first))
    assert np.all(np.abs(found - expected) < 4.5 * sd)


def test_expected_counts() -> None:
    ids, n_words = np.array([0, 1, 17, 999, 793_470]), 793_471
    for tries in (1, 64, 16_049):
        p = [math.log((k + 2) / (k + 1)) / math.log(n_words + 1) for k in ids.tolist()]
        expected = [math.log(-math.expm1(tries * math.log1p(-q))) for q in p]
        found = log_expected_count(ids, tries, n_words)
        assert found.dtype == np.float32 and np.allclose(found, expected, rtol=1e-6, atol=1e-7)
