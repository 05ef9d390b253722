"""Peak private memory of a `pretrain` or `prepare` on Ray, on corpora of several sizes: it must not grow with them.

    python tests/benchmarks/memory.py --vocab VOCAB --config configs/small.yaml --steps 300 GLOB [GLOB ...]
    python tests/benchmarks/memory.py --prepare --config CONFIG GLOB [GLOB ...] [--set key=value ...]

One JSON line for each GLOB: bytes of text, peak of the sum of RssAnon over all processes of the run (driver, Ray's own,
workers, data tasks), the peak of each kind of process, and the ratio to the first GLOB's peak. Linux only.
"""

from __future__ import annotations

import argparse
import glob
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def private_bytes(root: int) -> dict[str, int]:
    """RssAnon of `root` and all processes below it, summed by command name."""
    parents: dict[int, int] = {}
    sizes: dict[int, tuple[str, int]] = {}
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            status = Path("/proc", entry, "status").read_text()
            title = Path("/proc", entry, "cmdline").read_bytes().split(b"\0")[0].decode(errors="replace")
        except OSError:
            continue
        fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
        parents[int(entry)] = int(fields["PPid"])
        sizes[int(entry)] = (os.path.basename(title)[:40], int(fields.get("RssAnon", "0 kB").split()[0]) * 1024)
    below, found = [root], set()
    while below:
        pid = below.pop()
        found.add(pid)
        below.extend(child for child, parent in parents.items() if parent == pid and child not in found)
    result: dict[str, int] = {}
    for pid in found & sizes.keys():
        name, size = sizes[pid]
        result[name] = result.get(name, 0) + size
    return result


def peak_of_run(verb: str, arguments: list[str], log: Path) -> tuple[int, dict[str, int]]:
    """Run a command and sample it twice a second; returns the largest sum and what it was made of."""
    peak, parts = 0, {}
    with open(log, "wb") as out:
        process = subprocess.Popen([sys.executable, "-m", f"elmo_ray.{verb}", *arguments], stdout=out, stderr=out)
        while process.poll() is None:
            now = private_bytes(process.pid)
            if sum(now.values()) > peak:
                peak, parts = sum(now.values()), now
            time.sleep(0.5)
    if process.returncode:
        raise SystemExit(f"{verb} ended with {process.returncode}:\n{log.read_text(errors='replace')[-3000:]}")
    return peak, parts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("corpora", nargs="+", metavar="GLOB")
    parser.add_argument("--config", required=True)
    parser.add_argument("--vocab")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--prepare", action="store_true")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE")
    arguments = parser.parse_args()
    first = None
    for corpus in arguments.corpora:
        size = sum(os.path.getsize(path) for path in glob.glob(corpus))
        with tempfile.TemporaryDirectory() as folder:
            settings = [arguments.config, f"run.storage_path={folder}", f"data.train={corpus}", *arguments.set]
            if arguments.vocab:
                settings.append(f"data.vocab={arguments.vocab}")
            if not arguments.prepare:
                settings += ["run.name=memory", "run.export=false", f"train.duration={arguments.steps} steps"]
            start = time.monotonic()
            peak, parts = peak_of_run("prepare" if arguments.prepare else "pretrain", settings, Path(folder, "log"))
            seconds = time.monotonic() - start
        first = first or peak
        largest = dict(sorted(parts.items(), key=lambda item: -item[1])[:6])
        case = {"corpus": corpus, "bytes": size, "seconds": round(seconds, 1), "peak_bytes": peak}
        print(json.dumps({**case, "ratio": round(peak / first, 3), "parts": largest}), flush=True)


if __name__ == "__main__":
    main()
