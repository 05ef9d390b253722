"""Tiny texts, configurations and runs for tests: English-like sentences from a small grammar, seconds of training."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from elmo_ray.checkpoints.read import Checkpoint, open_checkpoint
from elmo_ray.config import PretrainConfig
from elmo_ray.data.corpus import Corpus
from elmo_ray.data.encode import ThreadSource
from elmo_ray.data.scan import index_shard
from elmo_ray.data.vocabulary import SPECIAL_WORDS, Vocabulary
from elmo_ray.training.metrics import read_metrics
from elmo_ray.training.plan import TrainPlan, Worker

NOUNS = "cat dog bird fish horse king queen ship house river garden letter lamp soldier child teacher".split()
VERBS = "sees hears follows finds loses paints carries keeps".split()
ADJECTIVES = "old small green quiet broken golden tall".split()
PLACES = "in the garden|by the river|near the old house|on the ship|behind the lamp".split("|")
NAMES = "Anna Berta Čapek Dora Émile Fritz".split()
RARE = "xylophone quixotic zeppelin antidisestablishmentarianism naïveté".split()
"""Words that the vocabulary of `write_corpus` leaves out."""


def sentences(n: int, seed: int = 0) -> list[str]:
    """Tokenised sentences, some of them long, empty or with unknown words."""
    random = np.random.default_rng(seed)

    def pick(words: list[str]) -> str:
        return words[int(random.integers(len(words)) * random.random())]

    def phrase() -> str:
        adjective = pick(ADJECTIVES) + " " if random.random() < 0.5 else ""
        return f"the {adjective}{pick(NOUNS)}"

    lines = []
    for _ in range(n):
        subject = pick(NAMES) if random.random() < 0.3 else phrase()
        words = f"{subject} {pick(VERBS)} {phrase()}"
        if random.random() < 0.4:
            words += f" {pick(PLACES)}"
        if random.random() < 0.3:
            words += f" , and {phrase()} {pick(VERBS)} {phrase()}"
        if random.random() < 0.05:
            words += f" and the {pick(RARE)}"
        lines.append("" if random.random() < 0.02 else words + " .")
    return lines


def write_corpus(folder: Path, lines_of_shards: list[int], block_bytes: int = 700, seed: int = 0) -> tuple[Path, Path]:
    """Shards, index and vocabulary; returns the paths of the index and of the vocabulary."""
    folder.mkdir(parents=True, exist_ok=True)
    shards = []
    for number, n in enumerate(lines_of_shards):
        path = folder / f"shard-{number}.txt"
        path.write_text("".join(line + "\n" for line in sentences(n, seed + number)), encoding="utf-8")
        shards.append(index_shard(str(path), block_bytes))
    index = folder / "corpus.npz"
    Corpus.from_shards(shards).save(index)
    counted = [*"the . and ,".split(), *NOUNS, *VERBS, *ADJECTIVES, *NAMES, *"in by near on behind".split()]
    vocabulary = folder / "vocab.txt"
    Vocabulary.from_words([*SPECIAL_WORDS, *counted]).write(vocabulary)
    return index, vocabulary


def tiny_values(**changes: Any) -> dict[str, Any]:
    """A configuration's values; `changes` have dotted names with __ for the dots, None removes a value."""
    values: dict[str, Any] = {
        "run": {"seed": 3},
        "data": {"train": "unused.txt", "streams": 4},
        "model": {
            "char_cnn": {"filters": [[1, 4], [2, 4], [3, 8]], "embedding_dim": 4, "max_characters": 16, "n_highway": 1},
            "lstm": {"dim": 16, "projection_dim": 8},
        },
        "softmax": {"negatives": 20},
        "train": {"unroll": 6, "duration": "24 steps", "log_every": 4, "checkpoint_every": "1000 steps", "reset": 0.05},
        "evaluate": {"streams": 3},
        "cluster": {"workers": 0},
    }
    for name, value in changes.items():
        *sections, key = name.split("__")
        place = values
        for section in sections:
            place = place.setdefault(section, {})
        if value is None:
            place.pop(key, None)
        else:
            place[key] = value
    return values


def write_command(folder: Path, lines: int = 400, **changes: Any) -> Path:
    """Write a text and the YAML of a run on it, for a command, into a folder; return the path of the YAML.

    Everything else of the run goes to the folder as well. lines: of the text. changes: as in `tiny_values`.
    """
    (folder / "train.txt").write_text("".join(f"{line}\n" for line in sentences(lines)))
    places = {
        "run__storage_path": str(folder / "runs"),
        "data__train": str(folder / "train.txt"),
        "data__prepared_dir": str(folder / "prepared"),
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tiny_values(**{**places, "run__export": False, **changes})))
    return path


def tiny_config(**changes: Any) -> PretrainConfig:
    return PretrainConfig.from_dict(tiny_values(**changes))


WORDS_UNTIED = {"model__char_cnn": None, "model__input": "words"}
WORDS_TIED = {**WORDS_UNTIED, "softmax__tied": True}


def plan_of(folder: Path, config: PretrainConfig, corpus: tuple[Path, Path], valid: Path | None = None) -> TrainPlan:
    return TrainPlan(config, str(folder), str(corpus[0]), None if valid is None else str(valid), str(corpus[1]))


class Stopper:
    """Asks to stop when it has been looked at so many times (some steps ahead of training)."""

    def __init__(self, looks: int | None):
        self.looks = looks

    def __call__(self) -> bool:
        if self.looks is None:
            return False
        self.looks -= 1
        return self.looks <= 0


def worker_of(
    plan: TrainPlan,
    rank: int = 0,
    world: int = 1,
    stop: Callable[[], bool] | None = None,
    register: Callable[[int, str, dict[str, Any]], None] | None = None,
) -> Worker:
    source = ThreadSource(Vocabulary.read(plan.vocabulary_path), plan.config.model.char_cnn.max_characters)
    return Worker(
        rank,
        world,
        torch.device("cpu"),
        source,
        register or (lambda step, path, metrics: None),
        stop or (lambda: False),
    )


def checkpoints(run: Path) -> list[Path]:
    return sorted(path for path in (run / "checkpoints").iterdir() if (path / "manifest.json").exists())


def newest(run: Path) -> Checkpoint:
    return open_checkpoint(max(checkpoints(run), key=lambda p: (p.name.split("attempt-")[1], p.name)))


def everything(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint: parameters, slots, and what belongs to streams."""
    result = {f"model/{k}": v for k, v in checkpoint.tensors("model.safetensors").items()}
    result.update({f"optimizer/{k}": v for k, v in checkpoint.tensors("optimizer.safetensors").items()})
    result.update({f"streams/{k}": v for k, v in checkpoint.stream_tensors(0, checkpoint.streams).items()})
    return result


def progress_of(checkpoint: Checkpoint) -> dict[str, Any]:
    values = dict(json.loads(checkpoint.text("progress.json")))
    values.pop("seconds")
    return values


TIMES = ("time", "elapsed", "seconds", "positions_per_second", "data_wait", "memory", "tflops", "mfu")


def records(run: Path) -> list[dict[str, Any]]:
    """What a run has recorded of training and validation, without times."""
    return [
        {k: v for k, v in record.items() if k not in TIMES}
        for record in read_metrics(run)
        if record["kind"] in ("train", "valid")
    ]


def with_valid(**changes: Any) -> dict[str, Any]:
    return {"data__valid": "held-out.txt", "train__validate_every": "6 steps", **changes}


def same(a: Checkpoint, b: Checkpoint) -> None:
    """Assert that two checkpoints have the same bits, times apart."""
    ours, theirs = everything(a), everything(b)
    assert sorted(ours) == sorted(theirs)
    different = [name for name, tensor in ours.items() if not torch.equal(tensor, theirs[name])]
    assert not different
    assert progress_of(a) == progress_of(b)
