"""Stand-in for the Hugging Face Hub on loopback: the four requests with which `huggingface_hub` fetches a model."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

SHA = "0123456789abcdef0123456789abcdef01234567"


@contextlib.contextmanager
def hub_of(folders: dict[str, Path]) -> Iterator[tuple[str, list[str]]]:
    """Serve folders as the models OWNER/NAME; yield the address and the list of the files that were sent."""
    sent: list[str] = []

    def about(file: Path) -> dict[str, object]:
        data = file.read_bytes()
        return {"size": len(data), "oid": hashlib.sha1(data).hexdigest()}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            pass

        def answer(self, code: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(code)
            for name, value in {"Content-Length": str(len(body)), "X-Repo-Commit": SHA, **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_GET(self) -> None:
            path = self.path.partition("?")[0].strip("/")
            parts = path.removeprefix("api/models/").split("/")
            folder = folders.get("/".join(parts[:2]))
            if folder is None:
                self.answer(401, b"{}", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
            elif not path.startswith("api/models/"):
                file = folder.joinpath(*parts[4:])
                if self.command == "GET":
                    sent.append(file.name)
                data = file.read_bytes()
                self.answer(200, data, {"ETag": f'"{hashlib.sha1(data).hexdigest()}"'})
            elif parts[2:3] == ["tree"]:
                files = [{"type": "file", "path": file.name, **about(file)} for file in sorted(folder.iterdir())]
                self.answer(200, json.dumps(files).encode(), {"Content-Type": "application/json"})
            else:
                siblings = [{"rfilename": file.name} for file in sorted(folder.iterdir())]
                info = {"id": "/".join(parts[:2]), "sha": SHA, "siblings": siblings, "tags": [], "private": False}
                self.answer(200, json.dumps(info).encode(), {"Content-Type": "application/json"})

        do_HEAD = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", sent
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
