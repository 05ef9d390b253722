"""What a SOURCE may be, which checkpoint of a run it means, and what is said of everything else."""

from __future__ import annotations

import gzip
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import pytest
import torch
from helpers.saved_models import random_model, save_checkpoint
from helpers.tiny_runs import tiny_config

from elmo_ray import storage
from elmo_ray.checkpoints.bilm_tf.hdf5 import same_weights, write_weights
from elmo_ray.checkpoints.bilm_tf.options import to_options
from elmo_ray.checkpoints.manifest import directory_name
from elmo_ray.checkpoints.source import open_source
from elmo_ray.data.vocabulary import SPECIAL_WORDS
from elmo_ray.errors import CheckpointError, ConfigError, DataError, ElmoRayError, FormatError
from elmo_ray.export import import_checkpoint

CONFIG = tiny_config(model__bidirectional=True)
LSTM = CONFIG.model.lstm.to_dict()
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


def folder_with(run: Path, name: str) -> Path:
    (run.parent / "theirs").mkdir()
    (run.parent / "theirs" / name).write_bytes(b"x")
    return run.parent / "theirs"


def made(run: Path, name: str, content: bytes) -> Path:
    (run.parent / name).write_bytes(content)
    return run.parent / name


MISTAKES: dict[str, tuple[Callable[[Path], Path], dict[str, Any], type[ElmoRayError], str]] = {
    "nothing there": (lambda run: run / "nowhere", {}, ConfigError, "no such file or folder"),
    "a folder of something else": (
        lambda run: folder_with(run, "x"),
        {},
        ConfigError,
        r"no run .*, no checkpoint .*\(\*.index\)$",
    ),
    "a folder of runs": (lambda run: run.parent, {}, ConfigError, "; name one of the runs in it, such as .*/run$"),
    "a folder in a run": (
        lambda run: run / "checkpoints",
        {},
        ConfigError,
        "; it is in a run or a checkpoint: name .*/run, with checkpoint=last or the name of one",
    ),
    "a folder with an archive": (
        lambda run: folder_with(run, "model.tar.gz"),
        {},
        ConfigError,
        "; unpack model.tar.gz first",
    ),
    "a module of TensorFlow Hub": (
        lambda run: folder_with(run, "saved_model.pb"),
        {},
        ConfigError,
        "; it is a SavedModel of TensorFlow",
    ),
    "weights of PyTorch": (lambda run: folder_with(run, "best.th"), {}, ConfigError, "; best.th is a file of PyTorch"),
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
        "model.safetensors: has no lstm.layers.2.bias, which config.yaml and vocab.txt ask for",
    ),
    "a smaller number of layers": (
        lambda run: rewritten(run, tiny_config(model__bidirectional=True, model__lstm={**LSTM, "n_layers": 1})),
        {},
        CheckpointError,
        "model.safetensors: has lstm.layers.1.bias, for which config.yaml and vocab.txt have no place",
    ),
    "a file of a checkpoint": (
        lambda run: run / "best" / "model.safetensors",
        {},
        ConfigError,
        "is a file of a checkpoint; name the checkpoint: .*best",
    ),
    "a text file": (lambda run: made(run, "text.txt", b"the cat\n"), {}, FormatError, "is no HDF5 file"),
    "a zip file": (
        lambda run: made(run, "model.zip", b"PK\x03\x04"),
        {},
        FormatError,
        "is a zip file; unpack it first",
    ),
    "options": (lambda run: made(run, "options.json", b"{}"), {}, ConfigError, "is JSON; name the weights as SOURCE"),
    "shards of TensorFlow without an index": (
        lambda run: made(run, "model.ckpt-3.data-00000-of-00001", b"x"),
        {},
        ConfigError,
        "is a file of a TensorFlow checkpoint whose model.ckpt-3.index is not beside it",
    ),
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
    for nothing in (None, ""):
        with pytest.raises(ConfigError, match=r"init.from is empty"):
            open_source(nothing)
    with pytest.raises(ConfigError, match="https://huggingface.co/a/b: write a model of the Hub as hf://OWNER/NAME"):
        open_source("https://huggingface.co/a/b")


def test_the_files_of_training_are_not_needed(run: Path) -> None:
    best = run / "best"
    there = {path.name for path in best.iterdir()}
    (best / "optimizer.safetensors").write_bytes(b"x")  # damaged
    source = open_source(run)
    assert source.slots is not None
    with pytest.raises(CheckpointError, match="optimizer.safetensors: has 1 bytes"):
        source.slots()
    for name in there - {"manifest.json", "config.yaml", "vocab.txt", "model.safetensors"}:
        (best / name).unlink()
    source = open_source(run)
    assert source.has_softmax and source.vocabulary.words == WORDS and source.slots is None
    with pytest.raises(CheckpointError, match="the file is missing"):
        import_checkpoint(run, run.parent / "copy")
    (best / "vocab.txt").unlink()
    with pytest.raises(CheckpointError, match="vocab.txt: the file is missing"):
        open_source(run)


def test_names_that_others_give_their_files(tmp_path: Path) -> None:
    """The only .hdf5 file and vocab.txt.gz, as simple_elmo has them; X_weights.hdf5 and X_options.json, as AllenNLP."""
    weights = exported(tmp_path / "a")
    (tmp_path / "a" / "vocab.txt.gz").write_bytes(gzip.compress((tmp_path / "a" / "vocab.txt").read_bytes()))
    (tmp_path / "a" / "vocab.txt").unlink()
    weights.rename(tmp_path / "a" / "model.hdf5")
    for source in (open_source(tmp_path / "a"), open_source(tmp_path / "a" / "model.hdf5")):
        assert source.path == tmp_path / "a" / "model.hdf5" and source.vocabulary.words == WORDS
    (tmp_path / "a" / "options.json").rename(tmp_path / "a" / "elmo_small_options.json")
    (tmp_path / "a" / "model.hdf5").rename(tmp_path / "a" / "elmo_small_weights.hdf5")
    assert open_source(tmp_path / "a").vocabulary.words == WORDS
    (tmp_path / "a" / "elmo_big_options.json").write_text("{}")
    assert open_source(tmp_path / "a").config == CONFIG.model, "the options of the same name"
    (tmp_path / "a" / "elmo_small_options.json").rename(tmp_path / "a" / "options_small.json")
    with pytest.raises(ConfigError, match=r"2 files that may be its options \(elmo_big_options.json, options_small"):
        open_source(tmp_path / "a")
    (tmp_path / "a" / "other.hdf5").write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"2 files that may be its weights \(elmo_small_weights.hdf5, other.hdf5"):
        open_source(tmp_path / "a")


@pytest.mark.parametrize("name", ["checkpoint", "model.ckpt-657.index", "model.ckpt-657.data-00000-of-00001"])
def test_a_tensorflow_checkpoint_by_one_of_its_files(run: Path, name: str) -> None:
    folder = tensorflow_folder(run)
    with pytest.raises(FormatError, match="tf/options.json: is not JSON"):
        open_source(folder / name)


def test_a_vocabulary_is_checked_where_it_is_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    weights = exported(tmp_path / "export", vocabulary=False)
    (tmp_path / "words.txt").write_text("<S>\n</S>\nthe\n")
    assert open_source(weights, vocab=str(tmp_path / "words.txt")).vocabulary.size == 3
    (weights.parent / "vocab.txt").write_bytes(b"\xff\xfe")
    source = open_source(weights)
    assert source.words is None
    with pytest.raises(DataError, match="vocab.txt: is UTF-16"):
        _ = source.vocabulary
    with pytest.raises(DataError, match="vocab.txt: is UTF-16"):
        open_source(weights, vocab=str(weights.parent / "vocab.txt"))
    (weights.parent / "vocab.txt").write_text("<S>\n")
    with caplog.at_level("INFO"):
        assert open_source(weights).vocabulary.size == 1
    assert "vocab.txt has 1 words, and n_tokens_vocab in" in caplog.text


def test_an_imported_checkpoint_needs_no_unk(tmp_path: Path) -> None:
    weights = exported(tmp_path / "export", vocabulary=False)
    (weights.parent / "vocab.txt").write_text("the\n")
    import_checkpoint(weights, tmp_path / "imported")
    assert open_source(tmp_path / "imported").vocabulary.words == ["the"]


def test_names_of_others_in_an_object_store(tmp_path: Path) -> None:
    weights = exported(tmp_path / "a")
    for name, source in (
        ("model.hdf5", weights),
        ("elmo_options.json", weights.with_name("options.json")),
        ("vocab.txt.gz", made(tmp_path / "a", "v.gz", gzip.compress(weights.with_name("vocab.txt").read_bytes()))),
    ):
        storage.upload(source, f"memory://models/se/{name}")
    for place in ("memory://models/se", "memory://models/se/model.hdf5"):
        assert open_source(place).vocabulary.words == WORDS
    storage.upload(weights, "memory://models/se/other.hdf5")
    with pytest.raises(ConfigError, match=r"no run, checkpoint, weights.hdf5 or another .hdf5 file alone"):
        open_source("memory://models/se")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_parameters_that_are_not_finite_are_refused(tmp_path: Path, value: float) -> None:
    weights = exported(tmp_path / "export")
    with h5py.File(weights, "r+") as file:
        file["CNN/b_cnn_0"][0] = value
    with pytest.raises(FormatError, match=r"weights.hdf5: char_cnn\.filter_biases\.0 has numbers that are not finite"):
        open_source(weights)
