"""One training step: losses, gradients averaged over all ranks, update of the parameters, and carried state.

Shapes: D directions, B rows, T window, U distinct words, C characters, K negatives, R touched rows, P projection.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from elmo_ray import kernels
from elmo_ray.config import PretrainConfig
from elmo_ray.kernels.threads import threads_for_branches
from elmo_ray.model.bilm import TABLES, BiLM
from elmo_ray.model.dropout import Dropout
from elmo_ray.model.lstm import LstmState
from elmo_ray.model.softmax import Drawn
from elmo_ray.training.components import trained_at
from elmo_ray.training.optimizer import Optimizer
from elmo_ray.training.step_input import StepInput, micro_batches_of


@dataclass
class Gradients:
    """Gradients of the mean loss over all ranks, times the window's length.

    dense: by parameter. tables: of the touched rows [R, ...], or of whole tables [V, ...]. rows: [R] the touched rows
    of each table, empty for whole tables.
    """

    dense: dict[str, Tensor]
    tables: dict[str, Tensor]
    rows: dict[str, Tensor]


class StepResult(NamedTuple):
    """Result of forward and backward. loss_sums: [D] this rank's losses in nats. state: after the window."""

    gradients: Gradients
    loss_sums: Tensor
    state: LstmState

    def tensors(self) -> dict[str, Tensor]:
        """Return all computed tensors by name."""
        found = {"loss": self.loss_sums, "hidden": self.state.hidden, "cell": self.state.cell}
        return {**found, **self.gradients.dense, **self.gradients.tables}


DTYPES = {"fp32": torch.float32, "bf16": torch.float32, "fp64": torch.float64}
"""Type of parameters, states and sums by `train.precision`; bf16 is the type of matrix products only."""


@dataclass
class StepOutput:
    """Results of a step, all on the device.

    loss_sums: [D] nats summed over this rank's positions. norm: 0-d, of all gradients. finite: 0-d bool, False where
    the step changed nothing.
    """

    loss_sums: Tensor
    norm: Tensor
    finite: Tensor


class CapturedResult(NamedTuple):
    """Result of a captured step before the state is taken over, with the fields of StepResult and StepOutput."""

    loss_sums: Tensor
    state: LstmState
    norm: Tensor
    finite: Tensor


class Captured(Protocol):
    """Form of a TrainStep that is captured (`captured_step.CapturedStep`)."""

    def run(self, batch: StepInput) -> CapturedResult:
        """Compute losses and state, and update the parameters if the gradients are finite."""

    def forget(self) -> None:
        """Drop what was captured, because other parameters are trained from here on."""


class TrainStep:
    """A training step with its model, optimizer and carried `state` (this worker's rows).

    world > 1 needs torch.distributed to be initialised. Parameters stay equal on all ranks: they begin equal, and every
    rank applies the same gradients. capture: makes the captured form of the step; None: there is none, and several
    workers average gradients by DistributedDataParallel.
    """

    def __init__(
        self,
        config: PretrainConfig,
        model: BiLM,
        rows: int,
        rank: int = 0,
        world: int = 1,
        total_steps: int = 1,
        capture: Callable[[TrainStep], Captured] | None = None,
    ):
        self.config, self.model, self.rank, self.world, self.total_steps = config, model, rank, world, total_steps
        self.device = next(model.parameters()).device
        self.dtype = torch.bfloat16 if config.train.precision == "bf16" else None
        self.sampled = config.softmax.facts.samples_words
        tables = {name: p.detach() for name, p in model.named_parameters() if name in TABLES}
        kernels.use(config.train.kernels)
        self.optimizer = Optimizer(config.optim, model.dense_parameters(), tables)
        self.state = model.lstm.zero_state(rows, like=next(model.parameters()).detach())
        self.forward: torch.nn.Module = model
        self.trained: frozenset[str] = frozenset()
        self.captured = None if capture is None else capture(self)
        self.begin(0)
        if world > 1:
            # DDP would leave out the tables, and everything where nothing but them trains
            for parameter in model.parameters():
                dist.broadcast(parameter.detach(), src=0)

    def begin(self, step: int) -> bool:
        """Prepare to train the parameters of the step with this 0-based number. Return True if the set changed.

        The optimizer's slots stay as they are. After a change, `settle` must be called.
        """
        names = trained_at(self.config, (name for name, _ in self.model.named_parameters()), step)
        if names == self.trained:
            return False
        self.trained = names
        if self.captured is not None:
            self.captured.forget()
        dense = self.optimizer.dense
        for name, parameter in self.model.named_parameters():
            # with a sampled softmax the gradients of tables are taken at copies of the touched rows
            parameter.requires_grad_(name in names and (name in dense or not self.sampled))
        if self.world > 1 and self.captured is None:
            self.forward = self.model
            gc.collect()  # removes the hooks of the old wrapper
            if names & dense.keys():  # DDP refuses a model in which nothing trains
                tables = list(self.optimizer.tables)
                DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self.model, tables)
                self.forward = DistributedDataParallel(self.model, gradient_as_bucket_view=True)
                if self.config.train.gradients == "bf16":
                    send_as_bf16(self.forward)
        return True

    def settle(self, batch: StepInput) -> None:
        """Make sums of gradients come in the order that they will keep; nothing else changes."""
        if isinstance(self.forward, DistributedDataParallel):
            self.gradients(batch)  # DDP rearranges its buckets after its first backward

    def gradients(self, batch: StepInput) -> StepResult:
        """Compute forward and backward, with gradients averaged over all positions of all ranks."""
        config, model = self.config, self.model
        rows = self.touched_rows(batch)
        leaves = self.touched_leaves(rows)
        sums: list[Tensor] = []
        states: list[LstmState] = []
        reset = self.state.zero_rows(batch.reset)
        scale = self.scale_of(batch)
        micro_batches = list(micro_batches_of(batch, config.train.accumulate))
        for number, (rows_of_it, micro_batch) in enumerate(micro_batches):
            before = reset
            if len(micro_batches) > 1:
                before = LstmState(*(x[:, :, rows_of_it.start : rows_of_it.stop] for x in reset))
            with self._sync(number == len(micro_batches) - 1):
                dropout = self.dropout_of(batch.step, number)
                loss_sums, state = self.losses_of(micro_batch, before, leaves, dropout)
                (loss_sums.sum() * scale).backward()
            sums.append(loss_sums.detach())
            states.append(state)
        dense = {name: _take_gradient(p) for name, p in self.optimizer.dense.items() if name in self.trained}
        of_tables = leaves if self.sampled else dict(model.named_parameters())
        tables = {name: _take_gradient(of_tables[name]) for name in self.optimizer.tables if name in self.trained}
        if self.world > 1:
            for gradient in tables.values():
                average(gradient, self.world, config.train.gradients)
        if len(micro_batches) == 1:
            return StepResult(Gradients(dense, tables, rows), sums[0], states[0])
        joined = LstmState(*(torch.cat(values, dim=2) for values in zip(*states, strict=True)))
        return StepResult(Gradients(dense, tables, rows), torch.stack(sums).sum(0), joined)

    def touched_rows(self, batch: StepInput) -> dict[str, Tensor]:
        """Return the [R] rows of each table that a step touches; nothing where it takes whole tables."""
        if not self.sampled:
            return {}
        untied = not self.model.tied
        found = {n: batch.input_rows if n == "word_embedding" and untied else batch.rows for n in self.optimizer.tables}
        return {name: rows for name, rows in found.items() if rows is not None}

    def touched_leaves(self, rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return copies of these rows of the tables, which gradients are taken at."""
        tables = self.optimizer.tables
        return {n: tables[n].index_select(0, some).requires_grad_(n in self.trained) for n, some in rows.items()}

    def dropout_of(self, step: int, micro_batch: int) -> Dropout | None:
        """Return the dropout of a step's micro-batch with this number."""
        train = self.config.train
        if train.dropout in (0.0, (0.0, 0.0, 0.0)):
            return None
        return Dropout(train.dropout, self.config.run.seed, step, self.noise_of(micro_batch), self.device)

    def noise_of(self, micro_batch: int) -> int:
        """Return the number that is a micro-batch's alone among those of all ranks."""
        return self.rank * self.config.train.accumulate + micro_batch

    def scale_of(self, batch: StepInput) -> float:
        """Return the factor by which the sum of this rank's losses is multiplied before backward."""
        # gradients are averaged over ranks, so each rank's losses count `world` times
        return self.config.train.unroll * self.world / (self.model.directions * max(1, batch.positions))

    def _sync(self, now: bool) -> contextlib.AbstractContextManager[None]:
        """Return a context in which DDP sends gradients only if `now`."""
        if now or not isinstance(self.forward, DistributedDataParallel):
            return contextlib.nullcontext()
        return self.forward.no_sync()

    def losses_of(
        self, batch: StepInput, before: LstmState, leaves: Mapping[str, Tensor], dropout: Dropout | None
    ) -> tuple[Tensor, LstmState]:
        """Return [D] sums of losses in nats, and the new state."""
        top_DBTP, state = self.forward(
            batch.types,
            batch.type_classes,
            batch.inputs,
            before,
            batch.lengths,
            dropout,
            self.dtype,
            leaves.get("word_embedding"),
            batch.windows,
            batch.input_positions,
        )
        x_DNP, targets_DN = top_DBTP.flatten(1, 2), batch.targets.flatten(1)
        drawn = self._drawn(batch, leaves) if self.sampled else None
        losses_DN = self.model.softmax_kind.losses(self.model, x_DNP, targets_DN, drawn, self.dtype)
        return losses_DN.sum(dim=1), state

    def _drawn(self, batch: StepInput, leaves: Mapping[str, Tensor]) -> Drawn:
        """Return the touched rows of the softmax table, and the rows that each position and direction uses."""
        assert batch.target_rows is not None and batch.target_log_count is not None
        assert batch.negative_rows is not None and batch.negative_log_count is not None
        return Drawn(
            leaves["word_embedding" if self.model.tied else "softmax_weight"],
            leaves["softmax_bias"],
            batch.target_rows.flatten(1),
            batch.target_log_count.flatten(1),
            batch.negative_rows,
            batch.negative_log_count,
            batch.target_positions,
        )

    def run(self, batch: StepInput) -> StepOutput:
        """Run a whole step. If the gradient is not finite, neither the parameters nor the state change."""
        # the two directions run in two threads and do nearly all of the work
        branches = self.device.type == "cpu" and self.sampled and self.model.directions > 1
        with threads_for_branches() if branches else contextlib.nullcontext():
            return self._run(batch)

    def _run(self, batch: StepInput) -> StepOutput:
        if self.captured is not None:
            sums, state, norm, finite = self.captured.run(batch)
        else:
            gradients, sums, state = self.gradients(batch)
            norm, finite = self.optimizer.apply(
                gradients.dense, gradients.rows, gradients.tables, batch.step, self.total_steps
            )
        self.state = LstmState(*(torch.where(finite, new, old) for new, old in zip(state, self.state, strict=True)))
        return StepOutput(sums, norm, finite)


def _take_gradient(parameter: Tensor) -> Tensor:
    """Return a parameter's gradient and remove it there; zeros where it has none."""
    gradient = parameter.grad
    if gradient is None:
        return torch.zeros_like(parameter)
    parameter.grad = None
    return gradient


def average(gradient: Tensor, world: int, sent_as: str) -> None:
    """Replace a gradient by its mean over all workers, in place.

    sent_as: `full`, or `bf16` for half the bytes and 8 bits of precision.
    """
    if sent_as == "bf16":
        sent = (gradient / world).to(torch.bfloat16)
        dist.all_reduce(sent)
        gradient.copy_(sent)
    else:
        dist.all_reduce(gradient)
        gradient /= world


def send_as_bf16(model: Any) -> None:
    """Let DistributedDataParallel send the dense gradients as bfloat16, like `average`."""
    model.register_comm_hook(None, _as_bf16)


# without annotations: torch checks them and does not take strings
def _as_bf16(state, bucket):  # type: ignore[no-untyped-def]
    """Call torch's own hook."""
    # by another name: torch refuses that hook with gloo by its name, although gloo can add bfloat16
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

    return default_hooks.bf16_compress_hook(state, bucket)
