"""A million words embedded by two actors, killed (-9) in the middle and resumed: is it what an unbroken job makes?

    python tests/benchmarks/embed_killed.py SOURCE TEXT FOLDER [--words 1000000] [key.path=value ...]

Writes the first lines of TEXT that have so many words to FOLDER, embeds them twice with the command itself, once killed
after half of the shards and once not, and compares every file bit for bit; then removes what it wrote.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", metavar="SOURCE")
    parser.add_argument("text", type=Path, metavar="TEXT")
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("settings", nargs="*")
    parser.add_argument("--words", type=int, default=1_000_000)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    text = arguments.folder / "text.txt"
    sentences, words = cut(arguments.text, text, arguments.words)
    print(f"{words:,} words, {sentences:,} sentences", flush=True)
    settings = ["cluster.workers=2", "embed.dtype=float16", *arguments.settings]
    killed, unbroken = arguments.folder / "killed", arguments.folder / "unbroken"

    def command(out: Path, *flags: str) -> list[str]:
        results = ["--json", str(out.with_suffix(".json"))]
        return [
            sys.executable,
            "-m",
            "elmo_ray.embed",
            arguments.source,
            str(text),
            str(out),
            *settings,
            *flags,
            *results,
        ]

    start = time.monotonic()
    half = kill_in_the_middle(command(killed), killed)
    print(f"killed after {time.monotonic() - start:.0f} s with {half} shards finished", flush=True)
    for out, flags in ((killed, ["--resume"]), (unbroken, [])):
        start = time.monotonic()
        subprocess.run(command(out, *flags), check=True)
        result = json.loads(out.with_suffix(".json").read_text())
        print(
            f"{out.name}: {result['units']} shards, {result['units_done_before']} of them before; "
            f"{result['words']:,} words at {result['words_per_second']:,.0f}/s, {time.monotonic() - start:.0f} s",
            flush=True,
        )
    parts = sorted(path.name for path in unbroken.glob("part-*"))
    same = parts == sorted(path.name for path in killed.glob("part-*")) and all(
        (killed / name).read_bytes() == (unbroken / name).read_bytes() for name in parts
    )
    numbers = [n for name in parts for n in pq.read_table(killed / name, columns=["sentence"]).column(0).to_pylist()]
    whole = numbers == list(range(sentences))
    size = sum((killed / name).stat().st_size for name in parts)
    print(f"{len(parts)} files, {size / 1e9:.2f} GB: {'equal bit for bit' if same else 'NOT EQUAL'}, "
          f"{'every sentence once and in order' if whole else 'NOT COMPLETE'}")  # fmt: skip
    shutil.rmtree(killed)
    shutil.rmtree(unbroken)
    return 0 if same and whole else 1


def cut(source: Path, target: Path, most: int) -> tuple[int, int]:
    sentences = words = 0
    with open(source, encoding="utf-8") as lines, open(target, "w", encoding="utf-8") as out:
        for line in lines:
            if words >= most:
                break
            out.write(line)
            sentences, words = sentences + 1, words + len(line.split())
    return sentences, words


def kill_in_the_middle(command: list[str], out: Path) -> int:
    """How many shards are finished when the command gets SIGKILL: half of them."""
    job = subprocess.Popen(command)
    while job.poll() is None:
        record = out / "_embed.json"
        finished = len(list(out.glob("part-*")))
        if record.exists() and 2 * finished >= json.loads(record.read_text())["units"]:
            os.kill(job.pid, signal.SIGKILL)
            job.wait()
            time.sleep(15)  # its Ray processes end by themselves
            return len(list(out.glob("part-*")))
        time.sleep(0.2)
    sys.exit(f"the command ended by itself, with {job.returncode}")


if __name__ == "__main__":
    sys.exit(main())
