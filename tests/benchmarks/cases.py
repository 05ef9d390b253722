"""What the benchmarks share: sizes, the peer's process, and rounds in turn. Not a benchmark itself."""

from __future__ import annotations

import argparse
import glob
import json
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from elmo_ray.config import PretrainConfig
from elmo_ray.data.corpus import Corpus
from elmo_ray.data.scan import index_shard
from elmo_ray.training.step_input import StepInput

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
"""Does so many steps, batches or blocks; positions, seconds and cpu_seconds of them."""


def our_config(
    size: dict[str, Any], precision: str, streams: int, dropout: float = 0.1, kernels: str = "auto"
) -> PretrainConfig:
    return PretrainConfig.from_dict(
        {
            "data": {"train": "given", "streams": streams},
            "model": {"char_cnn": size["char_cnn"], "lstm": size["lstm"]},
            "softmax": {"negatives": size["negatives"]},
            "train": {
                "precision": precision,
                "validate_every": None,
                "dropout": dropout,
                "kernels": kernels,
            },
            "cluster": {"workers": 0},
        }
    )


class Timed:
    """with Timed() as t: ...; t.record(positions)"""

    def __enter__(self) -> Timed:
        self._start, self._cpu = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds, self.cpu_seconds = time.perf_counter() - self._start, time.process_time() - self._cpu

    def record(self, positions: int) -> dict[str, float]:
        return {"positions": positions, "seconds": self.seconds, "cpu_seconds": self.cpu_seconds}


def peers(
    python: str, size: dict[str, Any], corpus: str, vocabulary: Path, streams: int, threads: int, what: str = "train"
) -> Run:
    """bilm-tf in an environment of its own; what: train, evaluate (its `test`) or data."""
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
    case = {"what": what, "train": corpus, "vocab": str(vocabulary), "options": options, "threads": threads}
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


def with_ratios(results: dict[str, dict[str, Any]], peer: str = "bilm-tf") -> Iterator[dict[str, Any]]:
    """A record for each case, with its ratios to the peer's where that ran."""
    for case, result in results.items():
        ratios = {}
        if peer in results and case != peer:
            ratios = {
                f"ratio_{unit}": round(result[unit] / results[peer][unit], 2)
                for unit in ("per_second", "per_cpu_second")
            }
        yield {"case": case, **ratios, **result}


def made_up_batch(step: int, rows: int, unroll: int, types: int, ids: int, negatives: int) -> StepInput:
    """A step's input of random words: `types` distinct ones of 8 characters, targets and negatives below `ids`."""
    random = np.random.Generator(np.random.Philox(step))
    targets = random.integers(0, ids, (2, rows, unroll))
    chosen = np.stack([random.permutation(ids)[:negatives] for _ in range(2)])
    touched = np.unique(np.concatenate([targets.ravel(), chosen.ravel()]))
    characters = np.full((types, 50), 260, np.int16)
    characters[:, :8] = random.integers(97, 123, (types, 8))
    return StepInput(
        step=step,
        types=torch.from_numpy(characters),
        type_classes=((types, 15),),
        inputs=torch.from_numpy(random.integers(0, types, (2, rows, unroll))),
        targets=torch.from_numpy(targets),
        lengths=torch.full((rows,), unroll),
        reset=torch.zeros(rows, dtype=torch.bool),
        positions=rows * unroll,
        rows=torch.from_numpy(touched),
        target_rows=torch.from_numpy(np.searchsorted(touched, targets)),
        target_log_count=torch.zeros(2, rows, unroll),
        negative_rows=torch.from_numpy(np.searchsorted(touched, chosen)),
        negative_log_count=torch.zeros(2, negatives),
    )


def read_corpus(pattern: str) -> Corpus:
    return Corpus.from_shards([index_shard(path) for path in sorted(glob.glob(pattern))])


def cut_vocabulary(file: str, words: int, folder: Path) -> Path:
    """The first `words` lines of a vocabulary as a file of its own."""
    path = folder / f"vocab-{words}.txt"
    lines = Path(file).read_text(encoding="utf-8").splitlines()[:words]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def arguments_of(doc: str | None, seconds: float = 20, required: bool = True) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(doc or "").split("\n")[0])
    parser.add_argument("--corpus", required=required, metavar="GLOB")
    parser.add_argument("--vocab", required=required, metavar="FILE")
    parser.add_argument("--peer", metavar="PYTHON", help="Python of an environment with bilm and tensorflow-cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=seconds, help="of a round")
    return parser
