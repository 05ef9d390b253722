"""What a few minutes on a GPU should tell: whether everything runs there, and what it costs.

    python tests/benchmarks/gpu_check.py [--out FOLDER] [--only env tests capture parts step evaluate embed train ray]
        [--device cuda] [--small]

Sections run in processes of their own with time limits, so that one that breaks or hangs takes no other with it:

    env      versions, and what the device reaches with a large product in bf16 and with a copy
    tests    the tests that want a GPU
    capture  the original's step: is it captured, what does the log say if not, its memory beside `--dry-run`'s count,
             and does that grow
    parts    PyTorch's operations that such a step is made of, each alone
    step     `gpu_step.py` in bf16, three short rounds
    evaluate positions/s of held-out text at the original's sizes over 793,471 words, with 32 and with 1,024 streams
    embed    words/s through all layers at the original's sizes
    train    the quickstart and `gpu_original.yaml` on a made-up text, without Ray: speed with the feed, and
             memory beside `--dry-run`'s count
    ray      the quickstart on Ray with one worker, then `evaluate` and `export`

FOLDER/gpu_check.json is written after each section: what it found, its exit status, seconds and the end of its log.
FOLDER/logs.tar.gz has the logs whole; there are no other files. Only `ray` needs Ray. With --device cpu --small it runs
anywhere, to try it; `make_wheels.py` helps where there is no network.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from elmo_ray.config import PretrainConfig
    from elmo_ray.data.corpus import Corpus
    from elmo_ray.data.vocabulary import Vocabulary
    from elmo_ray.model.bilm import BiLM

# The project's own modules are imported by the sections that use them, so that one which is broken breaks only those.

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]

LIMITS = {
    "env": 40,
    "tests": 110,
    "capture": 60,
    "parts": 60,
    "step": 150,
    "evaluate": 90,
    "embed": 60,
    "train": 75,
    "ray": 150,
}
"""Seconds that a command of a section may take."""

GPU_TESTS = ("tests/kernels", "tests/training/test_gpu_captured_step.py", "tests/training/test_transfer.py")

UNROLL = 20


# ---------------------------------------------------------------- measured in a process of its own


def milliseconds(function: Callable[[], object], device: torch.device, rounds: int = 20) -> float:
    """Of one call, the median. On a GPU many calls are one graph, so that launching them is not measured."""
    for _ in range(3):
        function()
    if device.type != "cuda":
        start = time.perf_counter()
        function()
        return (time.perf_counter() - start) * 1e3
    torch.cuda.synchronize()
    graph, calls = torch.cuda.CUDAGraph(), 10
    with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
        for _ in range(calls):
            function()
    found = []
    for _ in range(rounds):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end) / calls)
    return statistics.median(found)


def env(device: torch.device, small: bool) -> dict[str, Any]:
    found: dict[str, Any] = {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": None,
    }
    try:
        import triton

        found["triton"] = triton.__version__
    except ImportError:  # torch's CPU builds come without it
        pass
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        found |= {
            "name": gpu.name,
            "sms": gpu.multi_processor_count,
            "l2_MB": gpu.L2_cache_size >> 20,
            "memory_GB": round(gpu.total_memory / 1e9, 1),
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
            "cudnn": torch.backends.cudnn.version(),
            "tf32": torch.backends.cuda.matmul.allow_tf32,
        }
    n = 8192 if device.type == "cuda" else 256
    x = torch.randn(n, n, device=device, dtype=torch.bfloat16)
    source = torch.empty(n * n * 16, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    teraflop, terabytes = 2 * n**3 / 1e12, 2 * source.numel() / 1e12
    found["mm_teraflops"] = round(teraflop / milliseconds(lambda: x @ x, device) * 1e3, 1)
    found["copy_TB_per_s"] = round(terabytes / milliseconds(lambda: target.copy_(source), device) * 1e3, 2)
    return found


class Messages(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def capture(device: torch.device, small: bool) -> dict[str, Any]:
    """A step at the original's sizes: seconds of its first eight runs, what is logged meanwhile, and its memory."""
    from cases import SIZES, our_config
    from gpu_step import batches, padded, step_of, wait

    from elmo_ray.training.cuda_graphs import CudaGraphs
    from elmo_ray.training.step_input import Transfer, wait_for_arrival

    log, logger = Messages(), logging.getLogger("elmo_ray")
    logger.addHandler(log)
    logger.setLevel(logging.INFO)
    size, rows = SIZES["small" if small else "original"], 8 if small else 128
    words, on_gpu = size["words"], device.type == "cuda"
    step = step_of(our_config(size, "fp32" if small else "bf16", rows), words, rows, device)
    made = batches(size, words, rows)
    if on_gpu:
        made = padded(made, words)
    given = [batch.to(device) for batch in made]
    seconds = []
    with mock.patch.object(torch.cuda, "graph", wraps=torch.cuda.graph) as captures:
        for number in range(8):
            start = time.perf_counter()
            done = step.run(given[number % len(given)])
            wait(device)
            seconds.append(round(time.perf_counter() - start, 3))
    found = {
        "log": log.messages,
        "seconds_of_steps": seconds,
        "loss": (done.loss_sums.sum() / rows / (2 * UNROLL)).item(),
        "captures": captures.call_count,
        "failed": CudaGraphs.failed,
    }
    if on_gpu:
        found["memory_GB"] = round(torch.cuda.max_memory_allocated(device) / 1e9, 2)
        found["dry_run_GB"] = dry_run_gigabytes(step.config, words)
        found["reserved_GB"] = round(torch.cuda.max_memory_reserved(device) / 1e9, 2)
    send = Transfer(device)  # as training hands over its batches
    before, steps = torch.cuda.memory_allocated(device) if on_gpu else 0, 2 if small else 200
    for number in range(steps):
        batch, arrived = send(made[number % len(made)])
        wait_for_arrival(batch, arrived)
        step.run(batch)
    wait(device)
    if on_gpu:
        found[f"grown_MB_in_{steps}_steps"] = round((torch.cuda.memory_allocated(device) - before) / 1e6, 1)
    return found


def dry_run_gigabytes(config: PretrainConfig, words: int) -> float:
    """The memory of a GPU by the count of `--dry-run`."""
    from elmo_ray.training.sizes import worker_memory

    memory = worker_memory(config, words, on_gpu=True)
    return round(memory.on_gpu.total / 1e9, 2)


def text_and_model(folder: Path, small: bool, device: torch.device) -> tuple[BiLM, Vocabulary, Corpus]:
    """A random model of the original's sizes, and 500,000 tokens of text over its vocabulary."""
    from cases import SIZES, our_config, read_corpus

    from elmo_ray.data.vocabulary import Vocabulary
    from elmo_ray.model.bilm import BiLM

    text = folder / "text"
    made_up_text(text, *((2000, 4000, 1) if small else (793_471, 500_000, 1)))
    vocabulary = Vocabulary.read(text / "vocab.txt")
    config = our_config(SIZES["small" if small else "original"], "fp32", 32)
    model = BiLM(config.model, config.softmax, vocabulary.size).to(device).requires_grad_(False)
    model.reset_parameters(1)
    return model, vocabulary, read_corpus(str(text / "train-*.txt"))


def evaluate(device: torch.device, small: bool) -> dict[str, Any]:
    from elmo_ray.elmo.evaluation import ROWS, Scorer, rows_for

    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        model, vocabulary, corpus = text_and_model(Path(folder), small, device)
        for streams in (4, 16) if small else (32, 1024):
            for dtype in (None,) if small else (None, torch.bfloat16):
                scorer = Scorer(model, vocabulary, corpus, dtype=dtype)
                rows = rows_for(scorer.positions, ROWS, device)
                seconds = []
                for _ in range(1 if small else 2):  # the first compiles
                    start = time.perf_counter()
                    totals = scorer.streams(range(streams), streams, rows)
                    seconds.append(time.perf_counter() - start)
                name = f"{streams} streams, {'bf16' if dtype else 'fp32'}"
                positions = int(totals.positions.sum())
                found[name] = {
                    "positions_per_second": round(positions / seconds[-1]),
                    "nats": float(totals.nats.sum() / model.directions / positions),
                }
        found |= {"positions_at_a_time": scorer.positions} | memory_of(device)
    return found


def embed(device: torch.device, small: bool) -> dict[str, Any]:
    from elmo_ray.elmo.batch_size import positions_at_a_time
    from elmo_ray.elmo.encoder import SentenceEncoder, encode_sentences
    from elmo_ray.elmo.layer_choice import batches_by_length

    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        model, vocabulary, _ = text_and_model(Path(folder), small, device)
        lines = (Path(folder) / "text" / "train-0.txt").read_text().splitlines()
    sentences = [line.split() for line in lines]
    most = min(1 << 14, positions_at_a_time(device, model.config, 2048))
    # few CPUs have products in bf16
    for name, dtype in {"fp32": None, **({} if small else {"bf16": torch.bfloat16})}.items():
        encoder, rates = SentenceEncoder(model, dtype), []
        for _ in range(2):  # the first compiles, and fills the memory of word vectors
            start = time.perf_counter()
            with torch.no_grad():
                for numbers in batches_by_length(sentences, most):
                    layers, _ = encoder.layers(
                        *encode_sentences(encoder, vocabulary, [sentences[number] for number in numbers])
                    )
            float(layers[-1].sum())  # waits for the device
            rates.append(round(sum(map(len, sentences)) / (time.perf_counter() - start)))
        found[f"words_per_second, {name}"] = rates
    return found | {"positions_at_a_time": most} | memory_of(device)


def memory_of(device: torch.device) -> dict[str, float]:
    if device.type != "cuda":
        return {}
    return {"memory_GB": round(torch.cuda.max_memory_allocated(device) / 1e9, 2)}


def parts(device: torch.device, small: bool) -> dict[str, Any]:
    return {f"{rows} rows": microseconds_of_parts(device, small, rows) for rows in ((8,) if small else (128, 512))}


def microseconds_of_parts(device: torch.device, small: bool, rows: int) -> dict[str, float]:
    """D directions, T window, B rows, P output of a cell, H cell, K negatives, R rows of the softmax that a step needs.

    Products are those of one time step, but for "input's gates", "kernel" and "softmax", which have the whole window.
    """
    D, T, B, P, H, K, R = (2, 4, rows, 32, 64, 128, 1000) if small else (2, UNROLL, rows, 512, 4096, 8192, 18_000)
    low, float32, on_gpu = torch.bfloat16, torch.float32, device.type == "cuda"

    def made(*shape: int, dtype: torch.dtype = low) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype) * 0.1

    cases: dict[str, Callable[[], object]] = {}
    hidden, gated, d_gates = made(D, B, P), made(D, B, H), made(D, B, 4 * H)
    recurrent, projection = made(D, P, 4 * H), made(D, H, P)
    recurrent_t, projection_t = (w.transpose(1, 2).contiguous() for w in (recurrent, projection))
    cases |= {
        "recurrent product": lambda: torch.bmm(hidden, recurrent),
        "recurrent product, one direction": lambda: torch.mm(hidden[0], recurrent[0]),
        "projection": lambda: torch.bmm(gated, projection),
        "gradient of hidden, transposed copy": lambda: torch.bmm(d_gates, recurrent_t),
        "gradient of hidden, transposed view": lambda: torch.bmm(d_gates, recurrent.transpose(1, 2)),
        "gradient of gated, transposed copy": lambda: torch.bmm(hidden, projection_t),
        "gradient of gated, transposed view": lambda: torch.bmm(hidden, projection.transpose(1, 2)),
        "transposed copy of a kernel": lambda: recurrent.transpose(1, 2).contiguous(),
    }
    inputs, kernel, window_d_gates = made(D, T * B, P), made(D, P, 4 * H), made(D, T * B, 4 * H)
    bias = torch.zeros(D, 1, 4 * H, device=device)
    gates, d_kernel = torch.empty(D, T * B, 4 * H, device=device), torch.empty(D, P, 4 * H, device=device)
    cases |= {
        "input's gates: product, to float32, plus bias": lambda: torch.add(
            torch.bmm(inputs, kernel).to(float32), bias, out=gates
        ),
        "input's gates: product in bf16 alone": lambda: torch.bmm(inputs, kernel),
        "gradient of a kernel: product, to float32": lambda: d_kernel.copy_(
            torch.bmm(inputs.transpose(1, 2), window_d_gates)
        ),
    }
    if on_gpu:  # on CPUs torch has no products with a type of their own for the result
        cases |= {
            "input's gates: product with out_dtype float32": lambda: torch.bmm(inputs, kernel, out_dtype=float32),
            "gradient of a kernel: product with out_dtype float32": lambda: torch.bmm(
                inputs.transpose(1, 2), window_d_gates, out_dtype=float32
            ),
        }
    backward = torch.ops.aten.embedding_dense_backward
    ids, d_rows = torch.randint(0, R, (T * B,), device=device), made(T * B, P, dtype=float32)
    words, columns, widest, characters = 1000, 15, 7, 261
    spelt = torch.randint(97, 123, (words, columns), device=device, dtype=torch.int32)
    spelt[:, 8:] = 260  # words of 8 characters
    windows = spelt.unfold(1, widest, 1)
    d_windows, d_spelt = made(*windows.shape, 16), made(*spelt.shape, 16)
    cases |= {
        "rows of targets: embedding_dense_backward": lambda: backward(d_rows, ids, R, -1, False),
        "rows of targets: index_add_": lambda: torch.zeros(R, P, device=device).index_add_(0, ids, d_rows),
        "characters, by windows: embedding_dense_backward": lambda: backward(d_windows, windows, characters, -1, False),
        "characters, once: embedding_dense_backward": lambda: backward(d_spelt, spelt, characters, -1, False),
    }
    logits, largest = made(T * B, K, dtype=float32), made(T * B, 1, dtype=float32)
    outputs, powers = made(T * B, P), made(T * B, K)
    cases |= {
        "softmax of one direction: amax, sub, exp, sum": lambda: (
            logits.amax(dim=1),
            (logits - largest).exp_().sum(dim=1),
        ),
        "softmax: transposed copy of outputs by powers, transposed": lambda: (
            torch.mm(outputs.t().contiguous(), powers).t().to(float32).contiguous()
        ),
        "softmax: transposed powers by outputs": lambda: torch.mm(powers.t(), outputs).to(float32),
    }
    return {name: round(milliseconds(function, device) * 1e3, 1) for name, function in cases.items()}


MEASURES: dict[str, Callable[[torch.device, bool], dict[str, Any]]] = {
    "env": env,
    "capture": capture,
    "parts": parts,
    "evaluate": evaluate,
    "embed": embed,
}


# ---------------------------------------------------------------- sections


class Sections:
    """Runs what a section consists of, as commands. folder: for what they write; logs are in a folder of it."""

    def __init__(self, device: str, small: bool, folder: Path):
        self.device, self.small, self.folder, self.logs = device, small, folder, folder / "logs"
        self.logs.mkdir()

    def found(self, name: str) -> dict[str, Any]:
        if name in MEASURES:
            return self.measured(name)
        section: Callable[[], dict[str, Any]] = getattr(self, name)
        return section()

    def measured(self, name: str) -> dict[str, Any]:
        more = ["--device", self.device, *["--small"] * self.small]
        got = self.command(name, LIMITS[name], __file__, "--inside", name, *more)
        for line in json_lines(self.logs / f"{name}.log"):
            got |= line
        return without_tail(got)

    def tests(self) -> dict[str, Any]:
        options = ["-m", "pytest", "-q", "-rfE", "-p", "no:cacheprovider"]
        if self.device == "cuda":
            return self.command("tests", LIMITS["tests"], *options, "-m", "gpu", *GPU_TESTS)
        # without a GPU a few that run anywhere
        chosen = ["-k", "not_captured or outlive", "tests/training/test_captured_step.py"]
        return self.command("tests", LIMITS["tests"], *options, *chosen)

    def step(self) -> dict[str, Any]:
        options = "--precision bf16 --steps 20 --rounds 3"
        if self.small:
            options = "--sizes small --words 0 --rows 8 --precision fp32 --kernels auto --steps 2 --rounds 1"
        script = str(HERE / "gpu_step.py")
        got = self.command("step", LIMITS["step"], script, "--device", self.device, *options.split())
        return without_tail(got | {"cases": json_lines(self.logs / "step.log")})

    def train(self) -> dict[str, Any]:
        limit, quickstart = LIMITS["train"], ROOT / "configs" / "quickstart.yaml"
        steps = "12 steps" if self.small else "300 steps"
        found = {"quickstart": self.pretrain("train-quickstart", limit, quickstart, 0, f"train.duration={steps}")}
        if self.small:
            return found
        from cases import SIZES, our_config

        corpus = self.folder / "text"
        made_up_text(corpus)
        for streams in (128, 512):
            name, more = f"train-original-{streams}", f"data.streams={streams}"
            got = self.pretrain(name, limit, HERE / "gpu_original.yaml", 0, more, ELMO_CORPUS=str(corpus))
            metrics = sorted((self.folder / "runs" / name / "metrics").glob("*.jsonl"))
            records = [record for file in metrics for record in json_lines(file) if record.get("kind") == "train"]
            counted = {"dry_run_GB": dry_run_gigabytes(our_config(SIZES["original"], "bf16", streams), 793_471)}
            found[f"original, {streams} streams"] = got | {"records": records[-4:]} | counted
        return found

    def ray(self) -> dict[str, Any]:
        steps = "12 steps" if self.small else "200 steps"
        quickstart, run = ROOT / "configs" / "quickstart.yaml", str(self.folder / "runs" / "ray")
        of_test = ["data.test=sample", self.chosen_device(), self.storage()]
        return {
            "pretrain": self.pretrain("ray", LIMITS["ray"], quickstart, 1, f"train.duration={steps}"),
            "evaluate": self.command("evaluate", 60, "-m", "elmo_ray.evaluate", run, *of_test),
            "export": self.command("export", 60, "-m", "elmo_ray.export", run, str(self.folder / "export")),
        }

    def storage(self) -> str:
        return f"run.storage_path={self.folder / 'runs'}"

    def chosen_device(self) -> str:
        return f"cluster.device={'gpu' if self.device == 'cuda' else 'cpu'}"

    def pretrain(
        self, name: str, limit: float, config: Path, workers: int, *settings: str, **environment: str
    ) -> dict[str, Any]:
        places = [self.storage(), f"run.name={name}", f"cluster.workers={workers}", self.chosen_device()]
        verb = ["-m", "elmo_ray.pretrain", str(config)]
        return self.command(name, limit, *verb, *places, *settings, **environment)

    def command(self, name: str, limit: float, *arguments: str, **environment: str) -> dict[str, Any]:
        """Runs Python in the repository's root; output goes to the log of this name."""
        start, log = time.perf_counter(), self.logs / f"{name}.log"
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        status: int | str
        with open(log, "wb") as out:
            try:
                status = subprocess.run(
                    [sys.executable, *arguments],
                    stdout=out,
                    stderr=out,
                    timeout=limit,
                    cwd=ROOT,
                    env={**os.environ, "PYTHONPATH": path, **environment},
                    check=False,
                ).returncode
            except subprocess.TimeoutExpired:
                status = "timeout"
        seconds = round(time.perf_counter() - start, 1)
        return {"status": status, "seconds": seconds, "tail": log.read_text(errors="replace")[-1500:]}


def without_tail(got: dict[str, Any]) -> dict[str, Any]:
    """Where all went well and what the log's end says is there in numbers."""
    return {key: value for key, value in got.items() if key != "tail" or got["status"] != 0}


def json_lines(file: Path) -> list[dict[str, Any]]:
    """The JSON objects of a log, of which other lines are no matter."""

    def objects() -> Iterator[dict[str, Any]]:
        for line in file.read_text(errors="replace").splitlines():
            if line.startswith("{"):
                try:
                    yield json.loads(line)
                except ValueError:  # cut off by the time limit
                    continue

    return list(objects())


def made_up_text(folder: Path, words: int = 793_471, tokens: int = 4_000_000, shards: int = 8) -> None:
    """Text over a vocabulary of the original's size, by a power law whose exponent makes a step as costly as of books.

    128 x 20 positions have some 1,270 distinct words, and those 11,400 windows of characters.
    """
    folder.mkdir()
    random = np.random.default_rng(1)

    def name(rank: int) -> str:
        """Letters a to y count the rank, z ends them, and up to four more letters make words of unlike length."""
        letters, left = "", rank + 1
        while left:
            letters, left = chr(97 + left % 25) + letters, left // 25
        return letters + "z" + "e" * (rank % 5)

    names = [name(rank) for rank in range(words - 3)]
    (folder / "vocab.txt").write_text("\n".join(["<S>", "</S>", "<UNK>", *names]) + "\n")
    for shard in range(shards):
        uniform = random.random(tokens // shards)
        ranks = np.minimum((uniform * ((words - 3.0) ** -0.2 - 1) + 1) ** -5.0, words - 3).astype(int) - 1
        text = [names[rank] for rank in ranks]
        ends = np.cumsum(random.integers(5, 46, len(text) // 20)).tolist()
        pairs = zip([0, *ends], ends, strict=False)
        sentences = (" ".join(text[begin:end]) for begin, end in pairs if end < len(text))
        (folder / f"train-{shard}.txt").write_text("\n".join(sentences) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu_check", metavar="FOLDER")
    parser.add_argument("--only", nargs="+", choices=LIMITS, default=list(LIMITS))
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--small", action="store_true", help="to try the check itself on a CPU")
    parser.add_argument("--inside", choices=MEASURES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        print(json.dumps(MEASURES[arguments.inside](torch.device(arguments.device), arguments.small)))
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {}
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        sections = Sections(arguments.device, arguments.small, Path(folder))
        for name in arguments.only:
            found[name] = sections.found(name)
            found["seconds"] = round(time.perf_counter() - start, 1)
            (arguments.out / "gpu_check.json").write_text(json.dumps(found, indent=1) + "\n")
            with tarfile.open(arguments.out / "logs.tar.gz", "w:gz") as archive:
                archive.add(sections.logs, "logs")
            print(name, json.dumps(found[name])[:1800], flush=True)


if __name__ == "__main__":
    main()
