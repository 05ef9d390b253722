"""A run in Weights & Biases. Its variables hold: WANDB_PROJECT (elmo_ray), WANDB_MODE, WANDB_BASE_URL, WANDB_API_KEY.

W&B's library writes everything to files below RUN/wandb and sends these. What is still there when a start ends, offline
or because W&B is away, is sent by the next one that is not offline.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from elmo_ray.trackers.tracker import EVALUATION_COLUMNS, Memory, evaluation_rows, numbers, without_secrets
from elmo_ray.training.metrics import Record

_WAIT_S = 20
"""Seconds to wait for W&B's server when a run begins."""


class WandbTracker:
    """Tracker of Weights & Biases, through its library."""

    def __init__(self, run_dir: Path, name: str) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")
        self.address = without_secrets(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))
        self._offline = os.environ.get("WANDB_MODE", "online") != "online"
        self._run_dir, self._name = run_dir, name
        self._run: Any = None
        self._rows = 0
        self._held: list[str] = []

    def open(self, memory: Memory) -> str:
        import wandb

        if os.environ.get("WANDB_MODE") == "disabled":
            raise ValueError("WANDB_MODE=disabled sends nothing")
        memory.run = memory.run or memory.key
        self._held = memory.held
        self._send_held()
        files = sorted(self._run_dir.glob(f"wandb/*run-*/run-{memory.run}.wandb"))
        if files:
            # the files decide: what W&B's process had not written when it was killed is sent again
            memory.steps, self._rows = _written(files)
        self._run = wandb.init(
            id=memory.run,
            name=self._name,
            project=os.environ.get("WANDB_PROJECT", "elmo_ray"),
            dir=str(self._run_dir),
            resume="allow",
            settings=wandb.Settings(
                silent=True,
                console="off",
                init_timeout=_WAIT_S,
                # nothing of this machine but what the run has written
                disable_git=True,
                disable_code=True,
                save_code=False,
                x_disable_stats=True,
            ),
        )
        self._held.append(Path(self._run.dir).parent.name)
        self._rows = max(self._rows, int(self._run.step))
        for kind in ("train", "valid"):
            self._run.define_metric(f"{kind}/step", hidden=True)
            self._run.define_metric(f"{kind}/*", step_metric=f"{kind}/step")
        rest = f"without WANDB_MODE=offline `python -m elmo_ray.report {self._run_dir} to=wandb` sends it"
        return str(self._run.url or f"offline, in {self._run_dir / 'wandb'}; {rest}")

    def _send_held(self) -> None:
        """Let W&B send what earlier starts left in their folders, offline or cut off at their end."""
        while self._held and not self._offline:
            folder = self._run_dir / "wandb" / self._held[0]
            if folder.is_dir():
                command = [sys.executable, "-m", "wandb", "sync", "--include-online", str(folder)]
                done = subprocess.run(
                    command,
                    stdin=subprocess.DEVNULL,
                    capture_output=True,
                    text=True,
                    check=False,
                    env={**os.environ, "WANDB_DIR": str(self._run_dir)},  # its logs would go to the working folder
                )
                if done.returncode:
                    raise OSError(f"wandb sync {folder}: {done.stderr.strip()}")
            self._held.pop(0)

    def _log(self, row: Mapping[str, Any]) -> None:
        # W&B drops a row whose number is not above the last, so rows are counted, and their step is a value
        self._run.log(dict(row), step=self._rows, commit=True)
        self._rows += 1

    def write(self, records: Sequence[Record]) -> None:
        for record in records:
            kind = record["kind"]
            values = {f"{kind}/{name}": value for name, value in numbers(record).items()}
            self._log({**values, f"{kind}/step": record["step"], f"{kind}/time": record["time"]})

    def write_settings(self, settings: Mapping[str, Any]) -> None:
        self._run.config.update(dict(settings), allow_val_change=True)

    def write_result(self, result: Mapping[str, Any]) -> None:
        import wandb

        evaluation = result.get("evaluation")
        if not isinstance(evaluation, dict):
            return
        measured = numbers({**evaluation, "unigram_perplexity": result.get("unigram_perplexity")})
        self._run.summary.update({f"test/{name}": value for name, value in measured.items()})
        self._log({"evaluation": wandb.Table(columns=list(EVALUATION_COLUMNS), data=evaluation_rows(evaluation))})

    def write_file(self, path: Path) -> None:
        import wandb

        if path.suffix == ".png":
            self._log({f"pictures/{path.stem}": wandb.Image(str(path))})
        else:
            # below the name of the run: W&B has a config.yaml of its own
            self._run.save(str(path), base_path=str(self._run_dir.parent), policy="now")

    def close(self, outcome: str) -> None:
        self._run.finish(exit_code=1 if outcome == "failed" else 0)
        if not self._offline:
            self._held.clear()


def _written(files: Sequence[Path]) -> tuple[dict[str, int], int]:
    """Return the last step of each kind of record in W&B's files of a run, and the number of rows there."""
    steps: dict[str, int] = {}
    rows = 0
    for path in files:
        for row in rows_of(path):
            rows = max(rows, row["_step"] + 1)
            for kind in ("train", "valid"):
                if f"{kind}/step" in row:
                    steps[kind] = max(steps.get(kind, 0), row[f"{kind}/step"])
    return steps, rows


def rows_of(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of metrics in one of W&B's files, up to its end or the place where it was cut off."""
    from google.protobuf.message import DecodeError
    from wandb.proto import wandb_internal_pb2

    for data in _entries(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        with contextlib.suppress(DecodeError):
            record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            yield {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


_HEAD, _BLOCK = 7, 32768


def _entries(data: bytes) -> Iterator[bytes]:
    """Yield the entries of a file in the form of LevelDB's log, after a head of seven bytes of W&B's own."""
    # blocks of 32 kB hold pieces with a sum, a length and a kind: whole, first, middle or last of an entry
    place, entry = _HEAD, b""
    while place + _HEAD <= len(data):
        left = _BLOCK - place % _BLOCK
        if left < _HEAD:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        piece = data[place + _HEAD : place + _HEAD + length]
        if kind not in (1, 2, 3, 4) or len(piece) < length:
            return
        entry = piece if kind in (1, 2) else entry + piece
        place += _HEAD + length
        if kind in (1, 4):
            yield entry
