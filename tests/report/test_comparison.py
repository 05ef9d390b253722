"""Runs whose numbers do not compare are marked, with the reason; others are not."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from helpers.tiny_runs import sentences, tiny_config

from elmo_ray.data.corpus import Corpus
from elmo_ray.data.scan import index_shard
from elmo_ray.data.vocabulary import SPECIAL_WORDS, Vocabulary
from elmo_ray.report import ReportResult
from elmo_ray.report.curves import RunCurve, table
from elmo_ray.report.page import RunDetails, evaluation_differences, write_page
from elmo_ray.training.metrics import MetricsWriter

EVALUATION = {
    "perplexity": 90.0, "perplexity_forward": 80.0, "perplexity_backward": 100.0, "bits_per_character": 1.5,
    "positions": 700, "characters": 3000, "oov_rate": 0.0, "vocabulary": 5, "vocabulary_sha256": "v",
    "text_sha256": "t", "streams": 3, "reset": "never", "precision": "fp32",
}  # fmt: skip


def make_run(folder: Path, **changes: Any) -> Path:
    """Files of a run, as `report` reads them. changes: of its validations, text, words, settings, test result."""
    folder.mkdir(parents=True)
    words = changes.get("words", ["the", "dog"])
    Vocabulary.from_words([*SPECIAL_WORDS, *words]).write(folder / "vocab.txt")
    text = folder / "valid.txt"
    text.write_text("".join(f"{line}\n" for line in sentences(30, seed=changes.get("text", 1))), encoding="utf-8")
    corpus = Corpus.from_shards([index_shard(str(text), changes.get("block_bytes", 4096))])
    corpus.save(folder / "valid.npz")
    config = tiny_config(**{"evaluate__streams": 32, **changes.get("settings", {})})
    (folder / "config.yaml").write_text(config.to_yaml())
    evaluation = {**EVALUATION, **changes.get("evaluation", {})}
    evaluation = {name: value for name, value in evaluation.items() if value != "missing"}
    (folder / "result.json").write_text(json.dumps({"evaluation": evaluation}))
    backward = None if changes.get("one_way") else 110.0
    with MetricsWriter(folder, 1) as writer:
        for step, kind, positions in ((50, "train", 1000), (50, "valid", corpus.positions)):
            writer.write({
                "kind": kind, "step": step, "positions": changes.get("positions", positions), "perplexity": 100.0,
                "perplexity_forward": 95.0, "perplexity_backward": backward, "time": 1e9 + step,
                **({"streams": changes["streams"]} if kind == "valid" and "streams" in changes else {}),
            })  # fmt: skip
    return folder


@pytest.mark.parametrize(
    ("changes", "held_out", "evaluation"),
    [
        ({}, None, None),
        ({"block_bytes": 64, "settings": {"optim__lr": 0.1}}, None, None),
        ({"streams": 32}, None, None),
        ({"streams": 1}, "32 and 1 streams", None),
        ({"settings": {"evaluate__streams": 16}}, "32 and 16 streams", None),
        ({"text": 2}, "another text", None),
        ({"words": ["the", "dog", "cat"]}, "another vocabulary (5 and 6 words)", None),
        ({"words": ["the", "cat"]}, "another vocabulary", None),
        ({"positions": 60}, "and 60 positions", None),
        ({"one_way": True}, "both directions and forward alone", None),
        ({"evaluation": {"streams": 1}}, None, "3 and 1 streams"),
        ({"evaluation": {"streams": None, "reset": "sentence"}}, None, "streams and each sentence alone"),
        ({"evaluation": {"vocabulary_sha256": "other"}}, None, "another vocabulary"),
        ({"evaluation": {"text_sha256": "other", "positions": 80}}, None, "another text"),
        ({"evaluation": {"precision": "bf16"}}, None, "fp32 and bf16"),
        ({"evaluation": {"perplexity_backward": None}}, None, "both directions and forward alone"),
        # results of versions that did not write hashes
        ({"evaluation": {"text_sha256": "missing", "vocabulary_sha256": "missing"}}, None, None),
        ({"evaluation": {"text_sha256": "missing", "characters": 3001}}, None, "another text"),
        ({"evaluation": {"vocabulary_sha256": "missing", "vocabulary": 9}}, None, "vocabularies of 5 and 9 words"),
    ],
)  # fmt: skip
def test_what_does_not_compare_is_marked(
    changes: dict[str, Any], held_out: str | None, evaluation: str | None, tmp_path: Path
) -> None:
    runs = [RunCurve.read(make_run(tmp_path / "a")), RunCurve.read(make_run(tmp_path / "b", **changes))]
    details = [RunDetails(result=json.loads((run.path / "result.json").read_text())) for run in runs]
    evaluations = tuple(evaluation_differences(details))
    first, second = ReportResult(runs=tuple(runs), page="", pictures=(), evaluations=evaluations).to_dict()["runs"]
    assert not any(first["not_comparable"].values())
    lines = table(runs).splitlines()
    row = next(line for line in lines if line.startswith("b "))
    notes = [line for line in lines if line.startswith("* b: held-out perplexity does not compare")]
    write_page(tmp_path / "report.html", runs, details, {})
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    for kind, reason in (("valid", held_out), ("evaluation", evaluation)):
        found = second["not_comparable"][kind]
        assert len(found) == (reason is not None), found
        assert reason is None or reason in found[0]
        assert reason is None or reason in page
    assert len(notes) == (held_out is not None) and ("100.0* (50)" in row) == (held_out is not None)
    marks = re.findall(r"<td class=n>[0-9.]+\*</td>", page)
    assert bool(marks) == (held_out is not None or evaluation is not None)


def test_training_perplexities_of_other_softmaxes_are_marked(tmp_path: Path) -> None:
    runs = [
        RunCurve.read(make_run(tmp_path / name, settings=settings))
        for name, settings in (("a", {}), ("b", {"softmax__negatives": 4}), ("c", {"optim__lr": 0.1}))
    ]
    lines = table(runs).splitlines()
    assert [line.count("*") for line in lines[:4]] == [0, 0, 1, 0]
    assert "b: train perplexity does not compare with that of the first run: sampled with 20 negatives and" in lines[-1]


def test_the_best_of_a_run_is_among_validations_that_compare(tmp_path: Path) -> None:
    """A resumed run with fewer streams: the lower numbers before are of another measure."""
    with MetricsWriter(tmp_path / "run", 1) as writer:
        for step, value, streams in ((10, 50.0, 32), (20, 70.0, 1), (30, 80.0, 1)):
            writer.write({"kind": "valid", "step": step, "perplexity": value, "positions": 400, "streams": streams})
    figures = RunCurve.read(tmp_path / "run").figures()
    assert (figures["valid_perplexity_best"], figures["valid_step_best"]) == (70.0, 20)
