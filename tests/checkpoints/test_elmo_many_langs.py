"""Models of ELMoForManyLangs, made and run by its own program, and folders that are none.

`tests/golden/many_langs` has three small models of random values that the program saved, one of them in the form of
PyTorch 0.4, and the vectors that its Embedder gave for `sentences.json`: once carrying its state from sentence to
sentence, once from zero for each.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from elmo_ray import embed, export, kernels
from elmo_ray.checkpoints.elmo_many_langs import PUBLISHED, read_model
from elmo_ray.checkpoints.source import open_source
from elmo_ray.data.vocabulary import SPECIAL_WORDS
from elmo_ray.elmo.encoder import embed_sentences
from elmo_ray.elmo.layer import Elmo, batch_to_ids
from elmo_ray.errors import ConfigError, ElmoRayError, FormatError

GOLDEN = Path(__file__).parents[1] / "golden" / "many_langs"
MODELS = sorted(path.name for path in GOLDEN.iterdir())
SENTENCES: list[list[str]] = json.loads((GOLDEN / "words" / "sentences.json").read_text(encoding="utf-8"))


def golden(name: str, mode: str) -> list[np.ndarray]:
    with np.load(GOLDEN / name / "vectors.npz") as arrays:
        return [arrays[f"{mode}_{number}"] for number in range(len(SENTENCES))]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of a model, to be damaged."""
    return Path(shutil.copytree(GOLDEN / "words", tmp_path / "model"))


@pytest.mark.parametrize("setting", ["auto", "off"])
@pytest.mark.parametrize("mode", ["carry", "reset"])
@pytest.mark.parametrize("name", MODELS)
def test_vectors_are_those_of_the_program(name: str, mode: str, setting: Any) -> None:
    source = open_source(GOLDEN / name)
    with kernels.using(setting):
        found = list(embed_sentences(source.model, SENTENCES, source.words, carry=mode == "carry"))
    for ours, theirs in zip(found, golden(name, mode), strict=True):
        assert ours.shape == theirs.shape and np.abs(ours - theirs).max() < 1e-5


@pytest.mark.parametrize("name", MODELS)
def test_the_layer_reads_words_by_their_bytes(name: str) -> None:
    elmo = Elmo.from_run(GOLDEN / name / "encoder.pkl", stateful=False)
    # <S> and </S> of a text are the sentence's own marks in character ids
    inputs = elmo.encode(SENTENCES[:-1])
    activations = elmo._elmo_lstm(inputs)["activations"]
    for row, (words, theirs) in enumerate(zip(SENTENCES[:-1], golden(name, "reset"), strict=False)):
        ours = np.stack([layer[row, 1 : len(words) + 1].numpy() for layer in activations])
        assert np.abs(ours - theirs).max() < 1e-5
    short = batch_to_ids([["The", "cat"]])
    assert torch.equal(elmo(short)["mask"], torch.ones(1, 2, dtype=torch.bool))
    with pytest.raises(ConfigError, match="may be cut off"):
        elmo(batch_to_ids([["x" * 60]], 20))


def test_it_can_be_trained_with_a_task() -> None:
    elmo = Elmo.from_run(GOLDEN / "words", requires_grad=True, stateful=False)
    elmo(elmo.encode(SENTENCES))["elmo_representations"][0].sum().backward()
    without = [name for name, p in elmo.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not without


def test_embed(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    sentences = [words for words in SENTENCES if all(len(word.split()) == 1 for word in words)]
    text.write_text("".join(" ".join(words) + "\n" for words in sentences), encoding="utf-8")
    values = {"init": {"from": str(GOLDEN / "words")}, "in": str(text), "cluster": {"workers": 0}}
    embed.run(embed.EmbedConfig.from_dict({**values, "out": str(tmp_path / "out")}))
    rows = pq.read_table(tmp_path / "out").to_pylist()
    expected = [found for words, found in zip(SENTENCES, golden("words", "reset"), strict=True) if words in sentences]
    assert len(rows) == len(sentences) == len(SENTENCES) - 1
    for row, theirs in zip(rows, expected, strict=True):
        assert np.abs(np.stack([row[f"layer_{number}"] for number in range(3)]) - theirs).max() < 1e-5


def test_token_vectors(tmp_path: Path) -> None:
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("<S>\n</S>\n潮水\nunseen\n", encoding="utf-8")
    values = {"init": {"from": str(GOLDEN / "chars")}, "out": str(tmp_path / "v.hdf5"), "cluster": {"workers": 0}}
    embed.run(embed.EmbedConfig.from_dict({**values, "embed": {"tokens": str(vocabulary)}}))
    with h5py.File(tmp_path / "v.hdf5") as file:
        vectors = file["embedding"][:]
    assert np.abs(vectors[2] - golden("chars", "reset")[5][0, 0, :6]).max() < 1e-5 and vectors.shape == (4, 6)


def test_an_export_has_the_vectors_of_its_words(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        export.export_model(GOLDEN / "words", tmp_path / "out")
    assert any("any other word is <UNK>" in record.message for record in caplog.records)
    back = open_source(tmp_path / "out")
    # new york has a blank, and <S> is the mark of a sentence
    assert back.vocabulary.words == [*SPECIAL_WORDS, "The", "cat", "sat", ".", "潮水", "x" * 10]
    known = [0, 2, 5]
    ours = list(embed_sentences(back.model, [SENTENCES[k] for k in known], back.vocabulary))
    for found, number in zip(ours, known, strict=True):
        assert np.abs(found - golden("words", "reset")[number]).max() < 1e-5
    export.import_checkpoint(GOLDEN / "words", tmp_path / "checkpoint")
    checkpoint = open_source(tmp_path / "checkpoint")
    assert checkpoint.vocabulary.words == back.vocabulary.words and not checkpoint.has_softmax


class _Runs:
    """An object whose pickle would make a folder when it is read."""

    def __init__(self, place: str):
        self.place = place

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (self.place,)


def _pickled(what: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(what, buffer)
    return buffer.getvalue()


ENCODER: dict[str, torch.Tensor] = torch.load(GOLDEN / "words" / "encoder.pkl", weights_only=True)
BIAS = "forward_layer_0.state_linearity.bias"
HUGE = torch.zeros(1).expand(4000, 40)
CONFIG: dict[str, Any] = json.loads((GOLDEN / "words" / "model.json").read_text())


def _changed(section: str, **values: Any) -> bytes:
    return json.dumps({**CONFIG, section: {**CONFIG[section], **values}}).encode()


BAD: dict[str, tuple[str, bytes | None, str]] = {
    "no encoder": ("encoder.pkl", None, "has no encoder.pkl; a model of ELMoForManyLangs has config.json"),
    "no embedder": ("token_embedder.pkl", None, "has no token_embedder.pkl"),
    "no characters": ("char.dic", None, "has no char.dic"),
    "no words": ("word.dic", None, "has no word.dic, but token_embedder.word_dim=4 in model.json needs it"),
    "no config": ("config.json", None, "has no config.json"),
    "no inner config": (
        "model.json",
        None,
        "config_path is /home/someone/configs/model.json, and model.json is not in",
    ),
    "config is no JSON": ("config.json", b"{", "config.json: is not JSON"),
    "config without a path": ("config.json", b"{}", "config.json: has no config_path"),
    "a path that leads out": ("config.json", b'{"config_path": "../../secret"}', "and secret is not in"),
    "a path that is no file's": ("config.json", b'{"config_path": "a/"}', "config.json: has no config_path"),
    "a path that is too long": ("config.json", b'{"config_path": "%s"}' % (b"long" * 2000), "put it there"),
    "another encoder": ("model.json", _changed("encoder", name="lstm"), "encoder.name is lstm; only models with elmo"),
    "characters by LSTM": ("model.json", _changed("token_embedder", name="lstm"), "token_embedder.name is lstm"),
    "a size that is none": ("model.json", _changed("encoder", dim="10"), "model.json: dim: "),
    "other sizes": ("model.json", _changed("encoder", dim=11), r"encoder.pkl: .* has shape \[40, 6\], the config"),
    "no projection": ("model.json", _changed("encoder", dim=6), "encoder.dim is encoder.projection_dim=6"),
    "words of no size": ("model.json", _changed("token_embedder", word_dim=-1), "token_embedder.word_dim is -1"),
    "a line without a number": (
        "char.dic",
        b"a\t1\nb\tc\n",
        r"char.dic line 2: must be an entry, a tab and its number",
    ),
    "a dictionary of others": ("char.dic", b"a\t1\nb\t2\n", "char.dic: has no <bos>, <eos>, <oov>"),
    "a dictionary of bytes": ("char.dic", b"\xff\xfe\t1\n", "char.dic: is not UTF-8"),
    "a number without a row": ("word.dic", b"<oov>\t0\nmore\t99\n", "has 12 rows, and word.dic has the number 99"),
    "rows without a number": ("word.dic", b"<oov>\t0\nmore\t9\n", "has 12 rows, and the numbers in word.dic end at 9"),
    "an empty pickle": ("encoder.pkl", b"", "encoder.pkl: is no pickle of tensors"),
    "a text": ("encoder.pkl", b"Not a pickle.\n", "encoder.pkl: is no pickle of tensors"),
    "a list": ("encoder.pkl", _pickled([1, 2]), "encoder.pkl: holds list, not tensors by name"),
    "numbers": ("encoder.pkl", _pickled({"a": 1}), "encoder.pkl: holds dict, not tensors by name"),
    "another tool's": ("encoder.pkl", _pickled({"weight": torch.zeros(2)}), "another model's or another program's"),
    "one tensor less": ("encoder.pkl", _pickled({k: x for k, x in ENCODER.items() if k != BIAS}), f"has no {BIAS}"),
    "whole numbers": ("encoder.pkl", _pickled({**ENCODER, BIAS: torch.zeros(40).int()}), "is no dense tensor"),
    "a view that claims more": ("encoder.pkl", _pickled({**ENCODER, BIAS: HUGE}), "is no dense tensor"),
}


@pytest.mark.parametrize(("file", "content", "message"), BAD.values(), ids=BAD)
def test_folders_that_are_no_model(folder: Path, file: str, content: bytes | None, message: str) -> None:
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(content)
    with pytest.raises(FormatError, match=message) as error:
        open_source(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("form", ["pickle", "torch", "torch of 2018", "among tensors"])
def test_a_pickle_that_would_run_code_is_refused(folder: Path, tmp_path: Path, form: str) -> None:
    ran = tmp_path / "ran"
    harm = _Runs(str(ran))
    buffer = io.BytesIO()
    if form == "pickle":
        pickle.dump(harm, buffer)
    elif form == "among tensors":
        torch.save({**ENCODER, BIAS: harm}, buffer)
    else:
        torch.save({"a": harm}, buffer, _use_new_zipfile_serialization=form == "torch")
    (folder / "encoder.pkl").write_bytes(buffer.getvalue())
    with pytest.raises(FormatError, match="encoder.pkl: is no pickle of tensors .*nothing in it was run") as error:
        read_model(folder)
    assert "\n" not in str(error.value) and not ran.exists()
    torch.load(io.BytesIO(buffer.getvalue()), weights_only=False) if form != "pickle" else pickle.loads(
        buffer.getvalue()
    )
    assert ran.exists(), "the file is one that runs code"


def test_dictionaries_and_configurations_with_a_byte_order_mark(folder: Path) -> None:
    for name in ("char.dic", "word.dic", "config.json", "model.json"):
        (folder / name).write_bytes(b"\xef\xbb\xbf" + (folder / name).read_bytes())
    source = open_source(folder)
    for ours, theirs in zip(
        embed_sentences(source.model, SENTENCES, source.words), golden("words", "reset"), strict=True
    ):
        assert np.abs(ours - theirs).max() < 1e-5


def test_an_entry_that_is_the_byte_order_mark(folder: Path) -> None:
    lines = (folder / "char.dic").read_text("utf-8").splitlines()
    first = next(number for number, line in enumerate(lines) if line[0] not in "<")
    entry, number = lines.pop(first).split("\t")
    (folder / "char.dic").write_text("\n".join([f"\ufeff\t{number}", *lines]) + "\n", "utf-8")
    vectors = [
        list(embed_sentences(source.model, [[word]], source.words))[0][0]
        for source, word in [(open_source(GOLDEN / "words"), entry * 3), (open_source(folder), "\ufeff" * 3)]
    ]
    np.testing.assert_array_equal(*vectors)


def test_damaged_pickles_are_one_line(folder: Path) -> None:
    random = np.random.default_rng(1)
    for name in ("encoder.pkl", "token_embedder.pkl"):
        whole = (folder / name).read_bytes()
        for _ in range(60):
            data = bytearray(whole)
            for place in random.integers(0, len(data), 3):
                data[place] = int(random.integers(256))
            (folder / name).write_bytes(bytes(data[: int(random.integers(len(data) // 2, len(data) + 1))]))
            try:
                open_source(folder)
            except ElmoRayError as error:
                assert "\n" not in str(error)
        (folder / name).write_bytes(whole)


def test_the_configuration_of_published_models_may_be_missing(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"config_path": f"/users4/someone/configs/{PUBLISHED}"}))
    with pytest.raises(FormatError, match="token_embedder.pkl: has no convolutions.3.bias"):
        open_source(folder)  # seven filters, and this model has three


def test_settings_that_it_has_itself(folder: Path) -> None:
    given = {"init.options=o.json": {"options": "o.json"}, "is no run": {"checkpoint": "last"}}
    for message, settings in given.items():
        with pytest.raises(ConfigError, match=message):
            open_source(folder, **settings)  # type: ignore[arg-type]


def test_the_command_says_it_in_one_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "encoder.pkl").unlink()
    text = tmp_path / "t.txt"
    text.write_text("a\n")
    arguments = [str(folder), str(text), str(tmp_path / "out"), "cluster.workers=0"]
    assert embed.main(arguments) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "out").exists()
