"""A folder with texts and a tiny configuration, and the verbs at work on them in this process."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from elmo_ray import evaluate, prepare, pretrain
from helpers.tiny_runs import sentences


def sentence_bytes(n: int, seed: int) -> bytes:
    return "".join(f"{line}\n" for line in sentences(n, seed)).encode()


@dataclass
class Outcome:
    """code: of the exit. errors: lines on stderr, one at most. log: the warnings. result: what --json wrote."""

    code: int
    errors: list[str]
    log: str
    printed: str
    result: dict[str, Any] = field(default_factory=dict)


def write_texts(folder: Path) -> Path:
    """Texts, and the configuration of a tiny model for them, whose path is returned."""
    for name, (n, seed) in {"train-0.txt": (80, 1), "train-1.txt": (60, 2), "test-0.txt": (30, 3)}.items():
        (folder / name).write_bytes(sentence_bytes(n, seed))
    values = {
        "run": {"name": "tiny", "storage_path": str(folder / "runs"), "export": False},
        "data": {"train": str(folder / "train-*"), "streams": 4, "block_bytes": 4096},
        "model": {
            "char_cnn": {"filters": [[1, 4], [2, 4]], "embedding_dim": 4, "max_characters": 16, "n_highway": 1},
            "lstm": {"dim": 8, "projection_dim": 4},
        },
        "softmax": {"negatives": 8},
        "train": {"unroll": 8, "duration": "1 epochs", "checkpoint_every": "10 steps", "log_every": 5},
        "cluster": {"workers": 0},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values), "utf-8")
    return path


class TextFolder:
    """The texts of `write_texts`, and the verbs at work on them."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
        self.folder, self.capsys, self.caplog = folder, capsys, caplog
        self.prepared = folder / "runs" / "prepared"
        write_texts(folder)

    def call(self, verb: ModuleType, *arguments: object) -> Outcome:
        """Runs a verb in this process. An exception that leaves it fails the test: a user would see a traceback."""
        self.capsys.readouterr()
        self.caplog.clear()
        self.caplog.set_level(logging.WARNING, logger="elmo_ray")
        note = self.folder / "result.json"
        note.unlink(missing_ok=True)
        code = verb.main([*map(str, arguments), "--json", str(note)])
        shown = self.capsys.readouterr()
        errors = [line for line in shown.err.splitlines() if line.startswith("error: ")]
        assert "Traceback" not in shown.err and len(errors) == (code != 0)
        warnings = "\n".join(r.getMessage() for r in self.caplog.records if r.levelno >= logging.WARNING)
        return Outcome(code, errors, warnings, shown.out, json.loads(note.read_text("utf-8")) if note.exists() else {})

    def prepare(self, *arguments: object) -> Outcome:
        return self.call(prepare, self.folder / "config.yaml", *arguments)

    def pretrain(self, *arguments: object) -> Outcome:
        return self.call(pretrain, self.folder / "config.yaml", *arguments)

    def evaluate(self, run: Path, glob: str, *arguments: object) -> Outcome:
        storage = f"run.storage_path={self.folder / 'runs'}"
        return self.call(evaluate, run, f"data.test={self.folder / glob}", storage, "cluster.workers=0", *arguments)

    def results(self) -> set[str]:
        """The files below the storage, but for what is known of single texts."""
        files = [path.relative_to(self.folder) for path in (self.folder / "runs").rglob("*") if path.is_file()]
        return {path.as_posix() for path in files if path.parent.name not in ("state", "text")}
