"""Training steps and held-out losses with all tensors on a device that is not the CPU, without such a device.

PyTorch's fake tensors have shapes, types and a device, and no numbers: an operation that mixes devices, or that would
wait for the device to hand a number to the host, is an error. What it cannot see is a host's tensor that is copied to
the device by name.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch.utils import backend_registration

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
        reason="this PyTorch cannot pretend to have another device",
    ),
]

_SETUP = """
import json, sys
from pathlib import Path
import torch
from torch._subclasses import FakeTensorMode

torch.utils.backend_registration._setup_privateuseone_for_python_backend("gpu")
FOLDER, CASES = Path(sys.argv[1]), json.loads(sys.argv[2])

from test_capacities import inputs, make_text
from helpers.tiny_runs import tiny_config
from elmo_ray.model import dropout
from elmo_ray.model.bilm import BiLM

text = make_text(FOLDER)
made = dropout.Dropout.__init__
# a CPU's generators stand for the device's, which has no numbers to give
dropout.Dropout.__init__ = lambda self, *given: made(self, *given[:-1], torch.device("cpu"))

def on_device(tensor):
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="gpu:0")

def model_of(config):
    with torch.device("gpu:0"):
        return BiLM(config.model, config.softmax, text[1].size)
"""

_STEPS = """
from elmo_ray.training.step_input import with_micro_batches
from elmo_ray.training.step import TrainStep

for case in CASES:
    config = tiny_config(**case)
    batches = [with_micro_batches(batch, config.train.accumulate) for pair in inputs(config, text) for batch in pair]
    with FakeTensorMode(allow_non_fake_inputs=False):
        step = TrainStep(config, model_of(config), config.data.streams)
        for batch in batches[:2]:
            output = step.run(batch.each(on_device))
        tensors = [*vars(output).values(), *step.state, *step.optimizer.state_tensors().values()]
        devices = {t.device.type for t in tensors if t.dim()}
        assert devices == {"gpu"}, devices
        if len(sys.argv) > 3:
            int(output.finite)  # waits for the device
    print("done")
"""

_HELD_OUT = """
from functools import partial
from elmo_ray.data.encode import thread_source
from elmo_ray.data.streams import StreamCursors, StreamLoader, StreamPlan
from elmo_ray.kernels import full_softmax
from elmo_ray.elmo import scoring as perplexity

# whether a loss is out of exp's range is asked of the device, once a batch: here none is
class Never:
    def __bool__(self):
        return False

any_of = torch.Tensor.any
torch.Tensor.any = lambda self, *a, **k: Never() if not a and not k else any_of(self, *a, **k)

for case in CASES:
    config = tiny_config(**case)
    corpus, words = text
    with torch.no_grad():
        real = BiLM(config.model, config.softmax, words.size)
    characters = perplexity.character_table(real, words)
    streams = 4
    plan = StreamPlan(corpus, streams, shuffle=False, epochs=1)
    source = partial(thread_source, vocabulary=words, max_characters=config.model.char_cnn.max_characters)
    loader = StreamLoader(
        plan, range(streams), StreamCursors.start(streams), source, words, 7, characters, real.directions
    )
    batches = [loader.next_batch() for _ in range(5)]
    loader.close()
    with FakeTensorMode(allow_non_fake_inputs=True):
        for dtype in (None, torch.bfloat16):
            fixed = perplexity.FixedModel(model_of(config), dtype)
            for batch, losses in perplexity.stream_losses(fixed, iter(batches)):
                assert losses.device.type == "gpu" and losses.shape == batch.targets.shape
            x, weight = losses.flatten()[:5, None] * fixed.model.output_weight[:1], fixed.model.output_weight
            full = full_softmax.FullSoftmax(weight, fixed.model.softmax_bias, dtype)
            assert full._safe_log_sums(x).device.type == "gpu"
    print("done")
"""

FULL: dict[str, Any] = {"softmax__kind": "full", "softmax__negatives": None}
WORDS: dict[str, Any] = {"model__char_cnn": None, "model__input": "words"}
CASES: list[dict[str, Any]] = [
    {},
    {"train__precision": "bf16", "train__dropout": 0.0},
    {"model__bidirectional": False},
    {"model__lstm": {"dim": 8, "projection_dim": 8}, "train__precision": "bf16"},
    {"optim__name": "adamw"},
    {"train__accumulate": 3},
    {"train__freeze": ["char_cnn", "lstm.0"]},
    FULL,
    WORDS,
    {**WORDS, "softmax__tied": True},
]


def run(script: str, folder: Path, cases: list[dict[str, Any]], *more: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own, for a pretended device cannot be taken away again."""
    here = Path(__file__).parent
    paths = f"import sys; sys.path[:0] = {[str(here), str(here.parent)]}\n"
    command = [sys.executable, "-c", paths + _SETUP + script, str(folder), json.dumps(cases), *more]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_training_steps_stay_on_the_device(tmp_path: Path) -> None:
    done = run(_STEPS, tmp_path, CASES)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["done"] * len(CASES)


def test_a_wait_for_the_device_would_be_seen(tmp_path: Path) -> None:
    done = run(_STEPS, tmp_path, CASES[:1], "and wait")
    assert done.returncode != 0 and "DataDependentOutput" in done.stderr


def test_held_out_losses_stay_on_the_device(tmp_path: Path) -> None:
    cases = [case for case in CASES if not any(key.startswith(("train", "optim")) for key in case)]
    done = run(_HELD_OUT, tmp_path, cases)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["done"] * len(cases)
