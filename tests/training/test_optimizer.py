"""Schedules, both optimizers by hand, the clip, and slots that travel."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from elmo_ray.config import OptimConfig, ScheduleConfig
from elmo_ray.training.optimizer import TABLE_LR, Optimizer, global_norm, learning_rate, table_rate


def schedule(kind: str, warmup: int = 0, **more: Any) -> OptimConfig:
    return OptimConfig(lr=0.4, schedule=ScheduleConfig(kind=kind, warmup_steps=warmup, **more))  # type: ignore[arg-type]


def test_schedules() -> None:
    constant = schedule("constant", 4)
    assert [learning_rate(constant, 0.4, s, 10) for s in range(6)] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4])
    assert learning_rate(schedule("constant"), 0.4, 0, 10) == 0.4
    linear = schedule("linear", 2, final_ratio=0.5)
    assert [learning_rate(linear, 0.4, s, 10) for s in (0, 1, 2, 6, 10, 99)] == pytest.approx(
        [0.2, 0.4, 0.4, 0.3, 0.2, 0.2]
    )
    cosine = schedule("cosine", 0, final_ratio=0.1)
    assert learning_rate(cosine, 0.4, 0, 8) == pytest.approx(0.4)
    assert learning_rate(cosine, 0.4, 4, 8) == pytest.approx(0.4 * 0.55)
    assert learning_rate(cosine, 0.4, 2, 8) == pytest.approx(0.4 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4))))
    assert learning_rate(cosine, 0.4, 8, 8) == pytest.approx(0.04)
    assert learning_rate(schedule("linear", 10), 0.4, 9, 5) == pytest.approx(0.4), "a warm-up longer than the run"


def test_plateau_has_the_factor_of_the_validations() -> None:
    plateau = schedule("plateau", 2, factor=0.25)
    assert [learning_rate(plateau, 0.4, s, 10, 1.0) for s in range(3)] == pytest.approx([0.2, 0.4, 0.4])
    assert learning_rate(plateau, 0.4, 5, 10, 0.25) == pytest.approx(0.1)
    assert learning_rate(schedule("constant"), 0.4, 5, 10, 0.25) == 0.4, "only a plateau is lowered"


def test_rate_of_the_tables() -> None:
    assert table_rate(OptimConfig(lr=0.3)) == 0.3
    assert table_rate(OptimConfig(name="sgd", lr=0.3)) == 0.3
    assert table_rate(OptimConfig(name="adamw", lr=0.001)) == TABLE_LR
    assert table_rate(OptimConfig(name="adamw", lr=0.001, table_lr=0.05)) == 0.05


def test_global_norm() -> None:
    tensors = [torch.full((3, 4), 2.0), torch.full((5,), -1.0), torch.tensor(7.0)]
    assert float(global_norm(tensors)) == pytest.approx(math.sqrt(48 + 5 + 49))
    assert not torch.isfinite(global_norm([torch.tensor([1.0, torch.nan]), torch.ones(2)]))


class Problem:
    """Two dense parameters and two tables with random gradients."""

    def __init__(self, config: OptimConfig, dtype: torch.dtype = torch.float32):
        random = torch.Generator().manual_seed(0)
        self.dense = {
            "a": nn.Parameter(torch.randn(4, 3, dtype=dtype, generator=random)),
            "b": nn.Parameter(torch.randn(5, dtype=dtype, generator=random)),
        }
        self.tables = {
            "w": torch.randn(9, 3, dtype=dtype, generator=random),
            "v": torch.randn(9, dtype=dtype, generator=random),
        }
        self.optimizer = Optimizer(config, self.dense, self.tables)
        self.dtype = dtype

    def gradients(self, step: int, size: float = 1.0) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
        random = torch.Generator().manual_seed(100 + step)
        rows = torch.randperm(9, generator=random)[:4].sort().values
        dense = {k: torch.randn(p.shape, dtype=self.dtype, generator=random) * size for k, p in self.dense.items()}
        some = {
            "w": torch.randn(4, 3, dtype=self.dtype, generator=random) * size,
            "v": torch.randn(4, dtype=self.dtype, generator=random) * size,
        }
        return dense, {"w": rows, "v": rows}, some

    def values(self) -> dict[str, Tensor]:
        slots = {f"slot {k}": v for k, v in self.optimizer.state_tensors().items()}
        return {k: v.detach().clone() for k, v in {**self.dense, **self.tables, **slots}.items()}

    def run(self, steps: range, total: int = 20) -> None:
        for step in steps:
            dense, rows, some = self.gradients(step)
            if self.optimizer.config.momentum:  # whole tables
                some = {k: torch.zeros_like(self.tables[k]).index_copy_(0, rows[k], g) for k, g in some.items()}
                rows = {}
            self.optimizer.apply(dense, rows, some, step, total)


# float32's rows are a compiled loop
@pytest.mark.parametrize(("dtype", "near"), [(torch.float64, 1e-12), (torch.float32, 3e-6)])
def test_adagrad_by_hand_with_and_without_the_clip(dtype: torch.dtype, near: float) -> None:
    config = OptimConfig(
        lr=0.2, clip_norm=3.0, initial_accumulator=0.5, schedule=ScheduleConfig(kind="linear", warmup_steps=2)
    )
    problem = Problem(config, dtype)
    values = {k: v.detach().double().clone() for k, v in {**problem.dense, **problem.tables}.items()}
    slots = {k: torch.full_like(v, 0.5) for k, v in values.items()}
    norms = []
    for step, size in enumerate((1.0, 0.1, 5.0)):
        dense, rows, some = problem.gradients(step, size)
        whole = dict(dense)
        for name, gradient in some.items():
            whole[name] = torch.zeros_like(values[name]).index_copy_(0, rows[name], gradient.double())
        norm = math.sqrt(sum(float(g.square().sum()) for g in whole.values()))
        norms.append(norm)
        rate = (0.1, 0.2, 0.2)[step]
        for name, gradient in whole.items():
            clipped = gradient * min(1.0, 3.0 / norm)
            slots[name] += clipped**2
            values[name] -= rate * clipped / slots[name].sqrt()
        found, finite = problem.optimizer.apply(dense, rows, some, step, 20)
        assert bool(finite) and float(found) == pytest.approx(norm, rel=near)
    assert norms[0] > 3.0 > norms[1]
    state = problem.optimizer.state_tensors()
    for name, value in values.items():
        found = {**problem.dense, **problem.tables}[name].double()
        assert torch.allclose(found, value, rtol=near, atol=near), name
        assert torch.allclose(state[f"accumulator.{name}"].double(), slots[name], rtol=near, atol=near), name


@pytest.mark.parametrize(("dtype", "near"), [(torch.float64, 1e-12), (torch.float32, 3e-6)])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_by_hand(momentum: float, dtype: torch.dtype, near: float) -> None:
    config = OptimConfig(name="sgd", lr=0.5, table_lr=0.25, momentum=momentum, clip_norm=3.0)
    problem = Problem(config, dtype)
    values = {k: v.detach().double().clone() for k, v in {**problem.dense, **problem.tables}.items()}
    torchs = {k: nn.Parameter(v.clone()) for k, v in values.items()}
    groups = [{"params": [p], "lr": 0.25 if k in problem.tables else 0.5} for k, p in torchs.items()]
    reference = torch.optim.SGD(groups, momentum=momentum)
    for step, size in enumerate((1.0, 0.1, 5.0)):
        dense, rows, some = problem.gradients(step, size)
        whole = {k: torch.zeros_like(problem.tables[k]).index_copy_(0, rows[k], g) for k, g in some.items()}
        for k, gradient in {**dense, **whole}.items():
            torchs[k].grad = gradient.double().clone()
        norm = float(global_norm([p.grad for p in torchs.values() if p.grad is not None]))
        for p in torchs.values():
            p.grad = None if p.grad is None else p.grad * min(1.0, 3.0 / norm)
        reference.step()
        # momentum moves rows that a step does not touch, so it is given whole tables
        _, finite = problem.optimizer.apply(dense, {} if momentum else rows, whole if momentum else some, step, 20)
        assert bool(finite)
    for name, value in torchs.items():
        found = {**problem.dense, **problem.tables}[name].detach().double()
        assert torch.allclose(found, value.detach(), rtol=near, atol=near), name
        assert not torch.allclose(found, values[name], atol=1e-3)


@pytest.mark.parametrize("name", ["adagrad", "adamw", "sgd"])
def test_whole_tables_and_rows_give_the_same(name: str) -> None:
    config = OptimConfig(name=name, clip_norm=2.0)  # type: ignore[arg-type]
    by_rows, whole = Problem(config), Problem(config)
    for step in range(3):
        dense, rows, some = by_rows.gradients(step)
        full = {k: torch.zeros_like(by_rows.tables[k]).index_copy_(0, rows[k], g) for k, g in some.items()}
        by_rows.optimizer.apply({k: v.clone() for k, v in dense.items()}, rows, some, step, 20)
        whole.optimizer.apply(dense, {}, full, step, 20)
    for key, value in whole.values().items():
        assert torch.allclose(by_rows.values()[key], value, rtol=1e-6, atol=1e-7), key


def test_adamw_by_hand_on_the_dense_part_and_adagrad_on_tables() -> None:
    config = OptimConfig(
        name="adamw",
        lr=0.01,
        table_lr=0.3,
        weight_decay=0.1,
        clip_norm=2.0,
        schedule=ScheduleConfig(kind="cosine", final_ratio=0.2),
    )
    problem, tables_only = Problem(config), Problem(OptimConfig(lr=0.3, clip_norm=2.0, schedule=config.schedule))
    values = {k: v.detach().clone().double() for k, v in problem.dense.items()}
    first, second = ({k: torch.zeros_like(v) for k, v in values.items()} for _ in range(2))
    for step in range(4):
        dense, rows, some = problem.gradients(step)
        norm = math.sqrt(sum(float(g.square().sum()) for g in (*dense.values(), *some.values())))
        rate = learning_rate(config, 0.01, step, 20)
        for k, gradient in dense.items():
            g = gradient.double() * min(1.0, 2.0 / norm)
            values[k] *= 1 - rate * 0.1
            first[k] += (g - first[k]) * 0.1
            second[k] += (g * g - second[k]) * 0.001
            corrected = (second[k] / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8
            values[k] -= rate / (1 - 0.9 ** (step + 1)) * first[k] / corrected
        problem.optimizer.apply(dense, rows, some, step, 20)
        tables_only.optimizer.apply(*tables_only.gradients(step), step, 20)
    for k, value in values.items():
        assert torch.allclose(problem.dense[k].detach().double(), value, rtol=1e-5, atol=1e-6), k
    for k, table in problem.tables.items():
        assert torch.equal(table, tables_only.tables[k]), "tables keep Adagrad, with their own rate"


@pytest.mark.parametrize("name", ["adagrad", "adamw", "sgd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_slots_travel_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    more: dict[str, Any] = {"momentum": 0.5} if name == "sgd" else {}
    config = OptimConfig(name=name, lr=0.05, clip_norm=2.0, **more)  # type: ignore[arg-type]
    whole, first = Problem(config, dtype), Problem(config, dtype)
    whole.run(range(8))
    first.run(range(4))
    second = Problem(config, dtype)
    saved = {k: v.clone() for k, v in first.optimizer.state_tensors().items()}
    with torch.no_grad():
        for k, p in {**second.dense, **second.tables}.items():
            p.copy_({**first.dense, **first.tables}[k])
    second.optimizer.load_state_tensors(saved)
    second.run(range(4, 8))
    found = second.values()
    assert sorted(found) == sorted(whole.values())
    assert all(torch.equal(found[k], v) for k, v in whole.values().items())
    kinds = {k.split(".")[0] for k in saved}
    adamw = {"accumulator", "exp_avg", "exp_avg_sq", "step"}
    assert kinds == {"adagrad": {"accumulator"}, "adamw": adamw, "sgd": {"velocity"}}[name]


def test_slots_of_another_optimizer_are_refused() -> None:
    adagrad, adamw = Problem(OptimConfig()), Problem(OptimConfig(name="adamw"))
    adagrad.run(range(1))
    adamw.run(range(1))
    for target, source in ((adagrad, adamw), (adamw, adagrad)):
        with pytest.raises(KeyError):
            target.optimizer.load_state_tensors(source.optimizer.state_tensors())


@pytest.mark.parametrize("name", ["adagrad", "adamw", "sgd"])
@pytest.mark.parametrize("where", ["dense", "table"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_that_are_not_finite_change_nothing(name: str, where: str, dtype: torch.dtype) -> None:
    more: dict[str, Any] = {"momentum": 0.5} if name == "sgd" else {}
    problem = Problem(OptimConfig(name=name, lr=0.05, **more), dtype)  # type: ignore[arg-type]
    problem.run(range(2))
    before = problem.values()
    dense, rows, some = problem.gradients(2)
    (dense["a"] if where == "dense" else some["w"])[1, 1] = torch.inf
    if name == "sgd":  # whole tables
        some = {k: torch.zeros_like(problem.tables[k]).index_copy_(0, rows[k], g) for k, g in some.items()}
        rows = {}
    _, finite = problem.optimizer.apply(dense, rows, some, 2, 20)
    assert not bool(finite)
    after = problem.values()
    assert all(torch.equal(after[k], v) for k, v in before.items())
    problem.run(range(3, 4))
    assert all(bool(v.isfinite().all()) for v in problem.values().values())
    assert not torch.equal(problem.values()["a"], before["a"])
