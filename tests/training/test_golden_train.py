"""Two training steps of bilm-tf, repeated: losses, states, gradients, norms, variables and accumulators.

Runs every NAME.npz with NAME.options.json in the folder that ELMO_GOLDEN names; the number of workers is that of the
`gpu{g}` keys.
"""

from __future__ import annotations

import gc
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers.golden_steps import Case

from elmo_ray.checkpoints.bilm_tf.variables import to_variables
from elmo_ray.model.lstm import LstmState
from elmo_ray.training.step import TrainStep

FOLDER = Path(os.environ.get("ELMO_GOLDEN") or Path(__file__).parents[1] / "golden" / "train")
CASES = sorted(FOLDER.glob("*.npz"))


def test_the_folder_has_cases() -> None:
    assert CASES, f"no NAME.npz in {FOLDER}"


@pytest.mark.parametrize("path", CASES, ids=lambda p: p.stem)
def test_golden_training_steps(path: Path, tmp_path: Path) -> None:
    with np.load(path) as golden:
        world = 1 + max(int(k.split("/gpu")[1].split("/")[0]) for k in golden.files if "/gpu" in k)
    if world == 1:
        run_case(path, 0, 1)
    else:
        mp.spawn(_rank, args=(path, world, str(tmp_path / "store")), nprocs=world)  # type: ignore[no-untyped-call]


def _rank(rank: int, path: Path, world: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    try:
        run_case(path, rank, world)
    finally:
        gc.collect()  # DDP holds the group, whose threads must have ended before the interpreter does
        dist.destroy_process_group()


def run_case(path: Path, rank: int, world: int) -> None:
    case = Case(path)
    checked = [0]

    def close(key: str, ours: np.ndarray) -> None:
        expected = case.golden.get(key)
        if expected is None:
            return
        checked[0] += 1
        scale = max(float(np.abs(expected).max()), 1e-30)
        assert ours.shape == expected.shape, key
        error = float(np.abs(ours - expected).max()) / scale
        assert error <= case.tolerance, f"{key}: off by {error:.2e} of its largest value"

    model = case.model
    step = TrainStep(case.config, model, rows=case.options["batch_size"], rank=rank, world=world, total_steps=2)
    unroll, clip = case.options["unroll_steps"], case.options["all_clip_norm_val"]
    for s in range(sum(1 for k in case.golden if k.endswith("/global_norm"))):
        batch = case.batch(s, rank, world)
        place = f"step{s}/gpu{rank}/"
        with torch.no_grad():
            table = None
            if model.word_embedding is not None and case.config.softmax.kind == "sampled":
                index = batch.rows if model.tied else batch.input_rows
                assert index is not None
                table = model.word_embedding[index]
            x, state = model(batch.types, None, batch.inputs, step.state, rows_RP=table)
            words = model.encode_types(batch.types, None, table)[batch.inputs[0]]
        close(place + "embedding_forward", words.numpy())
        for d in range(model.directions):
            close(f"{place}lstm_output_dir{d}", x[d].numpy())
        check_state(close, place, state)
        gradients, sums, new_state = step.gradients(batch)
        check_state(close, place, new_state)
        losses = sums.numpy() / (batch.positions / world)
        for d in range(model.directions):
            close(f"{place}loss_dir{d}", losses[d])
        close(place + "total_loss", losses.mean())

        tables = {}
        for name, gradient in gradients.tables.items():
            whole = torch.zeros_like(dict(model.named_parameters())[name])
            tables[name] = whole.index_copy_(0, gradients.rows[name], gradient) if name in gradients.rows else gradient
        dense = to_variables(model, {**gradients.dense, **tables})
        norm = np.sqrt(sum(float((g.astype(np.float64) ** 2).sum()) for g in dense.values()))
        for name, gradient in dense.items():
            close(f"step{s}/grad/{name}", gradient)
            close(f"step{s}/grad_clipped/{name}", gradient * clip / max(norm, clip))
        ours, finite = step.optimizer.apply(gradients.dense, gradients.rows, gradients.tables, s, 2)
        assert bool(finite)
        close(f"step{s}/global_norm", ours.numpy())
        step.state = LstmState(*new_state)
        for name, variable in to_variables(model, dict(model.named_parameters())).items():
            close(f"step{s}/var_after/{name}", variable)
        slots = {k.removeprefix("accumulator."): v for k, v in step.optimizer.state_tensors().items()}
        for name, slot in to_variables(model, slots).items():
            close(f"step{s}/accumulator_after/{name}", slot)
    assert unroll == batch.inputs.shape[2]
    wanted = [k for k in case.golden if k.startswith("step") and f"gpu{rank}" in k or "_after/" in k]
    left_out = sum("sampled_ids" in k or "expected_count" in k for k in wanted)
    assert checked[0] >= len(wanted) - left_out, f"only {checked[0]} values compared of {len(wanted) - left_out}"


def check_state(close, place: str, state: LstmState) -> None:  # type: ignore[no-untyped-def]
    for layer in range(state.cell.shape[0]):
        for d in range(state.cell.shape[1]):
            close(f"{place}final_state/dir{d}/layer{layer}/c", state.cell[layer, d].numpy())
            close(f"{place}final_state/dir{d}/layer{layer}/h", state.hidden[layer, d].numpy())
