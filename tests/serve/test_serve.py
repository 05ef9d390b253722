"""`serve` on a real Ray Serve: vectors, batches, limits, mistakes of clients and of users, the end by a signal.

One server answers all requests of this file.
"""

from __future__ import annotations

import gzip
import http.client
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from safetensors.numpy import load

from elmo_ray import Elmo, embed, serve
from elmo_ray.config.model import ModelConfig
from elmo_ray.embed.config import EmbedConfig
from elmo_ray.errors import ConfigError
from elmo_ray.serve.config import ServeConfig, ServeOptions
from elmo_ray.serve.messages import JSON, SAFETENSORS, RequestError, answer_type, read_request

GOLDEN = Path(__file__).parents[1] / "golden"
WEIGHTS = GOLDEN / "model" / "weights.hdf5"
SENTENCES = [line.split() for line in (GOLDEN / "own_text" / "text.txt").read_text("utf-8").split("\n")[:-1]]
LIMITS = {"max_body_bytes": 6000, "max_sentences": 20, "max_words": 400, "max_requests": 24, "batch_wait_s": 0.2}

has_serve = importlib.util.find_spec("starlette") is not None
needs_serve = pytest.mark.skipif(not has_serve, reason="Ray Serve is not installed (pip install 'elmo-ray[serve]')")


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> str:
        assert self.headers["content-type"] == JSON and self.body.count(b"\n") == 1, "one line of JSON"
        (message,) = json.loads(self.body).values()
        return str(message)


@dataclass
class Server:
    process: subprocess.Popen[str]
    port: int
    log: Path

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        text = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        connection.request(method, path, text, headers)
        answer = connection.getresponse()
        found = Answer(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())
        connection.close()
        return found

    def vectors(self, sentences: list[list[str]], accept: str = JSON, **more: Any) -> list[np.ndarray]:
        answer = self.ask("POST", "/vectors", {"sentences": sentences, **more}, Accept=accept)
        assert answer.status == 200 and answer.headers["content-type"] == accept, answer.body
        if accept == SAFETENSORS:
            tensors = load(answer.body)
            return [tensors[str(number)] for number in range(len(tensors))]
        return [np.array(each, np.float32) for each in json.loads(answer.body)["vectors"]]

    def health(self) -> dict[str, Any]:
        return dict(json.loads(self.ask("GET", "/health").body))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    port, log = free_port(), tmp_path_factory.mktemp("serve") / "log.txt"
    settings = [f"serve.{name}={value}" for name, value in {**LIMITS, "port": port}.items()]
    command = [sys.executable, "-m", "elmo_ray.serve", str(WEIGHTS), *settings, "cluster.device=cpu"]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    with log.open("w") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=file, text=True, env=environment, cwd=log.parent, start_new_session=True
        )
    found = Server(process, port, log)
    try:
        until = time.monotonic() + 180
        while "listening on" not in log.read_text():
            assert process.poll() is None and time.monotonic() < until, log.read_text()
            time.sleep(0.2)
        yield found
    finally:
        if process.poll() is None:
            process.terminate()
        process.wait(60)


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> list[np.ndarray]:
    """What `embed` writes for the sentences: [layers, words, dimensions] of each."""
    folder = tmp_path_factory.mktemp("embedded")
    (folder / "text.txt").write_text("".join(" ".join(words) + "\n" for words in SENTENCES), "utf-8")
    places = {"init": {"from": str(WEIGHTS)}, "in": str(folder / "text.txt"), "out": str(folder / "out.hdf5")}
    embed.run(EmbedConfig.from_dict({**places, "cluster": {"workers": 0, "threads": 1}}))
    with h5py.File(folder / "out.hdf5") as file:
        return [file[str(number)][...] for number in range(len(SENTENCES))]


def parts(size: int) -> list[slice]:
    return [slice(first, first + size) for first in range(0, len(SENTENCES), size)]


@needs_serve
@pytest.mark.slow
@pytest.mark.ray
class TestServer:
    def test_vectors_are_those_of_embed_and_elmo(self, server: Server, embedded: list[np.ndarray]) -> None:
        elmo = Elmo.from_run(WEIGHTS, 1, stateful=False, dropout=0.0)
        for part in parts(10):
            sentences = SENTENCES[part]
            for accept in (JSON, SAFETENSORS):
                for ours, theirs in zip(server.vectors(sentences, accept), embedded[part], strict=True):
                    np.testing.assert_allclose(ours.reshape(theirs.shape), theirs, rtol=0, atol=1e-6)
            with torch.no_grad():
                (mixed,) = elmo(elmo.encode(sentences))["elmo_representations"]
            for row, ours in enumerate(server.vectors(sentences, SAFETENSORS, layers="average")):
                np.testing.assert_allclose(ours[0], mixed[row, : len(sentences[row])], rtol=0, atol=1e-6)

    def test_requests_are_computed_together(self, server: Server, embedded: list[np.ndarray]) -> None:
        choices: list[Any] = ["all", "top", [0.5, -1, 2], "average"]
        jobs = [(part, choices[number % 4]) for number, part in enumerate(parts(3))][:20]
        before = server.health()
        with ThreadPoolExecutor(len(jobs)) as pool:
            found = list(pool.map(lambda job: server.vectors(SENTENCES[job[0]], SAFETENSORS, layers=job[1]), jobs))
        after = server.health()
        assert after["requests"] - before["requests"] == len(jobs)
        assert after["batches"] - before["batches"] <= len(jobs) // 2
        factors = {"all": np.eye(3), "top": [[0, 0, 1]], "average": [[1 / 3] * 3]}
        for (part, choice), answer in zip(jobs, found, strict=True):
            matrix = np.array(factors[choice] if isinstance(choice, str) else [choice])
            for ours, theirs in zip(answer, embedded[part], strict=True):
                np.testing.assert_allclose(ours, np.tensordot(matrix, theirs, 1), rtol=0, atol=2e-6)

    def test_no_state_is_kept_and_nothing_is_an_answer(self, server: Server) -> None:
        first, second = server.vectors(SENTENCES[:2]), server.vectors(SENTENCES[:2])
        assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
        assert server.vectors([]) == [] and server.vectors([], SAFETENSORS) == []
        empty, one = server.vectors([[], ["Yes"]], SAFETENSORS, layers="top")
        assert empty.shape == (1, 0, 32) and one.shape == (1, 1, 32)

    @pytest.mark.parametrize(
        ("body", "headers", "status", "message"),
        [
            (None, {}, 400, 'the request has no body; send {"sentences"'),
            (gzip.compress(b"{}"), {"Content-Encoding": "gzip"}, 415, "Content-Encoding: gzip: send the body without"),
            ({"sentence": []}, {"Content-Encoding": "identity"}, 400, "an object such as"),
            (b'{"sentences": ', {}, 400, "no JSON: Expecting value at line 1, column 15"),
            (b"\xff{}", {}, 400, "byte 0 is not UTF-8"),
            (b"[" * 5000, {}, 400, "JSON"),
            ([["The"]], {}, 400, 'an object such as {"sentences"'),
            ({"sentence": []}, {}, 400, 'an object such as {"sentences"'),
            ({"sentences": [], "layer": "top"}, {}, 400, "'layer': a request has sentences and layers"),
            ({"sentences": "The cat"}, {}, 400, "a list of lists of words"),
            ({"sentences": [["The"], "cat"]}, {}, 400, "sentence 1 is 'cat'; it must be a list of words"),
            ({"sentences": [["The", 3]]}, {}, 400, "sentence 0, word 1 is 3; a word is a string"),
            ({"sentences": [["\ud800"]]}, {}, 400, "sentence 0 has half of a surrogate pair"),
            ({"sentences": [], "layers": "last"}, {}, 400, "layers='last': must be all, top, average or a list"),
            (b'{"sentences": [], "layers": [NaN, 1, 1]}', {}, 400, "layers=[nan, 1, 1]: must be all, top"),
            (b'{"sentences": [], "layers": [1e999, 1, 1]}', {}, 400, "layers=[inf, 1, 1]: must be all, top"),
            ({"sentences": [], "layers": [10**400, 1, 1]}, {}, 400, "layers=[1000"),
            ({"sentences": [], "layers": [1, 2]}, {}, 400, "the model has 3 layers"),
            ({"sentences": [["a"]] * 21}, {}, 413, "21 sentences and may have serve.max_sentences=20"),
            ({"sentences": [["a"] * 401]}, {}, 413, "401 words and may have serve.max_words=400"),
            (b" " * 6001, {}, 413, "6,001 bytes and may have serve.max_body_bytes=6000"),
            ({"sentences": []}, {"Accept": "text/html"}, 406, "application/json or application/safetensors"),
        ],
    )
    def test_mistakes_of_clients(
        self, server: Server, body: Any, headers: dict[str, str], status: int, message: str
    ) -> None:
        answer = server.ask("POST", "/vectors", body, **headers)
        assert answer.status == status and message in answer.error

    def test_paths_and_methods(self, server: Server) -> None:
        assert server.ask("GET", "/nothing").status == 404
        assert "POST /vectors" in server.ask("GET", "/").error
        answer = server.ask("GET", "/vectors")
        assert answer.status == 405 and answer.headers["allow"] == "POST" and "takes POST" in answer.error
        health = server.health()
        assert health["status"] == "ok" and str(WEIGHTS) in health["model"]

    def test_a_body_without_a_length_has_the_same_limit(self, server: Server) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        connection.request("POST", "/vectors", iter([b" " * 4000] * 2), encode_chunked=True)
        answer = connection.getresponse()
        assert answer.status == 413 and b"more bytes" in answer.read()
        connection.close()

    def test_a_busy_server_refuses(self, server: Server) -> None:
        body = json.dumps({"sentences": [["Yes"]]}).encode()
        waiting = [socket.create_connection(("127.0.0.1", server.port), 60) for _ in range(LIMITS["max_requests"])]
        head = f"POST /vectors HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode()
        for one in waiting:  # each holds a place with half of its request
            one.sendall(head + body[:5])
        until = time.monotonic() + 60
        while (health := server.health())["waiting"] < LIMITS["max_requests"]:
            assert time.monotonic() < until, health
            time.sleep(0.1)
        answer = server.ask("POST", "/vectors", {"sentences": []})
        assert answer.status == 503 and f"serve.max_requests={LIMITS['max_requests']}" in answer.error
        for one in waiting:
            one.sendall(body[5:])
        for one in waiting:
            assert one.makefile("rb").readline().split()[1] == b"200"
            one.close()
        assert server.vectors([]) == []

    def test_a_client_that_hangs_up_disturbs_nobody(self, server: Server) -> None:
        body = json.dumps({"sentences": SENTENCES[:5]}).encode()
        for _ in range(5):
            with socket.create_connection(("127.0.0.1", server.port), 60) as gone:
                head = f"POST /vectors HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
                gone.sendall(head + body)
        assert len(server.vectors(SENTENCES[:5])) == 5

    def test_the_port_is_in_use(self, server: Server, capsys: pytest.CaptureFixture[str]) -> None:
        assert serve.main([str(WEIGHTS), f"serve.port={server.port}"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: serve.port={server.port}: cannot listen on 127.0.0.1: Address already in use")

    def test_ctrl_c_ends_it(self, server: Server) -> None:
        """The last test: a request that is being computed is answered, and nothing but log lines is printed."""
        answers: list[int] = []
        ask = threading.Thread(target=lambda: answers.append(len(server.vectors(SENTENCES[:9]))))
        ask.start()
        before = server.health()["requests"]
        while server.health()["requests"] == before and ask.is_alive():
            time.sleep(0.01)
        os.killpg(server.process.pid, signal.SIGINT)
        assert server.process.wait(60) == 0
        ask.join(60)
        log = server.log.read_text()
        assert answers == [9], log
        assert [line.split(" ", 2)[1] for line in log.splitlines()] == ["I"] * 4, log


@pytest.mark.skipif(has_serve, reason="Ray Serve is installed")
def test_without_ray_serve(capsys: pytest.CaptureFixture[str]) -> None:
    assert serve.main([str(WEIGHTS)]) == 2
    assert capsys.readouterr().err == "error: Ray Serve is not installed: pip install 'elmo-ray[serve]'\n"


@needs_serve
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "nothing: no such file or folder; SOURCE is"),
        ([], "SOURCE is missing; usage: python -m elmo_ray.serve SOURCE"),
        ([str(WEIGHTS), "serve.layers=[1, 2]"], "serve.layers=[1.0, 2.0]: the model has 3 layers"),
        ([str(WEIGHTS), "serve.host=no.such.host.invalid"], "cannot listen on no.such.host.invalid"),
        ([str(WEIGHTS), "cluster.workers=0"], "cluster.workers=0: must be an integer >= 1"),
        ([str(WEIGHTS), "cluster.max_failures=2"], "cluster.max_failures: Ray Serve replaces lost workers"),
        ([str(WEIGHTS), "data.test=x"], "data.test: serve gets its sentences by HTTP"),
    ],
)
def test_mistakes_of_users(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert serve.main([*arguments, *([] if "serve.host" in str(arguments) else [f"serve.port={free_port()}"])]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line


@needs_serve
def test_a_dry_run_shows_what_would_be_served(capsys: pytest.CaptureFixture[str]) -> None:
    port = free_port()
    assert serve.main([str(WEIGHTS), f"serve.port={port}", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert f"http://127.0.0.1:{port}" in shown and "114,444 parameters" in shown and "max_requests: 64" in shown


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        (None, JSON),
        ("", JSON),
        ("*/*", JSON),
        ("application/*;q=0.1", JSON),
        ("application/safetensors", SAFETENSORS),
        ("text/html, Application/SafeTensors;q=0.5", SAFETENSORS),
        ("application/json;q=0.2, application/safetensors;q=0.9", SAFETENSORS),
        ("application/safetensors;q=0, */*", JSON),
        ("application/json;q=bad", None),
        ("text/html", None),
    ],
)
def test_the_form_of_the_answer(accept: str | None, kind: str | None) -> None:
    if kind is None:
        with pytest.raises(RequestError) as caught:
            answer_type(accept)
        assert caught.value.status == 406
    else:
        assert answer_type(accept) == kind


def test_a_model_with_wide_word_vectors_gives_the_top() -> None:
    model = ModelConfig.model_validate({"char_cnn": {"filters": [[1, 4]], "projection": False}})
    assert read_request(b'{"sentences": [["a"]], "layers": "top"}', ServeOptions(), model).factors == (0.0, 0.0, 1.0)
    with pytest.raises(RequestError, match="set layers=top"):
        read_request(b'{"sentences": [["a"]]}', ServeOptions(), model)
    with pytest.raises(ConfigError, match="serve.port=0"):
        ServeConfig.from_dict({"serve": {"port": 0}})
