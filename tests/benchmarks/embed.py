"""Words embedded a second by our Elmo layer, AllenNLP's, and bilm-tf, at the small sizes, 32 sentences at a time.

    python tests/benchmarks/embed.py TEXT [--programs FOLDER] [--without NAME ...] [--rounds 5] [--threads 2]

All three load the same exported weights (random, configs/small.yaml's sizes) and embed the same lines of TEXT, in its
order and in batches of --rows, from tokenised words to the mixture (AllenNLP, ours) or all layers (bilm-tf). They take
turns, a round each, so that a busy machine is busy for all; a round begins with nothing remembered of earlier words.
Medians of the rounds are printed, by the clock and by CPU time, and the largest difference of the programs' vectors.

AllenNLP and bilm-tf are installed into FOLDER as `load_in_originals.py` does it (its docstring says what); its module
elmo runs as it is, in this Python and with this PyTorch; its batch_to_ids, which makes the same ids by way of datasets,
is replaced by calls of its own character mapper.
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import load_in_originals  # noqa: E402

NAMES = ("elmo_ray", "elmo_ray bf16", "AllenNLP", "bilm-tf")
Embed = Callable[[list[list[str]]], np.ndarray]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path, metavar="TEXT")
    parser.add_argument("--programs", type=Path, default=Path.home() / ".cache" / "elmo-ray-originals")
    parser.add_argument("--without", nargs="*", choices=NAMES, default=[])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--batches", type=int, default=20, help="of a round")
    parser.add_argument("--inside", choices=NAMES, help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        serve(arguments)
        return 0
    programs = arguments.programs.resolve()
    pythons = load_in_originals.install(programs)
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder))
        workers = {}
        for name in NAMES:
            if name in arguments.without:
                continue
            options = [f"--{key}={getattr(arguments, key)}" for key in ("threads", "rows", "batches")]
            options += [f"--inside={name}", f"--model={folder}", f"--programs={programs}"]
            command = [pythons.get(name, sys.executable), __file__, str(arguments.text.resolve()), *options]
            environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads), "TF_CPP_MIN_LOG_LEVEL": "3"}
            log = open(Path(folder) / f"{name}.log", "w+", encoding="utf-8")
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log}
            workers[name] = subprocess.Popen(command, env=environment, text=True, **pipes)
        speeds: dict[str, list[tuple[float, float]]] = {name: [] for name in workers}
        sums: dict[str, Any] = {}
        for number in range(arguments.rounds + 1):
            for name, worker in workers.items():
                answer = ask(name, worker, Path(folder) / f"{name}.log")
                sums[name] = np.array(answer["vectors"])
                if number:  # the first round warms up
                    words = answer["words"]
                    speeds[name].append((words / answer["seconds"], words / answer["cpu_seconds"]))
        for worker in workers.values():
            worker.communicate("", timeout=60)
    report(speeds, sums)
    return 0


def ask(name: str, worker: subprocess.Popen[str], log: Path) -> dict[str, Any]:
    assert worker.stdin is not None and worker.stdout is not None
    worker.stdin.write("round\n")
    worker.stdin.flush()
    line = worker.stdout.readline()
    if not line:
        sys.exit(f"{name}: {log.read_text(encoding='utf-8')[-2000:]}")
    return json.loads(line)


def report(speeds: dict[str, list[tuple[float, float]]], vectors: dict[str, Any]) -> None:
    wall, cpu = ({name: statistics.median(v[k] for v in values) for name, values in speeds.items()} for k in (0, 1))
    print(f"{'program':<15}{'words/s':>10}{'elmo_ray is':>13}{'words/CPU s':>13}{'elmo_ray is':>13}{'difference':>12}")
    for name in speeds:
        difference = np.abs(vectors[name] - vectors["elmo_ray"]).max()
        times = [f"{each[name]:,.0f}{each['elmo_ray'] / each[name]:>12.2f}x" for each in (wall, cpu)]
        print(f"{name:<15}{times[0]:>23}{times[1]:>26}{difference:>12.1e}")


def write_model(folder: Path) -> None:
    import torch

    from elmo_ray.checkpoints.bilm_tf.hdf5 import write_weights
    from elmo_ray.checkpoints.bilm_tf.options import to_options
    from elmo_ray.config import SoftmaxConfig
    from elmo_ray.config.model import ModelConfig
    from elmo_ray.data.vocabulary import SPECIAL_WORDS, Vocabulary
    from elmo_ray.model.bilm import BiLM

    config, vocabulary = ModelConfig(), Vocabulary.from_words(SPECIAL_WORDS)
    model = BiLM(config, SoftmaxConfig(), vocabulary.size)
    model.reset_parameters(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    write_weights(folder / "weights.hdf5", model)
    (folder / "options.json").write_text(json.dumps(to_options(config, SoftmaxConfig(), vocabulary.size)))
    vocabulary.write(folder / "vocab.txt")


# ---------------------------------------------------------------- inside a program's Python


def serve(arguments: argparse.Namespace) -> None:
    """Answers each line on standard input with a round: words, seconds, and a few vectors of the first batch."""
    answers, sys.stdout = sys.stdout, sys.stderr  # bilm-tf prints while it builds its graph
    lines = []
    with open(arguments.text, encoding="utf-8") as file:
        for line in file:
            if line.split() and len(lines) < arguments.rows * arguments.batches:
                lines.append(line.split())
    batches = [lines[first : first + arguments.rows] for first in range(0, len(lines), arguments.rows)]
    if arguments.inside == "bilm-tf":
        restart = in_bilm_tf(arguments)
    elif arguments.inside == "AllenNLP":
        restart = in_allennlp(arguments)
    else:
        restart = in_elmo_ray(arguments, "bf16" if arguments.inside.endswith("bf16") else "fp32")
    for _ in sys.stdin:
        embed, vectors = restart(), None
        start, cpu = time.perf_counter(), time.process_time()
        for batch in batches:
            found = embed(batch)
            vectors = found[:4, :3].tolist() if vectors is None else vectors
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        record = {"words": sum(map(len, lines)), "seconds": seconds, "cpu_seconds": cpu, "vectors": vectors}
        print(json.dumps(record), file=answers, flush=True)


def in_elmo_ray(arguments: argparse.Namespace, precision: Any) -> Callable[[], Embed]:
    import torch

    from elmo_ray.elmo.layer import Elmo, batch_to_ids

    torch.set_num_threads(arguments.threads)

    def restart() -> Embed:
        files = arguments.model / "options.json", arguments.model / "weights.hdf5"
        elmo = Elmo(*files, 1, dropout=0.0, precision=precision).eval()

        @torch.no_grad()
        def embed(batch: list[list[str]]) -> np.ndarray:
            return elmo(batch_to_ids(batch))["elmo_representations"][0].numpy()

        return embed

    return restart


def in_allennlp(arguments: argparse.Namespace) -> Callable[[], Embed]:
    import torch

    torch.set_num_threads(arguments.threads)
    module, mapper, _ = load_in_originals.import_allennlp(arguments.programs / "allennlp")
    files = str(arguments.model / "options.json"), str(arguments.model / "weights.hdf5")
    elmo = module.Elmo(*files, 1, dropout=0.0).eval()

    @torch.no_grad()
    def embed(batch: list[list[str]]) -> np.ndarray:
        longest, padding = max(map(len, batch)), [0] * 50
        rows = [[mapper.convert_word_to_char_ids(word) for word in words] for words in batch]
        ids = torch.tensor([row + [padding] * (longest - len(row)) for row in rows])
        return elmo(ids)["elmo_representations"][0].numpy()

    def restart() -> Embed:
        elmo._elmo_lstm._elmo_lstm.reset_states()
        return embed

    return restart


def in_bilm_tf(arguments: argparse.Namespace) -> Callable[[], Embed]:
    import tensorflow.compat.v1 as tf

    tf.disable_v2_behavior()
    sys.modules["tensorflow"] = tf
    from bilm import Batcher, BidirectionalLanguageModel  # type: ignore[import-not-found]

    batcher = Batcher(str(arguments.model / "vocab.txt"), 50)
    ids = tf.placeholder("int32", shape=(None, None, 50))
    files = str(arguments.model / "options.json"), str(arguments.model / "weights.hdf5")
    # its default of 128 rows would be the size of the states it carries
    embeddings = BidirectionalLanguageModel(*files, max_batch_size=arguments.rows)(ids)["lm_embeddings"]
    threads = {"intra_op_parallelism_threads": arguments.threads, "inter_op_parallelism_threads": arguments.threads}
    session = tf.Session(config=tf.ConfigProto(**threads))

    def embed(batch: list[list[str]]) -> np.ndarray:
        layers = session.run(embeddings, feed_dict={ids: batcher.batch_sentences(batch)})
        return layers.mean(axis=1)

    def restart() -> Embed:
        session.run(tf.global_variables_initializer())
        return embed

    return restart


if __name__ == "__main__":
    sys.exit(main())
