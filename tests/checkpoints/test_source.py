"""What a SOURCE may be, which checkpoint of a run it means, and what is said of everything else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.saved_models import random_model, save_checkpoint
from helpers.tiny_runs import tiny_config

from elmo_ray.checkpoints.bilm_tf.hdf5 import same_weights, write_weights
from elmo_ray.checkpoints.bilm_tf.options import to_options
from elmo_ray.checkpoints.manifest import directory_name
from elmo_ray.checkpoints.source import open_source
from elmo_ray.data.vocabulary import SPECIAL_WORDS
from elmo_ray.errors import CheckpointError, ConfigError, ElmoRayError, FormatError

CONFIG = tiny_config(model__bidirectional=True)
WORDS = [*SPECIAL_WORDS, "the", "cat", "sees"]
GOLDEN = Path(__file__).parents[1] / "golden" / "model"


def save(folder: Path, step: int) -> None:
    save_checkpoint(folder, CONFIG, WORDS, random_model(CONFIG, len(WORDS), seed=step), step)


@pytest.fixture()
def run(tmp_path: Path) -> Path:
    """A run with checkpoints of steps 10, 20 and 30, the second of which was the best."""
    for step in (10, 20, 30):
        save(tmp_path / "run" / "checkpoints" / directory_name(step, 1), step)
    save(tmp_path / "run" / "best", 20)
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("checkpoint", "step"), [("best", 20), ("last", 30), (directory_name(10, 1), 10)], ids=["best", "last", "name"]
)
def test_a_run_is_its_best_checkpoint_or_the_one_asked_for(run: Path, checkpoint: str, step: int) -> None:
    source = open_source(run, checkpoint)
    assert source.step == step and source.vocabulary.words == WORDS and source.has_softmax
    assert source.training == CONFIG
    expected = random_model(CONFIG, len(WORDS), seed=step)
    for name, parameter in source.model.named_parameters():
        assert torch.equal(parameter, dict(expected.named_parameters())[name]), name
        assert not parameter.requires_grad


def test_a_run_that_never_validated_is_its_newest_checkpoint(run: Path) -> None:
    shutil.rmtree(run / "best")
    assert open_source(run).step == 30


def test_a_best_that_was_being_replaced_is_found(run: Path) -> None:
    (run / "best").rename(run / "best.previous")
    assert open_source(run).step == 20 and open_source(run / "best").step == 20


def test_a_checkpoint(run: Path) -> None:
    source = open_source(run / "checkpoints" / directory_name(10, 1))
    assert source.step == 10 and source.fingerprint is not None
    assert source.fingerprint != open_source(run).fingerprint


def exported(folder: Path, vocabulary: bool = True) -> Path:
    folder.mkdir()
    model = random_model(CONFIG, len(WORDS))
    write_weights(folder / "weights.hdf5", model)
    (folder / "options.json").write_text(json.dumps(to_options(model.config, CONFIG.softmax, len(WORDS))))
    if vocabulary:
        (folder / "vocab.txt").write_text("".join(word + "\n" for word in WORDS))
    return folder / "weights.hdf5"


def test_published_weights_by_file_or_folder(tmp_path: Path) -> None:
    weights = exported(tmp_path / "export")
    for source in (open_source(weights), open_source(weights.parent)):
        assert source.path == weights and not source.has_softmax and source.step is None
        assert source.vocabulary.words == WORDS
        assert same_weights(source.model, random_model(CONFIG, len(WORDS))) == []


def test_weights_with_options_and_vocabulary_elsewhere(tmp_path: Path) -> None:
    weights = exported(tmp_path / "export", vocabulary=False)
    with pytest.raises(ConfigError, match=r"init.vocab"):
        _ = open_source(weights).vocabulary
    (tmp_path / "words").write_text("".join(word + "\n" for word in WORDS))
    (weights.parent / "options.json").rename(tmp_path / "o.json")
    with pytest.raises(ConfigError, match=r"options.json: no such file.*init.options"):
        open_source(weights)
    source = open_source(weights, options=str(tmp_path / "o.json"), vocab=str(tmp_path / "words"))
    assert source.vocabulary.words == WORDS


def test_the_golden_model_opens() -> None:
    source = open_source(GOLDEN)
    assert source.vocabulary.size == 6024 and source.config.lstm.dim == 64


def tensorflow_folder(run: Path) -> Path:
    folder = run.parent / "tf"
    folder.mkdir()
    for name in ("checkpoint", "model.ckpt-657.index", "model.ckpt-657.data-00000-of-00001", "options.json"):
        (folder / name).write_bytes(b"x")
    return folder


def damaged(run: Path, change: Callable[[Path], Any]) -> Path:
    change(run / "best")
    return run


def rewritten(run: Path, config: Any = CONFIG, words: list[str] = WORDS) -> Path:
    """A checkpoint whose parts verify and do not fit together."""
    return save_checkpoint(run.parent / "other", config, words, random_model(CONFIG, len(WORDS)))


def empty(run: Path) -> Path:
    (run.parent / "empty" / "checkpoints").mkdir(parents=True)
    return run.parent / "empty"


MISTAKES: dict[str, tuple[Callable[[Path], Path], dict[str, Any], type[ElmoRayError], str]] = {
    "nothing there": (lambda run: run / "nowhere", {}, ConfigError, "no such file or folder"),
    "a folder of something else": (lambda run: run.parent, {}, ConfigError, "no run .*, no checkpoint"),
    "TensorFlow": (tensorflow_folder, {}, FormatError, "options.json: is not JSON"),
    "unknown name": (
        lambda run: run,
        {"checkpoint": "step-5"},
        ConfigError,
        r"checkpoint=step-5: must be .*newest: step-",
    ),
    "path as name": (lambda run: run, {"checkpoint": "../best"}, ConfigError, r"checkpoint=\.\./best: must be"),
    "name for a checkpoint": (lambda run: run / "best", {"checkpoint": "last"}, ConfigError, "checkpoint=last chooses"),
    "options for a run": (lambda run: run, {"options": "o.json"}, ConfigError, "init.options=o.json: .*has its own"),
    "vocabulary for a run": (lambda run: run, {"vocab": "v.txt"}, ConfigError, "init.vocab=v.txt: .*has its own"),
    "no checkpoint yet": (empty, {}, CheckpointError, "has no finished checkpoint yet"),
    "damaged": (
        lambda run: damaged(run, lambda best: (best / "model.safetensors").write_bytes(b"x")),
        {},
        CheckpointError,
        "model.safetensors: has 1 bytes",
    ),
    "another vocabulary": (
        lambda run: rewritten(run, words=[*WORDS, "dog"]),
        {},
        CheckpointError,
        r"model.safetensors: softmax_bias has shape \(6,\), config.yaml and vocab.txt ask for \(7,\)",
    ),
    "another model": (
        lambda run: rewritten(run, tiny_config(model__bidirectional=False)),
        {},
        CheckpointError,
        "model.safetensors: lstm.layers.0.bias has shape",
    ),
    "another number of layers": (
        lambda run: rewritten(run, tiny_config(model__lstm={"dim": 16, "projection_dim": 8, "n_layers": 3})),
        {},
        CheckpointError,
        "lstm.layers.2.bias has shape None",
    ),
    "a text file": (lambda run: run / "best" / "vocab.txt", {}, ConfigError, "options.json: no such file"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line(run: Path, name: str) -> None:
    make, arguments, kind, message = MISTAKES[name]
    with pytest.raises(kind, match=message) as raised:
        open_source(make(run), **arguments)
    assert "\n" not in str(raised.value)


def test_weights_and_options_that_do_not_fit(tmp_path: Path) -> None:
    weights = exported(tmp_path / "export")
    options = json.loads((weights.parent / "options.json").read_text())
    options["lstm"]["dim"] = 24
    (weights.parent / "options.json").write_text(json.dumps(options))
    with pytest.raises(FormatError, match=r"W_0 has shape \[16, 64\], the options ask for \[16, 96\]"):
        open_source(weights)


def test_no_source_at_all() -> None:
    with pytest.raises(ConfigError, match=r"init.from is empty"):
        open_source(None)
