"""The LSTM state that a layer keeps from call to call, row by row, as AllenNLP's does without asking."""

from __future__ import annotations

import torch
from torch import Tensor

from elmo_ray.errors import ConfigError
from elmo_ray.model.lstm import LstmState


class CarriedState:
    """Row b of a batch goes on where row b of the batch before ended; `stateful=False` starts every sentence at zero.

    A smaller batch uses and updates the first rows, the others wait; new rows of a larger batch begin at zero.
    """

    def __init__(self, stateful: bool = True):
        self.stateful = stateful
        self._states: LstmState | None = None

    def start(self, rows: int, like: Tensor) -> LstmState | None:
        """The state that `rows` rows begin with, on the device and in the type of `like`; None for zeros."""
        if not self.stateful or self._states is None:
            return None
        kept = [tensor[:, :, :rows].to(like) for tensor in self._states]
        missing = rows - kept[0].shape[2]
        if missing > 0:
            kept = [torch.cat([x, x.new_zeros(*x.shape[:2], missing, x.shape[3])], dim=2) for x in kept]
        return LstmState(*kept)

    def keep(self, after: LstmState) -> None:
        """Takes the state at the end of a batch."""
        if not self.stateful:
            return
        if self._states is not None and self._states.cell.shape[2] > after.cell.shape[2]:
            rows = after.cell.shape[2]
            after = LstmState(
                *(
                    torch.cat([new, old[:, :, rows:].to(new)], dim=2)
                    for new, old in zip(after, self._states, strict=True)
                )
            )
        self._states = after.detach()

    def reset_states(self, mask: Tensor | None = None) -> None:
        """Forgets all rows, or those where `mask` [rows] is set; raises ConfigError for another number of rows."""
        if mask is None or self._states is None:
            self._states = None
            return
        rows = self._states.cell.shape[2]
        if mask.shape != (rows,):
            raise ConfigError(f"reset_states: the mask has shape {list(mask.shape)}, the state has {rows} rows")
        self._states = self._states.zero_rows(mask.to(self._states.cell.device, torch.bool))
