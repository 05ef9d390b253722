"""Whether a run trains on hosts of unusual forms, or what it says: names, networks, firewalls, disks.

    python tests/benchmarks/host_forms.py [FORM ...]

The hosts are network namespaces (see `tests/helpers/hosts.py`), so this needs root. For each FORM there are two new
hosts with a new Ray and a small run with a worker on each. One JSON line for each: the exit code, the seconds, and the
last lines. The forms (all of them where none is named):

    plain          as Debian installs it
    name-unknown   the second host does not know its own name
    name-wrong     the second host takes its own name for the address of the first
    families       Ray's addresses are IPv4, and cluster.network names an IPv6 network that also joins the hosts
    fast-network   a second network joins the hosts, and cluster.network names its interface
    fast-apart     the same, but Ray's own network lets no traffic between the workers pass
    firewall       the second host drops what comes to other ports than Ray's
    mtu            large packets to the second host are lost
    full-disk      the disk of the runs holds no checkpoint
    read-only      the second host cannot write to the folder of the runs
    small-shm      the second host has 64 MB of /dev/shm
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from helpers.hosts import Host, Hosts, lines_of
from helpers.tiny_runs import write_command

LONGEST_S = 420.0
"""Seconds after which a run that does not end is given up."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("forms", nargs="*", metavar="FORM", help=f"one of {', '.join(FORMS)}")
    for form in parser.parse_args().forms or FORMS:
        with tempfile.TemporaryDirectory(prefix="elmo-forms-") as folder:
            print(json.dumps({"form": form} | run(form, Path(folder)), ensure_ascii=False), flush=True)
    return 0


def run(form: str, folder: Path) -> dict[str, Any]:
    runs = folder / "runs"
    runs.mkdir()
    mounted = form == "full-disk"
    if mounted:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=60k", "tmpfs", str(runs)], check=True)
    try:
        with Hosts(folder / "hosts", network="10.85.0") as hosts:
            head, other = hosts.all
            settings = FORMS[form](head, other)
            head.start_ray()
            other.start_ray(head)
            if form in AFTER_RAY:
                AFTER_RAY[form](other, folder)
            cluster = {"workers": 2, "cpus_per_worker": 1.5, "timeout_s": 60}
            config = write_command(folder, run__name="forms", cluster=cluster)
            began = time.monotonic()
            command = [sys.executable, "-m", "elmo_ray.pretrain", str(config), *settings]
            try:
                done = head.run(*command, timeout_s=LONGEST_S, RAY_ADDRESS=head.at(6379))
                code, said = done.returncode, done.stderr
            except subprocess.TimeoutExpired as late:
                code, said = None, (late.stderr or b"").decode(errors="replace")
            return {"code": code, "seconds": round(time.monotonic() - began, 1), "said": lines_of(said)[-6:]}
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(runs)], check=False)


# ---------------------------------------------------------------- the forms


def nothing(head: Host, other: Host) -> list[str]:
    return []


def own_name(address: str | None) -> Callable[[Host, Host], list[str]]:
    def change(head: Host, other: Host) -> list[str]:
        known = "" if address is None else f"{head.address} {other.name}\n"
        Path("/etc/netns", other.namespace, "hosts").write_text(f"127.0.0.1 localhost\n{known}{head.address} nodea\n")
        return []

    return change


def families(head: Host, other: Host) -> list[str]:
    for host in (head, other):
        inside(host, "ip", "addr", "add", f"fd00:85::{host.number}/64", "dev", "eth0", "nodad")
    return ["cluster.network=fd00:85::/64"]


def fast_network(head: Host, other: Host) -> list[str]:
    pair = [f"{head.hosts.prefix}f{host.number}" for host in (head, other)]
    subprocess.run(["ip", "link", "add", pair[0], "type", "veth", "peer", "name", pair[1]], check=True)
    for host, link in zip((head, other), pair, strict=True):
        subprocess.run(["ip", "link", "set", link, "netns", host.namespace, "name", "fast0"], check=True)
        inside(host, "ip", "addr", "add", f"10.77.0.{host.number}/24", "dev", "fast0")
        inside(host, "ip", "link", "set", "fast0", "up")
    return ["cluster.network=fast0"]


def inside(host: Host, *command: str) -> None:
    subprocess.run(["ip", "netns", "exec", host.namespace, *command], check=True)


def only_ray(other: Host, folder: Path) -> None:
    """Drop what comes to ports that Ray does not use itself."""
    listening = subprocess.run(
        ["ip", "netns", "exec", other.namespace, "ss", "-Hltn"], capture_output=True, text=True, check=True
    )
    ports = sorted({line.split()[3].rpartition(":")[2] for line in listening.stdout.splitlines()})
    inside(other, "iptables", "-A", "INPUT", "-i", "lo", "-j", "ACCEPT")
    inside(other, "iptables", "-A", "INPUT", "-m", "state", "--state", "ESTABLISHED,RELATED", "-j", "ACCEPT")
    for port in [*ports, "10002:19999"]:  # Ray's workers
        inside(other, "iptables", "-A", "INPUT", "-p", "tcp", "--dport", port, "-j", "ACCEPT")
    inside(other, "iptables", "-A", "INPUT", "-p", "tcp", "-i", "eth0", "-j", "DROP")


def large_packets_lost(other: Host, folder: Path) -> None:
    inside(other, "iptables", "-A", "INPUT", "-p", "tcp", "-i", "eth0", "-m", "length", "--length", "1200:65535",
           "-j", "DROP")  # fmt: skip


def read_only(other: Host, folder: Path) -> None:
    other.mount("--bind", str(folder / "runs"), str(folder / "runs"))
    other.mount("-o", "remount,ro,bind", str(folder / "runs"))


def small_shm(other: Host, folder: Path) -> None:
    other.mount("-t", "tmpfs", "-o", "size=64m", "tmpfs", "/dev/shm")


FORMS: dict[str, Callable[[Host, Host], list[str]]] = {
    "plain": nothing,
    "name-unknown": own_name(None),
    "name-wrong": own_name("head"),
    "families": families,
    "fast-network": fast_network,
    "fast-apart": fast_network,
    "firewall": nothing,
    "mtu": nothing,
    "full-disk": nothing,
    "read-only": nothing,
    "small-shm": nothing,
}
"""What is changed before Ray starts; each returns settings of the run."""

AFTER_RAY: dict[str, Callable[[Host, Path], None]] = {
    "fast-apart": only_ray,
    "firewall": only_ray,
    "mtu": large_packets_lost,
    "read-only": read_only,
    "small-shm": small_shm,
}


if __name__ == "__main__":
    sys.exit(main())
