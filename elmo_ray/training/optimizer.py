"""The optimizer: one of `METHODS` for all parameters, or for the dense ones alone, and then Adagrad for the tables.

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
from elmo_ray.training.components import component_of

TABLE_LR = 0.2


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
    """Return the base rate of the tables: `optim.table_lr`, or `optim.lr`, or 0.2 where they keep Adagrad."""
    if config.table_lr is not None:
        return config.table_lr
    # the rate of another method does not suit Adagrad
    return config.lr if METHODS[config.name].trains_tables else TABLE_LR


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


class Method:
    """Way in which one parameter is updated: the seam for other optimizers.

    Another one is a subclass with an entry in `METHODS`, and its name in `config.training.OptimConfig`, with the
    settings that it alone has. slots: the tensors that it keeps for each parameter, of the parameter's shape, with the
    value that they begin with.
    """

    trains_tables = True
    """True where a row without a gradient stays as it is, so that only the touched rows of a table need an update.

    Where it is False, the tables keep Adagrad, with `optim.table_lr`.
    """

    can_be_captured = True
    """True where `update` may be captured by a GPU: it reads the rate from the device and waits for no number."""

    def __init__(self, config: OptimConfig):
        self.config = config
        self.slots: dict[str, float | None] = {}

    def update(
        self,
        value: Tensor,
        slots: Mapping[str, Tensor],
        gradient: Tensor,
        rows: Tensor | None,
        divisor: Tensor,
        rate: float | Tensor,
    ) -> None:
        """Update a parameter and its slots in place; the other arguments are those of `adagrad`."""
        raise NotImplementedError


class Adagrad(Method):
    """The method of the original."""

    def __init__(self, config: OptimConfig):
        super().__init__(config)
        self.slots = {"accumulator": config.initial_accumulator}

    def update(
        self,
        value: Tensor,
        slots: Mapping[str, Tensor],
        gradient: Tensor,
        rows: Tensor | None,
        divisor: Tensor,
        rate: float | Tensor,
    ) -> None:
        run = kernels.adagrad(value) or adagrad
        run(value, slots["accumulator"], gradient, rows, divisor, rate)


class Sgd(Method):
    """Plain descent, or descent with momentum, which the configuration allows only where steps update whole tables."""

    def __init__(self, config: OptimConfig):
        super().__init__(config)
        self.slots = {"velocity": 0.0} if config.momentum else {}

    def update(
        self,
        value: Tensor,
        slots: Mapping[str, Tensor],
        gradient: Tensor,
        rows: Tensor | None,
        divisor: Tensor,
        rate: float | Tensor,
    ) -> None:
        sgd(value, slots.get("velocity"), gradient, rows, divisor, rate, self.config.momentum)


class AdamW(Method):
    """AdamW of torch, which updates all dense parameters at once (`Optimizer`) and makes its slots in its first step.

    `step` is one number for each parameter.
    """

    trains_tables = False
    can_be_captured = False

    def __init__(self, config: OptimConfig):
        super().__init__(config)
        self.slots = {"exp_avg": None, "exp_avg_sq": None, "step": None}


METHODS: dict[str, type[Method]] = {"adagrad": Adagrad, "sgd": Sgd, "adamw": AdamW}
"""The methods by the values of `optim.name`."""


def methods_of(config: OptimConfig) -> tuple[Method, Method]:
    """Return the methods that update dense parameters and tables."""
    method = METHODS[config.name](config)
    return method, method if method.trains_tables else Adagrad(config)


def count_slots(config: OptimConfig) -> int:
    """Return how many numbers the optimizer keeps for each number of a parameter, at most."""
    return max(len(method.slots.keys() - {"step"}) for method in methods_of(config))


class Optimizer:
    """Optimizer of all parameters, with its slots.

    dense: parameters by name, updated as a whole. tables: [V, ...] tensors by name, updated by rows. Parameters that
    get no gradient keep their value and slots.
    """

    def __init__(self, config: OptimConfig, dense: Mapping[str, nn.Parameter], tables: Mapping[str, Tensor]):
        self.config = config
        self.dense = dict(dense)
        self.tables = dict(tables)
        self.rates = component_rates(config, self.dense, self.tables)
        self.values = {name: parameter.detach() for name, parameter in {**self.dense, **self.tables}.items()}
        self.rate_factor = 1.0  # of schedule.kind=plateau; the training loop sets it
        of_dense, of_tables = methods_of(config)
        self.methods = {**dict.fromkeys(self.dense, of_dense), **dict.fromkeys(self.tables, of_tables)}
        self.can_be_captured = of_dense.can_be_captured and of_tables.can_be_captured
        self.slots = {
            name: {slot: torch.full_like(self.values[name], x) for slot, x in method.slots.items() if x is not None}
            for name, method in self.methods.items()
        }
        self._many: tuple[tuple[str, ...], Callable[..., None]] | None = None
        self._adamw: torch.optim.AdamW | None = None
        if config.name == "adamw":
            groups: dict[float, list[nn.Parameter]] = {}
            for name, parameter in self.dense.items():
                groups.setdefault(self.rates[name], []).append(parameter)
            parameter_groups = [{"params": members, "base": rate} for rate, members in groups.items()]
            self._adamw = torch.optim.AdamW(
                parameter_groups, lr=config.lr, weight_decay=config.weight_decay, fused=True
            )

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
            value, slots, some = self.values[name], self.slots[name], rows.get(name)
            self.methods[name].update(value, slots, gradients[name], some, divisor, rate(name))

        one_by_one = [name for name in gradients if not isinstance(self.methods[name], AdamW)]
        dense_adagrad = [name for name in dense_gradients if isinstance(self.methods[name], Adagrad)]
        if many := self._many_at_once(tuple(dense_adagrad)):
            names, update_many = many
            update_many([gradients[name] for name in names], divisor, [rate(name) for name in names])
            one_by_one = [name for name in one_by_one if name not in names]
        # largest first, so that both threads end at about the same time
        one_by_one.sort(key=lambda name: -gradients[name].numel())
        waiting = deque(partial(update, name) for name in one_by_one)
        if self._adamw is not None and dense_gradients:
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
            values, slots = [self.values[name] for name in names], [self.slots[name]["accumulator"] for name in names]
            self._many = names, at_once(values, slots)
        return self._many

    def _update_by_adamw(
        self, gradients: Mapping[str, Tensor], divisor: Tensor, finite: Tensor, step: int, total_steps: int
    ) -> None:
        assert self._adamw is not None
        for name, gradient in gradients.items():
            self.dense[name].grad = gradient
        self._adamw.grad_scale = torch.where(finite, divisor, 1.0).to(torch.float32)  # type: ignore[attr-defined]
        self._adamw.found_inf = (~finite).to(torch.float32)  # type: ignore[attr-defined]
        for group in self._adamw.param_groups:
            group["lr"] = self.rate_at(group["base"], step, total_steps)
        self._adamw.step()
        self._adamw.zero_grad(set_to_none=True)

    def state_tensors(self) -> dict[str, Tensor]:
        """Return the slots, as `<slot>.<parameter>`: `accumulator.*` for Adagrad, `velocity.*` for SGD with momentum,
        and `exp_avg.*`, `exp_avg_sq.*` and `step.*` for AdamW."""
        state = {f"{slot}.{name}": tensor for name, slots in self.slots.items() for slot, tensor in slots.items()}
        if self._adamw is not None:
            for name, parameter in self.dense.items():
                state.update({f"{slot}.{name}": tensor for slot, tensor in self._adamw.state[parameter].items()})
        return state

    def load_state_tensors(self, state: Mapping[str, Tensor]) -> None:
        """Load slots as `state_tensors` returned them. Raises KeyError for a slot that is missing.

        For AdamW a parameter may lack all of its slots, if it was never updated.
        """
        for name, slots in self.slots.items():
            for slot, tensor in slots.items():
                tensor.copy_(state[f"{slot}.{name}"])
        if self._adamw is None:
            return
        for name, parameter in self.dense.items():
            target = self._adamw.state[parameter]
            kinds = self.methods[name].slots
            if not any(f"{slot}.{name}" in state for slot in ("accumulator", *kinds)):
                target.clear()
                continue
            for slot in kinds:
                # `step` as well: the fused kernels need it on the parameter's device
                target[slot] = state[f"{slot}.{name}"].to(parameter.device, copy=True)
