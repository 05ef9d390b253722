"""`pretrain`: train a biLM from scratch.

    python -m elmo_ray.pretrain CONFIG.yaml [key.path=value ...] [--resume | --fresh] [--dry-run] [--json FILE]

config -> corpus and vocabulary -> training -> export -> evaluation -> report. Everything is written to STORAGE/NAME and
to data.prepared_dir, by default STORAGE/prepared.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from elmo_ray import prepare
from elmo_ray.cluster.session import Device, check_cluster, in_cluster
from elmo_ray.config import DataConfig, EvaluateConfig, PretrainConfig, ReportConfig
from elmo_ray.config.command_line import Flags, run_verb
from elmo_ray.data.corpus import Corpus
from elmo_ray.errors import ConfigError, FormatError
from elmo_ray.machine import total_memory
from elmo_ray.storage import at_once, is_uri, join, read_json
from elmo_ray.storage.files import write_aside, write_json
from elmo_ray.storage.local_copy import local_copy_of, local_folder, push, uri_of
from elmo_ray.trackers import check_trackers
from elmo_ray.trackers.beside import following
from elmo_ray.training.console import show_metrics
from elmo_ray.training.dry_run import DryRun, dry_run, largest_block
from elmo_ray.training.metrics import flops_text
from elmo_ray.training.plan import TrainPlan
from elmo_ray.training.run_folder import RunFolder, open_run
from elmo_ray.training.sizes import check_memory, check_streams, worker_memory

logger = logging.getLogger("elmo_ray.pretrain")  # __name__ is __main__ as a command

NO_FLAGS = Flags()

_RESULT_KEYS = (
    "steps", "total_steps", "positions", "finished", "stopped", "best_perplexity", "best_step", "last_valid", "seconds",
    "checkpoint",
)  # fmt: skip

UNIGRAM_POSITIONS = 50_000_000
"""Largest training text that is read once more for the perplexity of a unigram model, a yardstick."""


@dataclass(frozen=True)
class PretrainResult:
    """Result of a run.

    training: the measures of `cluster.trainer.fit`. evaluation, unigram_perplexity: measures of the test text, or None
    if there is none. neighbours: nearest words by word. curve: the perplexities as a picture of characters.
    """

    run_dir: str
    training: dict[str, Any]
    evaluation: dict[str, Any] | None = None
    unigram_perplexity: float | None = None
    export_dir: str | None = None
    neighbours: dict[str, list[str]] = field(default_factory=dict)
    curve: str = ""

    def summary(self) -> str:
        training, lines = self.training, [self.curve] if self.curve else []
        if self.neighbours:
            lines += [
                "nearest words:",
                *(f"  {word:<10} {', '.join(near)}" for word, near in self.neighbours.items()),
                "",
            ]
        if self.evaluation is not None:
            found = self.evaluation
            names = {"forward": "perplexity_forward", "backward": "perplexity_backward", "together": "perplexity"}
            if found.get("directions") == 1:
                names = {"forward": "perplexity_forward"}
            values = [
                f"{name} {found[key]:.1f}" if found[key] is not None else f"{name} not finite"
                for name, key in names.items()
            ]
            how = ", each sentence alone" if found.get("reset") == "sentence" else ""
            line = f"held-out perplexity of the test text{how}: {', '.join(values)}"
            if self.unigram_perplexity is not None:
                line += f"; add-one unigram {self.unigram_perplexity:.1f}"
            lines.append(line)
        done, speed = "finished" if training["finished"] else "stopped", flops_text(training)
        lines.append(
            f"{done} at step {training['steps']:,} of {training['total_steps']:,}: {training['positions']:,} positions "
            f"in {training['seconds']:,.0f} s" + (f", {speed} for each worker" if speed else "")
        )
        best = training["best_perplexity"]
        if best is not None:
            lines.append(
                f"best validation perplexity {best:.2f} at step {training['best_step']:,}{_improvement(training)}"
            )
        lines.append(f"run: {self.run_dir}" + (f"   export: {self.export_dir}" if self.export_dir else ""))
        if training["stopped"]:
            lines.append("go on with the same command and --resume")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        return {
            "run_dir": self.run_dir,
            **self.training,
            "evaluation": self.evaluation,
            "unigram_perplexity": self.unigram_perplexity,
            "nearest_words": self.neighbours,
            "export_dir": self.export_dir,
        }


def _improvement(training: dict[str, Any]) -> str:
    """Return the comparison with the model before the first step, if the run began with a trained model."""
    initial = training.get("initial") or {}
    before, best = initial.get("perplexity"), training["best_perplexity"]
    if not initial:
        return ""
    text = "; before the first step " + (f"{before:.2f} ({best / before:.3f} of it)" if before else "it was not finite")
    if initial.get("new_softmax"):
        return text + "; that is of a new softmax, as the SOURCE has none, and says nothing of the SOURCE"
    new, left_out = initial.get("new_words", 0), initial.get("left_out_words", 0)
    if new or left_out:
        text += (
            f"; both with this run's vocabulary, which has {new:,} words more than the SOURCE's and {left_out:,} less: "
            "the perplexity of the SOURCE with its own vocabulary does not compare with them"
        )
    return text


def run(config: PretrainConfig, flags: Flags = NO_FLAGS) -> PretrainResult | DryRun:
    """Train, export, evaluate and report; a dry run estimates only.

    Raises an ElmoRayError for a mistake of the user, before Ray starts if the mistake can be known by then.
    """
    if flags.dry_run:
        return estimate(config)
    return train_in(open_run(config, flags.resume, flags.fresh), config)


def estimate(config: PretrainConfig, source: FromSource | None = None) -> DryRun:
    """Return the estimate of a run with this configuration: its memory, time and disk.

    Raises ConfigError and DataError where a training would refuse to start.
    """
    return estimate_for(config, measured(config, source), source)


def measured(config: PretrainConfig, source: FromSource | None = None) -> prepare.Sizes:
    """Return the sizes of the texts of a training. Raises ConfigError and DataError for texts that it would refuse."""
    check_trackers(config.run.report_to)
    is_models = source is not None and source.has_vocabulary
    todo = prepare.plan(config, is_models)
    return prepare.measure(config, todo, is_models)


def estimate_for(config: PretrainConfig, sizes: prepare.Sizes, source: FromSource | None = None) -> DryRun:
    """Return the estimate of a run whose texts have these sizes. Raises ConfigError as `estimate` does."""
    if source is not None:
        config = source.fit(config, sizes.vocabulary)
    result = dry_run(config, sizes.train, sizes.positions, sizes.vocabulary)
    check_room_for(config, sizes.vocabulary, sizes.train, looks_at_gpus=True)
    return result


def check_sizes(config: PretrainConfig, prepared: prepare.PrepareResult) -> None:
    """Raise ConfigError if a training is too large for its vocabulary, its text or this machine; warn if it nearly is.

    The check comes before Ray starts and before a file of the run is written.
    """
    config.softmax.check_vocabulary(prepared.vocabulary_size)
    check_streams(config, prepared.train.positions)
    # Looking at a GPU takes memory of it, and a GPU may be set to serve one process, which is a worker then.
    check_room_for(config, prepared.vocabulary_size, prepared.train, looks_at_gpus=config.cluster.workers == 0)


def check_room_for(config: PretrainConfig, n_words: int, corpus: Corpus | None, looks_at_gpus: bool) -> None:
    """Compare the memory of the workers with that of this machine, unless other machines may do the work."""
    if in_cluster() and config.cluster.workers != 0:
        return
    workers = max(1, config.cluster.fewest_workers)
    on_gpu = config.cluster.device != "cpu" and torch.cuda.device_count() >= workers
    memory = worker_memory(config, n_words, largest_block(corpus), on_gpu)
    if on_gpu:
        if looks_at_gpus:
            size = torch.cuda.get_device_properties(0).total_memory
            check_memory(config, memory.on_gpu, size, "the GPU")
        memory = memory.on_host
    whose = "this machine" if workers == 1 else f"this machine, for each of {workers} workers,"
    check_memory(config, memory, total_memory() // workers, whose)


@dataclass(frozen=True)
class FromSource:
    """Things that a training takes from a trained model.

    initialize: called for a new run with its plan, to write the checkpoint that it starts from. fit: returns the
    settings for a vocabulary of so many words. has_vocabulary: the vocabulary is the model's, and is taken as it is.
    """

    fit: Callable[[PretrainConfig, int], PretrainConfig]
    has_vocabulary: bool
    initialize: Callable[[TrainPlan], None] | None = None


def train_in(folder: RunFolder, config: PretrainConfig, source: FromSource | None = None) -> PretrainResult:
    """Train the run of a folder to its end, from the newest checkpoint there.

    source: the trained model of which a new run starts; by default it starts from random weights.
    """
    check_trackers(config.run.report_to)
    if folder.finished and (done := _finished(folder)) is not None:
        logger.info("%s: finished at step %d; nothing to do", folder.place, done.training["steps"])
        with following(folder.place, config.run.report_to):
            pass  # sends what a tracker does not have yet
        return done
    with folder.locked():
        if folder.newest is not None:
            _check_same_run(config, folder.newest, None)
        is_models = folder.newest is not None or (source is not None and source.has_vocabulary)
        prepared = prepare.run(config, replaces=False, is_models_vocabulary=is_models)
        if source is not None:
            config = source.fit(config, prepared.vocabulary_size)
        check_sizes(config, prepared)
        if folder.newest is not None:
            _check_same_run(config, folder.newest, prepared)
        device = check_cluster(config.cluster)
        # Everything that can be refused has been: from here on the run's folder is written.
        folder.make()
        plan = make_plan(config, folder.path, prepared)
        if source is not None and source.initialize is not None and folder.newest is None:
            source.initialize(plan)
        with following(plan.run_dir, config.run.report_to) as senders:
            training = fit_and_show(plan, device)
            if training["stopped"]:
                senders.outcome = "stopped"
                return PretrainResult(folder.place, training)
            return _finish(config, folder.path, prepared, training)


def fit_and_show(plan: TrainPlan, device: Device) -> dict[str, Any]:
    """Train, and show the new lines of the metrics file meanwhile; return the measures of the training."""
    from elmo_ray.cluster.trainer import fit

    copy = local_copy_of(plan.run_dir) if is_uri(plan.run_dir) and plan.config.cluster.workers else None
    if copy is not None:
        copy.pull("metrics/*", "logs/*")
        copy.keep_pulling("metrics/*", "logs/*")
    with show_metrics(local_folder(plan.run_dir)):
        try:
            return fit(plan, device=device)
        finally:
            if copy is not None:
                copy.stop()
                with contextlib.suppress(OSError), at_once():
                    copy.pull("metrics/*", "logs/*")


def make_plan(config: PretrainConfig, run_dir: Path, prepared: prepare.PrepareResult) -> TrainPlan:
    """Write everything that the workers read to the run's folder, and return its places."""
    # Copies, as another run may prepare another corpus meanwhile.
    prepared.train.save(run_dir / "train.npz")
    if prepared.valid is not None:
        prepared.valid.save(run_dir / "valid.npz")
    write_aside(run_dir / "vocab.txt", prepared.vocabulary_path.read_bytes())
    write_aside(run_dir / "config.yaml", config.to_yaml().encode())
    push_to_run(run_dir, "*.npz", "vocab.txt", "config.yaml")
    place = uri_of(run_dir)  # all machines find the files there
    valid = join(place, "valid.npz") if prepared.valid is not None else None
    return TrainPlan(config, place, join(place, "train.npz"), valid, join(place, "vocab.txt"))


def push_to_run(run_dir: Path, *patterns: str) -> None:
    """Push files of a run to its object store, if it is in one. Raises ConfigError if the store does not take them."""
    try:
        push(run_dir, *patterns)
    except OSError as error:
        raise ConfigError(f"run.storage_path: {error.filename}: cannot be written ({error.strerror})") from None


def _text_settings(data: DataConfig) -> dict[str, Any]:
    """Return the settings of how texts are made into sentences, without those that have no effect."""
    names = ["format", "column", "tokenizer", "normalize", *(["language"] if data.language is not None else [])]
    values = data.to_dict()
    return {name: values[name] for name in names}


def _finish(
    config: PretrainConfig, run_dir: Path, prepared: prepare.PrepareResult, training: dict[str, Any]
) -> PretrainResult:
    """Export, evaluate and report a model that is trained; return and write the result."""
    from elmo_ray import export, report
    from elmo_ray.checkpoints.source import open_source
    from elmo_ray.data.measures import add_one_perplexity
    from elmo_ray.data.vocabulary import Vocabulary
    from elmo_ray.elmo.neighbours import nearest_words, words_to_show
    from elmo_ray.report.curves import RunCurve, terminal_curve

    place = uri_of(run_dir)
    evaluation, unigram, export_dir = None, None, None
    if config.run.export:
        try:
            export.export_model(place, run_dir / "export")
            export_dir = join(place, "export")
        except FormatError as error:  # the model is trained nevertheless
            logger.warning("run.export: %s", error)
    if prepared.test is not None:
        evaluation = _evaluated(config, place, prepared.prepared_dir)
        if prepared.train.positions <= UNIGRAM_POSITIONS:
            vocabulary = Vocabulary.read(prepared.vocabulary_path)
            unigram = add_one_perplexity(prepared.train, prepared.test, vocabulary, config.data.on_error)
    source = open_source(place)
    neighbours = nearest_words(source.model, source.vocabulary, words_to_show(source.vocabulary))
    curve = terminal_curve((RunCurve.read(place),))
    result = PretrainResult(place, training, evaluation, unigram, export_dir, neighbours, curve)
    write_json(run_dir / "result.json", result.to_dict())
    report.run(ReportConfig(runs=(place,)))
    push_to_run(run_dir, "result.json", "export/*", "*.png", "*.html")
    return result


def _evaluated(config: PretrainConfig, run: str, prepared_dir: Path) -> dict[str, Any]:
    """Return the measures of a run's best model on the test text, as `evaluate` with the run's settings gives them."""
    from elmo_ray import evaluate

    data, cluster = config.data, config.cluster
    settings = {
        "run": {"storage_path": config.run.storage_path},
        "data": {
            "test": list(data.test or data.train),
            "prepared_dir": uri_of(prepared_dir),
            "block_bytes": data.block_bytes,
            "on_error": data.on_error,
            **_text_settings(data),
        },
        "evaluate": config.evaluate.to_dict(),
        "cluster": {"workers": cluster.fewest_workers, "cpus_per_worker": cluster.cpus_per_worker},
        "init": {"from": run},
    }
    return evaluate.run(EvaluateConfig.from_dict(settings)).to_dict()


def _check_same_run(config: PretrainConfig, newest: Any, prepared: prepare.PrepareResult | None) -> None:
    """Raise ConfigError if the folder's run has another configuration or text.

    prepared: None before the text is prepared; then only settings that do not depend on the text are compared. Both
    comparisons come before Ray starts and before a file of the run is written.
    """
    from elmo_ray.checkpoints.identity import TEXT_KEYS, check_identity, identity
    from elmo_ray.data.vocabulary import Vocabulary

    if prepared is None:
        check_identity(newest, identity(config, "", ""), without=TEXT_KEYS)
        return
    vocabulary = Vocabulary.read(prepared.vocabulary_path)
    check_identity(newest, identity(config, prepared.train.fingerprint, vocabulary.sha256))


def _finished(folder: RunFolder) -> PretrainResult | None:
    """Return the result of a run that is finished, or None if it was killed before it could write its result."""
    values = read_json(join(folder.place, "result.json"))
    if values is None or not values.keys() >= set(_RESULT_KEYS):
        return None
    training = {key: values[key] for key in _RESULT_KEYS} | {"initial": values.get("initial", {})}
    training |= {key: values.get(key) for key in ("tflops", "mfu")}
    if folder.newest is None or training["steps"] != folder.newest.step:
        return None  # the result of a shorter training
    return PretrainResult(
        folder.place,
        training,
        values.get("evaluation"),
        values.get("unigram_perplexity"),
        values.get("export_dir"),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_verb("pretrain", PretrainConfig, run, argv)


if __name__ == "__main__":
    sys.exit(main())
