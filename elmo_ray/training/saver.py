"""Saving of checkpoints while training goes on: ranks write, agree, commit, register, and keep the best.

Training waits only for the copy of the tensors to host memory. The phases after it run in threads, and ranks exchange
flags in each step, so that all of them enter a phase at the same step:

    writing     every rank writes its files
    committing  rank 0 writes the manifest; then all ranks register the checkpoint
    cleaning    rank 0 copies the best checkpoint and removes old ones
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from torch import Tensor

from elmo_ray import storage
from elmo_ray.checkpoints.manifest import directory_name
from elmo_ray.checkpoints.read import Checkpoint, checkpoints_of_step, newest_checkpoint, open_checkpoint
from elmo_ray.checkpoints.stores import store_of
from elmo_ray.checkpoints.write import CheckpointWriter, commit, copy_best, discard, prune
from elmo_ray.errors import CheckpointError, TrainingError
from elmo_ray.storage import Place, is_uri, join
from elmo_ray.training.metrics import metrics_path
from elmo_ray.training.ranks import Flags, Ranks

logger = logging.getLogger(__name__)

FAILURES_IN_A_ROW = 5
"""Failed checkpoints in a row after which training stops: by then storage is gone, not busy."""


def claim_attempt(run_dir: Place) -> int:
    """Return the number of this start of a run: one more than the highest with metrics or a checkpoint in the run.

    Also makes the empty metrics file of this number, so that no other start takes it. Raises TrainingError where the
    run's folder cannot be written.
    """
    metrics, store = join(run_dir, "metrics"), store_of(run_dir)
    try:
        names = [os.path.splitext(name)[0] for name in store.files(metrics)]
        names += store.directories(join(run_dir, "checkpoints"))
        numbers = [int(digits) for name in names if (digits := name.rpartition("attempt-")[2]).isdigit()]
        attempt = max(numbers, default=0) + 1
        while True:
            try:
                storage.write_bytes(join(metrics, metrics_path("", attempt).name), b"", only_new=True)
                return attempt
            except FileExistsError:
                attempt += 1
    except OSError as error:
        raise TrainingError(f"{metrics}: cannot be written: {error.strerror or error}") from None
    except CheckpointError as error:
        raise TrainingError(str(error)) from None


WARN_AFTER_S = 300.0
"""Seconds of a save after which, and after each further time as long, a warning is logged."""

Phase = Literal["writing", "committing", "cleaning"]


@dataclass
class _Save:
    """Save that is under way. number: counts the saves of this process. fields: for the manifest. best: it is copied.

    started: time.monotonic() at its start, in seconds.
    """

    number: int
    step: int
    directory: str
    fields: Mapping[str, Any]
    best: bool
    phase: Phase = "writing"
    started: float = field(default_factory=time.monotonic)
    warnings: int = 0

    def warn_if_slow(self) -> None:
        """Log a warning every WARN_AFTER_S seconds."""
        # a write to a file server that is gone never returns, and would otherwise be silent
        waited = time.monotonic() - self.started
        if waited > WARN_AFTER_S * (self.warnings + 1):
            self.warnings += 1
            logger.warning("the checkpoint of step %d is in its phase %s for %.0f s", self.step, self.phase, waited)


class Saver:
    """Saver of one run's checkpoints, one at a time.

    All ranks call every method at the same step, except `flags` and the methods of rank 0.

    keep: number of checkpoints to keep. register: called on all ranks with (step, path, metrics) of each committed
    checkpoint. last, last_step: the newest checkpoint (on rank 0 only) and its step. damaged: places of checkpoints
    that were found damaged at the start. best_lost: True if the newest save of a best checkpoint failed.
    """

    def __init__(
        self,
        run_dir: Place,
        attempt: int,
        ranks: Ranks,
        keep: int,
        register: Callable[[int, str, dict[str, Any]], None],
    ):
        self.folder = join(run_dir, "checkpoints")
        self.best_folder = join(run_dir, "best")
        self.attempt, self.ranks, self.keep, self.register = attempt, ranks, keep, register
        self.writer = CheckpointWriter(ranks.rank)
        self.committer = CheckpointWriter(ranks.rank)  # used on rank 0 only: commits and cleans
        self.last: Checkpoint | None = None
        self.last_step: int | None = None
        self.best_lost = False
        self.damaged: list[Place] = []
        self._best_due: Checkpoint | None = None
        self._save: _Save | None = None
        self._number = 0
        self._failures = 0

    @property
    def busy(self) -> bool:
        """True while a save is under way."""
        return self._save is not None

    @property
    def saving_best(self) -> bool:
        """True while the save that is under way is one of a best checkpoint."""
        return self._save is not None and self._save.best

    def flags(self, stop: bool, wanted: bool = False) -> Flags:
        """Return this rank's flags for the exchange; called from the loader thread. wanted: a checkpoint is."""
        save = self._save
        if save is None:
            return Flags(stop, [0], save=wanted)
        # Read the phase first. The main thread clears the committer's state before it sets the next phase, so a state
        # that is read after the phase never belongs to an earlier one.
        phase = save.phase
        written, ended = (_ended(writer, save.number) for writer in (self.writer, self.committer))
        committed, cleaned = (ended if phase == name else 0 for name in ("committing", "cleaning"))
        return Flags(stop, [written], committed, cleaned, wanted)

    def start(
        self,
        step: int,
        tensors: Mapping[str, Mapping[str, Tensor]],
        texts: Mapping[str, str],
        fields: Mapping[str, Any],
        best: bool,
    ) -> None:
        """Copy the tensors to host memory, and write them and the texts in the background. Not while `busy`.

        tensors: file name -> tensor name -> tensor. texts: file name -> text. fields: more values for the manifest.
        best: copy the checkpoint to `best/` when it is committed.
        """
        self._number += 1
        self.best_lost = False
        directory = join(self.folder, directory_name(step, self.attempt))
        self.writer.reset()
        save = _Save(self._number, step, directory, {**fields, "step": step}, best)
        self.writer.start(directory, tensors, texts)
        self._save = save

    def poll(self, flags: Flags) -> None:
        """Enter the next phase if the combined flags of this step allow it."""
        save = self._save
        if save is None:
            return
        save.warn_if_slow()
        if save.phase == "writing":
            if flags.all_ended(save.number):
                self._written(save, flags.all_written(save.number))
        elif save.phase == "committing":
            if abs(flags.committed) == save.number:
                self._committed(save, flags.committed > 0)
        elif abs(flags.cleaned) == save.number:
            self._save = None

    def finish(self) -> None:
        """Wait for the end of the save that is under way, through all of its phases."""
        while (save := self._save) is not None:
            mine = save.phase == "writing" or self.ranks.rank == 0
            thread = (self.writer if save.phase == "writing" else self.committer) if mine else None
            self.ranks.wait_until(partial(_is_done, thread, save))
            well = all(self.ranks.gather(thread is None or thread.state == "written"))
            if save.phase == "writing":
                self._written(save, well)
            elif save.phase == "committing":
                self._committed(save, well)
            else:
                self._save = None

    def _written(self, save: _Save, well: bool) -> None:
        if not well:
            self._failed(save, self.writer.error)
            return
        if self.ranks.rank == 0:

            def commit_it() -> None:
                self.last = commit(save.directory, self.ranks.world, save.fields)

            self.committer.reset()
            self.committer.start_job(commit_it)
        save.phase = "committing"

    def _committed(self, save: _Save, well: bool) -> None:
        if not well:
            self._failed(save, self.committer.error if self.ranks.rank == 0 else None)
            return
        self._failures = 0
        self.last_step = save.step
        self.register(save.step, str(save.directory), {"step": save.step})
        self.committer.reset()
        save.phase = "cleaning"
        if self.ranks.rank == 0:
            self.committer.start_job(lambda: self._clean(save))

    def _failed(self, save: _Save, error: Exception | None) -> None:
        self._save = None
        self._failures += 1
        self.best_lost = save.best
        if self.ranks.rank == 0:
            discard(save.directory)  # before the other ranks go on, as they may soon write there again
        problems = [p for p in self.ranks.gather(None if error is None else str(error)) if p]
        problem = problems[0] if problems else "no reason given"
        if self.ranks.rank == 0:
            logger.warning(
                "step %d: the checkpoint could not be written (%s); training goes on, older checkpoints are "
                "untouched (failure %d of %d)",
                save.step,
                problem,
                self._failures,
                FAILURES_IN_A_ROW,
            )
        if self._failures >= FAILURES_IN_A_ROW:
            raise TrainingError(
                f"step {save.step}: {self._failures} checkpoints in a row could not be written: "
                f"{problem}; the last good one is {self.last_step or 'none'}"
            )

    def _clean(self, save: _Save) -> None:
        if save.best and self.last is not None:
            self._best_due = self.last
        if self._best_due is not None:
            self.copy_to_best(self._best_due)
        protect = [save.directory] + ([self._best_due.place] if self._best_due is not None else [])
        prune(self.folder, self.keep, protect, self.damaged)

    def newest(self) -> str | None:
        """Return the place of the run's newest whole checkpoint, or None; adds damaged ones to `damaged`. For rank 0.

        Raises CheckpointError where there are committed checkpoints and all are damaged.
        """
        found = newest_checkpoint(self.folder, damaged=self.damaged)
        return None if found is None else found.place

    def restore_best(self, start: str, best_step: int | None) -> None:
        """Copy the checkpoint of `best_step` to `best/` if it is not there. For rank 0, when it goes on from `start`.

        A run that was killed between a save and the copy of it to `best/` makes up for it in this way.
        """
        if best_step is None:
            return
        for place in (self.best_folder, start, *checkpoints_of_step(self.folder, best_step)):
            with contextlib.suppress(CheckpointError):
                found = open_checkpoint(place, verify=False)
                if found.step == best_step:
                    found.verify(hashes=not is_uri(place))  # to compare hashes, all of it would be fetched
                    if place != self.best_folder:
                        self.copy_to_best(found)
                    return

    def best_of_step(self, step: int | None) -> str | None:
        """Return the place of `best/` if it holds a whole checkpoint of this step, or None. For rank 0."""
        with contextlib.suppress(CheckpointError):
            found = open_checkpoint(self.best_folder, verify=False)
            if found.step == step:
                return str(self.best_folder)
        return None

    def copy_to_best(self, checkpoint: Checkpoint) -> None:
        """Make `best/` a copy of this checkpoint. For rank 0.

        A failure is logged as a warning, and the copy is tried again after each later save.
        """
        self._best_due = checkpoint
        try:
            copy_best(checkpoint, self.best_folder)
            self._best_due = None
        except (CheckpointError, OSError) as error:
            logger.warning(
                "step %d is the best so far, but could not be copied to %s: %s",
                checkpoint.step,
                self.best_folder,
                error,
            )


def _is_done(writer: CheckpointWriter | None, save: _Save) -> bool:
    save.warn_if_slow()
    return writer is None or writer.state in ("written", "failed")


def _ended(writer: CheckpointWriter, number: int) -> int:
    """Return the save's number when the writer is done, minus it when that failed, and 0 before."""
    return {"written": number, "failed": -number}.get(writer.state, 0)
