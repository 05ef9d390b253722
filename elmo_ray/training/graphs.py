"""The forward and backward of a step as CUDA graphs: one launch in place of thousands of small kernels.

A graph repeats the same kernels on the same memory. So it has tensors of its own for the input, the state and the scale
of the loss, into which those of each step are copied, and one graph is captured for each shape of the input. Dropout
remains a function of (seed, step, rank): a graph's generators are seeded before each replay, and torch passes a
registered generator's seed and offset to the graph when it is replayed. The optimizer runs outside of the graphs, for
its rate changes from step to step. If a capture fails, training continues with plain steps and a line in the log. The
first steps of a graph are computed plainly as well, and the results must agree.

`FixedShapes` keeps the number of shapes small: it pads the distinct words and the touched rows. Padding changes no
result. No input is a padding word, so it gets no gradient; padding rows are not among the touched ones, and Adagrad
does not move a row whose gradient is 0. The padded size depends on the batch and the configuration only, never on
earlier batches. So a resumed run has the shapes of one that was never stopped, and all ranks have the same rows.

Shapes: U distinct words, C characters, R touched rows, V vocabulary.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from elmo_ray.config import PretrainConfig
from elmo_ray.data.characters import PADDING
from elmo_ray.data.word_types import TypeTable
from elmo_ray.model.dropout import Dropout
from elmo_ray.model.lstm import LstmState
from elmo_ray.training.step import StepResult
from elmo_ray.training.step_input import StepInput, device_lock

if TYPE_CHECKING:
    from elmo_ray.training.step import TrainStep

logger = logging.getLogger(__name__)

_GROWTH = 0.1
"""Step from one size of distinct words to the next, as a share of the usual number of them."""

_ROWS_STEPS = 16
"""Number of sizes to which touched rows are rounded up; the last one is the maximum that a step can touch."""

_MULTIPLE = 8  # of sizes, which suits matrix products


class FixedShapes:
    """Function that pads StepInputs while they are still on the CPU.

    columns: of the length classes, in rising order ([1] for word input). expected: distinct words of each class in a
    batch. rare: the number of rare words in each class, of which a batch has more or fewer. max_rows: the rows that a
    step can touch at most, of the softmax table and of an untied word embedding.
    """

    def __init__(
        self,
        columns: Sequence[int],
        expected: NDArray[np.float64],
        rare: NDArray[np.int64],
        n_words: int,
        max_rows: tuple[int, int],
    ):
        self._class_of = {width: number for number, width in enumerate(columns)}
        self._columns = list(columns)
        # the mean and twice the standard deviation of draws of words
        self._usual = expected + 2.0 * np.sqrt(expected) + 1.0
        self._more = 1.0 + _GROWTH * self._usual.sum() * rare / rare.sum()
        self._n_words = n_words
        self._steps_of_rows = [max(1, _rounded_up(most / _ROWS_STEPS)) for most in max_rows]

    @classmethod
    def of(cls, config: PretrainConfig, n_words: int, characters: TypeTable | None, rows: int) -> FixedShapes:
        """Return the shapes for a worker with `rows` streams.

        The expected frequency of a word depends on its rank in the vocabulary, as in the sampled softmax.
        """
        directions = 2 if config.model.bidirectional else 1
        positions = rows * config.train.unroll
        # both directions read the same sentences
        probability = np.log1p(1.0 / np.arange(1, n_words + 1)) / np.log1p(n_words)
        present = -np.expm1(positions * np.log1p(-probability))
        classes, columns = np.zeros(n_words, np.int64), [1]
        if characters is not None:
            classes, columns = characters.classes.astype(np.int64), characters.columns
        expected = np.bincount(classes, present, minlength=len(columns)).astype(np.float64)
        rare = np.bincount(classes[n_words // 2 :], minlength=len(columns))
        targets = directions * config.data.streams * config.train.unroll  # of all ranks
        negatives = directions * config.softmax.negatives
        inputs = targets if config.softmax.tied else 0
        max_rows = min(n_words, targets + negatives + inputs), min(n_words, targets)
        return cls(columns, expected, rare, n_words, max_rows)

    def __call__(self, batch: StepInput) -> StepInput:
        """Return a padded copy."""
        result = copy.copy(batch)
        self._pad_types(result)
        for name, step in zip(("rows", "input_rows"), self._steps_of_rows, strict=True):
            rows = getattr(batch, name)
            if isinstance(rows, Tensor):
                capacity = min(self._n_words, -(-len(rows) // step) * step)
                setattr(result, name, torch.from_numpy(_filled_up(rows.numpy(), capacity)))
        return result

    def _pad_types(self, batch: StepInput) -> None:
        counts = np.zeros(len(self._columns), np.int64)
        for count, width in batch.type_classes:
            counts[self._class_of[width]] = count
        ends = np.cumsum(counts)
        size = 0
        while (place := _places(ends, capacities := self._capacities(size))) is None:
            size += 1
        types = batch.types.numpy()
        padded = np.full((sum(capacities), *types.shape[1:]), PADDING if types.ndim > 1 else 0, types.dtype)
        padded[place] = types
        batch.types = torch.from_numpy(padded)
        batch.inputs = torch.from_numpy(place[batch.inputs.numpy()])
        batch.type_classes = tuple(zip(capacities, self._columns, strict=True))

    def _capacities(self, size: int) -> list[int]:
        return [_rounded_up(n) for n in self._usual + size * self._more]


def _places(ends: NDArray[np.int64], capacities: Sequence[int]) -> NDArray[np.int64] | None:
    """Return the new index of each word; None where the words do not fit.

    Words are sorted by class; `ends` are the numbers of words up to the end of each class. Words for which their class
    has no room go to the next one, whose columns are long enough for them as well.
    """
    place = np.empty(ends[-1], np.int64)
    done = first = 0
    for end, capacity in zip(ends.tolist(), capacities, strict=True):
        count = min(end - done, capacity)
        place[done : done + count] = np.arange(first, first + count)
        done, first = done + count, first + capacity
    return place if done == len(place) else None


def _filled_up(rows: NDArray[np.int64], capacity: int) -> NDArray[np.int64]:
    """Return the rows, followed by the first other rows, `capacity` in all."""
    free = np.ones(capacity, np.bool_)
    free[rows[rows < capacity]] = False
    return np.concatenate([rows, np.flatnonzero(free)[: capacity - len(rows)]])


def _rounded_up(n: float) -> int:
    return int(-(-n // _MULTIPLE)) * _MULTIPLE


_MAX_GRAPHS = 8
"""Maximum number of graphs: each of them holds gradients of the whole model."""

_CHECKED = 2
"""Steps of a graph that are compared with plain ones: that of its capture, and one with other inputs."""

_WARM_UPS = 2

Record = Callable[[Callable[[], StepResult], list[torch.Generator]], tuple[StepResult, Callable[[], None]]]
"""Function that captures another one, which draws from these generators: it returns the result and a replay into it."""


def graphs_for(step: TrainStep) -> StepGraphs | None:
    """Return the graphs of a step; None where it has none, with a line in the log if a user might expect some."""
    train = step.config.train
    if step.device.type != "cuda" or train.kernels == "off":
        return None
    if step.world > 1:
        logger.info("no CUDA graphs with several workers: gradients are summed between them while others are computed")
        return None
    if train.accumulate > 1:
        logger.info("no CUDA graphs with train.accumulate=%d: the shapes of micro-batches change", train.accumulate)
        return None
    return StepGraphs(step, _CudaRecord(step.device))


@dataclass
class _Graph:
    """A captured graph. inputs, state: the tensors it reads. result: those it overwrites. uses: number of replays."""

    inputs: StepInput
    state: LstmState
    result: StepResult
    replay: Callable[[], None]
    uses: int = 0


class StepGraphs:
    """Replacement for `TrainStep.gradients`. The next call overwrites its results, except for the loss sums."""

    def __init__(self, step: TrainStep, record: Record):
        self.step, self.record = step, record
        self.failed = False
        self._graphs: dict[tuple, _Graph] = {}
        self._full = False
        config = step.config
        self._dropout: Dropout | None = None
        if config.train.dropout > 0.0:
            self._dropout = Dropout(config.train.dropout, config.run.seed, 0, step.rank, step.device)

    def forget(self) -> None:
        """Drop all graphs, because other parameters are trained from here on."""
        self._graphs.clear()
        self._full = False

    def gradients(self, batch: StepInput) -> StepResult:
        """Return the result of `TrainStep.gradients`, from a graph if there is one for this shape."""
        if self.failed:
            return self.step.gradients(batch)
        key = _shape(batch)
        graph = self._graphs.get(key)
        if graph is None:
            return self._first(key, batch)
        if graph.uses >= _CHECKED:
            return self._replayed(graph, batch)
        expected = self.step.gradients(batch)
        self._check(self._replayed(graph, batch), expected)
        return expected

    def _first(self, key: tuple, batch: StepInput) -> StepResult:
        expected = self.step.gradients(batch)
        if len(self._graphs) >= _MAX_GRAPHS:
            if not self._full:
                logger.warning("more than %d shapes of step inputs: those of the others have no graph", _MAX_GRAPHS)
            self._full = True
            return expected
        try:
            graph = self._captured(batch)
            self._check(self._replayed(graph, batch), expected)
            self._graphs[key] = graph
        except Exception as error:  # of many kinds, from torch, the driver or Triton; plain steps still work
            self._fail(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
            for parameter in self.step.model.parameters():
                parameter.grad = None  # left by a backward that did not end
        return expected

    def _captured(self, batch: StepInput) -> _Graph:
        step = self.step
        inputs = batch.each(torch.clone)
        inputs.scale = torch.zeros((), dtype=step.state.cell.dtype, device=step.device)
        state = LstmState(*(x.clone() for x in step.state))
        self._fill(inputs, state, batch)

        def compute() -> StepResult:
            return step.gradients(inputs)

        with self._standing_in(state), device_lock:
            result, replay = self.record(compute, [] if self._dropout is None else self._dropout.generators)
        return _Graph(inputs, state, result, replay)

    @contextlib.contextmanager
    def _standing_in(self, state: LstmState) -> Iterator[None]:
        """Let the step use this state and the graphs' generators inside this context."""
        step, before = self.step, self.step.state
        step.state, step.dropout = state, self._dropout
        try:
            yield
        finally:
            step.state, step.dropout = before, None

    def _replayed(self, graph: _Graph, batch: StepInput) -> StepResult:
        self._fill(graph.inputs, graph.state, batch)
        graph.uses += 1
        graph.replay()
        gradients, loss_sums, state = graph.result
        return StepResult(gradients, loss_sums.clone(), state)

    def _fill(self, inputs: StepInput, state: LstmState, batch: StepInput) -> None:
        if self._dropout is not None:
            self._dropout.seed(self.step.config.run.seed, batch.step, self.step.rank)
        given = batch.tensors()
        into = inputs.tensors()
        torch._foreach_copy_([into[name] for name in given] + [*state], [*given.values(), *self.step.state])
        assert inputs.scale is not None
        inputs.scale.fill_(self.step.scale_of(batch))

    def _check(self, found: StepResult, expected: StepResult) -> None:
        name, worst = largest_difference(found, expected)
        if worst > _tolerance(self.step.dtype):
            self._fail(f"{name} differs by {worst:.2g} from the plain step's")

    def _fail(self, why: str) -> None:
        logger.warning("no CUDA graphs from here on: %s", why)
        self.failed = True
        self._graphs.clear()


def largest_difference(found: StepResult, expected: StepResult) -> tuple[str, float]:
    """Return the name of the tensor that differs most, and its difference relative to its largest value."""
    worst: dict[str, Tensor] = {}
    ours = found.tensors()
    for name, theirs in expected.tensors().items():
        # a step may be not finite: then both results must be, in the same places
        a, b = (x.double().nan_to_num(nan=1e30, posinf=1e31, neginf=-1e31) for x in (ours[name], theirs))
        worst[name] = (a - b).abs().max() / b.abs().max().clamp_min(1e-30)
    values = torch.stack(list(worst.values())).tolist()
    return max(zip(worst, values, strict=True), key=lambda pair: pair[1])


def _tolerance(dtype: torch.dtype | None) -> float:
    """Return the tolerated difference: it is not 0, for some kernels add in the order in which threads finish."""
    return 0.02 if dtype == torch.bfloat16 else 1e-3


def _shape(batch: StepInput) -> tuple:
    shapes = [(name, tensor.shape, tensor.dtype) for name, tensor in batch.tensors().items()]
    return (batch.type_classes, *shapes)


class _CudaRecord:
    """Capture on a stream of its own, after warming up there. Graphs share memory, for no two run at a time."""

    def __init__(self, device: torch.device):
        self.device = device
        self._stream: torch.cuda.Stream | None = None

    def __call__(
        self, function: Callable[[], StepResult], generators: list[torch.Generator]
    ) -> tuple[StepResult, Callable[[], None]]:
        with torch.cuda.device(self.device):
            if self._stream is None:
                self._stream, self._pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                for _ in range(_WARM_UPS):  # handles, workspaces and compiled kernels are made once
                    function()
            torch.cuda.current_stream().wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            for generator in generators:
                graph.register_generator_state(generator)
            # only this thread is checked: other threads may call the driver for things unrelated to the graph
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                result = function()
        return result, graph.replay
