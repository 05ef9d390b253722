"""Sizes of a training beside those of its text and of the machine."""

from __future__ import annotations

import logging

import pytest
from helpers.tiny_runs import tiny_config

from elmo_ray import machine
from elmo_ray.errors import ConfigError
from elmo_ray.training.sizes import WorkerMemory, check_memory, check_streams, worker_memory


def test_streams_beside_the_positions_of_an_epoch(caplog: pytest.LogCaptureFixture) -> None:
    config = tiny_config(data__streams=100, train__unroll=10)
    check_streams(config, 4000)
    assert not caplog.records
    check_streams(config, 3999)
    assert (
        "data.streams=100: a stream has 39 positions of an epoch, 4.0 windows of train.unroll=10; data.streams=39 "
        in (caplog.text)
    )
    check_streams(config, 100)
    with pytest.raises(ConfigError, match=r"data\.streams=100: an epoch has 99 positions, fewer than streams; set"):
        check_streams(config, 99)
    # An estimate may be wrong by far.
    check_streams(config, 99, exact=False)
    with pytest.raises(ConfigError, match="an epoch has about 24 positions"):
        check_streams(config, 24, exact=False)


def test_memory_beside_that_of_the_machine(caplog: pytest.LogCaptureFixture) -> None:
    config = tiny_config(data__streams=100)
    memory = WorkerMemory({}, {"parameters": 10, "text": 90})
    check_memory(config, memory, 100, "this machine")
    assert not caplog.records
    check_memory(config, memory, 99, "this machine")
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and "lower data.streams=100 or data.block_bytes=" in record.getMessage()
    check_memory(config, memory, 50, "this machine")
    with pytest.raises(
        ConfigError, match=r"a worker needs about 100 B of memory \(90 B for text\), and this machine has "
    ):
        check_memory(config, memory, 49, "this machine")


@pytest.mark.parametrize(
    ("largest", "cure"),
    [
        ("softmax", "set data.max_vocab, or lower model.lstm.projection_dim=8"),
        ("lstm.1", "lower model.lstm.dim=16 or model.lstm.n_layers=2"),
        ("highway", "lower the counts in model.char_cnn.filters=[["),
    ],
)
def test_the_cure_is_about_the_largest_component(largest: str, cure: str) -> None:
    parts = {"softmax": 1, "lstm.0": 1, "lstm.1": 1, "char_cnn": 1, "highway": 1, largest: 9}
    with pytest.raises(ConfigError) as caught:
        check_memory(tiny_config(), WorkerMemory(parts, {"parameters": 100}), 1, "this machine")
    assert cure in str(caught.value)


def test_small_blocks_need_less_memory() -> None:
    config = tiny_config(data__streams=100, data__block_bytes=131072)
    large, small = worker_memory(config, 50), worker_memory(config, 50, 1000)
    assert large.uses["text"] - small.uses["text"] == 100 * 3 * 6 * (131072 - 1000)
    assert large.parameters == small.parameters and sum(large.parameters.values()) > 0


def test_memory_of_this_machine() -> None:
    assert 1 << 28 < machine.total_memory() < 1 << 50
