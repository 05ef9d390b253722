"""The main job as a user runs it: its files, its start rules, its errors; without Ray, and once with it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from helpers.tiny_runs import sentences

from elmo_ray.checkpoints.read import newest_checkpoint
from elmo_ray.pretrain import main
from elmo_ray.training.metrics import read_metrics


@pytest.fixture()
def config(tmp_path: Path) -> Path:
    """A configuration with its own text: 3 train shards, valid and test."""
    for name, count in {"train-0": 300, "train-1": 200, "train-2": 0, "valid": 60, "test": 60}.items():
        (tmp_path / f"{name}.txt").write_text("".join(s + "\n" for s in sentences(count, seed=len(name) + count)))
    values = {
        "run": {"name": "tiny", "storage_path": str(tmp_path / "runs")},
        "data": {
            "train": str(tmp_path / "train-*.txt"),
            "valid": str(tmp_path / "valid.txt"),
            "test": str(tmp_path / "test.txt"),
            "streams": 4,
            "block_bytes": 4096,
        },
        "model": {
            "char_cnn": {"filters": [[1, 4], [2, 8]], "embedding_dim": 4, "max_characters": 16, "n_highway": 1},
            "lstm": {"dim": 16, "projection_dim": 8},
        },
        "softmax": {"negatives": 16},
        "train": {
            "unroll": 5, "duration": "60 steps", "validate_every": "30 steps", "checkpoint_every": "20 steps",
            "log_every": 10,
        },
        "cluster": {"workers": 0},
        "evaluate": {"streams": 2},
    }  # fmt: skip
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def result_of(config: Path) -> dict:
    return json.loads((config.parent / "result.json").read_text())


def test_a_run_trains_evaluates_exports_and_writes_only_below_its_storage(config: Path) -> None:
    before = set(config.parent.iterdir())
    assert main([str(config), "--json", str(config.parent / "result.json")]) == 0
    assert set(config.parent.iterdir()) - before == {config.parent / "runs", config.parent / "result.json"}
    run = config.parent / "runs" / "tiny"
    for name in ("export/weights.hdf5", "export/options.json", "export/vocab.txt", "curve.png", "config.yaml"):
        assert (run / name).stat().st_size > 0, name
    result = result_of(config)
    assert result["steps"] == 60 and result["finished"] and not result["stopped"]
    records = read_metrics(run)
    assert [r["step"] for r in records if r["kind"] == "valid"] == [30, 60]
    train = [r for r in records if r["kind"] == "train"]
    assert [r["step"] for r in train] == [10, 20, 30, 40, 50, 60]
    assert train[-1]["loss"] < train[0]["loss"]
    evaluation = result["evaluation"]
    assert evaluation["perplexity_forward"] and evaluation["perplexity_backward"]
    assert result["unigram_perplexity"] > 1
    newest = newest_checkpoint(run / "checkpoints")
    assert newest is not None and newest.step == 60


@pytest.mark.slow
def test_a_used_name_needs_resume_or_fresh(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(config), "train.duration=20 steps", "train.validate_every=20 steps"]
    assert main([*arguments, "--resume"]) == 0  # nothing there yet: starts fresh
    assert main(arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: run.name=tiny:") and "--resume" in error and "--fresh" in error
    assert main([*arguments, "--resume"]) == 0  # finished: nothing to do
    run = config.parent / "runs" / "tiny"
    assert sorted(path.name for path in (run / "metrics").iterdir()) == ["attempt-001.csv", "attempt-001.jsonl"]
    longer = [str(config), "train.duration=40 steps", "train.validate_every=20 steps"]
    assert main([*longer, "--resume"]) == 0
    newest = newest_checkpoint(run / "checkpoints")
    assert newest is not None and newest.step == 40
    assert main([*arguments, "--fresh"]) == 0
    newest = newest_checkpoint(run / "checkpoints")
    assert newest is not None and newest.step == 20
    moved = [path for path in run.parent.iterdir() if path.name.startswith("tiny.before-")]
    assert len(moved) == 1 and (moved[0] / "checkpoints").is_dir()


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("softmax.negatives=5000", "softmax.negatives=5000"),
        ("data.train=/nowhere/*.txt", "/nowhere/*.txt"),
        ("cluster.workers=9", "cluster.workers=9"),
        ("data.vocab=/nowhere/vocab.txt", "/nowhere/vocab.txt"),
    ],
)
def test_mistakes_end_with_one_line(
    config: Path, override: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(config), override]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and expected in lines[0]


def test_resume_refuses_another_model_and_names_the_key(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(config), "train.duration=10 steps"]
    assert main(arguments) == 0
    for override, key in {
        "model.lstm.dim=24": "model.lstm.dim",
        "run.seed=9": "run.seed",
        "data.streams=8": "data.streams",
    }.items():
        assert main([str(config), "train.duration=20 steps", "--resume", override]) == 2
        assert f"error: {key} is" in capsys.readouterr().err


def everything_below(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")}


@pytest.mark.parametrize("flag", ["--resume", "--fresh"])
def test_what_is_refused_changes_nothing(config: Path, flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(config), "train.duration=10 steps"]) == 0
    before = everything_below(config.parent)
    bad = ["cluster.device=gpu", "data.vocab=missing.txt"] + ["data.streams=8", "run.seed=9"] * (flag == "--resume")
    if torch.cuda.is_available():
        bad.remove("cluster.device=gpu")
    for override in bad:
        assert main([str(config), "train.duration=20 steps", flag, override]) == 2, override
        assert everything_below(config.parent) == before, override
    assert main([str(config), "run.name=new", bad[0]]) == 2
    assert not (config.parent / "runs" / "new").exists()


@pytest.mark.slow
def test_one_run_has_one_driver(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    holder = f"""
import time
from pathlib import Path
from elmo_ray.training.run_folder import RunFolder
with RunFolder(Path({str(config.parent / "runs" / "tiny")!r}), None, False).locked():
    print("locked", flush=True)
    time.sleep(600)
"""
    other = subprocess.Popen([sys.executable, "-c", holder], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None and other.stdout.readline() == "locked\n"
        assert main([str(config), "train.duration=10 steps"]) == 2
        assert "error: run.name=tiny: another process is running" in capsys.readouterr().err
    finally:
        other.kill()
        other.wait()
    assert main([str(config), "train.duration=10 steps"]) == 0, "the system lets go of a dead process's lock"
    assert not (config.parent / "runs" / ".tiny.lock").exists()


def test_dry_run_shows_what_would_be_and_writes_no_run(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(config), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    for expected in ("parameters:", "lstm.0", "positions per step: 20", "memory of a worker", "disk:", "devices seen"):
        assert expected in shown
    assert not (config.parent / "runs" / "tiny").exists()


def test_dry_run_of_a_gpu_counts_its_memory_and_that_of_the_host_apart(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(config), "cluster.device=gpu", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    of_gpu, of_host = re.findall(r"^memory of a worker(?:'s GPU| on its host): (.*)$", shown, re.MULTILINE)
    assert "parameters" in of_gpu and "text" not in of_gpu
    assert re.fullmatch(r"text [^,]+, feed process [^,]+; in all about [^,]+", of_host)


@pytest.mark.parametrize("dry", [True, False])
@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.streams=100000", "data.streams=100000: an epoch has 5,"),
        ("softmax.negatives=5000", "softmax.negatives=5000: must be below the number of words"),
        ("data.valid={folder}/train-2.txt.copy", "data.valid={folder}/train-2.txt.copy: no words in 1 files"),
        ("data.valid={folder}/train-0.txt", "both name {folder}/train-0.txt"),
        ("data.min_count=100000", "data.min_count=100000: no word of data.train is seen so often"),
        ("train.unroll=65536 model.lstm.dim=65536", "this machine has"),
    ],
)
def test_a_dry_run_refuses_what_a_run_refuses(
    config: Path, override: str, expected: str, dry: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    (config.parent / "train-2.txt.copy").write_bytes(b"")
    override, expected = (text.replace("{folder}", str(config.parent)) for text in (override, expected))
    assert main([str(config), *override.split(), *["--dry-run"] * dry]) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert expected in error
    assert not (config.parent / "runs" / "tiny").exists()


def test_streams_that_are_short_are_told(config: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert main([str(config), "--dry-run", "data.streams=64"]) == 0
    assert "data.streams" not in caplog.text
    assert main([str(config), "--dry-run", "data.streams=2000"]) == 0
    assert "data.streams=2000: a stream has 2 positions of an epoch" in caplog.text
    suits = re.search(r"data\.streams=(\d+) suits this text", caplog.text)
    caplog.clear()
    assert suits is not None and main([str(config), "--dry-run", f"data.streams={suits[1]}"]) == 0
    assert "suits" not in caplog.text


@pytest.mark.ray
def test_the_whole_job_with_two_workers_on_ray(config: Path) -> None:
    command = [sys.executable, "-m", "elmo_ray.pretrain", str(config), "cluster.workers=2", "train.dropout=0"]
    command += ["train.precision=fp64", "--json", str(config.parent / "two.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "step 60/60" in done.stderr and "held-out perplexity of the test text" in done.stdout
    # the same run without Ray and with one worker: the same streams, the same sums but for their order
    alone = [str(config), "run.name=alone", "train.dropout=0", "train.precision=fp64"]
    assert main(alone) == 0
    for ours, theirs in zip(*(read_metrics(config.parent / "runs" / name) for name in ("tiny", "alone")), strict=True):
        assert ours["step"] == theirs["step"] and ours["kind"] == theirs["kind"]
        if ours["kind"] != "event":
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-9)
