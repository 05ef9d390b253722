"""A model that bilm-tf trained: its embeddings and its perplexity by our code (golden/model, golden/own_text)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from elmo_ray.checkpoints.bilm_tf.hdf5 import read_weights
from elmo_ray.checkpoints.bilm_tf.options import from_options, read_options
from elmo_ray.config import EvalConfig
from elmo_ray.data.corpus import Corpus
from elmo_ray.data.scan import index_shard
from elmo_ray.data.vocabulary import Vocabulary
from elmo_ray.elmo.encoder import embed_sentences
from elmo_ray.elmo.evaluation import EvaluationJob
from elmo_ray.evaluate import all_measures
from elmo_ray.model.bilm import BiLM

GOLDEN = Path(__file__).parents[1] / "golden"
MODEL = GOLDEN / "model"


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Products of a model this small take longer on two cores than on one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model() -> BiLM:
    config, _ = from_options(read_options(MODEL / "options_262.json"), "options_262.json", published=True)
    bilm = read_weights(MODEL / "weights.hdf5", config)
    with np.load(MODEL / "softmax.npz") as softmax:
        bilm.softmax_weight = torch.nn.Parameter(torch.from_numpy(softmax["W"]), requires_grad=False)
        bilm.softmax_bias = torch.nn.Parameter(torch.from_numpy(softmax["b"]), requires_grad=False)
    return bilm


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary.read(MODEL / "vocab.txt")


def compare_embeddings(model: BiLM, text: Path, golden: Path, carry: bool) -> None:
    lines = [line.split() for line in text.read_text(encoding="utf-8").split("\n")[:-1]]
    with np.load(golden) as expected:
        assert int(expected["n"]) == len(lines)
        for number, ours in enumerate(embed_sentences(model, lines, carry=carry)):
            reference = expected[str(number)]
            assert ours.shape == reference.shape == (3, len(lines[number]), 32)
            assert ours.dtype == np.float32
            np.testing.assert_allclose(ours, reference, rtol=0, atol=1e-5, err_msg=f"line {number}")


@pytest.mark.parametrize("mode", ["carry", "reset"])
def test_embeddings_of_our_own_text(model: BiLM, mode: str) -> None:
    folder = GOLDEN / "own_text"
    compare_embeddings(model, folder / "text.txt", folder / f"embeddings_{mode}.npz", mode == "carry")


@pytest.mark.parametrize("mode", ["carry", "reset"])
def test_embeddings_of_twenty_sentences(model: BiLM, mode: str, shared: Path) -> None:
    folder = shared / "golden" / "model"
    compare_embeddings(model, folder / "sentences20.txt", folder / f"embeddings20_{mode}.npz", mode == "carry")


def perplexity(model: BiLM, vocabulary: Vocabulary, text: Path, streams: int, positions: int) -> float:
    corpus = Corpus.from_shards([index_shard(str(text))])
    assert corpus.positions == positions
    job = EvaluationJob("unused", None, corpus, EvalConfig(streams=streams), "fail")
    (part,) = job.shares(1)
    return float(all_measures(job.measure(part, model, vocabulary), corpus)["perplexity"])


def test_perplexity_of_our_own_text_with_one_stream(model: BiLM, vocabulary: Vocabulary) -> None:
    found = perplexity(model, vocabulary, GOLDEN / "own_text" / "text.txt", 1, 412)
    assert found == pytest.approx(1494.413, abs=0.02)


@pytest.mark.slow
def test_perplexity_of_the_test_text_with_one_stream(model: BiLM, vocabulary: Vocabulary, shared: Path) -> None:
    found = perplexity(model, vocabulary, shared / "golden" / "model" / "ptb_test.txt", 1, 82430)
    assert found == pytest.approx(494.9245, abs=0.005)
