"""`embed`: write a vector for every word of a text, or probable substitutes, or surprisal, as HDF5 or Parquet.

    python -m elmo_ray.embed SOURCE IN OUT [key.path=value ...] [--resume | --fresh] [--dry-run] [--json FILE]
    python -m elmo_ray.embed SOURCE OUT embed.tokens=vocab.txt

text -> units (`units`) -> a worker for each process (`worker`) -> a shard file for each unit (`shards`). A pool of Ray
actors does the work, each with the model; with cluster.workers=0 this process does it. With --resume a stopped job
continues, and does not repeat the units that are finished (`record`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from elmo_ray import prepare
from elmo_ray.checkpoints.source import Source, open_source
from elmo_ray.cluster.session import TORCH_NAMES, check_room, device_for, free_cpus, in_this_process, local_device
from elmo_ray.cluster.tasks import run_tasks
from elmo_ray.config import ComputeConfig
from elmo_ray.config.command_line import Flags, run_verb
from elmo_ray.data.documents import TextForm
from elmo_ray.embed.config import EmbedConfig
from elmo_ray.embed.record import (
    RECORD,
    TEXT_FOLDER,
    EmbedJob,
    check_same,
    check_use,
    job_record,
    locked,
    read_record,
    remove_output,
)
from elmo_ray.embed.sentences import MakeSentences, SentenceFile, unified_kinds
from elmo_ray.embed.shards import is_finished, is_own_name, join_hdf5
from elmo_ray.embed.units import Texts, Unit, cut_units, find_files
from elmo_ray.embed.worker import EmbedTask, EmbedWorker, Progress, check_layers, write_token_vectors
from elmo_ray.errors import ConfigError, DataError, FormatError
from elmo_ray.storage import absolute_or_none, status
from elmo_ray.storage.files import write_json
from elmo_ray.text.tokenizers import NONE, describe_tokenizer

_NOT_WRITTEN = (".npz", ".npy", ".csv", ".tsv", ".txt", ".json", ".jsonl", ".pt", ".pkl", ".vec", ".gz", ".zip")
"""Endings of names by which a user expects a file of another format, and no folder."""

logger = logging.getLogger("elmo_ray.embed")  # __name__ is __main__ as a command


@dataclass(frozen=True)
class EmbedResult:
    """Result of a job. values: as --json writes them."""

    values: dict[str, Any]

    def summary(self) -> str:
        v = self.values
        if "units" not in v:
            return f"{v['out']}: {v['words']:,} words in {v['seconds']:.1f} s"
        before = f", {v['units_done_before']:,} of them before" if v["units_done_before"] else ""
        speed = f": {v['words']:,} words in {v['seconds']:.1f} s, {v['words_per_second']:,.0f}/s" if v["words"] else ""
        return f"{v['out']}: {v['sentences']:,} sentences in {v['units']:,} shards{before}{speed}"

    def to_dict(self) -> dict[str, Any]:
        return self.values


@dataclass(frozen=True)
class EmbedPlan:
    """Work that `embed` would do. documents: 0 where IN is tokenised text."""

    config: EmbedConfig
    source: str
    documents: int
    sentences: int
    units: int
    finished: int

    def summary(self) -> str:
        documents = f"{self.documents:,} documents, " if self.documents else ""
        work = f"{documents}{self.sentences:,} sentences in {self.units:,} shards, {self.finished:,} of them finished"
        return "\n".join([self.config.to_yaml().rstrip(), "", self.source, work])

    def to_dict(self) -> dict[str, Any]:
        work = {
            "documents": self.documents,
            "sentences": self.sentences,
            "units": self.units,
            "finished": self.finished,
        }
        return {"config": self.config.to_dict(), "source": self.source, **work}


def run(config: EmbedConfig, flags: Flags | None = None) -> EmbedResult | EmbedPlan:
    """Embed the text; write only OUT and, for HDF5, OUT.parts. Raises ElmoRayErrors for a user's mistakes."""
    flags = flags or Flags()
    source = open_source(config.init.source, config.checkpoint, config.init.options, config.init.vocab)
    out = Path(os.path.abspath(os.path.expanduser(str(config.out))))
    if config.embed.tokens is not None:
        return _embed_tokens(config, source, out, flags)
    is_hdf5 = _is_hdf5(config, out)
    shard_folder = out.with_name(f"{out.name}.parts") if is_hdf5 else out
    check_use(out, shard_folder, is_hdf5, flags)
    form = prepare.text_form(source.recorded_form(config.data))
    job = _make_job(config, source, form, shard_folder, is_hdf5)
    check_layers(job, source)
    if flags.fresh and not flags.dry_run:
        remove_output(out, shard_folder)
    old = None if flags.fresh else read_record(shard_folder)
    # A dry run writes nothing to OUT, but it unpacks compressed files elsewhere to count their sentences.
    scratch = tempfile.TemporaryDirectory() if flags.dry_run else locked(shard_folder)
    with scratch as temporary:
        unpack_to = Path(temporary) if temporary else shard_folder / TEXT_FOLDER
        # The temporary folder of a dry run is on this machine alone.
        runner = _make_here if flags.dry_run else functools.partial(_make_sentences, config.cluster)
        texts = find_files(config.texts, form, job.keep, config.data.block_bytes, unpack_to, runner, job.carry)
        try:
            job = _with_documents(job, texts)
            units = cut_units(texts.files, config.data.block_bytes, whole=job.carry)
            if not units:
                raise DataError(f"in={','.join(config.texts)}: no sentence in {len(texts.sources)} files")
        except DataError:
            if old is None:
                shutil.rmtree(unpack_to, ignore_errors=True)
            raise
        record = job_record(job, source, config.data.block_bytes, texts.files, units)
        if old is not None:
            check_same(old, record, shard_folder)
        joined = is_hdf5 and out.exists() and not flags.fresh
        finished = {unit.number for unit in units if joined or is_finished(job, unit)} if old is not None else set()
        sentences = sum(unit.count for unit in units)
        if flags.dry_run:
            return EmbedPlan(config, source.describe(), texts.counts.documents, sentences, len(units), len(finished))
        if old is None:
            write_json(shard_folder / RECORD, record)
        waiting = [unit for unit in units if unit.number not in finished]
        progress = Progress(sentences, sum(unit.count for unit in units if unit.number in finished))
        logger.info("%s", source.describe())
        logger.info("%d of %d shards are to be done, %s sentences", len(waiting), len(units), f"{sentences:,}")
        if waiting:
            _make_shards(job, source, waiting, config, progress)
        if is_hdf5 and not joined:
            join_hdf5(job, units, out)
        shutil.rmtree(shard_folder / TEXT_FOLDER, ignore_errors=True)
        if not is_hdf5:
            write_json(shard_folder / RECORD, {**record, "finished": True})
    if is_hdf5:
        shutil.rmtree(shard_folder, ignore_errors=True)
    values = {"out": str(out), "sentences": sentences, "units": len(units), "units_done_before": len(finished)}
    if job.has_documents:
        values |= {"documents": texts.counts.documents, "empty_documents": texts.counts.empty}
    return EmbedResult({**values, **progress.values})


def _make_shards(job: EmbedJob, source: Source, units: Sequence[Unit], config: EmbedConfig, progress: Progress) -> None:
    """Write the shard of each unit, in this process or on Ray, in any order."""
    if config.cluster.workers == 0:
        with in_this_process(config.cluster) as device:
            worker = EmbedWorker(dataclasses.replace(job, device=device), source)
            _follow(enumerate(map(worker.make, units)), units, progress)
    else:
        with contextlib.closing(_on_ray(job, units, config.cluster)) as results:
            _follow(results, units, progress)


def _follow(results: Iterable[tuple[int, dict[str, Any]]], units: Sequence[Unit], progress: Progress) -> None:
    try:
        for number, result in results:
            progress.add(units[number].count, result["words"])
    finally:
        progress.close()


def _on_ray(
    job: EmbedJob, units: Sequence[Unit], cluster: ComputeConfig
) -> Generator[tuple[int, dict[str, Any]], None, None]:
    workers = min(cluster.workers, len(units))
    device = device_for(cluster, workers)
    check_room(cluster, workers, device)
    return run_tasks(
        EmbedTask(dataclasses.replace(job, device=TORCH_NAMES[device])),
        units,
        workers=workers,
        cpus=cluster.cpus_per_worker,
        device=device,
        threads=cluster.threads,
        max_failures=cluster.max_failures,
        keep=True,
        advice="--resume goes on",
    )


def _make_here(todo: Sequence[MakeSentences]) -> Iterable[tuple[int, SentenceFile]]:
    return enumerate(make() for make in todo)


def _make_sentences(cluster: ComputeConfig, todo: Sequence[MakeSentences]) -> Iterable[tuple[int, SentenceFile]]:
    """Make the sentences of files: on all CPUs of Ray, or in this process if they are few or there are no workers."""
    if (
        cluster.workers == 0
        or len(todo) < 2
        or sum(status(source).st_size for make in todo for source in make.sources) < prepare.SMALL_BYTES
    ):
        return _make_here(todo)
    free = free_cpus()
    return run_tasks(
        MakeSentences.__call__,
        todo,
        workers=max(1, int(free)),
        cpus=1.0 if free >= 1 else 0.25,
        max_failures=cluster.max_failures,
        advice="--resume goes on",
    )


def _with_documents(job: EmbedJob, texts: Texts) -> EmbedJob:
    """Return the job with what its documents say. Raises DataError where kept columns of files do not go together."""
    made = [(file.source, file.sentences) for file in texts.files if file.sentences is not None]
    if job.is_hdf5 and made:
        logger.info("OUT is HDF5, which has no words; a folder as OUT has them, and the columns of embed.keep")
    kept = unified_kinds(made).serialize().to_pybytes() if job.keep else b""
    return dataclasses.replace(job, has_documents=texts.has_documents, kept=kept)


def _make_job(config: EmbedConfig, source: Source, form: TextForm, shard_folder: Path, is_hdf5: bool) -> EmbedJob:
    init, embed = config.init, config.embed
    if embed.keep and is_hdf5:
        raise ConfigError(f"embed.keep={','.join(embed.keep)}: HDF5 has no columns; name a folder as OUT for Parquet")
    if own := next((name for name in embed.keep if is_own_name(name, embed.output)), None):
        raise ConfigError(f"embed.keep={own}: OUT has a column of this name already; leave it out, or rename it in IN")
    if embed.output in ("substitutes", "surprisal"):
        if not source.has_softmax:
            raise FormatError(
                f"{source.path}: holds no softmax, so it gives no word a probability; embed.output={embed.output} "
                "needs the run or the checkpoint that it was exported from"
            )
        if is_hdf5:
            raise ConfigError(f"embed.output={embed.output} is written as Parquet; name a folder as OUT")
        _ = source.vocabulary  # raises an error where there is none
    elif source.config.input == "words" and source.words is None and source.model.token_embedder is None:
        raise ConfigError(f"{source.path}: a model with word input needs its vocabulary: init.vocab=FILE")
    return EmbedJob(
        source=str(absolute_or_none(init.source)),
        checkpoint=config.checkpoint,
        options=absolute_or_none(init.options),
        vocab=absolute_or_none(init.vocab),
        fingerprint=_fingerprint(source),
        shard_folder=str(shard_folder),
        is_hdf5=is_hdf5,
        output=embed.output,
        layers=embed.layers,
        dtype=embed.dtype,
        precision=embed.precision,
        carry=embed.state == "carry",
        keep=embed.keep,
        k=embed.k,
        batch_positions=embed.batch_positions,
        on_error=config.data.on_error,
        device="cpu",
        form={
            **describe_tokenizer(form.tokenizer or NONE, form.language, form.normalize),
            "format": form.format,
            "column": form.column,
        },
    )


def _is_hdf5(config: EmbedConfig, out: Path) -> bool:
    if config.embed.format != "auto":
        return config.embed.format == "hdf5"
    suffix = out.suffix.lower()
    if suffix in _NOT_WRITTEN:
        raise ConfigError(
            f"out={out}: {suffix} files are not written; OUT is a file that ends in .hdf5, or a folder of Parquet files"
        )
    return suffix in (".hdf5", ".h5")


def _fingerprint(source: Source) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(source.model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
    if source.model.token_embedder is not None:
        digest.update(repr(sorted(source.model.token_embedder.characters.items())).encode())
    if source.words is not None:
        digest.update(source.words.sha256.encode())
    return digest.hexdigest()


def _embed_tokens(config: EmbedConfig, source: Source, out: Path, flags: Flags) -> EmbedResult:
    if flags.dry_run:
        raise ConfigError("embed.tokens is done at once; there is nothing to plan")
    if out.exists() and not (flags.fresh or flags.resume):
        raise ConfigError(f"out={out}: is there already; --fresh replaces it")
    start = time.monotonic()
    source.model.to(TORCH_NAMES[local_device(config.cluster)])
    words = write_token_vectors(source, str(config.embed.tokens), out, config.embed.precision)
    return EmbedResult({"out": str(out), "words": words, "seconds": time.monotonic() - start})


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_verb("embed", EmbedConfig, run, argv)
