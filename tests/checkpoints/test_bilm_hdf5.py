"""bilm-tf's HDF5 weights: names and shapes, there and back, strangers' files, and what other programs cannot load."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from helpers.saved_models import random_model

from elmo_ray.checkpoints.bilm_tf.hdf5 import (
    obstacles,
    read_weights,
    read_word_vectors,
    same_weights,
    write_weights,
)
from elmo_ray.checkpoints.bilm_tf.options import from_options, read_options
from elmo_ray.config import PretrainConfig
from elmo_ray.config.model import ModelConfig
from elmo_ray.errors import FormatError
from elmo_ray.model.bilm import BiLM

GOLDEN = Path(__file__).parents[1] / "golden" / "model"
CNN: dict[str, Any] = {"filters": [[1, 4], [3, 8]], "embedding_dim": 5, "n_highway": 2}
LSTM: dict[str, Any] = {"dim": 12, "projection_dim": 6, "n_layers": 2}
MODELS: dict[str, dict[str, Any]] = {
    "characters": {"char_cnn": CNN, "lstm": LSTM},
    "tanh, no skip connections, no clips": {
        "char_cnn": {**CNN, "activation": "tanh", "n_highway": 0},
        "lstm": {**LSTM, "use_skip_connections": False, "cell_clip": None, "proj_clip": None},
    },
    "one layer": {"char_cnn": CNN, "lstm": {**LSTM, "n_layers": 1}},
    "no projections": {"char_cnn": CNN, "lstm": {"dim": 12, "projection_dim": 12, "n_layers": 3}},
    "words": {"input": "words", "lstm": LSTM},
}


def model_of(values: dict[str, Any], tied: bool = False, dtype: torch.dtype = torch.float32) -> BiLM:
    return random_model(PretrainConfig.from_dict({"model": values, "softmax": {"tied": tied}}), 9, 1, dtype)


def contents(path: Path) -> dict[str, tuple[tuple[int, ...], str, int]]:
    found: dict[str, tuple[tuple[int, ...], str, int]] = {}
    with h5py.File(path, "r") as file:
        file.visititems(
            lambda name, item: (
                found.update({name: (item.shape, item.dtype.str, len(item.attrs))})
                if isinstance(item, h5py.Dataset)
                else None
            )
        )
    return found


def test_a_file_of_bilm_tf_is_written_again_as_it_was(tmp_path: Path) -> None:
    config, _ = from_options(read_options(GOLDEN / "options_262.json"), published=True)
    model = read_weights(GOLDEN / "weights.hdf5", config)
    write_weights(tmp_path / "again.hdf5", model)
    assert contents(tmp_path / "again.hdf5") == contents(GOLDEN / "weights.hdf5")
    with h5py.File(tmp_path / "again.hdf5") as ours, h5py.File(GOLDEN / "weights.hdf5") as theirs:
        for name in contents(GOLDEN / "weights.hdf5"):
            assert ours[name][...].tobytes() == theirs[name][...].tobytes(), name


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back(name: str, tmp_path: Path) -> None:
    model = model_of(MODELS[name])
    write_weights(tmp_path / "w.hdf5", model)
    back = read_weights(tmp_path / "w.hdf5", model.config)
    assert same_weights(model, back) == []
    assert back.softmax_bias is None and back.softmax_weight is None
    with torch.no_grad():
        next(p for n, p in back.named_parameters() if n == "lstm.layers.0.bias")[0, 0] += 1e-6
    assert same_weights(model, back) == ["lstm.layers.0.bias"]


def test_names_of_one_layer_are_those_that_other_programs_look_for(tmp_path: Path) -> None:
    write_weights(tmp_path / "w.hdf5", model_of(MODELS["one layer"]))
    found = contents(tmp_path / "w.hdf5")
    cell = "RNN_1/RNN/MultiRNNCell/Cell0/LSTMCell/"
    assert {found[cell + "W_0"][0], found[cell + "B"][0], found[cell + "W_P_0"][0]} == {(12, 48), (48,), (12, 6)}
    assert found["char_embed"] == ((261, 5), "<f4", 0) and found["CNN/W_cnn_1"][0] == (1, 3, 5, 8)
    assert not any("softmax" in key for key in found)


def test_words_have_an_embedding_tied_or_not_and_float64_becomes_float32(tmp_path: Path) -> None:
    for tied in (False, True):
        model = model_of(MODELS["words"], tied, torch.float64)
        write_weights(tmp_path / "w.hdf5", model)
        assert contents(tmp_path / "w.hdf5")["embedding"] == ((9, 6), "<f4", 0)
        assert "char_embed" not in contents(tmp_path / "w.hdf5")
        assert same_weights(model, read_weights(tmp_path / "w.hdf5", model.config)) == []


def test_forward_only_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="forward-only"):
        write_weights(tmp_path / "w.hdf5", model_of({**MODELS["characters"], "bidirectional": False}))
    assert not (tmp_path / "w.hdf5").exists()


CELL = "RNN_0/RNN/MultiRNNCell/Cell0/LSTMCell"


def _replace(file: h5py.File, name: str, **arguments: Any) -> None:
    del file[name]
    file.create_dataset(name, **arguments)


DAMAGES: dict[str, tuple[Any, str]] = {
    "missing": (lambda f: f.__delitem__("char_embed"), "has no char_embed"),
    "group missing": (lambda f: f.__delitem__("RNN_1"), r"has no RNN_1/RNN/MultiRNNCell/Cell0/LSTMCell/W_0"),
    "other shape": (
        lambda f: _replace(f, f"{CELL}/B", data=np.zeros(40, "f4")),
        rf"{CELL}/B has shape \[40\], the options ask for \[48\]",
    ),
    "more than memory": (
        lambda f: _replace(f, f"{CELL}/W_0", shape=(1 << 40, 48), dtype="f4", chunks=(1024, 48)),
        r"W_0 has shape \[1099511627776, 48\], the options ask for \[12, 48\]",
    ),
    "262 rows": (lambda f: _replace(f, "char_embed", data=np.zeros((262, 5), "f4")), r"\[262, 5\].*\[261, 5\]"),
    "integers": (lambda f: _replace(f, f"{CELL}/B", data=np.zeros(48, "i4")), "int32, not floats"),
    "text": (lambda f: _replace(f, f"{CELL}/B", data="text"), r"B has shape \[\]"),
    "a group": (lambda f: (f.__delitem__(f"{CELL}/B"), f.create_group(f"{CELL}/B")), "no array of numbers"),
    "a soft link": (
        lambda f: (f.__delitem__(f"{CELL}/B"), f.__setitem__(f"{CELL}/B", h5py.SoftLink("/char_embed"))),
        "LSTMCell/B is a link",
    ),
    "a link to another file": (
        lambda f: (f.__delitem__("RNN_0"), f.__setitem__("RNN_0", h5py.ExternalLink("other.hdf5", "/RNN_0"))),
        "RNN_0 is a link",
    ),
    "storage in another file": (
        lambda f: _replace(f, f"{CELL}/B", shape=(48,), dtype="f4", external=[("/etc/passwd", 0, 192)]),
        "no array of numbers in this file",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_stranger_s_file_is_an_error_of_one_line(name: str, tmp_path: Path) -> None:
    model = model_of(MODELS["characters"])
    path = tmp_path / "w.hdf5"
    write_weights(path, model)
    damage, message = DAMAGES[name]
    with h5py.File(path, "r+") as file:
        damage(file)
    with pytest.raises(FormatError, match=message) as raised:
        read_weights(path, model.config)
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("kind", ["missing", "empty", "text", "truncated"])
def test_no_hdf5_file(kind: str, tmp_path: Path) -> None:
    model, path = model_of(MODELS["characters"]), tmp_path / "w.hdf5"
    write_weights(tmp_path / "whole.hdf5", model)
    whole = (tmp_path / "whole.hdf5").read_bytes()
    if kind != "missing":
        path.write_bytes({"empty": b"", "text": b"not weights\n" * 100, "truncated": whole[: len(whole) // 2]}[kind])
    with pytest.raises(FormatError, match=re.escape(str(path))) as raised:
        read_weights(path, model.config)
    assert "\n" not in str(raised.value)


def test_bytes_changed_at_random_never_raise_another_error(tmp_path: Path) -> None:
    model, path = model_of(MODELS["one layer"]), tmp_path / "w.hdf5"
    write_weights(path, model)
    whole = bytearray(path.read_bytes())
    random = np.random.default_rng(5)
    refused = 0
    for _ in range(60):
        changed = bytearray(whole)
        for place in random.integers(0, len(whole), 30):
            changed[place] = int(random.integers(256))
        path.write_bytes(changed)
        try:
            read_weights(path, model.config)
        except FormatError:
            refused += 1
    assert refused > 0


def config_of(**values: Any) -> ModelConfig:
    model: dict[str, Any] = {"char_cnn": {"filters": [[1, 8], [2, 8]]}, "lstm": {"dim": 12, "projection_dim": 6}}
    for name, value in values.items():
        section, _, key = name.partition("__")
        if key:
            model.setdefault(section, {})[key] = value
        elif value is None:
            model.pop(name)
        else:
            model[name] = value
    return PretrainConfig.from_dict({"model": model}).model


@pytest.mark.parametrize(
    ("config", "bilm_tf", "allennlp"),
    [
        (config_of(), None, None),
        (config_of(lstm__cell_clip=None, lstm__proj_clip=None), None, None),
        (config_of(char_cnn__n_highway=0, lstm__n_layers=1), None, None),
        (config_of(bidirectional=False), "forward only", "forward only"),
        (config_of(char_cnn=None, input="words"), None, "characters only"),
        (config_of(lstm__use_skip_connections=False), None, "skip connections"),
        (config_of(lstm__projection_dim=12), None, "W_P_0"),
        (config_of(char_cnn__filters=[[1, 6]]), None, "CNN_proj"),
        (config_of(char_cnn__filters=[[1, 5]]), "cannot grow", None),
        (config_of(char_cnn__max_characters=30), None, "50 ids"),
        (config_of(lstm__n_layers=9), "8 layers", None),
    ],
)
def test_what_other_programs_cannot_load(config: ModelConfig, bilm_tf: str | None, allennlp: str | None) -> None:
    for program, expected in (("bilm-tf", bilm_tf), ("AllenNLP", allennlp)):
        reasons = obstacles(config)[program]
        assert len(reasons) == (expected is not None), reasons
        assert expected is None or expected in reasons[0]


@pytest.mark.parametrize(
    ("of", "read_as", "extra"),
    [
        ("characters", {"lstm": {**LSTM, "n_layers": 1}}, "RNN_0/RNN/MultiRNNCell/Cell1/LSTMCell/B"),
        ("characters", {"char_cnn": {**CNN, "n_highway": 1}}, "CNN_high_1/W_carry"),
        ("characters", {"char_cnn": {**CNN, "n_highway": 0}}, "CNN_high_0/W_carry"),
        ("no projections", {"lstm": {"dim": 12, "projection_dim": 12, "n_layers": 2}}, "Cell2/LSTMCell/B"),
    ],
    ids=["layers", "a highway", "highways", "last layer"],
)
def test_a_file_with_more_than_the_options_say_is_another_model_s(
    of: str, read_as: dict[str, Any], extra: str, tmp_path: Path
) -> None:
    write_weights(tmp_path / "w.hdf5", model_of(MODELS[of]))
    other = PretrainConfig.from_dict({"model": {**MODELS[of], **read_as}}).model
    with pytest.raises(FormatError, match=rf"w\.hdf5: has \S*{extra}, for which the options have no place") as raised:
        read_weights(tmp_path / "w.hdf5", other)
    assert "\n" not in str(raised.value)


def test_other_things_in_a_file_are_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = model_of(MODELS["characters"])
    write_weights(tmp_path / "w.hdf5", model)
    with h5py.File(tmp_path / "w.hdf5", "r+") as file:
        file.create_dataset("about/version", data=np.ones(3))
        file["elsewhere"] = h5py.ExternalLink("/etc/passwd", "/x")
    with caplog.at_level("INFO"):
        assert same_weights(model, read_weights(tmp_path / "w.hdf5", model.config)) == []
    assert "has about/version, which is no part of a biLM" in caplog.text
    with h5py.File(tmp_path / "w.hdf5", "r+") as file:
        file["embedding"] = np.zeros((4, 6), np.float32)
    with pytest.raises(FormatError, match="has embedding, for which"):
        read_weights(tmp_path / "w.hdf5", model.config)


def test_deep_groups_and_loops_in_a_file(tmp_path: Path) -> None:
    model = model_of(MODELS["characters"])
    write_weights(tmp_path / "w.hdf5", model)
    with h5py.File(tmp_path / "w.hdf5", "r+") as file:
        loop = file.create_group("loop")
        loop["again"] = loop
        file.create_group("/".join(["deep"] * 50))
    assert same_weights(model, read_weights(tmp_path / "w.hdf5", model.config)) == []


def test_word_vectors_and_weights_are_not_taken_for_each_other(tmp_path: Path) -> None:
    write_weights(tmp_path / "words.hdf5", model_of(MODELS["words"]))
    with pytest.raises(FormatError, match=r"words\.hdf5: has RNN_0/\S+, so it is no file of word vectors"):
        read_word_vectors(tmp_path / "words.hdf5", 6)
    with h5py.File(tmp_path / "v.hdf5", "w") as file:
        file["embedding"] = np.ones((4, 6), np.float32)
    assert read_word_vectors(tmp_path / "v.hdf5", 6).shape == (4, 6)
    for width, message in (
        (7, r"embedding has shape \[4, 6\], the model needs \[words, 7\]"),
        (6, "int32, not floats"),
    ):
        with pytest.raises(FormatError, match=message):
            read_word_vectors(tmp_path / "v.hdf5", width)
        with h5py.File(tmp_path / "v.hdf5", "w") as file:
            file["embedding"] = np.ones((4, 6), np.int32)
    with h5py.File(tmp_path / "none.hdf5", "w") as file:
        pass
    with pytest.raises(FormatError, match=r"none\.hdf5: has no embedding"):
        read_word_vectors(tmp_path / "none.hdf5", 6)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (b"PK\x03\x04", "is a zip file; unpack it first"),
        (b"\x1f\x8b\x08", "is a gz file; unpack it first"),
        (b"BZh91AY&SY", "is a bzip2 file"),
        (bytes(257) + b"ustar", "is a tar archive"),
        (b'{"lstm": {}}', "is JSON and no HDF5 file; are options and weights swapped"),
        (bytes(8) + b'{"x": 1}', "is a safetensors file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:12\n", "is a pointer of Git LFS"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "is a page in HTML or XML, which some serv"),
        (b"", "is empty"),
        (b"the cat\n", "is no HDF5 file"),
    ],
)
def test_other_files_are_named_for_what_they_are(head: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "w.hdf5").write_bytes(head)
    with pytest.raises(FormatError, match=rf"w\.hdf5: {message}"):
        read_weights(tmp_path / "w.hdf5", ModelConfig())
    with pytest.raises(FormatError, match="is a folder and no HDF5 file"):
        read_weights(tmp_path, ModelConfig())
