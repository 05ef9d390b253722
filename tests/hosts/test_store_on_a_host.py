"""Runs in an object store that is on another host and misbehaves: no checkpoint is lost, and a line says what is."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.hosts import Hosts, child_of, lines_of, need_hosts, wait_for, workers_of
from helpers.store_host import BUCKET, StoreHost
from helpers.tiny_runs import write_command

pytestmark = [pytest.mark.slow, pytest.mark.hosts]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoreHost]:
    need_hosts()
    pytest.importorskip("s3fs")
    pytest.importorskip("moto.server")
    with Hosts(tmp_path_factory.mktemp("store"), network="10.85.0") as hosts:
        yield StoreHost(hosts.all[1])


class Run:
    """A `pretrain` command on the first host, with its run in the store. changes: of its settings."""

    def __init__(self, store: StoreHost, folder: Path, name: str, **changes: Any) -> None:
        self.store, self.host, self.log, self.name = store, store.host.hosts.all[0], folder / "log.txt", name
        settings = {
            "run__name": name,
            "run__storage_path": f"{BUCKET}/runs",
            "train__duration": "40 steps",
            "train__checkpoint_every": "10 steps",
        }
        self.config = write_command(folder, **{**settings, **changes})

    def start(self, **environment: str) -> subprocess.Popen[bytes]:
        command = self.host.command(sys.executable, "-m", "elmo_ray.pretrain", str(self.config), "--resume")
        with open(self.log, "wb") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, env=self.host.hosts.environment | environment)

    def start_until_it_sends(self) -> subprocess.Popen[bytes]:
        """Start it, and wait until the server holds the first request of its first checkpoint."""
        self.store.held.unlink(missing_ok=True)
        self.store.tell("hold")
        process = self.start()
        wait_for(self.store.held.exists, f"a checkpoint: {self.log}", 180)
        return process

    def said(self) -> str:
        return self.log.read_text()

    def newest(self) -> int:
        """Return the step of the newest checkpoint, which must be whole; 0 if there is none."""
        check = (
            "from elmo_ray.checkpoints.read import newest_checkpoint as n; "
            f"c = n('{BUCKET}/runs/{self.name}/checkpoints'); c and c.verify(); print(c.step if c else 0)"
        )
        done = self.host.run(sys.executable, "-c", check, timeout_s=60)
        assert done.returncode == 0, done.stderr[-2000:]
        return int(done.stdout)

    def ends_well(self, process: subprocess.Popen[bytes]) -> None:
        """Check that the run has all its steps, that no checkpoint was given up, and that the newest one is whole."""
        assert process.wait(180) == 0, self.said()[-3000:]
        assert "step 40/40" in self.said() and "Traceback" not in self.said()
        assert "could not be written" not in self.said()
        assert self.newest() == 40


@pytest.mark.parametrize("seconds", [5, 60])
def test_the_cable_of_the_store_is_out_while_a_checkpoint_is_sent(
    store: StoreHost, tmp_path: Path, seconds: int
) -> None:
    run = Run(store, tmp_path, f"cut-{seconds}")
    process = run.start_until_it_sends()
    try:
        store.host.cable(plugged=False)
        began = time.monotonic()
        if seconds == 60:
            wait_for(lambda: "s3://elmo-test has been away for" in run.said(), f"a line: {run.log}", 60)
        time.sleep(max(0.0, began + seconds - time.monotonic()))
    finally:
        store.tell("well")
        store.host.cable(plugged=True)
    run.ends_well(process)
    if seconds == 60:
        assert re.search(r"trying again in \d+\.\d s, for up to 15 minutes", run.said())
        assert re.search(r"s3://elmo-test has been away for \d+ s \(.*\): trying again for 1\d minutes", run.said())


def test_a_store_that_hangs_while_a_checkpoint_is_sent(store: StoreHost, tmp_path: Path) -> None:
    run = Run(store, tmp_path, "hang")
    process = run.start_until_it_sends()
    try:
        store.tell("hang")
        wait_for(lambda: "the object store does not answer well" in run.said(), f"a line: {run.log}", 60)
    finally:
        store.tell("well")
    run.ends_well(process)
    assert re.search(r"trying again in \d+\.\d s, for up to 15 minutes", run.said())


def test_a_start_without_the_store_is_one_line(store: StoreHost, tmp_path: Path) -> None:
    """As with a wrong address; what has begun waits for longer."""
    run = Run(store, tmp_path, "away")
    store.host.cable(plugged=False)
    try:
        began = time.monotonic()
        assert run.start().wait(180) == 2, run.said()
        assert time.monotonic() - began < 90
    finally:
        store.host.cable(plugged=True)
    last = lines_of(run.said())[-1]
    assert last.startswith("error: ") and f"{BUCKET}/runs" in last and "Traceback" not in run.said()


@pytest.mark.ray
@pytest.mark.long
def test_a_worker_is_killed_while_the_store_is_away(store: StoreHost, tmp_path: Path) -> None:
    """The workers that start in its place wait for the checkpoint, the index, the vocabulary and the text."""
    host, text = store.host.hosts.all[0], f"{BUCKET}/text/train.txt"
    run = Run(
        store, tmp_path, "killed", data__train=text, data__prepared_dir=f"{BUCKET}/prepared",
        train__duration="1000000 steps", train__checkpoint_every="200 steps", cluster={"workers": 2},
    )  # fmt: skip
    send = "import sys, pathlib, elmo_ray.storage as s; s.upload(pathlib.Path(sys.argv[1]), sys.argv[2])"
    assert host.run(sys.executable, "-c", send, str(tmp_path / "train.txt"), text).returncode == 0
    host.start_ray()
    process = run.start(RAY_ADDRESS=host.at(6379))
    try:
        wait_for(lambda: "positions/s" in run.said() and run.newest() > 0, lambda: run.said()[-3000:], 240)
        workers = workers_of(host)
        store.host.cable(plugged=False)
        began = time.monotonic()
        os.kill(workers[0], signal.SIGKILL)
        wait_for(lambda: "s3://elmo-test has been away for" in run.said(), run.said, 60)
        time.sleep(max(0.0, began + 60 - time.monotonic()))
        store.host.cable(plugged=True)
        wait_for(lambda: "start: resume from step" in run.said(), lambda: run.said()[-3000:], 180)
        assert process.poll() is None and not set(workers_of(host)) & set(workers)
        os.kill(child_of(process) or process.pid, signal.SIGTERM)
        assert process.wait(120) == 0, run.said()[-3000:]
    finally:
        store.host.cable(plugged=True)
        process.kill()
        host.kill()
    assert "failure 1 of" in run.said() and "Traceback" not in run.said()
    assert run.newest() > 0


def test_a_third_of_the_requests_is_refused(store: StoreHost, tmp_path: Path) -> None:
    run = Run(store, tmp_path, "slow")
    store.tell("slow")
    try:
        run.ends_well(run.start())
    finally:
        store.tell("well")
    assert re.search(r"the object store does not answer well \(.*503.*\): trying again", run.said()), run.said()


def test_a_wrong_key_is_one_line(store: StoreHost, tmp_path: Path) -> None:
    run = Run(store, tmp_path, "denied")
    store.tell("denied")
    try:
        assert run.start().wait(180) == 2, run.said()
    finally:
        store.tell("well")
    last = lines_of(run.said())[-1]
    assert last.startswith("error: ") and "s3://elmo-test/runs" in last and "Traceback" not in run.said()


_READ = """
import sys, zlib
from elmo_ray.storage import write_bytes
from elmo_ray.data.corpus import Block
from elmo_ray.data.encode import read_block
place, text = "s3://elmo-test/text.txt", b"a sentence\\n" * 100
write_bytes(place, text)
print("written", file=sys.stderr, flush=True)
sys.stdin.read(1)
assert read_block(Block(place, 11, 33, 4, zlib.crc32(text[11:33]))) == text[11:33]
"""


def test_text_is_read_again_until_the_store_answers(store: StoreHost, tmp_path: Path) -> None:
    """The store's library gives up after some tries; a block of text waits for longer."""
    host, log = store.host.hosts.all[0], tmp_path / "log.txt"
    with open(log, "wb") as out:
        process = subprocess.Popen(
            host.command(sys.executable, "-c", _READ), stdin=subprocess.PIPE, stdout=out, stderr=out,
            env=host.hosts.environment,
        )  # fmt: skip
    try:
        wait_for(lambda: "written" in log.read_text(), f"the text: {log}", 60)
        store.host.cable(plugged=False)
        assert process.stdin is not None
        process.stdin.close()  # it waits for this
        wait_for(lambda: "has been away for" in log.read_text(), f"a line: {log}", 240)
    finally:
        store.host.cable(plugged=True)
    assert process.wait(120) == 0, log.read_text()[-3000:]
