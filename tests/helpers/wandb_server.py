"""Stand-in for W&B's server on loopback, as far as its library needs one: runs, rows of metrics, and files."""

from __future__ import annotations

import contextlib
import gzip
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class WandbServer:
    """Server whose runs can be looked at. rows: of each run. files: names of uploaded ones. away: it answers 503."""

    def __init__(self) -> None:
        self.rows: dict[str, list[dict[str, Any]]] = {}
        self.runs: dict[str, dict[str, Any]] = {}
        self.files: set[str] = set()
        self.away = False
        self.problems: list[str] = []
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.address = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def _handler(server) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *arguments: Any) -> None: ...

            def handle(self) -> None:
                with contextlib.suppress(ConnectionError):  # of a client that was killed
                    super().handle()

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length") or 0))
                if self.headers.get("content-encoding") == "gzip":
                    body = gzip.decompress(body)
                answer = {} if server.away else server._answer(self.path, body)
                data = json.dumps(answer).encode()
                self.send_response(503 if server.away else 200)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_PUT = do_GET = do_POST

        return Handler

    def _answer(self, path: str, body: bytes) -> dict[str, Any]:
        if path == "/graphql":
            query = json.loads(body)
            name = re.search(r"(?:query|mutation)\s+(\w+)", query["query"])
            return {"data": self._graphql(name[1] if name else "", query.get("variables") or {})}
        if path.endswith("/file_stream"):
            self._take_rows(path.split("/")[-2], json.loads(body))
        elif path.startswith("/upload/"):
            self.files.add(path.removeprefix("/upload/"))
        return {}

    def _take_rows(self, run: str, sent: dict[str, Any]) -> None:
        chunk = (sent.get("files") or {}).get("wandb-history.jsonl")
        if not chunk:
            return
        rows = self.rows.setdefault(run, [])
        if chunk["offset"] != len(rows):
            self.problems.append(f"rows from {chunk['offset']} on, and there are {len(rows)}")
        rows += [json.loads(row) for row in chunk["content"]]

    def _graphql(self, name: str, values: dict[str, Any]) -> dict[str, Any]:
        project = {"id": "p", "name": "elmo_ray", "entity": {"id": "e", "name": "me"}}
        if name == "RunResumeStatus":
            return {"model": {**project, "bucket": self._state(values["name"])}}
        if name == "UpsertBucket":
            run, is_new = values["name"], values["name"] not in self.runs
            self.runs.setdefault(run, {}).update({key: value for key, value in values.items() if value})
            bucket = {"id": "b", "name": run, "displayName": values.get("displayName"), "config": "{}"}
            bucket |= {"historyLineCount": len(self.rows.get(run, [])), "project": project}
            return {"upsertBucket": {"bucket": bucket, "inserted": is_new}}
        if name == "CreateRunFiles":
            files = [{"name": file, "uploadUrl": f"{self.address}/upload/{file}"} for file in values["files"]]
            return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}
        return {}

    def _state(self, run: str) -> dict[str, Any] | None:
        if run not in self.runs:
            return None
        rows = self.rows.get(run, [])
        lines = {"logLineCount": 0, "eventsLineCount": 0, "historyLineCount": len(rows)}
        tail = json.dumps([json.dumps(row) for row in rows[-1:]])
        about = {"id": "b", "name": run, "displayName": run, "summaryMetrics": "{}", "tags": []}
        about["config"] = self.runs[run].get("config", "{}")
        return {**about, **lines, "historyTail": tail, "eventsTail": "[]", "wandbConfig": json.dumps({"t": 1})}
