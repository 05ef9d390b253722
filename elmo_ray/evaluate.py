"""`evaluate`: perplexity and bits per character of a model on held-out text, with the full softmax.

    python -m elmo_ray.evaluate SOURCE data.test=GLOB [key.path=value ...] [--dry-run] [--json FILE]

The text is cut into evaluate.streams contiguous streams, or fewer where the text is short: each has 200 positions or
more. Each is read from zero states, and the states are carried to its end; with evaluate.reset=sentence every sentence
is read from zero states. The result depends only on the model, the text and this choice: with cluster.workers > 0 the
streams are dealt to Ray tasks, with 0 this process reads them all.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import logging
import math
import operator
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from elmo_ray import prepare
from elmo_ray.checkpoints.source import Source, open_source
from elmo_ray.cluster.session import TORCH_NAMES, check_room, device_for, in_this_process
from elmo_ray.cluster.tasks import run_tasks
from elmo_ray.config import ComputeConfig, EvaluateConfig
from elmo_ray.config.command_line import Flags, run_verb, text_table
from elmo_ray.data.corpus import Corpus
from elmo_ray.data.streams import fewer_streams_note, held_out_streams
from elmo_ray.data.text_check import read_sample, sentence_marker
from elmo_ray.elmo.evaluation import EvaluationJob, LossTotals, measure_share
from elmo_ray.elmo.scoring import LossSums
from elmo_ray.errors import DataError, FormatError, short
from elmo_ray.storage import absolute_or_none

logger = logging.getLogger("elmo_ray.evaluate")  # __name__ is __main__ as a command

NOTE = (
    "<UNK> is scored as one class: a model pays for an unknown word once, not for its spelling, so measures are lower "
    "the more unknown words there are, and only those of one vocabulary compare"
)

MANY_UNKNOWN = 0.2
"""Share of unknown words above which perplexity says little."""

_COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("forward", "perplexity_forward", ",.2f"),
    ("backward", "perplexity_backward", ",.2f"),
    ("both", "perplexity", ",.2f"),
    ("mean of two", "perplexity_mean", ",.2f"),
    ("nats/word", "nats_per_word", ".4f"),
    ("bits/char", "bits_per_character", ".4f"),
    ("b/c forward", "bits_per_character_forward", ".4f"),
    ("b/c backward", "bits_per_character_backward", ".4f"),
)
_ONE_WAY_COLUMNS = tuple(column for column in _COLUMNS if column[0] in ("forward", "nats/word", "bits/char"))
"""Columns of a model that has the forward direction alone: there is no mean of two."""


@dataclass(frozen=True)
class EvaluateResult:
    """Measures of a model. values: as `--json` writes them, of the whole text, with `shards` and `without_unknown`."""

    title: str
    values: dict[str, Any]

    def summary(self) -> str:
        """Return a table with a row for each shard, for all text, and for the sentences without unknown words."""
        values = self.values
        rows = [(os.path.basename(shard["path"]), shard) for shard in values["shards"]]
        if len(rows) == 1:
            rows = []
        rows += [("all", values), ("without unknown", values["without_unknown"])]
        columns = _COLUMNS if values["directions"] == 2 else _ONE_WAY_COLUMNS
        cells = [["text", "positions", "unknown", *(head for head, _, _ in columns)]]
        for name, row in rows:
            unknown = "-" if row["oov_rate"] is None else f"{row['oov_rate']:.2%}"
            numbers = ["-" if row[key] is None else format(row[key], form) for _, key, form in columns]
            cells.append([name, f"{row['positions']:,}", unknown, *numbers])
        replaced = (
            [f"replaced by U+FFFD: {values['replaced']:,} invalid UTF-8 sequences or NULs"]
            if values["replaced"]
            else []
        )
        streams = values["streams"]
        how = "each sentence alone" if streams is None else f"{streams:,} stream{'s' if streams > 1 else ''}"
        if values["precision"] == "bf16":
            how += ", bf16 products"
        both = " (both: exp of the mean loss)" if values["directions"] == 2 else " of a model that reads forward alone"
        return "\n".join(
            [
                self.title,
                f"perplexity{both} with the full softmax, {how}; sentence ends count as words",
                *text_table(cells),
                *replaced,
                "without unknown: only sentences without an unknown word",
                f"note: {NOTE}",
            ]
        )

    def to_dict(self) -> dict[str, Any]:
        return self.values


@dataclass(frozen=True)
class EvaluatePlan:
    """Work that `evaluate` would do."""

    title: str
    config: EvaluateConfig
    corpus: Corpus

    def summary(self) -> str:
        files = len(self.corpus.shards)
        text = f"text: {files:,} files, {self.corpus.sentences:,} sentences, {self.corpus.positions:,} positions"
        how = "each sentence alone" if self.streams is None else f"streams: {self.streams:,}"
        return "\n".join([self.config.to_yaml().rstrip(), "", self.title, text, how])

    @property
    def streams(self) -> int | None:
        """The number of streams in which the text is read; None where each sentence is read alone."""
        how = self.config.evaluate
        return held_out_streams(self.corpus.positions, how.streams) if how.reset == "never" else None

    def to_dict(self) -> dict[str, Any]:
        positions = self.corpus.positions
        return {
            "config": self.config.to_dict(), "source": self.title, "positions": positions, "streams": self.streams
        }  # fmt: skip


def run(config: EvaluateConfig, flags: Flags | None = None) -> EvaluateResult | EvaluatePlan:
    """Measure a SOURCE on data.test; write only under data.prepared_dir. Raises ElmoRayErrors for a user's mistakes."""
    # Absolute, as processes with another working folder open the files again.
    options, vocab = map(absolute_or_none, (config.init.options, config.init.vocab))
    source = open_source(config.init.source, config.checkpoint, options, vocab)
    _check_gives_probabilities(source)
    corpus, replaced = _index_text(config, source)
    if flags is not None and flags.dry_run:
        return EvaluatePlan(source.describe(), config, corpus)
    # The test text is read in whole anyway; a sample tells whether it is of the form that a model was trained on.
    if (marker := sentence_marker(read_sample(corpus))) is not None:
        logger.warning("%s", marker.warning("data.test"))
    how, cluster = config.evaluate, config.cluster
    if how.reset == "never":
        if (note := fewer_streams_note("the text has", corpus.positions, how.streams)) is not None:
            logger.info("%s", note)
        how = how.model_copy(update={"streams": held_out_streams(corpus.positions, how.streams)})
    place = source.uri or str(source.path)
    job = EvaluationJob(place, source.fingerprint, corpus, how, config.data.on_error, options, vocab)
    start = time.monotonic()
    totals = _measure_here(job, source, cluster) if cluster.workers == 0 else _measure_on_ray(job, cluster)
    seconds = time.monotonic() - start
    logger.info("%s positions in %.1f s, %s/s", f"{corpus.positions:,}", seconds, f"{corpus.positions / seconds:,.0f}")
    values = all_measures(totals, corpus)
    _warn_of_doubtful(values, source, corpus)
    about = {
        "source": str(source.path),
        "step": source.step,
        "vocabulary": source.vocabulary.size,
        "directions": source.model.directions,
        "vocabulary_sha256": source.vocabulary.sha256,
        "text_sha256": hashlib.sha256("".join(shard.sha256 for shard in corpus.shards).encode()).hexdigest(),
        "streams": how.streams if how.reset == "never" else None,
        "reset": how.reset,
        "precision": how.precision,
        "replaced": replaced,
        "seconds": seconds,
        "note": NOTE,
    }
    return EvaluateResult(source.describe(), {**values, **about})


def _check_gives_probabilities(source: Source) -> None:
    """Raise FormatError for a SOURCE without a softmax, ConfigError for one without a vocabulary."""
    if not source.has_softmax:
        raise FormatError(
            f"{source.path}: holds no softmax, so it gives no word a probability; evaluate the run or the checkpoint "
            "that it was exported from"
        )
    _ = source.vocabulary  # raises the error, before the text is indexed


def _index_text(config: EvaluateConfig, source: Source) -> tuple[Corpus, int]:
    """Return the text of data.test, and the number of sequences in it that U+FFFD replaces."""
    directory = prepare.prepared_dir(config.run.storage_path, config.data.prepared_dir)
    form = prepare.text_form(source.recorded_form(config.data))
    corpus, found = prepare.index_texts(config.data.test, "data.test", directory, config.data.block_bytes, form)
    if not corpus.positions:
        raise DataError(f"data.test={','.join(config.data.test)}: no sentence in {len(corpus.shards)} files")
    return corpus, found.replaced


def _warn_of_doubtful(values: dict[str, Any], source: Source, corpus: Corpus) -> None:
    """Warn of measures that say little: infinite ones, of many unknown words, or of the training text."""
    if values["perplexity"] is None:
        logger.warning("%s: the loss is not finite", source.path)
    if values["oov_rate"] is not None and values["oov_rate"] > MANY_UNKNOWN:
        logger.warning(
            "%.0f %% of the words are unknown to the vocabulary of %s: perplexity says little here; is the text split "
            "and spelt like the training text?",
            100 * values["oov_rate"],
            source.path,
        )
    if trained_on := _trained_on(source, corpus):
        logger.warning(
            "%s: the run was trained on %s of the text: this is no held-out perplexity",
            short(", ".join(trained_on), 300),
            "a part" if len(trained_on) < len(corpus.shards) else "all",
        )


def _trained_on(source: Source, corpus: Corpus) -> list[str]:
    """Return the files of the text that are training text of the SOURCE, where this is a run on this machine."""
    index = next((f / "train.npz" for f in list(source.path.parents)[:2] if (f / "train.npz").exists()), None)
    if index is None or source.training is None:
        return []
    try:
        known = {shard.sha256 for shard in Corpus.load(index).shards}
    except DataError:
        return []
    return [shard.source for shard in corpus.shards if shard.tokens and shard.sha256 in known]


def all_measures(totals: LossTotals, corpus: Corpus) -> dict[str, Any]:
    """Return the measures of all the text, with `without_unknown`, and with those of each file as `shards`."""
    tokens = np.bincount(corpus.block_shard, corpus.block_tokens, len(corpus.shards)).astype(np.int64)
    characters = np.bincount(corpus.block_shard, corpus.block_characters, len(corpus.shards)).astype(np.int64)
    everything = slice(None)
    shards = []
    start = 0
    # A large file of documents is several shards, one after the other.
    for source, group in itertools.groupby(shard.source for shard in corpus.shards):
        end = start + len(list(group))
        shards.append({"path": source, **_text_measures(totals, tokens, characters, slice(start, end))})
        start = end
    return {**_text_measures(totals, tokens, characters, everything), "shards": shards}


def _text_measures(totals: LossTotals, tokens: np.ndarray, characters: np.ndarray, shards: slice) -> dict[str, Any]:
    nats = totals.nats[:, :, shards].sum(axis=2)
    positions = totals.positions[:, shards].sum(axis=1)
    unknown = int(totals.unknown[:, shards].sum())
    words, all_characters = int(tokens[shards].sum()), int(characters[shards].sum())
    known_characters = int(totals.characters[1, shards].sum())
    counts = {"words": words, "unknown_words": unknown, "oov_rate": unknown / words if words else None}
    known = measures(nats[1], int(positions[1]), known_characters)
    return {
        **measures(nats.sum(axis=0), int(positions.sum()), all_characters),
        **counts,
        "without_unknown": {**known, "oov_rate": 0.0 if positions[1] else None},
    }


def measures(nats: np.ndarray, positions: int, characters: int) -> dict[str, Any]:
    """Return perplexities, nats per word and bits per character of a text.

    nats [D]: the loss of each direction, summed over the text's positions. characters: the code points of its words.
    The separator of a word counts as a character, one for each position. A value is None if there is no position, if
    the model has no backward direction, or if it is not finite.
    """
    sums = LossSums([float(n) for n in nats], positions)
    values: dict[str, float | None] = dict(sums.perplexities())
    bits = [float(n) / math.log(2) / max(1, characters + positions) for n in nats]
    for name, each in (("nats_per_word", sums.mean), ("bits_per_character", bits)):
        values[name] = sum(each) / len(each)
        values[f"{name}_forward"] = each[0]
        values[f"{name}_backward"] = each[1] if len(each) > 1 else None
    finite = {
        name: value if positions and value is not None and math.isfinite(value) else None
        for name, value in values.items()
    }
    return {**finite, "positions": positions, "characters": characters}


def _measure_here(job: EvaluationJob, source: Source, cluster: ComputeConfig) -> LossTotals:
    with in_this_process(cluster) as device:
        (share,) = job.shares(1)
        return job.measure(share, source.model.to(device), source.vocabulary)


def _measure_on_ray(job: EvaluationJob, cluster: ComputeConfig) -> LossTotals:
    shares = job.shares(cluster.workers)
    if len(shares) < cluster.workers:
        logger.info("the text has work for %d workers only", len(shares))
    # Shares can wait for one another, so one place is enough; but a GPU is used unasked only where each gets one.
    device = device_for(cluster, 1 if cluster.device == "gpu" else len(shares))
    check_room(cluster, 1, device)
    totals = dict(
        run_tasks(
            functools.partial(measure_share, job, device=TORCH_NAMES[device]),
            shares,
            workers=len(shares),
            cpus=cluster.cpus_per_worker,
            device=device,
            threads=cluster.threads,
            max_failures=cluster.max_failures,
        )
    )
    # in the order of the shares: a sum of floats depends on its order
    return functools.reduce(operator.add, (totals[number] for number in range(len(shares))))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_verb("evaluate", EvaluateConfig, run, argv)


if __name__ == "__main__":
    sys.exit(main())
