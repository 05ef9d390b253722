"""A small model as a checkpoint, from which the tests of `embed` take vectors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.saved_models import WORDS, random_model, save_checkpoint
from helpers.tiny_runs import tiny_config

from elmo_ray.model.bilm import BiLM


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)  # of the tests' own process


@pytest.fixture(scope="module")
def model() -> BiLM:
    return random_model(tiny_config(), len(WORDS))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, model: BiLM) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("source") / "checkpoint", tiny_config(), WORDS, model)
