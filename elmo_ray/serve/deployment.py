"""Ray Serve at work: the replicas that answer requests, their batches, and the start and end of the server."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from ray import serve
from ray.serve.config import HTTPOptions
from ray.serve.exceptions import RayServeException
from ray.serve.schema import LoggingConfig
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from elmo_ray.cluster.session import last_line
from elmo_ray.elmo.layer_choice import layer_factors
from elmo_ray.errors import ConfigError, ElmoRayError, short
from elmo_ray.machine import available_cores, leave_background
from elmo_ray.serve.messages import (
    JSON,
    RequestError,
    Wanted,
    answer_type,
    check_encoding,
    read_request,
    too_much,
    write_answer,
)
from elmo_ray.serve.vectors import ServedModel, ServeJob

logger = logging.getLogger(__name__)

APPLICATION, _REPLICA = "elmo_ray", "replica"
VECTORS, HEALTH = "/vectors", "/health"
_METHODS = {VECTORS: ("POST",), HEALTH: ("GET", "HEAD")}

_SPARE_REQUESTS = 16
"""Requests beyond serve.max_requests that a replica takes only to refuse them, or to answer for its health."""

_MOST_IN_PROXY = 1024
"""Requests that wait before the replicas while these compute; Ray Serve refuses others with 503 itself."""

_BODY_S = 60.0
"""Time for a request to arrive: one that stands still would keep its place for ever."""


class Replica:
    """Process with the model, which answers requests of HTTP."""

    def __init__(self, job: ServeJob):
        leave_background()
        # Ray sets one OpenMP thread for each process, whatever the machine has.
        torch.set_num_threads(job.threads or max(1, available_cores() // job.share))
        self._limits = job.serve
        self._model = ServedModel(job)
        # Code is loaded and compiled at the first sentence; a replica is ready when that is done.
        self._model.vectors([Wanted([["The", "first", "one"]], layer_factors("top", self._model.config, "layers"))])
        self._waiting = self._requests = self._batches = 0
        # The largest request that is allowed must fit a batch.
        most = max(job.serve.batch_positions, job.serve.max_words + 2 * job.serve.max_sentences)
        self._together = serve.batch(
            max_batch_size=most,
            batch_wait_timeout_s=job.serve.batch_wait_s,
            batch_size_fn=lambda requests: sum(request.positions for request in requests),
        )(self._vectors)

    async def _vectors(self, requests: list[Wanted]) -> list[Any]:
        # Within the event loop: the requests that arrive meanwhile wait, and become the next batch together.
        self._requests += len(requests)
        self._batches += 1
        return self._model.vectors(requests)

    async def __call__(self, request: Request) -> Response:
        """Return the answer to any request; one of an unexpected error has the status 500."""
        try:
            return await self._answer(request)
        except RequestError as mistake:
            return _refusal(mistake.status, str(mistake))
        except ClientDisconnect:
            return Response(status_code=400)  # nobody reads it
        except Exception as error:
            logger.exception("a request has failed")
            return _refusal(500, f"an unexpected error of the server: {last_line(error)}")

    async def _answer(self, request: Request) -> Response:
        path = request.url.path
        if path not in _METHODS:
            raise RequestError(404, f"{path}: no such path; there are POST {VECTORS} and GET {HEALTH}")
        if request.method not in _METHODS[path]:
            allowed = ", ".join(_METHODS[path])
            refusal = _refusal(405, f"{request.method} {path}: this path takes {allowed}")
            refusal.headers["Allow"] = allowed
            return refusal
        if path == HEALTH:
            counts = {"requests": self._requests, "batches": self._batches, "waiting": self._waiting}
            return _json(200, status="ok", model=self._model.title, **counts)
        if self._waiting >= self._limits.max_requests:
            limit = self._limits.max_requests
            raise RequestError(503, f"the server is busy: serve.max_requests={limit} are waiting; try again")
        self._waiting += 1
        try:
            kind = answer_type(request.headers.get("accept"))
            check_encoding(request.headers.get("content-encoding"))
            body = await asyncio.wait_for(self._body(request), _BODY_S)
            wanted = read_request(body, self._limits, self._model.config)
            vectors: Sequence[Any] = await self._together(wanted) if wanted.sentences else []
            return Response(write_answer(vectors, kind), media_type=kind)
        except asyncio.TimeoutError:
            raise RequestError(408, f"the body of the request has not come in {_BODY_S:g} seconds") from None
        finally:
            self._waiting -= 1

    async def _body(self, request: Request) -> bytes:
        limit = self._limits.max_body_bytes
        length = request.headers.get("content-length", "")
        if length.isdigit() and int(length) > limit:
            raise too_much(int(length), "bytes", "max_body_bytes", self._limits)
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > limit:  # a body in chunks, whose length nobody has said
                raise too_much(None, "bytes", "max_body_bytes", self._limits)
        return bytes(body)


def _refusal(status: int, message: str) -> Response:
    return _json(status, error=message)


def _json(code: int, **values: Any) -> Response:
    """Return an answer of one line."""
    return Response(json.dumps(values).encode() + b"\n", status_code=code, media_type=JSON)


@contextlib.contextmanager
def serving(job: ServeJob, replicas: int, cpus: float, gpus: int, is_shared: bool) -> Iterator[None]:
    """Run Ray Serve in the Ray of this process; within the context its replicas answer requests.

    It ends after the requests that are being answered. cpus, gpus: what Ray reserves for each replica. is_shared: the
    Ray is a cluster that goes on after this process. Raises ConfigError where Ray Serve runs in it already, and
    ElmoRayError where it does not start.
    """
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    running = serve.status()
    if running.proxies or running.applications:
        names = ", ".join(running.applications) or "without an application"
        raise ConfigError(f"Ray Serve runs in this Ray cluster already ({names}); end it with `serve shutdown`")
    try:
        _start(job, replicas, {"num_cpus": cpus, "num_gpus": gpus})
        yield
    finally:
        with contextlib.suppress(RayServeException):  # it has not come so far
            serve.delete(APPLICATION)
        if is_shared:
            # The controller ends itself within the call for it, of which Ray makes an error on stdout.
            with contextlib.redirect_stdout(io.StringIO()):
                serve.shutdown()


def _start(job: ServeJob, replicas: int, resources: dict[str, float]) -> None:
    quiet = LoggingConfig(log_level="ERROR", enable_access_log=False)
    deployment = serve.deployment(
        Replica,
        name=_REPLICA,
        num_replicas=replicas,
        max_ongoing_requests=job.serve.max_requests + _SPARE_REQUESTS,
        max_queued_requests=_MOST_IN_PROXY,
        ray_actor_options=resources,
        max_constructor_retry_count=1,
        graceful_shutdown_wait_loop_s=0.2,
        logging_config=quiet,
    )
    try:
        serve.start(
            proxy_location="HeadOnly",
            http_options=HTTPOptions(host=job.serve.host, port=job.serve.port),
            logging_config=quiet,
        )
        serve.run(deployment.bind(job), name=APPLICATION, route_prefix="/", logging_config=quiet)
    except (RuntimeError, TimeoutError) as error:
        raise ElmoRayError(f"Ray Serve does not start: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    """Return in one line why the start has failed: the error of a replica, where there is one, or else `error`."""
    application = serve.status().applications.get(APPLICATION)
    replica = None if application is None else application.deployments.get(_REPLICA)
    lines = [] if replica is None else [line for line in replica.message.splitlines() if line.strip()]
    return short(lines[-1]) if lines else last_line(error)
