"""Whole checkpoints of strangers, damaged at random or made to look right: only our own errors come out.

In a folder and in an object store (fsspec's memory://), by the same tests.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.fuzzing import (
    DAMAGES,
    absurd_numbers,
    check_message,
    damaged,
    fuzz,
    hostile_texts,
    paths_of,
    plain_values,
    replaced,
    scalars,
)
from helpers.places import contents, copy_tree, place_of, remove
from helpers.saved_models import random_model
from helpers.tiny_runs import tiny_config
from hypothesis import given
from hypothesis import strategies as st

from elmo_ray.checkpoints.identity import identity
from elmo_ray.checkpoints.manifest import MANIFEST, MODEL_FILE, OPTIMIZER_FILE, directory_name, streams_name
from elmo_ray.checkpoints.read import Checkpoint, newest_checkpoint, open_checkpoint
from elmo_ray.checkpoints.source import open_source
from elmo_ray.checkpoints.write import commit, discard, write_rank_files
from elmo_ray.data.streams import StreamCursors
from elmo_ray.data.vocabulary import SPECIAL_WORDS
from elmo_ray.errors import CheckpointError, ConfigError, ElmoRayError
from elmo_ray.storage import is_uri, join, read_bytes, write_bytes
from elmo_ray.training.snapshot import PROGRESS_FILE, Progress, Snapshot, load_model
from elmo_ray.training.step import TrainStep

pytestmark = pytest.mark.slow

WORDS = [*SPECIAL_WORDS, "the", "cat", "sees"]
VOCABULARY = "".join(word + "\n" for word in WORDS)
CONFIGS = {
    "adagrad": tiny_config(softmax__negatives=3),
    "adamw": tiny_config(softmax__negatives=3, optim__name="adamw"),
}
STREAMS = CONFIGS["adagrad"].data.streams
STEP = 7
Tensors = dict[str, dict[str, torch.Tensor]]
NUMBERED = itertools.count()
STREAM_FILE = streams_name(0, STREAMS)


def step_of(name: str) -> TrainStep:
    config = CONFIGS[name]
    return TrainStep(config, random_model(config, len(WORDS)).requires_grad_(True), STREAMS)


def parts_of(name: str) -> tuple[Tensors, dict[str, str]]:
    """What a run's checkpoint of step 7 has, without training: tensors and texts by file."""
    step, config = step_of(name), CONFIGS[name]
    cursors = StreamCursors.start(STREAMS)
    cursors.epoch[:], cursors.offset[:], cursors.audit_positions[:] = 2, 5, 27
    progress = Progress(step=STEP, positions=108, best_perplexity=9.5, best_step=5, last_valid={"perplexity": None})
    snapshot = Snapshot(progress, cursors, torch.zeros(step.model.directions + 1, dtype=torch.float64))
    tensors: Tensors = {
        file: dict(group)
        for file, group in (snapshot.model_tensors(step) | snapshot.stream_tensors(step.state, range(STREAMS))).items()
    }
    if name == "adamw":  # its slots are there after a first step
        for key, parameter in step.model.dense_parameters().items():
            slots = {"exp_avg": parameter, "exp_avg_sq": parameter.square(), "step": torch.tensor(7.0)}
            tensors[OPTIMIZER_FILE].update({f"{kind}.{key}": value.detach() for kind, value in slots.items()})
    texts = {"config.yaml": config.to_yaml(), "vocab.txt": VOCABULARY, PROGRESS_FILE: json.dumps(progress.to_dict())}
    return tensors, texts


PARTS = {name: parts_of(name) for name in CONFIGS}


def identity_of(name: str) -> dict[str, Any]:
    return json.loads(json.dumps(identity(CONFIGS[name], "corpus", "vocabulary")))


def save(folder: str, name: str, tensors: Tensors, texts: dict[str, str], **fields: Any) -> str:
    """A checkpoint whose hashes are right, whatever is in it."""
    discard(folder)
    write_rank_files(folder, 0, tensors, texts)
    commit(folder, 1, {"step": STEP, "streams": STREAMS, "identity": identity_of(name), **fields}, patience_s=0)
    return folder


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Iterator[None]:
    """Thousands of warnings on skipped checkpoints help nobody."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture(scope="module", params=["folder", pytest.param("store", marks=pytest.mark.slow)])
def root(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("tmp")))
        yield place_of(request.param, tmp_path_factory.mktemp("strangers"))


@pytest.fixture(scope="module")
def whole(root: str) -> str:
    return save(join(root, "whole"), "adagrad", *PARTS["adagrad"])


@pytest.fixture(scope="module")
def steps() -> dict[str, TrainStep]:
    return {name: step_of(name) for name in CONFIGS}


def outcomes(folder: str, steps: dict[str, TrainStep], name: str = "adagrad") -> Iterator[ElmoRayError | None]:
    """Everything that reads a checkpoint, on this one: the error of each, or None."""

    def load() -> None:
        snapshot = Snapshot.load(open_checkpoint(folder), identity_of(name), steps[name], range(STREAMS))
        json.dumps(snapshot.progress.to_dict(), allow_nan=False)
        assert (snapshot.cursors.epoch >= 0).all() and (snapshot.cursors.offset >= 0).all()

    def open_as_run() -> None:
        newest = newest_checkpoint(os.path.dirname(folder))
        assert newest is None or newest.place == folder

    for read in (lambda: open_source(folder), lambda: open_source(folder, verify=False), load, open_as_run):
        try:
            read()
        except ElmoRayError as error:
            check_message(error, lines=None if isinstance(error, ConfigError) else 1)
            yield error
        else:
            yield None


def test_a_whole_one_is_taken_by_all_readers(root: str, steps: dict[str, TrainStep]) -> None:
    for name, parts in PARTS.items():
        assert (
            list(outcomes(save(join(root, "good", directory_name(STEP, 1)), name, *parts), steps, name)) == [None] * 4
        )


# ---------------------------------------------------------------- damage that hashes find


@fuzz(60)
@given(st.data())
def test_damaged_files(root: str, whole: str, steps: dict[str, TrainStep], data: st.DataObject) -> None:
    # a place of its own: what a machine has fetched from a store it does not fetch again
    folder = join(root, f"damaged-{next(NUMBERED)}", directory_name(STEP, 1))
    copy_tree(whole, folder)
    names = sorted(contents(whole))
    name = data.draw(st.sampled_from([n for n in names if not n.startswith("part-")]))
    more = [] if is_uri(root) else ["folder", "link", "pipe"]
    how = data.draw(st.sampled_from([*DAMAGES, "gone", "swapped", *more]))
    place, before = join(folder, name), read_bytes(join(whole, name))
    if how in DAMAGES:
        write_bytes(place, damaged(before, how, data.draw(st.integers(0, 2**32))))
    elif how == "swapped":
        write_bytes(place, read_bytes(join(folder, data.draw(st.sampled_from(names)))))
    else:
        remove(place)
        path = Path(place)
        make: dict[str, Callable[[], Any]] = {
            "folder": path.mkdir, "link": lambda: path.symlink_to("/dev/zero"), "pipe": lambda: os.mkfifo(path),
        }  # fmt: skip
        make.get(how, lambda: None)()
    unchanged = how in (*DAMAGES, "swapped") and read_bytes(place) == before
    found = list(outcomes(folder, steps))
    # A model is read from a folder without the files that only training needs.
    needed = is_uri(root) or name in ("config.yaml", "vocab.txt", MODEL_FILE)
    assert unchanged or name == MANIFEST or ((found[0] or not needed) and found[2] and found[3])


# ---------------------------------------------------------------- right hashes, absurd values


def manifest_with(folder: str, whole: str, change: Callable[[dict[str, Any]], Any]) -> str:
    """A copy with a changed manifest whose own hash is right."""
    discard(folder)
    copy_tree(whole, folder)
    manifest = change(json.loads(read_bytes(join(whole, MANIFEST))))
    manifest.pop("manifest_sha256")
    text = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    manifest["manifest_sha256"] = hashlib.sha256(text.encode()).hexdigest()
    write_bytes(join(folder, MANIFEST), json.dumps(manifest).encode())
    return folder


MANIFEST_PLACES: list[tuple[Any, ...]] = [("step",), ("streams",), ("world",), ("format",), ("files",), ("identity",)]
MANIFEST_PLACES += [("identity", key) for key in ("model.lstm.dim", "data.streams", "x")] + [("device",), ("extra",)]
MANIFEST_PLACES += [("identity", "a\r\u2028b")]
MANIFEST_PLACES += [("files", MODEL_FILE), ("files", MODEL_FILE, "size"), ("files", "../x"), ("files", "config.yaml")]


@fuzz(60)
@given(place=st.sampled_from(MANIFEST_PLACES), value=plain_values | absurd_numbers | st.just(...))
def test_absurd_manifests(
    root: str, whole: str, steps: dict[str, TrainStep], place: tuple[Any, ...], value: Any
) -> None:
    def change(manifest: dict[str, Any]) -> Any:
        known = value is not ... or place in paths_of(manifest)
        return replaced(manifest, place, value) if known else manifest

    list(outcomes(manifest_with(join(root, "manifests", directory_name(STEP, 1)), whole, change), steps))


PROGRESS_PLACES = [(key,) for key in Progress().to_dict()] + [("last_valid", "perplexity"), ("more",)]


@fuzz(60)
@given(st.sampled_from(PROGRESS_PLACES), scalars | absurd_numbers | plain_values | st.just("1e999"))
def test_absurd_progress(root: str, steps: dict[str, TrainStep], place: tuple[Any, ...], value: Any) -> None:
    tensors, texts = PARTS["adagrad"]
    text = json.dumps(replaced(json.loads(texts[PROGRESS_FILE]), place, value)).replace('"1e999"', "1e999")
    list(
        outcomes(
            save(join(root, "p", directory_name(STEP, 1)), "adagrad", tensors, {**texts, PROGRESS_FILE: text}), steps
        )
    )


HOSTILE_CONFIGS = [
    "", "null", "[]", "run", "!!python/object/apply:os.system [touch hacked]", "a: &a [*a]",
    "model: {lstm: {dim: 1e9}}",
    "model: {lstm: {dim: 65536, projection_dim: 65536, n_layers: 100}}", "model: {char_cnn: {filters: [[1, 65536]]}}",
    "softmax: {kind: full}", "model: {input: words}", "{model: {input: words}, softmax: {tied: true}}",
    "optim: {lr: !!python/name:os.system }", "? [a]\n: b", "\ufeffrun: {seed: 1}",
]  # fmt: skip


@fuzz(60)
@given(
    st.sampled_from(["config.yaml", "vocab.txt"]),
    st.sampled_from(HOSTILE_CONFIGS)
    | st.text(max_size=30)
    | plain_values.map(lambda value: json.dumps(value))
    | st.builds(
        lambda kind, seed: damaged(PARTS["adagrad"][1]["config.yaml"].encode(), kind, seed).decode("utf-8", "replace"),
        st.sampled_from(DAMAGES),
        st.integers(0, 2**32),
    )
    | st.lists(st.sampled_from([*WORDS, "", "!!!MAXTERMID", "\r", "\0", "\ufeff<S>", "x" * 99])).map("\n".join),
)
def test_hostile_texts(root: str, steps: dict[str, TrainStep], file: str, text: str) -> None:
    tensors, texts = PARTS["adagrad"]
    text = text.encode("utf-8", "replace").decode()
    list(outcomes(save(join(root, "t", directory_name(STEP, 1)), "adagrad", tensors, {**texts, file: text}), steps))


def remade(tensor: torch.Tensor, how: str, number: float) -> torch.Tensor:
    """Another tensor than the reader expects, or one with other numbers."""
    if how == "type":
        kinds = [torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int8, torch.uint8, torch.bool]
        return tensor.to(kinds[int(abs(number)) % len(kinds)] if abs(number) < 1e9 else torch.float16)
    if how == "number":
        whole = tensor.dtype in (torch.int64, torch.int32)
        return torch.full_like(tensor, max(-(2**63), min(2**63 - 1, int(number))) if whole else number)
    shapes = {
        "scalar": tensor.new_zeros(()), "empty": tensor[:0], "one": tensor.reshape(-1)[:1], "flat": tensor.reshape(-1),
        "longer": torch.cat([tensor.reshape(-1)] * 2), "deeper": tensor[None],
        "turned": tensor.movedim(0, -1).contiguous(),
        "row": tensor[:1], "none wide": tensor.new_zeros(*tensor.shape, 0),
    }  # fmt: skip
    return shapes[how]


HOW = ["type", "number", "number", "scalar", "empty", "one", "flat", "longer", "deeper", "turned", "row", "none wide"]
NUMBERS = [0.0, 1.0, 2.0, 3.0, 5.0, 6.0, -1.0, 4.0, 28.0, 2.0**31, 2.0**62, 2.0**63, -(2.0**63), 1e38, 1e308]
NUMBERS += [float("nan"), float("inf")]


@fuzz(110)
@given(st.data())
def test_other_tensors(root: str, steps: dict[str, TrainStep], data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(CONFIGS)))
    tensors, texts = PARTS[name]
    tensors = {file: dict(group) for file, group in tensors.items()}
    file = data.draw(st.sampled_from([*tensors, STREAM_FILE]))
    for _ in range(data.draw(st.integers(1, 2))):
        key = data.draw(st.sampled_from(sorted(PARTS[name][0][file])))
        how = data.draw(st.sampled_from([*HOW, "gone", "more", "renamed"]))
        tensor = PARTS[name][0][file][key]
        number = data.draw(st.sampled_from(NUMBERS))
        if how == "gone":
            tensors[file].pop(key, None)
        elif how in ("more", "renamed"):
            if how == "renamed":
                tensors[file].pop(key, None)
            tensors[file][data.draw(hostile_texts.filter(lambda text: "\ud800" not in text))] = tensor
        elif tensor.ndim or how in ("type", "number"):
            if number != number and tensor.dtype == torch.int64:
                number = -1.0
            if number in (float("inf"),) and tensor.dtype == torch.int64:
                number = 2.0**62
            if abs(number) > 3e38 and tensor.dtype == torch.float32 and number != float("inf"):
                number = 3e38
            tensors[file][key] = remade(tensor, how, number)
    folder = save(join(root, "o", directory_name(STEP, 1)), name, tensors, texts)
    errors = list(outcomes(folder, steps, name))
    if all(error is None for error in errors):
        read = {kind: open_checkpoint(folder).tensors(kind) for kind in (MODEL_FILE, OPTIMIZER_FILE)}
        for kind, group in read.items():
            assert {k: t.shape for k, t in group.items()} == {k: t.shape for k, t in PARTS[name][0][kind].items()}


CURSORS: dict[str, tuple[dict[str, list[int]], bool]] = {
    "at the start": ({"epoch": [0], "offset": [0], "audit_positions": [0]}, True),
    "in the first share": ({"epoch": [0], "offset": [9], "audit_positions": [9]}, True),
    "at a share's end": ({"epoch": [3], "offset": [0], "audit_positions": [33]}, True),
    "before the text": ({"epoch": [2], "offset": [-1], "audit_positions": [27]}, False),
    "before the first epoch": ({"epoch": [-1], "offset": [5], "audit_positions": [27]}, False),
    "behind its share": ({"epoch": [1], "offset": [11], "audit_positions": [22]}, False),
    "farther than it has read": ({"epoch": [0], "offset": [10**15], "audit_positions": [27]}, False),
    "no whole share": ({"epoch": [2], "offset": [4], "audit_positions": [27]}, False),
    "out of numbers": ({"epoch": [2**62], "offset": [0], "audit_positions": [2**62]}, False),
    "negative audit": ({"audit_hash": [-1]}, False),
}


@pytest.mark.parametrize("name", CURSORS)
def test_cursors_that_no_reading_could_have_left(root: str, steps: dict[str, TrainStep], name: str) -> None:
    change, good = CURSORS[name]
    tensors, texts = PARTS["adagrad"]
    rows = dict(tensors[STREAM_FILE])
    for key, (value,) in change.items():
        rows[key] = rows[key].clone()
        rows[key][-1] = value
    folder = save(join(root, "c", directory_name(STEP, 1)), "adagrad", {**tensors, STREAM_FILE: rows}, texts)
    error = list(outcomes(folder, steps))[2]
    assert (error is None) == good and (good or isinstance(error, CheckpointError)), error


def test_a_stranger_s_config_runs_no_code(root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tensors, texts = PARTS["adagrad"]
    for text in ("!!python/object/apply:os.system [touch hacked]", "run: !!python/object/new:os.mkdir [hacked]"):
        folder = save(join(root, "code", directory_name(STEP, 1)), "adagrad", tensors, {**texts, "config.yaml": text})
        with pytest.raises(CheckpointError, match=r"config.yaml line 1.*python/object"):
            open_source(folder)
    assert not list(tmp_path.iterdir())


def test_weights_alone_are_checked_too(root: str, steps: dict[str, TrainStep]) -> None:
    tensors, texts = PARTS["adagrad"]
    model = {key: tensor[None] for key, tensor in tensors[MODEL_FILE].items()}
    folder = save(join(root, "m", directory_name(STEP, 1)), "adagrad", {**tensors, MODEL_FILE: model}, texts)
    checkpoint: Checkpoint = open_checkpoint(folder)
    with pytest.raises(CheckpointError, match=r"model.safetensors: .* has shape"):
        load_model(checkpoint, steps["adagrad"].model.state_dict())
