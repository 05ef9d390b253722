"""Positions per second of a held-out evaluation with the full softmax, beside bilm-tf's `test` in the same run.

    python tests/benchmarks/evaluate.py --corpus GLOB --vocab FILE [--rows 256] [--precision fp32 bf16]
        [--peer PYTHON] [--threads 2] [--rounds 5] [--seconds 20]

Small sizes, 10,000 words, random weights; reading and encoding of text included. bilm-tf's runs a position of each row
at a time, ours windows, as both verbs do. Also prints by how much bf16 changes the perplexity of the first batches.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cases import SIZES, Run, Timed, arguments_of, cut_vocabulary, measured, our_config, peers, read_corpus, with_ratios

from elmo_ray.data.corpus import Corpus
from elmo_ray.data.encode import thread_source
from elmo_ray.data.streams import Batch, StreamCursors, StreamLoader, StreamPlan
from elmo_ray.data.vocabulary import Vocabulary
from elmo_ray.elmo.evaluation import POSITIONS_PER_BATCH, window_of
from elmo_ray.elmo.scoring import FixedModel, character_table, stream_losses
from elmo_ray.machine import keep_freed_memory
from elmo_ray.model.bilm import BiLM
from elmo_ray.training.step import TrainStep

DTYPES = {"fp32": None, "bf16": torch.bfloat16}


def model_of(vocabulary: Vocabulary) -> BiLM:
    config = our_config(SIZES["small"], "fp32", 32)
    model = BiLM(config.model, config.softmax, vocabulary.size)
    model.reset_parameters(1)
    TrainStep(config, model, 1)  # as a run leaves it
    return model


def batches(model: BiLM, corpus: Corpus, vocabulary: Vocabulary, rows: int) -> Iterator[Batch]:
    window = window_of(rows, POSITIONS_PER_BATCH)
    plan = StreamPlan(corpus, rows, shuffle=False)
    source = partial(thread_source, vocabulary=vocabulary)
    table = character_table(model, vocabulary)
    loader = StreamLoader(plan, range(rows), StreamCursors.start(rows), source, vocabulary, window, table)
    while True:
        yield loader.next_batch()


def ours(model: BiLM, corpus: Corpus, vocabulary: Vocabulary, rows: int, dtype: torch.dtype | None) -> Run:
    results = stream_losses(FixedModel(model, dtype), batches(model, corpus, vocabulary, rows))

    def run(steps: int) -> dict[str, float]:
        positions, total = 0, 0.0
        with Timed() as timed:
            for batch, losses in itertools.islice(results, steps):
                total += float(losses.double().sum())
                positions += batch.positions
        return timed.record(positions)

    return run


def change_of_bf16(model: BiLM, corpus: Corpus, vocabulary: Vocabulary, rows: int) -> float:
    """Perplexity with bf16 products over that with fp32, of 20 batches."""
    means = []
    for dtype in DTYPES.values():
        found = stream_losses(FixedModel(model, dtype), batches(model, corpus, vocabulary, rows))
        some = list(itertools.islice(found, 20))
        nats = sum(float(losses.double().sum()) for _, losses in some)
        means.append(nats / (model.directions * sum(batch.positions for batch, _ in some)))
    return math.exp(means[1] - means[0])


def cases(arguments: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    corpus = read_corpus(arguments.corpus)
    size = SIZES["small"]
    vocab = cut_vocabulary(arguments.vocab, size["words"], folder)
    vocabulary = Vocabulary.read(vocab)
    model = model_of(vocabulary)
    runs = {p: ours(model, corpus, vocabulary, arguments.rows, DTYPES[p]) for p in arguments.precision}
    if arguments.peer:
        threads = arguments.threads
        runs["bilm-tf"] = peers(arguments.peer, size, arguments.corpus, vocab, arguments.rows, threads, "evaluate")
    for record in with_ratios(measured(runs, arguments.rounds, arguments.seconds)):
        yield {"rows": arguments.rows, "threads": arguments.threads, **record}
    if "bf16" in arguments.precision:
        yield {"case": "perplexity, bf16 / fp32", "ratio": change_of_bf16(model, corpus, vocabulary, arguments.rows)}


def main() -> None:
    parser = arguments_of(__doc__)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--precision", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()  # as the verbs do
    with tempfile.TemporaryDirectory() as folder:
        for line in cases(arguments, Path(folder)):
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
