"""Optimizers: the dense part by torch's Adagrad or AdamW, the tables by Adagrad on the rows that a step touches.

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

from elmo_ray.config import OptimConfig
from elmo_ray.kernels.cpu.adagrad import update_rows
from elmo_ray.kernels.cpu.loops import for_tensor
from elmo_ray.kernels.gpu.adagrad import adagrad_, usable
from elmo_ray.kernels.threads import side_by_side
from elmo_ray.model.components import part_of

TABLE_LR = 0.2


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

    side_by_side(run, 2, gradients[0].device)
    return torch.stack([*norms[0], *norms[1]]).square_().sum().sqrt_()


_PIECES = 4
"""Of the dense part on a CPU: whichever thread is free takes the next."""


def _in_pieces(parameters: Mapping[str, nn.Parameter], count: int) -> list[dict[str, nn.Parameter]]:
    """At most `count` pieces of about as many numbers each."""
    pieces: list[dict[str, nn.Parameter]] = [{} for _ in range(count)]
    for name, parameter in sorted(parameters.items(), key=lambda item: -item[1].numel()):
        min(pieces, key=lambda piece: sum(p.numel() for p in piece.values()))[name] = parameter
    return [piece for piece in pieces if piece]


class Optimizer:
    """Holds the slots. dense: name -> parameter, updated whole. tables: name -> [V, ...] tensor, updated by rows.

    Row-sparse equals dense for Adagrad because a row without gradient does not move, so the tables keep Adagrad (with
    `optim.table_lr`) when the dense part is trained by AdamW. Parameters that get no gradient keep value and slots.
    fused: Adagrad's updates in one pass each on a GPU, where that is possible.
    """

    def __init__(
        self, config: OptimConfig, dense: Mapping[str, nn.Parameter], tables: Mapping[str, Tensor], fused: bool = False
    ):
        self.config = config
        self.dense = dict(dense)
        self.tables = dict(tables)
        self.rates = part_rates(config, self.dense, self.tables)
        self.accumulators = {name: torch.full_like(table, config.initial_accumulator) for name, table in tables.items()}
        self.fused = fused and usable(next(iter([*self.dense.values(), *self.tables.values()])).device)
        on_cpu = all(parameter.device.type == "cpu" for parameter in self.dense.values())
        pieces = _in_pieces(self.dense, _PIECES if on_cpu else 1)
        self.inner = [self._inner_of(piece) for piece in pieces]
        self._inner_of_name = {name: inner for inner, piece in zip(self.inner, pieces, strict=True) for name in piece}

    def _inner_of(self, dense: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
        config, first = self.config, next(iter(dense.values()))
        groups: dict[float, list[nn.Parameter]] = {}
        for name, parameter in dense.items():
            groups.setdefault(self.rates[name], []).append(parameter)
        groups_of_rates = [{"params": members, "base": rate} for rate, members in groups.items()]
        if config.name == "adagrad":
            # fused: one pass over each tensor instead of five; torch has it for the CPU only, and divides by a float32
            fused = first.device.type == "cpu" and first.dtype == torch.float32
            return torch.optim.Adagrad(
                groups_of_rates,
                lr=config.lr,
                eps=0.0,
                fused=fused,
                initial_accumulator_value=config.initial_accumulator,
            )
        return torch.optim.AdamW(groups_of_rates, lr=config.lr, weight_decay=config.weight_decay, fused=True)

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
        norm = global_norm([*dense_gradients.values(), *row_gradients.values()])
        finite = torch.isfinite(norm)
        divisor = norm.clamp_min(self.config.clip_norm) / self.config.clip_norm
        safe = torch.where(finite, divisor, 0.0) if self.fused else divisor  # as `adagrad_` takes it
        divisor = torch.where(finite, divisor, 1.0)

        def rate(name: str) -> float:
            return learning_rate(self.config, self.rates[name], step, total_steps)

        def update_table(name: str) -> None:
            gradient = row_gradients[name]
            if self.fused:
                adagrad_(self.tables[name], self.accumulators[name], gradient, rows.get(name), safe, rate(name))
            elif name in rows and for_tensor(gradient):
                if bool(finite):  # on a CPU nothing waits for it
                    update_rows(self.tables[name], self.accumulators[name], rows[name], gradient, divisor, rate(name))
            else:
                self._update_rows(name, rows.get(name), torch.where(finite, gradient / divisor, 0.0), rate(name))

        def update_dense(inner: torch.optim.Optimizer) -> None:
            own = {name: g for name, g in dense_gradients.items() if self._inner_of_name[name] is inner}
            if self.fused and self.config.name == "adagrad":
                for name, gradient in own.items():
                    adagrad_(
                        self.dense[name].detach(), self._inner_state(name)["sum"], gradient, None, safe, rate(name)
                    )
            elif own:
                self._update_dense(inner, own, divisor, finite, step, total_steps)

        left = deque(
            [*(partial(update_table, name) for name in row_gradients), *(partial(update_dense, i) for i in self.inner)]
        )

        def update(_: int) -> None:
            while left:
                with contextlib.suppress(IndexError):  # the other thread took the last one
                    left.popleft()()

        side_by_side(update, 2, norm.device)
        return norm, finite

    def _update_dense(
        self,
        inner: torch.optim.Optimizer,
        gradients: Mapping[str, Tensor],
        divisor: Tensor,
        finite: Tensor,
        step: int,
        total_steps: int,
    ) -> None:
        fused = bool(inner.param_groups[0].get("fused"))
        for name, g in gradients.items():
            # where there is no fused kernel to skip the update, gradients of zero do (Adagrad's rows do not move)
            self.dense[name].grad = g if fused else torch.where(finite, g / divisor, 0.0)
        if fused:
            inner.grad_scale = divisor.to(torch.float32)  # type: ignore[attr-defined]
            inner.found_inf = (~finite).to(torch.float32)  # type: ignore[attr-defined]
        for group in inner.param_groups:
            group["lr"] = learning_rate(self.config, group["base"], step, total_steps)
        inner.step()
        inner.zero_grad(set_to_none=True)

    def _update_rows(self, name: str, rows: Tensor | None, gradient: Tensor, rate: float) -> None:
        table, accumulator = self.tables[name], self.accumulators[name]
        if rows is None:
            accumulator.addcmul_(gradient, gradient)
            table.addcdiv_(gradient, accumulator.sqrt(), value=-rate)
            return
        slot = accumulator.index_select(0, rows).addcmul_(gradient, gradient)
        accumulator.index_copy_(0, rows, slot)
        table.index_copy_(0, rows, table.index_select(0, rows).addcdiv_(gradient, slot.sqrt_(), value=-rate))

    def state_tensors(self) -> dict[str, Tensor]:
        """Slots by `<slot>.<parameter>`: `accumulator.*` for Adagrad, `exp_avg.*`, `exp_avg_sq.*`, `step.*` for
        AdamW."""
        state = {f"accumulator.{name}": slot for name, slot in self.accumulators.items()}
        for name in self.dense:
            for slot, key in self._slots().items():
                value = self._inner_state(name).get(key)
                if value is not None:
                    state[f"{slot}.{name}"] = value
        return state

    def load_state_tensors(self, state: Mapping[str, Tensor]) -> None:
        """Take slots as `state_tensors` gave them. Raises KeyError for a slot that is missing.

        AdamW has none for a parameter that it never updated.
        """
        for name in self.accumulators:
            self.accumulators[name].copy_(state[f"accumulator.{name}"])
        for name, parameter in self.dense.items():
            target = self._inner_state(name)
            kinds = ("accumulator", *self._slots())
            if self.config.name == "adamw" and not any(f"{kind}.{name}" in state for kind in kinds):
                target.clear()
                continue
            for slot, key in self._slots().items():
                value = state[f"{slot}.{name}"]
                if key in target:
                    target[key].copy_(value)
                else:
                    # `step` too: the fused kernels take it on the parameter's device
                    target[key] = value.to(parameter.device, copy=True)

    def _slots(self) -> dict[str, str]:
        if self.config.name == "adagrad":
            return {"accumulator": "sum"}
        return {"exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq", "step": "step"}

    def _inner_state(self, name: str) -> dict:
        return self._inner_of_name[name].state[self.dense[name]]
