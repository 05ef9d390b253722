"""Processes that send a run to its trackers while the driver of the run works, and a little longer."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from elmo_ray.config.training import SENT_TO
from elmo_ray.storage import at_once, base_name
from elmo_ray.storage.local_copy import local_copy_of, uri_of
from elmo_ray.trackers.sender import COPIED, FOLDER, unsent

logger = logging.getLogger(__name__)

LAST_S = 30.0
"""Seconds, at most, for which the end of a run waits for its trackers."""

_PACKAGES = Path(__file__).resolve().parents[2]


class Senders:
    """Processes of one run, one for each tracker. outcome: of the run, `finished`, `stopped` or `failed`."""

    def __init__(self, run_dir: Path, name: str, trackers: Sequence[str]) -> None:
        self.run_dir, self.outcome = run_dir, "failed"
        self._reasons: dict[str, str] = {}
        self._left = False
        self._processes: dict[str, subprocess.Popen[str]] = {}
        for tracker in trackers:
            try:
                self._processes[tracker] = self._start(tracker, name)
            except OSError as error:
                logger.warning("%s: nothing is sent: its process cannot be started (%s)", tracker, error)

    def _start(self, tracker: str, name: str) -> subprocess.Popen[str]:
        logs = self.run_dir / FOLDER
        logs.mkdir(parents=True, exist_ok=True)
        paths = [str(_PACKAGES), *filter(None, [os.environ.get("PYTHONPATH")])]
        # W&B's library would use the process that another use of it has started in this one
        environment = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
        with open(logs / f"{tracker}.err", "a", encoding="utf-8") as errors:
            process = subprocess.Popen(
                [sys.executable, "-m", "elmo_ray.trackers", str(self.run_dir), tracker, name],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**environment, "PYTHONPATH": os.pathsep.join(paths)},
                start_new_session=True,  # Ctrl-C in a terminal is for the driver; with W&B's own process it is a group
            )
        threading.Thread(target=self._listen, args=(tracker, process), name=tracker, daemon=True).start()
        return process

    def _listen(self, tracker: str, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            level, _, message = line.rstrip().partition(" ")
            if level == "REASON":
                self._reasons[tracker] = message
            elif level in ("INFO", "WARNING"):  # the libraries write to stdout as well
                logger.log(getattr(logging, level), "%s", message)

    def leave(self) -> None:
        """Tell the processes the outcome, and let them send the rest; they end by themselves within LAST_S."""
        self._left = True
        for process in self._processes.values():
            with contextlib.suppress(OSError):  # of a process that has died
                assert process.stdin is not None
                process.stdin.write(self.outcome + "\n")
                process.stdin.close()

    def close(self) -> None:
        """Let the processes send the rest, for LAST_S at most, and log a line for each that could not."""
        if self._left:
            return
        self.leave()
        deadline = time.monotonic() + LAST_S
        for tracker, process in self._processes.items():
            try:
                code: int | None = process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                code = None
            with contextlib.suppress(OSError):  # it, and what W&B's library has started
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if code != 0:
                self._tell(tracker, code)

    def _tell(self, tracker: str, code: int | None) -> None:
        why = f"its process ended with exit code {code}, see {self.run_dir / FOLDER / tracker}.err"
        if code in (None, 3):
            why = f"it did not take it in {LAST_S:.0f} s"
        records, files = unsent(self.run_dir, tracker)
        what = f"{records:,} records and {files} files are" if records or files else "the end of the run is"
        logger.warning(
            "%s: %s not sent (%s); to send them: python -m elmo_ray.report %s to=%s",
            tracker, what, self._reasons.get(tracker, why), uri_of(self.run_dir), tracker,
        )  # fmt: skip


@contextlib.contextmanager
def following(run_dir: str, report_to: Sequence[str] | None, name: str | None = None) -> Iterator[Senders]:
    """Send the run of a folder or URI to its trackers while this context lasts.

    report_to: `run.report_to`. name: of the run in the trackers; None: that of its folder. The outcome is `failed` if
    an error ends the context, and else `finished`, unless the block has set another. Never raises an error of a
    tracker.
    """
    trackers = [name for name in SENT_TO if name in (report_to or ())]
    copy = local_copy_of(run_dir)
    if trackers:
        with contextlib.suppress(OSError), at_once():
            copy.pull(*COPIED)
    senders = Senders(copy.folder, name or base_name(run_dir), trackers)
    if trackers:
        copy.keep_pushing(f"{FOLDER}/*")
    try:
        senders.outcome = "finished"
        yield senders
    except BaseException as error:
        senders.outcome = "failed"
        if isinstance(error, KeyboardInterrupt):  # whoever asks for the end at once does not wait for a tracker
            senders.leave()
        raise
    finally:
        senders.close()
        if trackers:
            with contextlib.suppress(OSError), at_once():
                copy.push(*COPIED)
