"""What decides whether the numbers of several runs compare, and the sentences about those that do not.

A `Measure` names each aspect that is known of a number, such as the text or the number of streams. Two numbers compare
if no aspect that both know differs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from elmo_ray.config.schema import flatten
from elmo_ray.config.softmax import SOFTMAX_KINDS
from elmo_ray.config.yaml_reader import parse_yaml
from elmo_ray.data.corpus import Corpus
from elmo_ray.data.vocabulary import Vocabulary
from elmo_ray.errors import ElmoRayError
from elmo_ray.training.metrics import Record

Measure = dict[str, Any]
"""Aspects of a number by name: text, positions, characters, vocabulary, words, streams, reset, precision, directions,
softmax."""

_TOLERANCE = 0.01
"""Share by which the positions of two measures may differ: windows of another length end at other places."""

_MARK = "*"

_BOTH, _FORWARD = "both directions", "forward alone"
ONE_WAY_REASONS = (f"{_BOTH} and {_FORWARD}", f"{_FORWARD} and {_BOTH}")
"""The `differences` on which the perplexity of the forward direction does not depend."""


def held_out_measure(folder: Path, records: Sequence[Record]) -> Measure:
    """Return the measure of a run's held-out perplexity, that of its last validation; empty if there is none."""
    last = next((record for record in reversed(records) if record["kind"] == "valid"), None)
    if last is None:
        return {}
    settings = _settings(folder)
    found = {
        "text": _text_of(folder / "valid.npz"),
        "positions": last.get("positions"),
        "streams": last.get("streams", settings.get("evaluate.streams")),
        "directions": _directions(last),
        **_vocabulary_of(folder),
    }
    return {name: value for name, value in found.items() if value is not None}


def train_measure(folder: Path, records: Sequence[Record]) -> Measure:
    """Return the measure of a run's training perplexity; empty if there is none."""
    last = next((record for record in reversed(records) if record["kind"] == "train"), None)
    if last is None:
        return {}
    settings = _settings(folder)
    kind, negatives = settings.get("softmax.kind"), settings.get("softmax.negatives")
    facts = SOFTMAX_KINDS.get(str(kind))
    softmax = f"{kind} with {negatives} negatives" if facts is not None and facts.samples_words else kind
    found = {"softmax": softmax, "directions": _directions(last), **_vocabulary_of(folder)}
    return {name: value for name, value in found.items() if value is not None}


def evaluation_measure(values: Any) -> Measure:
    """Return the measure of the test text from the result of `evaluate`; empty if there is none."""
    if not isinstance(values, dict):
        return {}
    found = {
        "text": values.get("text_sha256"),
        "positions": values.get("positions"),
        "characters": values.get("characters"),
        "vocabulary": values.get("vocabulary_sha256"),
        "words": values.get("vocabulary"),
        "reset": values.get("reset"),
        "streams": values.get("streams"),
        "precision": values.get("precision"),
        "directions": _directions(values),
    }
    return {name: value for name, value in found.items() if value is not None}


def differences(first: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Return in which aspects two measures differ, as text; nothing if their numbers compare."""
    different = [name for name in first if name in other and first[name] != other[name]]
    found = []
    for name in different:
        a, b = first[name], other[name]
        if name == "text":
            found.append("another text")
        elif name == "characters":
            if "text" not in first or "text" not in other:  # results of older versions say no more of the text
                found.append("another text")
        elif name == "positions":
            if not {"text", "characters"} & set(different) and abs(a - b) > _TOLERANCE * max(a, b):
                found.append(f"{a:,} and {b:,} positions")
        elif name == "vocabulary":
            words = [measure.get("words") for measure in (first, other)]
            sizes = f" ({words[0]:,} and {words[1]:,} words)" if None not in words and words[0] != words[1] else ""
            found.append(f"another vocabulary{sizes}")
        elif name == "words":
            if "vocabulary" not in first or "vocabulary" not in other:
                found.append(f"vocabularies of {a:,} and {b:,} words")
        elif name == "reset":
            found.append(" and ".join("each sentence alone" if how == "sentence" else "streams" for how in (a, b)))
        elif name == "streams":
            found.append(f"{a:,} and {b:,} streams")
        else:
            found.append(f"{a} and {b}")
    return found


def same_measure(record: Record, other: Record) -> bool:
    """Return whether two validations of a run read the same positions in the same streams, as far as they say so."""
    if "streams" not in record or "streams" not in other:
        return True
    return record["streams"] == other["streams"] and not differences(
        {"positions": record["positions"]}, {"positions": other["positions"]}
    )


def marked(value: str, unlike: Sequence[str]) -> str:
    """Return the text of a number with a mark if it does not compare. unlike: from `differences`."""
    return value + _MARK if unlike and value != "-" else value


def unlike_the_first(measures: Sequence[Measure]) -> list[list[str]]:
    """Return the `differences` of each measure from the first one; an empty measure differs from none."""
    first: Measure = next((measure for measure in measures if measure), {})
    return [differences(first, measure) for measure in measures]


def notes(names: Sequence[str], unlike: Mapping[str, Sequence[Sequence[str]]]) -> list[str]:
    """Return a sentence for each run whose numbers do not compare with those of the first run that has them.

    unlike: by the kind of number, for each run its differences, from `unlike_the_first`.
    """
    return [
        f"{_MARK} {name}: {kind} perplexity does not compare with that of the first run: {', '.join(reasons)}"
        for kind, each in unlike.items()
        for name, reasons in zip(names, each, strict=True)
        if reasons
    ]


def _settings(folder: Path) -> dict[str, Any]:
    try:
        values = parse_yaml((folder / "config.yaml").read_text("utf-8"), "config.yaml")
    except (OSError, ElmoRayError, ValueError):
        return {}
    return flatten(values) if isinstance(values, Mapping) else {}


def _text_of(index: Path) -> str | None:
    """Return a hash of the text of an index file, or None if it cannot be read. It does not depend on the blocks."""
    try:
        corpus = Corpus.load(index)
    except ElmoRayError:
        return None
    if corpus.positions != sum(shard.sentences + shard.tokens for shard in corpus.shards):
        return corpus.fingerprint  # some blocks of a text, which data.holdout has set aside
    return hashlib.sha256("".join(shard.sha256 for shard in corpus.shards).encode()).hexdigest()


def _vocabulary_of(folder: Path) -> Measure:
    for place in (folder / "vocab.txt", folder / "best" / "vocab.txt"):
        if place.exists():
            try:
                vocabulary = Vocabulary.read(place)
            except ElmoRayError:
                continue
            return {"vocabulary": vocabulary.sha256, "words": vocabulary.size}
    return {}


def _directions(values: Mapping[str, Any]) -> str | None:
    if values.get("perplexity_forward") is None:
        return None
    return _BOTH if values.get("perplexity_backward") is not None else _FORWARD
