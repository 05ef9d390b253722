import bz2
import gzip
import lzma
import os
import random
from pathlib import Path

import pytest
import zstandard

from elmo_ray.data import unpack
from elmo_ray.errors import DataError

TEXT = "".join(f"line {random.Random(0).random()} {number}\n" for number in range(30_000)).encode()


def zst(data: bytes, checksum: bool = True) -> bytes:
    return zstandard.ZstdCompressor(write_checksum=checksum).compress(data)


@pytest.mark.parametrize(
    ("name", "packed"),
    [
        ("one.txt.gz", gzip.compress(TEXT)),
        ("two.gz", gzip.compress(TEXT[:1000]) + gzip.compress(TEXT[1000:])),
        ("three.txt.zst", zst(TEXT)),
        ("four.zst", zst(TEXT[:1000]) + zst(b"") + zst(TEXT[1000:])),
        ("misnamed.txt", zst(TEXT)),
    ],
)
def test_unpacks_every_member(tmp_path: Path, name: str, packed: bytes) -> None:
    source = tmp_path / name
    source.write_bytes(packed)
    target = Path(unpack.unpacked_path(str(source), tmp_path))
    assert target.name.startswith(f"{name.partition('.')[0]}-") and target.suffix == ".txt"
    unpack.check_space([str(source)], tmp_path)
    assert not unpack.is_unpacked(str(source), target)
    assert unpack.unpack(str(source), target) == len(TEXT)
    assert target.read_bytes() == TEXT
    assert unpack.is_unpacked(str(source), target)
    written = target.stat()
    os.utime(target, ns=(1, 1))  # somebody has had a hand in it
    assert not unpack.is_unpacked(str(source), target)
    os.utime(target, ns=(written.st_atime_ns, written.st_mtime_ns))
    assert unpack.is_unpacked(str(source), target)
    os.utime(source, ns=(1, 1))
    assert not unpack.is_unpacked(str(source), target)


def flipped(data: bytes) -> bytes:
    return data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]


@pytest.mark.parametrize(
    ("name", "packed", "what"),
    [
        ("a.gz", gzip.compress(TEXT)[:-4], "is truncated"),
        ("a.gz", gzip.compress(TEXT)[:5000], "is truncated"),
        ("a.gz", flipped(gzip.compress(TEXT)), "is damaged"),
        ("a.zst", zst(TEXT)[:-1], "is truncated"),
        ("a.zst", (zst(TEXT[:1000]) + zst(TEXT[1000:]))[:-900], "is truncated"),
        ("a.zst", flipped(zst(TEXT)), "is damaged"),
        ("a.zst", zst(TEXT) + b"more", "is damaged"),
    ],
)
def test_damaged_files_leave_nothing(tmp_path: Path, name: str, packed: bytes, what: str) -> None:
    source = tmp_path / name
    source.write_bytes(packed)
    with pytest.raises(DataError, match=rf"^\S+/{name}: {what}"):
        unpack.unpack(str(source), Path(unpack.unpacked_path(str(source), tmp_path)))
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


def test_an_error_of_reading_names_the_source(tmp_path: Path) -> None:
    with open(tmp_path / "written", "wb") as file:  # cannot be read
        for kind in ("gz", "zst", None):
            with pytest.raises(DataError, match=r"^far.gz: (not readable|read)"):
                unpack.write_text(
                    "far.gz", tmp_path / "t.txt", unpack.unpacked_pieces(file, "far.gz", kind), lambda _: {}
                )


def test_kind_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "text.gz"
    path.write_bytes(b"")
    with pytest.raises(DataError, match=r"text\.gz: is no \.gz file \(it is empty\)"):
        unpack.compression(str(path))
    path.write_bytes(b"plain text\n")
    with pytest.raises(DataError, match=r"text\.gz: is no \.gz file \(it begins with b'plai'\); rename or replace it"):
        unpack.compression(str(path))
    foreign = {
        "bzip2": bz2.compress(TEXT), "a bzip2": bz2.compress(b""), "an xz": lzma.compress(TEXT),
        "a zip": b"PK\x03\x04rest", "UTF-16": "the cat".encode("utf-16"),
    }  # fmt: skip
    for kind, data in foreign.items():
        path.with_suffix(".txt").write_bytes(data)
        with pytest.raises(DataError, match=rf"text\.txt: is .*{kind}.*; (unpack|convert) it"):
            unpack.compression(str(path.with_suffix(".txt")))
    path.with_suffix(".txt").write_bytes(b"BZh is a word\n")
    assert unpack.compression(str(path.with_suffix(".txt"))) is None
    plain = tmp_path / "text.txt"
    plain.write_bytes(b"a b\n")
    assert unpack.compression(str(plain)) is None
    with pytest.raises(DataError, match=r"gone\.txt: No such file"):
        unpack.compression(str(tmp_path / "gone.txt"))


def test_space_is_looked_at_first(tmp_path: Path) -> None:
    # A frame that states a petabyte, of which nothing need be there.
    source = tmp_path / "huge.zst"
    source.write_bytes(b"\x28\xb5\x2f\xfd\xe0" + (10**15).to_bytes(8, "little"))
    with pytest.raises(DataError, match=r"data\.prepared_dir=\S+: 1 compressed shards need about 1000000\.1 GB"):
        unpack.check_space([str(source)], tmp_path)


def test_pieces_of_killed_runs_are_removed(tmp_path: Path) -> None:
    source = tmp_path / "a.gz"
    source.write_bytes(gzip.compress(TEXT))
    target = Path(unpack.unpacked_path(str(source), tmp_path))
    prefix = f".{target.name}.{os.uname().nodename}."
    dead = tmp_path / f"{prefix}999999999.part"
    note = tmp_path / f"{prefix}999999999-ab12cd34.tmp"
    alive = tmp_path / f"{prefix}{os.getppid()}.part"
    for piece in (dead, note, alive):
        piece.write_bytes(b"half")
    unpack.unpack(str(source), target)
    assert not dead.exists() and not note.exists() and alive.exists()
