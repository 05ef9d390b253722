"""Checkpoints: complete or not there, damage found and named, only CheckpointError from strangers' files."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from elmo_ray.checkpoints import write as ck
from elmo_ray.checkpoints.manifest import MANIFEST, finished_manifest, read_json
from elmo_ray.errors import CheckpointError

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16]
DTYPES += [torch.int8, torch.uint8, torch.bool]


def shares(streams: int, world: int) -> list[tuple[int, int]]:
    return [(rank * streams // world, (rank + 1) * streams // world) for rank in range(world)]


def state_of(streams: int, step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {
        "cell": torch.randn(streams, 2, 3, generator=generator),
        "cursor": torch.arange(streams, dtype=torch.int64) * 1000 + step,
    }


def save(root: Path, step: int, attempt: int = 1, streams: int = 5, world: int = 2) -> ck.Checkpoint:
    folder = root / ck.directory_name(step, attempt)
    state = state_of(streams, step)
    for rank, (first, last) in enumerate(shares(streams, world)):
        tensors = {ck.streams_name(first, last): {key: value[first:last] for key, value in state.items()}}
        texts = {}
        if rank == 0:
            tensors["model.safetensors"] = {"weight": torch.full((4, 3), float(step))}
            texts = {"config.yaml": "run: {name: Übung}\n", "progress.json": json.dumps({"step": step})}
        ck.write_part(folder, rank, tensors, texts)
    return ck.commit(folder, world, {"step": step, "streams": streams, "versions": {"torch": "x"}}, patience_s=0)


def listing(root: Path) -> dict[str, str]:
    files = [path for path in root.rglob("*") if path.is_file()]
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_round_trip_of_every_dtype_and_shape(tmp_path: Path) -> None:
    tensors = {f"t{i}": (torch.arange(6).reshape(2, 3) % 2).to(dtype) for i, dtype in enumerate(DTYPES)}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4), "transposed": torch.randn(3, 5).t()}
    tensors |= {"grad": torch.randn(3, requires_grad=True), "strided": torch.arange(10)[::3]}
    folder = tmp_path / ck.directory_name(7, 1)
    streams = {ck.streams_name(0, 1): {"s": torch.zeros(1)}}
    ck.write_part(folder, 0, {"model.safetensors": tensors, **streams}, {"vocab.txt": "<S>\nnaïve\n"})
    ck.commit(folder, 1, {"step": 7, "streams": 1}, patience_s=0)
    checkpoint = ck.open_checkpoint(folder)
    assert checkpoint.step == 7
    assert checkpoint.text("vocab.txt") == "<S>\nnaïve\n"
    for read in (checkpoint.tensors("model.safetensors"), safetensors.torch.load_file(folder / "model.safetensors")):
        assert set(read) == set(tensors)
        for name, tensor in tensors.items():
            assert read[name].dtype == tensor.dtype and read[name].shape == tensor.shape
            assert torch.equal(read[name], tensor.detach())
    reordered = dict(reversed(tensors.items()))
    ck.write_part(tmp_path / "again", 0, {"model.safetensors": reordered}, {})
    assert (tmp_path / "again/model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize(("streams", "world"), [(1, 1), (5, 1), (5, 2), (7, 3), (8, 8)])
def test_streams_come_back_for_any_other_number_of_workers(tmp_path: Path, streams: int, world: int) -> None:
    checkpoint = save(tmp_path, 3, streams=streams, world=world)
    state = state_of(streams, 3)
    for other in range(1, streams + 1):
        for first, last in shares(streams, other):
            read = checkpoint.stream_tensors(first, last)
            assert set(read) == set(state)
            assert all(torch.equal(read[key], state[key][first:last]) for key in state)
    for first, last in [(0, streams + 1), (-1, 1), (1, 1)]:
        with pytest.raises(CheckpointError, match="has streams"):
            checkpoint.stream_tensors(first, last)


def test_commit_refuses_what_is_not_whole(tmp_path: Path) -> None:
    def part(folder: Path, rank: int, first: int, last: int, **texts: str) -> None:
        ck.write_part(folder, rank, {ck.streams_name(first, last): {"s": torch.zeros(last - first)}}, texts)

    def refused(folder: Path, match: str, world: int = 2) -> None:
        with pytest.raises(CheckpointError, match=match):
            ck.commit(folder, world, {"step": 1, "streams": 4}, patience_s=0)
        assert not (folder / MANIFEST).exists()

    part(tmp_path / "a", 0, 0, 2)
    refused(tmp_path / "a", "part-00001.json: the file is missing")
    part(tmp_path / "b", 0, 0, 2)
    part(tmp_path / "b", 1, 3, 4)
    refused(tmp_path / "b", "streams-00003-00003.*does not begin at stream 2")
    part(tmp_path / "c", 0, 0, 2)
    part(tmp_path / "c", 1, 2, 3)
    refused(tmp_path / "c", "streams 0..2, but the run has 4")
    part(tmp_path / "d", 0, 0, 2, config="a")
    part(tmp_path / "d", 1, 2, 4, config="b")
    refused(tmp_path / "d", "config was written by another rank")
    part(tmp_path / "e", 0, 0, 4)
    os.truncate(tmp_path / "e" / ck.streams_name(0, 4), 20)
    refused(tmp_path / "e", "truncated", world=1)


def test_commit_waits_for_a_slow_file_system(tmp_path: Path) -> None:
    folder = tmp_path / "x"
    ck.write_part(folder, 0, {ck.streams_name(0, 1): {"s": torch.zeros(1)}}, {})

    def late() -> None:
        time.sleep(0.3)
        ck.write_part(folder, 1, {ck.streams_name(1, 2): {"s": torch.zeros(1)}}, {})

    thread = threading.Thread(target=late)
    thread.start()
    assert ck.commit(folder, 2, {"step": 1, "streams": 2}, patience_s=20).streams == 2
    thread.join()


def damage(path: Path, kind: str, seed: int) -> None:
    data = bytearray(path.read_bytes())
    if kind == "missing":
        path.unlink()
        return
    if kind == "truncated":
        data = data[: len(data) // 2]
    elif kind == "empty":
        data = bytearray()
    elif kind == "longer":
        data += b"\0"
    else:
        position = random.Random(seed).randrange(len(data) * 8)
        data[position // 8] ^= 1 << position % 8
    path.write_bytes(data)


@pytest.mark.parametrize("kind", ["missing", "truncated", "empty", "longer", "flipped"])
def test_damage_of_any_file_is_found_named_and_walked_past(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path / "whole", 10)
    names = [*save(tmp_path / "whole", 20).files, MANIFEST]
    for seed, name in enumerate(names * (5 if kind == "flipped" else 1)):
        root = tmp_path / f"copy{seed}"
        shutil.copytree(tmp_path / "whole", root)
        newest = root / ck.directory_name(20, 1)
        damage(newest / name, kind, seed)
        with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
            ck.open_checkpoint(newest)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            found = ck.newest_checkpoint(root)
        assert found is not None and found.step == 10
        assert name in caplog.text and newest.name in caplog.text


def test_the_search_for_the_newest(tmp_path: Path) -> None:
    assert ck.newest_checkpoint(tmp_path / "nothing") is None
    unfinished = tmp_path / ck.directory_name(5, 1)
    ck.write_part(unfinished, 0, {"model.safetensors": {"w": torch.zeros(2)}}, {})
    (tmp_path / "step-1-attempt-x").mkdir()
    (tmp_path / "checkpoint_manager_snapshot.json").write_text("{}")
    assert ck.newest_checkpoint(tmp_path) is None, "an unfinished directory is not a checkpoint"
    save(tmp_path, 30, attempt=1)
    save(tmp_path, 20, attempt=2)
    found = ck.newest_checkpoint(tmp_path)
    assert found is not None and found.step == 20, "attempt 2 came after attempt 1, although it had walked back"
    for step, attempt in [(30, 1), (20, 2)]:
        damage(tmp_path / ck.directory_name(step, attempt) / "model.safetensors", "flipped", 1)
    with pytest.raises(CheckpointError, match="no checkpoint is whole.*model.safetensors"):
        ck.newest_checkpoint(tmp_path)


@contextlib.contextmanager
def small_disk(limit: int) -> Iterator[None]:
    """The kernel refuses to let files grow beyond `limit` bytes, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_failed_write_leaves_no_debris_and_no_harm(tmp_path: Path) -> None:
    save(tmp_path, 10)
    before = listing(tmp_path)
    writer = ck.CheckpointWriter(0)
    assert writer.state == "idle" and writer.wait() == "idle"
    big = {"a.safetensors": {"x": torch.ones(10)}, "b.safetensors": {"x": torch.ones(1 << 20)}}
    with small_disk(1 << 20):
        writer.start(tmp_path / ck.directory_name(20, 1), big, {"config.yaml": "x"})
        assert writer.wait() == "failed"
    assert isinstance(writer.error, OSError)
    assert listing(tmp_path) == before and not (tmp_path / ck.directory_name(20, 1)).exists()
    writer.reset()
    (tmp_path / "file").write_text("in the way")
    writer.start(tmp_path / "file" / ck.directory_name(20, 1), big, {})
    assert writer.wait() == "failed" and isinstance(writer.error, OSError)
    writer.reset()
    assert writer.state == "idle" and writer.error is None
    writer.start(tmp_path / ck.directory_name(10, 1), big, {})
    assert writer.wait() == "failed" and isinstance(writer.error, FileExistsError)
    (tmp_path / "file").unlink()
    assert listing(tmp_path) == before, "a finished checkpoint is never written again"
    for name in ["../x", "a/b", "manifest.json", "part-00000.json", "", ".hidden", "x\n"]:
        with pytest.raises(ValueError, match="not a usable file name"):
            ck.write_part(tmp_path / "y", 0, {}, {name: "x"})
    writer.start(tmp_path / ck.directory_name(20, 1), big, {})
    assert writer.wait() == "written"


def test_one_ranks_failure_leaves_the_files_of_the_others(tmp_path: Path) -> None:
    folder = tmp_path / "x"
    ck.write_part(folder, 1, {"streams-00001-00001.safetensors": {"s": torch.zeros(1)}}, {})
    with small_disk(1 << 12), pytest.raises(OSError):
        ck.write_part(folder, 0, {"model.safetensors": {"x": torch.ones(1 << 16)}}, {})
    assert sorted(os.listdir(folder)) == ["part-00001.json", "streams-00001-00001.safetensors"]
    ck.discard(folder)
    ck.discard(folder)
    assert not folder.exists()


def test_training_may_go_on_while_the_writer_writes(tmp_path: Path) -> None:
    weights = torch.zeros(1 << 20)
    writer = ck.CheckpointWriter(0)
    writer.start(tmp_path / "x", {"model.safetensors": {"w": weights}, "streams-00000-00000.safetensors": {}}, {})
    weights.fill_(9)
    if writer.state == "writing":
        with pytest.raises(RuntimeError, match="wait"):
            writer.start(tmp_path / "y", {}, {})
    assert writer.wait() == "written"
    checkpoint = ck.commit(tmp_path / "x", 1, {"step": 1, "streams": 1}, patience_s=0)
    assert float(checkpoint.tensors("model.safetensors")["w"].abs().max()) == 0


KILLED = """
import sys, torch
from pathlib import Path
from elmo_ray.checkpoints import write as ck
root, attempt = Path(sys.argv[1]), int(sys.argv[2])
found = ck.newest_checkpoint(root)
step = 0 if found is None else found.step
if found is not None:
    assert float(found.tensors("model.safetensors")["w"].mean()) == step
print("ready", step, flush=True)
while True:
    step += 1
    folder = root / ck.directory_name(step, attempt)
    ck.write_part(folder, 0, {"model.safetensors": {"w": torch.full((1 << 18,), float(step))},
                              "streams-00000-00000.safetensors": {"s": torch.zeros(1)}}, {"config.yaml": "x"})
    ck.commit(folder, 1, {"step": step, "streams": 1}, patience_s=0)
    ck.prune(root, 2)
"""


def test_kill_9_while_saving(tmp_path: Path) -> None:
    source = random.Random(3)
    steps = []
    for attempt in range(1, 4):
        command = [sys.executable, "-c", KILLED, str(tmp_path), str(attempt)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("ready"), "the writer could not resume"
        steps.append(int(line.split()[1]))
        time.sleep(0.15 + source.random() * 0.2)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    found = ck.newest_checkpoint(tmp_path)
    assert found is not None
    assert steps == sorted(steps) and found.step > steps[-1] > 0
    assert len([path for path in tmp_path.iterdir() if (path / MANIFEST).exists()]) <= 3


def test_prune(tmp_path: Path) -> None:
    assert ck.prune(tmp_path / "nothing", 3) == []
    for step in (10, 20, 30, 40):
        save(tmp_path, step)
    (tmp_path / "other").mkdir()
    leftover = tmp_path / ck.directory_name(35, 1)
    ck.write_part(leftover, 0, {"model.safetensors": {"w": torch.zeros(2)}}, {})
    running = tmp_path / ck.directory_name(50, 1)
    ck.write_part(running, 0, {"model.safetensors": {"w": torch.zeros(2)}}, {})
    (tmp_path / ck.directory_name(30, 1) / "model.safetensors").unlink()
    protect = [tmp_path / ck.directory_name(10, 1)]
    removed = ck.prune(tmp_path, 2, protect)
    assert {path.name for path in removed} == {leftover.name, ck.directory_name(30, 1)}
    kept = {path.name for path in tmp_path.iterdir()}
    assert kept == {"other", running.name, *(ck.directory_name(step, 1) for step in (10, 20, 40))}
    ck.prune(tmp_path, 1)
    assert ck.directory_name(40, 1) in os.listdir(tmp_path) and running.exists()
    assert len(os.listdir(tmp_path)) == 3


def test_damaged_checkpoints_do_not_crowd_out_the_last_good_one(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40):
        save(tmp_path, step)
    for step in (30, 40):  # as long as before: only their hashes tell
        path = tmp_path / ck.directory_name(step, 1) / "model.safetensors"
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    damaged: list[Path] = []
    newest = ck.newest_checkpoint(tmp_path, damaged=damaged)
    assert newest is not None and newest.step == 20
    assert [path.name for path in damaged] == [ck.directory_name(step, 1) for step in (40, 30)]
    save(tmp_path, 50)
    ck.prune(tmp_path, 2, damaged=damaged)
    assert sorted(os.listdir(tmp_path)) == [ck.directory_name(step, 1) for step in (20, 50)]


def test_the_best_is_an_independent_copy(tmp_path: Path) -> None:
    best = tmp_path / "best"
    first, second = save(tmp_path, 10), save(tmp_path, 20)
    assert ck.copy_best(first, best).step == 10
    assert ck.copy_best(second, best).step == 20
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir() and "step" not in path.name) == ["best"]
    damage(first.path / "model.safetensors", "flipped", 0)
    with pytest.raises(CheckpointError, match="model.safetensors"):
        ck.copy_best(first, best)
    with small_disk(64), pytest.raises(OSError):
        ck.copy_best(second, best)
    damage(second.path / "model.safetensors", "flipped", 0)
    assert ck.open_checkpoint(best).step == 20
    os.replace(best, tmp_path / "best.previous")  # killed between the two renames
    assert ck.open_checkpoint(best).step == 20


# ---------------------------------------------------------------- strangers


def rewritten(folder: Path, change: dict[str, object]) -> None:
    """The manifest with some fields changed and its own hash made right again where possible."""
    manifest = read_json(folder / MANIFEST) | change
    manifest.pop("manifest_sha256")
    text = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    manifest["manifest_sha256"] = hashlib.sha256(text.encode()).hexdigest()
    (folder / MANIFEST).write_text(json.dumps(manifest))


ENTRY = {"size": 3, "sha256": "0" * 64}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "format"),
        ({"format": True}, "format"),
        ({"step": -1}, "step is -1"),
        ({"step": "7"}, "step is '7'"),
        ({"step": 10**30}, "step"),
        ({"streams": 0}, "streams"),
        ({"world": None}, "world"),
        ({"files": {"../../../etc/passwd": ENTRY}}, "etc/passwd"),
        ({"files": {"/etc/passwd": ENTRY}}, "etc/passwd"),
        ({"files": {"a\0b": ENTRY}}, "no checkpoint may have"),
        ({"files": {"manifest.json": ENTRY}}, "manifest.json"),
        ({"files": {"x": {"size": -1, "sha256": "0" * 64}}}, "no size and sha256 for x"),
        ({"files": {"x": {"size": 1e300, "sha256": "0" * 64}}}, "no size and sha256 for x"),
        ({"files": {"x": {"size": 1, "sha256": "Z"}}}, "no size and sha256 for x"),
        ({"files": {"x": None}}, "no size and sha256 for x"),
        ({"files": []}, "no table of files"),
        ({"files": {"streams-00000-99999.safetensors": ENTRY}}, "streams 0..99999"),
        ({"files": {"streams-00004-00000.safetensors": ENTRY}}, "does not begin at stream 0"),
    ],
)
def test_absurd_manifests(tmp_path: Path, change: dict[str, object], message: str) -> None:
    folder = save(tmp_path, 1).path
    rewritten(folder, change)
    with pytest.raises(CheckpointError, match=message):
        ck.open_checkpoint(folder)


def test_manifests_that_try_the_parser(tmp_path: Path) -> None:
    folder = save(tmp_path, 1).path
    bad = [b"", b"null", b"[]", b"\xff\xfe", b"[" * 200_000, b'{"format":1,"a":' + b"[" * 200_000, b'{"step": NaN}']
    bad += [b'{"format": 1, "step": ' + b"9" * 10_000 + b"}", b" " * (17 << 20), b'{"format": 1e999}']
    for data in bad:
        (folder / MANIFEST).write_bytes(data)
        with pytest.raises(CheckpointError, match="manifest.json"):
            ck.open_checkpoint(folder)
    for make in (lambda path: os.mkfifo(path), lambda path: path.mkdir(), lambda path: path.symlink_to(path)):
        shutil.rmtree(folder / MANIFEST) if (folder / MANIFEST).is_dir() else (folder / MANIFEST).unlink()
        make(folder / MANIFEST)
        with pytest.raises(CheckpointError, match="manifest.json"):
            ck.open_checkpoint(folder)
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        ck.open_checkpoint(tmp_path / "nowhere")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
KEYS = ["format", "step", "streams", "world", "files", "manifest_sha256", "versions", "other"]


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("stranger"), 1).path


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from(KEYS), json_values, max_size=3), st.booleans(), st.integers(0, 40))
def test_fuzzed_manifests_raise_only_our_error(
    stranger: Path, changes: dict[str, object], rehash: bool, cut: int
) -> None:
    original = (stranger / MANIFEST).read_bytes()
    try:
        if rehash:
            with contextlib.suppress(ValueError):
                rewritten(stranger, changes)
        else:
            text = json.dumps(json.loads(original) | changes)
            (stranger / MANIFEST).write_bytes(text.encode()[: -cut or None])
        with contextlib.suppress(CheckpointError):
            checkpoint = ck.open_checkpoint(stranger)
            for name in checkpoint.files:
                checkpoint.text(name)
    finally:
        (stranger / MANIFEST).write_bytes(original)


@settings(max_examples=200, deadline=None)
@given(
    head=st.none() | st.integers(0, 2**64 - 1),
    header=st.binary(max_size=40) | json_values.map(lambda value: json.dumps(value).encode()),
    shape=st.lists(st.integers(0, 2**40), max_size=3),
)
def test_garbage_with_a_right_hash_is_not_read_as_tensors(
    tmp_path_factory: pytest.TempPathFactory, head: int | None, header: bytes, shape: list[int]
) -> None:
    folder = tmp_path_factory.mktemp("garbage")
    if len(header) % 2:
        header = json.dumps({"x": {"dtype": "F32", "shape": shape, "data_offsets": [0, 8]}}).encode()
    data = (len(header) if head is None else head).to_bytes(8, "little") + header + b"\0" * 8
    files = {}
    for name in ("model.safetensors", "streams-00000-00000.safetensors"):
        (folder / name).write_bytes(data)
        files[name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    manifest = finished_manifest({"format": 1, "step": 1, "world": 1, "streams": 1, "files": files}, folder)
    (folder / MANIFEST).write_text(json.dumps(manifest))
    checkpoint = ck.open_checkpoint(folder)
    with contextlib.suppress(CheckpointError):
        assert sum(tensor.numel() for tensor in checkpoint.tensors("model.safetensors").values()) <= 2
    with contextlib.suppress(CheckpointError):
        assert all(len(tensor) == 1 for tensor in checkpoint.stream_tensors(0, 1).values())
