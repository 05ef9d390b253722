"""Strangers' options and weights: whatever they hold, only FormatError comes out, and no memory is taken for it."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from helpers.fuzzing import (
    DAMAGES,
    absurd_numbers,
    check_message,
    damaged,
    fuzz,
    hostile_texts,
    nested,
    paths_of,
    plain_values,
    replaced,
    scalars,
)
from helpers.saved_models import random_model
from hypothesis import given
from hypothesis import strategies as st

from elmo_ray.checkpoints.bilm_tf.hdf5 import read_weights, write_weights
from elmo_ray.checkpoints.bilm_tf.options import from_options, read_options, to_options
from elmo_ray.config import PretrainConfig
from elmo_ray.errors import FormatError
from elmo_ray.model.bilm import BiLM

pytestmark = pytest.mark.slow

TESTS = Path(__file__).parents[1]
CNN = {"filters": [[1, 4], [3, 8]], "embedding_dim": 5, "n_highway": 2}
CONFIG = PretrainConfig.from_dict({"model": {"char_cnn": CNN, "lstm": {"dim": 12, "projection_dim": 6}}})
WORDS = PretrainConfig.from_dict({"model": {"input": "words", "lstm": {"dim": 12, "projection_dim": 6}}})
OPTIONS = to_options(CONFIG.model, CONFIG.softmax, 9)
PLACES = paths_of(OPTIONS)
THEIRS = [("share_embedding_softmax",), ("lstm", "extra"), ("char_cnn", "embedding", "extra"), ("",)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whole weights of a model of characters and of one of words."""
    made = tmp_path_factory.mktemp("weights")
    write_weights(made / "characters.hdf5", random_model(CONFIG, 9))
    write_weights(made / "words.hdf5", random_model(WORDS, 9))
    return made


def take(path: Path) -> bool:
    """Whether the file is accepted as options; then a model can be made of them."""
    try:
        options = read_options(path)
        made = [from_options(options, str(path), published) for published in (True, False)]
    except FormatError as error:
        check_message(error)
        assert str(path) in str(error)
        return False
    with torch.device("meta"):
        for model, softmax in made:
            BiLM(model, softmax, 9)
    return True


@fuzz(130)
@given(
    st.binary(max_size=80)
    | plain_values.map(lambda value: json.dumps(value).encode())
    | st.builds(damaged, st.just(json.dumps(OPTIONS).encode()), st.sampled_from(DAMAGES), st.integers(0, 2**32))
)
def test_any_bytes_as_options(folder: Path, data: bytes) -> None:
    (folder / "options.json").write_bytes(data)
    take(folder / "options.json")


@fuzz(130)
@given(
    st.lists(
        st.tuples(st.sampled_from(PLACES + THEIRS), st.just(...) | absurd_numbers | scalars | plain_values),
        min_size=1,
        max_size=2,
    )
)
def test_good_options_with_absurd_values(folder: Path, changes: list[tuple[tuple[Any, ...], Any]]) -> None:
    options: Any = OPTIONS
    for place, value in changes:
        try:
            options = replaced(options, place, value)
        except (KeyError, IndexError, TypeError, ValueError):
            continue  # what the first change took away
    (folder / "options.json").write_text(json.dumps(options))
    take(folder / "options.json")


@fuzz(50)
@given(st.sampled_from(PLACES), absurd_numbers | hostile_texts)
def test_keys_given_twice(folder: Path, place: tuple[Any, ...], value: Any) -> None:
    """JSON's last word holds, as in bilm-tf's reader."""
    text, other = json.dumps(OPTIONS), json.dumps({str(place[0]): value})
    (folder / "options.json").write_text(text[:-1] + ", " + other[1:])
    take(folder / "options.json")


@pytest.mark.parametrize("text", [
    '{"lstm": ' + "[" * 500 + "]" * 500 + "}", json.dumps({"lstm": nested(300, True)}),
    '{"lstm": {"dim": ' + "9" * 9999 + "}}",
    " " * (2 << 20) + "{}", json.dumps({**OPTIONS, "x": "y" * (2 << 20)}), json.dumps({"lstm": {"dim": [[1]] * 9999}}),
], ids=["deep list", "deep object", "many digits", "blanks", "large", "long"])  # fmt: skip
def test_options_that_try_the_parser(tmp_path: Path, text: str) -> None:
    (tmp_path / "options.json").write_text(text)
    assert not take(tmp_path / "options.json")


def test_options_that_are_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder", "none"):
        assert not take(tmp_path / name)


# ---------------------------------------------------------------- weights: wrong in structure


def names_of(path: Path) -> list[str]:
    names: list[str] = []
    with h5py.File(path, "r") as file:
        file.visititems(lambda name, item: names.append(name))
    return names


def is_local(file: h5py.File, name: str) -> bool:
    """Whether a name leads to something without a link of an earlier change, which may lead nowhere."""
    parts = name.split("/")
    places = ["/".join(parts[: n + 1]) for n in range(len(parts))]
    return all(isinstance(file.get(place, getlink=True), h5py.HardLink) for place in places)


def again(file: h5py.File, name: str, **arguments: Any) -> None:
    del file[name]
    file.create_dataset(name, **arguments)


def shape_of(file: h5py.File, name: str) -> tuple[int, ...]:
    shape = getattr(file[name], "shape", None)
    return tuple(shape) if shape and file[name].size < 1 << 16 else (4, 4)  # a second change may write all of it


KINDS = ["f2", "f4", "f8", ">f4", "i4", "u8", "?", "c8", "S5", "V4", ("f4", (2,)), [("a", "f4"), ("b", "f4")]]
KINDS += [h5py.string_dtype(), h5py.vlen_dtype(np.float32), h5py.ref_dtype, h5py.enum_dtype({"A": 0, "B": 1})]
HUGE = [0, 1, 3, 2**16, 2**31, 2**33, 2**40, 2**60]


def retyped(file: h5py.File, name: str, draw: Any) -> None:
    again(file, name, shape=shape_of(file, name), dtype=draw(st.sampled_from(KINDS)))


def reshaped(file: h5py.File, name: str, draw: Any) -> None:
    shape = tuple(draw(st.lists(st.sampled_from(HUGE), min_size=1, max_size=3)))
    if np.prod([float(n) for n in shape]) < 2**60:
        chunks = None if 0 in shape else tuple(min(n, 64) for n in shape)
        again(file, name, shape=shape, dtype="f4", chunks=chunks)


def unwritten(file: h5py.File, name: str, draw: Any) -> None:
    """The right shape, of which nothing is in the file; or packed; or in chunks larger than itself."""
    shape = shape_of(file, name)
    how = draw(st.sampled_from(["chunks", "late", "gzip", "lzf", "shuffle", "large chunks"]))
    if how == "late":
        again(file, name, shape=shape, dtype="f4")
    elif how == "large chunks":
        size = draw(st.sampled_from([64, 1024, 1 << 14]))
        chunks = tuple(max(n, size if i == 0 else n) for i, n in enumerate(shape))
        again(file, name, shape=shape, maxshape=(None,) * len(shape), dtype="f4", chunks=chunks)
        file[name][...] = 1
    else:
        filters = {"compression": how} if how in ("gzip", "lzf") else {"shuffle": how == "shuffle"}
        again(file, name, shape=shape, dtype="f4", chunks=shape, **filters)
        if draw(st.booleans()):
            file[name][...] = 1


def linked(file: h5py.File, name: str, draw: Any) -> None:
    del file[name]
    other = draw(st.sampled_from(["/", "/char_embed", "/nothing", "/" + name, "/embedding"]))
    soft = [h5py.SoftLink(other), h5py.ExternalLink("characters.hdf5", other), h5py.ExternalLink("/etc/passwd", "/")]
    file[name] = draw(st.sampled_from(soft))


def twice(file: h5py.File, name: str, draw: Any) -> None:
    """Another name for something else in the file, the root and so a ring of groups among them."""
    other = draw(st.sampled_from(["/", "char_embed", "RNN_0", "CNN", "RNN_1/RNN"]))
    if other in file and not name.startswith(other):
        target = file[other]
        del file[name]
        file[name] = target


def other_kind(file: h5py.File, name: str, draw: Any) -> None:
    kind = draw(st.sampled_from(["group", "empty", "scalar", "type", "external", "virtual", "gone", "moved"]))
    shape = shape_of(file, name)
    if kind == "moved":
        file.move(name, "elsewhere")
        return
    del file[name]
    if kind == "group":
        file.create_group(name)
    elif kind == "empty":
        file[name] = h5py.Empty("f4")
    elif kind == "scalar":
        file[name] = draw(st.sampled_from([1.0, "text", b"bytes", 7]))
    elif kind == "type":
        file[name] = np.dtype("f4")
    elif kind == "external":
        file.create_dataset(name, shape=shape, dtype="f4", external=[("/dev/zero", 0, h5py.h5f.UNLIMITED)])
    elif kind == "virtual":
        layout = h5py.VirtualLayout(shape=shape, dtype="f4")
        layout[...] = h5py.VirtualSource("characters.hdf5", "char_embed", shape=shape)
        file.create_virtual_dataset(name, layout)


CHANGES = [retyped, reshaped, unwritten, linked, twice, other_kind]


@fuzz(100)
@given(st.data())
def test_weights_of_another_structure(folder: Path, data: st.DataObject) -> None:
    config, whole = data.draw(st.sampled_from([(CONFIG, "characters.hdf5"), (WORDS, "words.hdf5")]))
    path = folder / "changed.hdf5"
    path.write_bytes((folder / whole).read_bytes())
    with h5py.File(path, "r+") as file:
        for _ in range(data.draw(st.integers(1, 2))):
            name = data.draw(st.sampled_from(names_of(folder / whole)))
            if not is_local(file, name):
                continue
            change = data.draw(st.sampled_from(CHANGES))
            with contextlib.suppress(ValueError, KeyError, RuntimeError, TypeError):  # not every change can follow
                change(file, name, data.draw)
    try:
        model = read_weights(path, config.model)
    except FormatError as error:
        check_message(error)
        assert str(path) in str(error)
    else:
        assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


LARGE = {"dim": 65536, "projection_dim": 8192, "n_layers": 1}


@pytest.mark.parametrize("how", ["unwritten chunks", "unwritten", "gzip"])
def test_a_small_file_does_not_make_a_large_model(tmp_path: Path, how: str) -> None:
    """24 GB by shapes that are as the options say, in a file of some kilobytes."""
    config = PretrainConfig.from_dict({"model": {"input": "words", "lstm": LARGE}}).model
    arguments = {"unwritten chunks": {"chunks": True}, "unwritten": {}, "gzip": {"compression": "gzip"}}[how]
    with h5py.File(tmp_path / "w.hdf5", "w") as file:
        file.create_dataset("embedding", shape=(1 << 20, 8192), dtype="f4", **arguments)
        for d in (0, 1):
            for part, shape in {"W_0": (16384, 262144), "B": (262144,), "W_P_0": (65536, 8192)}.items():
                name = f"RNN_{d}/RNN/MultiRNNCell/Cell0/LSTMCell/{part}"
                file.create_dataset(name, shape=shape, dtype="f4", **arguments)
    with pytest.raises(FormatError, match="bytes in the file|is compressed") as caught:
        read_weights(tmp_path / "w.hdf5", config)
    check_message(caught.value)


def test_two_names_for_one_array_are_not_read_twice(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "w.hdf5"
    with h5py.File(folder / "characters.hdf5") as whole, h5py.File(path, "w") as file:
        for name in ("CNN", "char_embed", "CNN_high_0", "CNN_high_1", "CNN_proj", "RNN_0"):
            whole.copy(name, file)
        cells = file["RNN_0/RNN/MultiRNNCell"]
        for layer in range(2, 30):
            cells[f"Cell{layer}"] = cells["Cell1"]
        file["RNN_1"] = file["RNN_0"]
    values = {**CONFIG.model.to_dict(), "lstm": {**CONFIG.model.lstm.to_dict(), "n_layers": 30}}
    with pytest.raises(FormatError, match=r"has \d+ bytes, but its arrays need \d+"):
        read_weights(path, PretrainConfig.from_dict({"model": values}).model)


# ---------------------------------------------------------------- weights: damaged bytes

_READER = """
import collections, json, resource, sys
from pathlib import Path
from helpers.fuzzing import DAMAGES, check_message, damaged
from test_fuzz_bilm_tf import CONFIG, WORDS
from elmo_ray.errors import FormatError
from elmo_ray.checkpoints.bilm_tf.hdf5 import read_weights

folder, first, count = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
path, found = folder / "damaged.hdf5", collections.Counter()
whole = {name: (folder / f"{name}.hdf5").read_bytes() for name in ("characters", "words")}
for name, config in (("characters", CONFIG), ("words", WORDS)):
    read_weights(folder / f"{name}.hdf5", config.model)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for seed in range(first, first + count):
    name, config = (("characters", CONFIG), ("words", WORDS))[seed % 2]
    # where the numbers lie, damage is only another number: half of it goes to the first kilobytes, to the structure
    data, kind = whole[name], DAMAGES[seed // 2 % len(DAMAGES)]
    head = len(data) if seed % 4 < 2 else 4096
    path.unlink(missing_ok=True)  # a new file, or a page of the old one may still be mapped
    path.write_bytes(damaged(data[:head], kind, seed) + data[head:])
    print("reading", seed, file=sys.stderr, flush=True)
    try:
        read_weights(path, config.model)
        found["taken"] += 1
    except FormatError as error:
        check_message(error)
        found["refused"] += 1
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(json.dumps({**found, "grown_mib": grown // 1024}))
"""


@pytest.mark.parametrize("part", range(2))
def test_damaged_bytes_neither_crash_the_library_nor_take_memory(folder: Path, tmp_path: Path, part: int) -> None:
    """In a process of its own, where a crash of libhdf5 is a failure of this test and not the end of all tests."""
    count = max(150, int(os.environ.get("ELMO_FUZZ_EXAMPLES", "0")) // 2)
    for name in ("characters.hdf5", "words.hdf5"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    command = [sys.executable, "-c", _READER, str(tmp_path), str(part * count), str(count)]
    search = os.pathsep.join([str(TESTS), str(TESTS / "checkpoints"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": search}, capture_output=True, text=True, timeout=3600, check=False
    )
    assert done.returncode == 0, f"exit {done.returncode}: {done.stderr.strip().splitlines()[-8:]}"
    found = json.loads(done.stdout.splitlines()[-1])
    print(found)
    assert found["taken"] + found["refused"] == count and found["refused"] > count // 4
    assert found["grown_mib"] < 200
