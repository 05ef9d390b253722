"""The whole job on Ray beside the bare step, and how long it takes to start.

    python tests/benchmarks/pretrain.py --corpus GLOB --vocab FILE [--steps 600] [--rounds 3] [--precision fp32]

Small sizes, 10,000 words. Each round runs, in turn: the bare step (`train_step.py`'s, two threads), `pretrain` with one
worker of two threads, `pretrain` with two workers of one thread, and an empty TorchTrainer.fit() with its ray.init.
One JSON line a case. Speeds are the medians of the job's own log lines but the first; of the start, the seconds from
the command to each line of its log are given. Ratios are medians over rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import train_step
from cases import SIZES, arguments_of, cut_vocabulary, our_config, read_corpus

from elmo_ray.data.vocabulary import Vocabulary
from elmo_ray.machine import keep_freed_memory
from elmo_ray.training.metrics import read_metrics

_EMPTY = """
import ray, ray.train
from ray.train.torch import TorchTrainer
def loop(): pass
ray.init("local", include_dashboard=True, logging_level="ERROR", log_to_driver=False)
TorchTrainer(loop, scaling_config=ray.train.ScalingConfig(num_workers=1, resources_per_worker={"CPU": 0.5}),
             run_config=ray.train.RunConfig(storage_path=STORAGE)).fit()
"""


def job(folder: Path, name: str, arguments: argparse.Namespace, settings: list[str]) -> dict[str, Any]:
    """Runs `pretrain`; positions per second, share of waiting for data, and seconds from the command on."""
    start = time.time()
    command = [sys.executable, "-m", "elmo_ray.pretrain", str(folder / "config.yaml"), f"run.name={name}", *settings]
    log = folder / f"{name}.log"
    with open(log, "wb") as out:
        done = subprocess.run(command, stdout=out, stderr=out, check=False)
    if done.returncode:
        raise SystemExit(f"pretrain ended with {done.returncode}:\n{log.read_text(errors='replace')[-3000:]}")
    records = read_metrics(folder / name)
    trained = [r for r in records if r["kind"] == "train"]
    steady = trained[1:]
    begun = next(r["time"] for r in records if r["kind"] == "event" and str(r["message"]).startswith("start"))
    first = trained[0]
    return {
        "per_second": statistics.median(r["positions_per_second"] for r in steady),
        "data_wait": statistics.median(r["data_wait"] for r in steady),
        "until_workers": begun - start,
        "until_first_log": first["time"] - start,
        # a log line comes after its steps, so their time is taken off
        "until_first_step": first["time"] - start - first["positions"] / first["positions_per_second"],
    }


def empty_fit(folder: Path) -> float:
    start = time.time()
    script = _EMPTY.replace("STORAGE", repr(str(folder / f"empty-{start}")))
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, env=environment)
    return time.time() - start


def main() -> None:
    parser = arguments_of(__doc__)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    keep_freed_memory()  # as the verbs do
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = SIZES["small"]
        vocab = cut_vocabulary(arguments.vocab, size["words"], folder)
        config = {
            "run": {"storage_path": str(folder), "export": False},
            "data": {"train": arguments.corpus, "vocab": str(vocab), "streams": 32},
            "model": {"char_cnn": size["char_cnn"], "lstm": size["lstm"]},
            "softmax": {"negatives": size["negatives"]},
            "train": {
                "precision": arguments.precision,
                "duration": f"{arguments.steps} steps",
                "validate_every": None,
                "log_every": max(1, arguments.steps // 10),
            },
        }
        (folder / "config.yaml").write_text(json.dumps(config), encoding="utf-8")
        corpus, vocabulary = read_corpus(arguments.corpus), Vocabulary.read(vocab)
        step = train_step.ours(our_config(size, arguments.precision, 32), corpus, vocabulary)
        step(5)
        one = ["cluster.workers=1", "cluster.threads=2"]
        two = ["cluster.workers=2", "cluster.threads=1"]
        job(folder, "prepares", arguments, [*one, "train.duration=2 steps", "train.log_every=1"])
        found: dict[str, list[Any]] = {"bare": [], "one": [], "two": [], "empty": []}
        for number in range(arguments.rounds):
            bare = step(arguments.steps // 2)
            found["bare"].append(bare["positions"] / bare["seconds"])
            found["one"].append(job(folder, f"one-{number}", arguments, one))
            found["two"].append(job(folder, f"two-{number}", arguments, two))
            found["empty"].append(empty_fit(folder))
    print_cases(found)


def print_cases(found: dict[str, list[Any]]) -> None:
    def median_of(case: str) -> dict[str, float]:
        return {key: round(statistics.median(r[key] for r in found[case]), 2) for key in found[case][0]}

    def ratio(a: list[float], b: list[float]) -> float:
        return round(statistics.median(x / y for x, y in zip(a, b, strict=True)), 3)

    speeds = {case: [r["per_second"] for r in found[case]] for case in ("one", "two")}
    starts = [r["until_first_step"] for r in found["one"]]
    more = statistics.median(a - b for a, b in zip(starts, found["empty"], strict=True))
    for line in (
        {"case": "bare step, 2 threads", "per_second": round(statistics.median(found["bare"]))},
        {"case": "1 worker, 2 threads", "to_bare": ratio(speeds["one"], found["bare"]), **median_of("one")},
        {"case": "2 workers, 1 thread each", "to_one": ratio(speeds["two"], speeds["one"]), **median_of("two")},
        {"case": "empty fit()", "seconds": round(statistics.median(found["empty"]), 1), "start_more": round(more, 1)},
    ):
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
