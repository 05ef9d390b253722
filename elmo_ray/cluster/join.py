"""Commands for scripts that start Ray on several hosts, such as `cluster/slurm.sbatch`.

`python -m elmo_ray.cluster.join address` writes the address by which other hosts reach this one.
`python -m elmo_ray.cluster.join wait HOST:PORT NAME ...` waits until Ray's nodes on all these hosts have joined.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Sequence

from elmo_ray.cluster.network import own_address
from elmo_ray.cluster.session import last_line, set_environment
from elmo_ray.errors import ConfigError, ElmoRayError

logger = logging.getLogger(__name__)

_MESSAGE_EVERY_S = 15.0


def wait_for_hosts(address: str, names: Sequence[str], limit_s: float) -> None:
    """Wait until Ray's head at host:port has a node on each of the named hosts.

    names: as the hosts call themselves, with or without their domain. Raises ConfigError that names the missing hosts
    after limit_s seconds.
    """
    set_environment()
    import ray

    began = told = time.monotonic()
    missing, problem = list(names), ""
    while True:
        try:
            if not ray.is_initialized():
                ray.init(address, logging_level="CRITICAL", log_to_driver=False)
            alive = {short_name(node["NodeManagerHostname"]) for node in ray.nodes() if node["Alive"]}
            missing = [name for name in names if short_name(name) not in alive]
            problem = ""
        except (ConnectionError, RuntimeError, ValueError) as error:  # the head is not there yet
            problem = f" ({last_line(error)})"
        if not missing:
            ray.shutdown()
            return
        now = time.monotonic()
        shown = ", ".join(missing)
        if now - began >= limit_s:
            raise ConfigError(
                f"{len(missing)} of {len(names)} hosts have not joined Ray at {address} in {limit_s:.0f} s: {shown}"
                f"{problem}; look at the output of `ray start` there, and whether they reach that address and port"
            )
        if now - told >= _MESSAGE_EVERY_S:
            logger.info("waiting for %s to join Ray at %s%s", shown, address, problem)
            told = now
        time.sleep(0.5)


def short_name(host: str) -> str:
    """Return a host's name without its domain."""
    return host.partition(".")[0].lower()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one of the commands; return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m elmo_ray.cluster.join", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    address = commands.add_parser("address", help="write the address by which other hosts reach this one")
    address.add_argument("--network", default=None, help="an interface, or a network such as 10.1.0.0/16")
    wait = commands.add_parser("wait", help="wait until hosts have joined")
    wait.add_argument("head", help="host:port of Ray's head")
    wait.add_argument("names", nargs="+", help="names of the hosts")
    wait.add_argument("--limit", type=float, default=300.0, help="seconds (default: 300)")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    try:
        if given.command == "address":
            sys.stdout.write(own_address(given.network) + "\n")
        else:
            wait_for_hosts(given.head, given.names, given.limit)
    except ElmoRayError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
