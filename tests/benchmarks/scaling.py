"""What a second worker brings and costs, measured here; and from that what many GPUs would need, computed.

    python tests/benchmarks/scaling.py measure --corpus GLOB --vocab FILE [--sizes small original]
        [--gradients full bf16] [--streams 32] [--steps 40] [--rounds 3]
    python tests/benchmarks/scaling.py words --corpus GLOB
    python tests/benchmarks/scaling.py plan

`measure` trains with 1 and 2 processes, each with half of the cores, on gloo over loopback and without Ray, as many
streams for each; a JSON line for each case: positions/s, their ratio to one worker's, bytes that a worker hands over
for a step by part, the bytes that loopback saw, the share of a step that communication takes (against the same steps
without any), and the share that waits for text.
`words` counts the distinct words in so many consecutive words, on which the rows of a step depend.
`plan` prints the table of cluster/README.md: computed, not measured. Its assumptions are the constants below.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import glob
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from helpers.traffic import Traffic, counted
from train_step import SIZES

from elmo_ray.config import PretrainConfig
from elmo_ray.data.corpus import Corpus
from elmo_ray.data.encode import thread_source
from elmo_ray.data.scan import index_shard
from elmo_ray.data.streams import StreamCursors, StreamLoader, StreamPlan, split_evenly
from elmo_ray.data.vocabulary import Vocabulary
from elmo_ray.elmo.scoring import character_table
from elmo_ray.machine import keep_freed_memory
from elmo_ray.model.bilm import BiLM
from elmo_ray.training import step as step_module
from elmo_ray.training.assembler import StepAssembler
from elmo_ray.training.feeding import Feeder
from elmo_ray.training.ranks import Exchange, Flags, Ranks
from elmo_ray.training.step import TrainStep

# ---------------------------------------------------------------- plan: what is assumed

GPU_FLOPS = 800e12 * 0.2
"""Of an H100 in bf16, a fifth of its peak: LSTM steps are products of 128 rows. Not measured."""
FLOP_PER_POSITION = 3 * (107e6 / 4.5 + 151e6 + 17e6)
"""Forward and backward; the char CNN runs once for each distinct word of a step, 4.5 times less often than words."""
STREAMS_PER_GPU, UNROLL = 128, 20
DENSE_PARAMETERS = 93.6e6
PROJECTION = 512
NEGATIVES_TOUCHED = 13_500
"""Distinct rows of two draws of 8,192 out of 793,471 words."""
ENCODER_TOKENS = 3.0e6
"""Tokens/s that a core encodes (`data/encode.py`)."""
BYTES_PER_POSITION = 5.5
NETWORKS = {"3.2 Tb/s": 0.8 * 400e9, "100 Gb/s": 0.8 * 12.5e9}
"""Bytes/s that a node of 8 GPUs sends to the next in an all-reduce: four fifths of what its network is sold for."""
NVLINK = 300e9
"""The same between GPUs of a node."""
HEAPS = (13.0, 0.56)
"""Distinct words in n consecutive ones: 13 n ** 0.56 (see `words`)."""


def computed(gpus: int, streams: int = STREAMS_PER_GPU, width: int = 4) -> dict[str, Any]:
    """What one step needs with so many GPUs; width: bytes of a number that travels."""
    positions = streams * UNROLL
    compute = positions * FLOP_PER_POSITION / GPU_FLOPS
    rows = NEGATIVES_TOUCHED + HEAPS[0] * (2 * positions * gpus) ** HEAPS[1]
    sent = (DENSE_PARAMETERS + rows * (PROJECTION + 1)) * width
    ring = 2 * (gpus - 1) / gpus * sent
    times = {name: 0.0 if gpus == 1 else ring / (NVLINK if gpus <= 8 else NETWORKS[name]) for name in NETWORKS}
    dense = DENSE_PARAMETERS * width / sent  # runs beside the backward pass, two thirds of the step; the rows after it
    waits = {name: t * (1 - dense) + max(0.0, t * dense - compute * 2 / 3) for name, t in times.items()}
    per_second = positions / compute
    return {
        "positions": positions * gpus,
        "compute_ms": compute * 1e3,
        "sent_mb": sent / 1e6,
        "exchange_mb": positions * 2 * 8 * gpus / 1e6,
        "times_ms": {name: seconds * 1e3 for name, seconds in times.items()},
        "share": {name: compute / (compute + wait) for name, wait in waits.items()},
        "cores": per_second / ENCODER_TOKENS,
        "text_gb_s": per_second * gpus * BYTES_PER_POSITION / 1e9,
        "positions_per_second": per_second * gpus,
    }


def plan() -> None:
    fast, slow = NETWORKS
    head = (
        "GPUs", "gradients", "streams a GPU", "positions a step", "compute", "sent a step", f"all-reduce, {fast}",
        f"all-reduce, {slow}", f"of linear, {fast}", f"of linear, {slow}", "ids, all to all", "text, all",
    )  # fmt: skip
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for gpus in (1, 8, 64, 256):
        for streams, width in ((128, 4), (128, 2), (512, 2)) if gpus > 1 else ((128, 4),):
            c = computed(gpus, streams, width)
            times, share = c["times_ms"], c["share"]
            row = (
                gpus, "full" if width == 4 else "bf16", streams, f"{c['positions']:,}", f"{c['compute_ms']:.1f} ms",
                f"{c['sent_mb']:.0f} MB", f"{times[fast]:.1f} ms", f"{times[slow]:.0f} ms", f"{share[fast]:.0%}",
                f"{share[slow]:.0%}", f"{c['exchange_mb']:.1f} MB", f"{c['text_gb_s'] * 1e3:,.0f} MB/s",
            )  # fmt: skip
            print(f"| {' | '.join(map(str, row))} |")
    print(f"encoder cores for a GPU: {computed(1)['cores']:.2f}")


def words(pattern: str) -> None:
    counts = [10_000, 40_000, 160_000, 640_000, 2_560_000]
    seen: set[str] = set()
    n = 0
    found: dict[int, int] = {}
    for path in sorted(glob.glob(pattern)):
        for line in open(path, encoding="utf-8"):
            for word in line.split():
                seen.add(word)
                n += 1
                if n in counts:
                    found[n] = len(seen)
    print(json.dumps({"distinct_words_in": found}))


# ---------------------------------------------------------------- measure

GRADIENTS = ["full", "bf16"]


def config_of(case: dict[str, Any]) -> PretrainConfig:
    size = SIZES[case["sizes"]]
    return PretrainConfig.from_dict({
        "data": {"train": "given", "streams": case["streams"] * case["workers"]},
        "model": {"char_cnn": size["char_cnn"], "lstm": size["lstm"]},
        "softmax": {"negatives": size["negatives"]},
        "train": {"validate_every": None, "gradients": "bf16" if case["gradients"] == "bf16" else "full"},
        "cluster": {"workers": case["workers"]},
    })  # fmt: skip


def worker(rank: int, case: dict[str, Any], folder: str) -> None:
    world = case["workers"]
    torch.set_num_threads(case["threads"])
    keep_freed_memory()  # as training does
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world,
                                timeout=datetime.timedelta(seconds=300))  # fmt: skip
    with counted() as traffic:
        result = run(rank, case, Path(folder), traffic)
    if rank == 0:
        (Path(folder) / "result.json").write_text(json.dumps(result))
    if world > 1:
        dist.destroy_process_group()


def run(rank: int, case: dict[str, Any], folder: Path, traffic: Traffic) -> dict[str, Any]:
    config, world = config_of(case), case["workers"]
    vocabulary = Vocabulary.read(folder / "vocab.txt")
    corpus = Corpus.load(folder / "corpus.npz")
    model = BiLM(config.model, config.softmax, vocabulary.size)
    model.reset_parameters(1)
    streams = split_evenly(config.data.streams, world)[rank]
    step = TrainStep(config, model, len(streams), rank, world)
    ranks = Ranks(rank, world)
    loader = StreamLoader(
        StreamPlan(corpus, config.data.streams, 1), streams, StreamCursors.start(len(streams)),
        partial(thread_source, vocabulary=vocabulary), vocabulary, config.train.unroll,
        character_table(model, vocabulary),
    )  # fmt: skip
    assembler = StepAssembler(config, vocabulary.size, streams, Exchange(ranks))
    feeder = iter(Feeder(loader, assembler, range(1 << 40), Flags, torch.device("cpu")))

    def steps(count: int, silent: bool = False) -> dict[str, float]:
        traffic.clear()
        before = loopback()
        start, positions, waited = time.perf_counter(), 0, 0.0
        for ready in islice(feeder, count):
            with quiet(step) if silent else contextlib.nullcontext():
                step.run(ready.batch)
            positions += ready.batch.positions
            waited += ready.waited
        seconds = time.perf_counter() - start
        return {"positions": positions, "seconds": seconds, "waited": waited, "loopback": loopback() - before}

    steps(3)
    loud, silent = [], []
    for _ in range(case["rounds"]):
        loud.append(steps(case["steps"]))
        bytes_of = {part: round(count / case["steps"]) for part, count in traffic.bytes.items()}
        if world > 1:
            silent.append(steps(case["steps"], silent=True))
    each = statistics.median(r["seconds"] for r in loud) / case["steps"]
    alone = statistics.median(r["seconds"] for r in silent) / case["steps"] if silent else each
    return {
        "positions_per_second": round(statistics.median(r["positions"] / r["seconds"] for r in loud), 1),
        "rounds": [round(r["positions"] / r["seconds"], 1) for r in loud],
        "bytes_per_step": bytes_of,
        "loopback_bytes_per_step": round(statistics.median(r["loopback"] for r in loud) / case["steps"]),
        "step_ms": round(each * 1e3, 1),
        "communication_share": round(max(0.0, 1 - alone / each), 3),
        "data_wait_share": round(statistics.median(r["waited"] / r["seconds"] for r in loud), 3),
    }


@contextlib.contextmanager
def quiet(step: TrainStep) -> Iterator[None]:
    """A step that sends no gradients: what it computes is of no use, its time is that of a step alone."""
    forward, average = step.forward, step_module.average
    step.forward, step_module.average = step.model, lambda *_: None
    try:
        yield
    finally:
        step.forward, step_module.average = forward, average


def loopback() -> int:
    """Bytes that this machine has sent to itself; 0 where it does not say."""
    try:
        lines = Path("/proc/net/dev").read_text().splitlines()
        return next(int(line.split(":")[1].split()[8]) for line in lines if line.strip().startswith("lo:"))
    except (OSError, StopIteration):
        return 0


def measure(arguments: argparse.Namespace) -> None:
    corpus = Corpus.from_shards([index_shard(path) for path in sorted(glob.glob(arguments.corpus))])
    cores = len(os.sched_getaffinity(0))
    for size in arguments.sizes:
        alone: float | None = None
        for workers, gradients in [(1, "full"), *((2, g) for g in arguments.gradients)]:
            with tempfile.TemporaryDirectory() as folder:
                lines = Path(arguments.vocab).read_text(encoding="utf-8").splitlines()[: SIZES[size]["words"]]
                (Path(folder) / "vocab.txt").write_text("".join(f"{w}\n" for w in lines), encoding="utf-8")
                corpus.save(Path(folder) / "corpus.npz")
                case = {
                    "sizes": size, "workers": workers, "gradients": gradients, "streams": arguments.streams,
                    "threads": max(1, cores // 2), "steps": arguments.steps, "rounds": arguments.rounds,
                }  # fmt: skip
                torch.multiprocessing.spawn(worker, args=(case, folder), nprocs=workers)  # type: ignore[attr-defined]
                result = json.loads((Path(folder) / "result.json").read_text())
            alone = alone or result["positions_per_second"]
            ratio = round(result["positions_per_second"] / alone, 2)
            print(json.dumps({**case, "words": len(lines), "of_one_worker": ratio, **result}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("what", choices=["measure", "words", "plan"])
    parser.add_argument("--corpus", metavar="GLOB")
    parser.add_argument("--vocab", metavar="FILE")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["small"])
    parser.add_argument("--gradients", nargs="+", choices=GRADIENTS, default=GRADIENTS)
    parser.add_argument("--streams", type=int, default=32, help="of a worker")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.what == "plan":
        plan()
    elif arguments.what == "words":
        words(arguments.corpus)
    else:
        measure(arguments)


if __name__ == "__main__":
    main()
