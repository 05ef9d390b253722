"""How the fuzz tests search: deterministically, and as long as ELMO_FUZZ_EXAMPLES says; and what they all throw."""

from __future__ import annotations

import os
import random
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from elmo_ray.errors import ElmoRayError


def fuzz(examples: int) -> settings:
    """Settings of a test that tries so many inputs, the same in every run; ELMO_FUZZ_EXAMPLES=N: at least N others."""
    wanted = int(os.environ.get("ELMO_FUZZ_EXAMPLES", "0"))
    return settings(
        max_examples=max(examples, wanted),
        derandomize=wanted == 0,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


def check_message(error: ElmoRayError, lines: int | None = 1) -> None:
    """An error for a user: so many lines (None: one for each mistake), none empty, no trace of our insides."""
    text = str(error)
    found = text.split("\n")
    assert lines is None or len(found) == lines, text
    assert text.splitlines() == found, "line ends of other kinds would break a line too"
    assert all(line.strip() and len(line) < 2000 for line in found), text
    assert not any(word in text for word in ("Traceback", "pydantic", "validation error", "object at 0x")), text


absurd_numbers = st.sampled_from(
    [0, -1, 1, 2**31, 2**32, 2**40, 2**62, 2**63, 2**64, 10**18, 10**30, 10**400, -(2**63), True, False]
    + [0.0, -0.0, 0.5, -1.5, 1e-320, 1e15, 1e38, 1e300, 1e308, float("inf"), float("-inf"), float("nan")]
)
hostile_texts = st.sampled_from(
    ["", " ", "\0", "a\nb", "a\r\u2028b", "\ud800", "null", "~", "${HOME}", "${ELMO_NOT_SET}", "../../etc/passwd"]
    + ["/dev/zero", "!!python/object/apply:os.system [ls]", "%s", "{}", "x" * 5000, "\x1b[31m", "é" * 300, "nan"]
)
scalars = st.none() | st.booleans() | absurd_numbers | st.integers() | st.floats() | hostile_texts | st.text(max_size=8)
plain_values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(hostile_texts | st.text(max_size=8), inner, max_size=4),
    max_leaves=10,
)
"""What JSON or YAML can say."""


def nested(depth: int, mapping: bool = False) -> Any:
    """A list in a list in a list, or mappings."""
    value: Any = 1
    for _ in range(depth):
        value = {"a": value} if mapping else [value]
    return value


def paths_of(value: Any) -> list[tuple[Any, ...]]:
    """The place of every value in nested mappings and lists, the root's left out."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path for key, part in items for path in [(key,), *((key, *rest) for rest in paths_of(part))]]


def replaced(value: Any, path: tuple[Any, ...], change: Any) -> Any:
    """A copy with `change` at a path; `...` removes what is there."""
    key, *rest = path
    result = dict(value) if isinstance(value, dict) else list(value)
    if rest:
        result[key] = replaced(value[key], tuple(rest), change)
    elif change is ...:
        del result[key]
    else:
        result[key] = change
    return result


def damaged(data: bytes, kind: str, seed: int) -> bytes:
    """Bytes with some damage: `flip` some bits, `cut` the end, `zero` or `fill` a stretch, `insert` or `drop` bytes."""
    source = random.Random(seed)
    result = bytearray(data)
    place = source.randrange(len(data) + 1)
    size = source.choice((1, 2, 8, 64, 1024))
    if kind == "flip":
        for _ in range(source.choice((1, 1, 2, 5, 30))):
            position = source.randrange(len(result) * 8)
            result[position // 8] ^= 1 << position % 8
    elif kind == "cut":
        del result[place:]
    elif kind in ("zero", "fill"):
        stretch = len(result[place : place + size])
        result[place : place + size] = bytes(stretch) if kind == "zero" else b"\xff" * stretch
    elif kind == "insert":
        result[place:place] = source.randbytes(size)
    else:
        del result[place : place + size]
    return bytes(result)


DAMAGES = ("flip", "flip", "cut", "zero", "fill", "insert", "drop")
