"""Network between the workers of a training: the interface that each takes, and whether they reach each other.

Gloo, and NCCL for its own start, take the address of a host's name. Debian and Ubuntu give that name the address
127.0.1.1, which no other host reaches. So each worker looks for the interface that has the address by which Ray knows
its node.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import psutil

from elmo_ray.errors import ConfigError, TrainingError

VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
"""Environment variables that name the interface; a value that the user has set stays."""

_CONNECT_S = 5.0
_TRY_FOR_S = 30.0
"""Seconds after which hosts that do not reach each other are an error; a network may be away for a moment."""


class Endpoint(NamedTuple):
    """A worker's place in the network. host: name. node: address by which Ray knows it. interface: its name, or None
    where no interface has that address. address: that of the interface."""

    host: str
    node: str
    interface: str | None
    address: str

    def __str__(self) -> str:
        return f"{self.host} ({self.address}, interface {self.interface or 'unknown'})"


def interfaces() -> dict[str, list[str]]:
    """Return the IPv4 and IPv6 addresses of this host's interfaces that are up, by name."""
    up = {name for name, status in psutil.net_if_stats().items() if status.isup}
    found = {
        # an IPv6 address of a link ends with the interface's name
        name: [a.address.partition("%")[0] for a in addresses if a.family in (socket.AF_INET, socket.AF_INET6)]
        for name, addresses in psutil.net_if_addrs().items()
        if name in up
    }
    return {name: addresses for name, addresses in found.items() if addresses}


def find_interface(found: dict[str, list[str]], node: str, wanted: str | None) -> tuple[str | None, str]:
    """Return the name and the address of the interface to take; (None, node) where none has Ray's address.

    found: addresses by interface. node: the address by which Ray knows this host. wanted: `cluster.network`, the name
    of an interface or a network such as 10.1.0.0/16. Raises ConfigError where no interface matches `wanted`.
    """
    if wanted is None:
        node_address = ipaddress.ip_address(node)
        for name, addresses in found.items():
            if any(ipaddress.ip_address(address) == node_address for address in addresses):
                return name, node
        return None, node
    if wanted in found:
        # the family that Ray uses, where the interface has both
        same = [a for a in found[wanted] if (":" in a) == (":" in node)]
        return wanted, (same or found[wanted])[0]
    try:
        network = ipaddress.ip_network(wanted, strict=False)
    except ValueError:
        network = None
    for name, addresses in found.items():
        for address in addresses:
            if network is not None and ipaddress.ip_address(address) in network:
                return name, address
    shown = ", ".join(f"{name} {' '.join(addresses)}" for name, addresses in found.items())
    raise ConfigError(f"cluster.network={wanted}: host {socket.gethostname()} has no such interface; it has {shown}")


def endpoint(node: str, wanted: str | None) -> Endpoint:
    """Return this process's place in the network. Raises ConfigError as `find_interface` does."""
    named = os.environ.get(VARIABLES[0], "").split(",")[0]
    found = interfaces()
    name, address = find_interface(found, node, named if named in found else wanted)
    return Endpoint(socket.gethostname(), node, name, address)


def take_interface(name: str) -> None:
    """Let gloo and NCCL of this process use an interface, unless the user's environment names one."""
    for variable in VARIABLES:
        # NCCL takes a plain name as the beginning of one
        os.environ.setdefault(variable, f"={name}" if variable.startswith("NCCL") else name)


def own_address(wanted: str | None = None) -> str:
    """Return the address by which other hosts reach this one: Ray's choice, unless that is a loopback address.

    wanted: as `cluster.network`. Raises ConfigError where the host has no such address.
    """
    found = interfaces()
    if wanted is not None:
        return find_interface(found, "0.0.0.0", wanted)[1]
    import ray

    # Ray takes the address of the way to the internet, and where there is none that of the host's name
    address = str(ray.util.get_node_ip_address())
    if not ipaddress.ip_address(address).is_loopback:
        return address
    for addresses in found.values():
        for other in map(ipaddress.ip_address, addresses):
            if not (other.is_loopback or other.is_link_local):
                return str(other)
    return address


# ---------------------------------------------------------------- reaching each other

_listener: socket.socket | None = None


def listen(address: str) -> int:
    """Accept connections to an address of this host until `stop_listening`, in a thread; return the port."""
    global _listener
    stop_listening()
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    server = socket.create_server((address, 0), family=family, backlog=64)
    _listener = server

    def accept() -> None:
        while True:
            try:
                server.accept()[0].close()
            except OSError:  # closed
                return

    threading.Thread(target=accept, name="handshake", daemon=True).start()
    return int(server.getsockname()[1])


def stop_listening() -> None:
    """End what `listen` began."""
    global _listener
    if _listener is not None:
        _listener.close()
        _listener = None


def unreachable(targets: Sequence[tuple[str, int]], timeout_s: float = _CONNECT_S) -> list[tuple[int, str]]:
    """Return the number and the error of each (address, port) to which this process cannot connect."""

    def connect(target: tuple[str, int]) -> str | None:
        try:
            socket.create_connection(target, timeout=timeout_s).close()
        except OSError as error:
            return error.strerror or str(error)
        return None

    with ThreadPoolExecutor(max(1, min(32, len(targets)))) as pool:
        errors = pool.map(connect, targets)
    return [(number, error) for number, error in enumerate(errors) if error is not None]


def check_reach(
    endpoints: Sequence[Endpoint],
    run: Callable[..., list[Any]],
    warn: Callable[[str], None],
    try_for_s: float = _TRY_FOR_S,
) -> None:
    """Let each host connect to each other one. Raises TrainingError that names two hosts, the interfaces and a cure.

    endpoints: one for each worker. run: calls a function with an argument of its own in each worker, and returns their
    results in order. warn: is told once where a host is not reached at first.
    """
    ports = run(_listen_on, [e.address for e in endpoints])
    try:
        problems = [port for port in ports if isinstance(port, str)]
        if problems:
            raise TrainingError(problems[0])
        # one worker of each host is enough
        hosts = list({e.address: number for number, e in enumerate(endpoints)}.values())
        targets = [(endpoints[number].address, ports[number]) for number in hosts]
        told, until = False, time.monotonic() + try_for_s
        while True:
            failures = run(unreachable, [targets if number in hosts else [] for number in range(len(endpoints))])
            lost = [(n, hosts[target], error) for n, found in enumerate(failures) for target, error in found]
            if not lost:
                return
            source, target, error = lost[0]
            message = f"host {endpoints[source]} cannot reach host {endpoints[target]}: {error}"
            if time.monotonic() >= until:
                raise TrainingError(
                    f"{message}; open all ports between the workers' hosts, or name the network that joins them by "
                    "cluster.network (such as 10.1.0.0/16)"
                )
            if not told:
                warn(f"{message}; trying again for {try_for_s:.0f} s")
                told = True
            time.sleep(1.0)
    finally:
        run(_stop, [None] * len(endpoints))


def _listen_on(address: str) -> int | str:
    try:
        return listen(address)
    except OSError as error:
        return (
            f"host {socket.gethostname()} cannot listen on {address}, its address in Ray's list of nodes: "
            f"{error.strerror}; start Ray there with --node-ip-address of an interface of that host"
        )


def _stop(_: None) -> None:
    stop_listening()
