"""Repeating a function on a GPU as a CUDA graph: one launch in place of the hundreds that the function consists of.

A captured function reads and writes the same memory in every call. It is called plainly first, then captured, once; if
that fails, nothing is captured any more in this process, and functions are called plainly.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import logging
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch

from elmo_ray import kernels
from elmo_ray.config import PretrainConfig
from elmo_ray.model.bilm import BiLM
from elmo_ray.training.step_input import device_lock

logger = logging.getLogger(__name__)

Function = Callable[[], Any]


class Record(Protocol):
    """Maker of a function that repeats another one, which reads and writes memory at the same places in each call."""

    def __call__(self, function: Function, plain_calls: int) -> Function:
        """Return a function that does the same. plain_calls: how often it must be called before it can be captured."""

    def forget(self) -> None:
        """Prepare for other functions; those that were returned are no longer used."""


class _Play:
    """The record that captures nothing: it calls the function every time."""

    def __call__(self, function: Function, plain_calls: int) -> Function:
        return function

    def forget(self) -> None:
        pass


play = _Play()


_MOST_GRAPHS = 16
"""Maximum number of graphs: those of a shape may hold gradients of the whole model."""


def record_for(config: PretrainConfig, model: BiLM) -> CudaGraphs | None:
    """Return the record of a model's training steps on its device; None where they are not captured.

    On a GPU a line in the log says why not, unless the kernels are off.
    """
    parameter = next(model.parameters())
    if parameter.device.type != "cuda" or config.train.kernels == "off":
        return None
    if why := why_not_captured(config, model):
        logger.info("training steps are not captured as CUDA graphs: %s", why)
        return None
    return CudaGraphs(parameter.device)


def why_not_captured(config: PretrainConfig, model: BiLM) -> str | None:
    """Return why a model's training steps are run operation by operation; None where they can be captured."""
    if config.train.precision == "fp64":
        return "train.precision=fp64 has no kernels"
    if not config.softmax.facts.has_fixed_shapes:
        return f"softmax.kind={config.softmax.kind} has shapes that depend on the words"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if not kernels.has_gpu_kernels(next(model.parameters())):
        return "the kernels are turned off (ELMO_RAY_KERNELS)"
    cnn = model.char_cnn
    if cnn is not None and kernels.word_features(cnn.embedding, tuple(cnn.filters)) is None:
        return "the windows of model.char_cnn.filters are too large for the kernel"
    return None


class CudaGraphs:
    """The record that captures CUDA graphs, which share memory, for no two run at a time."""

    failed = False
    """Whether a capture has failed in this process. None is tried after that: PyTorch (up to 2.13 at least) may leave
    the allocator as in a capture, for which the next one can fail as well."""

    def __init__(self, device: torch.device):
        self.device, self.stream = device, torch.cuda.Stream(device)
        self.count, self._told = 0, False
        self.pool: Any = None

    def __call__(self, function: Function, plain_calls: int) -> Function:
        return _Graph(self, function, plain_calls)

    def forget(self) -> None:
        # the memory of graphs that are gone cannot be captured into again
        self.count, self.pool = 0, None
        gc.collect()

    def may_capture(self) -> bool:
        """Return whether another graph may be captured, and say once if there are too many."""
        if self.count < _MOST_GRAPHS:
            return not self.failed
        if not self._told:
            logger.warning("more than %d shapes of training steps: the others are not captured", _MOST_GRAPHS // 2)
        self._told = True
        return False


class _Graph:
    """A function that is called plainly at first, then captured, then replayed."""

    def __init__(self, graphs: CudaGraphs, function: Function, plain_calls: int):
        self._graphs, self._function, self._plain_calls = graphs, function, plain_calls
        self._graph: torch.cuda.CUDAGraph | None = None
        self._result: Any = None

    def __call__(self) -> Any:
        if self._graph is None and self._plain_calls == 0 and self._graphs.may_capture():
            self._capture()
        if self._graph is not None:
            self._graph.replay()
            return self._result
        self._plain_calls = max(0, self._plain_calls - 1)
        with self._on_its_stream():
            return self._function()

    def _capture(self) -> None:
        graphs = self._graphs
        graph = torch.cuda.CUDAGraph()
        try:
            with device_lock, torch.cuda.device(graphs.device), _without_garbage_collection():
                if graphs.pool is None:
                    graphs.pool = torch.cuda.graph_pool_handle()
                # only this thread is checked: others may call the driver for what is unrelated to the graph
                with torch.cuda.graph(graph, pool=graphs.pool, stream=graphs.stream, capture_error_mode="thread_local"):
                    self._result = self._function()
        except Exception as error:  # of many kinds, from torch, the driver or Triton; plain steps still work
            CudaGraphs.failed = True
            message = str(error).splitlines()[0] if str(error) else ""
            logger.warning("no CUDA graphs from here on: %s: %s", type(error).__name__, message)
            return
        self._graph = graph
        graphs.count += 1

    @contextlib.contextmanager
    def _on_its_stream(self) -> Iterator[None]:
        """Run on the stream of captures, where handles, workspaces and compiled kernels are made before one."""
        stream, current = self._graphs.stream, torch.cuda.current_stream(self._graphs.device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            yield
        current.wait_stream(stream)


@contextlib.contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Collect garbage before and none inside: a graph or an event that is destroyed in a capture would spoil it."""
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
