"""A soak: a small run on real text, interrupted again and again, must end in the same bits as one never stopped.

    python tests/benchmarks/soak.py [--corpus GLOB --vocab FILE --valid FILE] [--interruptions 20] [--workers 2] ...

Without --corpus the text is the sample corpus. The same command is run twice, as a user does, on Ray: once to its end,
and once interrupted at random moments (by --seed): kill -9 of a worker (worker) or of the driver (driver), SIGTERM to
all processes at once (sigterm), SIGINT to the driver (sigint), kill -9 of one of them while a checkpoint is being
written (save), a bit flipped in, an end cut off or a file deleted from the newest checkpoint while nothing runs
(damage), kill -9 while starting (start). After a worker's death the run goes on by itself, after the others the command
is given again with --resume.

With --hosts the run is on so many test hosts (see `tests/helpers/hosts.py`; needs root), and its text, run and all else
are in an S3 store on one more host. Drawn are then: a host without head killed, and back later (host), its cable out
(cable), kill -9 of a worker (worker) or of the driver (driver), the head's processes killed (head), the cable of the
store's host out (storage). --driver other: the command is on the second host, and Ray's head on the first. --workers 2:
the run waits for the host, and ends in the same bits. --workers '[1, 2]': it goes on with one worker meanwhile, and
ends at the same text (cursors and audits of the streams). The run is interrupted first, so that --steps is not needed.

One JSON line for each interruption: steps that were done again, seconds from the kill until a record of training (with
the wait for the end of Ray's own processes, where the driver was killed). A last line sums up and tells whether model,
slots, states, cursors, audits, best checkpoint and metrics are equal to the last bit; exit code 1 if not. Progress is
on stderr. Linux only; touches only processes that it has started itself.
"""

from __future__ import annotations

import argparse
import glob
import itertools
import json
import logging
import os
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

from helpers.host_soak import HOST_KINDS, HostSoak
from helpers.hosts import Hosts, recommended
from helpers.same_runs import differences, other_text
from helpers.soak_runs import KINDS, RunEnded, Soak, SoakError
from helpers.store_host import BUCKET, StoreHost

from elmo_ray import storage
from elmo_ray.data.sample import write_sample
from elmo_ray.machine import available_cores

REQUIRED = ("worker", "driver", "sigterm", "save", "damage")
GAP = 150
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
    if arguments.hosts:
        return on_hosts(arguments)
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
    parser.add_argument("--workers", type=yaml.safe_load, default=2, help="with --hosts also '[1, 2]'")
    parser.add_argument("--hosts", type=int, default=0, help="2 or more: on test hosts, with an object store")
    parser.add_argument("--driver", choices=("head", "other"), default="head", help="with --hosts: its host")
    parser.add_argument("--threads", type=int, default=1, help="torch threads of each worker")
    parser.add_argument("--interruptions", type=int, default=20)
    parser.add_argument("--kinds", help="in turn, separated by commas; default: all")
    parser.add_argument("--seed", type=int, default=1, help="of moments and kinds")
    gap = "mean steps between two of them; not below some seconds, in which a signal must be seen before the end"
    parser.add_argument("--gap", type=int, help=f"{gap}; default: {GAP}")
    parser.add_argument("--steps", type=int, help="default: --gap for each interruption, and two more")
    parser.add_argument("--config", metavar="YAML", help="settings of the run instead of the small ones of this file")
    parser.add_argument("--out", metavar="DIR", help="for runs and logs; default: a new temporary folder")
    arguments = parser.parse_args()
    arguments.kinds = arguments.kinds.split(",") if arguments.kinds else []
    kinds = HOST_KINDS if arguments.hosts else KINDS
    if unknown := sorted({kind.split(":")[0] for kind in arguments.kinds} - set(kinds)):
        parser.error(f"--kinds: {unknown} are none of {kinds}")
    if arguments.hosts == 1 or (not arguments.hosts and not isinstance(arguments.workers, int)):
        parser.error("--hosts: 2 or more; '[1, 2]' for --workers is for them")
    if arguments.hosts and (unused := [k for k in ("vocab", "valid", "steps", "gap") if getattr(arguments, k)]):
        parser.error(f"--hosts: --{unused[0]} is not for it")
    arguments.gap = arguments.gap or GAP
    if arguments.out and any(Path(arguments.out, name).exists() for name in ("unbroken", "hosts")):
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


def on_hosts(arguments: argparse.Namespace) -> int:
    """The soak on hosts: the interrupted run, and then one of as many steps that nobody disturbs."""
    out = Path(arguments.out or tempfile.mkdtemp(prefix="elmo-soak-")).resolve()
    say(f"everything is in {out}")
    chance, results, problem = random.Random(arguments.seed), list[dict[str, Any]](), None
    elastic = not isinstance(arguments.workers, int)
    with Hosts(out / "hosts", arguments.hosts + 1, network=f"10.{100 + os.getpid() % 100}.0") as hosts:
        hosts.environment |= recommended()
        *machines, store = hosts.all
        os.environ.update(StoreHost(store).environment)  # for the watch, and to compare
        settings = host_settings(arguments, out)
        kinds = [kind for _ in range(arguments.interruptions) for kind in arguments.kinds or HOST_KINDS]
        kinds = kinds[: arguments.interruptions]
        chance.shuffle(kinds)
        broken, whole = (
            HostSoak(
                machines,
                machines[1 if arguments.driver == "other" else 0],
                store,
                [*settings, f"run.name={name}"],
                f"{BUCKET}/runs/{name}",
                arguments.seed,
                elastic,
            )
            for name in ("broken", "unbroken")
        )
        broken.start_ray()
        start = time.monotonic()
        try:
            broken.start()
            broken.trains(0)
            for kind in kinds:
                time.sleep(chance.uniform(0, 8))
                results.append({"number": len(results) + 1, **broken.interrupt(kind)})
                print(json.dumps(results[-1]), flush=True)
            broken.stop()
            steps = f"train.duration={broken.watch.step // 100 * 100 + 200} steps"
            broken.start(steps)
            broken.finish()
            seconds = time.monotonic() - start
            say(f"interrupted: {steps} in {seconds:.0f} s; now the run that nobody disturbs")
            whole.start(steps)
            whole.finish()
        except (RunEnded, SoakError, AssertionError) as error:
            problem, seconds = str(error), time.monotonic() - start
        ends = whole.watch.folder, broken.watch.folder
        found = [problem] if problem else other_text(*ends) if elastic else differences(*ends, planned=False)
    print(json.dumps(summary(arguments, results, found, seconds)), flush=True)
    return 1 if found else 0


def host_settings(arguments: argparse.Namespace, out: Path) -> list[str]:
    """What both runs on hosts are started with; the text is sent to the store."""
    config = Path(arguments.config) if arguments.config else out / "soak.yaml"
    if not arguments.config:
        values = CONFIG | {"train": {**CONFIG["train"], "checkpoint_every": "40 steps"}}
        config.write_text(yaml.safe_dump(values))
    texts = sorted(glob.glob(arguments.corpus)) if arguments.corpus else write_sample(out / "sample").train
    for text in texts:
        storage.upload(Path(text), f"{BUCKET}/text/{Path(text).name}")
    return [
        str(config),
        f"run.storage_path={BUCKET}/runs",
        f"data.prepared_dir={BUCKET}/prepared",
        f"data.train={BUCKET}/text/*",
        "data.holdout=0.02",
        "run.export=false",
        "train.duration=1000000 steps",
        f"cluster.workers={arguments.workers}",
        "cluster.cpus_per_worker=1.2",  # one worker a host
        f"cluster.threads={arguments.threads}",
        f"cluster.max_failures={arguments.interruptions * TRIES}",
        *(["cluster.resize_every_s=5"] if isinstance(arguments.workers, list) else []),
    ]


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
        "hosts": arguments.hosts,
        "driver": arguments.driver,
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
        "compared": "text" if isinstance(arguments.workers, list) else "bits",
        "identical": not found,
        "differences": found,
    }


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
