"""Padded step inputs: one shape, and the same training to the last row."""

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
from elmo_ray.training.assembler import StepAssembler
from elmo_ray.training.capacities import Capacities, sorted_positions
from elmo_ray.training.noise import draw_negatives
from elmo_ray.training.ranks import Exchange, Flags
from elmo_ray.training.step import DTYPES, TrainStep
from elmo_ray.training.step_input import StepInput, with_micro_batches

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
    """Step inputs with their micro-batches, plain and padded."""
    corpus, words = text
    streams = range(config.data.streams)
    model = model_of(config, words)
    characters = character_table(model, words)
    source = partial(thread_source, vocabulary=words, max_characters=config.model.char_cnn.max_characters)
    plan = StreamPlan(corpus, len(streams), 1)
    start = StreamCursors.start(len(streams))
    loader = StreamLoader(plan, streams, start, source, words, config.train.unroll, characters, model.directions)
    assemble = StepAssembler(config, words.size, streams, Exchange())
    pad = Capacities.of(config, words.size, characters, len(streams))
    try:
        for step in range(STEPS):
            plain, _ = assemble(loader.next_batch(), step, Flags())
            plain = with_micro_batches(plain, config.train.accumulate)
            yield plain, pad(plain)
    finally:
        loader.close()


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES.keys())
def test_padding_changes_nothing(text: tuple[Corpus, Vocabulary], changes: dict[str, Any]) -> None:
    config = tiny_config(**{"train__dropout": 0.0, "optim__clip_norm": 1.0, **changes})
    steps = [TrainStep(config, model_of(config, text[1]), config.data.streams) for _ in range(2)]
    first = {name: p.detach().clone() for name, p in steps[0].model.named_parameters()}
    touched = {name: set[int]() for name in TABLES}
    for plain, padded in inputs(config, text):
        some, more = (batch.micro_batches[-1][1] if batch.micro_batches else batch for batch in (plain, padded))
        assert len(more.types) > len(some.types)
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
        shapes.add((padded.types.shape, padded.n_windows, len(padded.rows)))  # type: ignore[arg-type]
        assert torch.equal(padded.types[padded.inputs], plain.types[plain.inputs])
        if config.model.input == "characters":
            assert padded.types.shape[1] == config.model.char_cnn.max_characters
            filled = [min(1 + int((word != PADDING).sum()), len(word)) for word in plain.types]
            assert padded.window_counts.tolist() == filled + [0] * (len(padded.types) - len(filled))  # type: ignore
            assert sum(filled) <= padded.n_windows
        else:
            assert padded.windows is None
        for name in ("rows", "input_rows"):
            rows, more = getattr(plain, name), getattr(padded, name)
            assert (rows is None) == (more is None)
            if rows is not None:
                assert torch.equal(more[: len(rows)], rows)
                assert len(set(more.tolist())) == len(more) and more.max() < text[1].size
        for name in ("targets", "target_rows", "negative_rows", "lengths", "reset"):
            assert getattr(padded, name) is getattr(plain, name)
        for ids, positions, count in (
            (padded.inputs.transpose(1, 2), padded.input_positions, len(padded.types)),
            (padded.target_rows, padded.target_positions, len(padded.rows)),  # type: ignore[arg-type]
        ):
            assert positions is not None and ids is not None and len(positions.starts) == count + 1
            for row in range(count):
                places = positions.order[positions.starts[row] : positions.starts[row + 1]]
                assert places.tolist() == torch.nonzero(ids.flatten() == row).flatten().tolist()
    assert len(shapes) <= 2


def test_a_batch_beyond_takes_the_next_size() -> None:
    """The same one for the same batch, whatever came before, and nothing is cut."""
    pad = Capacities(words=40.0, windows=200.0, rows=60.0, input_rows=1.0, n_words=100)

    def batch(words: int, length: int, rows: int) -> StepInput:
        types = torch.full((words, 9), PADDING, dtype=torch.int16)
        types[:, :length] = 5
        places = torch.arange(words).view(1, 1, -1)
        nothing = torch.zeros(0)
        return StepInput(0, types, ((words, 9),), places, places, nothing, nothing, 1, rows=torch.arange(rows))

    def sizes(words: int, length: int = 3, rows: int = 50) -> tuple[int, int, int]:
        padded = pad(batch(words, length, rows))
        assert padded.rows is not None and sorted(set(padded.rows.tolist())) == sorted(padded.rows.tolist())
        assert padded.window_counts is not None and int(padded.window_counts.sum()) <= padded.n_windows
        return len(padded.types), padded.n_windows, len(padded.rows)

    usual = sizes(10)
    assert usual == sizes(40) == (40, 200, 64)
    assert sizes(41) == (48, 224, 64), "windows grow with the words, for a graph has one size"
    assert sizes(40, length=5) == (56, 248, 64), "240 windows"
    assert sizes(10, rows=65) == (40, 200, 72)
    assert sizes(10, rows=100) == (40, 200, 100), "all words of the vocabulary"
    assert sizes(400)[0] >= 400
    assert sizes(10) == usual


def test_sorted_positions() -> None:
    order, starts = sorted_positions(np.array([[3, 0, 3], [1, 0, 3]]), 5)
    assert order.tolist() == [1, 4, 3, 0, 2, 5] and starts.tolist() == [0, 2, 3, 3, 6, 6]
    assert order.dtype == starts.dtype == torch.int32


def test_a_usual_batch_fits() -> None:
    """Words by the law that capacities are made of fit, and little is padding."""
    n_words, config = 20_000, tiny_config(data__streams=64, train__unroll=20, softmax__negatives=1000)
    pad = Capacities.of(config, n_words, None, 32)
    random = np.random.default_rng(1)
    for step in range(5):
        ids = np.expm1(random.random(64 * 20) * np.log1p(n_words)).astype(np.int64)  # of two workers
        negatives = [draw_negatives(1, step, d, n_words, 1000).ids for d in range(2)]
        words, rows = np.unique(ids[: 32 * 20]), np.unique(np.concatenate([ids, *negatives]))
        nothing, places = torch.zeros(0), torch.zeros(1, 1, 1, dtype=torch.int64)
        batch = StepInput(
            0,
            torch.from_numpy(words),
            ((len(words), 1),),
            places,
            places,
            nothing,
            nothing,
            1,
            rows=torch.from_numpy(rows),
        )
        padded = pad(batch)
        assert padded.rows is not None
        assert len(words) <= len(padded.types) <= 1.25 * len(words)
        assert len(rows) <= len(padded.rows) <= 1.15 * len(rows)
