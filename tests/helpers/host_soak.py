"""A run on test hosts, with its text and everything else in an object store on one more host, and its interruptions."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from elmo_ray.storage.local_copy import local_copy_of
from helpers.hosts import Host, child_of, wait_for, workers_of
from helpers.soak_runs import Command, RunEnded, Soak, SoakError, Watch

HOST_KINDS = ("host", "cable", "worker", "driver", "head", "storage")
"""What `HostSoak.interrupt` can do."""

_MARGIN = 50  # steps after which a run has gone on; a checkpoint, with which records are sent, has fewer between
_COPY_S = 1.0


class HostCommand(Command):
    """A `pretrain` command on a host."""

    def __init__(self, host: Host, head: Host, arguments: Sequence[str], log: Path) -> None:
        self.log = log
        with open(log, "wb") as out:
            self.process = subprocess.Popen(
                host.command(sys.executable, "-m", "elmo_ray.pretrain", *arguments),
                stdout=out,
                stderr=out,
                env=host.hosts.environment | {"RAY_ADDRESS": head.at(6379)},
            )

    @property
    def pid(self) -> int:
        return child_of(self.process) or self.process.pid

    def processes(self) -> dict[int, str]:
        """Return no processes: those of Ray end with the hosts."""
        return {}


class StoreWatch(Watch):
    """What a run in the store says of itself. folder: where its files are copied to."""

    def __init__(self, run: str) -> None:
        self.copy = local_copy_of(run)
        self.folder, self._copied = self.copy.folder, 0.0
        super().__init__(self.folder)

    def poll(self) -> None:
        if time.monotonic() - self._copied > _COPY_S:
            try:
                self.copy.pull("metrics/*")
            except OSError:  # there is nothing yet, or the store is away
                pass
            self._copied = time.monotonic()
        super().poll()


class HostSoak(Soak):
    """A run in the store and its interruptions. machines: the hosts with Ray, of which the first has the head.

    driver: the host of the command. elastic: whether the run goes on with fewer workers while a host is away. The hosts
    outlive the soak.
    """

    watch: StoreWatch
    commands: list[HostCommand]

    def __init__(
        self,
        machines: Sequence[Host],
        driver: Host,
        store: Host,
        arguments: Sequence[str],
        run: str,
        seed: int,
        elastic: bool,
    ) -> None:
        self.head, self.others, self.driver, self.store = machines[0], list(machines[1:]), driver, store
        self.elastic = elastic
        super().__init__(arguments, store.hosts.folder / Path(run).name, seed)
        self.watch = StoreWatch(run)

    @property
    def command(self) -> HostCommand:
        return self.commands[-1]

    def start_ray(self) -> None:
        """Start Ray on every host on which it does not run."""
        for host in (self.head, *self.others):
            if host.ray is not None and host.ray.poll() is not None:
                if host is self.driver and self.commands and self.command.process.poll() is None:
                    continue  # the command, which has lost its node, must end by itself
                host.kill()  # what Ray has left
            if host.ray is None:
                host.start_ray(None if host is self.head else self.head)

    def start(self, *arguments: str) -> None:
        """Start the command, with --resume from the second time on; `arguments` are added to its own."""
        flags = ["--resume"] if self.commands else []
        log = self.logs / f"start-{len(self.commands) + 1:03d}.log"
        self.commands.append(HostCommand(self.driver, self.head, [*self.arguments, *arguments, *flags], log))

    def finish(self) -> None:
        """Wait for the end of the run and copy it from the store to `watch.folder`."""
        try:
            self._until(lambda: False, "the run did not end")
        except RunEnded:
            pass
        self.watch.copy.pull()

    def stop(self) -> None:
        """End the command by SIGTERM, which saves."""
        os.kill(self.command.pid, signal.SIGTERM)
        code = self.command.process.wait(self.patience_s)
        if code:
            raise SoakError(f"after SIGTERM the command ended with {code}:\n{self.command.tail()}")
        self.watch.poll()

    # ---------------------------------------------------------------- interruptions

    def interrupt(self, kind: str) -> dict[str, Any]:
        """Interrupt the run in training, mend what a user would, wait until it trains: what happened.

        host: all processes of a host without head are killed, and later it comes back. cable: its cable is out for up
        to 45 seconds. worker: kill -9 of one. driver: kill -9; the command is given again. head: all processes of the
        head's host but the driver, which must end with 1 and a line; Ray and the command are started again. storage:
        the cable of the store's host is out for up to 30 seconds. Where the driver is on the host that is killed, or
        whose cable is out for so long that Ray gives it up, the command is given again as well.
        """
        self.watch.poll()
        host, began = self.random.choice(self.others), time.monotonic()
        starts, repeated = self.watch.starts, self.watch.repeated
        result: dict[str, Any] = {"kind": kind, "step": self.watch.step, "victim": host.name}
        result |= getattr(self, f"_lose_{kind}")(host) or {}
        # Where the command was given again, or a worker was killed, there must be a new start.
        goes_on = kind in ("cable", "storage")
        self._until(lambda: self._trains_after(starts, result["step"], goes_on), f"no training after {result}")
        result["seconds"] = round(time.monotonic() - began, 1)
        result["restarted"] = self.watch.starts > starts
        result["resumed_from"] = self.watch.resumed_from
        result["steps_repeated"] = self.watch.repeated - repeated
        return result

    def _trains_after(self, starts: int, step: int, goes_on: bool) -> bool:
        self.start_ray()  # a node that Ray has given up ends when it hears of it
        if self.watch.starts == starts:
            return goes_on and self.watch.step >= step + _MARGIN
        # An elastic run takes a host that is back by itself.
        return self.watch.trained and all(workers_of(host) for host in (self.head, *self.others))

    def _lose_host(self, host: Host) -> dict[str, Any]:
        starts, began = self.watch.starts, time.monotonic()
        host.kill()
        if self.elastic and host is not self.driver:
            self._until(lambda: self.watch.starts > starts and self.watch.trained, f"no training without {host.name}")
            return {"away": "until training", "seconds_until_training_without": round(time.monotonic() - began, 1)}
        away = self.random.uniform(1, 30)
        time.sleep(away)
        if host is self.driver:
            self.command.process.wait()
            self.start_ray()
            self.start()
        return {"away": round(away, 1)}

    def _lose_cable(self, host: Host) -> dict[str, Any]:
        starts, step, process = self.watch.starts, self.watch.step, self.command.process
        seconds = self.random.choice([self.random.uniform(2, 12), self.random.uniform(30, 45)])
        result = self._unplugged(host, seconds)
        if host is self.driver:
            self._until(
                lambda: process.poll() is not None or self._trains_after(starts, step, True), "neither training nor end"
            )
            if process.poll() is not None:
                self._check_lost()
                self.start_ray()
                self.start()
                result["command"] = "ended with 1"
        return result

    def _lose_storage(self, _: Host) -> dict[str, Any]:
        return {"victim": "store", **self._unplugged(self.store, self.random.uniform(3, 30))}

    def _unplugged(self, host: Host, seconds: float) -> dict[str, Any]:
        host.cable(plugged=False)
        time.sleep(seconds)
        host.cable(plugged=True)
        return {"away": round(seconds, 1)}

    def _lose_worker(self, _: Host) -> dict[str, Any]:
        pids = [(host.name, pid) for host in (self.head, *self.others) for pid in workers_of(host)]
        name, pid = self.random.choice(pids)
        os.kill(pid, signal.SIGKILL)
        return {"victim": f"worker on {name}"}

    def _lose_driver(self, _: Host) -> dict[str, Any]:
        os.kill(self.command.pid, signal.SIGKILL)
        self.command.process.wait()
        machines = (self.head, *self.others)
        wait_for(lambda: not any(workers_of(host) for host in machines), "the end of the workers without a driver")
        self.start()
        return {"victim": self.driver.name}

    def _lose_head(self, _: Host) -> dict[str, Any]:
        began = time.monotonic()
        if self.driver is self.head:
            self.head.kill_ray()
        else:
            self.head.kill()
        self.command.process.wait(self.patience_s)
        waited = round(time.monotonic() - began, 1)
        self._check_lost()
        for host in (self.head, *self.others):
            host.kill()
        self.start_ray()
        self.start()
        return {"victim": self.head.name, "seconds_until_end": waited}

    def _check_lost(self) -> None:
        """Check that the command, which has lost the head, ended with 1 and a line that says how to go on."""
        with contextlib.suppress(AssertionError):  # the line is another process's, and may come a moment later
            wait_for(lambda: "error: " in self.command.log.read_text(), "the line", 30)
        # Ray may write pages of its own after the line
        code, said = self.command.process.poll(), self.command.log.read_text()
        if code != 1 or "--resume" not in said or "Traceback" in said:
            raise SoakError(f"without the head the command ended with {code} and said:\n{said}")
