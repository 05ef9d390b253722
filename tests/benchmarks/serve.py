"""Sentences and words a second that `serve` answers over HTTP on this machine, beside those of `embed`.

    python tests/benchmarks/serve.py TEXT [--clients 8] [--seconds 15] [--threads 2] [--lines 6000]

One replica with --threads threads has a model of configs/small.yaml's sizes with random weights, and gives the top
layer. --clients threads of a process of their own send the lines of TEXT, 1 or 32 sentences in a request, and each
sends the next request when it has the answer to the last one; answers are read as safetensors or as JSON. Every case
begins with the same words in the cache, as the first round is not counted. `embed` writes the same layer of the same
lines to Parquet, in its own process with the same threads, before and after. All this shares the cores: what the
clients need is not there for the server.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
from embed import write_model  # noqa: E402

JSON, SAFETENSORS = "application/json", "application/safetensors"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path, metavar="TEXT")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=15.0, help="of a case")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--lines", type=int, default=6000, help="of TEXT")
    parser.add_argument("--settings", nargs="*", default=[], help="further ones of serve")
    parser.add_argument("--clients-of", nargs=3, metavar=("PORT", "TYPE", "SENTENCES"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.clients_of:
        return be_clients(arguments)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder)
        text = folder / "text.txt"
        text.write_text("".join(" ".join(words) + "\n" for words in lines_of(arguments)), "utf-8")
        arguments.text = text
        print(f"{'case':<42}{'sentences/s':>12}{'words/s':>10}{'requests/batch':>16}")
        embed(arguments, folder, "before")
        run_server(arguments, folder)
        embed(arguments, folder, "after")
    return 0


def lines_of(arguments: argparse.Namespace) -> list[list[str]]:
    with open(arguments.text, encoding="utf-8") as file:
        lines = (line.split() for line in file)
        return [words for words, _ in zip((words for words in lines if words), range(arguments.lines), strict=False)]


def show(case: str, sentences: float, words: float, together: float | None = None) -> None:
    print(
        f"{case:<42}{sentences:>12,.0f}{words:>10,.0f}{'' if together is None else f'{together:.1f}':>16}", flush=True
    )


def embed(arguments: argparse.Namespace, folder: Path, when: str) -> None:
    out, note = folder / f"vectors-{when}", folder / "note.json"
    settings = ["embed.layers=top", "cluster.workers=0", f"cluster.threads={arguments.threads}", "cluster.device=cpu"]
    command = [sys.executable, "-m", "elmo_ray.embed", str(folder), str(arguments.text), str(out), *settings]
    subprocess.run([*command, "--json", str(note)], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    result = json.loads(note.read_text())
    show(f"embed, {when}", result["sentences"] / result["seconds"], result["words_per_second"])


def run_server(arguments: argparse.Namespace, folder: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = [f"serve.port={port}", "serve.layers=top", f"cluster.threads={arguments.threads}", "cluster.device=cpu"]
    settings += arguments.settings
    log = open(folder / "serve.log", "w+", encoding="utf-8")
    server = subprocess.Popen([sys.executable, "-m", "elmo_ray.serve", str(folder), *settings], stdout=log, stderr=log)
    try:
        while True:
            try:
                health(port)
                break
            except OSError:
                if server.poll() is not None:
                    sys.exit((folder / "serve.log").read_text())
                time.sleep(0.5)
        clients(arguments, port, SAFETENSORS, 32)  # fills the cache of words
        for sentences in (32, 1):
            for kind in (SAFETENSORS, JSON):
                before, found, after = health(port), clients(arguments, port, kind, sentences), health(port)
                together = (after["requests"] - before["requests"]) / (after["batches"] - before["batches"])
                case = f"serve, {sentences} sentence{'s' * (sentences > 1)} a request, {kind.split('/')[1]}"
                show(case, found["sentences"], found["words"], together)
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(60)


def health(port: int) -> dict[str, float]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/health")
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    if answer.status != 200:  # Ray Serve listens, and the replica does not yet
        raise OSError(body)
    return dict(json.loads(body))


def clients(arguments: argparse.Namespace, port: int, kind: str, sentences: int) -> dict[str, float]:
    """Run the clients in a process of their own; return sentences and words a second."""
    options = [f"--clients={arguments.clients}", f"--seconds={arguments.seconds}", f"--lines={arguments.lines}"]
    command = [sys.executable, __file__, str(arguments.text), *options]
    command += ["--clients-of", str(port), kind, str(sentences)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ})
    return dict(json.loads(done.stdout))


def be_clients(arguments: argparse.Namespace) -> int:
    port, kind, size = int(arguments.clients_of[0]), arguments.clients_of[1], int(arguments.clients_of[2])
    lines = lines_of(arguments)
    parts = [lines[first : first + size] for first in range(0, len(lines), size)]
    bodies = [(json.dumps({"sentences": part}).encode(), len(part), sum(map(len, part))) for part in parts]
    totals, lock = [0, 0], threading.Lock()
    until = time.monotonic() + arguments.seconds

    def client(number: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        place = number * len(bodies) // arguments.clients
        while time.monotonic() < until:
            body, sentences, words = bodies[place % len(bodies)]
            place += 1
            connection.request("POST", "/vectors", body, {"Accept": kind})
            answer = connection.getresponse()
            found = answer.read()
            assert answer.status == 200, found
            with lock:
                totals[0] += sentences
                totals[1] += words

    start = time.monotonic()
    threads = [threading.Thread(target=client, args=(number,)) for number in range(arguments.clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.monotonic() - start
    print(json.dumps({"sentences": totals[0] / seconds, "words": totals[1] / seconds}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
