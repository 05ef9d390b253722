"""Checkpoints while training goes on: ranks write, agree, commit, register, and keep the best.

Training waits for the copy to host memory and for nothing else. What follows runs in threads, and moves on when the
flags that ranks exchange each step say so, so that all ranks see it at the same step:
writing (every rank its part) -> committing (rank 0 the manifest) -> registered -> tidying (rank 0 copies the best and
deletes old checkpoints) -> done.
"""

from __future__ import annotations

import contextlib
import logging
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
"""Checkpoints that may fail one after another before training stops: by then storage is gone, not busy."""


def claim_attempt(run_dir: Place) -> int:
    """Return the number of this start of a run: one more than any that left metrics or a checkpoint.

    Its metrics file exists then, so that no other start has the same number. Raises TrainingError where the run's
    folder cannot be written.
    """
    metrics, store = join(run_dir, "metrics"), store_of(run_dir)
    try:
        names = [name.removesuffix(".jsonl") for name in store.files(metrics)]
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

Phase = Literal["writing", "committing", "tidying"]


@dataclass
class _Save:
    number: int
    step: int
    directory: str
    fields: Mapping[str, Any]
    best: bool
    phase: Phase = "writing"
    started: float = field(default_factory=time.monotonic)
    warnings: int = 0

    def warn_if_slow(self) -> None:
        """A write that never returns, to a file server that is gone, would otherwise be silent."""
        waited = time.monotonic() - self.started
        if waited > WARN_AFTER_S * (self.warnings + 1):
            self.warnings += 1
            logger.warning("the checkpoint of step %d is in its phase %s for %.0f s", self.step, self.phase, waited)


class Saver:
    """One save at a time; every method is called by all ranks at the same step, but for `flags`.

    register: called on all ranks with (step, path, metrics) of a committed checkpoint. keep: checkpoints to keep.
    damaged: checkpoints that were found damaged at the start. last, last_step: the newest checkpoint (rank 0 only) and
    its step. best_lost: the newest save of a best failed.
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
        self.clerk = CheckpointWriter(ranks.rank)  # of rank 0: commits and tidies
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
        return self._save is not None

    @property
    def saving_best(self) -> bool:
        return self._save is not None and self._save.best

    def flags(self, stop: bool) -> Flags:
        """This rank's flags for the exchange. Called from the loader thread."""
        save = self._save
        if save is None:
            return Flags(stop, [0])
        # The phase first: it is set after the clerk's old state is cleared, so that what is said of a phase is of that
        # phase, and that of the phase before does no harm.
        phase = save.phase
        part, clerk = (_ended(writer, save.number) for writer in (self.writer, self.clerk))
        return Flags(stop, [part], clerk if phase == "committing" else 0, clerk if phase == "tidying" else 0)

    def start(
        self,
        step: int,
        tensors: Mapping[str, Mapping[str, Tensor]],
        texts: Mapping[str, str],
        fields: Mapping[str, Any],
        best: bool,
    ) -> None:
        """Copy to host memory and write in the background. Not while `busy`."""
        self._number += 1
        self.best_lost = False
        directory = join(self.folder, directory_name(step, self.attempt))
        self.writer.reset()
        save = _Save(self._number, step, directory, {**fields, "step": step}, best)
        self.writer.start(directory, tensors, texts)
        self._save = save

    def poll(self, flags: Flags) -> None:
        """Go on to the next phase when the flags of this step say that all ranks may."""
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
        elif abs(flags.tidied) == save.number:
            self._save = None

    def finish(self) -> None:
        """Wait until nothing of a save is under way."""
        while (save := self._save) is not None:
            mine = save.phase == "writing" or self.ranks.rank == 0
            thread = (self.writer if save.phase == "writing" else self.clerk) if mine else None
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

            self.clerk.reset()
            self.clerk.start_job(commit_it)
        save.phase = "committing"

    def _committed(self, save: _Save, well: bool) -> None:
        if not well:
            self._failed(save, self.clerk.error if self.ranks.rank == 0 else None)
            return
        self._failures = 0
        self.last_step = save.step
        self.register(save.step, str(save.directory), {"step": save.step})
        self.clerk.reset()
        save.phase = "tidying"
        if self.ranks.rank == 0:
            self.clerk.start_job(lambda: self._tidy(save))

    def _failed(self, save: _Save, error: Exception | None) -> None:
        self._save = None
        self._failures += 1
        self.best_lost = save.best
        if self.ranks.rank == 0:
            discard(save.directory)  # before the others go on, who may soon write there again
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

    def _tidy(self, save: _Save) -> None:
        if save.best and self.last is not None:
            self._best_due = self.last
        if self._best_due is not None:
            self.copy_to_best(self._best_due)
        protect = [save.directory] + ([self._best_due.place] if self._best_due is not None else [])
        prune(self.folder, self.keep, protect, self.damaged)

    def newest(self) -> str | None:
        """Rank 0: where the newest whole checkpoint of the run is, if it has one; the damaged ones are noted."""
        found = newest_checkpoint(self.folder, damaged=self.damaged)
        return None if found is None else found.place

    def restore_best(self, start: str, best_step: int | None) -> None:
        """Rank 0, when going on from `start`: a run that was killed between a save and the copy of it to `best/` makes
        the copy now."""
        if best_step is None:
            return
        for place in (self.best_folder, start, *checkpoints_of_step(self.folder, best_step)):
            with contextlib.suppress(CheckpointError):
                found = open_checkpoint(place, verify=False)
                if found.step == best_step:
                    found.verify(hashes=not is_uri(place))  # hashes would fetch all of it
                    if place != self.best_folder:
                        self.copy_to_best(found)
                    return

    def copy_to_best(self, checkpoint: Checkpoint) -> None:
        """Rank 0: make `best/` a copy of this checkpoint; a failure is a warning, and tried again after later saves."""
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
    return {"written": number, "failed": -number}.get(writer.state, 0)
