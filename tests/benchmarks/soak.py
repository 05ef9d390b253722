"""A soak: a small run on real text, interrupted again and again, must end in the same bits as one never stopped.

    python tests/benchmarks/soak.py [--corpus GLOB --vocab FILE --valid FILE] [--interruptions 20] [--workers 2] ...

Without --corpus the text is the sample corpus. The same command is run twice, as a user does, on Ray: once to its end,
and once interrupted at random moments (by --seed): kill -9 of a worker (worker) or of the driver (driver), SIGTERM and
SIGINT to the driver (sigterm, sigint), kill -9 of one of them while a checkpoint is being written (save), a bit flipped
in, an end cut off or a file deleted from the newest checkpoint while nothing runs (damage), kill -9 while starting
(start). After a worker's death the run goes on by itself, after the others the command is given again with --resume.

One JSON line for each interruption: steps that were done again, seconds from the kill until a record of training (with
the wait for the end of Ray's own processes, where the driver was killed). A last line sums up and tells whether model,
slots, states, cursors, audits, best checkpoint and metrics are equal to the last bit; exit code 1 if not. Progress is
on stderr. Linux only; touches only processes that it has started itself.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import random
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from helpers.same_runs import differences
from helpers.soak_runs import KINDS, RunEnded, Soak, SoakError

from elmo_ray.machine import available_cores

REQUIRED = ("worker", "driver", "sigterm", "save", "damage")
TRIES = 4
"""To hit a save before it is done, or to find two whole checkpoints of which one can be damaged."""

CONFIG: dict[str, Any] = {
    "data": {"streams": 8},
    "model": {
        "char_cnn": {"filters": [[1, 8], [2, 16], [3, 16]], "embedding_dim": 8, "max_characters": 20, "n_highway": 1},
        "lstm": {"dim": 64, "projection_dim": 32},
    },
    "softmax": {"negatives": 64},
    "train": {
        "unroll": 10,
        "dropout": 0.1,
        "validate_every": "50 steps",
        "validate_positions": 2000,
        "checkpoint_every": "20 steps",
        "keep_last": 3,
        "log_every": 5,
    },
    "evaluate": {"streams": 8},
}
"""Steps of some 20 ms, and checkpoints so often that they are hit."""


def main() -> int:
    arguments = parse()
    logging.getLogger("elmo_ray").setLevel(logging.ERROR)  # that a damaged checkpoint is skipped is no news here
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))  # the run's processes are ended first
    out = Path(arguments.out or tempfile.mkdtemp(prefix="elmo-soak-")).resolve()
    settings = command_line(arguments, out)
    say(f"everything is in {out}")
    start = time.monotonic()
    with Soak([*settings, "run.name=unbroken"], out / "unbroken") as whole:
        whole.start()
        whole.finish()
    say(f"never stopped: {whole.watch.step} steps in {time.monotonic() - start:.0f} s")

    start, results, problem = time.monotonic(), [], None
    kinds = planned(arguments.interruptions, arguments.kinds, random.Random(arguments.seed))
    with Soak([*settings, "run.name=broken"], out / "broken", arguments.seed) as broken:
        try:
            broken.start()
            broken.trains(0)
            for number, kind in enumerate(kinds):
                survive(broken, kind, arguments.gap // 2 + number * arguments.gap, arguments.gap, results)
            broken.finish()
        except RunEnded as early:
            problem = f"the run was over before all interruptions, more --steps are needed: {early}"
        except SoakError as error:
            problem = str(error)
    seconds = time.monotonic() - start
    found = [problem] if problem else differences(out / "unbroken", out / "broken")
    print(json.dumps(summary(arguments, results, found, seconds)), flush=True)
    return 1 if found else 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--corpus", metavar="GLOB", help="training text; default: the sample corpus")
    parser.add_argument("--vocab", metavar="FILE", help="default: counted from the text")
    parser.add_argument("--valid", metavar="FILE", help="held-out text; default: a part of the corpus")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="torch threads of each worker")
    parser.add_argument("--interruptions", type=int, default=20)
    parser.add_argument("--kinds", help=f"in turn, separated by commas, out of {','.join(KINDS)}; default: all")
    parser.add_argument("--seed", type=int, default=1, help="of moments and kinds")
    gap = "mean steps between two of them; not below some seconds, in which a signal must be seen before the end"
    parser.add_argument("--gap", type=int, default=150, help=gap)
    parser.add_argument("--steps", type=int, help="default: --gap for each interruption, and two more")
    parser.add_argument("--config", metavar="YAML", help="settings of the run instead of the small ones of this file")
    parser.add_argument("--out", metavar="DIR", help="for runs and logs; default: a new temporary folder")
    arguments = parser.parse_args()
    arguments.kinds = arguments.kinds.split(",") if arguments.kinds else []
    if unknown := sorted({kind.split(":")[0] for kind in arguments.kinds} - set(KINDS)):
        parser.error(f"--kinds: {unknown} are none of {KINDS}")
    if arguments.out and Path(arguments.out, "unbroken").exists():
        parser.error(f"--out: {arguments.out} has a soak already")
    return arguments


def command_line(arguments: argparse.Namespace, out: Path) -> list[str]:
    """What both runs are started with."""
    out.mkdir(parents=True, exist_ok=True)
    config = Path(arguments.config) if arguments.config else out / "soak.yaml"
    if not arguments.config:
        config.write_text(yaml.safe_dump(CONFIG))
    steps = arguments.steps or (arguments.interruptions + 2) * arguments.gap
    cores = available_cores()
    settings = [
        str(config),
        f"run.storage_path={out}",
        f"data.prepared_dir={out / 'prepared'}",
        "run.export=false",
        f"train.duration={steps} steps",
        f"cluster.workers={arguments.workers}",
        f"cluster.threads={arguments.threads}",
        # Each start of the command begins to count anew.
        f"cluster.max_failures={arguments.interruptions * TRIES}",
        f"data.train={arguments.corpus or 'sample'}",
    ]
    if arguments.vocab:
        settings.append(f"data.vocab={arguments.vocab}")
    if arguments.valid:
        settings.append(f"data.valid={arguments.valid}")
    elif arguments.corpus:
        settings.append("data.holdout=0.02")
    if arguments.workers * 0.75 > cores:
        # More workers than the machine is meant for: Ray only counts.
        share = cores / arguments.workers
        settings += [f"cluster.cpus_per_worker={share * 0.6:.2f}", f"cluster.data_cpus={share * 0.3:.2f}"]
    return settings


def planned(n: int, kinds: list[str], chance: random.Random) -> list[str]:
    """`n` kinds in random order: the given ones in turn; else the required ones up to 3 times each, then all."""
    given = itertools.cycle(kinds) if kinds else itertools.chain(REQUIRED * 3, KINDS[::-1], itertools.cycle(KINDS))
    result = list(itertools.islice(given, n))
    chance.shuffle(result)
    return result


def survive(soak: Soak, kind: str, step: int, gap: int, results: list[dict[str, Any]]) -> None:
    """Interrupt up to `gap` steps after `step`; once more where something else came of it."""
    for _ in range(TRIES):
        soak.reach(step + soak.random.randrange(gap))
        time.sleep(soak.random.uniform(0, 0.3))
        result = soak.interrupt(kind)
        results.append({"number": len(results) + 1, **result})
        print(json.dumps(results[-1]), flush=True)
        say(
            f"{len(results)}: {result['kind']} ({result['victim']}) at step {result['step']}: went on from "
            f"{result['resumed_from']} after {result['seconds']} s"
        )
        if result["kind"] == kind.split(":")[0]:
            return
        step, gap = soak.watch.step, 40
    raise SoakError(f"{kind} did not come about in {TRIES} tries")


def summary(
    arguments: argparse.Namespace, results: list[dict[str, Any]], found: list[str], seconds: float
) -> dict[str, Any]:
    repeated = [result["steps_repeated"] for result in results]
    times: dict[str, list[float]] = {}
    for result in results:
        times.setdefault(result["kind"], []).append(result["seconds"])
    return {
        "workers": arguments.workers,
        "threads": arguments.threads,
        "seed": arguments.seed,
        "planned": arguments.interruptions,
        "survived": len(results),
        "kinds": {kind: len(values) for kind, values in sorted(times.items())},
        "steps_repeated": {"total": sum(repeated), "median": statistics.median(repeated or [0])},
        "seconds_to_training": {
            kind: {"median": round(statistics.median(values), 1), "max": max(values)}
            for kind, values in sorted(times.items())
        },
        "seconds": round(seconds),
        "identical": not found,
        "differences": found,
    }


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
