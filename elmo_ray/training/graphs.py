"""The forward and backward of a step as CUDA graphs: thousands of small kernels become one launch.

A graph repeats the same kernels on the same memory. So it has tensors of its own for what a step is given (input,
state, scale of the loss), into which each step's are copied, and one is captured for each shape of the input
(`fixed_shapes.py` makes those few). Dropout keeps being a function of (seed, step, rank): a graph's generators are
seeded before each replay, and torch hands a registered generator's seed and offset to the graph when it is replayed.
The optimizer runs outside of the graphs, for its rate changes from step to step.

Whatever goes wrong while a graph is captured leaves plain steps, and a line in the log. The first steps of a graph are
computed plainly as well, and must agree.

Step inputs of few shapes, for what is prepared once for each shape (CUDA graphs): distinct words and touched rows
are padded.

Padding changes nothing. Nobody's input is a padding word, so no gradient comes to it; the rows that pad are others than
the touched ones, and Adagrad does not move a row whose gradient is 0. What a batch is padded to depends on that batch
and on the configuration alone, never on the batches before it: a resumed run has the shapes of one never stopped, and
all ranks have the same rows.

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
from elmo_ray.training.step_input import StepInput, device_quiet

_GROWTH = 0.1
"""From one size of distinct words to the next, in the number of those that are usual."""

_ROWS_STEPS = 16
"""Into how many sizes the touched rows are rounded up; the last is the most that a step can touch."""

_MULTIPLE = 8  # of sizes, which suits the products


class FixedShapes:
    """Pads StepInputs, which are on the CPU yet.

    columns: of the length classes, rising ([1] for word input); expected: distinct words of each in a batch; rare: how
    many of the rare words are of each, of which a batch has more or less. most_rows: that a step can touch, of the
    softmax table and of an untied word embedding.
    """

    def __init__(
        self,
        columns: Sequence[int],
        expected: NDArray[np.float64],
        rare: NDArray[np.int64],
        n_words: int,
        most_rows: tuple[int, int],
    ):
        self._class_of = {width: number for number, width in enumerate(columns)}
        self._columns = list(columns)
        # twice the spread that draws of words would have
        self._usual = expected + 2.0 * np.sqrt(expected) + 1.0
        self._more = 1.0 + _GROWTH * self._usual.sum() * rare / rare.sum()
        self._n_words = n_words
        self._steps_of_rows = [max(1, _rounded_up(most / _ROWS_STEPS)) for most in most_rows]

    @classmethod
    def of(cls, config: PretrainConfig, n_words: int, characters: TypeTable | None, rows: int) -> FixedShapes:
        """For a worker with so many streams. Words are expected as often as the sampled softmax expects them, by their
        place in the vocabulary."""
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
        most_rows = min(n_words, targets + negatives + inputs), min(n_words, targets)
        return cls(columns, expected, rare, n_words, most_rows)

    def __call__(self, batch: StepInput) -> StepInput:
        """A padded copy."""
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
    """Where each of the words goes, which come by class, with the places of each class's last word in `ends`; None
    where they do not fit.

    Words for which their class has no room go to the next, whose columns have room for them as well.
    """
    place = np.empty(ends[-1], np.int64)
    done = first = 0
    for end, capacity in zip(ends.tolist(), capacities, strict=True):
        count = min(end - done, capacity)
        place[done : done + count] = np.arange(first, first + count)
        done, first = done + count, first + capacity
    return place if done == len(place) else None


def _filled_up(rows: NDArray[np.int64], capacity: int) -> NDArray[np.int64]:
    """The rows, and after them the first others, up to `capacity` of them."""
    free = np.ones(capacity, np.bool_)
    free[rows[rows < capacity]] = False
    return np.concatenate([rows, np.flatnonzero(free)[: capacity - len(rows)]])


def _rounded_up(n: float) -> int:
    return int(-(-n // _MULTIPLE)) * _MULTIPLE


if TYPE_CHECKING:
    from elmo_ray.training.step import TrainStep

logger = logging.getLogger(__name__)

_MOST_GRAPHS = 8
"""Each holds gradients of the whole model."""

_CHECKED = 2
"""Steps of a graph that are compared: the one it was captured with, and one that all its inputs differ in."""

_WARM_UPS = 2

Record = Callable[[Callable[[], StepResult], list[torch.Generator]], tuple[StepResult, Callable[[], None]]]
"""Captures a function that draws from these generators: its result, and what repeats it into the same tensors."""


def graphs_for(step: TrainStep) -> StepGraphs | None:
    """Those of this step, where it is to have any; a line in the log says why not where that could be a surprise."""
    train = step.config.train
    if step.device.type != "cuda" or train.kernels == "off":
        return None
    if step.world > 1:
        logger.info("no CUDA graphs with several workers: gradients are summed between them while others are computed")
        return None
    if train.accumulate > 1:
        logger.info("no CUDA graphs with train.accumulate=%d: the shapes of parts change", train.accumulate)
        return None
    return StepGraphs(step, _CudaRecord(step.device))


@dataclass
class _Graph:
    """inputs, state: what it reads; result: what `replay` fills anew. uses: how often it was."""

    inputs: StepInput
    state: LstmState
    result: StepResult
    replay: Callable[[], None]
    uses: int = 0


class StepGraphs:
    """Stands for `TrainStep.gradients`. Results are overwritten by the next call, but for the loss sums."""

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
        """Other parameters are trained from here on."""
        self._graphs.clear()
        self._full = False

    def gradients(self, batch: StepInput) -> StepResult:
        """As `TrainStep.gradients`."""
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
        if len(self._graphs) >= _MOST_GRAPHS:
            if not self._full:
                logger.warning("more than %d shapes of step inputs: those of the others have no graph", _MOST_GRAPHS)
            self._full = True
            return expected
        try:
            graph = self._captured(batch)
            self._check(self._replayed(graph, batch), expected)
            self._graphs[key] = graph
        except Exception as error:  # of many kinds, from torch, the driver or Triton; the plain step needs none of it
            self._fail(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
            for parameter in self.step.model.parameters():
                parameter.grad = None  # of a backward that did not end
        return expected

    def _captured(self, batch: StepInput) -> _Graph:
        step = self.step
        inputs = batch.each(torch.clone)
        inputs.scale = torch.zeros((), dtype=step.state.cell.dtype, device=step.device)
        state = LstmState(*(x.clone() for x in step.state))
        self._fill(inputs, state, batch)

        def compute() -> StepResult:
            return step.gradients(inputs)

        with self._standing_in(state), device_quiet:
            result, replay = self.record(compute, [] if self._dropout is None else self._dropout.generators)
        return _Graph(inputs, state, result, replay)

    @contextlib.contextmanager
    def _standing_in(self, state: LstmState) -> Iterator[None]:
        """The step begins with this state and with the graphs' generators."""
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
    """Of all tensors, relative to the largest value of each, and the tensor's name."""
    worst: dict[str, Tensor] = {}
    ours = found.tensors()
    for name, theirs in expected.tensors().items():
        # a step may be one that is not finite: then both are, in the same places
        a, b = (x.double().nan_to_num(nan=1e30, posinf=1e31, neginf=-1e31) for x in (ours[name], theirs))
        worst[name] = (a - b).abs().max() / b.abs().max().clamp_min(1e-30)
    values = torch.stack(list(worst.values())).tolist()
    return max(zip(worst, values, strict=True), key=lambda pair: pair[1])


def _tolerance(dtype: torch.dtype | None) -> float:
    """The same kernels on the same numbers; but some add in the order in which threads come."""
    return 0.02 if dtype == torch.bfloat16 else 1e-3


def _shape(batch: StepInput) -> tuple:
    shapes = [(name, tensor.shape, tensor.dtype) for name, tensor in batch.tensors().items()]
    return (batch.type_classes, *shapes)


class _CudaRecord:
    """Captures on a stream of its own, after warming up there. Graphs share their memory, for never do two run."""

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
                for _ in range(_WARM_UPS):  # what is made once: handles, workspaces, compiled kernels
                    function()
            torch.cuda.current_stream().wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            for generator in generators:
                graph.register_generator_state(generator)
            # errors of this thread only: others may ask the driver for what is no business of the graph
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                result = function()
        return result, graph.replay
