"""One training step: losses, gradients over all ranks, update, carried state.

Shapes: D directions, B rows, T window, U distinct words, C characters, K negatives, R touched rows, P projection.
"""

from __future__ import annotations

import contextlib
import gc
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from elmo_ray import kernels
from elmo_ray.config import PretrainConfig
from elmo_ray.kernels.threads import threads_for_branches
from elmo_ray.model.bilm import TABLES, BiLM
from elmo_ray.model.components import trained_at
from elmo_ray.model.dropout import Dropout
from elmo_ray.model.lstm import LstmState
from elmo_ray.model.softmax import Drawn
from elmo_ray.training.optimizer import Optimizer
from elmo_ray.training.step_input import StepInput, average, micro_batches_of, send_as_bf16


@dataclass
class Gradients:
    """Gradients of the mean loss over all ranks, times unroll. `tables`: of the touched rows, or of whole tables."""

    dense: dict[str, Tensor]
    tables: dict[str, Tensor]
    rows: dict[str, Tensor]


class StepResult(NamedTuple):
    """Gradients, [D] sums of this rank's losses in nats, and the state after the window."""

    gradients: Gradients
    loss_sums: Tensor
    state: LstmState

    def tensors(self) -> dict[str, Tensor]:
        """Return all that was computed, by name."""
        found = {"loss": self.loss_sums, "hidden": self.state.hidden, "cell": self.state.cell}
        return {**found, **self.gradients.dense, **self.gradients.tables}


__all__ = ["DTYPES", "Gradients", "StepInput", "StepOutput", "TrainStep"]

DTYPES = {"fp32": torch.float32, "bf16": torch.float32, "fp64": torch.float64}
"""Types of parameters, states and sums by `train.precision`; bf16 is for the products only."""


@dataclass
class StepOutput:
    """Everything stays on the device. loss_sums: [D] nats summed over this rank's positions."""

    loss_sums: Tensor
    norm: Tensor
    finite: Tensor


class CapturedGradients(Protocol):
    """What may stand for `TrainStep.gradients` once it is captured (`graphs.StepGraphs`)."""

    def gradients(self, batch: StepInput) -> StepResult: ...

    def forget(self) -> None: ...


class TrainStep:
    """The step with its model, optimizer and carried `state` (this worker's rows).

    world > 1 needs torch.distributed to be initialised; ranks stay equal by construction (DESIGN.md 5).
    """

    def __init__(
        self, config: PretrainConfig, model: BiLM, rows: int, rank: int = 0, world: int = 1, total_steps: int = 1
    ):
        self.config, self.model, self.rank, self.world, self.total_steps = config, model, rank, world, total_steps
        self.device = next(model.parameters()).device
        self.dtype = torch.bfloat16 if config.train.precision == "bf16" else None
        self.sampled = config.softmax.kind == "sampled"
        tables = {name: p.detach() for name, p in model.named_parameters() if name in TABLES}
        kernels.use(config.train.kernels)
        self.optimizer = Optimizer(config.optim, model.dense_parameters(), tables)
        self.state = model.lstm.zero_state(rows, like=next(model.parameters()).detach())
        self.forward: torch.nn.Module = model
        self.trained: frozenset[str] = frozenset()
        self.dropout: Dropout | None = None  # that of a graph, where one is captured
        self.graphs: CapturedGradients | None = None
        self.begin(0)
        if world > 1:
            for parameter in model.parameters():  # DDP knows neither the tables nor, where nothing else trains, any
                dist.broadcast(parameter.detach(), src=0)

    def begin(self, step: int) -> bool:
        """Get ready to train the parameters that are due at 0-based `step`. Returns True if the set changed.

        Slots stay as they are. With several ranks gradients must be taken once, and thrown away, before they count.
        """
        names = trained_at(self.config, (name for name, _ in self.model.named_parameters()), step)
        if names == self.trained:
            return False
        self.trained = names
        if self.graphs is not None:
            self.graphs.forget()
        dense = self.optimizer.dense
        for name, parameter in self.model.named_parameters():
            # of a table with sampled softmax the gradients are taken at copies of the touched rows
            parameter.requires_grad_(name in names and (name in dense or not self.sampled))
        if self.world > 1:
            self.forward = self.model
            gc.collect()  # the old wrapper's hooks go with it
            if names & dense.keys():  # DDP refuses a model in which nothing trains
                tables = list(self.optimizer.tables)
                DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self.model, tables)
                self.forward = DistributedDataParallel(self.model, gradient_as_bucket_view=True)
                if self.config.train.gradients == "bf16":
                    send_as_bf16(self.forward)
        return True

    def gradients(self, batch: StepInput) -> StepResult:
        """Run forward and backward; gradients are averaged over all positions of all ranks, losses are this rank's."""
        config, model = self.config, self.model
        leaves: dict[str, Tensor] = {}
        rows: dict[str, Tensor] = {}
        if self.sampled:
            for name, table in self.optimizer.tables.items():
                index = batch.input_rows if name == "word_embedding" and not model.tied else batch.rows
                assert index is not None
                rows[name] = index
                leaves[name] = table.index_select(0, index).requires_grad_(name in self.trained)
        sums: list[Tensor] = []
        states: list[LstmState] = []
        reset = self.state.zero_rows(batch.reset)
        scale = self.scale_of(batch) if batch.scale is None else batch.scale
        micro_batches = list(micro_batches_of(batch, config.train.accumulate))
        for number, (rows_of_it, micro_batch) in enumerate(micro_batches):
            before = reset
            if len(micro_batches) > 1:
                before = LstmState(*(x[:, :, rows_of_it.start : rows_of_it.stop] for x in reset))
            with self._sending(number == len(micro_batches) - 1):
                noise = self.rank * config.train.accumulate + number
                loss_sums, state = self._losses_of(micro_batch, before, leaves, noise)
                (loss_sums.sum() * scale).backward()
            sums.append(loss_sums.detach())
            states.append(state)
        dense = {name: _taken(p) for name, p in self.optimizer.dense.items() if name in self.trained}
        of_tables = leaves if self.sampled else dict(model.named_parameters())
        tables = {name: _taken(of_tables[name]) for name in self.optimizer.tables if name in self.trained}
        if self.world > 1:
            for gradient in tables.values():
                average(gradient, self.world, config.train.gradients)
        if len(micro_batches) == 1:
            return StepResult(Gradients(dense, tables, rows), sums[0], states[0])
        joined = LstmState(*(torch.cat(values, dim=2) for values in zip(*states, strict=True)))
        return StepResult(Gradients(dense, tables, rows), torch.stack(sums).sum(0), joined)

    def scale_of(self, batch: StepInput) -> float:
        """Return the factor from the sum of this rank's losses to what is differentiated."""
        # gradients are averaged over ranks, so each rank's part counts `world` times
        return self.config.train.unroll * self.world / (self.model.directions * max(1, batch.positions))

    def _sending(self, now: bool) -> contextlib.AbstractContextManager[None]:
        """Let gradients travel with the last micro-batch only."""
        if now or not isinstance(self.forward, DistributedDataParallel):
            return contextlib.nullcontext()
        return self.forward.no_sync()

    def _losses_of(
        self, batch: StepInput, before: LstmState, leaves: dict[str, Tensor], noise: int
    ) -> tuple[Tensor, LstmState]:
        """Return [D] sums of losses in nats, and the new state."""
        config = self.config
        dropout = self.dropout
        if dropout is None and config.train.dropout > 0.0:
            dropout = Dropout(config.train.dropout, config.run.seed, batch.step, noise, self.device)
        top_DBTP, state = self.forward(
            batch.types,
            batch.type_classes,
            batch.inputs,
            before,
            batch.lengths,
            dropout,
            self.dtype,
            leaves.get("word_embedding"),
        )
        x_DNP, targets_DN = top_DBTP.flatten(1, 2), batch.targets.flatten(1)
        drawn = self._drawn(batch, leaves) if self.sampled else None
        losses_DN = self.model.softmax_kind.losses(self.model, x_DNP, targets_DN, drawn, self.dtype)
        return losses_DN.sum(dim=1), state

    def _drawn(self, batch: StepInput, leaves: dict[str, Tensor]) -> Drawn:
        """Return the touched rows of the softmax table, and which of them each position and direction uses."""
        assert batch.target_rows is not None and batch.target_log_count is not None
        assert batch.negative_rows is not None and batch.negative_log_count is not None
        return Drawn(
            leaves["word_embedding" if self.model.tied else "softmax_weight"],
            leaves["softmax_bias"],
            batch.target_rows.flatten(1),
            batch.target_log_count.flatten(1),
            batch.negative_rows,
            batch.negative_log_count,
        )

    def run(self, batch: StepInput) -> StepOutput:
        """Do a whole step. Where the gradient is not finite neither the parameters nor the state change."""
        # nearly all is done by two branches then
        branches = self.device.type == "cpu" and self.sampled and self.model.directions > 1
        with threads_for_branches() if branches else contextlib.nullcontext():
            return self._run(batch)

    def _run(self, batch: StepInput) -> StepOutput:
        gradients, sums, state = (self.gradients if self.graphs is None else self.graphs.gradients)(batch)
        norm, finite = self.optimizer.apply(
            gradients.dense, gradients.rows, gradients.tables, batch.step, self.total_steps
        )
        self.state = LstmState(*(torch.where(finite, new, old) for new, old in zip(state, self.state, strict=True)))
        return StepOutput(sums, norm, finite)


def _taken(parameter: Tensor) -> Tensor:
    gradient = parameter.grad
    if gradient is None:
        return torch.zeros_like(parameter)
    parameter.grad = None
    return gradient
