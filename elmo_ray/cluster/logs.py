"""What workers log, kept in `RUN/logs/` and shown in the driver's terminal.

Ray can forward the output of all its processes, but then each line has a process number in front, some come twice, and
Ray's own noise is among them. Here every process appends to a file of its own and the driver follows the files.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket

from elmo_ray.storage import is_uri
from elmo_ray.storage.local_copy import Outbox, local_folder

_LINE = re.compile(rb"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d (DEBUG|INFO|WARNING|ERROR|CRITICAL) (.*)", re.DOTALL)
_FOLDER = "logs"


def log_to_run(run_dir: str, rank: int | None) -> None:
    """Let the `elmo_ray` loggers of this process write to the run: all of rank 0 (or no rank), warnings of others.

    In an object store every process has a file of its own: none could append to another's.
    """
    outbox = Outbox(run_dir, f"{_FOLDER}/*")
    folder = outbox.folder / _FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    name = "controller" if rank is None else f"worker-{rank:05d}"
    if is_uri(run_dir):
        name += f"-{socket.gethostname()}-{os.getpid()}"
    handler = logging.FileHandler(folder / f"{name}.log")
    prefix = f"worker {rank}: " if rank else ""
    handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname)s {prefix}%(message)s", "%Y-%m-%d %H:%M:%S"))
    package = logging.getLogger("elmo_ray")
    package.setLevel(logging.WARNING if rank else logging.INFO)
    package.handlers = [handler]
    package.propagate = False


class LogRelay:
    """Logs again in this process what others have appended to the run's log files since it was made."""

    def __init__(self, run_dir: str) -> None:
        self.folder = local_folder(run_dir) / _FOLDER
        self.logger = logging.getLogger("elmo_ray.worker")
        self._read = {path.name: path.stat().st_size for path in self.folder.glob("*.log")}

    def poll(self) -> None:
        """Log all new lines. A file that cannot be read now is read later."""
        with contextlib.suppress(OSError):
            for path in sorted(self.folder.glob("*.log")):
                start = self._read.get(path.name, 0)
                if os.path.getsize(path) <= start:
                    continue
                with open(path, "rb") as file:
                    file.seek(start)
                    data = file.read()
                whole = data.rfind(b"\n") + 1
                self._read[path.name] = start + whole
                self._log(data[:whole])

    def _log(self, data: bytes) -> None:
        level = logging.INFO
        for line in data.splitlines():
            match = _LINE.match(line)
            if match:
                level = getattr(logging, match[1].decode())
            # a line without a head goes on with a message of several lines
            self.logger.log(level, "%s", (match[2] if match else line).decode("utf-8", "replace"))
