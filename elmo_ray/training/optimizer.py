"""Optimizers: Adagrad or SGD for all parameters, or AdamW for the dense ones and Adagrad for the rows of tables.

Gradients are clipped by one global norm, as by bilm-tf's `clip_by_global_norm`. A step whose norm is not finite changes
nothing; this is decided on the device, without waiting for it.

Shapes: V rows of a table, R touched rows.
"""

from __future__ import annotations

import contextlib
import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from elmo_ray import kernels
from elmo_ray.config import OptimConfig
from elmo_ray.kernels.threads import run_parallel
from elmo_ray.model.components import component_of

TABLE_LR = 0.2
ADAMW_SLOTS = ("exp_avg", "exp_avg_sq", "step")


def learning_rate(config: OptimConfig, base: float, step: int, total_steps: int, plateau_factor: float = 1.0) -> float:
    """Return the learning rate of the step with this 0-based number.

    It rises linearly to `base`, then stays constant or decays to base * final_ratio, linearly or by a cosine. With
    kind=plateau it is multiplied by `plateau_factor`, to which the validations have lowered it.
    """
    schedule = config.schedule
    if schedule.kind == "plateau":
        warmth = min(1.0, (step + 1) / schedule.warmup_steps) if schedule.warmup_steps else 1.0
        return base * plateau_factor * warmth
    if step < schedule.warmup_steps:
        return base * (step + 1) / schedule.warmup_steps
    if schedule.kind == "constant":
        return base
    done = min(1.0, (step - schedule.warmup_steps) / max(1, total_steps - schedule.warmup_steps))
    left = 1.0 - done if schedule.kind == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return base * (schedule.final_ratio + (1.0 - schedule.final_ratio) * left)


def table_rate(config: OptimConfig) -> float:
    """Return the base rate of the tables: `optim.table_lr`, or `optim.lr`, or 0.2 with AdamW."""
    if config.table_lr is not None:
        return config.table_lr
    # with AdamW the tables keep Adagrad, to which the rate of AdamW does not apply
    return TABLE_LR if config.name == "adamw" else config.lr


def component_rates(config: OptimConfig, dense: Iterable[str], tables: Iterable[str]) -> dict[str, float]:
    """Return the base rate of each parameter.

    It is that of the parameter's component (`optim.part_lr`), or else that of all dense parameters or all tables.
    """
    general = {**dict.fromkeys(dense, config.lr), **dict.fromkeys(tables, table_rate(config))}
    own = {name: config.part_lr.rate(component_of(name)) for name in general}
    return {name: rate if (special := own[name]) is None else special for name, rate in general.items()}


def global_norm(gradients: list[Tensor]) -> Tensor:
    """Return the 0-d norm of all gradients together."""
    norms: list[Sequence[Tensor]] = [[], []]

    def run(branch: int) -> None:
        if gradients[branch::2]:
            norms[branch] = torch._foreach_norm(gradients[branch::2])

    run_parallel(run, 2, gradients[0].device)
    return torch.stack([*norms[0], *norms[1]]).square_().sum().sqrt_()


def adagrad(
    value: Tensor, slot: Tensor, gradient: Tensor, rows: Tensor | None, divisor: Tensor, rate: float | Tensor
) -> None:
    """Update in place: slot += (gradient / divisor)^2; value -= rate * gradient / divisor / sqrt(slot).

    rows: [R] the rows of `value` and `slot` to which the rows of `gradient` belong, each at most once; None: all rows.
    divisor: 0-d; 0 changes nothing, whatever the gradient is. rate: a number, or 0-d.
    """
    rate = float(rate)
    gradient = torch.where(divisor > 0, gradient / divisor, 0.0)
    if rows is None:
        slot.addcmul_(gradient, gradient)
        value.addcdiv_(gradient, slot.sqrt(), value=-rate)
        return
    new_slot = slot.index_select(0, rows).addcmul_(gradient, gradient)
    slot.index_copy_(0, rows, new_slot)
    value.index_copy_(0, rows, value.index_select(0, rows).addcdiv_(gradient, new_slot.sqrt_(), value=-rate))


def sgd(
    value: Tensor,
    velocity: Tensor | None,
    gradient: Tensor,
    rows: Tensor | None,
    divisor: Tensor,
    rate: float | Tensor,
    momentum: float,
) -> None:
    """Update in place: velocity = momentum * velocity + gradient / divisor; value -= rate * velocity.

    velocity: None stands for no momentum, with which the velocity is the gradient. Other arguments as for `adagrad`;
    with a velocity `rows` must be None.
    """
    changes = divisor > 0
    move = torch.where(changes, gradient / divisor, 0.0)
    if velocity is not None:
        move = velocity.copy_(torch.where(changes, momentum * velocity + move, velocity))
    move = torch.where(changes, rate * move, 0.0)
    if rows is None:
        value.sub_(move)
    else:
        value.index_copy_(0, rows, value.index_select(0, rows).sub_(move))


class Optimizer:
    """Optimizer of all parameters, with its slots.

    dense: parameters by name, updated as a whole. tables: [V, ...] tensors by name, updated by rows. Parameters that
    get no gradient keep their value and slots.
    """

    # Adagrad and SGD do not move a row whose gradient is 0, so updating the touched rows equals updating the table.
    # This is not true of AdamW: the tables keep Adagrad (with `optim.table_lr`) when AdamW trains the dense parameters.
    # Nor is it true of momentum, which the configuration allows only where steps update whole tables.

    def __init__(self, config: OptimConfig, dense: Mapping[str, nn.Parameter], tables: Mapping[str, Tensor]):
        self.config = config
        self.dense = dict(dense)
        self.tables = dict(tables)
        self.rates = component_rates(config, self.dense, self.tables)
        self.values = {name: parameter.detach() for name, parameter in {**self.dense, **self.tables}.items()}
        self.rate_factor = 1.0  # of schedule.kind=plateau; the training loop sets it
        with_adagrad = {"adagrad": self.values, "adamw": self.tables, "sgd": {}}[config.name]
        self.accumulators = {
            name: torch.full_like(self.values[name], config.initial_accumulator) for name in with_adagrad
        }
        self.velocities = {name: torch.zeros_like(value) for name, value in self.values.items() if config.momentum}
        self._many: tuple[tuple[str, ...], Callable[..., None]] | None = None
        self.adamw: torch.optim.AdamW | None = None
        if config.name == "adamw":
            groups: dict[float, list[nn.Parameter]] = {}
            for name, parameter in self.dense.items():
                groups.setdefault(self.rates[name], []).append(parameter)
            parameter_groups = [{"params": members, "base": rate} for rate, members in groups.items()]
            self.adamw = torch.optim.AdamW(parameter_groups, lr=config.lr, weight_decay=config.weight_decay, fused=True)

    def apply(
        self,
        dense_gradients: Mapping[str, Tensor],
        rows: Mapping[str, Tensor],
        row_gradients: Mapping[str, Tensor],
        step: int,
        total_steps: int,
        rates: Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Clip by the global norm and update the parameters that have a gradient.

        rows: [R] touched rows by table; a table that is not in it has its whole gradient in row_gradients. step:
        0-based. rates: those that are read from the device's memory, 0-d by parameter; None: those of the step.
        Returns the 0-d norm before clipping and a 0-d bool, True if it is finite; if not, nothing is updated.
        """
        gradients = {**row_gradients, **dense_gradients}
        norm = global_norm(list(gradients.values()))
        finite = torch.isfinite(norm)
        divisor = torch.where(finite, norm.clamp_min(self.config.clip_norm) / self.config.clip_norm, 0.0)

        def rate(name: str) -> float | Tensor:
            return self.rate_at(self.rates[name], step, total_steps) if rates is None else rates[name]

        def update(name: str) -> None:
            value, gradient, some = self.values[name], gradients[name], rows.get(name)
            if self.config.name == "sgd":
                velocity = self.velocities.get(name)
                return sgd(value, velocity, gradient, some, divisor, rate(name), self.config.momentum)
            run = kernels.adagrad(value) or adagrad
            run(value, self.accumulators[name], gradient, some, divisor, rate(name))

        one_by_one = [name for name in gradients if name in self.accumulators]
        if many := self._many_at_once(tuple(name for name in one_by_one if name in dense_gradients)):
            names, update_many = many
            update_many([gradients[name] for name in names], divisor, [rate(name) for name in names])
            one_by_one = [name for name in one_by_one if name not in dense_gradients]
        if self.config.name == "sgd":
            one_by_one = list(gradients)
        # largest first, so that both threads end at about the same time
        one_by_one.sort(key=lambda name: -gradients[name].numel())
        waiting = deque(partial(update, name) for name in one_by_one)
        if self.adamw is not None and dense_gradients:
            waiting.appendleft(partial(self._update_by_adamw, dense_gradients, divisor, finite, step, total_steps))

        def take(_: int) -> None:
            while waiting:
                with contextlib.suppress(IndexError):  # the other thread took the last one
                    waiting.popleft()()

        run_parallel(take, 2, norm.device)
        return norm, finite

    def rate_at(self, base: float, step: int, total_steps: int) -> float:
        """Return the learning rate of the step with this 0-based number for a parameter with this base rate."""
        return learning_rate(self.config, base, step, total_steps, self.rate_factor)

    def _many_at_once(self, names: tuple[str, ...]) -> tuple[tuple[str, ...], Callable[..., None]] | None:
        """Return these names and the update of all of them in one operation; None where there is no such operation."""
        if not names or (at_once := kernels.dense_adagrad(self.values[names[0]])) is None:
            return None
        if self._many is None or self._many[0] != names:
            values, slots = [self.values[name] for name in names], [self.accumulators[name] for name in names]
            self._many = names, at_once(values, slots)
        return self._many

    def _update_by_adamw(
        self, gradients: Mapping[str, Tensor], divisor: Tensor, finite: Tensor, step: int, total_steps: int
    ) -> None:
        assert self.adamw is not None
        for name, gradient in gradients.items():
            self.dense[name].grad = gradient
        self.adamw.grad_scale = torch.where(finite, divisor, 1.0).to(torch.float32)  # type: ignore[attr-defined]
        self.adamw.found_inf = (~finite).to(torch.float32)  # type: ignore[attr-defined]
        for group in self.adamw.param_groups:
            group["lr"] = self.rate_at(group["base"], step, total_steps)
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)

    def state_tensors(self) -> dict[str, Tensor]:
        """Return the slots by `<slot>.<parameter>`.

        They are `accumulator.*` for Adagrad, `exp_avg.*`, `exp_avg_sq.*` and `step.*` for AdamW, and `velocity.*` for
        SGD with momentum.
        """
        state = {f"accumulator.{name}": slot for name, slot in self.accumulators.items()}
        state |= {f"velocity.{name}": slot for name, slot in self.velocities.items()}
        if self.adamw is not None:
            for name, parameter in self.dense.items():
                adamw_slots = self.adamw.state[parameter]
                state.update({f"{slot}.{name}": adamw_slots[slot] for slot in ADAMW_SLOTS if slot in adamw_slots})
        return state

    def load_state_tensors(self, state: Mapping[str, Tensor]) -> None:
        """Load slots as `state_tensors` returned them. Raises KeyError for a slot that is missing.

        For AdamW a parameter may lack all of its slots, if it was never updated.
        """
        for name, slot in self.accumulators.items():
            slot.copy_(state[f"accumulator.{name}"])
        for name, slot in self.velocities.items():
            slot.copy_(state[f"velocity.{name}"])
        if self.adamw is None:
            return
        for name, parameter in self.dense.items():
            target = self.adamw.state[parameter]
            if not any(f"{slot}.{name}" in state for slot in ("accumulator", *ADAMW_SLOTS)):
                target.clear()
                continue
            for slot_name in ADAMW_SLOTS:
                # `step` as well: the fused kernels need it on the parameter's device
                target[slot_name] = state[f"{slot_name}.{name}"].to(parameter.device, copy=True)
