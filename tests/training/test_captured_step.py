"""Captured steps as they run on a CPU, where a replay is a call of the function: they are the plain steps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers.tiny_runs import WORDS_TIED, WORDS_UNTIED, tiny_config
from test_capacities import STEPS, inputs, model_of, text

from elmo_ray.config import PretrainConfig
from elmo_ray.data.corpus import Corpus
from elmo_ray.data.vocabulary import Vocabulary
from elmo_ray.model.bilm import BiLM
from elmo_ray.training.captured_step import captured_by
from elmo_ray.training.cuda_graphs import play, record_for, why_not_captured
from elmo_ray.training.step import TrainStep
from elmo_ray.training.step_input import StepInput

__all__ = ["text"]

Text = tuple[Corpus, Vocabulary]

WIDE: dict[str, Any] = {
    "filters": [[1, 4], [2, 8]], "embedding_dim": 4, "max_characters": 16, "n_highway": 1, "projection": False
}  # fmt: skip
FULL: dict[str, Any] = {"softmax__kind": "full", "softmax__negatives": None}
EXACT: dict[str, Any] = {"train__precision": "fp64"}
CASES: dict[str, dict[str, Any]] = {
    "characters": {},
    "dropout": {**EXACT, "train__dropout": 0.3},
    "accumulated": {**EXACT, "train__accumulate": 2, "train__dropout": 0.3, "data__streams": 5},
    "words": {**EXACT, **WORDS_UNTIED},
    "words, tied": {**EXACT, **WORDS_TIED},
    "full softmax": {**EXACT, **FULL},
    "adamw": {**EXACT, "optim__name": "adamw", "optim__lr": 0.01},
    "a schedule": {
        **EXACT,
        "optim__schedule": {"kind": "cosine", "warmup_steps": 2},
        "optim__part_lr": {"softmax": 0.1},
    },
    "softmax first": {**EXACT, "train__softmax_first": 2, "train__freeze": ["highway"]},
    "clipped": {**EXACT, "optim__clip_norm": 0.1},
    "one direction": {**EXACT, "model__bidirectional": False},
    "sgd": {**EXACT, "optim__name": "sgd", "optim__schedule": {"kind": "plateau"}, "data__valid": "unused.txt"},
    "sgd, momentum": {**EXACT, **FULL, "optim__name": "sgd", "optim__momentum": 0.9},
    "dropout by place": {**EXACT, "train__dropout": (0.0, 0.5, 0.3)},
    "features go into the LSTM": {**EXACT, "model__lstm": {"dim": 8, "projection_dim": 4}, "model__char_cnn": WIDE},
}


def step_of(config: PretrainConfig, text: Text, captured: bool) -> TrainStep:
    capture = captured_by(play if captured else None)
    return TrainStep(config, model_of(config, text[1]), config.data.streams, total_steps=STEPS, capture=capture)


def outcome(step: TrainStep, batches: Iterator[StepInput]) -> dict[str, torch.Tensor]:
    """Of training on these: losses, norms, parameters, slots and state."""
    losses, norms = [], []
    for batch in batches:
        step.begin(batch.step)
        output = step.run(batch)
        losses.append(output.loss_sums)
        norms.append(output.norm)
    found = {**dict(step.model.named_parameters()), **step.optimizer.state_tensors(), **step.state._asdict()}
    results = {"losses": torch.stack(losses), "norms": torch.stack(norms)}
    return results | {name: value.detach() for name, value in found.items()}


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES.keys())
def test_captured_steps_are_the_plain_ones(text: Text, changes: dict[str, Any]) -> None:
    config = tiny_config(**{"train__dropout": 0.0, **changes})
    expected = outcome(step_of(config, text, captured=False), (plain for plain, _ in inputs(config, text)))
    found = outcome(step_of(config, text, captured=True), (padded for _, padded in inputs(config, text)))
    tolerance = 1e-10 if config.train.precision == "fp64" else 1e-5
    for name, value in expected.items():
        assert torch.allclose(found[name], value, rtol=tolerance, atol=tolerance), name
    again = outcome(step_of(config, text, captured=True), (padded for _, padded in inputs(config, text)))
    assert all(torch.equal(again[name], value) for name, value in found.items())


def test_results_outlive_the_next_step(text: Text) -> None:
    config = tiny_config()
    step = step_of(config, text, captured=True)
    outputs = [step.run(padded) for _, padded in inputs(config, text)]
    for kept in zip(*((o.loss_sums, o.norm, o.finite) for o in outputs), strict=True):
        assert len({tensor.data_ptr() for tensor in kept}) == STEPS


def test_a_step_that_is_not_finite_changes_nothing(text: Text) -> None:
    config = tiny_config(train__accumulate=2)
    step = step_of(config, text, captured=True)
    batches = [padded for _, padded in inputs(config, text)]
    step.run(batches[0])
    weight = step.model.softmax_weight
    assert isinstance(weight, torch.Tensor)
    good = weight.detach().clone()
    with torch.no_grad():
        weight[:, 1] = torch.nan
    before = {
        n: p.detach().clone() for n, p in (*step.model.named_parameters(), *step.optimizer.state_tensors().items())
    }
    state = step.state
    assert not bool(step.run(batches[1]).finite)
    after = {**dict(step.model.named_parameters()), **step.optimizer.state_tensors()}
    assert all(torch.equal(value.nan_to_num(7.0), after[name].nan_to_num(7.0)) for name, value in before.items())
    assert all(torch.equal(old, new) for old, new in zip(state, step.state, strict=True))
    with torch.no_grad():
        weight.copy_(good)
    assert bool(step.run(batches[2]).finite), "the accumulated gradients have none of the bad ones"


def test_whoever_keeps_what_was_made_of_a_weight_sees_that_it_changed(text: Text) -> None:
    config = tiny_config()
    step = step_of(config, text, captured=True)
    before = {name: value._version for name, value in step.optimizer.values.items()}
    step.run(next(inputs(config, text))[1])
    assert all(value._version > before[name] for name, value in step.optimizer.values.items())


NOT_CAPTURED: dict[str, tuple[dict[str, Any], str]] = {
    "fp64": (EXACT, "train.precision=fp64 has no kernels"),
    "adaptive": (
        {"softmax__kind": "adaptive", "softmax__negatives": None},
        "softmax.kind=adaptive has shapes that depend on the words",
    ),
}


@pytest.mark.parametrize(("changes", "reason"), NOT_CAPTURED.values(), ids=NOT_CAPTURED.keys())
def test_what_is_not_captured(changes: dict[str, Any], reason: str) -> None:
    config = tiny_config(**changes)
    assert why_not_captured(config, BiLM(config.model, config.softmax, 100)) == reason


def test_nothing_is_captured_on_a_cpu(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    config = tiny_config()
    assert record_for(config, BiLM(config.model, config.softmax, 100)) is None
    assert not caplog.records, "that is no surprise"
