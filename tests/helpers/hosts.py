"""Test hosts on one machine: namespaces with a bridge between them, each with its own name, address, mounts, processes.

What works only because all processes are on one machine fails here as on several. Needs root and Debian's iproute2.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
import pytest

REPOSITORY = Path(__file__).resolve().parents[2]

# A name of its own for the host, and mounts that nobody else sees. Ray looks for the node of its host in its folder and
# among the processes: where it sees those of the others, a driver takes another host for its own.
_ENTER = """hostname "$1"
mount --make-rprivate /
mount -t proc proc /proc
mount -t sysfs sysfs /sys 2>/dev/null
mount --bind "$2" "$RAY_TMPDIR"
shift 2
exec "$@"
"""
# The first process of a host; it takes the ended ones away that have no parent.
_FIRST = "sleep infinity & wait"
_LETTERS = itertools.cycle("abcdefghijklmnopqrstuvwxyz")


def need_hosts() -> None:
    """Skip the test, with the reason, where there can be no hosts."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        pytest.skip("test hosts need Linux and root")
    for program in ("ip", "unshare", "nsenter"):
        if shutil.which(program) is None:
            pytest.skip(f"test hosts need the program {program} (Debian: iproute2, util-linux)")
    probe = f"elmo-probe-{os.getpid()}"  # of this process alone, as others may look at the same moment
    done = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no network namespaces here: {done.stderr.strip()}")
    subprocess.run(["ip", "netns", "del", probe], check=True)


class Host:
    """A test host. number: the last number of its address."""

    def __init__(self, hosts: Hosts, name: str, number: int) -> None:
        self.hosts, self.name, self.number = hosts, name, number
        self.namespace, self.link = f"{hosts.prefix}-{name}", f"{hosts.prefix}{number}"
        self.address = hosts.address(number)
        self.apart = f"fd00:99::{number}" if hosts.ipv6 else f"10.99.0.{number}"
        self.ray: subprocess.Popen[bytes] | None = None
        self._first: subprocess.Popen[bytes] | None = None
        self.log, self.ray_folder = hosts.folder / f"{name}.log", hosts.folder / f"{name}-ray"

    def command(self, *arguments: str) -> list[str]:
        """Return the command that runs another one on this host, as a child: see `child_of` for its signals."""
        if self._first is None:
            first = ["ip", "netns", "exec", self.namespace, "unshare", "--pid", "--fork", "bash", "-c", _FIRST]
            self._first = subprocess.Popen(first)
            wait_for(lambda: child_of(self._first) is not None, f"first process of {self.name}")
        join = ["nsenter", f"--pid=/proc/{self._first.pid}/ns/pid_for_children", "ip", "netns", "exec", self.namespace]
        enter = ["unshare", "--uts", "--mount", "bash", "-c", _ENTER, "host", self.name, str(self.ray_folder)]
        return [*join, *enter, *arguments]

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[bytes]:
        """Start a command on this host; its output goes to `log`."""
        with open(self.log, "ab") as log:
            return subprocess.Popen(
                self.command(*arguments), stdout=log, stderr=log, env=self.hosts.environment | environment
            )

    def run(self, *arguments: str, timeout_s: float = 240.0, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a command on this host to its end."""
        return subprocess.run(
            self.command(*arguments),
            env=self.hosts.environment | environment,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def at(self, port: int) -> str:
        """Return the host's address with a port, as in URLs."""
        return f"[{self.address}]:{port}" if self.hosts.ipv6 else f"{self.address}:{port}"

    def start_ray(self, head: Host | None = None, cpus: int = 2) -> None:
        """Start a node of Ray, as the head or with the head's address, and wait until it has joined."""
        place = (
            ["--head", "--port=6379", "--include-dashboard=false"] if head is None else [f"--address={head.at(6379)}"]
        )
        options = [
            f"--node-ip-address={self.address}",
            f"--num-cpus={cpus}",
            "--object-store-memory=100000000",
            "--block",
        ]
        for last in (False, False, True):  # Ray gives itself 30 s for its start, which a loaded machine may exceed
            seen = self.log.stat().st_size if self.log.exists() else 0
            ray = self.ray = self.start(str(Path(sys.executable).parent / "ray"), "start", *place, *options)

            def written(seen: int = seen) -> str:
                return self.log.read_bytes()[seen:].decode()

            def ended(ray: subprocess.Popen[bytes] = ray) -> bool:
                return "Ray runtime started" in written() or ray.poll() is not None

            wait_for(ended, f"Ray on {self.name}: {self.log}", 240)
            if ray.poll() is None:
                return
            assert not last and "timed out during startup" in written(), written()[-2000:]

    def processes(self) -> list[int]:
        """Return the processes that run on this host."""
        done = subprocess.run(["ip", "netns", "pids", self.namespace], capture_output=True, text=True, check=False)
        return [int(pid) for pid in done.stdout.split()]

    def kill(self) -> None:
        """Take the host away: end all its processes at once."""
        for pid in self.processes():
            with_suppress(os.kill, pid, signal.SIGKILL)
        wait_for(lambda: not self.processes(), f"end of the processes of {self.name}")
        for process in (self.ray, self._first):
            if process is not None:
                process.wait()
        self.ray = self._first = None

    def kill_ray(self) -> None:
        """End the processes of Ray, with workers and tasks, but not what was started beside it."""
        ray = psutil.Process(self.ray.pid) if self.ray else None
        for process in [*ray.children(recursive=True), ray] if ray else []:
            with_suppress(os.kill, process.pid, signal.SIGKILL)

    def cable(self, plugged: bool) -> None:
        """Pull the host's network cable, or plug it in."""
        _ip("link", "set", self.link, "up" if plugged else "down")

    def pause(self, stopped: bool) -> None:
        """Let the host stand still, or go on: SIGSTOP or SIGCONT for all its processes."""
        for pid in self.processes():
            with_suppress(os.kill, pid, signal.SIGSTOP if stopped else signal.SIGCONT)

    def lose_packets(self, share: float) -> None:
        """Lose this share of the packets that reach the host; 0 for none."""
        # by iptables, as netem is not in every kernel
        base = ["iptables", "-w", "5"]
        rule = ["INPUT", "-i", "eth0", "-m", "statistic", "--mode", "random", "--probability", str(share), "-j", "DROP"]
        self.run(*base, "-F", "INPUT")
        if share:
            done = self.run(*base, "-A", *rule)
            assert done.returncode == 0, done.stderr

    def narrow(self, rate: str | None) -> None:
        """Limit what the host sends and receives to a rate such as 1mbit; None for no limit."""
        for inside in (["ip", "netns", "exec", self.namespace], []):
            device = "eth0" if inside else self.link
            subprocess.run([*inside, "tc", "qdisc", "del", "dev", device, "root"], capture_output=True, check=False)
            if rate:
                limit = ["tbf", "rate", rate, "burst", "32kbit", "latency", "400ms"]
                subprocess.run([*inside, "tc", "qdisc", "add", "dev", device, "root", *limit], check=True)

    def mount(self, *arguments: str) -> None:
        """Mount something that only the Ray of this host sees."""
        enter = ["nsenter", "--mount", "--pid", f"--target={child_of(self.ray)}"]
        subprocess.run([*enter, "mount", *arguments], check=True)

    @contextlib.contextmanager
    def mounted(self, place: str | Path, *arguments: str) -> Iterator[None]:
        """Mount something at a place, which only the Ray of this host sees, while this context lasts."""
        self.mount(*arguments, str(place))
        try:
            yield
        finally:
            self.unmount(place)

    def unmount(self, place: str | Path) -> None:
        enter = ["nsenter", "--mount", "--pid", f"--target={child_of(self.ray)}"]
        subprocess.run([*enter, "umount", "--lazy", str(place)], check=True)


class Hosts:
    """Some hosts, from `with` on until its end.

    debian: each host's own name is 127.0.1.1 to itself, as Debian and Ubuntu install it. Each host also has an
    interface `eth1` that nothing joins to the others, with the address 10.99.0.NUMBER. network: the first three numbers
    of the addresses, or such a one as fd00:83 for hosts that have IPv6 only.
    """

    def __init__(self, folder: Path, count: int = 2, debian: bool = True, network: str = "10.83.0") -> None:
        self.folder, self.network, self.debian, self.ipv6 = folder, network, debian, ":" in network
        # A letter for each set of hosts: the kernel takes the links of ended ones away some time after their end.
        self.prefix = f"er{os.getpid() % 100000}{next(_LETTERS)}"
        self.environment = {
            **os.environ,
            "PYTHONPATH": str(REPOSITORY),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
            "OMP_NUM_THREADS": "1",
            # short, for the paths of sockets have at most 107 characters
            "RAY_TMPDIR": f"/tmp/{self.prefix}",
        }
        self.all = [Host(self, f"node{'abcdef'[n]}", n + 2) for n in range(count)]

    def address(self, number: int) -> str:
        return f"{self.network}{'::' if self.ipv6 else '.'}{number}"

    def __enter__(self) -> Hosts:
        for folder in (Path(self.environment["RAY_TMPDIR"]), *(host.ray_folder for host in self.all)):
            folder.mkdir(parents=True)
        bridge = f"{self.prefix}br"
        _ip("link", "add", bridge, "type", "bridge")
        # without `nodad` an IPv6 address may be used a second later only
        mask, at_once = ("64", ["nodad"]) if self.ipv6 else ("24", [])
        _ip("addr", "add", f"{self.address(1)}/{mask}", "dev", bridge, *at_once)
        _ip("link", "set", bridge, "up")
        for host in self.all:
            _ip("netns", "add", host.namespace)
            _ip("link", "add", host.link, "type", "veth", "peer", "name", "eth0", "netns", host.namespace)
            _ip("link", "set", host.link, "master", bridge, "up")
            inside = ("-n", host.namespace)
            _ip(*inside, "addr", "add", f"{host.address}/{mask}", "dev", "eth0", *at_once)
            _ip(*inside, "link", "set", "eth0", "up")
            _ip(*inside, "link", "set", "lo", "up")
            _ip(*inside, "link", "add", "eth1", "type", "veth", "peer", "name", "eth1-end")
            _ip(*inside, "addr", "add", f"{host.apart}/{mask}", "dev", "eth1", *at_once)
            _ip(*inside, "link", "set", "eth1", "up")
            _ip(*inside, "link", "set", "eth1-end", "up")
            _ip(*inside, "route", "add", "default", "via", self.address(1))
            names = [f"{o.address} {o.name}" for o in self.all if o is not host or not self.debian]
            own = [f"127.0.1.1 {host.name}"] if self.debian else []
            folder = Path("/etc/netns") / host.namespace  # which `ip netns exec` lays over /etc
            folder.mkdir(parents=True)
            (folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *own, *names]) + "\n")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for host in self.all:
            host.kill()
            subprocess.run(["ip", "netns", "del", host.namespace], check=False)
            shutil.rmtree(Path("/etc/netns") / host.namespace, ignore_errors=True)
        subprocess.run(["ip", "link", "del", f"{self.prefix}br"], check=False)
        Path(self.environment["RAY_TMPDIR"]).rmdir()


def wait_for(done: Callable[[], bool], what: str | Callable[[], str], timeout_s: float = 120.0) -> None:
    """Wait until `done` returns True; else fail with `what`, which may be a function that is called then."""
    deadline = time.monotonic() + timeout_s
    while not done():
        assert time.monotonic() < deadline, (
            f"not seen in {timeout_s:.0f} s: {what if isinstance(what, str) else what()}"
        )
        time.sleep(0.05)


def child_of(process: subprocess.Popen[bytes] | None) -> int | None:
    """Return the process that runs on a host for a process of `Host.start`, which only waits for it."""
    if process is None:
        return None
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return int(children[0]) if children else None


def with_suppress(function: Callable[..., Any], *arguments: Any) -> None:
    try:
        function(*arguments)
    except ProcessLookupError:
        pass


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"


def recommended() -> dict[str, str]:
    """Return the settings of `cluster/slurm.sbatch` by which Ray notices a lost host."""
    text = (REPOSITORY / "cluster" / "slurm.sbatch").read_text()
    return dict(re.findall(r"(RAY_health_check_\w+)=(\d+)", text))


def workers_of(host: Host) -> list[int]:
    """Return the process ids of the training workers on a host."""
    return [pid for pid in host.processes() if title(pid).startswith("ray::RayTrainWorker")]


def title(pid: int) -> str:
    """Return the title of a process, which Ray sets for its own; empty if the process has ended."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    return ""


def lines_of(output: str) -> Sequence[str]:
    """Return the lines of a command's output that are not empty."""
    return [line for line in output.splitlines() if line.strip()]
