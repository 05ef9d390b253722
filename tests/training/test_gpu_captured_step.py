"""Training steps made of a GPU's kernels, captured, against the plain model: each kind of model that there is.

On a GPU they are CUDA graphs; in Triton's interpreter a replay is a call of the function.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from helpers.gpu import DEVICE
from helpers.tiny_runs import WORDS_TIED, WORDS_UNTIED, tiny_config
from test_capacities import inputs, model_of, text
from test_captured_step import outcome

from elmo_ray import kernels
from elmo_ray.config import PretrainConfig
from elmo_ray.data.corpus import Corpus
from elmo_ray.data.vocabulary import Vocabulary
from elmo_ray.model.bilm import BiLM
from elmo_ray.training.captured_step import captured_by
from elmo_ray.training.cuda_graphs import CudaGraphs, Record, play, why_not_captured
from elmo_ray.training.step import TrainStep

pytestmark = pytest.mark.gpu

__all__ = ["text"]

TINY_CNN = {"filters": [[1, 4], [2, 4], [3, 8]], "embedding_dim": 4, "max_characters": 16, "n_highway": 1}
CASES: dict[str, tuple[dict[str, Any], set[str]]] = {
    "bf16": ({"train__precision": "bf16"}, set()),
    "float32": ({}, set()),
    "tanh CNN": ({"model__char_cnn": {**TINY_CNN, "activation": "tanh"}}, set()),
    "one direction": ({"model__bidirectional": False}, set()),
    "no projection": ({"model__lstm": {"dim": 8, "projection_dim": 8}}, set()),
    "words": (WORDS_UNTIED, {"word_features", "highway"}),
    "words, tied": (WORDS_TIED, {"word_features", "highway"}),
    "full softmax": ({"softmax__kind": "full", "softmax__negatives": None}, {"sampled_losses"}),
    "accumulated": ({"train__accumulate": 2}, set()),
    # a small rate: it divides even the smallest gradient by its own size, and those differ by rounding
    "adamw": ({"optim__name": "adamw", "optim__lr": 0.001}, {"dense_adagrad"}),
    "sgd": ({"optim__name": "sgd"}, {"adagrad", "dense_adagrad"}),
    "features go into the LSTM": ({"model__char_cnn": {**TINY_CNN, "projection": False}}, set()),
    "frozen": ({"train__softmax_first": 1, "train__freeze": ["highway"]}, set()),
}
"""Changes of the configuration, and the kernels that such a model has no use for."""
KERNELS = {"lstm_window", "word_features", "highway", "gather_rows", "sampled_losses", "adagrad", "dense_adagrad"}


SMALL = {"data__streams": 2, "train__unroll": 3, "softmax__negatives": 6}
STEPS = 2  # the interpreter takes seconds for each


def step_of(config: PretrainConfig, words: Vocabulary, record: Record | None) -> TrainStep:
    model = model_of(config, words).to(DEVICE)
    return TrainStep(config, model, config.data.streams, total_steps=6, capture=captured_by(record))


def record() -> Record:
    return CudaGraphs(DEVICE) if DEVICE.type == "cuda" else play


@pytest.mark.parametrize(("changes", "without"), CASES.values(), ids=CASES.keys())
def test_captured_steps_are_the_plain_ones(
    text: tuple[Corpus, Vocabulary], changes: dict[str, Any], without: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {}
    used = set()
    for name in KERNELS:
        given = getattr(kernels, name)

        def asked(*arguments: Any, name: str = name, given: Any = given) -> Any:
            if function := given(*arguments):
                used.add(name)
            return function

        monkeypatch.setattr(kernels, name, asked)
    for kind, setting in (("plain", "off"), ("captured", "auto")):
        config = tiny_config(**{"train__dropout": 0.0, **SMALL, **changes, "train__kernels": setting})
        step = step_of(config, text[1], None if kind == "plain" else record())
        given = itertools.islice(inputs(config, text), STEPS if DEVICE.type == "cpu" else None)
        found[kind] = outcome(step, (pair[kind != "plain"].to(DEVICE) for pair in given))
        assert (used == KERNELS - without) if kind != "plain" else not used
    assert not CudaGraphs.failed
    tolerance = 0.05 if "train__precision" in changes else 2e-4
    for name, value in found["plain"].items():
        ours = found["captured"][name]
        assert float((ours - value).abs().max()) <= tolerance * max(1.0, float(value.abs().max())), name


def test_dropout_is_drawn_anew_and_reproducibly(text: tuple[Corpus, Vocabulary]) -> None:
    config = tiny_config(**SMALL, train__dropout=0.5)
    found = []
    for _ in range(2):
        step = step_of(config, text[1], record())
        batch = next(inputs(config, text))[1].to(DEVICE)
        losses = []
        for number in (0, 1, 0):
            with torch.no_grad():
                for name, value in model_of(config, text[1]).named_parameters():
                    dict(step.model.named_parameters())[name].copy_(value)
            step.state = step.model.lstm.zero_state(config.data.streams, like=step.state.hidden)
            batch.step = number
            losses.append(step.run(batch).loss_sums)
        found.append(torch.stack(losses))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0][0], found[0][2]) and not torch.equal(found[0][0], found[0][1])


def test_filters_that_are_too_wide_run_plainly() -> None:
    config = tiny_config(model__char_cnn={**TINY_CNN, "embedding_dim": 500})
    model = BiLM(config.model, config.softmax, 100).to(DEVICE)
    assert why_not_captured(config, model) == "the windows of model.char_cnn.filters are too large for the kernel"
    config = tiny_config()
    assert why_not_captured(config, BiLM(config.model, config.softmax, 100).to(DEVICE)) is None
    assert why_not_captured(tiny_config(**WORDS_TIED), BiLM(config.model, config.softmax, 100).to(DEVICE)) is None


@pytest.mark.skipif(DEVICE.type != "cuda", reason="captures are a GPU's")
def test_a_capture_that_fails_leaves_plain_steps(
    text: tuple[Corpus, Vocabulary], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last test of its file, for the process captures nothing after it."""
    config = tiny_config()
    batches = [padded.to(DEVICE) for _, padded in inputs(config, text)]
    expected = outcome(step_of(config, text[1], play), iter(batches))
    step = step_of(config, text[1], CudaGraphs(DEVICE))
    losses_of = step.losses_of

    def waiting(*arguments: Any) -> Any:
        sums, state = losses_of(*arguments)
        sums.sum().item()  # waits for the device, which a capture cannot
        return sums, state

    monkeypatch.setattr(step, "losses_of", waiting)
    found = outcome(step, iter(batches))
    assert caplog.text.count("no CUDA graphs from here on") == 1
    assert all(torch.equal(found[name], value) for name, value in expected.items())
