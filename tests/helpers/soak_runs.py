"""Runs of `pretrain` that are interrupted on purpose: commands as a user starts them, ways to kill them, and waiting.

Only processes that a command has started itself are ever touched: they carry a mark in their environment, which Ray
hands on to all of its own. Linux only.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from elmo_ray.checkpoints.read import listed_checkpoints, newest_checkpoint, open_checkpoint
from elmo_ray.training.metrics import MetricsFollower

MARK = "ELMO_RAY_SOAK"
MANIFEST = "manifest.json"
KINDS = ("worker", "driver", "sigterm", "save", "damage", "sigint", "start")
"""What `Soak.interrupt` can do."""
SIGNALS = {"sigterm": signal.SIGTERM, "sigint": signal.SIGINT}

_RESUMED = re.compile(r"start: resume from step (\d+) of")
_ENDING_S = 60  # for Ray's processes when their driver is gone
_AGENTS_S = 2


class SoakError(Exception):
    """A run did not do what it should have."""


class RunEnded(Exception):
    """The run came to its end before the interruption that was meant for it."""


class Command:
    """A `pretrain` command in a process of its own, and what it starts. stdout and stderr go to `log`."""

    def __init__(self, arguments: Sequence[str], log: Path) -> None:
        self.log, self.mark = log, secrets.token_hex(8)
        # A Ray cluster that was there before would not carry the mark, and would not end with its driver.
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        with open(log, "wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "elmo_ray.pretrain", *arguments],
                stdout=out,
                stderr=out,
                env={**environment, MARK: self.mark},
                start_new_session=True,  # Ctrl-C in the terminal is for the soak alone
            )

    def processes(self) -> dict[int, str]:
        """Process id -> title of the command and all that it has started, as far as they live."""
        needle, found = f"{MARK}={self.mark}".encode(), {}
        for entry in os.listdir("/proc"):
            try:
                if entry.isdigit() and needle in Path("/proc", entry, "environ").read_bytes().split(b"\0"):
                    title = Path("/proc", entry, "cmdline").read_bytes().split(b"\0")[0]
                    found[int(entry)] = os.path.basename(title.decode(errors="replace"))
            except OSError:  # it has ended, or is another user's
                continue
        return found

    def workers(self) -> dict[int, int]:
        """Rank -> process id of the training workers, known by the log file that each has open."""
        found = {}
        for pid, title in self.processes().items():
            if not title.startswith("ray::RayTrainWorker"):
                continue
            for link in Path("/proc", str(pid), "fd").iterdir():
                try:
                    match = re.search(r"/logs/worker-(\d+)\.log$", os.readlink(link))
                except OSError:
                    continue
                if match:
                    found[int(match[1])] = pid
        return found

    def gone(self, patience_s: float) -> tuple[float, list[str]]:
        """Wait until all processes have ended, and end those that do not; the seconds, and the titles of those.

        Ray's agents, which may outlive a killed driver by minutes, touch no run and are waited for a moment only.
        """
        start = time.monotonic()
        while True:
            self.process.poll()
            left, waited = self.processes(), time.monotonic() - start
            if not left:
                return waited, []
            of_ray = all(title.endswith("Agent") for title in left.values())
            if waited > (min(patience_s, _AGENTS_S) if of_ray else patience_s):
                break
            time.sleep(0.1)
        for pid in left:
            if pid in self.processes():  # and is still the same one
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        return waited, sorted(left.values())

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-3000:]


class Watch:
    """What a run says of itself in its metrics. step: of the newest record, back to the checkpoint's at each start.

    starts: how often workers began to train. trained: whether there is a train record since. repeated: steps done
    again, in all (as far as records tell: a step counts when its record was written).
    """

    def __init__(self, run_dir: Path) -> None:
        self._follower = MetricsFollower(run_dir)
        self.step = self.starts = self.resumed_from = self.repeated = 0
        self.trained = False

    def poll(self) -> None:
        for record in self._follower.poll():
            if record["kind"] == "train":
                self.step, self.trained = record["step"], True
            elif record["kind"] == "event" and record["message"].startswith("start:"):
                match = _RESUMED.match(record["message"])
                self.resumed_from = int(match[1]) if match else 0
                self.repeated += max(0, self.step - self.resumed_from)
                self.starts, self.step, self.trained = self.starts + 1, self.resumed_from, False


class Soak:
    """A run and its interruptions. arguments: of `pretrain`, without flags; run_dir: where that run will be.

    Leaving the context ends every process that was started in it.
    """

    def __init__(self, arguments: Sequence[str], run_dir: Path, seed: int = 0, patience_s: float = 300) -> None:
        self.arguments, self.run_dir, self.patience_s = list(arguments), run_dir, patience_s
        self.random = random.Random(seed)
        self.logs = run_dir.parent / f"{run_dir.name}-logs"
        self.logs.mkdir(parents=True, exist_ok=True)
        self.watch = Watch(run_dir)
        self.commands: list[Command] = []

    def __enter__(self) -> Soak:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for command in self.commands:
            command.gone(0)

    @property
    def command(self) -> Command:
        return self.commands[-1]

    # ---------------------------------------------------------------- from start to end

    def start(self) -> None:
        """Start the command, with --resume from the second time on."""
        flags = ["--resume"] if self.commands else []
        log = self.logs / f"start-{len(self.commands) + 1:03d}.log"
        self.commands.append(Command([*self.arguments, *flags], log))

    def trains(self, starts: int) -> None:
        """Wait until workers train that began after so many starts."""
        self._until(lambda: self.watch.starts > starts and self.watch.trained, "no training")

    def reach(self, step: int) -> None:
        """Wait for a step. Raises RunEnded where the run has finished."""
        self._until(lambda: self.watch.step >= step, f"step {step} was not reached")

    def finish(self) -> None:
        """Wait for the end of the run and of all its processes."""
        try:
            self._until(lambda: False, "the run did not end")
        except RunEnded:
            pass
        _, left = self.command.gone(_ENDING_S)
        if any(not title.endswith("Agent") for title in left):
            raise SoakError(f"the run has ended, but not its processes: {left}")

    def _until(self, done: Callable[[], bool], what: str, pause: float = 0.02) -> None:
        """Poll; with a new patience whenever the run has gone on."""
        seen, deadline = None, 0.0
        while True:
            self.watch.poll()
            if done():
                return
            code = self.command.process.poll()
            if code == 0:
                raise RunEnded(what)
            now = self.watch.starts, self.watch.step
            if seen != now:
                seen, deadline = now, time.monotonic() + self.patience_s
            if code is not None or time.monotonic() > deadline:
                ended = "" if code is None else f", the command ended with {code}"
                raise SoakError(f"{what} ({self.command.log}{ended}); its last lines:\n{self.command.tail()}")
            time.sleep(pause)

    # ---------------------------------------------------------------- interruptions

    def interrupt(self, kind: str) -> dict[str, Any]:
        """Interrupt the run in training, start it again where it has to be, wait until it trains: what happened.

        worker: kill -9 of one of them. driver: kill -9. sigterm: to all processes at once, as batch systems send it.
        sigint: to the driver. Both must end well. save: kill -9 of a worker or the driver (`save:worker`,
        `save:driver`: of that) while a checkpoint is being written. damage: while the driver is down after one of the
        others (or `damage:driver` and so on), a file of the newest checkpoint is damaged. start: kill -9 of the driver,
        and again while it is starting.

        `kind` of the result may be another one: what a `save` or `damage` that did not come about has been. Raises
        SoakError where the run does not go on, or goes on from anything but its newest whole checkpoint.
        """
        kind, _, by = kind.partition(":")
        ways = {"save": ["worker", "driver"], "damage": ["driver", "sigterm"], "start": ["driver"]}
        how = by or self.random.choice(ways.get(kind, [kind]))
        rank, pid = self._worker() if how == "worker" else (-1, self.command.process.pid)
        saving = self._save_begins() if kind == "save" else None
        if saving:
            time.sleep(self.random.uniform(0, 0.03))
        result = {"kind": kind, "step": self.watch.step, "victim": f"worker {rank}" if how == "worker" else how}
        repeated, starts, killed = self.watch.repeated, self.watch.starts, time.monotonic()
        for each in self.command.processes() if how == "sigterm" else [pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(each, SIGNALS.get(how, signal.SIGKILL))
        if saving is not None and (saving / MANIFEST).exists():
            result["kind"] = how
        if how != "worker":
            self._wait_down(how, result)
            if kind == "start":
                self.start()
                time.sleep(self.random.uniform(1, 25))
                killed = time.monotonic()
                self.command.process.kill()
                self._wait_down("driver", result)
            if kind == "damage" and not self._damage(result):
                result["kind"] = how
            newest = newest_checkpoint(self.run_dir / "checkpoints")
            self.watch.poll()
            starts = self.watch.starts
            self.start()
        self.trains(starts)
        result["seconds"] = round(time.monotonic() - killed, 1)
        result["resumed_from"] = self.watch.resumed_from
        result["steps_repeated"] = self.watch.repeated - repeated
        if how != "worker" and (newest.step if newest else 0) != self.watch.resumed_from:
            raise SoakError(f"{result}: the newest whole checkpoint was {newest and newest.path}")
        return result

    def _worker(self) -> tuple[int, int]:
        workers = self.command.workers()
        if not workers:
            raise SoakError(f"no worker has a log open among {sorted(self.command.processes().values())}")
        return self.random.choice(sorted(workers.items()))

    def _save_begins(self) -> Path:
        """The directory of a checkpoint that has just come into being."""
        folder, begun = self.run_dir / "checkpoints", []
        known = set(os.listdir(folder))

        def look() -> bool:
            for name in set(os.listdir(folder)) - known:
                known.add(name)
                if not (folder / name / MANIFEST).exists():
                    begun.append(folder / name)
            return bool(begun)

        self._until(look, "no checkpoint was begun", pause=0.001)
        return begun[0]

    def _wait_down(self, how: str, result: dict[str, Any]) -> None:
        """The command's end and that of its processes; a signal other than -9 must end it well."""
        process = self.command.process
        try:
            code = process.wait(self.patience_s)
        except subprocess.TimeoutExpired:
            raise SoakError(f"{how}: still running after {self.patience_s:g} s:\n{self.command.tail()}") from None
        seconds, left = self.command.gone(_ENDING_S)
        result["seconds_until_all_ended"] = round(seconds, 1)
        if left:
            result["had_to_be_ended"] = left
        if any(title.startswith("ray::RayTrainWorker") for title in left):
            raise SoakError(f"{how}: workers went on without their driver: {left}")
        if how == "driver":
            return
        said = self.command.tail()
        if code == 0 and "finished at step" in said:
            raise RunEnded(how)
        if code != 0 or "go on with the same command and --resume" not in said:
            raise SoakError(f"{how}: the command ended with {code} and said:\n{said}")

    def _damage(self, result: dict[str, Any]) -> bool:
        """Damage the newest whole checkpoint; False, and nothing done, where it is the only one."""
        whole = []
        for folder in listed_checkpoints(self.run_dir / "checkpoints"):
            try:
                whole.append(open_checkpoint(folder))
            except Exception:  # one that was damaged before, or never finished
                continue
        if len(whole) < 2:
            return False
        path = whole[-1].path / self.random.choice(sorted([*whole[-1].files, MANIFEST]))
        result["damaged"] = f"{path.parent.name}/{path.name}: {damage(path, self.random)}"
        newest = newest_checkpoint(self.run_dir / "checkpoints")
        if newest is None or newest.path != whole[-2].path:
            raise SoakError(f"{result['damaged']} went unnoticed, or cost more than one checkpoint")
        return True


def damage(path: Path, chance: random.Random) -> str:
    """Flip a bit of a file, cut it short, or delete it; says which."""
    how, size = chance.choice(["flip", "truncate", "delete"]), path.stat().st_size
    if how == "delete":
        path.unlink()
        return "deleted"
    place, bit = chance.randrange(size), chance.randrange(8)
    if how == "truncate":
        os.truncate(path, place)
        return f"cut to {place} of {size} bytes"
    with open(path, "r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1 << bit]))
    return f"bit {bit} of byte {place} flipped"
