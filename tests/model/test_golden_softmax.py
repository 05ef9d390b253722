"""The sampled softmax of TensorFlow: losses and gradients for given samples, and what its log-uniform sampler
yields."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from elmo_ray.model.softmax import sampled_losses
from elmo_ray.training.noise import draw_negatives, log_expected_count

FOLDER = Path(__file__).parents[1] / "golden" / "softmax"
LOSSES = np.load(FOLDER / "sampled_softmax.npz")
SAMPLER = np.load(FOLDER / "expected_count_stats.npz")
CASES = sorted({key.split("/")[0] for key in LOSSES.files})
DRAWS = {"v1000_s64": 4000, "v50000_s8192": 40, "v793471_s8192": 40}


def close(ours: torch.Tensor, key: str) -> None:
    expected = LOSSES[key]
    assert ours.shape == expected.shape
    error = float(np.abs(ours.detach().numpy() - expected).max()) / max(float(np.abs(expected).max()), 1e-30)
    assert error <= 1e-5, f"{key}: off by {error:.1e} of its largest value"


def test_there_are_three_cases_and_their_counts_are_known() -> None:
    assert len(CASES) == 3
    assert sorted(DRAWS) == sorted({key.split("/")[0] for key in SAMPLER.files})


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("whole_table", [True, False])
def test_losses_and_gradients(case: str, whole_table: bool) -> None:
    data = {key.split("/")[1]: LOSSES[key] for key in LOSSES.files if key.startswith(case + "/")}
    labels, sampled = data["labels"], data["sampled_ids"]
    rows = np.arange(len(data["W"])) if whole_table else np.unique(np.concatenate([labels, sampled]))
    inputs, weight, bias = (
        torch.from_numpy(a.copy()).requires_grad_() for a in (data["inputs"], data["W"][rows], data["b"][rows])
    )
    losses = sampled_losses(
        inputs[None],
        weight,
        bias,
        torch.from_numpy(np.searchsorted(rows, labels))[None],
        torch.from_numpy(np.log(data["true_expected_count"][:, 0]))[None],
        torch.from_numpy(np.searchsorted(rows, sampled))[None],
        torch.from_numpy(np.log(data["sampled_expected_count"]))[None],
        mask_hits=not case.endswith("keep_hits"),
    )[0]
    hits = (labels[:, None] == sampled[None, :]).sum(axis=1)
    assert hits.tolist() == data["n_accidental_hits"].tolist() and hits.any()
    close(losses, f"{case}/losses")
    losses.mean().backward()
    close(torch.as_tensor(inputs.grad), f"{case}/grad_mean_inputs")
    for name, leaf in (("W", weight), ("b", bias)):
        assert leaf.grad is not None
        whole = torch.zeros(data[name].shape)
        close(whole.index_copy_(0, torch.from_numpy(rows), leaf.grad), f"{case}/grad_mean_{name}")


@pytest.mark.parametrize("case", DRAWS)
def test_expected_counts_of_the_sampler(case: str) -> None:
    n_words = int(case.split("_")[0][1:])
    ids, tries = SAMPLER[f"{case}/probe_ids"], SAMPLER[f"{case}/num_tries"]
    expected = SAMPLER[f"{case}/expected_count_per_run"]
    for run in range(0, len(tries), 10):  # tries were measured from the counts, so they are whole to 0.003 only
        found = np.exp(log_expected_count(ids, round(float(tries[run])), n_words))
        assert np.abs(found - expected[run]).max() <= 1e-6


@pytest.mark.parametrize("case", DRAWS)
def test_our_draws_are_distributed_as_its(case: str) -> None:
    n_words, count = (int(part[1:]) for part in case.split("_"))
    draws = [draw_negatives(11, step, step % 2, n_words, count) for step in range(DRAWS[case])]
    theirs = SAMPLER[f"{case}/num_tries"]
    ours = np.array([d.tries for d in draws], np.float64)
    sd = theirs.std() * np.sqrt(1 / len(ours) + 1 / len(theirs))
    assert abs(ours.mean() - theirs.mean()) < 4 * sd, f"{ours.mean()} tries, theirs {theirs.mean()}"
    assert 0.6 < ours.std() / theirs.std() < 1.6
    frequency = SAMPLER[f"{case}/inclusion_frequency"].astype(np.float64)
    found = np.zeros(n_words)
    for d in draws:
        found[d.ids] += 1 / len(draws)
    found = found[: len(frequency)]
    # ids in bands of doubling size, so that each band has many inclusions and few parameters decide
    edges = np.unique(np.minimum(2 ** np.arange(20) - 1, len(frequency)))
    for first, last in zip(edges[:-1], edges[1:], strict=True):
        a, b = found[first:last].mean(), frequency[first:last].mean()
        p = (a + b) / 2
        sd = np.sqrt(max(p * (1 - p), 1e-4) / (last - first) * (1 / len(draws) + 1 / len(theirs)))
        assert abs(a - b) < 5 * sd, f"ids {first}..{last - 1} are in {a:.4f} of our draws, {b:.4f} of theirs"
