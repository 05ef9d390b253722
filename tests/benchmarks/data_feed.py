"""Words per second from text to training batches: encoding alone, in one process, and through Ray Data.

    python tests/benchmarks/data_feed.py --corpus GLOB --vocab FILE [--peer PYTHON] [--streams 32] [--rounds 5]

encode: bytes of a block to ids, lengths and unknown words' characters, reading of the file left out, one core.
thread: files to `Batch`, in this process (the source without Ray). ray: the same with Ray Data's tasks encoding, on all
cores; the first batches, while Ray starts, are left out. A word here is a position: sentence ends count.

    python tests/benchmarks/data_feed.py --whole [--streams 128] [--rounds 5] [--text FOLDER]

The whole feed of the original's sizes in one process without Ray: files to the inputs of training steps, on the text of
`gpu_check.py` (made in FOLDER, or found there). ELMO_RAY_KERNELS=off leaves the compiled loops out. One line, with
medians of the rounds: `positions_per_second`, as fast as the feed can; `step_ms` of steps of small PyTorch calls in the
main thread, some 6 ms, `with_feed_ms` of the same with a new input for each step, and `longer`, their ratio less one,
over turns of a quarter of a second each (`quartiles_longer`); `blocked_ms` of a step with the feed the main thread
waited for Python's lock or for its input, which other programs on the machine change less.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from cases import SIZES, Run, Timed, arguments_of, cut_vocabulary, measured, our_config, peers, read_corpus, with_ratios
from gpu_check import made_up_text

from elmo_ray.data.corpus import Corpus
from elmo_ray.data.encode import ThreadSource, encode_block, read_block, thread_source
from elmo_ray.data.ray_source import ray_source
from elmo_ray.data.streams import BlockSource, StreamCursors, StreamLoader, StreamPlan
from elmo_ray.data.vocabulary import Vocabulary
from elmo_ray.data.word_types import TypeTable
from elmo_ray.machine import keep_freed_memory
from elmo_ray.training.assembler import StepAssembler
from elmo_ray.training.capacities import Capacities
from elmo_ray.training.feed_process import SWITCH_INTERVAL_S
from elmo_ray.training.feeding import Feeder, ReadyBatch
from elmo_ray.training.ranks import Exchange, Flags
from elmo_ray.training.step_input import StepInput, Transfer

_TURN_S = 0.25


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


def whole_feed(text: Path, streams: int, own_process: bool) -> Iterator[ReadyBatch]:
    """Inputs of captured steps at the original's sizes, without end, padded and packed, from a process or a thread."""
    vocabulary = Vocabulary.read(text / "vocab.txt")
    config = our_config(SIZES["original"], "bf16", streams)
    plan = StreamPlan(read_corpus(str(text / "train-*.txt")), streams, seed=1)
    filters = config.model.char_cnn.filters
    table = TypeTable(vocabulary, config.model.char_cnn.max_characters, max(width for width, _ in filters))
    source = ThreadSource(vocabulary)
    start = StreamCursors.start(streams)
    loader = StreamLoader(plan, range(streams), start, source, vocabulary, config.train.unroll, table)
    assembler = StepAssembler(config, vocabulary.size, range(streams), Exchange())
    capacities = Capacities.of(config, vocabulary.size, table, streams)
    device, steps = torch.device("cpu"), range(1 << 40)
    feeder = Feeder(loader, assembler, steps, Flags, device, capacities=capacities, own_process=own_process)
    if not own_process:
        feeder.transfer = Packing(device)
    return iter(feeder)


class Packing(Transfer):
    """What a thread does to an input on its way to a GPU, as far as a CPU goes."""

    def __call__(self, batch: StepInput) -> tuple[StepInput, None]:
        return batch.to(self.device), None


def small_calls(count: int) -> None:
    """What a training thread does that launches a step: PyTorch calls of microseconds, with Python between them."""
    x = torch.ones(8, 8)
    for _ in range(count):
        x = (x + 1.0).mul_(0.5)


def milliseconds(steps: int, calls: int, feed: Iterator[ReadyBatch] | None) -> tuple[float, float]:
    """Of a step: in all; and neither running nor waiting for a core, so waiting for Python's lock or for input."""
    start, start_blocked = time.perf_counter(), blocked_seconds()
    for _ in range(steps):
        if feed is not None:
            next(feed)
        small_calls(calls)
    in_all, blocked = time.perf_counter() - start, blocked_seconds() - start_blocked
    return in_all / steps * 1e3, blocked / steps * 1e3


def blocked_seconds() -> float:
    """Of this thread so far, from any beginning; as far as the last tick of the clock. NaN where not Linux tells it."""
    try:
        running, waiting = Path("/proc/thread-self/schedstat").read_text().split()[:2]
    except OSError:
        return math.nan
    return time.perf_counter() - (int(running) + int(waiting)) / 1e9


def whole(arguments: argparse.Namespace, text: Path) -> dict[str, Any]:
    if not text.exists():
        made_up_text(text)
    keep_freed_memory()  # as the verbs do
    sys.setswitchinterval(SWITCH_INTERVAL_S)  # as training on a GPU does
    feed = whole_feed(text, arguments.streams, not arguments.thread)
    for _ in range(100):  # the blocks of all streams, and what is compiled
        next(feed)
    speeds, per_cpu = [], []
    for _ in range(arguments.rounds):
        positions, end = 0, time.perf_counter() + arguments.seconds
        with Timed() as timed:
            while time.perf_counter() < end:
                positions += next(feed).batch.positions
        speeds.append(positions / timed.seconds)
        per_cpu.append(positions / timed.cpu_seconds)
    time.sleep(0.5)  # the feeder has its steps ahead
    milliseconds(100, 1000, None)  # the clock and the caches
    calls = round(1000 * arguments.step_ms / milliseconds(200, 1000, None)[0])
    # in turn and for a short time each, for a shared machine changes its speed within seconds
    steps = max(1, round(_TURN_S * 1000 / arguments.step_ms))
    alone, beside, blocked = [], [], []
    for _ in range(round(arguments.rounds * arguments.seconds / _TURN_S)):
        alone.append(milliseconds(steps, calls, None)[0])
        in_all, of_it_blocked = milliseconds(steps, calls, feed)
        beside.append(in_all)
        blocked.append(of_it_blocked)
    longer = np.divide(beside, alone) - 1
    feed.close()  # type: ignore[attr-defined]
    return {
        "case": "whole, " + ("thread" if arguments.thread else "process"),
        "streams": arguments.streams,
        "positions_per_second": round(statistics.median(speeds)),
        "positions_per_cpu_second": round(statistics.median(per_cpu)),
        "rounds": [round(speed) for speed in speeds],
        "step_ms": round(statistics.median(alone), 3),
        "with_feed_ms": round(statistics.median(beside), 3),
        "longer": round(statistics.median(longer), 4),
        "blocked_ms": round(statistics.median(blocked), 3),
        "quartiles_longer": np.round(np.quantile(longer, [0.25, 0.75]), 4).tolist(),
    }


def main() -> None:
    parser = arguments_of(__doc__, seconds=3, required=False)
    parser.add_argument("--streams", type=int)
    parser.add_argument("--words", type=int, default=50_000, help="of the vocabulary")
    parser.add_argument("--no-ray", action="store_true")
    parser.add_argument("--whole", action="store_true", help="files to the inputs of steps, on a text of its own")
    parser.add_argument("--thread", action="store_true", help="--whole by a thread, in place of a process of its own")
    parser.add_argument("--step-ms", type=float, default=6.0, help="of the training thread's step in --whole")
    parser.add_argument("--text", type=Path, metavar="FOLDER", help="of the text of --whole, to keep it")
    arguments = parser.parse_args()
    arguments.streams = arguments.streams or (128 if arguments.whole else 32)
    torch.set_num_threads(1)
    if arguments.whole:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(whole(arguments, arguments.text or Path(folder) / "text")), flush=True)
        return
    if not (arguments.corpus and arguments.vocab):
        parser.error("--corpus and --vocab are needed, or --whole")
    with tempfile.TemporaryDirectory() as folder:
        for line in cases(arguments, Path(folder)):
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
