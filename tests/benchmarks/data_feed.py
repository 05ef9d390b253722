"""Words per second from text to training batches: encoding alone, in one process, and through Ray Data.

    python tests/benchmarks/data_feed.py --corpus GLOB --vocab FILE [--peer PYTHON] [--streams 32] [--rounds 5]

encode: bytes of a block to ids, lengths and unknown words' characters, reading of the file left out, one core.
thread: files to `Batch`, in this process (the source without Ray). ray: the same with Ray Data's tasks encoding, on all
cores; the first batches, while Ray starts, are left out. A word here is a position: sentence ends count.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import ray
import torch
from cases import SIZES, Run, Timed, arguments_of, cut_vocabulary, measured, peers, read_corpus, with_ratios

from elmo_ray.data.corpus import Corpus
from elmo_ray.data.encode import encode_block, read_block, thread_source
from elmo_ray.data.ray_source import ray_source
from elmo_ray.data.streams import BlockSource, StreamCursors, StreamLoader, StreamPlan
from elmo_ray.data.vocabulary import Vocabulary
from elmo_ray.data.word_types import TypeTable


def encoding(corpus: Corpus, vocabulary: Vocabulary) -> Run:
    texts = [(read_block(block), block.positions) for block in itertools.islice(corpus.blocks(), 64)]
    endless = itertools.cycle(texts)

    def run(blocks: int) -> dict[str, float]:
        with Timed() as timed:
            positions = 0
            for text, count in itertools.islice(endless, blocks):
                encode_block(text, vocabulary, 50)
                positions += count
        return timed.record(positions)

    return run


def batching(corpus: Corpus, vocabulary: Vocabulary, source: BlockSource, streams: int) -> Run:
    plan = StreamPlan(corpus, streams, seed=1)
    table = TypeTable(vocabulary, 50, 5)
    loader = StreamLoader(plan, range(streams), StreamCursors.start(streams), source, vocabulary, 20, table)

    def run(batches: int) -> dict[str, float]:
        with Timed() as timed:
            positions = sum(loader.next_batch().positions for _ in range(batches))
        return timed.record(positions)

    return run


def cases(arguments: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    corpus = read_corpus(arguments.corpus)
    vocab = cut_vocabulary(arguments.vocab, arguments.words, folder)
    vocabulary = Vocabulary.read(vocab)
    runs = {
        "encode": encoding(corpus, vocabulary),
        "thread": batching(corpus, vocabulary, partial(thread_source, vocabulary=vocabulary), arguments.streams),
    }
    if not arguments.no_ray:
        ray.init(include_dashboard=True, logging_level="ERROR", log_to_driver=False)
        source = partial(ray_source, vocabulary_path=str(vocab), vocabulary_sha256=vocabulary.sha256)
        runs["ray"] = batching(corpus, vocabulary, source, arguments.streams)
        runs["ray"](200)
    if arguments.peer:
        size = SIZES["small"]
        runs["bilm-tf"] = peers(arguments.peer, size, arguments.corpus, vocab, arguments.streams, 2, "data")
    for record in with_ratios(measured(runs, arguments.rounds, arguments.seconds)):
        yield {"streams": arguments.streams, "words": vocabulary.size, **record}


def main() -> None:
    parser = arguments_of(__doc__, seconds=5)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--words", type=int, default=50_000, help="of the vocabulary")
    parser.add_argument("--no-ray", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for line in cases(arguments, Path(folder)):
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
