"""The head of a Ray cluster, or the node of a command, ends while it is used: the command ends, and a line says why."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from helpers.tiny_runs import sentences, tiny_values

from elmo_ray import pretrain
from elmo_ray.cluster.session import _LOST_HEAD

SECONDS = 240


@pytest.mark.parametrize(("word", "is_there", "said"), [(b"", False, "line\n"), (b".", False, ""), (b"", True, "")])
def test_what_the_watching_process_says(word: bytes, is_there: bool, said: str) -> None:
    """It speaks only if its parent ends without a word and the head is not there any more."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        if not is_there:
            server.close()
        command = [sys.executable, "-S", "-c", _LOST_HEAD, address, "60", "silent", "line"]
        done = subprocess.run(command, input=word, capture_output=True, timeout=60, check=True)
    assert (done.stdout.decode(), done.stderr.decode()) == ("", said)


def test_the_watching_process_speaks_while_the_head_is_silent() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        command = [sys.executable, "-S", "-c", _LOST_HEAD, address, "0.1", "silent", "line"]
        watcher = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE)
        server.accept()[0].close()
    assert watcher.stderr is not None and watcher.stderr.readline() == b"silent\n"
    assert watcher.communicate(timeout=60)[1] == b"line\n"


@pytest.fixture
def head(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """The address of a cluster's head, and the folder that the command lines of its processes name."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    # The paths of sockets are limited to some 100 characters.
    folder = Path("/tmp") / f"elmo-ray-head-{os.getpid()}"
    command = [
        str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", f"--port={port}", "--num-cpus=2",
        "--object-store-memory=100000000", "--include-dashboard=false", f"--temp-dir={folder}",
    ]  # fmt: skip
    with open(tmp_path / "head.txt", "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        yield f"127.0.0.1:{port}", folder
    finally:
        kill(folder, "")
        process.wait()


def kill(folder: Path, name: str) -> int:
    """Kill the head's processes with this name in their command; return their number."""
    count = 0
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if name.encode() in words[0] and any(str(folder).encode() in word for word in words):
            os.kill(int(entry.name), signal.SIGKILL)
            count += 1
    return count


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="finds the head's processes in /proc")
@pytest.mark.parametrize(
    ("lost", "said"), [("gcs_server", "error: (the Ray head|Ray on)"), ("raylet", "error: Ray on")]
)
def test_training_says_what_is_lost(lost: str, said: str, head: tuple[str, Path], tmp_path: Path) -> None:
    address, folder = head
    (tmp_path / "train.txt").write_text("".join(line + "\n" for line in sentences(300)), "utf-8")
    values = tiny_values(
        run__name="a", run__storage_path=str(tmp_path / "runs"), data__train=str(tmp_path / "train.txt"),
        train__duration="1000000 steps", cluster={"workers": 1, "cpus_per_worker": 0.5, "data_cpus": 0.25},
    )  # fmt: skip
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(values))
    environment = {
        **os.environ, "RAY_ADDRESS": address, "PYTHONPATH": str(Path(pretrain.__file__).parents[1]),
        "RAY_gcs_rpc_server_reconnect_timeout_s": "5",
    }  # fmt: skip
    deadline = time.monotonic() + SECONDS

    def wait_for(ready: bool, what: str) -> bool:
        assert ready or time.monotonic() < deadline, f"{what}\n{(tmp_path / 'log.txt').read_text()[-3000:]}"
        time.sleep(0.2)
        return not ready

    (tmp_path / "log.txt").touch()
    host, _, port = address.rpartition(":")
    while wait_for(socket.socket().connect_ex((host, int(port))) == 0, "no head"):
        pass
    with open(tmp_path / "log.txt", "wb") as log:
        driver = subprocess.Popen(
            [sys.executable, "-m", "elmo_ray.pretrain", str(tmp_path / "a.yaml"), "--resume"],
            stdout=log, stderr=log, env=environment, start_new_session=True,
        )  # fmt: skip
    while wait_for(b"step " in (tmp_path / "log.txt").read_bytes() or driver.poll() is not None, "no step"):
        pass
    assert driver.poll() is None, (tmp_path / "log.txt").read_text()
    assert kill(folder, lost) == 1  # `ray start` then ends the others, and either loss may be noticed first
    while wait_for(driver.poll() is not None, "the driver goes on"):
        pass
    assert driver.returncode == 1
    while wait_for(re.search(said, (tmp_path / "log.txt").read_text()) is not None, "no line"):
        pass
    text = (tmp_path / "log.txt").read_text()
    assert "is lost, and this command with it" in text and "with --resume" in text and "Traceback" not in text
