"""Checkpoints while training goes on: ranks write, agree, commit, register, and keep the best."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from elmo_ray.errors import CheckpointError, TrainingError
from elmo_ray.training.checkpoint import Checkpoint, CheckpointWriter, commit, copy_best, directory_name, discard, prune
from elmo_ray.training.exchange import Flags
from elmo_ray.training.ranks import Ranks

logger = logging.getLogger(__name__)

FAILURES_IN_A_ROW = 5
"""Checkpoints that may fail one after another before training stops: by then storage is gone, not busy."""


def next_attempt(run_dir: Path) -> int:
    """Number of this start of a run: one more than any that left metrics or a checkpoint."""
    names = [path.stem for folder in ("metrics", "checkpoints") for path in (run_dir / folder).glob("*attempt-*")]
    numbers = [int(digits) for name in names if (digits := name.rsplit("attempt-", 1)[1]).isdigit()]
    return max(numbers, default=0) + 1


@dataclass
class _Save:
    number: int
    step: int
    directory: Path
    fields: Mapping[str, Any]
    best: bool


class Saver:
    """One save at a time; every method is called by all ranks at the same step.

    register: called on all ranks with (step, path, metrics) of a committed checkpoint. keep: checkpoints to keep,
    None where somebody else (Ray) deletes them.
    """

    def __init__(
        self,
        run_dir: Path,
        attempt: int,
        ranks: Ranks,
        keep: int | None,
        register: Callable[[int, str, dict[str, Any]], None],
    ):
        self.folder = run_dir / "checkpoints"
        self.best_folder = run_dir / "best"
        self.attempt, self.ranks, self.keep, self.register = attempt, ranks, keep, register
        self.writer = CheckpointWriter(ranks.rank)
        self.last: Checkpoint | None = None
        self.last_step: int | None = None
        self._save: _Save | None = None
        self._number = 0
        self._failures = 0
        self._best_thread: threading.Thread | None = None

    @property
    def busy(self) -> bool:
        return self._save is not None

    def part(self) -> int:
        """This rank's entry in `Flags.parts`. Called from the loader thread."""
        save, state = self._save, self.writer.state
        if save is None or state not in ("written", "failed"):
            return 0
        return save.number if state == "written" else -save.number

    def start(
        self,
        step: int,
        tensors: Mapping[str, Mapping[str, Tensor]],
        texts: Mapping[str, str],
        fields: Mapping[str, Any],
        best: bool,
    ) -> None:
        """Copy to host memory and write in the background. Not while `busy`."""
        self._join_best()
        self._number += 1
        directory = self.folder / directory_name(step, self.attempt)
        self.writer.reset()
        save = _Save(self._number, step, directory, {**fields, "step": step}, best)
        self.writer.start(directory, tensors, texts)
        self._save = save

    def poll(self, flags: Flags) -> None:
        """Commit when the flags of this step say that all ranks have ended their writing."""
        if self._save is not None and flags.all_ended(self._save.number):
            self._end(flags.all_written(self._save.number))

    def finish(self) -> None:
        """Wait for a save that is under way, and for the copy of the best."""
        if self._save is not None:
            self.writer.wait()
            states = self.ranks.all(self.part())
            self._end(all(p > 0 for p in states))
        self._join_best()

    def _end(self, written: bool) -> None:
        save = self._save
        assert save is not None
        self._save = None
        problem = None if written else str(self.writer.error or "another worker could not write its part")
        if self.ranks.rank == 0 and written:
            try:
                self.last = commit(save.directory, self.ranks.world, save.fields)
            except (CheckpointError, OSError) as error:
                problem = str(error)
        problems = [p for p in self.ranks.all(problem) if p]
        if problems:
            self._failures += 1
            if self.ranks.rank == 0:
                discard(save.directory)
                logger.warning(
                    "step %d: the checkpoint could not be written (%s); training goes on, older checkpoints are "
                    "untouched (failure %d of %d)",
                    save.step,
                    problems[0],
                    self._failures,
                    FAILURES_IN_A_ROW,
                )
            if self._failures >= FAILURES_IN_A_ROW:
                raise TrainingError(
                    f"step {save.step}: {self._failures} checkpoints in a row could not be written: "
                    f"{problems[0]}; the last good one is {self.last_step or 'none'}"
                )
            return
        self._failures = 0
        self.last_step = save.step
        metrics = {"step": save.step}
        self.register(save.step, str(save.directory), metrics)
        if self.ranks.rank == 0:
            if save.best:
                self._best_thread = threading.Thread(
                    target=self._copy_best, args=(self.last,), name="copy-best", daemon=True
                )
                self._best_thread.start()
            if self.keep is not None:
                prune(self.folder, self.keep, protect=[save.directory])

    def _copy_best(self, checkpoint: Checkpoint) -> None:
        try:
            copy_best(checkpoint, self.best_folder)
        except (CheckpointError, OSError) as error:
            logger.warning(
                "step %d is the best so far, but could not be copied to %s: %s",
                checkpoint.step,
                self.best_folder,
                error,
            )

    def _join_best(self) -> None:
        if self._best_thread is not None:
            self._best_thread.join()
            self._best_thread = None
