"""Trace of some training steps (`train.profile`) by torch.profiler, in a file that Perfetto and Chrome open."""

from __future__ import annotations

import gzip
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from elmo_ray import storage
from elmo_ray.errors import DataError
from elmo_ray.storage.files import write_aside
from elmo_ray.storage.local_copy import uri_of
from elmo_ray.training.feeding import ReadyBatch
from elmo_ray.training.snapshot import Progress

FOLDER = "profile"
"""Folder of a run that holds the traces."""


def no_trace(first: int, last: int, done: int, total: int) -> str | None:
    """Return the line for a start whose steps, `done` + 1 to `total`, are not all those of `train.profile`."""
    setting = f"train.profile=[{first}, {last}]"
    if first > total:
        return f"{setting}: the run ends at step {total}, so there is no trace"
    if last <= done:
        return f"{setting}: these steps are done, so there is no trace"
    begin, end = max(first, done + 1), min(last, total)
    return f"{setting}: the trace has steps {begin} to {end}" if (begin, end) != (first, last) else None


class TracedSteps:
    """Function that runs a step as the given one does, and traces those from `first` to `last`, counted from 1.

    tell: called with a line when the trace is written. seconds: that writing took, since this was last set to 0.
    """

    def __init__(
        self,
        train_on: Callable[[ReadyBatch], None],
        progress: Progress,
        first: int,
        last: int,
        run_dir: Path,
        tell: Callable[[str], None],
    ) -> None:
        self._train_on, self._progress, self._first, self._last = train_on, progress, first, last
        self._folder, self._tell = run_dir / FOLDER, tell
        self._profile: Any = None
        self._begin = 0
        self.seconds = 0.0

    def __call__(self, ready: ReadyBatch) -> None:
        number = self._progress.step + 1
        if not self._first <= number <= self._last:
            self._train_on(ready)
            return
        if self._profile is None:
            self._profile, self._begin = _profile(), number
            self._profile.start()
        with record_function(f"step {number}"):
            self._train_on(ready)
        if number == self._last:
            self.close()

    def close(self) -> None:
        """Write the trace if one was begun."""
        if self._profile is None:
            return
        start = time.monotonic()
        traced, self._profile = self._profile, None
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        traced.stop()
        path = self._folder / f"steps-{self._begin}-{self._progress.step}.json.gz"
        plain = path.with_suffix(".part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            traced.export_chrome_trace(str(plain))
            write_aside(path, gzip.compress(plain.read_bytes(), 6))
            place = storage.join(uri_of(self._folder.parent), FOLDER, path.name)
            self._tell(f"trace of steps {self._begin} to {self._progress.step}, for https://ui.perfetto.dev: {place}")
        except (OSError, RuntimeError, DataError) as error:
            self._tell(f"the trace of train.profile cannot be written ({error}); training goes on")
        finally:
            plain.unlink(missing_ok=True)
        self.seconds += time.monotonic() - start


def _profile() -> Any:
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    try:
        # the two directions of the LSTM run in threads of their own
        from torch._C._profiler import _ExperimentalConfig

        return profile(activities=activities, experimental_config=_ExperimentalConfig(profile_all_threads=True))
    except (ImportError, TypeError):  # of an older version of torch
        return profile(activities=activities)
