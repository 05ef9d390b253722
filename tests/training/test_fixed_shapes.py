"""Padded step inputs: few shapes, and the same training to the last row."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny_runs import WORDS_TIED, WORDS_UNTIED, tiny_config, write_corpus

from elmo_ray.config import PretrainConfig
from elmo_ray.data.characters import PADDING
from elmo_ray.data.corpus import Corpus
from elmo_ray.data.encode import thread_source
from elmo_ray.data.streams import StreamCursors, StreamLoader, StreamPlan
from elmo_ray.data.vocabulary import Vocabulary
from elmo_ray.elmo.scoring import character_table
from elmo_ray.model.bilm import TABLES, BiLM
from elmo_ray.training.feeding import StepAssembler
from elmo_ray.training.graphs import FixedShapes
from elmo_ray.training.ranks import Exchange, Flags
from elmo_ray.training.step import DTYPES, TrainStep
from elmo_ray.training.step_input import StepInput

FULL: dict[str, Any] = {"softmax__kind": "full", "softmax__negatives": None}
CASES: dict[str, dict[str, Any]] = {
    "characters": {},
    "characters, dropout, adamw": {"train__dropout": 0.3, "optim__name": "adamw", "optim__lr": 0.01},
    "characters, full": FULL,
    "forward only": {"model__bidirectional": False},
    "words": WORDS_UNTIED,
    "words, tied": WORDS_TIED,
    "words, full": {**WORDS_UNTIED, **FULL},
    "in parts": {"train__accumulate": 2},
}
STEPS = 6


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> tuple[Corpus, Vocabulary]:
    return make_text(tmp_path_factory.mktemp("text"))


def make_text(folder: Path) -> tuple[Corpus, Vocabulary]:
    """With many words in the vocabulary that it has not."""
    index, words = write_corpus(folder / "text", [40, 30])
    known = Vocabulary.read(words).words
    return Corpus.load(index), Vocabulary([*known, *(f"never{n}seen" for n in range(150))])


def model_of(config: PretrainConfig, vocabulary: Vocabulary) -> BiLM:
    model = BiLM(config.model, config.softmax, vocabulary.size).to(DTYPES[config.train.precision])
    model.reset_parameters(config.run.seed)
    return model


def inputs(config: PretrainConfig, text: tuple[Corpus, Vocabulary]) -> Iterator[tuple[StepInput, StepInput]]:
    """Step inputs, plain and padded."""
    corpus, words = text
    streams = range(config.data.streams)
    model = model_of(config, words)
    characters = character_table(model, words)
    source = partial(thread_source, vocabulary=words, max_characters=config.model.char_cnn.max_characters)
    plan = StreamPlan(corpus, len(streams), 1)
    start = StreamCursors.start(len(streams))
    loader = StreamLoader(plan, streams, start, source, words, config.train.unroll, characters, model.directions)
    assemble = StepAssembler(config, words.size, streams, Exchange())
    shapes = FixedShapes.of(config, words.size, characters, len(streams))
    for step in range(STEPS):
        plain, _ = assemble(loader.next_batch(), step, Flags())
        yield plain, shapes(plain)
    loader.close()


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES.keys())
def test_padding_changes_nothing(text: tuple[Corpus, Vocabulary], changes: dict[str, Any]) -> None:
    config = tiny_config(**{"train__dropout": 0.0, "optim__clip_norm": 1.0, **changes})
    steps = [TrainStep(config, model_of(config, text[1]), config.data.streams) for _ in range(2)]
    first = {name: p.detach().clone() for name, p in steps[0].model.named_parameters()}
    touched = {name: set[int]() for name in TABLES}
    for plain, padded in inputs(config, text):
        assert len(padded.types) > len(plain.types)
        outputs = [step.run(batch) for step, batch in zip(steps, (plain, padded), strict=True)]
        # sums over words and rows come in other groups: the zeros of padding are exact, their places are not
        assert torch.allclose(outputs[1].loss_sums, outputs[0].loss_sums, rtol=1e-6)
        assert torch.allclose(outputs[1].norm, outputs[0].norm, rtol=1e-5)
        for name in TABLES:
            untied = name == "word_embedding" and not config.softmax.tied
            rows = plain.input_rows if untied else plain.rows
            touched[name] |= set() if rows is None else set(rows.tolist())
    plain_state, padded_state = (
        {**dict(step.model.named_parameters()), **step.optimizer.state_tensors(), **step.state._asdict()}
        for step in steps
    )
    for name, value in plain_state.items():
        assert torch.allclose(padded_state[name], value, rtol=1e-5, atol=2e-6), name
    if config.softmax.kind == "sampled":
        for name in steps[1].optimizer.tables:
            others = [row for row in range(text[1].size) if row not in touched[name]]
            assert len(others) > 50
            assert torch.equal(padded_state[name][others], first[name][others]), "no other row has moved"
            slots = padded_state[f"accumulator.{name}"][others]
            assert (slots == config.optim.initial_accumulator).all()


@pytest.mark.parametrize("changes", [{}, WORDS_UNTIED, WORDS_TIED], ids=["characters", "words", "tied"])
def test_what_is_padded(text: tuple[Corpus, Vocabulary], changes: dict[str, Any]) -> None:
    config = tiny_config(**changes)
    shapes = set()
    for plain, padded in inputs(config, text):
        shapes.add((padded.type_classes, padded.types.shape, len(padded.rows)))  # type: ignore[arg-type]
        assert sum(count for count, _ in padded.type_classes) == len(padded.types)
        assert torch.equal(padded.types[padded.inputs], plain.types[plain.inputs])
        widths = np.repeat([w for _, w in padded.type_classes], [n for n, _ in padded.type_classes])
        if config.model.input == "characters":
            ids = (padded.types != PADDING).sum(dim=1).numpy()
            widest = 3
            assert (np.minimum(ids + widest, padded.types.shape[1]) <= widths).all(), "a class has room for its words"
        for name in ("rows", "input_rows"):
            rows, more = getattr(plain, name), getattr(padded, name)
            assert (rows is None) == (more is None)
            if rows is not None:
                assert torch.equal(more[: len(rows)], rows)
                assert len(set(more.tolist())) == len(more) and more.max() < text[1].size
        for name in ("targets", "target_rows", "negative_rows", "lengths", "reset"):
            assert getattr(padded, name) is getattr(plain, name)
    assert len(shapes) <= 2


@pytest.mark.parametrize("unknown", [0, 40, 400])
def test_any_batch_fits(unknown: int) -> None:
    """Far more words than usual, and longer ones: the next sizes are taken, and nothing is cut."""
    shapes = FixedShapes([4, 6, 9], np.array([30.0, 10.0, 0.5]), np.array([5, 9, 3]), 100, (60, 60))
    types = torch.arange((50 + unknown) * 9).view(-1, 9)
    batch = StepInput(
        0,
        types,
        ((48, 4), (2 + unknown, 9)),
        torch.arange(len(types)).view(1, 1, -1),
        torch.zeros(0),
        torch.zeros(0),
        torch.zeros(0),
        1,
        rows=torch.arange(50, 100),
    )
    padded = shapes(batch)
    assert torch.equal(padded.types[padded.inputs], types[batch.inputs])
    assert padded.rows is not None and sorted(padded.rows.tolist()) == sorted({*range(50, 100), *padded.rows.tolist()})
    place = padded.inputs.flatten()
    first_of_last = len(padded.types) - padded.type_classes[-1][0]
    assert (place[48:] >= first_of_last).all(), "long words are in the widest class"
    again = shapes(batch)
    assert again.type_classes == padded.type_classes and torch.equal(again.types, padded.types)
