"""What a run on several hosts does when one of them, or its network, is lost: times, and the lines that it writes.

    python tests/benchmarks/host_faults.py [--hosts 2] [--workers '[1, 2]'] KIND ...

The hosts are network namespaces (see `tests/helpers/hosts.py`), so this needs root. For each KIND there are new hosts
with a new Ray, and a small run that trains without end until the fault:

    killed      all processes of a host without head and driver are killed
    cable:S     that host's cable is pulled for S seconds (cable: for good)
    loss:P      it loses P percent of the packets for a minute
    narrow:R    it has a network of the rate R, such as 1mbit, for a minute
    stopped:S   it stands still (SIGSTOP) for S seconds
    head        the host of Ray's head is killed; the driver is on another
    driver      the host of the driver is killed; the head is on another

One JSON line for each: seconds from the fault until Ray Train noticed a failure and until a step after the last start,
how the command ended, if it did, and what it said since the fault. Lines of --ray-default are with Ray's own settings
for lost hosts instead of those of `cluster/slurm.sbatch`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from helpers.hosts import Host, Hosts, child_of, lines_of, recommended, wait_for, workers_of
from helpers.soak_runs import Watch
from helpers.tiny_runs import newest, write_command

LONGEST_S = 240.0
"""Seconds after which a run that neither trains nor ends is given up."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("kinds", nargs="+", metavar="KIND")
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--workers", default="[1, 2]", help="cluster.workers (default: [1, 2])")
    parser.add_argument("--ray-default", action="store_true", help="Ray's own settings for lost hosts")
    arguments = parser.parse_args()
    for kind in arguments.kinds:
        with tempfile.TemporaryDirectory(prefix="elmo-faults-") as folder:
            result = fault(kind, arguments, Path(folder))
        print(json.dumps(result, ensure_ascii=False), flush=True)
    return 0


def fault(kind: str, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    name, _, amount = kind.partition(":")
    run_dir = folder / "runs" / "faults"
    with Hosts(folder / "hosts", count=arguments.hosts, network=f"10.{100 + os.getpid() % 100}.0") as hosts:
        if not arguments.ray_default:
            hosts.environment |= recommended()
        head = hosts.all[0]
        for host in hosts.all:
            host.start_ray(None if host is head else head)
        lost, driver_host = hosts.all[-1], hosts.all[-1 if name in ("head", "driver") else 0]
        config = write_config(folder, arguments.workers)
        log = folder / "driver.log"
        with open(log, "wb") as out:
            driver = subprocess.Popen(
                driver_host.command(sys.executable, "-m", "elmo_ray.pretrain", str(config)),
                stdout=out,
                stderr=out,
                env=hosts.environment | {"RAY_ADDRESS": head.at(6379)},
            )
        watch = Watch(run_dir)
        trains(watch, driver, log, 0)
        wait_for(lambda: any((run_dir / "checkpoints").glob("*/manifest.json")), f"a checkpoint: {log}")
        first, seen = watch.starts, log.stat().st_size
        began = time.monotonic()
        result: dict[str, Any] = {"kind": kind, "hosts": arguments.hosts, "step": watch.step}
        if name == "killed":
            lost.kill()
        elif name in ("head", "driver"):
            (head if name == "head" else lost).kill()
        else:
            {"cable": cut, "loss": lose, "narrow": narrow, "stopped": stand_still}[name](lost, amount)
        result |= aftermath(watch, driver, log, seen, first, began)
        result["said"] = lines_of(log.read_bytes()[seen:].decode(errors="replace"))[-12:]
        if name == "driver":
            wait_for(lambda: not workers_of(head), "the end of the workers without a driver", 120)
            result["seconds_until_workers_ended"] = round(time.monotonic() - began, 1)
        lost.pause(False)
        if driver.poll() is None:
            os.kill(child_of(driver) or driver.pid, signal.SIGTERM)
            result["code_after_sigterm"] = driver.wait(120)
        result["saved_step"] = newest(run_dir).step
    return result


def write_config(folder: Path, workers: str) -> Path:
    return write_command(
        folder,
        2000,
        run__name="faults",
        train__duration="1000000 steps",
        train__checkpoint_every="20 steps",
        train__log_every=5,
        cluster={"workers": yaml.safe_load(workers), "cpus_per_worker": 1.2, "max_failures": 10, "timeout_s": 60},
    )


# ---------------------------------------------------------------- faults that pass


def cut(host: Host, seconds: str) -> None:
    host.cable(plugged=False)
    if seconds:
        time.sleep(float(seconds))
        host.cable(plugged=True)


def lose(host: Host, percent: str) -> None:
    host.lose_packets(float(percent) / 100)
    time.sleep(60)
    host.lose_packets(0)


def narrow(host: Host, rate: str) -> None:
    host.narrow(rate)
    time.sleep(60)
    host.narrow(None)


def stand_still(host: Host, seconds: str) -> None:
    host.pause(True)
    time.sleep(float(seconds))
    host.pause(False)


# ---------------------------------------------------------------- what the run does


def trains(watch: Watch, driver: subprocess.Popen[bytes], log: Path, starts: int) -> None:
    def done() -> bool:
        watch.poll()
        assert driver.poll() is None, log.read_text()[-3000:]
        return watch.starts > starts and watch.trained

    wait_for(done, f"training: {log}", 300)


def aftermath(
    watch: Watch, driver: subprocess.Popen[bytes], log: Path, seen: int, starts: int, began: float
) -> dict[str, Any]:
    """Wait until the run has trained for some steps after the fault, or has ended: what happened, and when."""
    watch.poll()
    step, result = watch.step, dict[str, Any]()
    while True:
        watch.poll()
        waited = round(time.monotonic() - began, 1)
        said = log.read_bytes()[seen:]
        if "seconds_until_noticed" not in result and b"failure" in said:
            result["seconds_until_noticed"] = waited
        if driver.poll() is not None:
            return result | {"seconds_until_end": waited, "code": driver.returncode}
        if watch.starts > starts and watch.trained:
            message = re.findall(r"(\d+) workers?", said.decode(errors="replace"))
            return result | {"seconds_until_training": waited, "went_on": "after a restart", "workers": message[-1:]}
        if watch.starts == starts and watch.step >= step + 40 and b"failure" not in said:
            return result | {"seconds_until_training": waited, "went_on": "without a restart"}
        if waited > LONGEST_S:
            return result | {"gave_up": waited}
        time.sleep(0.1)


if __name__ == "__main__":
    sys.exit(main())
