"""Positions per second of the bare training step, without Ray, beside bilm-tf's in the same run.

    python tests/benchmarks/train_step.py --corpus GLOB --vocab FILE [--sizes small original] [--precision fp32 bf16]
        [--peer PYTHON] [--threads 2] [--rounds 5] [--seconds 20]

Reading and encoding of text are included on both sides, the start is not. PYTHON is that of an environment with
`bilm==0.1.post5`, `tensorflow-cpu==2.15.1` and `numpy<2`. Rounds alternate between ours and the peer's, so that both
meet the same noise of the machine. One JSON line a case: median positions per second and per CPU second, and their
ratio to the peer's.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from cases import SIZES, Run, Timed, arguments_of, cut_vocabulary, measured, our_config, peers, read_corpus, with_ratios

from elmo_ray.config import PretrainConfig
from elmo_ray.data.corpus import Corpus
from elmo_ray.data.encode import thread_source
from elmo_ray.data.streams import StreamCursors, StreamLoader, StreamPlan
from elmo_ray.data.vocabulary import Vocabulary
from elmo_ray.elmo.scoring import character_table
from elmo_ray.machine import keep_freed_memory
from elmo_ray.model.bilm import BiLM
from elmo_ray.training.assembler import StepAssembler
from elmo_ray.training.feeding import Feeder
from elmo_ray.training.ranks import Exchange, Flags
from elmo_ray.training.step import TrainStep


def ours(config: PretrainConfig, corpus: Corpus, vocabulary: Vocabulary) -> Run:
    model = BiLM(config.model, config.softmax, vocabulary.size)
    model.reset_parameters(config.run.seed)
    n = config.data.streams
    step = TrainStep(config, model, n)
    source = partial(thread_source, vocabulary=vocabulary)
    table = character_table(model, vocabulary)
    plan = StreamPlan(corpus, n, config.run.seed)
    loader = StreamLoader(plan, range(n), StreamCursors.start(n), source, vocabulary, config.train.unroll, table)
    assembler = StepAssembler(config, vocabulary.size, range(n), Exchange())
    feeder = iter(Feeder(loader, assembler, range(1 << 40), Flags, torch.device("cpu")))

    def run(steps: int) -> dict[str, float]:
        positions = 0
        with Timed() as timed:
            for ready in islice(feeder, steps):
                step.run(ready.batch)
                positions += ready.batch.positions
        return timed.record(positions)

    return run


def cases(arguments: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    corpus = read_corpus(arguments.corpus)
    for name in arguments.sizes:
        size = SIZES[name]
        vocab = cut_vocabulary(arguments.vocab, size["words"], folder)
        vocabulary = Vocabulary.read(vocab)
        runs = {
            precision: ours(our_config(size, precision, arguments.streams), corpus, vocabulary)
            for precision in arguments.precision
        }
        if arguments.peer:
            runs["bilm-tf"] = peers(arguments.peer, size, arguments.corpus, vocab, arguments.streams, arguments.threads)
        for record in with_ratios(measured(runs, arguments.rounds, arguments.seconds)):
            yield {"sizes": name, "streams": arguments.streams, "threads": arguments.threads, **record}


def main() -> None:
    parser = arguments_of(__doc__)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["small"])
    parser.add_argument("--precision", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    parser.add_argument("--streams", type=int, default=32)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()  # as the verbs do
    with tempfile.TemporaryDirectory() as folder:
        for line in cases(arguments, Path(folder)):
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
