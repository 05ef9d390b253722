"""Logs of workers, kept in `RUN/logs/` and shown in the driver's terminal.

Ray can forward the output of all its processes, but then each line begins with a process number, some lines come twice,
and messages of Ray itself are among them. Here every process appends to a file of its own and the driver follows the
files.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket

from elmo_ray.storage import is_uri
from elmo_ray.storage.local_copy import local_copy_of, local_folder

_LINE = re.compile(rb"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d (DEBUG|INFO|WARNING|ERROR|CRITICAL) (.*)", re.DOTALL)
_FOLDER = "logs"


def log_to_run(run_dir: str, rank: int | None) -> None:
    """Let the `elmo_ray` loggers of this process write to the run's logs.

    Rank 0, and a process without a rank (None), writes all messages from INFO on; other ranks write warnings.
    """
    files = local_copy_of(run_dir)
    files.keep_pushing(f"{_FOLDER}/*")
    folder = files.folder / _FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    name = "controller" if rank is None else f"worker-{rank:05d}"
    if is_uri(run_dir):  # no process can append to another's object
        name += f"-{socket.gethostname()}-{os.getpid()}"
    handler = logging.FileHandler(folder / f"{name}.log")
    prefix = f"worker {rank}: " if rank else ""
    handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname)s {prefix}%(message)s", "%Y-%m-%d %H:%M:%S"))
    package = logging.getLogger("elmo_ray")
    package.setLevel(logging.WARNING if rank else logging.INFO)
    package.handlers = [handler]
    package.propagate = False


class LogFollower:
    """Follower of a run's log files: logs in this process the lines that others append after it was made."""

    def __init__(self, run_dir: str) -> None:
        self.folder = local_folder(run_dir) / _FOLDER
        self.logger = logging.getLogger("elmo_ray.worker")
        self._read = {path.name: path.stat().st_size for path in self.folder.glob("*.log")}

    def poll(self) -> None:
        """Log all new whole lines; a file that cannot be read now is read at the next call."""
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
            # a line without date and level continues a message of several lines
            self.logger.log(level, "%s", (match[2] if match else line).decode("utf-8", "replace"))
