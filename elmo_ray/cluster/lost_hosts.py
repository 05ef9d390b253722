"""Lost hosts: Ray's view of the cluster is brought up to date before workers start again, and waiting is reported.

Ray Train decides how many workers there can be by a list of nodes that is up to 20 s old, and Ray itself learns late
that a host is gone. Workers that are placed on such a host would never start. A host that is still there after its
announced end has room by this list too, and Ray places nothing on it.
"""

from __future__ import annotations

import contextlib
import logging
import time
from typing import Any

import ray
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.controller.state import PreemptingState, RunningState
from ray.train.v2._internal.execution.scaling_policy.elastic import ElasticScalingPolicy

from elmo_ray.cluster.logs import log_to_run
from elmo_ray.cluster.network import unreachable
from elmo_ray.cluster.preemption import describe
from elmo_ray.cluster.session import alive_nodes, describe_cpus, describe_host, lost_hosts

logger = logging.getLogger(__name__)

_CONNECT_S = 3.0
_WAIT_S = 75.0
"""Seconds to wait for Ray's notice of a lost host: with Ray's own settings this takes 65."""

_MESSAGE_EVERY_S = 30.0


class LostHosts(ControllerCallback):  # type: ignore[misc]
    """Callback of Ray Train's controller that looks for lost hosts after each failure of workers or of their start.

    run_dir: the run's folder, for the log. request: the workers of the run, as they are shown to the user.
    """

    def __init__(self, run_dir: str, request: str) -> None:
        self.run_dir, self.request = run_dir, request
        self._waiting_since: float | None = None
        self._told = 0.0
        self._announced: list[str] = []

    def after_controller_start(self, train_run_context: Any) -> None:
        _count_no_room_on_ended_nodes()

    def before_controller_execute_failure_decision(self, failure_decision: Any) -> None:
        try:
            wait_for_notice()
            _refresh_reservations()
        except Exception as error:  # an error here would end training
            logger.warning("the hosts of the cluster could not be looked at: %s", error)

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        """Log the notice of a host's end, and from time to time that the workers have not started yet."""
        now = time.monotonic()
        if isinstance(current_state, PreemptingState):
            self._tell(current_state.preemption_info)
        if isinstance(current_state, (RunningState, PreemptingState)) or current_state.is_terminal():
            self._waiting_since = None
        elif self._waiting_since is None:
            self._waiting_since = self._told = now
        elif now - self._told >= _MESSAGE_EVERY_S:
            self._told = now
            self._open_log()
            lost = lost_hosts()
            logger.warning(
                "%s: not started for %.0f s; the Ray cluster has %s CPUs%s",
                self.request,
                now - self._waiting_since,
                describe_cpus(alive_nodes()),
                f" and has lost {', '.join(lost)}" if lost else "",
            )

    def _tell(self, info: Any) -> None:
        """Log each announcement once."""
        if info.preempted_node_ids != self._announced:
            self._announced = info.preempted_node_ids
            hosts = {node["NodeID"]: describe_host(node) for node in ray.nodes()}
            self._open_log()
            logger.warning("%s", describe(info, hosts))
            # the controller of Ray Train, which this is, runs on the host of the driver
            if ray.get_runtime_context().get_node_id() in info.preempted_node_ids:
                logger.warning("this command runs there too and ends with the host; give it with --resume on another")

    def _open_log(self) -> None:
        with contextlib.suppress(OSError):  # an error here would end training
            log_to_run(self.run_dir, None)


def wait_for_notice(limit_s: float = _WAIT_S) -> None:
    """Wait until every host that Ray lists as alive accepts a connection, and name those that Ray calls lost.

    Returns after limit_s seconds in any case.
    """
    began, silent = time.monotonic(), _silent_hosts()
    if not silent:
        return
    logger.warning("%s: no answer; waiting until it answers, or until Ray calls it lost", ", ".join(silent.values()))
    while silent and time.monotonic() - began < limit_s:
        time.sleep(0.5)
        before, silent = silent, _silent_hosts()
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        for node, host in before.items():
            if node not in alive:
                logger.warning("%s: lost, by Ray's notice after %.0f s", host, time.monotonic() - began)
            elif node not in silent:
                logger.info("%s answers again", host)


def _silent_hosts() -> dict[str, str]:
    """Return the id and a name of each node that Ray lists as alive and that accepts no connection."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    targets = [(node["NodeManagerAddress"], int(node["NodeManagerPort"])) for node in nodes]
    silent = [nodes[number] for number, _ in unreachable(targets, _CONNECT_S)]
    return {node["NodeID"]: describe_host(node) for node in silent}


def _refresh_reservations() -> None:
    """Let Ray's coordinator, which counts how many elastic workers have room, read the list of nodes now."""
    # The name and the method are Ray's own (2.60); by itself the coordinator looks every 20 s.
    coordinator = ray.get_actor("AutoscalingCoordinator", namespace="AutoscalingCoordinator")
    ray.get(coordinator.get_reserved_resources.remote("", recompute=True), timeout=10)


def _count_no_room_on_ended_nodes() -> None:
    """Let Ray Train, in the process of its controller, leave out nodes that are there after their announced end."""
    # Ray's own name (2.60): it decides how many elastic workers have room, and has no setting for this.
    count = ElasticScalingPolicy._count_possible_workers

    def count_elsewhere(policy: Any, room: dict[str, Any]) -> int:
        try:
            ended = _ended_nodes()
        except Exception as error:  # an error here would end training
            logger.warning("the announced ends of hosts could not be looked at: %s", error)
            ended = set()
        return int(count(policy, {node: resources for node, resources in room.items() if node not in ended}))

    ElasticScalingPolicy._count_possible_workers = count_elsewhere


def _ended_nodes() -> set[str]:
    """Return the ids of nodes that Ray still has although their announced end is over, or has no time."""
    now_ms = time.time() * 1000
    return {node for node, end_ms in ray._private.state.state.get_draining_nodes().items() if end_ms <= now_ms}
