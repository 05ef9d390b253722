"""Directions beside each other and one after the other give the same bits."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from elmo_ray.config.model import LstmConfig
from elmo_ray.kernels.threads import run_parallel, threads_for_branches
from elmo_ray.model.lstm import BiLstm

CPU = torch.device("cpu")


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_run_parallel_gives_the_same_bits(threads) -> None:
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
            run_parallel(work, 2, CPU)


def test_between_parts_there_is_one_thread_and_parts_have_all(threads) -> None:
    threads(2)
    seen = {}
    with threads_for_branches():
        seen["between"] = torch.get_num_threads()
        names: list[str] = ["", ""]

        def work(part: int) -> None:
            names[part] = threading.current_thread().name

        run_parallel(work, 2, CPU)
    assert seen["between"] == 1 and torch.get_num_threads() == 2
    assert len(set(names)) == 2, "each part has its own thread"


def test_all_parts_have_ended_when_one_fails(threads) -> None:
    threads(2)
    ended = []

    def work(part: int) -> None:
        if part == 0:
            raise ValueError("of part 0")
        time.sleep(0.2)
        ended.append(part)

    with pytest.raises(ValueError, match="of part 0"):
        run_parallel(work, 2, CPU)
    assert ended == [1]
