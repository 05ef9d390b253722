"""Blocks encoded by real Ray Data tasks: the same as from the thread source, in order, bounded, and closing cleanly."""

from __future__ import annotations

import itertools
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from elmo_ray.data.corpus import Block, Corpus
from elmo_ray.data.encode import EncodedBlock, thread_source
from elmo_ray.data.scan import index_shard
from elmo_ray.data.vocabulary import SPECIAL_WORDS, Vocabulary
from elmo_ray.errors import DataError

os.environ.setdefault("RAY_DATA_LOG_LEVEL", "ERROR")

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray_session")]

WORDS = ["the", "of", "a", "naïve", "Zoë", "日本", "unlikely-word-", "x" * 60, ",", "."]


class Text:
    """Three small shards with known and unknown words, indexed in blocks of about 4 kB, and a vocabulary."""

    def __init__(self, folder: Path) -> None:
        source = random.Random(1)
        for number in range(3):
            lines = (
                " ".join(source.choice(WORDS) + str(source.randrange(40)) for _ in range(source.randrange(1, 30)))
                for _ in range(900)
            )
            (folder / f"shard{number}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        self.paths = sorted(str(path) for path in folder.glob("shard*.txt"))
        self.corpus = Corpus.from_shards([index_shard(path, 4096) for path in self.paths])
        known = [word + str(number) for word in WORDS[:6] for number in range(0, 40, 2)]
        self.vocabulary = Vocabulary.from_words([*SPECIAL_WORDS, *known])
        self.path = str(folder / "vocab.txt")
        self.vocabulary.write(self.path)

    def endless(self) -> Iterator[Block]:
        return itertools.cycle(self.corpus.blocks())

    def watched(self, asked: list[int]) -> Iterator[Block]:
        """`endless`, with the bytes of each block put down as it is asked for."""
        for block in self.endless():
            asked.append(block.end - block.start)
            yield block

    def expected(self, n: int) -> list[EncodedBlock]:
        return list(itertools.islice(thread_source(self.endless(), self.vocabulary, 20), n))


@pytest.fixture
def text(tmp_path: Path) -> Text:
    return Text(tmp_path)


def assert_equal(actual: list[EncodedBlock], expected: list[EncodedBlock]) -> None:
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        for name in ("ids", "lengths", "unknown"):
            left, right = getattr(one, name), getattr(other, name)
            assert left.dtype == right.dtype and left.shape == right.shape and (left == right).all()
        assert one.replaced == other.replaced


def wait_until(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def source_threads() -> list[str]:
    names = [thread.name for thread in threading.enumerate()]
    return [name for name in names if name == "ray-source" or name.startswith("StreamingExecutor")]


def test_equals_the_thread_source_over_many_segments(text: Text) -> None:
    import ray.data

    from elmo_ray.data.ray_source import ray_source

    context = ray.data.DataContext.get_current()
    before = (context.execution_options.preserve_order, context.target_max_block_size, context.enable_progress_bars)
    n = 2 * len(text.corpus) + 5
    sizes = {"segment_bytes": 200_000, "group_bytes": 30_000}
    source = ray_source(text.endless(), text.path, text.vocabulary.sha256, 20, **sizes)  # type: ignore[arg-type]
    actual = list(itertools.islice(source, n))
    source.close()
    assert_equal(actual, text.expected(n))
    assert any(len(block.unknown) for block in actual)
    assert list(source) == [], "a closed source is at its end"
    assert source_threads() == []
    finite = ray_source(text.corpus.blocks(), text.path, text.vocabulary.sha256, 20)
    assert_equal(list(finite), text.expected(len(text.corpus)))
    assert list(ray_source(iter(()), text.path, text.vocabulary.sha256, 20)) == []
    options = context.execution_options
    assert before == (options.preserve_order, context.target_max_block_size, context.enable_progress_bars)


def test_the_look_ahead_is_bounded_and_closing_stops_the_work(text: Text) -> None:
    from elmo_ray.data.ray_source import ray_source

    asked: list[int] = []
    segment, group = 60_000, 5_000
    source = ray_source(
        text.watched(asked), text.path, text.vocabulary.sha256, 20, segment_bytes=segment, group_bytes=group
    )
    taken = next(source).positions
    assert taken > 0
    counts = []
    for _ in range(4):
        time.sleep(0.5)
        counts.append(sum(asked))
    assert counts[-1] == counts[-2], "asks on and on while nothing is taken"
    assert counts[-1] <= 2 * segment + 2 * 4096 + 10 * group
    source.close()
    assert source_threads() == []
    del source
    dropped = ray_source(
        text.watched(asked), text.path, text.vocabulary.sha256, 20, segment_bytes=segment, group_bytes=group
    )
    next(dropped)
    del dropped
    wait_until(lambda: source_threads() == [])


def test_segments_grow_from_a_short_first_one(text: Text, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a run does not encode an hour's text before its first steps."""
    from elmo_ray.data import ray_source as feed

    asked: list[int] = []
    monkeypatch.setattr(feed, "_FIRST_SEGMENT_BYTES", 20_000)
    sizes = {"segment_bytes": 80_000, "group_bytes": 5_000}
    source = feed.ray_source(text.watched(asked), text.path, text.vocabulary.sha256, 20, **sizes)  # type: ignore[arg-type]
    n = 2 * len(text.corpus)
    actual = [next(source)]
    time.sleep(2)
    at_first = sum(asked)
    actual += itertools.islice(source, n - 1)
    source.close()
    assert_equal(actual, text.expected(n))
    assert at_first <= 20_000 + 40_000 + 4096 + 10 * 5_000, "the second segment waits for half of the first"
    segments = itertools.islice(feed._cut_segments(text.endless(), 80_000, 5_000), 5)
    lengths = [sum(block.end - block.start for group in segment for block in group) for segment in segments]
    for length, most in zip(lengths, [20_000, 40_000, 80_000, 80_000, 80_000], strict=True):
        assert most / 2 < length <= most


def test_an_error_comes_in_its_place_as_a_data_error(text: Text) -> None:
    from elmo_ray.data.ray_source import ray_source

    n_first = int((text.corpus.block_shard == 0).sum())
    damaged = Path(text.paths[1])
    original = damaged.read_bytes()
    damaged.write_bytes(original[: len(original) // 2])
    source = ray_source(text.corpus.blocks(), text.path, text.vocabulary.sha256, 20, group_bytes=20_000)
    got: list[EncodedBlock] = []
    with pytest.raises(DataError, match=r"shard1\.txt.*run prepare again") as caught:
        got.extend(iter(source.__next__, None))  # type: ignore[arg-type]
    assert type(caught.value) is DataError and "\n" not in str(caught.value)
    with pytest.raises(StopIteration):
        next(source)
    wait_until(lambda: source_threads() == [])
    damaged.write_bytes(original)
    assert len(got) >= n_first
    assert_equal(got, text.expected(len(got)))
    bad = original.replace(b"the1", b"th\xff1", 1)
    damaged.write_bytes(bad)
    with pytest.raises(DataError, match=r"shard1\.txt: bytes \d+ to \d+ have changed since they were indexed"):
        list(ray_source(text.corpus.blocks(), text.path, text.vocabulary.sha256, 20, on_error="replace"))
    blocks = Corpus.from_shards([index_shard(str(damaged), 4096, "replace")]).blocks()
    replaced = list(ray_source(blocks, text.path, text.vocabulary.sha256, 20, on_error="replace"))
    assert sum(block.replaced for block in replaced) == 1


def test_a_changed_or_missing_vocabulary_and_a_failing_order(text: Text) -> None:
    from elmo_ray.data.ray_source import ray_source

    with pytest.raises(DataError, match=r"vocab\.txt: the vocabulary has changed"):
        next(ray_source(text.endless(), text.path, "0" * 64, 20))
    with pytest.raises(DataError, match="nowhere"):
        next(ray_source(text.endless(), text.path + "nowhere", text.vocabulary.sha256, 20))

    def failing() -> Iterator[Block]:
        yield text.corpus.block(0)
        raise KeyError("order")

    source = ray_source(failing(), text.path, text.vocabulary.sha256, 20)
    with pytest.raises(KeyError, match="order"):
        list(source)


def test_a_rank_has_one_data_task_at_a_time(text: Text) -> None:
    """The rule that keeps ranks from starving each other: their CPUs are counted before training starts."""
    import ray

    from elmo_ray.data.ray_source import ray_source

    group = {"segment_bytes": 400_000, "group_bytes": 4_096}
    source = ray_source(text.endless(), text.path, text.vocabulary.sha256, 20, 0.25, **group)  # type: ignore[arg-type]
    free = []
    for _ in range(100):
        next(source)
        free.append(ray.available_resources()["CPU"])
    source.close()
    assert max(free) <= 4 and 3.75 in free
    assert min(free) == 3.75


def test_ranks_in_lock_step_with_cpus_for_one_task_each(text: Text) -> None:
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    from elmo_ray.data.ray_source import ray_source

    others = placement_group([{"CPU": 3.5}])
    ray.get(others.ready())
    try:
        sizes = {"segment_bytes": 150_000, "group_bytes": 10_000}
        sources = [
            ray_source(text.endless(), text.path, text.vocabulary.sha256, 20, 0.25, **sizes)  # type: ignore[arg-type]
            for _ in range(2)
        ]
        for _ in range(80):
            one, other = (next(source) for source in sources)
            assert one.positions == other.positions
        for source in sources:
            source.close()
    finally:
        remove_placement_group(others)
