"""Sentences by themselves: each position once, rows of like length, the same whatever the rows and windows."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.tiny_runs import sentences

from elmo_ray.data.encode import EncodedBlock, encode_text
from elmo_ray.data.sentences import sentence_groups
from elmo_ray.data.vocabulary import SPECIAL_WORDS, Vocabulary
from elmo_ray.data.word_types import TypeTable

C = 12
VOCABULARY = Vocabulary.from_words([*SPECIAL_WORDS, "the", "cat", "sees", "dog", ".", "old"])
LINES = [*sentences(40, seed=3), "", "zeppelin " * 30, "the zeppelin sees the zeppelin ."]


def blocks_of(lines: list[str], size: int) -> list[tuple[EncodedBlock, np.ndarray]]:
    """Blocks of `size` lines, with the lines' numbers as labels."""
    result = []
    for first in range(0, len(lines), size):
        part = lines[first : first + size]
        text = "".join(line + "\n" for line in part)
        result.append((encode_text(text, VOCABULARY, C), np.arange(first, first + len(part))))
    return result


def positions_of(line: str) -> list[tuple[str, int, str, int]]:
    """Forward input, forward target, backward input, backward target; inputs as words, targets as ids."""
    words = line.split()
    ids = [VOCABULARY.ids.get(word, VOCABULARY.unk) for word in words]
    forward = zip(["<S>", *words], [*ids, VOCABULARY.eos], strict=True)
    backward = zip(["</S>", *reversed(words)], [*reversed(ids), VOCABULARY.bos], strict=True)
    return [(*a, *b) for a, b in zip(forward, backward, strict=True)]


def spelt(row: np.ndarray) -> str:
    ids = row[row != 260].tolist()[1:-1]
    return {256: "<S>", 257: "</S>"}.get(ids[0]) or bytes(ids).decode()


@pytest.mark.parametrize("gathered", [1, 100, 10_000])
@pytest.mark.parametrize(("rows", "unroll"), [(1, 50), (7, 4), (1000, 1000)])
def test_every_position_of_every_sentence_once(rows: int, unroll: int, gathered: int) -> None:
    table = TypeTable(VOCABULARY, C, 3)
    found: dict[int, list[tuple[str, int, str, int]]] = {}
    for group in sentence_groups(blocks_of(LINES, 9), VOCABULARY, rows, gathered):
        assert len(group.labels) <= rows
        assert list(group.lengths) == sorted(group.lengths), "neighbours in length"
        for batch in group.windows(unroll, VOCABULARY, table, 2):
            assert batch.targets.shape[2] <= unroll
            words = [spelt(row) for row in batch.types]
            for row, label in enumerate(group.labels.tolist()):
                n = int(batch.lengths[row])
                assert (batch.targets[:, row, n:] == -1).all() and (batch.targets[:, row, :n] >= 0).all()
                seen = found.setdefault(label, [])
                for t in range(n):
                    inputs = [words[batch.inputs[d, row, t]] for d in (0, 1)]
                    targets = [int(batch.targets[d, row, t]) for d in (0, 1)]
                    seen.append((inputs[0], targets[0], inputs[1], targets[1]))
    expected = {i: positions_of(line) for i, line in enumerate(LINES)}
    cut = {i: [(a[: C - 2], b, c[: C - 2], d) for a, b, c, d in line] for i, line in expected.items()}
    assert found == cut


def test_word_ids_and_one_direction() -> None:
    for group in sentence_groups(blocks_of(LINES, 50), VOCABULARY, 8):
        for batch in group.windows(6, VOCABULARY, None, 1):
            assert batch.inputs.shape[0] == batch.targets.shape[0] == 1
            assert batch.types.max() < VOCABULARY.size
            for row, label in enumerate(group.labels.tolist()):
                first = batch.types[batch.inputs[0, row, 0]]
                if batch.new_block[row]:
                    assert first == VOCABULARY.bos and batch.targets[0, row, 0] == positions_of(LINES[label])[0][1]


def test_no_text() -> None:
    assert list(sentence_groups([], VOCABULARY, 4)) == []
    empty = encode_text("", VOCABULARY, C)
    assert list(sentence_groups([(empty, np.zeros(0, np.int64))], VOCABULARY, 4)) == []
