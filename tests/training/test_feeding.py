"""From windows of streams to step inputs: draws, rows, resets, and a thread that brings errors and ends."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny_runs import WORDS_TIED, WORDS_UNTIED, tiny_config, write_corpus

from elmo_ray.config import PretrainConfig
from elmo_ray.data import encode
from elmo_ray.data.corpus import Block, Corpus
from elmo_ray.data.encode import EncodedBlock, thread_source
from elmo_ray.data.streams import StreamCursors, StreamLoader, StreamPlan, split_evenly
from elmo_ray.data.vocabulary import Vocabulary
from elmo_ray.data.word_types import TypeTable
from elmo_ray.errors import DataError
from elmo_ray.training import feeding
from elmo_ray.training.assembler import StepAssembler, reset_rows
from elmo_ray.training.feeding import Feeder
from elmo_ray.training.noise import draw_negatives, log_expected_count
from elmo_ray.training.ranks import Exchange, Flags

CPU = torch.device("cpu")


@pytest.fixture
def corpus(tmp_path: Path) -> tuple[Corpus, Vocabulary]:
    index, words = write_corpus(tmp_path / "text", [40, 30])
    return Corpus.load(index), Vocabulary.read(words)


def loader_of(
    corpus: tuple[Corpus, Vocabulary],
    config: PretrainConfig,
    streams: range | None = None,
    epochs: int | None = None,
    wrap: Callable[[Iterator[Block]], Iterator[Block]] = lambda blocks: blocks,
) -> StreamLoader:
    text, words = corpus
    plan = StreamPlan(text, config.data.streams, config.run.seed, True, epochs)
    streams = streams or range(config.data.streams)
    most = config.model.char_cnn.max_characters
    table = TypeTable(words, most, 3) if config.model.input == "characters" else None

    def source(blocks: Iterator[Block]) -> Iterator[EncodedBlock]:
        return thread_source(wrap(blocks), words, most, look_ahead=1)

    return StreamLoader(
        plan,
        streams,
        StreamCursors.start(len(streams)),
        source,
        words,
        config.train.unroll,
        table,
        2 if config.model.bidirectional else 1,
    )


@pytest.mark.parametrize(
    "changes",
    [{}, {"model__bidirectional": False}, WORDS_UNTIED, WORDS_TIED],
    ids=["characters", "forward only", "words", "tied"],
)
def test_rows_stand_for_ids(corpus: tuple[Corpus, Vocabulary], changes: dict[str, Any]) -> None:
    config, words = tiny_config(**changes), corpus[1]
    loader = loader_of(corpus, config, epochs=1)
    assemble = StepAssembler(config, words.size, range(4), Exchange())
    steps = loader.plan.steps(1, 6)
    for step in range(steps):
        batch = loader.next_batch()
        found, _ = assemble(batch, step, Flags())
        assert found.positions == batch.positions and found.step == step
        assert found.rows is not None and found.target_rows is not None and found.negative_rows is not None
        assert found.target_log_count is not None and found.negative_log_count is not None
        rows = found.rows.numpy()
        wanted = {int(t) for t in batch.targets.flat if t >= 0}
        for d in range(loader.directions):
            drawn = draw_negatives(config.run.seed, step, d, words.size, 20)
            assert rows[found.negative_rows[d].numpy()].tolist() == drawn.ids.tolist()
            assert np.array_equal(found.negative_log_count[d], log_expected_count(drawn.ids, drawn.tries, words.size))
            valid = batch.targets[d] >= 0
            assert np.array_equal(rows[found.target_rows[d].numpy()][valid], batch.targets[d][valid])
            expected = log_expected_count(batch.targets[d][valid], drawn.tries, words.size)
            assert np.array_equal(found.target_log_count[d].numpy()[valid], expected)
            assert found.target_rows.min() >= 0 and found.target_rows.max() < len(rows)
            wanted |= set(drawn.ids.tolist())
        if config.model.input == "words":
            table = rows if config.softmax.tied else torch.as_tensor(found.input_rows).numpy()
            assert np.array_equal(table[found.types.numpy()], batch.types)
            if config.softmax.tied:
                wanted |= {int(t) for t in batch.types}
                assert found.input_rows is None
            else:
                assert table.tolist() == batch.types.tolist()
        assert rows.tolist() == sorted(wanted)
    assert (batch.targets == -1).any(), "the last window is not full: its rows were tested too"
    loader.close()


def test_full_softmax_needs_no_rows(corpus: tuple[Corpus, Vocabulary]) -> None:
    config = tiny_config(**WORDS_UNTIED, softmax__kind="full", softmax__negatives=None)
    loader = loader_of(corpus, config)
    batch = loader.next_batch()
    found, _ = StepAssembler(config, corpus[1].size, range(4), Exchange())(batch, 0, Flags())
    assert found.rows is None and found.input_rows is None and found.negative_rows is None
    assert found.types.tolist() == batch.types.tolist(), "types are ids of the whole table"
    loader.close()


def test_resets_do_not_depend_on_workers(corpus: tuple[Corpus, Vocabulary]) -> None:
    config = tiny_config(data__streams=7)
    loader = loader_of(corpus, config)
    batches = [loader.next_batch() for _ in range(6)]
    loader.close()
    for reset in (0.3, "never", "block"):
        for step, batch in enumerate(batches):
            whole = reset_rows(reset, batch, range(7), 7, 5, step)
            assert whole.shape == (7,) and whole.dtype == np.bool_
            if reset == "never":
                assert not whole.any()
            elif reset == "block":
                assert np.array_equal(whole, batch.new_block)
            else:
                parts = [reset_rows(reset, batch, part, 7, 5, step) for part in split_evenly(7, 3)]
                assert np.array_equal(np.concatenate(parts), whole)
    batch = batches[0]
    often = np.stack([reset_rows(0.1, batch, range(7), 7, 5, step) for step in range(3000)])
    assert abs(often.mean() - 0.1) < 0.01 and (abs(often.mean(axis=0) - 0.1) < 0.03).all()
    assert not np.array_equal(often[:200], np.stack([reset_rows(0.1, batch, range(7), 7, 6, s) for s in range(200)]))
    assert reset_rows(1.0, batch, range(7), 7, 5, 0).all() and not reset_rows(0.0, batch, range(7), 7, 5, 0).any()


def feeder_of(
    corpus: tuple[Corpus, Vocabulary], steps: range, flags: Callable[[], Flags] = Flags, **more: Any
) -> Feeder:
    config = tiny_config()
    loader = loader_of(corpus, config, **more)
    return Feeder(loader, StepAssembler(config, corpus[1].size, range(4), Exchange()), steps, flags, CPU)


def threads() -> set[str]:
    return {thread.name for thread in threading.enumerate() if thread.name in ("elmo-loader", "encode")}


def test_steps_come_in_order_with_the_cursors_after_them(corpus: tuple[Corpus, Vocabulary]) -> None:
    reference = loader_of(corpus, tiny_config())
    for number, ready in enumerate(feeder_of(corpus, range(5, 25))):
        batch = reference.next_batch()
        assert ready.batch.step == number + 5
        assert np.array_equal(ready.batch.targets, batch.targets)
        assert np.array_equal(ready.cursors.offset, batch.cursors.offset)
        assert np.array_equal(ready.cursors.audit_hash, batch.cursors.audit_hash)
        assert ready.waited >= 0 and not ready.flags.stop
    assert number == 19
    reference.close()
    assert not threads()


def test_a_stop_is_the_last_step_of_all(corpus: tuple[Corpus, Vocabulary]) -> None:
    looks = iter([False, False, False, True, False, False])
    found = [ready.flags.stop for ready in feeder_of(corpus, range(20), lambda: Flags(next(looks)))]
    assert found == [False, False, False, True]
    assert not threads()


@pytest.mark.parametrize("kind", [DataError, KeyError])
def test_an_error_comes_after_the_steps_before_it(corpus: tuple[Corpus, Vocabulary], kind: type[Exception]) -> None:
    def broken(blocks: Iterator[Block]) -> Iterator[Block]:
        for number, block in enumerate(blocks):
            if number == 12:
                raise kind("block 12")
            yield block

    done = 0
    with pytest.raises(kind, match="block 12"):
        for _ in feeder_of(corpus, range(1000), wrap=broken):
            done += 1
    assert 0 < done < 1000
    assert not threads()


def test_the_lock_changes_hands_as_before_afterwards(corpus: tuple[Corpus, Vocabulary]) -> None:
    usual = sys.getswitchinterval()
    assert sum(1 for _ in feeder_of(corpus, range(3))) == 3
    assert sys.getswitchinterval() == usual


def test_leaving_early_ends_the_threads(corpus: tuple[Corpus, Vocabulary]) -> None:
    iterator = iter(feeder_of(corpus, range(1000)))
    next(iterator)
    assert threads() == {"elmo-loader", "encode"}
    iterator.close()  # type: ignore[attr-defined]
    assert not threads()


def test_a_stop_ends_a_wait_for_text(corpus: tuple[Corpus, Vocabulary], monkeypatch: pytest.MonkeyPatch) -> None:
    """A storage that no longer answers: the stop ends the wait, and the steps before it are done."""
    monkeypatch.setattr(encode, "CLOSE_S", 0.1)
    text, words = corpus
    answers, stop = threading.Event(), threading.Event()

    def hanging(blocks: Iterator[Block]) -> Iterator[Block]:
        for number, block in enumerate(blocks):
            if number == 12:
                answers.wait(60)
            yield block

    config = tiny_config()
    loader = StreamLoader(
        StreamPlan(text, config.data.streams, config.run.seed),
        range(config.data.streams),
        StreamCursors.start(config.data.streams),
        lambda blocks: thread_source(hanging(blocks), words, 16, look_ahead=1, interrupted=stop.is_set),
        words,
        config.train.unroll,
        TypeTable(words, 16, 3),
    )
    assembler = StepAssembler(config, words.size, range(config.data.streams), Exchange())
    feeder = Feeder(loader, assembler, range(1000), Flags, CPU)
    monkeypatch.setattr(feeding, "WARN_AFTER_S", 0.05)
    done = 0
    threading.Timer(0.5, stop.set).start()
    for _ in feeder:
        done += 1
    assert 0 < done < 1000 and loader.is_waiting and not answers.is_set()
    answers.set()


def test_only_a_few_steps_are_made_ahead(corpus: tuple[Corpus, Vocabulary]) -> None:
    looks = []

    def flags() -> Flags:
        looks.append(1)
        return Flags()

    iterator = iter(feeder_of(corpus, range(1000), flags))
    next(iterator)
    threading.Event().wait(0.3)
    assert len(looks) <= 1 + 2 + 1, "one taken, two waiting, one in the making"
    iterator.close()  # type: ignore[attr-defined]
