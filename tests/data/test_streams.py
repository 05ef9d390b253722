"""Streams: every position of an epoch once, in the text's order, whatever the blocks, the workers and the windows."""

from __future__ import annotations

import functools
import itertools
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from helpers.tiny_runs import sentences, write_corpus
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from elmo_ray.data.characters import N_CHARACTERS, PADDING
from elmo_ray.data.corpus import Block, Corpus
from elmo_ray.data.encode import EncodedBlock, thread_source
from elmo_ray.data.scan import index_shard
from elmo_ray.data.streams import Batch, BlockSource, StreamCursors, StreamLoader, StreamPlan, read_all, split_evenly
from elmo_ray.data.vocabulary import SPECIAL_WORDS, Vocabulary
from elmo_ray.data.word_types import TypeTable
from elmo_ray.errors import DataError

C = 12
Position = tuple[bytes, int, bytes, int]
"""Forward input and target, backward input and target; inputs as their characters."""


@dataclass
class Case:
    """Shards of sentences of so many words each (negative: with an unknown word), and how they are read."""

    shards: list[list[int]]
    block_bytes: int
    n_streams: int
    unroll: int
    epochs: int
    shuffle: bool
    seed: int
    words: dict[str, int] = field(default_factory=dict)

    def text(self) -> list[list[list[str]]]:
        """Words of each sentence of each shard, no word twice."""
        count = itertools.count()
        return [
            [[("?" if size < 0 and i == 0 else "w") + str(next(count)) for i in range(abs(size))] for size in shard]
            for shard in self.shards
        ]


@functools.cache
def vocabulary() -> Vocabulary:
    return Vocabulary([*SPECIAL_WORDS, *(f"w{i}" for i in range(400))])


def positions_of(sentence: list[str]) -> list[Position]:
    """What BILM.md says a sentence gives in both directions."""
    v = vocabulary()

    def spelt(word: str) -> bytes:
        return {"<S>": b"\x00", "</S>": b"\x01"}.get(word, word.encode()[: C - 2])

    forward, backward = ["<S>", *sentence, "</S>"], ["</S>", *reversed(sentence), "<S>"]
    return [
        (spelt(a), v.ids.get(b, v.unk), spelt(c), v.ids.get(d, v.unk))
        for a, b, c, d in zip(forward[:-1], forward[1:], backward[:-1], backward[1:], strict=True)
    ]


def write(case: Case, folder: Path) -> Corpus:
    shards = []
    for number, shard in enumerate(case.text()):
        path = folder / f"{number}.txt"
        path.write_text("".join(" ".join(s) + "\n" for s in shard))
        shards.append(index_shard(str(path), case.block_bytes))
    return Corpus.from_shards(shards)


def source(blocks: Iterator[Block]) -> Iterator[EncodedBlock]:
    return thread_source(blocks, vocabulary(), C, look_ahead=500)


def spelling(row: np.ndarray) -> bytes:
    ids = [int(i) for i in row if i != PADDING]
    assert ids[0] == 258 and ids[-1] == 259
    return bytes(i - 256 if i >= 256 else i for i in ids[1:-1])


def mapped(batch: Batch) -> list[list[Position]]:
    """The positions of each row, inputs through types."""
    if batch.types.ndim == 1:
        names = [str(i).encode() for i in batch.types]
    else:
        names = [spelling(row) for row in batch.types]
    rows = []
    for b, length in enumerate(batch.lengths.tolist()):
        assert (batch.targets[:, b, :length] >= 0).all() and (batch.targets[:, b, length:] == -1).all()
        rows.append(
            [
                (
                    names[batch.inputs[0, b, t]],
                    int(batch.targets[0, b, t]),
                    names[batch.inputs[1, b, t]],
                    int(batch.targets[1, b, t]),
                )
                for t in range(length)
            ]
        )
    return rows


@dataclass
class Window:
    """One window of all streams, whoever read them."""

    rows: list[list[Position]]
    new_block: list[bool]
    cursors: list[list[int]]

    @classmethod
    def joined(cls, batches: list[Batch]) -> Window:
        cursors = [np.stack(list(b.cursors.arrays().values()), axis=1) for b in batches]
        return cls(
            [row for b in batches for row in mapped(b)],
            [bool(n) for b in batches for n in b.new_block],
            np.concatenate(cursors).tolist(),
        )


def loaders(
    plan: StreamPlan,
    workers: int,
    unroll: int,
    cursors: StreamCursors | None = None,
    words: bool = False,
    source: BlockSource = source,
) -> list[StreamLoader]:
    cursors = cursors or StreamCursors.start(plan.n_streams)
    table = None if words else TypeTable(vocabulary(), C, 3)
    return [
        StreamLoader(
            plan,
            part,
            StreamCursors(*(a[part.start : part.stop] for a in cursors.arrays().values())),
            source,
            vocabulary(),
            unroll,
            table,
        )
        for part in split_evenly(plan.n_streams, workers)
    ]


def read(
    plan: StreamPlan, workers: int, unroll: int, steps: int, cursors: StreamCursors | None = None, words: bool = False
) -> list[Window]:
    found = loaders(plan, workers, unroll, cursors, words)
    try:
        return [Window.joined([loader.next_batch() for loader in found]) for _ in range(steps)]
    finally:
        for loader in found:
            loader.close()


def cursors_of(window: Window) -> StreamCursors:
    return StreamCursors(*np.array(window.cursors, np.int64).T.copy())


def check_once_each(case: Case, plan: StreamPlan, windows: list[Window]) -> None:
    """Every position once an epoch, shares equal to one, and (in the order of files) the text itself."""
    line = [p for shard in case.text() for sentence in shard for p in positions_of(sentence)]
    assert len(line) == plan.positions
    streams = [[p for w in windows for p in w.rows[s]] for s in range(case.n_streams)]
    shares = [len(stream) // case.epochs for stream in streams]
    assert [share * case.epochs for share in shares] == [len(stream) for stream in streams]
    assert max(shares) - min(shares) <= 1 and sum(shares) == len(line)
    for epoch in range(case.epochs):
        parts = [stream[epoch * share : (epoch + 1) * share] for stream, share in zip(streams, shares, strict=True)]
        whole = [p for part in parts for p in part]
        assert Counter(whole) == Counter(line)
        if not case.shuffle:
            assert whole == line
        else:
            order, ends = plan.order(epoch)
            blocks = np.split(np.array(line, object), np.cumsum(plan.corpus.block_positions)[:-1])
            assert sorted(order.tolist()) == list(range(len(plan.corpus)))
            assert whole == [tuple(p) for b in order for p in blocks[b].tolist()]
            assert int(ends[-1]) == plan.positions
    final = np.array(windows[-1].cursors)
    sizes = np.array(shares)
    assert (final[:, 0] == np.where(sizes > 0, case.epochs, 0)).all() and (final[:, 1] == 0).all()
    assert final[:, 2].tolist() == [len(stream) for stream in streams]


def check_new_blocks(case: Case, plan: StreamPlan, windows: list[Window]) -> None:
    """new_block: whether a block, or a share, began after the start of the window before and up to this start."""
    for s in range(case.n_streams):
        lo, hi = plan.share(s)
        begins: list[bool] = []
        for epoch in range(case.epochs):
            _, ends = plan.order(epoch)
            firsts = {lo, *ends.tolist()}
            begins += [at in firsts for at in range(lo, hi)]
        for number, window in enumerate(windows):
            start = number * case.unroll
            expected = any(begins[max(0, start - case.unroll + 1) : start + 1]) if window.rows[s] else False
            assert window.new_block[s] == expected


sizes = st.integers(-5, 6)
cases = st.builds(
    Case,
    shards=st.lists(st.lists(sizes, max_size=9), min_size=1, max_size=5),
    block_bytes=st.integers(1, 90),
    n_streams=st.integers(1, 11),
    unroll=st.integers(1, 8),
    epochs=st.integers(1, 3),
    shuffle=st.booleans(),
    seed=st.integers(0, 3),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(case=cases, data=st.data())
def test_every_position_once_whoever_reads(case: Case, data: st.DataObject) -> None:
    assume(any(case.shards))
    with tempfile.TemporaryDirectory() as folder:
        plan = StreamPlan(write(case, Path(folder)), case.n_streams, case.seed, case.shuffle, case.epochs)
        steps = plan.steps(case.epochs, case.unroll)
        windows = read(plan, 1, case.unroll, steps)
        check_once_each(case, plan, windows)
        check_new_blocks(case, plan, windows)

        workers = data.draw(st.integers(1, case.n_streams), label="workers")
        assert read(plan, workers, case.unroll, steps) == windows

        at = data.draw(st.integers(1, steps), label="resumed at")
        workers = data.draw(st.integers(1, case.n_streams), label="workers then")
        assert read(plan, workers, case.unroll, steps - at, cursors_of(windows[at - 1])) == windows[at:]

        unroll = data.draw(st.integers(1, 9), label="another window")
        others = read(plan, 1, unroll, plan.steps(case.epochs, unroll))
        assert others[-1].cursors == windows[-1].cursors, "cursors and audit do not depend on windows"
        check_once_each(case, plan, others)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(case=cases, workers=st.integers(1, 11))
def test_word_ids_as_input(case: Case, workers: int) -> None:
    assume(any(case.shards))
    v = vocabulary()
    with tempfile.TemporaryDirectory() as folder:
        plan = StreamPlan(write(case, Path(folder)), case.n_streams, case.seed, case.shuffle, case.epochs)
        steps = plan.steps(case.epochs, case.unroll)
        by_word = read(plan, min(workers, case.n_streams), case.unroll, steps, words=True)
        by_character = read(plan, 1, case.unroll, steps)
    names = {b"\x00": v.bos, b"\x01": v.eos}

    def as_word(spelling: bytes) -> bytes:
        return str(names.get(spelling, v.ids.get(spelling.decode(), v.unk))).encode()

    for words, characters in zip(by_word, by_character, strict=True):
        assert words.cursors == characters.cursors and words.new_block == characters.new_block
        assert words.rows == [[(as_word(a), b, as_word(c), d) for a, b, c, d in row] for row in characters.rows]


EXAMPLES = {
    "fewer blocks than streams": Case([[3, 4, 2]], 1000, 7, 2, 2, True, 1),
    "fewer positions than streams": Case([[1], [], [0]], 10, 9, 3, 3, True, 1),
    "empty shards around": Case([[], [], [2, -3], [], [0, 0, 4], []], 8, 3, 4, 2, True, 2),
    "windows longer than shares": Case([[2, 2, 2]], 10, 3, 20, 3, True, 0),
    "one position": Case([[0]], 10, 1, 1, 3, False, 0),
    "empty sentences alone": Case([[0, 0, 0, 0, 0]], 1, 2, 2, 2, True, 0),
}


@pytest.mark.parametrize("case", EXAMPLES.values(), ids=EXAMPLES)
def test_narrow_cases(case: Case, tmp_path: Path) -> None:
    plan = StreamPlan(write(case, tmp_path), case.n_streams, case.seed, case.shuffle, case.epochs)
    windows = read(plan, 1, case.unroll, plan.steps(case.epochs, case.unroll))
    check_once_each(case, plan, windows)
    check_new_blocks(case, plan, windows)
    assert read(plan, case.n_streams, case.unroll, len(windows)) == windows


def english(folder: Path, n_streams: int, epochs: int | None = 2) -> tuple[StreamPlan, Vocabulary]:
    index, words = write_corpus(folder, [60, 0, 45, 1])
    return StreamPlan(Corpus.load(index), n_streams, 5, True, epochs), Vocabulary.read(words)


def test_ordinary_text_with_unknown_words(tmp_path: Path) -> None:
    plan, words = english(tmp_path, 5)
    table = TypeTable(words, 16, 3)
    each = [functools.partial(thread_source, vocabulary=words, max_characters=16) for _ in range(2)]
    loader = StreamLoader(plan, range(5), StreamCursors.start(5), each[0], words, 20, table)
    found = Counter()  # type: ignore[var-annotated]
    for batch in read_all(loader):
        assert batch.types.dtype == np.int16 and batch.types.max() < N_CHARACTERS
        assert sum(n for n, _ in batch.type_classes) == len(batch.types)
        assert batch.inputs.min() >= 0 and batch.inputs.max() < len(batch.types)
        first = 0
        for n, columns in batch.type_classes:
            assert (batch.types[first : first + n, columns - 3 :] == PADDING).all() or columns == 16
            first += n
        for b, t in zip(*np.nonzero(batch.targets[0] >= 0), strict=True):
            word = spelling(batch.types[batch.inputs[0, b, t]])
            found[word] += 1
    text = [line.split() for n, seed in ((60, 0), (45, 2), (1, 3)) for line in sentences(n, seed)]
    expected = Counter(w.encode()[:14] for line in text for w in line)
    expected[b"\x00"] = len(text)
    assert found == Counter({word: 2 * n for word, n in expected.items()})
    assert loader.done() and loader.cursors.audit_positions.sum() == 2 * plan.positions


def test_a_resumed_loader_makes_the_same_arrays(tmp_path: Path) -> None:
    """Sums over the distinct words of a batch are taken in their order: it must not tell when blocks were read."""
    index, _ = write_corpus(tmp_path, [60, 50], block_bytes=300)
    few = Vocabulary([*SPECIAL_WORDS, "the", "and", "."])  # most words are unknown, and most come again and again
    plan = StreamPlan(Corpus.load(index), 5, seed=2, epochs=2)
    table = TypeTable(few, C, 3)

    def batches(cursors: StreamCursors) -> Iterator[Batch]:
        encode = functools.partial(thread_source, vocabulary=few, max_characters=C)
        return read_all(StreamLoader(plan, range(5), cursors, encode, few, 7, table))

    unbroken = list(batches(StreamCursors.start(5)))
    assert max(len(np.unique(batch.types, axis=0)) for batch in unbroken) > 20
    for at in range(0, len(unbroken) - 1, 5):
        for ours, theirs in zip(batches(unbroken[at].cursors), unbroken[at + 1 :], strict=True):
            assert len(np.unique(ours.types, axis=0)) == len(ours.types), "a word comes twice"
            for name in ("types", "inputs", "targets", "lengths", "new_block"):
                assert np.array_equal(getattr(ours, name), getattr(theirs, name)), f"{name}, resumed at {at}"
            assert ours.type_classes == theirs.type_classes


def test_the_order_of_epochs_is_a_function_of_seed_and_epoch(tmp_path: Path) -> None:
    plan, _ = english(tmp_path, 3)
    again = StreamPlan(plan.corpus, 8, 5)
    orders = [plan.order(e)[0].tolist() for e in range(4)]
    assert orders == [again.order(e)[0].tolist() for e in range(4)]
    assert len({tuple(o) for o in orders}) == 4
    assert StreamPlan(plan.corpus, 3, 6).order(0)[0].tolist() != orders[0]
    assert StreamPlan(plan.corpus, 3, 5, shuffle=False).order(2)[0].tolist() == list(range(len(plan.corpus)))


def test_an_endless_plan_goes_on_from_far_epochs(tmp_path: Path) -> None:
    plan, words = english(tmp_path, 3, epochs=None)
    cursors = StreamCursors.start(3)
    cursors.epoch[:] = 10**6
    cursors.offset[:] = plan.share_sizes() - 2
    source = functools.partial(thread_source, vocabulary=words, max_characters=16)
    loader = StreamLoader(plan, range(3), cursors, source, words, 7, TypeTable(words, 16, 3))
    batches = list(read_all(loader, 5))
    assert len(batches) == 5 and not loader.done()
    assert (batches[0].cursors.epoch == 10**6 + 1).all() and (batches[0].cursors.offset == 5).all()
    assert all(batch.positions == 21 for batch in batches)


def test_forward_only(tmp_path: Path) -> None:
    plan, words = english(tmp_path, 3)
    source = functools.partial(thread_source, vocabulary=words, max_characters=16)
    table = TypeTable(words, 16, 3)
    one, two = (StreamLoader(plan, range(3), StreamCursors.start(3), source, words, 7, table, d) for d in (1, 2))
    for a, b in zip(read_all(one, 6), read_all(two, 6), strict=True):
        assert a.targets.shape == (1, 3, 7) and np.array_equal(a.targets[0], b.targets[0])
        assert np.array_equal(a.types[a.inputs[0]], b.types[b.inputs[0]])
        assert np.array_equal(a.cursors.audit_hash, b.cursors.audit_hash)


def test_few_blocks_are_read_ahead(tmp_path: Path) -> None:
    plan, words = english(tmp_path, 4, epochs=None)
    asked: list[Block] = []

    def watched(blocks: Iterator[Block]) -> Iterator[EncodedBlock]:
        def noted() -> Iterator[Block]:
            for block in blocks:
                asked.append(block)
                yield block

        return thread_source(noted(), words, 16, look_ahead=1)

    loader = StreamLoader(plan, range(4), StreamCursors.start(4), watched, words, 5, TypeTable(words, 16, 3))
    batches = read_all(loader, 3)
    next(batches)
    assert len(asked) <= 4 + 5, "a block for each stream, and a few that wait"
    batches.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize(("n_streams", "workers"), [(7, 3), (4, 4), (10, 1), (9, 2), (384, 5)])
def test_streams_are_dealt_equally(n_streams: int, workers: int) -> None:
    ranges = split_evenly(n_streams, workers)
    assert [s for r in ranges for s in r] == list(range(n_streams))
    counts = [len(r) for r in ranges]
    assert len(ranges) == workers and max(counts) - min(counts) <= 1


def test_a_corpus_without_a_sentence_is_an_error(tmp_path: Path) -> None:
    corpus = write(Case([[], []], 10, 1, 1, 1, False, 0), tmp_path)
    with pytest.raises(DataError, match="no sentence"):
        StreamPlan(corpus, 2)


def test_a_file_that_changed_is_an_error(tmp_path: Path) -> None:
    case = Case([[3, 3], [4, 4, 4]], 1000, 2, 2, 1, False, 0)
    plan = StreamPlan(write(case, tmp_path), 2, epochs=1)
    path = tmp_path / "1.txt"
    path.write_text(path.read_text().replace(" ", "\n", 1))
    with pytest.raises(DataError, match="1.txt"):
        read(plan, 1, 2, 5)


def test_a_source_that_ends_too_soon_is_an_error(tmp_path: Path) -> None:
    case = Case([[3, 3], [4, 4, 4]], 8, 2, 2, 1, False, 0)
    plan = StreamPlan(write(case, tmp_path), 2, epochs=1)

    def short(blocks: Iterator[Block]) -> Iterator[EncodedBlock]:
        return itertools.islice(source(blocks), 3)

    with pytest.raises(RuntimeError, match="ended"):
        for _ in read_all(loaders(plan, 1, 2, source=short)[0]):
            pass


@pytest.mark.parametrize("kind", ["characters", "word ids"])
def test_one_streams_order_is_the_originals(shared: Path, kind: str) -> None:
    folder = shared / "golden" / "data"
    words = Vocabulary.read(folder / "vocab.txt")
    paths = [folder / "shards" / f"shard-{i:05d}-of-00003" for i in (2, 1, 0)]
    corpus = Corpus.from_shards([index_shard(str(path), 200) for path in paths])
    plan = StreamPlan(corpus, 1, shuffle=False, epochs=1)
    assert plan.positions == 677 and len(corpus) > 10
    table = TypeTable(words, 50, 7) if kind == "characters" else None
    look = functools.partial(thread_source, vocabulary=words)
    loader = StreamLoader(plan, range(1), StreamCursors.start(1), look, words, 9, table)
    ours: list[list[np.ndarray]] = [[], [], [], []]
    for batch in read_all(loader):
        n = int(batch.lengths[0])
        for d in range(2):
            ours[2 * d].extend(batch.types[batch.inputs[d, 0, :n]])
            ours[2 * d + 1].extend(batch.targets[d, 0, :n])
    assert len(ours[0]) == 677
    name = "tokens_characters" if kind == "characters" else "token_ids"
    with np.load(folder / "batches.npz") as golden:
        for i in range(400):
            for d, way in enumerate(("", "_reverse")):
                place = f"char_b1_t1/batch{i}/"
                assert np.array_equal(ours[2 * d][i], golden[f"{place}{name}{way}"][0, 0]), (i, way)
                assert ours[2 * d + 1][i] == golden[f"{place}next_token_id{way}"][0, 0], (i, way)
