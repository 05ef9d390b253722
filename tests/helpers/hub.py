"""Stand-in for the Hugging Face Hub on loopback: the requests by which `huggingface_hub` fetches a model and data.

Files are read by ranges; a repository of data is named `datasets/OWNER/NAME`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

SHA = "0123456789abcdef0123456789abcdef01234567"


@contextlib.contextmanager
def hub_of(folders: dict[str, Path]) -> Iterator[tuple[str, list[str]]]:
    """Serve folders as the repositories of these names; yield the address and the list of the files that were sent.

    A name is OWNER/NAME, or datasets/OWNER/NAME. One whose folder has a file named `gated` asks for a token.
    """
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
            path = unquote(self.path.partition("?")[0]).strip("/")
            is_api = path.startswith("api/")
            kind = "datasets/" if "datasets/" in path else ""
            parts = path.removeprefix("api/").removeprefix("models/").removeprefix("datasets/").split("/")
            name = "/".join(parts[:2])
            folder = folders.get(kind + name)
            if folder is None:
                self.answer(401, b"{}", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
            elif (folder / "gated").exists():
                self.answer(403, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"})
            elif not is_api:
                self.send(folder.joinpath(*parts[4:]))
            elif parts[2:3] == ["tree"]:
                inside = folder.joinpath(*parts[4:])
                files = sorted(inside.rglob("*") if "recursive=true" in self.path.lower() else inside.iterdir())
                entries = [
                    {"type": "directory" if file.is_dir() else "file", "path": file.relative_to(folder).as_posix(),
                     **({"oid": "0", "size": 0} if file.is_dir() else about(file))}
                    for file in files
                ]  # fmt: skip
                self.answer(200, json.dumps(entries).encode(), {"Content-Type": "application/json"})
            else:
                siblings = [{"rfilename": file.name} for file in sorted(folder.iterdir())]
                info = {"id": name, "sha": SHA, "siblings": siblings, "tags": [], "private": False}
                self.answer(200, json.dumps(info).encode(), {"Content-Type": "application/json"})

        def send(self, file: Path) -> None:
            if self.command == "GET":
                sent.append(file.name)
            data = file.read_bytes()
            headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"'}
            asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            if asked is None:
                self.answer(200, data, headers)
                return
            start, end = int(asked[1]), min(int(asked[2]) + 1, len(data))
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(data)}"
            self.answer(206, data[start:end], headers)

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
