"""Checkpoints: complete or not there, damage found and named, only CheckpointError from strangers' files.

In folders and in an object store, by the same code: fsspec's memory:// where one process is enough, else moto's S3.
"""

from __future__ import annotations

import contextlib
import errno
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
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch
from helpers.places import KINDS, contents, copy_tree, place_of, remove, s3_server
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from elmo_ray import storage
from elmo_ray.checkpoints import write as ck
from elmo_ray.checkpoints.manifest import MANIFEST, directory_name, finished_manifest, streams_name
from elmo_ray.checkpoints.read import Checkpoint, newest_checkpoint, open_checkpoint
from elmo_ray.checkpoints.stores import store_of
from elmo_ray.errors import CheckpointError
from elmo_ray.storage import Place, base_name, is_uri, join, read_bytes, write_bytes

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16]
DTYPES += [torch.int8, torch.uint8, torch.bool]


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture()
def root(kind: str, tmp_path: Path) -> str:
    return place_of(kind, tmp_path)


@pytest.fixture(scope="module", autouse=True)
def own_temporary_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("tmp")))
        yield


def names_in(directory: Place) -> list[str]:
    """Names of the directories, sorted; stores have none that are empty, which memory:// does not know."""
    names = sorted(store_of(directory).directories(str(directory)))
    return [name for name in names if not is_uri(directory) or contents(join(directory, name))]


def shares(streams: int, world: int) -> list[tuple[int, int]]:
    return [(rank * streams // world, (rank + 1) * streams // world) for rank in range(world)]


def state_of(streams: int, step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {
        "cell": torch.randn(streams, 2, 3, generator=generator),
        "cursor": torch.arange(streams, dtype=torch.int64) * 1000 + step,
    }


def save(root: Place, step: int, attempt: int = 1, streams: int = 5, world: int = 2) -> Checkpoint:
    folder = join(root, directory_name(step, attempt))
    state = state_of(streams, step)
    for rank, (first, last) in enumerate(shares(streams, world)):
        tensors = {streams_name(first, last): {key: value[first:last] for key, value in state.items()}}
        texts = {}
        if rank == 0:
            tensors["model.safetensors"] = {"weight": torch.full((4, 3), float(step))}
            texts = {"config.yaml": "run: {name: Übung}\n", "progress.json": json.dumps({"step": step})}
        ck.write_rank_files(folder, rank, tensors, texts)
    return ck.commit(folder, world, {"step": step, "streams": streams, "versions": {"torch": "x"}}, patience_s=0)


def test_round_trip_of_every_dtype_and_shape(root: str) -> None:
    tensors = {f"t{i}": (torch.arange(6).reshape(2, 3) % 2).to(dtype) for i, dtype in enumerate(DTYPES)}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4), "transposed": torch.randn(3, 5).t()}
    tensors |= {"grad": torch.randn(3, requires_grad=True), "strided": torch.arange(10)[::3]}
    folder = join(root, directory_name(7, 1))
    streams = {streams_name(0, 1): {"s": torch.zeros(1)}}
    ck.write_rank_files(folder, 0, {"model.safetensors": tensors, **streams}, {"vocab.txt": "<S>\nnaïve\n"})
    ck.commit(folder, 1, {"step": 7, "streams": 1}, patience_s=0)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.step == 7
    assert checkpoint.text("vocab.txt") == "<S>\nnaïve\n"
    data = read_bytes(join(folder, "model.safetensors"))
    for read in (checkpoint.tensors("model.safetensors"), safetensors.torch.load(data)):
        assert set(read) == set(tensors)
        for name, tensor in tensors.items():
            assert read[name].dtype == tensor.dtype and read[name].shape == tensor.shape
            assert torch.equal(read[name], tensor.detach())
    reordered = dict(reversed(tensors.items()))
    ck.write_rank_files(join(root, "again"), 0, {"model.safetensors": reordered}, {})
    assert read_bytes(join(root, "again", "model.safetensors")) == data


@pytest.mark.parametrize(("streams", "world"), [(1, 1), (5, 1), (5, 2), (7, 3), (8, 8)])
def test_streams_come_back_for_any_other_number_of_workers(root: str, streams: int, world: int) -> None:
    checkpoint = save(root, 3, streams=streams, world=world)
    state = state_of(streams, 3)
    for other in range(1, streams + 1):
        for first, last in shares(streams, other):
            read = checkpoint.stream_tensors(first, last)
            assert set(read) == set(state)
            assert all(torch.equal(read[key], state[key][first:last]) for key in state)
    for first, last in [(0, streams + 1), (-1, 1), (1, 1)]:
        with pytest.raises(CheckpointError, match="has streams"):
            checkpoint.stream_tensors(first, last)


def test_commit_refuses_what_is_not_whole(root: str) -> None:
    def part(name: str, rank: int, first: int, last: int, **texts: str) -> None:
        ck.write_rank_files(
            join(root, name), rank, {streams_name(first, last): {"s": torch.zeros(last - first)}}, texts
        )

    def refused(name: str, match: str, world: int = 2) -> None:
        with pytest.raises(CheckpointError, match=match):
            ck.commit(join(root, name), world, {"step": 1, "streams": 4}, patience_s=0)
        assert f"{name}/{MANIFEST}" not in contents(root)

    part("a", 0, 0, 2)
    refused("a", "part-00001.json: the file is missing")
    part("b", 0, 0, 2)
    part("b", 1, 3, 4)
    refused("b", "streams-00003-00003.*does not begin at stream 2")
    part("c", 0, 0, 2)
    part("c", 1, 2, 3)
    refused("c", "streams 0..2, but the run has 4")
    part("d", 0, 0, 2, config="a")
    part("d", 1, 2, 4, config="b")
    refused("d", "config was written by another rank")
    part("e", 0, 0, 4)
    cut = join(root, "e", streams_name(0, 4))
    write_bytes(cut, read_bytes(cut)[:20])
    refused("e", "truncated", world=1)


def test_commit_waits_for_a_slow_file_system(root: str) -> None:
    folder = join(root, "x")
    ck.write_rank_files(folder, 0, {streams_name(0, 1): {"s": torch.zeros(1)}}, {})

    def late() -> None:
        time.sleep(0.3)
        ck.write_rank_files(folder, 1, {streams_name(1, 2): {"s": torch.zeros(1)}}, {})

    thread = threading.Thread(target=late)
    thread.start()
    assert ck.commit(folder, 2, {"step": 1, "streams": 2}, patience_s=20).streams == 2
    thread.join()


def damage(place: str, how: str, seed: int) -> None:
    data = bytearray(read_bytes(place))
    if how == "missing":
        remove(place)
        return
    if how == "truncated":
        data = data[: len(data) // 2]
    elif how == "empty":
        data = bytearray()
    elif how == "longer":
        data += b"\0"
    else:
        position = random.Random(seed).randrange(len(data) * 8)
        data[position // 8] ^= 1 << position % 8
    write_bytes(place, bytes(data))


@pytest.mark.parametrize("how", ["missing", "truncated", "empty", "longer", "flipped"])
def test_damage_of_any_file_is_found_named_and_walked_past(
    root: str, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    whole = join(root, "whole")
    save(whole, 10)
    names = [*save(whole, 20).files, MANIFEST]
    for seed, name in enumerate(names * (5 if how == "flipped" else 1)):
        copy = join(root, f"copy{seed}")
        copy_tree(whole, copy)
        newest = join(copy, directory_name(20, 1))
        damage(join(newest, name), how, seed)
        with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
            open_checkpoint(newest)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            found = newest_checkpoint(copy)
        assert found is not None and found.step == 10
        assert name in caplog.text and base_name(newest) in caplog.text


def test_the_search_for_the_newest(root: str) -> None:
    assert newest_checkpoint(join(root, "nothing")) is None
    unfinished = join(root, directory_name(5, 1))
    ck.write_rank_files(unfinished, 0, {"model.safetensors": {"w": torch.zeros(2)}}, {})
    write_bytes(join(root, "step-1-attempt-x", "file"), b"")
    write_bytes(join(root, "checkpoint_manager_snapshot.json"), b"{}")
    assert newest_checkpoint(root) is None, "an unfinished directory is not a checkpoint"
    save(root, 30, attempt=1)
    save(root, 20, attempt=2)
    found = newest_checkpoint(root)
    assert found is not None and found.step == 20, "attempt 2 came after attempt 1, although it had walked back"
    for step, attempt in [(30, 1), (20, 2)]:
        # what this machine has fetched from a store is not fetched again to compare its hashes
        how = "longer" if is_uri(root) else "flipped"
        damage(join(root, directory_name(step, attempt), "model.safetensors"), how, 1)
    with pytest.raises(CheckpointError, match="no checkpoint is whole.*model.safetensors"):
        newest_checkpoint(root)


@contextlib.contextmanager
def small_disk(limit: int) -> Iterator[None]:
    """The kernel refuses to let files grow beyond `limit` bytes, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_failed_write_leaves_no_debris_and_no_harm(root: str) -> None:
    save(root, 10)
    before = contents(root)
    writer = ck.CheckpointWriter(0)
    assert writer.state == "idle" and writer.wait() == "idle"
    big = {"a.safetensors": {"x": torch.ones(10)}, "b.safetensors": {"x": torch.ones(1 << 20)}}
    directory = join(root, directory_name(20, 1))
    with small_disk(1 << 20):
        writer.start(directory, big, {"config.yaml": "x"})
        assert writer.wait() == "failed"
    assert isinstance(writer.error, OSError) and writer.error.strerror == os.strerror(errno.EFBIG)
    assert contents(root) == before and names_in(root) == [directory_name(10, 1)]
    writer.reset()
    if not is_uri(root):
        write_bytes(join(root, "file"), b"in the way")
        writer.start(join(root, "file", directory_name(20, 1)), big, {})
        assert writer.wait() == "failed" and isinstance(writer.error, OSError)
        remove(join(root, "file"))
    writer.reset()
    assert writer.state == "idle" and writer.error is None
    writer.start(join(root, directory_name(10, 1)), big, {})
    assert writer.wait() == "failed" and isinstance(writer.error, FileExistsError)
    assert contents(root) == before, "a finished checkpoint is never written again"
    for name in ["../x", "a/b", "manifest.json", "part-00000.json", "", ".hidden", "x\n"]:
        with pytest.raises(ValueError, match="not a usable file name"):
            ck.write_rank_files(join(root, "y"), 0, {}, {name: "x"})
    writer.start(directory, big, {})
    assert writer.wait() == "written"


def test_one_ranks_failure_leaves_the_files_of_the_others(root: str) -> None:
    folder = join(root, "x")
    ck.write_rank_files(folder, 1, {"streams-00001-00001.safetensors": {"s": torch.zeros(1)}}, {})
    with small_disk(1 << 12), pytest.raises(OSError):
        ck.write_rank_files(folder, 0, {"model.safetensors": {"x": torch.ones(1 << 16)}}, {})
    assert sorted(contents(folder)) == ["part-00001.json", "streams-00001-00001.safetensors"]
    ck.discard(folder)
    ck.discard(folder)
    assert not contents(root) and not names_in(root)


def test_training_may_go_on_while_the_writer_writes(root: str) -> None:
    weights = torch.zeros(1 << 20)
    writer = ck.CheckpointWriter(0)
    folder = join(root, "x")
    writer.start(folder, {"model.safetensors": {"w": weights}, "streams-00000-00000.safetensors": {}}, {})
    weights.fill_(9)
    if writer.state == "writing":
        with pytest.raises(RuntimeError, match="wait"):
            writer.start(join(root, "y"), {}, {})
    assert writer.wait() == "written"
    checkpoint = ck.commit(folder, 1, {"step": 1, "streams": 1}, patience_s=0)
    assert float(checkpoint.tensors("model.safetensors")["w"].abs().max()) == 0


def test_tensors_that_share_memory_and_who_may_read(tmp_path: Path) -> None:
    weights = torch.arange(6.0)
    group = {"all": weights, "same": weights, "part": weights[2:4]}
    ck.write_rank_files(
        tmp_path, 0, {"model.safetensors": group, "streams-00000-00000.safetensors": {}}, {"a.txt": "x"}
    )
    read = ck.commit(tmp_path, 1, {"step": 1, "streams": 1}, patience_s=0).tensors("model.safetensors")
    assert all(torch.equal(read[name], tensor) for name, tensor in group.items())
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1, "all files have the mode that new files have here"


KILLED = """
import sys, torch
from elmo_ray.checkpoints import write as ck
from elmo_ray.checkpoints.manifest import directory_name
from elmo_ray.checkpoints.read import newest_checkpoint
from elmo_ray.storage import join
root, attempt = sys.argv[1], int(sys.argv[2])
found = newest_checkpoint(root)
step = 0 if found is None else found.step
if found is not None:
    assert float(found.tensors("model.safetensors")["w"].mean()) == step
print("ready", step, flush=True)
while True:
    step += 1
    folder = join(root, directory_name(step, attempt))
    ck.write_rank_files(folder, 0, {"model.safetensors": {"w": torch.full((1 << 18,), float(step))},
                              "streams-00000-00000.safetensors": {"s": torch.zeros(1)}}, {"config.yaml": "x"})
    ck.commit(folder, 1, {"step": step, "streams": 1}, patience_s=0)
    ck.prune(root, 2)
    print("saved", step, flush=True)
"""


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    yield from s3_server()


@pytest.mark.parametrize("where", ["folder", pytest.param("s3", marks=pytest.mark.slow)])
def test_kill_9_while_saving(where: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    root = str(tmp_path) if where == "folder" else f"{request.getfixturevalue('bucket')}/killed"
    source = random.Random(3)
    steps = []
    for attempt in range(1, 4):
        command = [sys.executable, "-c", KILLED, root, str(attempt)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("ready"), "the writer could not resume"
        steps.append(int(line.split()[1]))
        process.stdout.readline()
        saved = int(process.stdout.readline().split()[1])
        time.sleep(source.random() * 0.2)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    found = newest_checkpoint(root)
    assert found is not None
    assert steps == sorted(steps) and found.step >= saved > steps[-1] > 0
    assert len([name for name in names_in(root) if MANIFEST in contents(join(root, name))]) <= 3


def test_prune(root: str) -> None:
    assert ck.prune(join(root, "nothing"), 3) == []
    names = {step: directory_name(step, 1) for step in (10, 20, 30, 35, 40, 50)}
    for step in (10, 20, 30, 40):
        save(root, step)
    write_bytes(join(root, "other", "file"), b"")
    for step in (35, 50):  # left over, and being written
        ck.write_rank_files(join(root, names[step]), 0, {"model.safetensors": {"w": torch.zeros(2)}}, {})
    remove(join(root, names[30], "model.safetensors"))
    removed = ck.prune(root, 2, [join(root, names[10])])
    assert {base_name(place) for place in removed} == {names[35], names[30]}
    assert set(names_in(root)) == {"other", *(names[step] for step in (10, 20, 40, 50))}
    ck.prune(root, 1)
    assert set(names_in(root)) == {"other", names[40], names[50]}


def test_damaged_checkpoints_do_not_crowd_out_the_last_good_one(root: str) -> None:
    for step in (10, 20, 30, 40):
        save(root, step)
    for step in (30, 40):  # as long as before: only their hashes tell
        path = join(root, directory_name(step, 1), "model.safetensors")
        data = bytearray(read_bytes(path))
        data[-1] ^= 1
        write_bytes(path, bytes(data))
    damaged: list[Place] = []
    newest = newest_checkpoint(root, damaged=damaged)
    assert newest is not None and newest.step == 20
    assert [base_name(place) for place in damaged] == [directory_name(step, 1) for step in (40, 30)]
    save(root, 50)
    ck.prune(root, 2, damaged=damaged)
    assert names_in(root) == [directory_name(step, 1) for step in (20, 50)]


def test_storage_that_does_not_answer_is_no_damage(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was away for a moment must cost no checkpoint: neither skipped nor pruned."""
    if not is_uri(root):
        pytest.skip("a file of a folder that cannot be read counts as damaged")
    for step in (10, 20):
        save(root, step)
    before, listing = contents(root), storage.listing

    def away(place: Place) -> dict[str, storage.Status]:
        raise OSError(errno.EIO, "no route to host", str(place))

    monkeypatch.setattr(storage, "listing", away)
    for work in (lambda: newest_checkpoint(root), lambda: ck.prune(root, 1)):
        with pytest.raises(CheckpointError, match="cannot be read: no route to host"):
            work()
    monkeypatch.setattr(storage, "listing", listing)
    assert contents(root) == before


def test_the_best_is_an_independent_copy(root: str) -> None:
    best = join(root, "best")
    first, second = save(root, 10), save(root, 20)
    assert ck.copy_best(first, best).step == 10
    assert ck.copy_best(second, best).step == 20
    assert [name for name in names_in(root) if "step" not in name] == ["best"]
    damage(join(first.place, "model.safetensors"), "flipped", 0)
    if is_uri(root):  # copied within the store: only who fetches it sees the damage
        assert open_checkpoint(best).step == 20
        remove(join(best, MANIFEST))  # killed while it was being replaced
        with pytest.raises(CheckpointError, match="no such checkpoint"):
            open_checkpoint(best)
        assert open_checkpoint(ck.copy_best(second, best).place).step == 20
        return
    with pytest.raises(CheckpointError, match="model.safetensors"):
        ck.copy_best(first, best)
    with small_disk(64), pytest.raises(OSError):
        ck.copy_best(second, best)
    damage(join(second.place, "model.safetensors"), "flipped", 0)
    assert open_checkpoint(best).step == 20
    os.replace(best, join(root, "best.previous"))  # killed between the two renames
    assert open_checkpoint(best).step == 20


# ---------------------------------------------------------------- strangers


def rewritten(folder: str, change: dict[str, object]) -> None:
    """The manifest with some fields changed and its own hash made right again where possible."""
    manifest = json.loads(read_bytes(join(folder, MANIFEST))) | change
    manifest.pop("manifest_sha256")
    text = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    manifest["manifest_sha256"] = hashlib.sha256(text.encode()).hexdigest()
    write_bytes(join(folder, MANIFEST), json.dumps(manifest).encode())


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
def test_absurd_manifests(root: str, change: dict[str, object], message: str) -> None:
    folder = save(root, 1).place
    rewritten(folder, change)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder)


def test_manifests_that_try_the_parser(root: str) -> None:
    folder = save(root, 1).place
    bad = [b"", b"null", b"[]", b"\xff\xfe", b"[" * 200_000, b'{"format":1,"a":' + b"[" * 200_000, b'{"step": NaN}']
    bad += [b'{"format": 1, "step": ' + b"9" * 10_000 + b"}", b" " * (17 << 20), b'{"format": 1e999}']
    for data in bad:
        write_bytes(join(folder, MANIFEST), data)
        with pytest.raises(CheckpointError, match="manifest.json"):
            open_checkpoint(folder)
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        open_checkpoint(join(root, "nowhere"))
    if is_uri(root):
        return
    path = Path(folder, MANIFEST)
    for make in (lambda path: os.mkfifo(path), lambda path: path.mkdir(), lambda path: path.symlink_to(path)):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        make(path)
        with pytest.raises(CheckpointError, match="manifest.json"):
            open_checkpoint(folder)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
KEYS = ["format", "step", "streams", "world", "files", "manifest_sha256", "versions", "other"]


@pytest.fixture(scope="module")
def stranger(kind: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(place_of(kind, tmp_path_factory.mktemp("stranger")), 1).place


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from(KEYS), json_values, max_size=3), st.booleans(), st.integers(0, 40))
def test_fuzzed_manifests_raise_only_our_error(
    stranger: str, changes: dict[str, object], rehash: bool, cut: int
) -> None:
    place = join(stranger, MANIFEST)
    original = read_bytes(place)
    try:
        if rehash:
            with contextlib.suppress(ValueError):
                rewritten(stranger, changes)
        else:
            text = json.dumps(json.loads(original) | changes)
            write_bytes(place, text.encode()[: -cut or None])
        with contextlib.suppress(CheckpointError):
            checkpoint = open_checkpoint(stranger)
            for name in checkpoint.files:
                checkpoint.text(name)
    finally:
        write_bytes(place, original)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    head=st.none() | st.integers(0, 2**64 - 1),
    header=st.binary(max_size=40) | json_values.map(lambda value: json.dumps(value).encode()),
    shape=st.lists(st.integers(0, 2**40), max_size=3),
)
def test_garbage_with_a_right_hash_is_not_read_as_tensors(
    kind: str, tmp_path_factory: pytest.TempPathFactory, head: int | None, header: bytes, shape: list[int]
) -> None:
    folder = place_of(kind, tmp_path_factory.mktemp("garbage"))
    if len(header) % 2:
        header = json.dumps({"x": {"dtype": "F32", "shape": shape, "data_offsets": [0, 8]}}).encode()
    data = (len(header) if head is None else head).to_bytes(8, "little") + header + b"\0" * 8
    files = {}
    for name in ("model.safetensors", "streams-00000-00000.safetensors"):
        write_bytes(join(folder, name), data)
        files[name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    manifest = finished_manifest({"format": 1, "step": 1, "world": 1, "streams": 1, "files": files}, folder)
    write_bytes(join(folder, MANIFEST), json.dumps(manifest).encode())
    checkpoint = open_checkpoint(folder)
    with contextlib.suppress(CheckpointError):
        assert sum(tensor.numel() for tensor in checkpoint.tensors("model.safetensors").values()) <= 2
    with contextlib.suppress(CheckpointError):
        assert all(len(tensor) == 1 for tensor in checkpoint.stream_tensors(0, 1).values())
