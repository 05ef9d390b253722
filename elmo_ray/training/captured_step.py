"""A training step as two functions that a GPU captures once and then repeats, each as one launch in place of hundreds.

The first is forward and backward of a micro-batch, the second is norm, clip and optimizer. Between the two several
workers average their gradients, which are one flat tensor then, by one all-reduce. Accumulation repeats the first.

A captured function reads and writes the same memory in every step. So each shape of the input has tensors of its own
for the input, the state and the scale of the loss, into which those of a step are copied; the learning rate and the key
of dropout are numbers in the GPU's memory. `Capacities` keeps the number of shapes small.

How a function is captured is the `Record`'s: `CudaGraphs` on a GPU, and `play`, which calls it every time, in tests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from elmo_ray.model.lstm import LstmState
from elmo_ray.training.cuda_graphs import Record
from elmo_ray.training.step import CapturedResult, TrainStep, average
from elmo_ray.training.step_input import StepInput, micro_batches_of


def captured_by(record: Record | None) -> Callable[[TrainStep], CapturedStep] | None:
    """Return what a TrainStep takes as `capture`."""
    return None if record is None else lambda step: CapturedStep(step, record)


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
        key = batch.shape_key
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
        if not optimizer.can_be_captured:
            rows = step.touched_rows(self._input)
            return optimizer.apply(*self._by_kind(rows), number, step.total_steps)
        self._captured.rate.fill_(optimizer.rate_at(1.0, number, step.total_steps))
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
