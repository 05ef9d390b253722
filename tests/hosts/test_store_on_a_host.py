"""Runs in an object store that is on another host and misbehaves: no checkpoint is lost, and a line says what is."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers.hosts import Hosts, lines_of, need_hosts, wait_for
from helpers.store_host import StoreHost
from helpers.tiny_runs import write_command

pytestmark = [pytest.mark.slow, pytest.mark.hosts]


Behaviour = Callable[[StoreHost], object]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoreHost]:
    need_hosts()
    pytest.importorskip("s3fs")
    pytest.importorskip("moto.server")
    with Hosts(tmp_path_factory.mktemp("store"), network="10.85.0") as hosts:
        yield StoreHost(hosts.all[1])


class Run:
    """A `pretrain` command on the first host, with its run in the store."""

    def __init__(self, store: StoreHost, folder: Path, name: str) -> None:
        self.store, self.host, self.log, self.name = store, store.host.hosts.all[0], folder / "log.txt", name
        self.config = write_command(
            folder,
            run__name=name,
            run__storage_path="s3://elmo-test/runs",
            train__duration="40 steps",
            train__checkpoint_every="10 steps",
        )

    def start(self) -> subprocess.Popen[bytes]:
        command = self.host.command(sys.executable, "-m", "elmo_ray.pretrain", str(self.config), "--resume")
        with open(self.log, "wb") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, env=self.host.hosts.environment)

    def said(self) -> str:
        return self.log.read_text()

    def ends_well(self, process: subprocess.Popen[bytes]) -> None:
        """Check that the run has all its steps, and that its newest checkpoint is whole."""
        assert process.wait(180) == 0, self.said()[-3000:]
        assert "step 40/40" in self.said() and "Traceback" not in self.said()
        check = (
            "from elmo_ray.checkpoints.read import newest_checkpoint as n; "
            f"c = n('s3://elmo-test/runs/{self.name}/checkpoints'); c.verify(); print(c.step)"
        )
        done = self.host.run(sys.executable, "-c", check, timeout_s=60)
        assert done.stdout.strip() == "40", done.stderr[-2000:]


@pytest.mark.parametrize(
    ("name", "broken", "mended"),
    [
        ("cut", lambda s: s.host.cable(plugged=False), lambda s: (s.tell("well"), s.host.cable(plugged=True))),
        ("hang", lambda s: s.tell("hang"), lambda s: s.tell("well")),
    ],
)
def test_a_store_that_is_away_while_a_checkpoint_is_sent(
    store: StoreHost,
    tmp_path: Path,
    name: str,
    broken: Callable[[StoreHost], None],
    mended: Callable[[StoreHost], None],
) -> None:
    run = Run(store, tmp_path, name)
    store.held.unlink(missing_ok=True)
    store.tell("hold")
    process = run.start()
    try:
        wait_for(store.held.exists, f"a checkpoint: {run.log}", 180)
        broken(store)
        began = time.monotonic()
        wait_for(lambda: "the object store does not answer well" in run.said(), f"a line: {run.log}", 60)
        assert time.monotonic() - began < 60
    finally:
        mended(store)
    run.ends_well(process)
    assert re.search(r"trying again in \d+\.\d s", run.said())


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
        wait_for(lambda: "reading it again" in log.read_text(), f"a line: {log}", 240)
    finally:
        store.host.cable(plugged=True)
    assert process.wait(120) == 0, log.read_text()[-3000:]
