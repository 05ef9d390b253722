"""An S3 server (moto) that misbehaves as a file says: `python -m helpers.faulty_s3 ADDRESS PORT FILE`.

FILE holds one word, which is read at each request: `well`; `slow` (503 SlowDown to every third request); `down` (503
ServiceUnavailable to all); `unheard` (what a PUT asks for is done, and 503 is answered); `hang` (no answer until the
word changes); `denied` (403 for the key); `hold` (the first PUT below `checkpoints/` makes the file FILE.held and waits
until the word changes). The bucket `elmo-test` is there from the start.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

_ERROR = '<?xml version="1.0" encoding="UTF-8"?><Error><Code>{}</Code><Message>{}</Message></Error>'
Start = Callable[..., Any]


class Misbehaving:
    """WSGI application in front of another one."""

    def __init__(self, application: Callable[[dict[str, Any], Start], Iterable[bytes]], control: Path) -> None:
        self.application, self.control, self.requests = application, control, itertools.count(1)

    def word(self) -> str:
        return self.control.read_text().strip()

    def __call__(self, environ: dict[str, Any], start: Start) -> Iterable[bytes]:
        word = self.word()
        if word == "slow" and next(self.requests) % 3 == 0:
            return self.refuse(environ, start, "503 Slow Down", "SlowDown", "Please reduce your request rate.")
        if word == "unheard" and environ["REQUEST_METHOD"] == "PUT":
            list(self.application(environ, lambda *_: None))
            return self.refuse({}, start, "503 Service Unavailable", "ServiceUnavailable", "Please try again.")
        if word == "down":
            return self.refuse(environ, start, "503 Service Unavailable", "ServiceUnavailable", "Please try again.")
        if word == "denied":
            return self.refuse(environ, start, "403 Forbidden", "InvalidAccessKeyId", "The key does not exist.")
        held = word == "hold" and environ["REQUEST_METHOD"] == "PUT" and "/checkpoints/" in environ["PATH_INFO"]
        if held:
            self.control.with_name(self.control.name + ".held").touch()
        if held or word == "hang":
            while self.word() == word:
                time.sleep(0.05)
        return self.application(environ, start)

    def refuse(self, environ: dict[str, Any], start: Start, status: str, code: str, message: str) -> list[bytes]:
        length = int(environ.get("CONTENT_LENGTH") or 0)
        if length:
            environ["wsgi.input"].read(length)
        start(status, [("Content-Type", "application/xml")])
        return [b"" if environ.get("REQUEST_METHOD") == "HEAD" else _ERROR.format(code, message).encode()]


def main(address: str, port: str, control: str) -> None:
    import boto3
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    server = make_server(
        address, int(port), Misbehaving(DomainDispatcherApplication(create_backend_app), Path(control)), threaded=True
    )
    import threading

    threading.Thread(target=server.serve_forever).start()
    boto3.client("s3", endpoint_url=f"http://{address}:{port}").create_bucket(Bucket="elmo-test")
    Path(control).with_name(Path(control).name + ".ready").touch()


if __name__ == "__main__":
    main(*sys.argv[1:])
