"""A training step as two functions that a GPU captures once and then repeats, each as one launch in place of hundreds.

The first is forward and backward of a micro-batch, the second is norm, clip and optimizer. Between the two several
workers average their gradients, which are one flat tensor then, by one all-reduce. Accumulation repeats the first.

A captured function reads and writes the same memory in every step. So each shape of the input has tensors of its own
for the input, the state and the scale of the loss, into which those of a step are copied; the learning rate and the key
of dropout are numbers in the GPU's memory. `Capacities` keeps the number of shapes small.

How a function is captured is the `Record`'s: `CudaGraphs` on a GPU, and `play`, which calls it every time, in tests and
wherever a capture failed.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from elmo_ray import kernels
from elmo_ray.config import PretrainConfig
from elmo_ray.model.bilm import BiLM
from elmo_ray.model.lstm import LstmState
from elmo_ray.training.averaging import average
from elmo_ray.training.optimizer import learning_rate
from elmo_ray.training.step_input import StepInput, device_lock, micro_batches_of

if TYPE_CHECKING:
    from elmo_ray.training.step import TrainStep

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


class CapturedResult(NamedTuple):
    """Result of a step before the state is taken over.

    loss_sums: [D] nats of this rank. state: after the window. norm: 0-d, of all gradients. finite: 0-d bool, False if
    nothing was updated.
    """

    loss_sums: Tensor
    state: LstmState
    norm: Tensor
    finite: Tensor


class CapturedStep:
    """Runner of the two functions of a `TrainStep`."""

    def __init__(self, step: TrainStep, record: Record):
        self._step, self._record = step, record
        self._shapes: dict[tuple, _Shape] = {}
        self._in_one = step.world > 1 or step.config.train.accumulate > 1
        self._flat: Tensor | None = None
        self.dropout = step.dropout_of(0, 0)
        # reading a number waits for the device, and a number in a call is captured with it: hence tensors
        dtype = step.state.hidden.dtype
        self.rate = torch.zeros((), dtype=dtype, device=step.device)
        rates = [step.optimizer.rates[name] for name in step.optimizer.values]
        self.base_rates = torch.tensor(rates, dtype=dtype, device=step.device)

    def forget(self) -> None:
        """Drop what was captured, because other parameters are trained from here on."""
        self._shapes.clear()
        self._flat = None
        self._record.forget()

    def run(self, batch: StepInput) -> CapturedResult:
        """Compute losses and state, and update the parameters if the gradients are finite."""
        step, config = self._step, self._step.config
        micro_batches = list(micro_batches_of(batch, config.train.accumulate))
        shapes = [self._shape_of(micro_batch) for _, micro_batch in micro_batches]
        if self._flat is not None and config.train.accumulate > 1:
            self._flat.zero_()
        results = []
        for number, ((rows, micro_batch), shape) in enumerate(zip(micro_batches, shapes, strict=True)):
            before = LstmState(*(x[:, :, rows.start : rows.stop] for x in step.state))
            if self.dropout is not None:
                self.dropout.seed(config.run.seed, batch.step, step.noise_of(number))
            sums, state = shape.compute(micro_batch, before, step.scale_of(batch))
            # the next call writes over its results
            results.append((sums.clone(), LstmState(*(x.clone() for x in state)) if len(shapes) > 1 else state))
        if step.world > 1:
            average(shapes[-1].flat, step.world, config.train.gradients)
        norm, finite = shapes[-1].update(batch.step)
        if len(results) == 1:
            return CapturedResult(*results[0], norm, finite)
        sums = torch.stack([sums for sums, _ in results]).sum(0)
        states = zip(*(state for _, state in results), strict=True)
        return CapturedResult(sums, LstmState(*(torch.cat(parts, dim=2) for parts in states)), norm, finite)

    def _shape_of(self, batch: StepInput) -> _Shape:
        """Return what there is for inputs of this shape."""
        tensors = batch.tensors().items()
        key = (batch.type_classes, batch.n_windows, *((name, x.shape, x.dtype) for name, x in tensors))
        if key not in self._shapes:
            sizes = _gradient_sizes(self._step, self._step.touched_rows(batch))
            needed = sum(size.numel() for size in sizes.values())
            if self._in_one and (self._flat is None or len(self._flat) < needed):
                self.forget()
                self._flat = self._step.state.hidden.new_zeros(needed)
            flat = None if self._flat is None else self._flat[:needed]
            self._shapes[key] = _Shape(self._step, self, batch, sizes, flat, self._record)
        return self._shapes[key]


class _Shape:
    """The two functions for inputs of one shape, with the tensors that they read.

    sizes: of all gradients. flat: where they are gathered for an average or to be accumulated; None: they stay where
    autograd leaves them.
    """

    def __init__(
        self,
        step: TrainStep,
        captured: CapturedStep,
        batch: StepInput,
        sizes: dict[str, torch.Size],
        flat: Tensor | None,
        record: Record,
    ):
        self._step, self._captured, self._names = step, captured, list(sizes)
        block = (batch if batch.block is not None else batch.to(step.device)).block
        assert block is not None
        self._input = batch.over(torch.zeros_like(block))
        rows = len(batch.lengths)
        self._state = step.model.lstm.zero_state(rows, like=step.state.hidden)
        self._scale = torch.zeros((), dtype=step.state.hidden.dtype, device=step.device)
        self._gradients: list[Tensor] = []
        if flat is not None:
            pieces = flat.split([size.numel() for size in sizes.values()])
            self._gradients = [piece.view(size) for piece, size in zip(pieces, sizes.values(), strict=True)]
        self._flat = flat
        # The second function finds its gradients where the first one leaves them, once that is captured: so a call
        # more is plain, which tells its kernels where they are.
        self._forward_and_backward = record(self._compute_gradients, 1)
        self._finish = record(self._update, 2)

    @property
    def flat(self) -> Tensor:
        assert self._flat is not None
        return self._flat

    def compute(self, batch: StepInput, state: LstmState, scale: float) -> tuple[Tensor, LstmState]:
        """Compute the gradients of a micro-batch; return [D] its losses' sums and the state, until the next call."""
        block = (batch if batch.block is not None else batch.to(self._step.device)).block
        assert block is not None and self._input.block is not None
        self._input.step = batch.step
        self._input.block.copy_(block)
        torch._foreach_copy_([*self._state], [*state])
        self._scale.fill_(scale)
        sums, after = self._forward_and_backward()
        return sums, after

    def update(self, number: int) -> tuple[Tensor, Tensor]:
        """Update the parameters by these gradients in the step with this number; return norm and whether finite."""
        step, optimizer = self._step, self._step.optimizer
        if optimizer.adamw is not None:
            rows = step.touched_rows(self._input)
            return optimizer.apply(*self._by_kind(rows), number, step.total_steps)
        self._captured.rate.fill_(learning_rate(step.config.optim, 1.0, number, step.total_steps))
        norm, finite = self._finish()
        for name in self._names:
            # a captured update does not tell those who keep what they made of a weight
            torch.autograd.graph.increment_version(optimizer.values[name])
        return norm.clone(), finite.clone()

    def _compute_gradients(self) -> tuple[Tensor, LstmState]:
        step, batch = self._step, self._input
        leaves = step.touched_leaves(step.touched_rows(batch))
        before = self._state.zero_rows(batch.reset)
        loss_sums, state = step.losses_of(batch, before, leaves, self._captured.dropout)
        parameters = dict(step.model.named_parameters())
        at = [leaves[name] if name in leaves else parameters[name] for name in self._names]
        gradients = torch.autograd.grad(loss_sums.sum() * self._scale, at, materialize_grads=True, allow_unused=True)
        if self._flat is None:
            self._gradients = [gradient.contiguous() for gradient in gradients]
        elif step.config.train.accumulate > 1:
            torch._foreach_add_(self._gradients, gradients)
        else:
            torch._foreach_copy_(self._gradients, gradients)
        return loss_sums.detach(), state

    def _update(self) -> tuple[Tensor, Tensor]:
        optimizer = self._step.optimizer
        rates = (self._captured.base_rates * self._captured.rate).unbind()
        by_name = dict(zip(optimizer.values, rates, strict=True))
        gradients = self._by_kind(self._step.touched_rows(self._input))
        return optimizer.apply(*gradients, 0, self._step.total_steps, by_name)

    def _by_kind(self, rows: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Mapping[str, Tensor], dict[str, Tensor]]:
        """Return the gradients as `Optimizer.apply` takes them: dense ones, rows of tables, gradients of tables."""
        found = dict(zip(self._names, self._gradients, strict=True))
        tables = {name: found.pop(name) for name in self._names if name in self._step.optimizer.tables}
        return found, {name: some for name, some in rows.items() if name in tables}, tables


def _gradient_sizes(step: TrainStep, rows: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    """Return the shapes of the gradients of all parameters that are trained, by name; those of tables are the last."""
    sizes = {name: value.shape for name, value in step.optimizer.values.items() if name in step.trained}
    return {n: size if n not in rows else torch.Size((len(rows[n]), *size[1:])) for n, size in sizes.items()}


# ---------------------------------------------------------------- CUDA graphs

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
    if config.softmax.kind == "adaptive":
        return "softmax.kind=adaptive has shapes that depend on the words"
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
