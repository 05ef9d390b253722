"""What a step's forward and backward give."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from elmo_ray.model.lstm import LstmState


@dataclass
class Gradients:
    """Gradients of the mean loss over all ranks, times unroll. `tables`: of the touched rows, or of whole tables."""

    dense: dict[str, Tensor]
    tables: dict[str, Tensor]
    rows: dict[str, Tensor]


class Computed(NamedTuple):
    """Gradients, [D] sums of this rank's losses in nats, and the state after the window."""

    gradients: Gradients
    loss_sums: Tensor
    state: LstmState

    def tensors(self) -> dict[str, Tensor]:
        """All that was computed, by name."""
        found = {"loss": self.loss_sums, "hidden": self.state.hidden, "cell": self.state.cell}
        return {**found, **self.gradients.dense, **self.gradients.tables}
