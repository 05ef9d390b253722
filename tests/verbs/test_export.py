"""`export`: what is written, what is compared before it counts, what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.saved_models import random_model, save_checkpoint
from helpers.tiny_runs import WORDS_TIED, tiny_config

from elmo_ray import export
from elmo_ray.checkpoints.bilm_tf.hdf5 import same_weights, write_weights
from elmo_ray.checkpoints.bilm_tf.options import to_options
from elmo_ray.checkpoints.source import open_source
from elmo_ray.config import ExportConfig
from elmo_ray.data.vocabulary import SPECIAL_WORDS, Vocabulary
from elmo_ray.elmo.encoder import embed_sentences
from elmo_ray.errors import ConfigError, DataError, FormatError
from elmo_ray.export import ExportResult, export_model, main, run

WORDS = ["the", *SPECIAL_WORDS, "cat", "", "sees", "Čapek"]
LONG_WORDS = {"model__char_cnn": {"filters": [[1, 6], [3, 6]], "embedding_dim": 4}}
CONFIG = tiny_config(**LONG_WORDS)
FILES = ["options.json", "vocab.txt", "weights.hdf5"]


@pytest.fixture()
def checkpoint(tmp_path: Path) -> Path:
    return save_checkpoint(tmp_path / "checkpoint", CONFIG, WORDS, random_model(CONFIG, len(WORDS)))


def test_the_files_are_the_model(checkpoint: Path, tmp_path: Path) -> None:
    result = export_model(checkpoint, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == FILES
    assert result.difference == 0.0 and result.loads_in == ["bilm-tf", "AllenNLP"]
    model = random_model(CONFIG, len(WORDS))
    back = open_source(tmp_path / "out" / "weights.hdf5")
    assert same_weights(model, back.model) == [] and back.config == CONFIG.model
    assert Vocabulary.read(tmp_path / "out" / "vocab.txt").words == WORDS
    text = ["the cat sees xylophones .".split(), ["the"], []]
    for ours, theirs in zip(embed_sentences(model, text), embed_sentences(back.model, text), strict=True):
        assert np.array_equal(ours, theirs)
    options = json.loads((tmp_path / "out" / "options.json").read_text())
    assert options["char_cnn"]["n_characters"] == 262 and options["n_tokens_vocab"] == len(WORDS)
    assert options["bidirectional"] is True and options["lstm"]["cell_clip"] == 3.0
    assert (options["dropout"], options["unroll_steps"], options["batch_size"]) == (0.1, 6, 4)


def test_it_is_said_what_can_load_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_config(
        **{**LONG_WORDS, "model__lstm": {"dim": 8, "projection_dim": 8, "use_skip_connections": False}}
    )
    save_checkpoint(tmp_path / "c", config, WORDS, random_model(config, len(WORDS)))
    assert main([str(tmp_path / "c"), str(tmp_path / "out"), "--json", str(tmp_path / "r.json")]) == 0
    printed = capsys.readouterr().out
    assert "bilm-tf: can load it" in printed
    assert "AllenNLP: cannot load it: it wants skip connections" in printed and "W_P_0" in printed
    values = json.loads((tmp_path / "r.json").read_text())
    assert values["loads_in"] == ["bilm-tf"] and len(values["obstacles"]["AllenNLP"]) == 2


def test_no_clips_are_written_as_null(tmp_path: Path) -> None:
    lstm = {"dim": 16, "projection_dim": 8, "cell_clip": None, "proj_clip": None}
    config = tiny_config(**{**LONG_WORDS, "model__lstm": lstm})
    save_checkpoint(tmp_path / "c", config, WORDS, random_model(config, len(WORDS)))
    assert export_model(tmp_path / "c", tmp_path / "out").loads_in == ["bilm-tf", "AllenNLP"]
    options = json.loads((tmp_path / "out" / "options.json").read_text())
    assert options["lstm"]["cell_clip"] is None and options["lstm"]["proj_clip"] is None


def test_word_input_and_float64(tmp_path: Path) -> None:
    config = tiny_config(**WORDS_TIED)
    save_checkpoint(tmp_path / "c", config, WORDS, random_model(config, len(WORDS), dtype=torch.float64))
    result = export_model(tmp_path / "c", tmp_path / "out")
    assert result.loads_in == ["bilm-tf"] and result.difference < 1e-6
    assert "char_cnn" not in json.loads((tmp_path / "out" / "options.json").read_text())


def test_published_weights_are_exported_again(checkpoint: Path, tmp_path: Path) -> None:
    export_model(checkpoint, tmp_path / "first")
    export_model(tmp_path / "first" / "weights.hdf5", tmp_path / "second")
    for name in ("weights.hdf5", "vocab.txt"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_what_no_program_can_load_is_refused(tmp_path: Path) -> None:
    config = tiny_config(model__bidirectional=False)
    save_checkpoint(tmp_path / "c", config, WORDS, random_model(config, len(WORDS)))
    with pytest.raises(FormatError, match="not exported, as neither program could load it .*forward only"):
        export_model(tmp_path / "c", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_lstm_that_reads_features_has_no_place_in_their_files(tmp_path: Path) -> None:
    cnn = {"filters": [[1, 4], [2, 9]], "embedding_dim": 4, "max_characters": 16, "projection": False}
    config = tiny_config(model__char_cnn=cnn)
    save_checkpoint(tmp_path / "c", config, WORDS, random_model(config, len(WORDS)))
    with pytest.raises(FormatError, match=r"reads 8 numbers, not all 13 features \(model.char_cnn.projection=false\)"):
        export_model(tmp_path / "c", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_dropout_by_place_is_not_written_as_one_number(tmp_path: Path) -> None:
    config = tiny_config(train__dropout=[0.0, 0.2, 0.1])
    save_checkpoint(tmp_path / "c", config, WORDS, random_model(config, len(WORDS)))
    export_model(tmp_path / "c", tmp_path / "out")
    assert "dropout" not in json.loads((tmp_path / "out" / "options.json").read_text())


def wrong_weights(path: Path, model: Any) -> None:
    write_weights(path, random_model(CONFIG, len(WORDS), seed=2))


def wrong_options(*arguments: Any) -> dict[str, Any]:
    options = to_options(*arguments)
    options["lstm"]["cell_clip"] = 1.0
    return options


@pytest.mark.parametrize(
    ("name", "replacement", "message"),
    [
        ("write_weights", wrong_weights, "char_cnn.embedding.* differ from the model"),
        ("to_options", wrong_options, "describes another model, without model.lstm.cell_clip=.*; not exported"),
    ],
)
def test_a_file_that_reads_back_otherwise_does_not_take_its_name(
    name: str, replacement: Callable[..., Any], message: str, checkpoint: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    export_model(checkpoint, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    monkeypatch.setattr(export, name, replacement)
    with pytest.raises(FormatError, match=message):
        export_model(checkpoint, tmp_path / "out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_folders_with_files_of_others_stay(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "vocab.txt").write_text("<S>\n</S>\n<UNK>\nmine\n")
    for out, message in (
        (tmp_path / "run", "is a run or a checkpoint; name a folder for the export alone, such as .*/run/export"),
        (checkpoint, "is a run or a checkpoint"),
        (tmp_path / "text", "has a vocab.txt of its own, which would be replaced; name a new folder"),
        (tmp_path / "weights.hdf5", "OUT is a folder, into which weights.hdf5 and other files are written; name a fol"),
    ):
        before = sorted(tmp_path.rglob("*"))
        for write in (export_model, export.export_hub_folder):
            if (write, out) != (export.export_hub_folder, checkpoint):  # which is the SOURCE itself
                with pytest.raises(ConfigError, match=message):
                    write(checkpoint, out)
        assert sorted(tmp_path.rglob("*")) == before
    export_model(checkpoint, tmp_path / "run" / "export")
    export_model(checkpoint, tmp_path / "run" / "export")


def test_a_folder_that_cannot_be_written(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match=r"out=.*file.*: cannot be written"):
        export_model(checkpoint, tmp_path / "file")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "out is empty"),
        ({"out": "x", "cluster": {"workers": 2}}, "export is one task"),
        ({"out": "x"}, "init.from"),
    ],
)
def test_mistakes(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(ExportConfig.from_dict(values))


@pytest.mark.ray
@pytest.mark.slow
def test_in_a_cluster_a_task_does_it(ray_session: None, checkpoint: Path, tmp_path: Path) -> None:
    values = {"init": {"from": str(checkpoint)}, "out": str(tmp_path / "out"), "cluster": {"cpus_per_worker": 0.5}}
    result = run(ExportConfig.from_dict(values))
    assert isinstance(result, ExportResult) and result.difference == 0.0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == FILES
    with pytest.raises(ConfigError, match="no such file or folder") as raised:
        run(ExportConfig.from_dict({**values, "init": {"from": str(tmp_path / "nowhere")}}))
    assert type(raised.value) is ConfigError
