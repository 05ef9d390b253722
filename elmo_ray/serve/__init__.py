"""`serve`: give the vectors of words by HTTP, on Ray Serve.

    python -m elmo_ray.serve SOURCE [key.path=value ...] [--dry-run]

It answers `POST /vectors` with tokenised sentences by their vectors (`messages`), and `GET /health`. Each replica is a
process with the model (`deployment`), which computes the requests that wait together (`vectors`). Nothing is kept from
one request to the next. Ctrl-C or SIGTERM ends it with exit code 0.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

from elmo_ray.checkpoints.source import Source, open_source
from elmo_ray.cluster.session import TORCH_NAMES, alive_nodes, check_room, device_for
from elmo_ray.config.command_line import Flags, run_verb
from elmo_ray.elmo.layer_choice import layer_factors
from elmo_ray.errors import ConfigError
from elmo_ray.serve.config import ServeConfig, ServeOptions
from elmo_ray.serve.vectors import ServeJob
from elmo_ray.storage import absolute_or_none

logger = logging.getLogger("elmo_ray.serve")  # __name__ is __main__ as a command


@dataclass(frozen=True)
class ServePlan:
    """Model and address that `serve` would serve."""

    config: ServeConfig
    source: str

    def summary(self) -> str:
        return "\n".join([self.config.to_yaml().rstrip(), "", self.source, address(self.config.serve)])

    def to_dict(self) -> dict[str, Any]:
        return {"config": self.config.to_dict(), "source": self.source, "address": address(self.config.serve)}


def run(config: ServeConfig, flags: Flags | None = None) -> ServePlan | None:
    """Serve until a signal asks for the end. Raises ElmoRayErrors for a user's mistakes; writes nothing."""
    is_planned = flags is not None and flags.dry_run
    if any(importlib.util.find_spec(name) is None for name in ("starlette", "uvicorn", "fastapi")):
        raise ConfigError("Ray Serve is not installed: pip install 'elmo-ray[serve]'")
    if not os.environ.get("RAY_ADDRESS"):
        check_address(config.serve)
    source = open_source(config.init.source, config.checkpoint, config.init.options, config.init.vocab)
    if source.config.input == "words" and source.words is None and source.model.token_embedder is None:
        raise ConfigError(f"{source.path}: a model with word input needs its vocabulary: init.vocab=FILE")
    layer_factors(config.serve.layers, source.config, "serve.layers")
    if is_planned:
        return ServePlan(config, source.describe())
    cluster = config.cluster
    device = device_for(cluster, cluster.workers)
    check_room(cluster, cluster.workers, device)
    job = _make_job(config, source, TORCH_NAMES[device])
    logger.info("%s", source.describe())
    del source  # the replicas have the model; this process waits
    from elmo_ray.serve import deployment

    is_shared, gpus = bool(os.environ.get("RAY_ADDRESS")), 1 if device == "gpu" else 0
    try:
        with (
            _signals_interrupt(),  # from here on, as Ray has just set a handler of its own
            deployment.serving(job, cluster.workers, cluster.cpus_per_worker, gpus, is_shared),
        ):
            where = " on the head of the Ray cluster" if is_shared else ""
            logger.info("listening on %s%s: POST /vectors, GET /health", address(config.serve), where)
            while True:
                time.sleep(3600)
    except KeyboardInterrupt:
        logger.info("ended")
    return None


def _make_job(config: ServeConfig, source: Source, device: str) -> ServeJob:
    cluster = config.cluster
    return ServeJob(
        source=str(absolute_or_none(config.init.source)),
        checkpoint=config.checkpoint,
        options=absolute_or_none(config.init.options),
        vocab=absolute_or_none(config.init.vocab),
        fingerprint=source.fingerprint,
        device=device,
        threads=cluster.threads,
        share=-(-cluster.workers // len(alive_nodes())),
        serve=config.serve,
    )


def address(serve: ServeOptions) -> str:
    """Return the URL of the server."""
    host = f"[{serve.host}]" if ":" in serve.host else serve.host
    return f"http://{host}:{serve.port}"


def check_address(serve: ServeOptions) -> None:
    """Raise ConfigError if this machine does not let a server listen on serve.host and serve.port."""
    # Ray Serve would share the port with another server of the same user, and each would get some of the requests.
    family = socket.AF_INET6 if ":" in serve.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((serve.host, serve.port))
            probe.listen()
        except OSError as error:
            reason = error.strerror or str(error)
            raise ConfigError(
                f"serve.port={serve.port}: cannot listen on {serve.host}: {reason}; choose another serve.port or "
                "serve.host"
            ) from None


@contextlib.contextmanager
def _signals_interrupt() -> Iterator[None]:
    """Let the first SIGINT or SIGTERM raise KeyboardInterrupt; after it both have their usual effect."""
    numbers = (signal.SIGINT, signal.SIGTERM)

    def interrupt(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        logger.info("%s: no further requests; once more to abort", signal.Signals(number).name)
        raise KeyboardInterrupt

    for number in numbers:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_verb("serve", ServeConfig, run, argv)
