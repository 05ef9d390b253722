"""Text for the tests of training."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers.tiny_runs import write_corpus

Paths = tuple[Path, Path]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Paths:
    return write_corpus(tmp_path_factory.mktemp("text"), [120, 0, 90])


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("held-out"), [40], seed=77)[0]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tiny products are not worth a second thread, and on a busy machine they would wait for it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
