"""`export`: write a model as bilm-tf's weights.hdf5 with options.json and vocab.txt, read back and compared.

    python -m elmo_ray.export SOURCE OUT [key.path=value ...] [--json FILE]

With export.format=checkpoint it writes an elmo_ray checkpoint instead, with weights, softmax and optimizer slots as far
as the SOURCE has them; with safetensors a folder for the Hub (`checkpoints.hub`), with a model card. A Ray task does it
in a Ray job, or if RAY_ADDRESS names a cluster; otherwise this process.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from elmo_ray import __version__
from elmo_ray.checkpoints.bilm_tf.hdf5 import obstacles, same_weights, write_weights
from elmo_ray.checkpoints.bilm_tf.options import to_options
from elmo_ray.checkpoints.hub import CARD, HUB_CONFIG, HUB_WEIGHTS, MODEL_TYPE, read_hub_config
from elmo_ray.checkpoints.identity import identity
from elmo_ray.checkpoints.manifest import MANIFEST
from elmo_ray.checkpoints.model_card import model_card
from elmo_ray.checkpoints.read import open_checkpoint
from elmo_ray.checkpoints.source import BEST, OPTIONS, VOCABULARY, WEIGHTS, Source, open_source
from elmo_ray.checkpoints.write import copy_best
from elmo_ray.cluster.session import check_room, in_cluster
from elmo_ray.cluster.tasks import run_tasks
from elmo_ray.config import ExportConfig, PretrainConfig
from elmo_ray.config.command_line import Flags, run_verb
from elmo_ray.config.schema import flatten, show
from elmo_ray.data.vocabulary import Vocabulary
from elmo_ray.elmo.encoder import embed_sentences
from elmo_ray.errors import CheckpointError, ConfigError, DataError, FormatError, short
from elmo_ray.model.bilm import BiLM
from elmo_ray.storage import absolute, absolute_or_none
from elmo_ray.storage.files import write_json
from elmo_ray.storage.local_copy import local_folder, push
from elmo_ray.training.initialize import write_initial

logger = logging.getLogger("elmo_ray.export")  # __name__ is __main__ as a command

SENTENCES = (
    "the quick brown fox jumps over the lazy dog .",
    "Nobody expected antidisestablishmentarianism , naïveté or 東京 in one sentence ; it came nevertheless !",
    "",
    "yes",
    "a line of <S> markers </S> and of <UNK> words , 3.14 times",
)
"""Sentences that the model and the exported file embed for comparison, with carried states; own writing."""

_TOLERANCE = 1e-6


@dataclass(frozen=True)
class ImportResult:
    """Checkpoint that was written. has_softmax, has_slots: True if the source, and so the checkpoint, has them."""

    source: str
    out_dir: Path
    bytes: dict[str, int]
    has_softmax: bool
    has_slots: bool

    def summary(self) -> str:
        files = ", ".join(f"{name} {size:,} bytes" for name, size in self.bytes.items())
        has = [f"{'with' if there else 'without'} {what}" for what, there in self._components()]
        return f"source: {self.source}\n{self.out_dir}: {files}\ncheckpoint {', '.join(has)}; verified by its hashes"

    def to_dict(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "out": str(self.out_dir),
            "bytes": self.bytes,
            **{what.replace(" ", "_"): there for what, there in self._components()},
        }

    def _components(self) -> list[tuple[str, bool]]:
        return [("softmax", self.has_softmax), ("optimizer slots", self.has_slots)]


def import_checkpoint(
    source: str | os.PathLike[str] | None,
    out_dir: str | os.PathLike[str] | None,
    checkpoint: str = BEST,
    options: str | None = None,
    vocab: str | None = None,
) -> ImportResult:
    """Write a SOURCE of any kind as a checkpoint folder `out_dir`; the other arguments are those of `open_source`.

    A checkpoint of elmo_ray is copied unchanged. Raises ConfigError if `out_dir` holds something else, CheckpointError
    if it cannot be written, and the errors of `open_source`.
    """
    if out_dir is None:
        raise ConfigError("out is empty: name the folder to write")
    target = Path(os.path.abspath(os.path.expanduser(out_dir)))
    if target.exists() and not (target / MANIFEST).is_file() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"out={out_dir}: exists and is no checkpoint; name a new folder")
    opened = open_source(source, checkpoint, options, vocab).with_word_table()
    save_as_checkpoint(opened, target)
    written = open_checkpoint(target)
    sizes = {name: int(entry["size"]) for name, entry in written.manifest["files"].items()}
    logger.info("written to %s", target)
    return ImportResult(opened.describe(), target, sizes, opened.has_softmax, opened.slots is not None)


def save_as_checkpoint(source: Source, target: Path) -> None:
    """Write the source as a checkpoint folder, which replaces a checkpoint that is there."""
    if (source.path / MANIFEST).is_file():
        if source.path == target:
            raise ConfigError(f"out={target}: is the SOURCE itself")
        try:
            copy_best(open_checkpoint(source.path, verify=False), target)
        except OSError as error:
            raise CheckpointError(f"{target}: cannot be written ({error.strerror or error})") from None
        return
    config = PretrainConfig.from_dict(
        {
            "data": {"streams": 1},
            "model": source.config.to_dict(),
            "softmax": source.softmax.to_dict(),
        }
    )
    words = source.vocabulary
    about = identity(config, "", words.sha256) | {"data.train": f"unknown: imported from {source.path.name}"}
    slots = None if source.slots is None else source.slots()
    write_initial(
        target, config, words, source.model, slots, about, source.step or 0, {"imported_from": str(source.path)}
    )


@dataclass(frozen=True)
class ExportResult:
    """Files that were written, and a comparison of the model that they hold.

    bytes: the size of each file. difference: the largest one between embeddings of the two models. obstacles: for
    bilm-tf and AllenNLP the reasons why they cannot load the files, none if they can.
    """

    source: str
    out_dir: str
    bytes: dict[str, int]
    difference: float
    obstacles: dict[str, list[str]]

    @property
    def loads_in(self) -> list[str]:
        return [program for program, reasons in self.obstacles.items() if not reasons]

    def summary(self) -> str:
        files = ", ".join(f"{name} {size:,} bytes" for name, size in self.bytes.items())
        lines = [
            f"source: {self.source}",
            f"{self.out_dir}: {files}",
            "read back: weights equal bit for bit, same options and vocabulary, "
            f"embeddings of {len(SENTENCES)} sentences differ by {self.difference:.1g} at most",
        ]
        lines += [
            f"{program}: can load it" if not reasons else f"{program}: cannot load it: {'; '.join(reasons)}"
            for program, reasons in self.obstacles.items()
        ]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "out": self.out_dir,
            "bytes": self.bytes,
            "largest_difference": self.difference,
            "loads_in": self.loads_in,
            "obstacles": self.obstacles,
        }


def run(config: ExportConfig, flags: Flags | None = None) -> ExportResult | ImportResult | HubResult:
    """Export the SOURCE to OUT. Raises an ElmoRayError if it cannot be opened, written, or loaded by any program."""
    if config.out is None:
        raise ConfigError("out is empty: name the folder to write")
    if config.cluster.workers > 1:
        raise ConfigError(f"cluster.workers={config.cluster.workers}: export is one task; set 1, or 0 for this process")
    init = config.init
    work: Any = export_model
    if config.export.format == "checkpoint":
        work = import_checkpoint
    elif config.export.format == "safetensors":
        work = export_hub_folder
    # Absolute, as a task has another working folder.
    places = [absolute_or_none(path) for path in (init.source, config.out, init.options, init.vocab)]
    arguments = (places[0], places[1], config.checkpoint, places[2], places[3])
    if config.cluster.workers == 0 or not in_cluster():
        return work(*arguments)
    cluster = config.cluster
    check_room(cluster, 1)
    results: Iterator[tuple[int, ExportResult | ImportResult | HubResult]] = run_tasks(
        lambda arguments: work(*arguments),
        [arguments],
        workers=1,
        cpus=cluster.cpus_per_worker,
        max_failures=cluster.max_failures,
    )
    return dict(results)[0]


@dataclass(frozen=True)
class HubResult:
    """Folder for the Hub that was written. bytes: the size of each file. has_softmax: True if it can be evaluated."""

    source: str
    out_dir: str
    bytes: dict[str, int]
    has_softmax: bool

    def summary(self) -> str:
        files = ", ".join(f"{name} {size:,} bytes" for name, size in self.bytes.items())
        upload = f"upload it with: hf upload OWNER/NAME {self.out_dir}"
        return f"source: {self.source}\n{self.out_dir}: {files}\nread back: weights equal bit for bit\n{upload}"

    def to_dict(self) -> dict[str, Any]:
        return {"source": self.source, "out": self.out_dir, "bytes": self.bytes, "softmax": self.has_softmax}


def export_hub_folder(
    source: str | os.PathLike[str] | None,
    out_dir: str | os.PathLike[str] | None,
    checkpoint: str = BEST,
    options: str | None = None,
    vocab: str | None = None,
) -> HubResult:
    """Write a folder for the Hub: model.safetensors, config.json, vocab.txt and README.md, a model card.

    The arguments are those of `export_model`. The files are written aside, read back and compared before they take
    their names. A README.md that is there is kept. Raises ConfigError if `out_dir` holds a model of another program,
    FormatError if the comparison fails, DataError if the files cannot be written, and the errors of `open_source`.
    """
    if out_dir is None:
        raise ConfigError("out is empty: name the folder to write")
    opened = open_source(source, checkpoint, options, vocab)
    _ = opened.vocabulary  # raises an error where there is none, before anything is written
    place = absolute(out_dir)
    target = local_folder(place)
    if opened.path.parent == target:
        raise ConfigError(f"out={out_dir}: is the SOURCE itself")
    _check_target(target, out_dir)
    theirs = [name for name in (HUB_WEIGHTS, HUB_CONFIG) if (target / name).exists()]
    if theirs and not _is_ours(target):
        raise ConfigError(f"out={out_dir}: has {' and '.join(theirs)} of another program; name a new folder")
    names = [VOCABULARY, CARD, HUB_CONFIG, HUB_WEIGHTS]
    if (target / CARD).exists():
        names.remove(CARD)  # somebody may have written in it
        logger.warning("%s: the model card that is there is kept; remove it for a new one", target / CARD)
    with _folder_aside(target) as aside:
        _write_hub_files(opened, aside)
        _check_vocabulary_there(target, aside, (HUB_WEIGHTS, HUB_CONFIG))
        sizes = {name: (aside / name).stat().st_size for name in reversed(names)}
        # The weights go first and come last, so that they never stand beside the settings of another model.
        (target / HUB_WEIGHTS).unlink(missing_ok=True)
        for name in names:
            os.replace(aside / name, target / name)
    try:
        push(target)
    except OSError as error:
        raise DataError(f"out={place}: cannot be written ({error.strerror})") from None
    logger.info("exported to %s, for the Hub", place)
    return HubResult(opened.describe(), place, sizes, opened.has_softmax)


def _write_hub_files(source: Source, folder: Path) -> None:
    """Write the files of a folder for the Hub, read them back and compare. Raises FormatError if they differ."""
    words = source.vocabulary
    about = {
        "model_type": MODEL_TYPE,
        "elmo_ray_version": __version__,
        "model": source.config.to_dict(),
        "softmax": source.softmax.to_dict(),
        "vocabulary_size": words.size,
        "vocabulary_sha256": words.sha256,
        "step": source.step,
    }
    tensors = {name: tensor.contiguous().clone() for name, tensor in source.model.state_dict().items()}
    save_file(tensors, folder / HUB_WEIGHTS, metadata={"format": "pt"})
    (folder / HUB_WEIGHTS).chmod(0o666 & ~_umask())  # safetensors makes files that only their owner can read
    write_json(folder / HUB_CONFIG, about, DataError)
    words.write(folder / VOCABULARY)
    (folder / CARD).write_text(model_card(source), encoding="utf-8")
    back = open_source(folder)
    saved = back.model.state_dict()
    if saved.keys() != tensors.keys() or not all(torch.equal(saved[name], tensors[name]) for name in tensors):
        raise FormatError(f"{folder}: read back, the weights differ from the model; not exported")
    if back.config != source.config or back.vocabulary.sha256 != words.sha256:
        raise FormatError(f"{folder}: read back, it describes another model; not exported")


def _check_target(target: Path, out: str | os.PathLike[str]) -> None:
    """Raise ConfigError for an OUT whose name is a file's, or in which a run or a checkpoint keeps its own files."""
    if target.suffix in (".hdf5", ".h5", ".zip", ".tar", ".gz", ".json"):
        raise ConfigError(
            f"out={out}: OUT is a folder, into which {WEIGHTS} and other files are written; name a folder"
        )
    if (target / MANIFEST).exists() or (target / "checkpoints").is_dir() or (target / BEST).is_dir():
        raise ConfigError(
            f"out={out}: is a run or a checkpoint; name a folder for the export alone, such as {out}/export"
        )


def _is_ours(target: Path) -> bool:
    """Return True for a folder for the Hub that an earlier export has written, whole or stopped at its end."""
    try:
        return read_hub_config(target).get("model_type") == MODEL_TYPE
    except FormatError:
        return False


def _check_vocabulary_there(target: Path, aside: Path, beside: Sequence[str]) -> None:
    """Raise ConfigError if a vocabulary would be replaced that stands alone: it is a user's own, and no export's."""
    theirs = target / VOCABULARY
    if any((target / name).exists() for name in beside) or not theirs.exists():
        return
    if theirs.read_bytes() != (aside / VOCABULARY).read_bytes():
        raise ConfigError(f"out={target}: has a {VOCABULARY} of its own, which would be replaced; name a new folder")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def export_model(
    source: str | os.PathLike[str] | None,
    out_dir: str | os.PathLike[str] | None,
    checkpoint: str = BEST,
    options: str | None = None,
    vocab: str | None = None,
) -> ExportResult:
    """Write weights.hdf5, options.json and vocab.txt into `out_dir`; the other arguments are those of `open_source`.

    The files are written aside and read back before they take their names: weights are compared bit for bit, and a few
    sentences are embedded with both models. Raises FormatError for a model that neither bilm-tf nor AllenNLP can load,
    or if the comparison fails; DataError if the files cannot be written; and the errors of `open_source`.
    """
    if out_dir is None:
        raise ConfigError("out is empty: name the folder to write")
    opened = open_source(source, checkpoint, options, vocab).with_word_table()
    reasons = obstacles(opened.config)
    if all(reasons.values()):
        why = "; ".join(f"{program}: {', '.join(each)}" for program, each in reasons.items())
        raise FormatError(f"{opened.path}: not exported, as neither program could load it ({why})")
    place = absolute(out_dir)
    target = local_folder(place)
    _check_target(target, out_dir)
    with _folder_aside(target) as aside:
        _write(opened, aside)
        difference = _compare(opened, aside)
        _check_vocabulary_there(target, aside, (WEIGHTS, OPTIONS))
        sizes = {name: (aside / name).stat().st_size for name in (WEIGHTS, OPTIONS, VOCABULARY)}
        # weights.hdf5 goes first and comes last, so that it never stands beside the options of another model.
        (target / WEIGHTS).unlink(missing_ok=True)
        for name in (VOCABULARY, OPTIONS, WEIGHTS):
            os.replace(aside / name, target / name)
    try:
        push(target)
    except OSError as error:
        raise DataError(f"out={place}: cannot be written ({error.strerror})") from None
    result = ExportResult(opened.describe(), place, sizes, difference, reasons)
    logger.info("exported to %s, for %s", place, " and ".join(result.loads_in))
    return result


@contextlib.contextmanager
def _folder_aside(target: Path) -> Iterator[Path]:
    """Yield an empty folder inside `target`, removed at the end, as is `target` if nothing was put into it.

    Raises DataError for a failure of the disk.
    """
    is_new = not target.exists()
    aside = target / f".export-{os.getpid()}"
    try:
        aside.mkdir(parents=True, exist_ok=True)
        yield aside
    except OSError as error:
        raise DataError(f"out={target}: cannot be written ({error.strerror or error})") from None
    finally:
        with contextlib.suppress(OSError):
            for path in aside.iterdir():
                path.unlink()
            aside.rmdir()
            if is_new:
                target.rmdir()  # fails unless it is empty


def _write(source: Source, folder: Path) -> None:
    training = source.training
    options = to_options(source.config, source.softmax, source.vocabulary.size)
    if training is not None:
        if isinstance(training.train.dropout, tuple):
            del options["dropout"]  # bilm-tf has one number for all places, and no wrong one may stand here
            logger.info("options.json has no dropout, as train.dropout=%s is by place", list(training.train.dropout))
        else:
            options["dropout"] = training.train.dropout
        options |= {
            "unroll_steps": training.train.unroll,
            "batch_size": training.data.streams,
            "all_clip_norm_val": training.optim.clip_norm,
        }
    write_weights(folder / WEIGHTS, source.model)
    write_json(folder / OPTIONS, options, DataError)
    source.vocabulary.write(folder / VOCABULARY)


def _compare(source: Source, folder: Path) -> float:
    """Read all files back; return the largest difference of the sentences' embeddings. Raises FormatError."""
    back = open_source(folder / WEIGHTS)
    different = same_weights(source.model, back.model)
    if different:
        raise FormatError(f"{folder}: read back, {', '.join(different)} differ from the model; not exported")
    if back.config != source.config:
        read, wanted = (flatten(model.to_dict(), "model.") for model in (back.config, source.config))
        lost = short(", ".join(f"{key}={show(value)}" for key, value in wanted.items() if read.get(key) != value), 200)
        raise FormatError(f"{folder}: read back, {OPTIONS} describes another model, without {lost}; not exported")
    if back.vocabulary.sha256 != source.vocabulary.sha256:
        raise FormatError(f"{folder}: read back, {VOCABULARY} has other words; not exported")
    ours, theirs = (_embed(model, source.vocabulary) for model in (source.model, back.model))
    difference = float(np.abs(ours - theirs).max())
    if not difference <= _TOLERANCE:
        raise FormatError(f"{folder}: read back, embeddings differ by {difference:.3g}; not exported")
    return difference


def _embed(model: BiLM, vocabulary: Vocabulary) -> np.ndarray:
    sentences = [sentence.split() for sentence in SENTENCES]
    return np.concatenate(list(embed_sentences(model, sentences, vocabulary, carry=True)), axis=1)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_verb("export", ExportConfig, run, argv)


if __name__ == "__main__":
    sys.exit(main())
