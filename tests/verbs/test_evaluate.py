"""`evaluate` against a reckoning of its own, word by word; what the result does not depend on; what users do wrong."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers import naive_bilm
from helpers.saved_models import random_model, save_checkpoint
from helpers.tiny_runs import NAMES, NOUNS, VERBS, WORDS_TIED, sentences, tiny_config

from elmo_ray.checkpoints.bilm_tf.hdf5 import write_weights
from elmo_ray.checkpoints.bilm_tf.options import to_options
from elmo_ray.checkpoints.source import open_source
from elmo_ray.config import EvalConfig, EvaluateConfig, PretrainConfig, TextConfig
from elmo_ray.data import units
from elmo_ray.data.characters import encode_words
from elmo_ray.data.corpus import Corpus
from elmo_ray.data.scan import index_shard
from elmo_ray.data.vocabulary import SPECIAL_WORDS, Vocabulary
from elmo_ray.elmo.evaluation import EvaluationJob
from elmo_ray.errors import ConfigError
from elmo_ray.evaluate import EvaluateResult, all_measures, main, run
from elmo_ray.model.bilm import BiLM

# some of the texts' words only, among them one that ends a sentence and a literal marker
WORDS = [*SPECIAL_WORDS, "the", ".", *NOUNS, *VERBS[:6], *NAMES, "old", "in", "garden"]
NUMBERS = ("perplexity_forward", "perplexity_backward", "perplexity", "perplexity_mean", "nats_per_word",
           "nats_per_word_forward", "nats_per_word_backward", "bits_per_character", "bits_per_character_forward",
           "bits_per_character_backward", "oov_rate")  # fmt: skip
COUNTS = ("positions", "words", "unknown_words", "characters")


@pytest.fixture()
def texts(tmp_path: Path) -> list[Path]:
    """Three shards; the second is empty, the third ends without a line end and holds literal special words."""
    lines = [
        sentences(14, seed=1),
        [],
        ["the </S> sees the <UNK> .", "", *sentences(6, seed=2), "Čapek sees the dog ."],
    ]
    paths = []
    for number, each in enumerate(lines):
        path = tmp_path / f"text-{number}.txt"
        path.write_text("\n".join(each) + ("\n" if number == 0 else ""), encoding="utf-8")
        paths.append(path)
    return paths


@pytest.fixture()
def long_texts(tmp_path: Path) -> list[Path]:
    """Two shards of some 1,200 positions, enough for 5 streams of 200 positions."""
    paths = [tmp_path / "long-0.txt", tmp_path / "long-1.txt"]
    for number, path in enumerate(paths):
        path.write_text("".join(line + "\n" for line in sentences(50, seed=number)), encoding="utf-8")
    return paths


def lines_of(path: Path) -> list[list[str]]:
    lines = path.read_text(encoding="utf-8").split("\n")
    return [line.split() for line in (lines if lines[-1] else lines[:-1])]


class Reckoning:
    """The measures from their definitions: Python loops over words, the naive model, float64."""

    def __init__(self, model: BiLM, words: Sequence[str], paths: Sequence[Path], streams: int | None):
        self.model, self.ids = model, {word: i for i, word in enumerate(words)}
        self.parameters = {name: p.double() for name, p in model.named_parameters()}
        self.vectors: dict[str, torch.Tensor] = {}
        self.shards = len(paths)
        self.paths = paths
        # of every position: shard, whether its sentence has an unknown word, [inputs, targets] of each direction
        self.line: list[tuple[int, bool, list[tuple[str, int]]]] = []
        starts = []
        for shard, path in enumerate(paths):
            for sentence in lines_of(path):
                starts.append(len(self.line))
                strange = any(self.target(word) == self.ids["<UNK>"] for word in sentence)
                forward = zip(["<S>", *sentence], [*sentence, "</S>"], strict=True)
                backward = zip(["</S>", *sentence[::-1]], [*sentence[::-1], "<S>"], strict=True)
                for (a, b), (c, d) in zip(forward, backward, strict=True):
                    both = [(a, self.target(b)), (c, self.target(d))]
                    self.line.append((shard, strange, both[: model.directions]))
        n = len(self.line)
        cuts = starts if streams is None else [s * n // streams for s in range(streams)]
        self.nats = np.concatenate([self.read(first, last) for first, last in zip(cuts, [*cuts[1:], n], strict=True)])

    def target(self, word: str) -> int:
        return self.ids.get(word, self.ids["<UNK>"])

    def vector(self, word: str) -> torch.Tensor:
        if self.model.char_cnn is None:
            return self.parameters["word_embedding"][self.target(word)]
        if word not in self.vectors:
            row = encode_words([word], self.model.config.char_cnn.max_characters)[0]
            if word in ("<S>", "</S>"):
                row[1:4] = (256 if word == "<S>" else 257, 259, 260)
                row[3:] = 260
            self.vectors[word] = naive_bilm.word_vector(self.parameters, self.model.config, row.tolist())
        return self.vectors[word]

    def read(self, first: int, last: int) -> np.ndarray:
        """[n, D] losses of positions that are one row, from zero state."""
        part, d = self.line[first:last], self.model.directions
        words = [word for _, _, both in part for word, _ in both]
        inputs = torch.arange(len(words)).view(len(part), d).T[:, None, :]
        start = naive_bilm.zero_state(self.model.config, 1)
        vectors = [self.vector(word) for word in words]
        outputs, _ = naive_bilm.run(self.parameters, self.model.config, vectors, inputs, start, [len(part)])
        table = self.parameters["word_embedding" if self.model.tied else "softmax_weight"]
        losses = [[float(naive_bilm.full_loss(outputs[-1][j][0][t], table, self.parameters["softmax_bias"], both[j][1]))
                   for j in range(d)] for t, (_, _, both) in enumerate(part)]  # fmt: skip
        return np.array(losses).reshape(len(part), d)

    def measures(self, shards: Sequence[int], clean: bool = False) -> dict[str, float | None]:
        chosen = [i for i, (shard, strange, _) in enumerate(self.line) if shard in shards and not (clean and strange)]
        sentences_ = [s for k in shards for s in lines_of(self.paths[k])]
        if clean:
            sentences_ = [s for s in sentences_ if all(self.target(word) != self.ids["<UNK>"] for word in s)]
        words = [word for sentence in sentences_ for word in sentence]
        unknown = sum(self.target(word) == self.ids["<UNK>"] for word in words)
        result: dict[str, float | None] = dict.fromkeys(NUMBERS)
        result.update(positions=len(chosen), words=len(words), unknown_words=unknown, characters=len("".join(words)))
        if not chosen:
            return result
        each = self.nats[chosen].sum(axis=0)
        mean, bits = each / len(chosen), each / math.log(2) / (len("".join(words)) + len(chosen))
        for j, name in enumerate(("forward", "backward")[: len(each)]):
            result[f"perplexity_{name}"] = math.exp(mean[j])
            result[f"nats_per_word_{name}"], result[f"bits_per_character_{name}"] = mean[j], bits[j]
        result["perplexity"], result["perplexity_mean"] = math.exp(mean.mean()), float(np.exp(mean).mean())
        result["nats_per_word"], result["bits_per_character"] = mean.mean(), bits.mean()
        result["oov_rate"] = unknown / len(words)
        return result


def compare(found: dict[str, Any], expected: dict[str, float | None], counts: Sequence[str] = COUNTS) -> None:
    for name in counts:
        assert found[name] == expected[name], name
    for name in NUMBERS:
        value = expected[name]
        if value is None:
            assert found[name] is None, name
        else:
            assert found[name] == pytest.approx(value, rel=1e-6), name


MODELS = {
    "characters": tiny_config(model__lstm={"dim": 6, "projection_dim": 4}),
    "forward only": tiny_config(model__lstm={"dim": 6, "projection_dim": 4}, model__bidirectional=False),
    "words, tied": tiny_config(**WORDS_TIED, model__lstm={"dim": 6, "projection_dim": 4, "n_layers": 1}),
}


def measured(
    config: PretrainConfig, paths: list[Path], rows: int, reset: str = "never", streams: int = 3
) -> dict[str, Any]:
    model, vocabulary = random_model(config, len(WORDS)), Vocabulary.from_words(WORDS)
    corpus = Corpus.from_shards([index_shard(str(path), 4096) for path in paths])
    job = EvaluationJob("unused", None, corpus, EvalConfig(reset="sentence", rows=rows) if reset == "sentence"
              else EvalConfig(streams=streams, rows=rows), "fail")  # fmt: skip
    (part,) = job.shares(1)
    return all_measures(job.measure(part, model, vocabulary), corpus)


@pytest.mark.parametrize("reset", ["never", "sentence"])
@pytest.mark.parametrize("name", MODELS)
def test_every_measure_is_what_its_definition_says(name: str, reset: str, texts: list[Path]) -> None:
    found = measured(MODELS[name], texts, rows=5, reset=reset)
    model = random_model(MODELS[name], len(WORDS))
    reckoning = Reckoning(model, WORDS, texts, 3 if reset == "never" else None)
    for shards, values in [((0, 1, 2), found), *(((i,), shard) for i, shard in enumerate(found["shards"]))]:
        compare(values, reckoning.measures(shards))
        compare(values["without_unknown"], reckoning.measures(shards, clean=True), ("positions", "characters"))
    assert found["without_unknown"]["positions"] < found["positions"]
    assert [shard["path"] for shard in found["shards"]] == [str(path) for path in texts]


@pytest.mark.parametrize("reset", ["never", "sentence"])
def test_the_result_does_not_depend_on_rows_or_parts(reset: str, texts: list[Path], tmp_path: Path) -> None:
    config, streams = MODELS["characters"], 7
    reference = measured(config, texts, rows=128, reset=reset, streams=streams)
    for rows in (1, 2, 5):
        compare(measured(config, texts, rows, reset, streams), reference)
    # many small blocks, in parts as workers get them
    corpus = Corpus.from_shards([index_shard(str(path), 64) for path in texts])
    vocabulary, model = Vocabulary.from_words(WORDS), random_model(config, len(WORDS))
    settings = EvalConfig(reset="sentence") if reset == "sentence" else EvalConfig(streams=streams)
    job = EvaluationJob("unused", None, corpus, settings, "fail")
    for workers in (2, 3, 100):
        parts = job.shares(workers)
        assert 1 < len(parts) <= workers
        first, *others = (job.measure(part, model, vocabulary) for part in parts)
        for other in others:
            first += other
        compare(all_measures(first, corpus), reference)


def test_bf16_products_change_little(texts: list[Path]) -> None:
    vocabulary = Vocabulary.from_words(WORDS)
    corpus = Corpus.from_shards([index_shard(str(path), 4096) for path in texts])
    nats = []
    for precision in ("fp32", "bf16"):
        job = EvaluationJob(
            "unused", None, corpus, EvalConfig.model_validate({"streams": 3, "precision": precision}), "fail"
        )
        tally = job.measure(job.shares(1)[0], random_model(MODELS["characters"], len(WORDS)).float(), vocabulary)
        nats.append(all_measures(tally, corpus)["nats_per_word"])
    assert nats[0] != nats[1], "the setting has an effect"
    assert nats[0] == pytest.approx(nats[1], rel=0.01)


def test_many_rows_are_computed_in_another_way_and_give_the_same(texts: list[Path]) -> None:
    many, few = (measured(MODELS["characters"], texts, rows, streams=45) for rows in (45, 5))
    compare(many, few)


def test_more_streams_than_positions(tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("the dog\n")
    found = measured(MODELS["characters"], [path], rows=128, streams=50)
    compare(found, Reckoning(random_model(MODELS["characters"], len(WORDS)), WORDS, [path], 50).measures([0]))


@pytest.fixture()
def checkpoint(tmp_path: Path) -> Path:
    config = MODELS["characters"]
    return save_checkpoint(tmp_path / "checkpoint", config, WORDS, random_model(config, len(WORDS)))


def settings_of(checkpoint: Path, texts: list[Path], workers: int, **evaluate: Any) -> EvaluateConfig:
    return EvaluateConfig.from_dict({
        "run": {"storage_path": str(checkpoint.parent / "runs")}, "init": {"from": str(checkpoint)},
        "data": {"test": [str(path) for path in texts]}, "cluster": {"workers": workers, "cpus_per_worker": 0.5},
        "evaluate": evaluate,
    })  # fmt: skip


def test_the_command_prints_a_table_and_writes_json(
    checkpoint: Path, texts: list[Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    before = set(tmp_path.iterdir())
    arguments = [str(checkpoint), f"data.test={tmp_path}/text-*.txt", "evaluate.streams=3", "cluster.workers=0",
                 f"run.storage_path={tmp_path}/runs", "--json", str(tmp_path / "result.json")]  # fmt: skip
    assert main(arguments) == 0
    assert set(tmp_path.iterdir()) - before == {tmp_path / "runs", tmp_path / "result.json"}
    values = json.loads((tmp_path / "result.json").read_text())
    compare(values, measured(MODELS["characters"], texts, 128, streams=1))
    assert values["source"] == str(checkpoint) and values["step"] == 7 and values["streams"] == 1
    printed = capsys.readouterr().out
    for text in (
        "text-0.txt",
        "all",
        "without unknown",
        "<UNK> is scored as one class",
        f"{values['perplexity']:,.2f}",
    ):
        assert text in printed
    assert f"{values['shards'][2]['bits_per_character']:.4f}" in printed

    assert main([*arguments[:-2], "--dry-run"]) == 0
    planned = capsys.readouterr().out
    assert f"{values['positions']:,} positions" in planned and "streams: 1" in planned


@pytest.mark.parametrize(("asked", "used"), [(32, 1), (1000, 1), (1, 1)])
def test_a_short_text_is_measured_in_streams_that_give_context(
    asked: int, used: int, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "one.txt"
    path.write_text("the dog sees the old garden in the garden .\n")
    result = run(settings_of(checkpoint, [path], 0, streams=asked))
    assert isinstance(result, EvaluateResult)
    assert result.values["streams"] == used and ", 1 stream;" in result.summary()
    expected = Reckoning(random_model(MODELS["characters"], len(WORDS)), WORDS, [path], used)
    compare(result.values, expected.measures([0]))


def test_numbers_that_say_little_come_with_a_warning(
    checkpoint: Path, long_texts: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The training text of a run, and a text whose words are unknown; held-out text has no warning."""
    run_folder = tmp_path / "run"
    (run_folder / "checkpoints").mkdir(parents=True)
    checkpoint.rename(run_folder / "best")
    shutil.copytree(run_folder / "best", run_folder / "checkpoints" / "step-00000007-attempt-001")
    Corpus.from_shards([index_shard(str(long_texts[0]), 4096)]).save(run_folder / "train.npz")
    known, other = tmp_path / "known.txt", tmp_path / "other.txt"
    marked = tmp_path / "marked.txt"
    known.write_text("the old garden .\n" * 20)
    marked.write_text("<s> the old garden . </s>\n" * 20)
    other.write_text("THE OLD GARDEN .\n" * 20)
    messages = {}
    for name, texts in {
        "known": [known],
        "other": [other],
        "marked": [marked],
        "all": long_texts[:1],
        "part": [known, *long_texts[:1]],
    }.items():
        caplog.clear()
        run(settings_of(run_folder, texts, 0, streams=1))
        messages[name] = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert messages["known"] == []
    assert len(messages["other"]) == 1 and "75 % of the words are unknown" in messages["other"][0]
    assert messages["marked"][0].startswith(
        "data.test: 20 of 20 sentences spell <s>: training adds sentence markers it"
    )
    trained = {name: [m for m in each if "trained on" in m] for name, each in messages.items()}
    assert "long-0.txt: the run was trained on all of the text" in trained["all"][0]
    assert "trained on a part of the text" in trained["part"][0] and trained["other"] == []


def test_a_forward_only_model_has_no_column_for_both(texts: list[Path], tmp_path: Path) -> None:
    config = MODELS["forward only"]
    checkpoint = save_checkpoint(tmp_path / "one-way", config, WORDS, random_model(config, len(WORDS)))
    result = run(settings_of(checkpoint, texts, 0))
    assert isinstance(result, EvaluateResult)
    lines = result.summary().splitlines()
    assert "both" not in lines[1] and lines[2].split() == [
        "text",
        "positions",
        "unknown",
        "forward",
        "nats/word",
        "bits/char",
    ]
    assert f"{result.values['perplexity_forward']:,.2f}" in lines[-4]


@pytest.mark.parametrize(("asked", "used"), [(5, 5), (6, 5), (1000, 5), (2, 2)])
def test_streams_follow_the_text(
    asked: int, used: int, checkpoint: Path, long_texts: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    result = run(settings_of(checkpoint, long_texts, 0, streams=asked))
    assert isinstance(result, EvaluateResult)
    assert 1000 <= result.values["positions"] < 1200 and result.values["streams"] == used
    compare(result.values, measured(MODELS["characters"], long_texts, 128, streams=used))
    noted = [message for message in caplog.messages if f"evaluate.streams={asked} becomes {used}" in message]
    assert len(noted) == (asked != used), "a text that is long enough has no note"


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("evaluate", [{"streams": 5}, {"reset": "sentence", "rows": 4}], ids=["streams", "sentences"])
def test_workers_on_ray_find_the_same(
    ray_session: None, checkpoint: Path, long_texts: list[Path], evaluate: dict[str, Any]
) -> None:
    alone, together = (run(settings_of(checkpoint, long_texts, workers, **evaluate)) for workers in (0, 2))
    assert isinstance(alone, EvaluateResult) and isinstance(together, EvaluateResult)
    assert alone.values["streams"] == together.values["streams"] == evaluate.get("streams")
    compare(together.values, alone.values)


@pytest.mark.ray
@pytest.mark.slow
def test_a_worker_s_error_is_the_user_s(
    ray_session: None, checkpoint: Path, texts: list[Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = settings_of(checkpoint, texts, 2)
    run(config)
    # the index knows size and time of change; only who reads it sees that the text is another
    stat = texts[0].stat()
    changed = texts[0].read_bytes().replace(b" ", b"x", 1)
    texts[0].write_bytes(changed)
    os.utime(texts[0], ns=(stat.st_atime_ns, stat.st_mtime_ns))
    arguments = [str(checkpoint), f"data.test={texts[0]}", f"run.storage_path={tmp_path}/runs", "cluster.workers=2",
                 "cluster.cpus_per_worker=0.5"]  # fmt: skip
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("error:") == 1 and "text-0.txt" in error and "prepare again" in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data.test={text}"], "SOURCE is missing"),
        (["{checkpoint}"], "data.test is empty"),
        (["{checkpoint}", "data.test={folder}/none-*.txt"], "no file matches"),
        (["{checkpoint}", "data.test={folder}/text-1.txt"], "no sentence in 1 files"),
        (["{folder}/weights.hdf5", "data.test={text}"], "holds no softmax"),
        (["{checkpoint}", "data.test={text}", "evaluate.reset=sentence", "evaluate.streams=4"], "depends on no stream"),
        (["{checkpoint}", "data.test={text}", "checkpoint=last"], "is no run"),
        (["{checkpoint}", "data.test={text}", "cluster.device=gpu"], "cluster.device=gpu"),
    ],
)
def test_mistakes(
    arguments: list[str], message: str, checkpoint: Path, texts: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    if "device=gpu" in arguments[-1] and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    folder = checkpoint.parent
    model = random_model(MODELS["characters"], len(WORDS))
    write_weights(folder / "weights.hdf5", model)
    (folder / "options.json").write_text(json.dumps(to_options(model.config, MODELS["characters"].softmax, len(WORDS))))
    names = {"checkpoint": checkpoint, "folder": folder, "text": texts[0]}
    given = [argument.format(**names) for argument in arguments]
    assert main([*given, f"run.storage_path={folder}/runs", "cluster.workers=0"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_perplexity_that_is_not_finite_is_no_number(texts: list[Path], tmp_path: Path) -> None:
    config = MODELS["characters"]
    model = random_model(config, len(WORDS))
    with torch.no_grad():
        dict(model.named_parameters())["softmax_bias"][0] = 3e38
    checkpoint = save_checkpoint(tmp_path / "bad", config, WORDS, model)
    result = run(settings_of(checkpoint, texts, 0))
    assert isinstance(result, EvaluateResult)
    assert result.values["perplexity"] is None and result.values["positions"] > 0
    json.dumps(result.to_dict(), allow_nan=False)
    assert "-" in result.summary()


def test_evaluation_needs_no_ray_in_this_process(checkpoint: Path, texts: list[Path], repository: Path) -> None:
    code = ("import sys; sys.modules['ray'] = None; from elmo_ray.evaluate import main; "
            "sys.exit(main(sys.argv[1:]))")  # fmt: skip
    arguments = [
        str(checkpoint),
        f"data.test={texts[0]}",
        f"run.storage_path={checkpoint.parent}/runs",
        "cluster.workers=0",
    ]
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr


def test_raw_documents_are_tokenised_as_for_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """JSONL, Parquet and raw text give what their tokenised sentences give; a function from the Hub does not run."""
    pytest.importorskip("spacy")
    config = tiny_config(data__tokenizer="spacy", data__language="en", data__normalize=["whitespace"])
    model = random_model(config, len(WORDS))
    source = save_checkpoint(tmp_path / "checkpoint", config, WORDS, model)
    documents = ["The dog sees the cat. Anna hears!", "the old house, in the garden."]
    tokenised = tmp_path / "tokenised.txt"
    tokenised.write_text("The dog sees the cat .\nAnna hears !\nthe old house , in the garden .\n")
    raw = tmp_path / "raw.txt"
    raw.write_text("\n".join(documents) + "\n")
    lines = tmp_path / "d.jsonl"
    lines.write_text("".join(json.dumps({"body": text}) + "\n" for text in documents))
    table = tmp_path / "d.parquet"
    pq.write_table(pa.table({"body": documents}), table)

    def measured(path: Path, **data: Any) -> dict[str, Any]:
        values = {"init": {"from": str(source)}, "data": {"test": str(path), **data}, "cluster": {"workers": 0}}
        values["run"] = {"storage_path": str(tmp_path / "runs")}
        return run(EvaluateConfig.from_dict(values)).to_dict()

    right = measured(tokenised, tokenizer="none")
    assert right["positions"] == 20
    for path, data in ((raw, {}), (lines, {"column": "body"}), (table, {"column": "body"})):
        found = measured(path, **data)
        assert {name: found[name] for name in (*NUMBERS, *COUNTS)} == {
            name: right[name] for name in (*NUMBERS, *COUNTS)
        }
    assert measured(raw, tokenizer="none")["positions"] == 15
    # a file of several pieces has one row
    monkeypatch.setattr(units, "UNIT_BYTES", 40)
    monkeypatch.setattr(units, "SMALL_FILE_BYTES", 0)
    found = measured(lines, column="body")
    assert [shard["path"] for shard in found["shards"]] == [str(lines)] and found["positions"] == 20
    assert found["shards"][0]["perplexity"] == found["perplexity"] and found["shards"][0]["positions"] == 20
    function = tiny_config(data__tokenizer="theirs:cut")
    opened = open_source(save_checkpoint(tmp_path / "theirs", function, WORDS, model))
    assert opened.recorded_form(TextConfig()).tokenizer == "theirs:cut"
    published = dataclasses.replace(opened, uri="hf://me/theirs@0123")
    with pytest.raises(ConfigError, match="hf://me/theirs@0123: was trained with data.tokenizer=theirs:cut; set"):
        published.recorded_form(TextConfig())
    assert published.recorded_form(TextConfig(tokenizer="none")).tokenizer == "none"
