"""Models on the Hub: what export writes for it, and `hf://` against a stand-in on loopback, with cache and offline."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.hub import SHA, hub_of
from helpers.saved_models import random_model, save_checkpoint
from helpers.tiny_runs import WORDS_TIED, tiny_config

from elmo_ray import Elmo, batch_to_ids, export
from elmo_ray.checkpoints.source import open_source
from elmo_ray.config import PretrainConfig
from elmo_ray.config.yaml_reader import parse_yaml
from elmo_ray.data.vocabulary import SPECIAL_WORDS
from elmo_ray.errors import CheckpointError, ConfigError, DataError, ElmoRayError, FormatError

WORDS = ["the", *SPECIAL_WORDS, "cat", "sees", "Čapek"]
CONFIG = tiny_config(data__train="/home/somebody/secret/train-*.txt")
FILES = ["README.md", "config.json", "model.safetensors", "vocab.txt"]


def saved_run(folder: Path, config: PretrainConfig = CONFIG) -> Path:
    """A run with its best checkpoint and its result, as a training leaves them."""
    save_checkpoint(folder / "best", config, WORDS, random_model(config, len(WORDS)))
    result = {"positions": 1234, "evaluation": {"perplexity": 43.214, "step": 7}}
    (folder / "result.json").write_text(json.dumps(result))
    return folder


@pytest.fixture()
def folder(tmp_path: Path) -> Path:
    export.export_hub_folder(saved_run(tmp_path / "run"), tmp_path / "hub")
    return tmp_path / "hub"


def test_the_folder_is_the_model(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == FILES
    model, back = random_model(CONFIG, len(WORDS)), open_source(folder)
    assert back.config == CONFIG.model and back.softmax == CONFIG.softmax and back.step == 7 and back.has_softmax
    assert back.vocabulary.words == WORDS
    saved = back.model.state_dict()
    assert saved.keys() == model.state_dict().keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in model.state_dict().items())


def test_the_card_says_what_the_records_say(folder: Path) -> None:
    _, metadata, text = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    values = parse_yaml(metadata, "README.md")
    assert values["library_name"] == "elmo-ray" and "elmo" in values["tags"]
    assert values["model-index"][0]["results"][0]["metrics"] == [{"type": "perplexity", "value": 43.21}]
    for fact in (
        "43.21",
        "1,234",
        "train-*.txt",
        "2 layers of 16 cells, projection to 8",
        f"{len(WORDS)} words",
        "elmo_ray.pretrain",
    ):
        assert fact in text, fact
    assert "/home" not in text and "secret" not in text
    settings = parse_yaml(text.split("```yaml\n")[1].split("```")[0], "README.md")
    assert PretrainConfig.from_dict(settings).model == CONFIG.model, "the settings can be trained with"


def test_another_checkpoint_does_not_get_the_perplexity(tmp_path: Path) -> None:
    run = saved_run(tmp_path / "run")
    (run / "result.json").write_text(json.dumps({"evaluation": {"perplexity": 43.2, "step": 99}}))
    export.export_hub_folder(run, tmp_path / "hub")
    assert "perplexity" not in (tmp_path / "hub" / "README.md").read_text(encoding="utf-8").lower()


def test_a_card_that_is_there_is_kept(folder: Path, tmp_path: Path) -> None:
    (folder / "README.md").write_text("mine")
    export.export_hub_folder(tmp_path / "run", folder)
    assert (folder / "README.md").read_text() == "mine" and open_source(folder).step == 7


def test_names_of_texts_do_not_break_the_card(tmp_path: Path) -> None:
    name = 'a|b "c": [d](e)\n```\n---\n.txt'
    run = saved_run(tmp_path / "run", tiny_config(data__train=f"/data/{name}"))
    export.export_hub_folder(run, tmp_path / "hub")
    text = (tmp_path / "hub" / "README.md").read_text(encoding="utf-8")
    assert r'| text | a\|b "c": \[d](e) \`\`\` --- .txt |' in text.splitlines()
    settings = parse_yaml(text.split("````yaml\n")[1].split("\n````\n")[0], "README.md")
    assert settings["data"]["train"] == [name]


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_model_of_another_program_is_not_replaced(tmp_path: Path, name: str) -> None:
    theirs = tmp_path / "bert" / name
    theirs.parent.mkdir()
    theirs.write_text('{"model_type": "bert", "model": {}, "softmax": {}}')
    with pytest.raises(ConfigError, match=f"bert: has {name} of another program"):
        export.export_hub_folder(saved_run(tmp_path / "run"), theirs.parent)
    assert "bert" in theirs.read_text() and os.listdir(theirs.parent) == [name]


@pytest.mark.parametrize("changes", [{}, WORDS_TIED])
def test_the_layer_gives_the_same_vectors(tmp_path: Path, changes: dict[str, object]) -> None:
    config = tiny_config(**changes)
    run = saved_run(tmp_path / "run", config)
    export.export_hub_folder(run, tmp_path / "hub")
    layers = [Elmo.from_run(run, dropout=0.0), Elmo.from_pretrained(tmp_path / "hub", dropout=0.0)]
    sentences = [["the", "cat"], ["Čapek", "sees", "the", "cat"]]
    ours, theirs = (layer(layer.encode(sentences))["elmo_representations"][0] for layer in layers)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("name", "text", "error", "message"),
    [
        ("config.json", "{", FormatError, "config.json: is not readable JSON"),
        ("config.json", '{"model_type": "elmo_ray"}', FormatError, "model must be a mapping"),
        ("config.json", '{"model_type": "bert"}', ConfigError, "no run.*; config.json says that it is a model of bert"),
        ("model.safetensors", None, ConfigError, "it is a model of elmo_ray without model.safetensors"),
        ("model.safetensors", "xx", FormatError, "is not a readable safetensors file"),
        ("vocab.txt", "<S>\n</S>\n<UNK>\na\n", CheckpointError, "ask for"),
        ("vocab.txt", "\n".join([*WORDS[:-1], "another"]) + "\n", FormatError, "vocab.txt: has other words than"),
        ("vocab.txt", None, DataError, "vocab.txt"),
    ],
)
def test_half_a_model_is_refused(
    folder: Path, name: str, text: str | None, error: type[ElmoRayError], message: str
) -> None:
    (folder / name).unlink()
    if text is not None:
        (folder / name).write_text(text)
    with pytest.raises(error, match=message) as caught:
        open_source(folder)
    assert len(str(caught.value).splitlines()) == 1


def test_a_wrong_form_is_one_line() -> None:
    pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    with pytest.raises(ConfigError, match="must be hf://OWNER/NAME"):
        open_source("hf://only-a-name")


def run_export(source: str, out: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """`export` of a process of its own: huggingface_hub reads its environment when it is imported."""
    return subprocess.run(
        [sys.executable, "-m", "elmo_ray.export", source, str(out), "export.format=safetensors"],
        env={**os.environ, **environment}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_the_hub_the_cache_and_offline(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    published = tmp_path / "published"
    export.export_model(tmp_path / "run", published)
    (folder / "other.bin").write_text("a file that no SOURCE has")
    where = {"HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    other, empty = tmp_path / "bert", tmp_path / "empty"
    other.mkdir(), empty.mkdir()
    (other / "config.json").write_text('{"model_type": "bert"}')
    (other / "model.safetensors").write_text("xx")
    (empty / "README.md").write_text("soon")
    folders = {"me/ours": folder, "me/theirs": published, "me/bert": other, "me/empty": empty}
    with hub_of(folders) as (address, sent):
        done = run_export("hf://me/ours", tmp_path / "a", **where, HF_ENDPOINT=address)
        assert done.returncode == 0, done.stderr
        assert sorted(sent) == ["config.json", "model.safetensors", "vocab.txt"]
        assert f"hf://me/ours@{SHA}" in done.stdout
        done = run_export("hf://me/theirs", tmp_path / "b", **where, HF_ENDPOINT=address)
        assert done.returncode == 0, done.stderr
        done = run_export("hf://me/nobody", tmp_path / "c", **where, HF_ENDPOINT=address)
        assert_one_line(done, "hf://me/nobody: ", "has no model of this name")
        done = run_export("hf://me/bert", tmp_path / "c", **where, HF_ENDPOINT=address)
        assert_one_line(done, "error: hf://me/bert: no run", "config.json says that it is a model of bert")
        done = run_export("hf://me/empty", tmp_path / "c", **where, HF_ENDPOINT=address)
        assert_one_line(done, "error: hf://me/empty: has no weights; a model there has one of *.safetensors")
    assert same_files(tmp_path / "a", folder)
    assert not open_source(tmp_path / "b").has_softmax  # a weights.hdf5 has none
    # The Hub is gone: what is in the cache is still used, with and without the offline mode.
    done = run_export("hf://me/ours", tmp_path / "d", **where, HF_ENDPOINT=address, HF_HUB_OFFLINE="1")
    assert done.returncode == 0 and same_files(tmp_path / "d", folder), done.stderr
    done = run_export("hf://me/nobody", tmp_path / "c", **where, HF_ENDPOINT=address, HF_HUB_OFFLINE="1")
    assert_one_line(done, "hf://me/nobody: ", "HF_HUB_OFFLINE is set")
    assert not (tmp_path / "c").exists()


def same_files(one: Path, other: Path) -> bool:
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in FILES[1:])


def assert_one_line(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(errors) == 1 and "Traceback" not in done.stderr, done.stderr
    assert all(part in errors[0] for part in parts), errors


def test_vectors_of_a_batch(folder: Path) -> None:
    output = Elmo.from_pretrained(folder, stateful=False)(batch_to_ids([["the", "cat"]], 16))
    assert output["elmo_representations"][0].shape == (1, 2, 16)
