"""Batches without gradients: as large as a GPU bears, as ever on a CPU, and with the same results."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.tiny_runs import tiny_config, write_corpus

from elmo_ray.config import ModelConfig
from elmo_ray.data.corpus import Corpus
from elmo_ray.data.vocabulary import Vocabulary
from elmo_ray.elmo.batch_size import MOST_POSITIONS, bytes_of_position, positions_at_a_time, positions_in, rows_for
from elmo_ray.elmo.evaluation import Scorer
from elmo_ray.model.bilm import BiLM

FILTERS = [[1, 32], [2, 32], [3, 64], [4, 128], [5, 256], [6, 512], [7, 1024]]
ORIGINAL = ModelConfig.model_validate(
    {"char_cnn": {"filters": FILTERS, "n_highway": 2}, "lstm": {"dim": 4096, "projection_dim": 512}}
)
GB = 1 << 30


def test_a_batch_is_a_part_of_the_memory() -> None:
    assert positions_in(139 * GB, ORIGINAL) == MOST_POSITIONS, "an H200"
    assert positions_in(79 * GB, ORIGINAL) == 1 << 15, "an H100"
    assert positions_in(15 * GB, ORIGINAL) == 1 << 13, "a T4"
    for memory in (2 * GB, 15 * GB, 40 * GB):
        taken = positions_in(memory, ORIGINAL) * bytes_of_position(ORIGINAL)
        assert memory / 8 < taken <= memory / 4
    smaller = tiny_config().model
    assert bytes_of_position(smaller) < bytes_of_position(ORIGINAL) / 100
    assert positions_in(15 * GB, smaller) == MOST_POSITIONS
    one_way = ORIGINAL.model_copy(update={"bidirectional": False})
    words = ModelConfig.model_validate({"input": "words", "lstm": {"dim": 4096, "projection_dim": 512}})
    assert bytes_of_position(words) < bytes_of_position(ORIGINAL)
    assert bytes_of_position(one_way) < bytes_of_position(ORIGINAL)


def test_a_cpu_computes_what_it_did() -> None:
    cpu = torch.device("cpu")
    assert positions_at_a_time(cpu, ORIGINAL, 4096) == 4096
    assert rows_for(4096, 128, cpu) == 128
    assert rows_for(1 << 16, 128, torch.device("cuda")) == 2048
    assert rows_for(1 << 11, 128, torch.device("cuda")) == 128


@pytest.mark.parametrize("by_sentence", [False, True])
def test_large_batches_measure_the_same(tmp_path: Path, by_sentence: bool) -> None:
    config = tiny_config()
    index, words = write_corpus(tmp_path, [400, 300])
    corpus, vocabulary = Corpus.load(index), Vocabulary.read(words)
    model = BiLM(config.model, config.softmax, vocabulary.size).double()
    model.reset_parameters(3)
    found = []
    for positions, rows in ((64, 4), (4096, 128), (1 << 16, 2048)):
        scorer = Scorer(model, vocabulary, corpus, positions=positions)
        blocks, streams = range(len(corpus)), range(40)
        totals = scorer.sentences(blocks, rows) if by_sentence else scorer.streams(streams, 40, rows)
        assert totals.positions.sum() == corpus.positions
        found.append(totals.nats.sum(axis=2))
    for others in found[1:]:
        assert others == pytest.approx(found[0], rel=1e-10)
