"""Files that appear whole or not at all, what is said where they cannot be written, and the lock."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from elmo_ray import storage
from elmo_ray.errors import CheckpointError, ConfigError, DataError
from elmo_ray.storage.files import atomic_write, file_lock, write_aside, write_json


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "folder" / "a.txt"
    with atomic_write(target, sync=True) as temporary:
        temporary.write_text("first")
        assert not target.exists() and temporary.parent == target.parent and temporary.name.startswith(".a.txt.")
    assert target.read_text() == "first"
    with pytest.raises(KeyError):
        with atomic_write(target) as temporary:
            temporary.write_text("half")
            raise KeyError("the writer's own error")
    assert target.read_text() == "first" and os.listdir(target.parent) == ["a.txt"]
    write_aside(target, b"second")
    write_json(target.with_name("b.json"), {"x": 1})
    assert target.read_bytes() == b"second" and (target.parent / "b.json").read_text() == '{\n "x": 1\n}\n'
    with pytest.raises(ValueError):
        write_json(target.with_name("b.json"), float("nan"))
    assert sorted(os.listdir(target.parent)) == ["a.txt", "b.json"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EIO])
def test_the_error_is_the_caller_s_and_names_the_cure(tmp_path: Path, code: int) -> None:
    def fill() -> None:
        with atomic_write(tmp_path / "a", CheckpointError) as temporary:
            temporary.write_bytes(b"x")
            raise OSError(code, os.strerror(code))

    with pytest.raises(CheckpointError) as raised:
        fill()
    text = str(raised.value)
    assert text.startswith(f"{tmp_path}/a: cannot be written ({os.strerror(code)})") and "\n" not in text
    assert ("; " in text) == (code != errno.EIO) and os.listdir(tmp_path) == []


def test_errors_of_other_kinds(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for error, write in ((DataError, write_aside), (ConfigError, write_json)):
        with pytest.raises(error, match="a file stands where a folder is needed"):
            write(tmp_path / "file" / "a", b"" if write is write_aside else {})
    with pytest.raises(NotADirectoryError):
        with atomic_write(tmp_path / "file" / "a", None):
            pass
    with pytest.raises(DataError, match=r"cannot be written \(of a library\)"):
        with atomic_write(tmp_path / "a", also=(RuntimeError,)):
            raise RuntimeError("of a\n library")
    with pytest.raises(NotADirectoryError):
        storage.write_bytes(str(tmp_path / "file" / "a"), b"", only_new=True)
    storage.write_bytes(str(tmp_path / "sub" / "a"), b"x", only_new=True)
    with pytest.raises(FileExistsError):
        storage.write_bytes(str(tmp_path / "sub" / "a"), b"y", only_new=True)
    assert (tmp_path / "sub" / "a").read_bytes() == b"x"


HOLDER = """
import sys
from pathlib import Path
from elmo_ray.storage.files import file_lock
with file_lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""


def test_a_lock_is_one_process_s_and_ends_with_it(tmp_path: Path) -> None:
    lock = tmp_path / "folder" / ".lock"
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(BlockingIOError):
            with file_lock(lock):
                pass
        entered = threading.Event()

        def wait_for_it() -> None:
            with file_lock(lock, wait=True):
                entered.set()

        waiting = threading.Thread(target=wait_for_it)
        waiting.start()
        assert not entered.wait(0.2)
        holder.kill()
        holder.wait()
        waiting.join(30)
    assert entered.is_set() and not lock.exists()
    with file_lock(lock):
        assert lock.exists()
