"""What a run knows about itself goes through JSON unchanged, and nothing else is taken for it."""

from __future__ import annotations

import json

import pytest

from elmo_ray.errors import CheckpointError
from elmo_ray.training.snapshot import Progress


def test_round_trip() -> None:
    progress = Progress(
        step=7,
        positions=2**40,
        window_positions=5,
        best_perplexity=12.25,
        best_step=4,
        seconds=1.5,
        last_valid={"step": 4, "perplexity": 12.25, "perplexity_backward": None},
        skipped=1,
    )
    assert Progress.from_dict(json.loads(json.dumps(progress.to_dict())), "here") == progress
    assert Progress.from_dict(Progress().to_dict(), "here") == Progress()


def test_other_keys_are_refused() -> None:
    values = Progress().to_dict()
    missing = {k: v for k, v in values.items() if k != "positions"}
    for wrong, key in ((missing, "positions"), ({**values, "extra": 1}, "extra"), ({}, "step")):
        with pytest.raises(CheckpointError, match=key) as caught:
            Progress.from_dict(wrong, "runs/a/step-1")
        assert "runs/a/step-1" in str(caught.value)
