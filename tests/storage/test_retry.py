"""Requests to a store that is away: which are made again, which are not, and what the log says."""

from __future__ import annotations

import errno
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.hosts import REPOSITORY, wait_for
from helpers.places import BUCKET

from elmo_ray import storage
from elmo_ray.cluster.stopping import stop_check
from elmo_ray.storage import StoreAway, retry, store_lock


class Server:
    """The S3 server of `helpers.faulty_s3` on this machine."""

    def __init__(self, folder: Path) -> None:
        self.control = folder / "s3"
        self.tell("well")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]

    def start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "helpers.faulty_s3", "127.0.0.1", str(self.port), str(self.control)]
        paths = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])
        process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": paths}, stderr=subprocess.DEVNULL)
        wait_for(self.control.with_name("s3.ready").exists, "the server")
        return process

    def tell(self, word: str) -> None:
        new = self.control.with_name("s3.new")
        new.write_text(word)
        new.rename(self.control)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    fsspec = pytest.importorskip("fsspec")
    pytest.importorskip("s3fs")
    pytest.importorskip("moto.server")
    server = Server(tmp_path_factory.mktemp("s3"))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.port}")
        patch.setenv("AWS_MAX_ATTEMPTS", "1")  # the library's own tries take half a minute
        process = server.start()
        # fsspec keeps file systems by their arguments, and one of another test has another address
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        try:
            yield server
        finally:
            process.kill()
            process.wait()
            fsspec.get_filesystem_class("s3").clear_instance_cache()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test begins as a process that no store has answered yet."""
    monkeypatch.setattr(retry, "_stores", {})
    monkeypatch.setattr(retry, "_expected", False)
    monkeypatch.setattr(retry, "PAUSE_S", 0.1)
    monkeypatch.setattr(retry, "TELL_EVERY_S", 0.0)


def test_a_store_that_has_answered_is_waited_for(
    server: Server, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    caplog.set_level(logging.INFO, "elmo_ray")
    place = f"{BUCKET}/waited/one"
    storage.write_bytes(place, b"text")
    (tmp_path / "source").write_bytes(b"sent")
    works = {
        "read": lambda: storage.read_bytes(place),
        "range": lambda: storage.read_range(place, 1, 3),
        "status": lambda: storage.status(place).st_size,
        "exists": lambda: storage.exists(place),
        "listing": lambda: list(storage.listing(f"{BUCKET}/waited")),
        "matches": lambda: storage.matches(f"{BUCKET}/waited/*"),
        "download": lambda: storage.download(place, tmp_path / "target"),
        "upload": lambda: storage.upload(tmp_path / "source", f"{BUCKET}/sent"),
    }
    found: dict[str, object] = {}
    server.tell("down")
    try:
        threads = [
            threading.Thread(target=lambda name=name, work=work: found.update({name: work()}))
            for name, work in works.items()
        ]
        for thread in threads:
            thread.start()
        wait_for(lambda: caplog.text.count("has been away for") >= 2 * len(works), "lines")
        assert not found
    finally:
        server.tell("well")
    for thread in threads:
        thread.join(60)
    assert found == {
        "read": b"text", "range": b"ex", "status": 4, "exists": True, "listing": ["one"], "matches": [place],
        "download": None, "upload": None,
    }  # fmt: skip
    assert (tmp_path / "target").read_bytes() == b"text" and storage.read_bytes(f"{BUCKET}/sent") == b"sent"
    assert f"{BUCKET} has been away for 0 s (OSError: Please try again.): trying again for 15 minutes" in caplog.text
    assert f"{BUCKET} answers again after" in caplog.text


def test_a_store_that_never_answered_fails_soon(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """With `expect_answers` it is waited for, until the patience ends; then it is not waited for once more."""
    server.tell("down")
    try:
        with pytest.raises(StoreAway):
            storage.read_bytes(f"{BUCKET}/one")
        storage.expect_answers()
        monkeypatch.setattr(retry, "PATIENCE_S", 1.0)
        begun = time.monotonic()
        with pytest.raises(StoreAway):
            storage.read_bytes(f"{BUCKET}/one")
        waited = time.monotonic() - begun
        with pytest.raises(StoreAway):
            storage.read_bytes(f"{BUCKET}/two")
        assert waited >= 1.0 > time.monotonic() - begun - waited
    finally:
        server.tell("well")


def test_what_is_wrong_is_not_waited_for(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    storage.expect_answers()
    storage.write_bytes(f"{BUCKET}/there", b"x")
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(f"{BUCKET}/missing")
    with pytest.raises(FileNotFoundError, match="no such object or bucket"):
        storage.read_bytes("s3://no-such-bucket/one")
    assert storage.listing("s3://no-such-bucket/one") == {} and not storage.exists(f"{BUCKET}/missing")
    server.tell("denied")
    try:
        for ask in (storage.read_bytes, storage.status, storage.exists, storage.listing):
            with pytest.raises(PermissionError):
                ask(f"{BUCKET}/there")
    finally:
        server.tell("well")
    assert "has been away" not in caplog.text


def test_what_is_done_from_time_to_time_is_not_waited_for(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    storage.write_bytes(f"{BUCKET}/one", b"x")
    server.tell("down")
    try:
        with storage.at_once(), pytest.raises(StoreAway):
            storage.exists(f"{BUCKET}/one")
    finally:
        server.tell("well")
    assert f"{BUCKET} has been away" in caplog.text


def test_a_look_for_a_stop_does_not_wait_for_the_store(server: Server) -> None:
    """Workers look before each step, and training goes on without a store."""
    run = f"{BUCKET}/stopping/run"
    storage.write_bytes(f"{run}/stop", b"")
    asked = stop_check(run)
    server.tell("hang")
    try:
        begun = time.monotonic()
        assert not asked() and not asked()
        assert time.monotonic() - begun < 1.0
    finally:
        server.tell("well")
    wait_for(asked, "the stop")


def test_a_lock_whose_answer_was_lost_is_held(server: Server) -> None:
    place = f"{BUCKET}/locks/run"
    storage.exists(place)
    server.tell("unheard")
    well = threading.Timer(0.5, server.tell, ["well"])
    well.start()
    try:
        with store_lock.store_lock(place):
            assert storage.exists(f"{BUCKET}/locks/.run.lock")
    finally:
        well.join()
    assert not storage.exists(f"{BUCKET}/locks/.run.lock")


def test_a_lock_that_could_not_be_renewed_meanwhile_is_not_out_of_date(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store is away for longer than a lock is valid: its holder could not renew it either."""
    monkeypatch.setattr(store_lock, "VALID_S", 1.5)
    monkeypatch.setattr(store_lock, "RENEW_S", 1.0)
    place, began = f"{BUCKET}/locks/other", time.monotonic()
    storage.write_bytes(f"{BUCKET}/locks/.other.lock", b"of another process")
    away = [threading.Timer(0.2, server.tell, ["down"]), threading.Timer(3.0, server.tell, ["well"])]
    for timer in away:
        timer.start()
    with store_lock.store_lock(place):
        assert time.monotonic() - began >= 3.0 + 1.5
    for timer in away:
        timer.join()


def errors_of_s3() -> dict[str, tuple[Exception, bool]]:
    """Name -> exception of the libraries, and whether it means that the store is away."""
    from botocore import exceptions
    from s3fs.errors import translate_boto_error

    def answer(status: int, code: str) -> exceptions.ClientError:
        return exceptions.ClientError(
            {"Error": {"Code": code, "Message": "words"}, "ResponseMetadata": {"HTTPStatusCode": status}}, "GetObject"
        )

    answers = {(503, "SlowDown"): True, (500, "InternalError"): True, (429, "TooManyRequests"): True,
               (400, "RequestTimeout"): True, (403, "RequestTimeTooSkewed"): True, (403, "AccessDenied"): False,
               (404, "NoSuchKey"): False, (400, "InvalidRequest"): False, (301, "PermanentRedirect"): False,
               (503, "503"): True, (403, "403"): False}  # fmt: skip
    url = "http://10.0.0.1:9000"
    return {
        **{f"{status} {code}": (answer(status, code), away) for (status, code), away in answers.items()},
        **{f"translated {s} {c}": (translate_boto_error(answer(s, c)), away) for (s, c), away in answers.items()},
        "no connection": (exceptions.EndpointConnectionError(endpoint_url=url, error="refused"), True),
        "connect timeout": (exceptions.ConnectTimeoutError(endpoint_url=url), True),
        "read timeout": (exceptions.ReadTimeoutError(endpoint_url=url), True),
        "closed": (exceptions.ConnectionClosedError(endpoint_url=url), True),
        "no credentials": (exceptions.NoCredentialsError(), False),
        "invalid": (exceptions.ParamValidationError(report="bucket name"), False),
        "certificate": (exceptions.SSLError(endpoint_url=url, error="[SSL: CERTIFICATE_VERIFY_FAILED]"), False),
    }


def test_which_errors_of_s3_mean_that_it_is_away() -> None:
    pytest.importorskip("s3fs")
    found = {name: (retry.is_away(error), away) for name, (error, away) in errors_of_s3().items()}
    assert {name: pair for name, pair in found.items() if pair[0] != pair[1]} == {}


@pytest.mark.parametrize(
    ("error", "away"),
    [
        (ConnectionRefusedError(errno.ECONNREFUSED, "refused"), True),
        (TimeoutError(), True),
        (OSError(errno.EHOSTUNREACH, "no route"), True),
        (socket.gaierror(socket.EAI_AGAIN, "name"), True),
        (OSError(errno.ENOSPC, "full"), False),
        (FileNotFoundError(errno.ENOENT, "missing"), False),
        (PermissionError(errno.EACCES, "denied"), False),
        (TypeError("a defect"), False),
    ],
)
def test_which_errors_of_the_system_mean_that_a_store_is_away(error: Exception, away: bool) -> None:
    assert retry.is_away(error) is away
