"""Start of torch.distributed in the workers of Ray Train, after the checks of their hosts and of the network."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

from elmo_ray import storage
from elmo_ray.cluster import hosts, network
from elmo_ray.cluster.logs import log_to_run
from elmo_ray.cluster.stopping import outlast_sigterm

logger = logging.getLogger(__name__)


@dataclass
class CheckedTorchConfig(TorchConfig):
    """TorchConfig whose workers are checked first.

    network: `cluster.network`. files, expected, versions: what the driver sees, for `hosts.facts` and `hosts.compare`.
    """

    network: str | None = None
    files: hosts.RunFiles | None = None
    expected: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return _CheckedBackend


class _CheckedBackend(_TorchBackend):  # type: ignore[misc]
    """Backend that compares the hosts and chooses their interfaces; it runs in Ray Train's controller.

    An ElmoRayError here ends training at once, unlike the loss of a worker.
    """

    def on_start(self, worker_group: Any, backend_config: CheckedTorchConfig) -> None:
        def run(function: Callable[[Any], Any], arguments: list[Any]) -> list[Any]:
            futures = [
                worker_group.execute_single_async(number, function, argument)
                for number, argument in enumerate(arguments)
            ]
            results: list[Any] = ray.get(futures)
            return results

        count = len(worker_group)
        files = backend_config.files
        if files is not None:
            outlast_sigterm()
            _log(files.run_dir)
            asked_at = time.time()
            found = run(_facts, [(files, backend_config.expected)] * count)
            for warning in hosts.compare(found, backend_config.versions, asked_at, time.time()):
                logger.warning("%s", warning)
        endpoints = run(_endpoint, [backend_config.network] * count)
        if len({each.node for each in endpoints}) > 1:
            for worker, each in enumerate(endpoints):
                if each.interface is None:
                    logger.warning(
                        "worker %d: no interface of host %s has %s, its address in Ray's list of nodes; set "
                        "cluster.network",
                        worker,
                        each.host,
                        each.node,
                    )
            network.check_reach(endpoints, run, logger.warning)
            run(_take, [each.interface for each in endpoints])
        super().on_start(worker_group, backend_config)


def _log(run_dir: str) -> None:
    """Let this process log to the run, for it may have to wait for a store; a host that cannot do so says it later."""
    if storage.is_uri(run_dir) or os.path.isdir(run_dir):
        with contextlib.suppress(OSError):
            log_to_run(run_dir, None)


def _facts(given: tuple[hosts.RunFiles, dict[str, str]]) -> hosts.Facts:
    storage.expect_answers()
    outlast_sigterm()
    _log(given[0].run_dir)
    return hosts.facts(ray.util.get_node_ip_address(), *given)


def _endpoint(wanted: str | None) -> network.Endpoint:
    return network.endpoint(ray.util.get_node_ip_address(), wanted)


def _take(interface: str | None) -> None:
    if interface is not None:
        network.take_interface(interface)
