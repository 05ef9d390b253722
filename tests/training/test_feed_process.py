"""The process that makes the inputs of steps: the same inputs, errors and ends as the thread has, and no orphans."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from helpers.tiny_runs import (
    Stopper,
    newest,
    plan_of,
    records,
    same,
    tiny_config,
    with_valid,
    worker_of,
    write_corpus,
)

from elmo_ray.config import PretrainConfig
from elmo_ray.data.corpus import Block, Corpus
from elmo_ray.data.encode import ThreadSource, WaitInterrupted
from elmo_ray.data.streams import BlockSource, StreamCursors, StreamLoader, StreamPlan
from elmo_ray.data.vocabulary import Vocabulary
from elmo_ray.data.word_types import TypeTable
from elmo_ray.errors import DataError
from elmo_ray.training.assembler import StepAssembler
from elmo_ray.training.capacities import Capacities
from elmo_ray.training.cuda_graphs import play
from elmo_ray.training.feeding import Feeder
from elmo_ray.training.loop import train
from elmo_ray.training.ranks import Exchange, Flags
from elmo_ray.training.step_input import StepInput

Files = tuple[Path, Path]

IN_ANOTHER_PROCESS = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from training.test_feed_process import feeder_of, tiny_config
iterator = iter(feeder_of((Path(sys.argv[1], "corpus.npz"), Path(sys.argv[1], "vocab.txt")), tiny_config(), True))
next(iterator)
print("fed", flush=True)
time.sleep(600)
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return write_corpus(tmp_path_factory.mktemp("text"), [40, 30])


def feeder_of(
    files: Files,
    config: PretrainConfig,
    own_process: bool,
    wrap: Callable[[Iterator[Block]], Iterator[Block]] | None = None,
    interrupted: Callable[[], bool] = lambda: False,
    flags: Callable[[], Flags] = Flags,
) -> Feeder:
    text, words, n = Corpus.load(files[0]), Vocabulary.read(files[1]), config.data.streams
    most = config.model.char_cnn.max_characters
    table = TypeTable(words, most, 3) if config.model.input == "characters" else None

    # without `wrap` a process reads the text itself, as in runs without Ray; otherwise it asks for blocks
    source: BlockSource = ThreadSource(words, most, look_ahead=1, interrupted=interrupted)
    if wrap is not None:
        source = of_wrapped(source, wrap)
    plan = StreamPlan(text, n, config.run.seed)
    loader = StreamLoader(plan, range(n), StreamCursors.start(n), source, words, config.train.unroll, table)
    assembler = StepAssembler(config, words.size, range(n), Exchange())
    capacities = Capacities.of(config, words.size, table, n)
    cpu = torch.device("cpu")
    return Feeder(loader, assembler, range(3, 1000), flags, cpu, capacities=capacities, own_process=own_process)


def of_wrapped(source: BlockSource, wrap: Callable[[Iterator[Block]], Iterator[Block]]) -> BlockSource:
    return lambda blocks: source(wrap(blocks))


def children() -> set[int]:
    """Processes of feeds that this process has started and that have not ended."""
    found = subprocess.run(["ps", "-eo", "pid=,ppid=,args="], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 2) for line in found.splitlines()]
    return {int(pid) for pid, parent, args in rows if int(parent) == os.getpid() and "feed_process" in args}


def assert_equal(ours: StepInput, theirs: StepInput) -> None:
    assert list(ours.tensors()) == list(theirs.tensors())
    for name, value in theirs.tensors().items():
        assert torch.equal(ours.tensors()[name], value) and ours.tensors()[name].dtype == value.dtype, name
    for field in ("step", "positions", "type_classes", "n_windows"):
        assert getattr(ours, field) == getattr(theirs, field), field
    assert [rows for rows, _ in ours.micro_batches] == [rows for rows, _ in theirs.micro_batches]
    for (_, mine), (_, other) in zip(ours.micro_batches, theirs.micro_batches, strict=True):
        assert_equal(mine, other)


@pytest.mark.parametrize("wrap", [None, iter], ids=["reads itself", "asks for blocks"])
def test_the_same_inputs(files: Files, wrap: Callable[[Iterator[Block]], Iterator[Block]] | None) -> None:
    config = tiny_config(train__accumulate=2)
    looks = [iter([Flags(number == 59, save=number == 7) for number in range(100)]) for _ in range(2)]
    feeders = (feeder_of(files, config, own, wrap, flags=looks[own].__next__) for own in (True, False))
    steps = 0
    for ours, theirs in zip(*feeders, strict=True):
        assert_equal(ours.batch, theirs.batch)
        for name, value in theirs.cursors.arrays().items():
            assert value.tolist() == ours.cursors.arrays()[name].tolist(), name
        assert ours.flags == theirs.flags
        steps += 1
    assert steps == 60, "the step with the flag that stops is the last"
    assert not children()


def test_an_error_comes_after_the_steps_before_it(files: Files) -> None:
    def broken(blocks: Iterator[Block]) -> Iterator[Block]:
        for number, block in enumerate(blocks):
            if number == 12:
                raise DataError("block 12")
            yield block

    done = []
    for own_process in (True, False):
        feeder = feeder_of(files, tiny_config(), own_process, broken)
        done.append(0)
        with pytest.raises(DataError, match="block 12"):
            for _ in feeder:
                done[-1] += 1
    assert done[0] == done[1] > 0
    assert not children()


def test_a_stop_ends_a_wait_for_text(files: Files) -> None:
    def interrupted(blocks: Iterator[Block]) -> Iterator[Block]:
        for number, block in enumerate(blocks):
            if number == 12:
                raise WaitInterrupted
            yield block

    steps = sum(1 for _ in feeder_of(files, tiny_config(), True, interrupted))
    assert steps == sum(1 for _ in feeder_of(files, tiny_config(), False, interrupted)) > 0


def test_text_that_has_changed_is_an_error_of_the_process(tmp_path: Path) -> None:
    files, done = write_corpus(tmp_path, [200, 200]), []
    shard = tmp_path / "shard-1.txt"
    shard.write_bytes(shard.read_bytes()[:-2] + b"!\n")
    for own_process in (True, False):
        done.append(0)
        with pytest.raises(DataError, match=r"shard-1\.txt: bytes \d+ to \d+ have changed since they were indexed"):
            for _ in feeder_of(files, tiny_config(), own_process):
                done[-1] += 1
    assert done[0] == done[1] > 0


def test_a_stop_ends_a_wait_for_text_that_the_process_reads(tmp_path: Path) -> None:
    files, stop = write_corpus(tmp_path, [200, 200]), threading.Event()
    feeder = feeder_of(files, tiny_config(), True, interrupted=stop.is_set)
    for number, _ in enumerate(feeder):
        if number == 0:
            for shard in tmp_path.glob("shard-*"):
                shard.unlink()
                os.mkfifo(shard)  # a storage that does not answer
            threading.Timer(1.5, stop.set).start()
    assert stop.is_set() and feeder.loader.is_waiting and not children()


def test_a_killed_process_is_an_error_and_a_left_one_ends(files: Files) -> None:
    iterator = iter(feeder_of(files, tiny_config(), True))
    next(iterator)
    (child,) = children()
    for number in (signal.SIGINT, signal.SIGTERM):  # those of a whole job are the worker's to obey
        os.kill(child, number)
    for _ in range(20):
        next(iterator)
    os.kill(child, signal.SIGKILL)
    with pytest.raises(RuntimeError, match=r"step \d+: the process .* was killed by signal 9"):
        for _ in iterator:
            pass
    iterator = iter(feeder_of(files, tiny_config(), True))
    next(iterator)
    iterator.close()  # type: ignore[attr-defined]
    assert not children()


def test_it_dies_with_its_worker(files: Files) -> None:
    arguments = [sys.executable, "-c", IN_ANOTHER_PROCESS, str(files[0].parent), str(Path(__file__).parents[1])]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout is not None and worker.stdout.readline() == "fed\n"
        listed = subprocess.run(["ps", "--ppid", str(worker.pid), "-o", "pid=,args="], capture_output=True, text=True)
        (child,) = [int(line.split()[0]) for line in listed.stdout.splitlines() if "feed_process" in line]
        worker.kill()
    deadline = time.monotonic() + 60
    while Path(f"/proc/{child}/cmdline").exists() and b"feed_process" in Path(f"/proc/{child}/cmdline").read_bytes():
        assert time.monotonic() < deadline, "the process is still there"
        time.sleep(0.05)


def test_a_run_has_the_same_bits(files: Files, valid: Path, tmp_path: Path) -> None:
    """With validations in between, stopped and resumed: audits, cursors, weights and losses."""
    config = tiny_config(
        **with_valid(train__duration="14 steps", train__checkpoint_every="6 steps", train__log_every=1)
    )
    for own_process in (True, False):
        run = plan_of(tmp_path / str(own_process), config, files, valid)
        for looks in (8, None):
            worker = dataclasses.replace(worker_of(run, stop=Stopper(looks)), record=play, feed_process=own_process)
            result = train(run, worker)
            assert result["stopped"] == (looks is not None) and (looks is None or 0 < result["steps"] < 14)
    same(newest(tmp_path / "True"), newest(tmp_path / "False"))
    assert records(tmp_path / "True") == records(tmp_path / "False")
