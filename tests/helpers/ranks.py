"""Processes of torch.distributed for tests, which end within a time or fail the test."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch


def run_ranks(function: Callable[..., None], arguments: tuple[Any, ...], world: int, limit_s: float = 200.0) -> None:
    """Run function(rank, *arguments) in `world` processes to their end; fail the test after limit_s seconds."""
    context = torch.multiprocessing.spawn(function, args=arguments, nprocs=world, join=False)  # type: ignore
    deadline = time.monotonic() + limit_s
    while not context.join(timeout=5):
        if time.monotonic() > deadline:
            for process in context.processes:
                process.kill()
            pytest.fail("still running")
