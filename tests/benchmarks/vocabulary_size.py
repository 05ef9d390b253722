"""Time and memory of a training step with big and small vocabularies, the same ids in both: they must not grow.

    python tests/benchmarks/vocabulary_size.py [--words 10000 1000000] [--threads 2] [--rounds 7] [--steps 20]

Small sizes, 1,024 negatives, made-up batches whose ids are all below the smallest vocabulary. Each size runs in a
process of its own, in turn. One JSON line: seconds of a step (median of rounds), peak memory above what was there
before the steps (so without the table and its slots), and both ratios. Linux only.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from cases import SIZES, made_up_batch, our_config

from elmo_ray.model.bilm import BiLM
from elmo_ray.training.step import TrainStep

ROWS, UNROLL, TYPES, IDS = 32, 20, 500, 9_000


def memory(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(field))


def serve(words: int, threads: int) -> None:
    """In a process of its own: each line on standard input is a number of steps."""
    torch.set_num_threads(threads)
    size = SIZES["small"]
    config = our_config(size, "fp32", ROWS)
    model = BiLM(config.model, config.softmax, words)
    model.reset_parameters(1)
    step = TrainStep(config, model, ROWS)
    batches = [made_up_batch(number, ROWS, UNROLL, TYPES, IDS, size["negatives"]) for number in range(8)]
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = memory("VmRSS")
    step.run(batches[0])
    for line in sys.stdin:
        start = time.perf_counter()
        for number in range(int(line)):
            step.run(batches[number % len(batches)])
        seconds = (time.perf_counter() - start) / int(line)
        print(json.dumps({"seconds": seconds, "memory": memory("VmHWM") - before}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--words", type=int, nargs=2, default=[10_000, 1_000_000])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=20, help="of a round")
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve, arguments.threads)
        return
    servers = []
    for words in arguments.words:
        command = [sys.executable, __file__, "--serve", str(words), "--threads", str(arguments.threads)]
        servers.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
    found: list[list[dict[str, float]]] = [[] for _ in servers]
    for number in range(arguments.rounds + 1):
        for server, results in zip(servers, found, strict=True):
            assert server.stdin is not None and server.stdout is not None
            print(arguments.steps, file=server.stdin, flush=True)
            result = json.loads(server.stdout.readline())
            if number:  # the first round touches the tables' pages for the first time
                results.append(result)
    seconds = [statistics.median(r["seconds"] for r in results) for results in found]
    peaks = [results[-1]["memory"] for results in found]
    record = {
        "words": arguments.words,
        "milliseconds": [round(s * 1e3, 2) for s in seconds],
        "time_ratio": round(statistics.median(b["seconds"] / a["seconds"] for a, b in zip(*found, strict=True)), 3),
        "memory_MB": [round(m / 1e6, 1) for m in peaks],
        "memory_ratio": round(peaks[1] / peaks[0], 3),
    }
    print(json.dumps(record))
    for server in servers:
        assert server.stdin is not None
        server.stdin.close()
        server.wait()


if __name__ == "__main__":
    main()
