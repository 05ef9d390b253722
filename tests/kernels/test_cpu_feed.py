"""The feed's compiled loops give the bits of the plain forms."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from helpers.tiny_runs import WORDS_TIED, WORDS_UNTIED, tiny_config

from elmo_ray import kernels
from elmo_ray.data.corpus import Block, Corpus
from elmo_ray.data.encode import EncodedBlock, load_block
from elmo_ray.data.scan import index_shard
from elmo_ray.data.streams import Batch, StreamCursors, StreamLoader, StreamPlan, inputs_and_targets, read_all
from elmo_ray.data.vocabulary import SPECIAL_WORDS, Vocabulary
from elmo_ray.data.word_types import TypeTable, UniqueIndex
from elmo_ray.kernels.cpu import feed, loops
from elmo_ray.training.assembler import StepAssembler
from elmo_ray.training.noise import NoiseSampler, RowFinder, draw_negatives, log_expected_count
from elmo_ray.training.ranks import Exchange, Flags

pytestmark = pytest.mark.skipif(loops.numba is None, reason="Numba is not installed")

C = 11
KNOWN = [f"{letter}{'x' * (i % 9)}" for i, letter in enumerate("abcdefghijklmnopqrst")]
VOCABULARY = Vocabulary([*SPECIAL_WORDS, *KNOWN])


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Sentences of 1 to 60 words, of which some are unknown; blocks of all sizes, one with a broken byte."""
    random, folder = np.random.default_rng(3), tmp_path_factory.mktemp("text")
    shards = []
    for shard in range(3):
        lines = []
        for _ in range(12):
            words = random.choice([*KNOWN, "unknown", "rare", "ü" * 30, "unknowable"], random.integers(1, 60))
            lines.append(" ".join(words).encode())
        lines[7] += b" \xff"
        path = folder / f"{shard}.txt"
        path.write_bytes(b"\n".join(lines) + b"\n")
        shards.append(index_shard(str(path), 400, on_error="replace"))
    return Corpus.from_shards(shards)


def source(blocks: Iterator[Block]) -> Iterator[EncodedBlock]:
    return (load_block(block, VOCABULARY, C, "replace") for block in blocks)


def batches(corpus: Corpus, streams: range, unroll: int, directions: int, characters: bool) -> list[Batch]:
    plan = StreamPlan(corpus, 5, seed=2, epochs=2)
    table = TypeTable(VOCABULARY, C, 3) if characters else None
    cursors = StreamCursors.start(len(streams))
    return list(read_all(StreamLoader(plan, streams, cursors, source, VOCABULARY, unroll, table, directions)))


def flat(batch: object) -> dict[str, object]:
    """The fields of a batch or a step's input, with the cursors' beside them."""
    found = dict(vars(batch))
    if isinstance(batch, Batch):
        found |= {f"cursors.{name}": value for name, value in found.pop("cursors").arrays().items()}
    return found


def assert_same(found: object, expected: object) -> None:
    ours, theirs = flat(found), flat(expected)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        if isinstance(value, np.ndarray | torch.Tensor):
            ours_too = ours[name]
            assert ours_too.dtype == value.dtype and ours_too.shape == value.shape, name  # type: ignore[attr-defined]
            assert bytes(np.asarray(ours_too).data.tobytes()) == np.asarray(value).tobytes(), name
        else:
            assert ours[name] == value, name


@pytest.mark.parametrize("unroll", [1, 6, 20, 300], ids="T{}".format)
@pytest.mark.parametrize(("directions", "characters"), [(2, True), (1, True), (2, False)])
def test_batches(corpus: Corpus, unroll: int, directions: int, characters: bool) -> None:
    for streams in (range(5), range(1, 3)):
        found = batches(corpus, streams, unroll, directions, characters)
        with kernels.using("off"):
            expected = batches(corpus, streams, unroll, directions, characters)
        assert len(found) == len(expected) > 1
        for ours, theirs in zip(found, expected, strict=True):
            assert_same(ours, theirs)
    assert found[-1].cursors.replaced.sum() > 0 and (found[-1].lengths < unroll).any() == (unroll > 1)


def test_sentence_markers(corpus: Corpus) -> None:
    blocks = [*source(iter(corpus.blocks())), EncodedBlock(*(np.zeros(0, np.int32),) * 2, np.zeros((0, C), np.int16))]
    for base, block in enumerate(blocks, VOCABULARY.size):
        found = inputs_and_targets(block, VOCABULARY, base)
        with kernels.using("off"):
            expected = inputs_and_targets(block, VOCABULARY, base)
        assert found.dtype == expected.dtype and np.array_equal(found, expected)


def test_uniform_draws_are_those_of_numpy() -> None:
    keys = np.array([[0, 0], [2**64 - 1, 12345678901]], np.uint64)
    expected = np.stack([np.random.Generator(np.random.Philox(key=key)).random(1000) for key in keys])
    for first, count in ((0, 1000), (4, 96), (996, 4)):
        for factor in (1.0, float(np.log1p(793_471))):
            found = np.empty((2, count))
            feed.uniform(keys, first, factor, found)
            assert np.array_equal(found, expected[:, first : first + count] * factor)


def test_noise() -> None:
    """The same negatives and tries as drawn one by one, with few and with all words, in steps of any order."""
    for n_words, count in ((1, 1), (5, 5), (300, 1), (300, 64), (40, 40), (5000, 2000)):
        unique_index = UniqueIndex(n_words)
        sampler = NoiseSampler(7, 2, n_words, count, unique_index)
        for step in (0, 1, 2, 1, 9):
            noise = sampler(step)
            for d in range(2):
                expected = draw_negatives(7, step, d, n_words, count)
                assert np.array_equal(noise.ids[d], expected.ids) and noise.tries[d] == expected.tries
            assert noise.ids.dtype == np.int64 and not unique_index.eights.any()


@pytest.mark.parametrize("directions", [1, 2])
def test_rows_and_counts(directions: int) -> None:
    random, n_words = np.random.default_rng(5), 500
    for step, none in enumerate((True, False, True)):
        noise = NoiseSampler(3, directions, n_words, 40, UniqueIndex(n_words))(step)
        targets = random.integers(-1 if none else 3, n_words, (directions, 4, 6))
        others = [targets.ravel(), np.array([17, -1, 17, 499])], [targets.ravel(), np.zeros(0, np.int64)]
        for ids, more in others:
            one, other = UniqueIndex(n_words), UniqueIndex(n_words)
            found = RowFinder(n_words, one)(ids, more, targets, noise)
            with kernels.using("off"):
                expected = RowFinder(n_words, other)(ids, more, targets, noise)
            assert_same(found, expected)
            assert np.array_equal(one.index_of[found.rows], other.index_of[found.rows])
            assert not one.eights.any() and not other.eights.any()
            words = [*np.maximum(targets, 0), *noise.ids]
            tries = [*noise.tries.tolist(), *noise.tries.tolist()]
            logs = [log_expected_count(ids, n, n_words).ravel() for ids, n in zip(words, tries, strict=True)]
            assert found.log_counts.tobytes() == np.concatenate(logs).tobytes()


@pytest.mark.parametrize(
    "changes",
    [{}, {"model__bidirectional": False}, {"train__precision": "fp64"}, WORDS_UNTIED, WORDS_TIED],
    ids=["characters", "forward only", "fp64", "words", "tied"],
)
def test_step_inputs(corpus: Corpus, changes: dict) -> None:
    config = tiny_config(**changes)
    made = batches(corpus, range(4), 6, 2 if config.model.bidirectional else 1, config.model.input == "characters")
    one, other = (StepAssembler(config, VOCABULARY.size, range(4), Exchange()) for _ in range(2))
    for step, batch in enumerate(made[:: len(made) // 5]):
        found, _ = one(batch, step, Flags())
        with kernels.using("off"):
            expected, _ = other(batch, step, Flags())
        assert_same(found, expected)


def test_positions_by_row() -> None:
    random = np.random.default_rng(1)
    for size, count in ((0, 1), (1, 1), (200, 7), (50, 300)):
        ids = random.integers(0, count, size)
        order, starts = feed.sort_positions(ids, count)
        assert order.dtype == starts.dtype == np.int32 and len(starts) == count + 1
        assert order.tolist() == np.argsort(ids, kind="stable").tolist()
        assert starts.tolist() == np.searchsorted(np.sort(ids), np.arange(count + 1)).tolist()


def test_the_plain_model_alone() -> None:
    for question in (kernels.next_window, kernels.distinct_ids, kernels.touched_rows):
        assert question() is not None
        with kernels.using("off"):
            assert question() is None
