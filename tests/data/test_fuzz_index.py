"""Damaged index files and vocabularies: only DataError comes out."""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.fuzzing import DAMAGES, check_message, damaged, fuzz, plain_values
from hypothesis import given
from hypothesis import strategies as st

from elmo_ray.data.corpus import pack_index, read_index, read_index_fields
from elmo_ray.data.vocabulary import SPECIAL_WORDS, Vocabulary
from elmo_ray.errors import DataError

pytestmark = pytest.mark.slow

WHOLE = pack_index({"version": 1, "paths": ["a", "b"]}, {"x": np.arange(99), "y": np.zeros((3, 4))})


def packed(values: Any) -> bytes:
    """An index whose fields are any JSON."""
    buffer = io.BytesIO()
    np.savez(buffer, fields=np.frombuffer(json.dumps(values).encode(), np.uint8))
    return buffer.getvalue()


def one_array(allow_pickle: bool) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([{}] if allow_pickle else [1, 2]), allow_pickle=allow_pickle)
    return buffer.getvalue()


@fuzz(400)
@given(
    st.builds(damaged, st.just(WHOLE), st.sampled_from(DAMAGES), st.integers(0, 2**32))
    | st.binary(max_size=60)
    | plain_values.map(packed)
    | st.sampled_from([one_array(False), one_array(True), pickle.dumps([1]), b"", b"PK\x05\x06" + bytes(18)])
)
def test_damaged_indexes(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.npz"
    path.write_bytes(data)
    for read in (read_index, read_index_fields):
        try:
            found = read(path)
        except DataError as error:
            check_message(error)
            assert "fuzz.npz" in str(error)
        else:
            assert isinstance(found[0] if isinstance(found, tuple) else found, dict)


@fuzz(200)
@given(
    st.binary(max_size=40)
    | st.lists(
        st.sampled_from([*SPECIAL_WORDS, "", "a", "é", "\0", "!!!MAXTERMID", "\u2028", "x" * 300]), max_size=9
    ).map(lambda words: "\n".join(words).encode())
)
def test_any_bytes_as_a_vocabulary(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path: Path = tmp_path_factory.getbasetemp() / "fuzz.txt"
    path.write_bytes(data)
    try:
        vocabulary = Vocabulary.read(path)
    except DataError as error:
        check_message(error)
    else:
        assert vocabulary.characters(10).shape == (vocabulary.size, 10)
