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
import glob
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from elmo_ray.config import PretrainConfig
from elmo_ray.data.encode import thread_source
from elmo_ray.data.shards import Corpus, index_shard
from elmo_ray.data.streams import StreamCursors, StreamLoader, StreamPlan
from elmo_ray.data.vocabulary import Vocabulary
from elmo_ray.model.bilm import BiLM
from elmo_ray.training.exchange import Exchange, Flags
from elmo_ray.training.feeding import Feeder, StepAssembler
from elmo_ray.training.perplexity import character_table
from elmo_ray.training.step import TrainStep

ORIGINAL_FILTERS = [[1, 32], [2, 32], [3, 64], [4, 128], [5, 256], [6, 512], [7, 1024]]
SIZES: dict[str, dict[str, Any]] = {
    "small": {
        "char_cnn": {"filters": ORIGINAL_FILTERS[:5]},
        "lstm": {"dim": 512, "projection_dim": 128},
        "words": 10_000,
        "negatives": 1024,
    },
    "original": {
        "char_cnn": {"filters": ORIGINAL_FILTERS},
        "lstm": {"dim": 4096, "projection_dim": 512},
        "words": 50_000,
        "negatives": 8192,
    },
}

Run = Callable[[int], dict[str, float]]
"""Trains for so many steps; positions, seconds and cpu_seconds of them."""


def our_config(size: dict[str, Any], precision: str, streams: int) -> PretrainConfig:
    return PretrainConfig.from_dict(
        {
            "data": {"train": "given", "streams": streams},
            "model": {"char_cnn": size["char_cnn"], "lstm": size["lstm"]},
            "softmax": {"negatives": size["negatives"]},
            "train": {"precision": precision, "validate_every": None},
            "cluster": {"workers": 0},
        }
    )


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
        start, cpu = time.perf_counter(), time.process_time()
        positions = 0
        for fed in islice(feeder, steps):
            step.run(fed.batch)
            positions += fed.batch.positions
        return {
            "positions": positions,
            "seconds": time.perf_counter() - start,
            "cpu_seconds": time.process_time() - cpu,
        }

    return run


def peers(python: str, size: dict[str, Any], corpus: str, vocabulary: Path, streams: int, threads: int) -> Run:
    options = {
        "bidirectional": True,
        "char_cnn": {
            "activation": "relu",
            "embedding": {"dim": 16},
            "filters": size["char_cnn"]["filters"],
            "max_characters_per_token": 50,
            "n_characters": 261,
            "n_highway": 2,
        },
        "dropout": 0.1,
        "lstm": {
            **size["lstm"],
            "cell_clip": 3,
            "n_layers": 2,
            "proj_clip": 3,
            "use_skip_connections": True,
        },
        "all_clip_norm_val": 10.0,
        "learning_rate": 0.2,
        "batch_size": streams,
        "unroll_steps": 20,
        "n_negative_samples_batch": size["negatives"],
    }
    case = {"train": corpus, "vocab": str(vocabulary), "options": options, "threads": threads}
    script = Path(__file__).with_name("bilm_tf_peer.py")
    process = subprocess.Popen(
        [python, str(script), json.dumps(case)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdin is not None and process.stdout is not None
    ask, answers = process.stdin, process.stdout

    def run(steps: int) -> dict[str, float]:
        print(steps, file=ask, flush=True)
        line = answers.readline()
        if not line:
            raise SystemExit(f"{python} {script.name} ended with {process.wait()}")
        return dict(json.loads(line))

    return run


def measured(runs: dict[str, Run], rounds: int, seconds: float) -> dict[str, dict[str, Any]]:
    """Rounds of about so many seconds each, in turn; medians of each."""
    steps = {}
    for name, run in runs.items():
        run(2)  # what is done once: packing, tracing, the first blocks of text
        steps[name] = max(2, round(seconds * 3 / run(3)["seconds"]))
    found: dict[str, list[dict[str, float]]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            found[name].append(run(steps[name]))
    return {
        name: {
            "per_second": round(statistics.median(r["positions"] / r["seconds"] for r in results), 1),
            "per_cpu_second": round(statistics.median(r["positions"] / r["cpu_seconds"] for r in results), 1),
            "rounds": [round(r["positions"] / r["seconds"], 1) for r in results],
        }
        for name, results in found.items()
    }


def cases(arguments: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    shards = [index_shard(path) for path in sorted(glob.glob(arguments.corpus))]
    corpus = Corpus.from_shards(shards)
    for name in arguments.sizes:
        size = SIZES[name]
        words = Path(arguments.vocab).read_text(encoding="utf-8").splitlines()[: size["words"]]
        vocab = folder / f"vocab-{name}.txt"
        vocab.write_text("".join(f"{word}\n" for word in words), encoding="utf-8")
        vocabulary = Vocabulary.read(vocab)
        runs = {
            precision: ours(our_config(size, precision, arguments.streams), corpus, vocabulary)
            for precision in arguments.precision
        }
        if arguments.peer:
            runs["bilm-tf"] = peers(arguments.peer, size, arguments.corpus, vocab, arguments.streams, arguments.threads)
        results = measured(runs, arguments.rounds, arguments.seconds)
        peer = results.get("bilm-tf")
        for case, result in results.items():
            ratios = {}
            if peer is not None and case != "bilm-tf":
                ratios = {
                    f"ratio_{unit}": round(result[unit] / peer[unit], 2) for unit in ("per_second", "per_cpu_second")
                }
            yield {
                "sizes": name,
                "case": case,
                "words": vocabulary.size,
                "streams": arguments.streams,
                "threads": arguments.threads,
                **ratios,
                **result,
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--corpus", required=True, metavar="GLOB")
    parser.add_argument("--vocab", required=True, metavar="FILE")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["small"])
    parser.add_argument("--precision", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    parser.add_argument("--peer", metavar="PYTHON", help="Python of an environment with bilm and tensorflow-cpu")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=20, help="of a round")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        for line in cases(arguments, Path(folder)):
            print(json.dumps(line), flush=True)
    sys.stdout.flush()


if __name__ == "__main__":
    main()
