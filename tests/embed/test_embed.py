"""`embed`: golden vectors through the verb, every form of input and output, going on after a stop, users' mistakes."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers.saved_models import WORDS, random_model, save_checkpoint
from helpers.tiny_runs import WORDS_UNTIED, sentences, tiny_config

from elmo_ray import embed, evaluate, kernels
from elmo_ray.config import EvaluateConfig
from elmo_ray.data.vocabulary import Vocabulary
from elmo_ray.elmo.bilm import ElmoCharacterEncoder
from elmo_ray.elmo.encoder import embed_sentences
from elmo_ray.elmo.language_model import LanguageModel
from elmo_ray.elmo.layer import Elmo, batch_to_ids
from elmo_ray.embed import EmbedPlan, EmbedResult, main
from elmo_ray.embed.config import EmbedConfig
from elmo_ray.errors import ConfigError
from elmo_ray.model.bilm import BiLM

GOLDEN = Path(__file__).parents[1] / "golden"
WEIGHTS = GOLDEN / "model" / "weights.hdf5"
TEXT = GOLDEN / "own_text" / "text.txt"


def here(source: Path, texts: Any, out: Path, **settings: Any) -> EmbedResult:
    """Runs the verb in this process; settings are dotted, flags by their names."""
    result = run(source, texts, out, **settings)
    assert isinstance(result, EmbedResult)
    return result


def run(source: Path, texts: Any, out: Path, **settings: Any) -> Any:
    flags = embed.Flags(**{name: settings.pop(name) for name in ("resume", "fresh", "dry_run") if name in settings})
    values: dict[str, Any] = {"init": {"from": str(source)}, "in": texts, "out": str(out), "cluster": {"workers": 0}}
    for name, value in settings.items():
        section, key = name.split("__")
        values.setdefault(section, {})[key] = value
    return embed.run(EmbedConfig.from_dict(values), flags)


def lines_of(path: Path) -> list[list[str]]:
    return [line.split() for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def vectors_of(table: pa.Table, name: str = "vector") -> list[np.ndarray]:
    return [np.array(value, np.float32).reshape(len(value), -1) for value in table.column(name).to_pylist()]


@pytest.mark.parametrize("state", ["carry", "reset"])
def test_hdf5_has_the_golden_values(tmp_path: Path, state: str) -> None:
    result = here(WEIGHTS, str(TEXT), tmp_path / "out.hdf5", embed__state=state, data__block_bytes=1024)
    assert (result.values["units"] > 1) == (state == "reset") and os.listdir(tmp_path) == ["out.hdf5"]
    with h5py.File(tmp_path / "out.hdf5") as file, np.load(GOLDEN / "own_text" / f"embeddings_{state}.npz") as golden:
        assert len(file) == int(golden["n"]) == result.values["sentences"]
        for key in file:
            assert file[key].dtype == np.float32 and file[key].shape == golden[key].shape
            np.testing.assert_allclose(file[key][...], golden[key], rtol=0, atol=1e-5)


@pytest.mark.parametrize("choice", ["all", "top", "average", [0.5, -1, 2]])
@pytest.mark.parametrize("output", ["vectors", "means"])
def test_layers_and_means(tmp_path: Path, choice: Any, output: str) -> None:
    settings = {"embed__layers": choice, "embed__output": output, "embed__dtype": "float16"}
    here(WEIGHTS, str(TEXT), tmp_path / "out", embed__batch_positions=60, **settings)
    table = pq.read_table(tmp_path / "out")
    with np.load(GOLDEN / "own_text" / "embeddings_reset.npz") as golden:
        expected = [golden[str(number)] for number in range(int(golden["n"]))]
    weights = (
        {"all": None, "top": [0, 0, 1], "average": [1 / 3] * 3}.get(choice, choice)
        if isinstance(choice, str)
        else choice
    )
    names = ["layer_0", "layer_1", "layer_2"] if weights is None else ["vector"]
    assert table.column_names == ["sentence", "words", *names] and "halffloat" in str(table.schema.field(names[0]).type)
    assert table.column("sentence").to_pylist() == list(range(len(expected)))
    assert table.column("words").to_pylist() == lines_of(TEXT)
    for layer, name in enumerate(names):
        for ours, theirs in zip(table.column(name).to_pylist(), expected, strict=True):
            wanted = theirs[layer] if weights is None else np.tensordot(weights, theirs, 1)
            if output == "means":
                wanted = wanted.mean(axis=0) if len(wanted) else np.zeros(32)
            np.testing.assert_allclose(np.array(ours, np.float32).reshape(wanted.shape), wanted, rtol=2e-3, atol=4e-3)


def test_every_form_of_text_in_order(tmp_path: Path, checkpoint: Path, model: BiLM) -> None:
    """Text with all line ends, .gz, JSONL of text and of words, Parquet in row groups: the same vectors."""
    lines = sentences(40, seed=3)
    (tmp_path / "a.txt").write_bytes("\r\n".join(lines[:20]).encode() + b"\r")
    with gzip.open(tmp_path / "b.txt.gz", "wb") as file:
        file.write("\n".join(lines[20:]).encode())
    expected = list(embed_sentences(model, [line.split() for line in lines]))
    settings: dict[str, Any] = {"data__block_bytes": 1024, "embed__layers": "top"}
    result = here(checkpoint, [str(tmp_path / "*.txt"), str(tmp_path / "*.gz")], tmp_path / "text", **settings)
    assert result.values["sentences"] == 40 and result.values["units"] == 2
    rows: list[Any] = [*lines[:20], *(line.split() for line in lines[20:])]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps({"id": 1, "body": row}) + "\n" for row in rows))
    here(checkpoint, str(tmp_path / "c.jsonl"), tmp_path / "json", embed__column="body", **settings)
    pq.write_table(pa.table({"body": [line.split() for line in lines]}), tmp_path / "d.parquet", row_group_size=15)
    assert (
        here(checkpoint, str(tmp_path / "d.parquet"), tmp_path / "lists", data__column="body", **settings).values[
            "units"
        ]
        == 2
    )
    for name in ("text", "json", "lists"):
        table = pq.read_table(tmp_path / name)
        assert table.column("sentence").to_pylist() == list(range(40))
        for ours, theirs in zip(vectors_of(table), expected, strict=True):
            np.testing.assert_allclose(ours.reshape(theirs[-1].shape), theirs[-1], rtol=0, atol=1e-5)
    assert sorted(path.name for path in (tmp_path / "text").iterdir())[0] == "_embed.json"
    assert not list((tmp_path / "text").glob(".*"))


def test_substitutes_and_surprisal_from_their_definitions(tmp_path: Path, checkpoint: Path, model: BiLM) -> None:
    lines = [*(line.split() for line in sentences(12, seed=5)), [], ["zeppelin"]]
    (tmp_path / "text.txt").write_text("".join(" ".join(line) + "\n" for line in lines), encoding="utf-8")
    here(checkpoint, str(tmp_path / "text.txt"), tmp_path / "words", embed__output="substitutes", embed__k=4)
    here(
        checkpoint, str(tmp_path / "text.txt"), tmp_path / "nats", embed__output="surprisal", embed__batch_positions=30
    )
    words, nats = (pq.read_table(tmp_path / name).to_pylist() for name in ("words", "nats"))
    spoken = LanguageModel.from_run(checkpoint)
    vocabulary = Vocabulary.from_words(WORDS)
    weight, bias = model.softmax_weight, model.softmax_bias
    assert weight is not None and bias is not None
    for number, line in enumerate(lines):
        # each direction alone, from what it has seen: the word's own vector has no part in it
        log_p: dict[str, list[np.ndarray]] = {"forward": [], "backward": [], "product": []}
        for place in range(len(line)):
            seen = {
                "forward": reading(model, ["<S>", *line[:place]], 0),
                "backward": reading(model, ["</S>", *line[:place:-1]], 1),
            }
            for name, top in seen.items():
                log_p[name].append(torch.log_softmax(weight @ top + bias, 0).numpy())
            product = log_p["forward"][-1] + log_p["backward"][-1]
            log_p["product"].append(product - np.logaddexp.reduce(product))
        targets = [vocabulary.ids.get(word, vocabulary.unk) for word in line]
        for name in ("forward", "backward", "product"):
            for place, target in enumerate(targets):
                order = [i for i in np.argsort(-log_p[name][place]) if i not in (0, 1, 2)][:4]
                assert words[number][name][place] == [WORDS[i] for i in order]
                np.testing.assert_allclose(words[number][f"{name}_log_p"][place], log_p[name][place][order], atol=1e-4)
                if name != "product":
                    assert nats[number][name][place] == pytest.approx(-log_p[name][place][target], abs=1e-4)
        assert nats[number]["both"] == pytest.approx(
            [(f + b) / 2 for f, b in zip(nats[number]["forward"], nats[number]["backward"], strict=True)], abs=1e-5
        )
        assert nats[number]["unknown"] == [word not in vocabulary.ids for word in line]
        (surprisal,) = spoken.surprisal([line])
        np.testing.assert_allclose(surprisal.nats["forward"], np.array(nats[number]["forward"], np.float32), atol=1e-5)
        (found,) = spoken.substitutes([line], k=4)
        assert found.words("product") == found.words() == words[number]["product"]


@pytest.mark.parametrize("name", ["characters", "forward only", "words"])
def test_the_surprisal_of_sentences_is_what_evaluate_measures(name: str, tmp_path: Path, checkpoint: Path) -> None:
    """A text, its sentences alone, one without words and one with unknown words: exp(sum / (n + 1)) is perplexity."""
    changes = {"forward only": {"model__bidirectional": False}, "words": WORDS_UNTIED}.get(name, {})
    if changes:
        config = tiny_config(**changes)
        checkpoint = save_checkpoint(tmp_path / "other", config, WORDS, random_model(config, len(WORDS)))
    lines = [*(line.split() for line in sentences(12, seed=5)), [], ["zeppelin", "<UNK>", "the"]]
    texts = {f"{number}.txt": [line] for number, line in enumerate(lines[10:])} | {"all.txt": lines}
    spoken = LanguageModel.from_run(checkpoint)
    for file, some in texts.items():
        path = tmp_path / file
        path.write_text("".join(" ".join(line) + "\n" for line in some), encoding="utf-8")
        measured = evaluate.run(
            EvaluateConfig.from_dict({
                "run": {"storage_path": str(tmp_path / "runs")}, "init": {"from": str(checkpoint)},
                "data": {"test": [str(path)]}, "cluster": {"workers": 0}, "evaluate": {"reset": "sentence"},
            })
        ).to_dict()  # fmt: skip
        out = tmp_path / f"{file}-nats"
        here(checkpoint, str(path), out, embed__output="surprisal", embed__batch_positions=30)
        table = pq.read_table(out)
        positions = sum(len(line) + 1 for line in some)
        log_p = spoken.log_probability(some)
        directions = ["forward"] if name == "forward only" else ["forward", "backward", "both"]
        assert list(log_p) == directions and measured["positions"] == positions
        assert table.column_names == ["sentence", "words", *(f"{d}{end}" for end in ("", "_end", "_sum")
                                                             for d in directions), "unknown"]  # fmt: skip
        for direction in directions:
            expected = measured["perplexity" if direction == "both" else f"perplexity_{direction}"]
            sums = np.array(table.column(f"{direction}_sum"))
            assert np.exp(sums.sum() / positions) == pytest.approx(expected, rel=1e-6)
            np.testing.assert_allclose(-log_p[direction], sums, rtol=1e-6)
            ends, nats = table.column(f"{direction}_end").to_pylist(), table.column(direction).to_pylist()
            np.testing.assert_allclose([sum(each) + end for each, end in zip(nats, ends, strict=True)], sums, rtol=1e-6)
        unknown = [[word not in WORDS or word == "<UNK>" for word in line] for line in some]
        assert table.column("unknown").to_pylist() == unknown
        assert measured["unknown_words"] == sum(map(sum, unknown))
    empty = spoken.log_probability([])
    assert all(len(values) == 0 for values in empty.values())


def test_ranking_is_by_the_probability_of_the_whole_sentence(checkpoint: Path, model: BiLM) -> None:
    """The probabilities of all sentences of one word, with their ends, and of none sum to less than 1."""
    spoken = LanguageModel.from_run(checkpoint)
    words = [word for word in WORDS if word not in ("<S>", "</S>")]
    found = spoken.log_probability([[], *([word] for word in words)])
    for name in ("forward", "backward"):
        assert 0 < np.exp(found[name]).sum() < 1
    np.testing.assert_allclose(found["both"], (found["forward"] + found["backward"]) / 2, rtol=1e-14)


def test_a_surprisal_job_of_an_older_version_begins_anew(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text("the dog\n")
    out = tmp_path / "nats"
    here(checkpoint, str(tmp_path / "text.txt"), out, embed__output="surprisal")
    record = json.loads((out / "_embed.json").read_text())
    del record["settings"]["columns"]
    (out / "_embed.json").write_text(json.dumps(record))
    arguments = [str(checkpoint), str(tmp_path / "text.txt"), str(out), "embed.output=surprisal", "cluster.workers=0"]
    assert embed.main([*arguments, "--resume"]) == 2
    assert "columns was None" in capsys.readouterr().err


def reading(model: BiLM, words: list[str], direction: int) -> torch.Tensor:
    """[P] the top layer of one direction after words in its own order."""
    from elmo_ray.data.word_types import encode_with_markers

    vectors = model.encode_types(torch.from_numpy(encode_with_markers(words, model.config.char_cnn.max_characters)))
    outputs, _ = model.lstm(vectors[None, :, None].expand(2, -1, -1, -1), model.lstm.zero_state(1, like=vectors))
    return outputs[-1][direction, -1, 0]


def test_token_vectors(tmp_path: Path) -> None:
    vocab = GOLDEN / "model" / "vocab.txt"
    assert main([str(WEIGHTS), str(tmp_path / "v.hdf5"), f"embed.tokens={vocab}", "cluster.workers=0"]) == 0
    vocabulary = Vocabulary.read(vocab)
    expected = ElmoCharacterEncoder(GOLDEN / "model" / "options_262.json", WEIGHTS)(
        batch_to_ids([[w] for w in vocabulary.words[:50]])
    )
    with h5py.File(tmp_path / "v.hdf5") as file:
        assert file["embedding"].shape == (vocabulary.size, 16) and file["embedding"].dtype == np.float32
        np.testing.assert_allclose(file["embedding"][:50], expected["token_embedding"][:, 1], rtol=0, atol=1e-5)
    files = GOLDEN / "model" / "options_262.json", WEIGHTS, tmp_path / "v.hdf5", vocab
    assert Elmo.from_token_vectors(*files).get_output_dim() == 32
    own = tmp_path / "own.txt"
    own.write_text("<S>\n</S>\n" + "".join(f"{word}\n" for word in vocabulary.words[3:20]), encoding="utf-8")
    assert main([str(WEIGHTS), str(tmp_path / "own.hdf5"), f"embed.tokens={own}", "cluster.workers=0"]) == 0
    with h5py.File(tmp_path / "own.hdf5") as few, h5py.File(tmp_path / "v.hdf5") as file:
        np.testing.assert_allclose(few["embedding"][2:], file["embedding"][3:20], rtol=0, atol=1e-5)
    assert main([str(WEIGHTS), str(tmp_path / "v.hdf5"), f"embed.tokens={vocab}", "cluster.workers=0"]) == 2


def test_a_job_goes_on_where_it_was(tmp_path: Path, checkpoint: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(sentences(150, seed=7)) + "\n", encoding="utf-8")
    settings = {"data__block_bytes": 1024, "embed__dtype": "float16"}
    for out in (tmp_path / "whole", tmp_path / "stopped"):
        here(checkpoint, str(text), out, **settings)
    stopped = sorted((tmp_path / "stopped").glob("part-*"))
    assert len(stopped) > 4
    stopped[1].unlink()
    stopped[3].write_bytes(stopped[3].read_bytes()[:-9])
    (tmp_path / "stopped" / ".part-000001.parquet.9-abc").write_bytes(b"half")
    before = {path: path.stat().st_mtime_ns for path in stopped if path.exists()}
    plan = run(checkpoint, str(text), tmp_path / "stopped", resume=True, dry_run=True, **settings)
    assert isinstance(plan, EmbedPlan) and plan.finished == len(stopped) - 2
    result = here(checkpoint, str(text), tmp_path / "stopped", resume=True, **settings)
    assert result.values["units_done_before"] == len(stopped) - 2
    for path in stopped:
        assert path.read_bytes() == (tmp_path / "whole" / path.name).read_bytes()
        assert (path.stat().st_mtime_ns == before.get(path)) == (path not in (stopped[1], stopped[3]))
    assert here(checkpoint, str(text), tmp_path / "stopped", resume=True, **settings).values["words"] == 0
    assert sorted(os.listdir(tmp_path / "stopped")) == sorted(os.listdir(tmp_path / "whole"))


@pytest.mark.slow
def test_killed_and_resumed(tmp_path: Path, checkpoint: Path) -> None:
    """kill -9 of the command while it writes; HDF5, which is joined from its parts at the end."""
    text = tmp_path / "text.txt"
    text.write_text("\n".join(sentences(1200, seed=8)) + "\n", encoding="utf-8")
    arguments = [str(checkpoint), str(text), "data.block_bytes=1024", "cluster.workers=0"]
    command = [sys.executable, "-m", "elmo_ray.embed", *arguments, str(tmp_path / "out.hdf5")]
    parts = tmp_path / "out.hdf5.parts"
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as job:
        deadline = time.monotonic() + 60
        while len(list(parts.glob("part-*"))) < 3 and job.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(job.pid, signal.SIGKILL)
    assert not (tmp_path / "out.hdf5").exists()
    done = len(list(parts.glob("part-*")))
    assert main([*arguments, str(tmp_path / "out.hdf5")]) == 2
    result = here(checkpoint, str(text), tmp_path / "out.hdf5", resume=True, data__block_bytes=1024)
    assert 3 <= done <= result.values["units_done_before"] < result.values["units"]
    here(checkpoint, str(text), tmp_path / "unbroken.hdf5", data__block_bytes=1024)
    with h5py.File(tmp_path / "out.hdf5") as ours, h5py.File(tmp_path / "unbroken.hdf5") as unbroken:
        assert set(ours) == set(unbroken) == set(map(str, range(1200)))
        assert all(np.array_equal(ours[key], unbroken[key]) for key in ours)
    assert not parts.exists()


def test_mistakes_are_one_line(tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text("the dog .\n", encoding="utf-8")
    (tmp_path / "bad.jsonl").write_text('{"body": "a"}\n{"body": 3}\n', encoding="utf-8")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    here(checkpoint, str(text), out)

    def refused(*arguments: object) -> str:
        assert main([*map(str, arguments), "cluster.workers=0"]) == 2
        (line,) = capsys.readouterr().err.strip().split("\n")[-1:]
        assert line.startswith("error: ")
        return line

    assert "--resume goes on" in refused(checkpoint, text, out)
    assert "layers was all and is top" in refused(checkpoint, text, out, "--resume", "embed.layers=top")
    assert "another one" in refused(WEIGHTS, text, out, "--resume")
    text.write_text("the cat .\n", encoding="utf-8")
    assert "text has changed" in refused(checkpoint, text, out, "--resume")
    assert "not written by embed" in refused(checkpoint, text, tmp_path / "mine", "--fresh")
    new = tmp_path / "new"
    assert "line 1: has no column text (data.column=text); it has body" in refused(
        checkpoint, tmp_path / "bad.jsonl", new
    )
    assert "no columns" in refused(checkpoint, text, new, "data.column=a")
    assert "bad.jsonl, line 2: data.column=body is 3" in refused(
        checkpoint, tmp_path / "bad.jsonl", new, "embed.column=body", "--fresh"
    )
    assert "latin.txt, line 1" in refused(checkpoint, tmp_path / "latin.txt", new, "--fresh")
    assert "holds no softmax" in refused(WEIGHTS, text, tmp_path / "newer", "embed.output=surprisal")
    assert "has 3 layers" in refused(checkpoint, text, tmp_path / "newer", "embed.layers=[1]")
    assert "Parquet" in refused(checkpoint, text, tmp_path / "a.h5", "embed.output=surprisal")
    assert "writes no vectors" in refused(
        checkpoint, text, tmp_path / "newer", "embed.output=surprisal", "embed.layers=top"
    )
    for name in ("a.npz", "a.csv", "A.JSONL"):
        assert "files are not written; OUT is a file that ends in .hdf5, or" in refused(
            checkpoint, text, tmp_path / name
        )
    assert "Parquet" in refused(checkpoint, text, tmp_path / "a.HDF5", "embed.output=surprisal")
    assert "OUT is missing" in refused(checkpoint)
    assert "no file matches" in refused(checkpoint, tmp_path / "none*", tmp_path / "newer")
    assert not (tmp_path / "newer").exists() or not list((tmp_path / "newer").glob("part*"))
    assert (tmp_path / "mine" / "letter.txt").exists()


@pytest.mark.ray
@pytest.mark.slow
def test_two_actors_make_what_one_process_makes(tmp_path: Path, checkpoint: Path, ray_session: None) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(sentences(200, seed=9)) + "\n", encoding="utf-8")
    arguments = [str(checkpoint), str(text), "data.block_bytes=1024", "cluster.threads=1"]
    assert main([*arguments, str(tmp_path / "pool"), "cluster.workers=2", "--json", str(tmp_path / "result.json")]) == 0
    assert main([*arguments, str(tmp_path / "alone"), "cluster.workers=0"]) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    parts = sorted(path.name for path in (tmp_path / "alone").glob("part-*"))
    assert len(parts) == result["units"] > 4 and result["sentences"] == 200
    for name in parts:
        assert (tmp_path / "pool" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
    # a mistake that an actor meets, and one that the cluster cannot hold
    text.write_bytes(b"the dog .\ncaf\xe9\n")
    assert main([*arguments, str(tmp_path / "bad"), "cluster.workers=1"]) == 2
    assert main([*arguments, str(tmp_path / "many"), "cluster.workers=2", "cluster.cpus_per_worker=300"]) == 2


def test_layers_of_unequal_sizes(tmp_path: Path) -> None:
    cnn = {"filters": [[1, 4], [2, 9]], "embedding_dim": 4, "max_characters": 16, "projection": False}
    config = tiny_config(model__char_cnn=cnn)
    wide = random_model(config, len(WORDS))
    source = save_checkpoint(tmp_path / "checkpoint", config, WORDS, wide)
    text = tmp_path / "text.txt"
    text.write_text("the old dog sees\n\nthe xylophone\n", encoding="utf-8")
    for layers in ("all", "average", [0.5, 0.25, 0.25]):
        with pytest.raises(ConfigError, match="word vectors of size 13 and layers of size 8; set embed.layers=top"):
            here(source, str(text), tmp_path / "refused", embed__layers=layers)
    with pytest.raises(ConfigError, match="Elmo mixes layers of one size, but"):
        Elmo.from_run(source)
    here(source, str(text), tmp_path / "top", embed__layers="top")
    here(source, str(text), tmp_path / "mixed", embed__layers=[0, 0, 1])
    (top, mixed) = (pq.read_table(tmp_path / name)["vector"].to_pylist() for name in ("top", "mixed"))
    assert [len(rows) for rows in top] == [4, 0, 2] and len(top[0][0]) == 16
    assert np.allclose(top[0], mixed[0], atol=1e-7)
    with kernels.using("off"):
        here(source, str(text), tmp_path / "plain", embed__layers="top")
    assert np.allclose(pq.read_table(tmp_path / "plain")["vector"].to_pylist()[0], top[0], atol=1e-5)
