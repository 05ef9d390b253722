"""Optimizers: Adagrad for everything, or AdamW for the dense part and Adagrad on the table rows that a step touches.

One global norm over everything decides the clip, as bilm-tf's `clip_by_global_norm`; a step whose norm is not finite
changes nothing, decided on the device.
"""

from __future__ import annotations

import contextlib
import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from elmo_ray import kernels
from elmo_ray.config import OptimConfig
from elmo_ray.kernels.threads import run_parallel
from elmo_ray.model.components import part_of

TABLE_LR = 0.2
ADAMW_SLOTS = ("exp_avg", "exp_avg_sq", "step")


def learning_rate(config: OptimConfig, base: float, step: int, total_steps: int) -> float:
    """Rate of 0-based `step`: linear warm-up to `base`, then constant, or linear or cosine decay to base *
    final_ratio."""
    schedule = config.schedule
    if step < schedule.warmup_steps:
        return base * (step + 1) / schedule.warmup_steps
    if schedule.kind == "constant":
        return base
    done = min(1.0, (step - schedule.warmup_steps) / max(1, total_steps - schedule.warmup_steps))
    left = 1.0 - done if schedule.kind == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return base * (schedule.final_ratio + (1.0 - schedule.final_ratio) * left)


def table_rate(config: OptimConfig) -> float:
    """Base rate of the tables, which keep Adagrad: `optim.table_lr`, or `optim.lr`, which with AdamW is not
    Adagrad's: 0.2."""
    if config.table_lr is not None:
        return config.table_lr
    return config.lr if config.name == "adagrad" else TABLE_LR


def part_rates(config: OptimConfig, dense: Iterable[str], tables: Iterable[str]) -> dict[str, float]:
    """Base rate of each parameter: that of its part (`optim.part_lr`), or of dense parameters or tables in general."""
    general = {**dict.fromkeys(dense, config.lr), **dict.fromkeys(tables, table_rate(config))}
    own = {name: config.part_lr.rate(part_of(name)) for name in general}
    return {name: rate if (part := own[name]) is None else part for name, rate in general.items()}


def global_norm(gradients: list[Tensor]) -> Tensor:
    """0-d norm of all gradients together."""
    norms: list[Sequence[Tensor]] = [[], []]

    def run(part: int) -> None:
        if gradients[part::2]:
            norms[part] = torch._foreach_norm(gradients[part::2])

    run_parallel(run, 2, gradients[0].device)
    return torch.stack([*norms[0], *norms[1]]).square_().sum().sqrt_()


def adagrad(value: Tensor, slot: Tensor, gradient: Tensor, rows: Tensor | None, divisor: Tensor, rate: float) -> None:
    """Update in place: slot += (gradient / divisor)^2; value -= rate * gradient / divisor / sqrt(slot).

    rows: the rows of `value` and `slot` that the rows of `gradient` belong to, each of them once; None: all rows.
    divisor: 0-d; 0 changes nothing, whatever the gradient is.
    """
    gradient = torch.where(divisor > 0, gradient / divisor, 0.0)
    if rows is None:
        slot.addcmul_(gradient, gradient)
        value.addcdiv_(gradient, slot.sqrt(), value=-rate)
        return
    new_slot = slot.index_select(0, rows).addcmul_(gradient, gradient)
    slot.index_copy_(0, rows, new_slot)
    value.index_copy_(0, rows, value.index_select(0, rows).addcdiv_(gradient, new_slot.sqrt_(), value=-rate))


class Optimizer:
    """Holds the slots. dense: name -> parameter, updated whole. tables: name -> [V, ...] tensor, updated by rows.

    Row-sparse equals dense for Adagrad because a row without gradient does not move, so the tables keep Adagrad (with
    `optim.table_lr`) when the dense part is trained by AdamW. Parameters that get no gradient keep value and slots.
    """

    def __init__(self, config: OptimConfig, dense: Mapping[str, nn.Parameter], tables: Mapping[str, Tensor]):
        self.config = config
        self.dense = dict(dense)
        self.tables = dict(tables)
        self.rates = part_rates(config, self.dense, self.tables)
        self.values = {name: parameter.detach() for name, parameter in {**self.dense, **self.tables}.items()}
        with_adagrad = self.values if config.name == "adagrad" else self.tables
        self.accumulators = {
            name: torch.full_like(self.values[name], config.initial_accumulator) for name in with_adagrad
        }
        self.adamw: torch.optim.AdamW | None = None
        if config.name == "adamw":
            groups: dict[float, list[nn.Parameter]] = {}
            for name, parameter in self.dense.items():
                groups.setdefault(self.rates[name], []).append(parameter)
            of_rates = [{"params": members, "base": rate} for rate, members in groups.items()]
            self.adamw = torch.optim.AdamW(of_rates, lr=config.lr, weight_decay=config.weight_decay, fused=True)

    def apply(
        self,
        dense_gradients: Mapping[str, Tensor],
        rows: Mapping[str, Tensor],
        row_gradients: Mapping[str, Tensor],
        step: int,
        total_steps: int,
    ) -> tuple[Tensor, Tensor]:
        """Clip by the global norm and update what there are gradients for.

        rows: table name -> [R] touched rows, or absent where row_gradients holds the whole table's gradient.
        Returns the 0-d norm before the clip and the 0-d bool whether it was finite; nothing is updated where it was
        not.
        """
        gradients = {**row_gradients, **dense_gradients}
        norm = global_norm(list(gradients.values()))
        finite = torch.isfinite(norm)
        divisor = torch.where(finite, norm.clamp_min(self.config.clip_norm) / self.config.clip_norm, 0.0)

        def update(name: str) -> None:
            value, rate = self.values[name], learning_rate(self.config, self.rates[name], step, total_steps)
            run = kernels.adagrad(value) or adagrad
            run(value, self.accumulators[name], gradients[name], rows.get(name), divisor, rate)

        by_adagrad = [name for name in gradients if name in self.accumulators]
        # the largest first, so that both threads end at about the same time
        waiting = deque(partial(update, name) for name in sorted(by_adagrad, key=lambda name: -gradients[name].numel()))
        if self.adamw is not None and dense_gradients:
            waiting.appendleft(partial(self._update_by_adamw, dense_gradients, divisor, finite, step, total_steps))

        def take(_: int) -> None:
            while waiting:
                with contextlib.suppress(IndexError):  # the other thread took the last one
                    waiting.popleft()()

        run_parallel(take, 2, norm.device)
        return norm, finite

    def _update_by_adamw(
        self, gradients: Mapping[str, Tensor], divisor: Tensor, finite: Tensor, step: int, total_steps: int
    ) -> None:
        assert self.adamw is not None
        for name, gradient in gradients.items():
            self.dense[name].grad = gradient
        self.adamw.grad_scale = torch.where(finite, divisor, 1.0).to(torch.float32)  # type: ignore[attr-defined]
        self.adamw.found_inf = (~finite).to(torch.float32)  # type: ignore[attr-defined]
        for group in self.adamw.param_groups:
            group["lr"] = learning_rate(self.config, group["base"], step, total_steps)
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)

    def state_tensors(self) -> dict[str, Tensor]:
        """Return slots by `<slot>.<parameter>`: `accumulator.*` for Adagrad, `exp_avg.*`, `exp_avg_sq.*`, `step.*` for
        AdamW."""
        state = {f"accumulator.{name}": slot for name, slot in self.accumulators.items()}
        if self.adamw is not None:
            for name, parameter in self.dense.items():
                of_adamw = self.adamw.state[parameter]
                state.update({f"{slot}.{name}": of_adamw[slot] for slot in ADAMW_SLOTS if slot in of_adamw})
        return state

    def load_state_tensors(self, state: Mapping[str, Tensor]) -> None:
        """Take slots as `state_tensors` gave them. Raises KeyError for a slot that is missing.

        AdamW has none for a parameter that it never updated.
        """
        for name, slot in self.accumulators.items():
            slot.copy_(state[f"accumulator.{name}"])
        if self.adamw is None:
            return
        for name, parameter in self.dense.items():
            target = self.adamw.state[parameter]
            if not any(f"{slot}.{name}" in state for slot in ("accumulator", *ADAMW_SLOTS)):
                target.clear()
                continue
            for slot_name in ADAMW_SLOTS:
                # `step` too: the fused kernels take it on the parameter's device
                target[slot_name] = state[f"{slot_name}.{name}"].to(parameter.device, copy=True)
