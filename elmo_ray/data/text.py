"""Lines and bytes of text files: sentences, places where a file may be cut, and bytes that are no text.

A sentence is a line that ends with \\n, \\r\\n or a lone \\r, or the rest after the last line end when it is not empty.
No other character ends a line. The words of a sentence are the result of `str.split()`, and an empty line is a sentence
without words. This is how bilm-tf reads text files.
"""

import os
import re
from collections.abc import Iterator
from typing import BinaryIO, Literal

import numpy as np
import numpy.typing as npt

from elmo_ray import storage
from elmo_ray.errors import DataError

OnError = Literal["fail", "replace"]

REPLACEMENT = "\ufffd"
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# A longer line is no sentence, and it would have to be held in memory as a whole.
MAX_LINE_BYTES = 64 << 20
_READ_BYTES = 1 << 20
# The spaces beyond ASCII: U+0085, U+00A0, U+1680, U+2000 to U+200A, U+2028, U+2029, U+202F, U+205F, U+3000.
_WIDE_SPACE = re.compile(rb"\xc2[\x85\xa0]|\xe1\x9a\x80|\xe2(?:\x80[\x80-\x8a\xa8\xa9\xaf]|\x81\x9f)|\xe3\x80\x80")


def decode(data: bytes, on_error: OnError, path: str, offset: int) -> tuple[str, int]:
    """Decode UTF-8; return the text and the number of replacements in it.

    `data` stands at byte `offset` of `path` and begins at the start of a line. With "fail", the first invalid sequence
    or NUL raises a DataError that names file and line; with "replace", each of them becomes U+FFFD. A byte order mark
    at byte 0 is no text and is taken off.
    """
    replaced = 0
    if offset == 0 and data.startswith(BYTE_ORDER_MARK):
        data, offset = data[len(BYTE_ORDER_MARK) :], len(BYTE_ORDER_MARK)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        if on_error == "fail":
            raise DataError(
                _bad_byte_message(path, offset + error.start, "not UTF-8", "convert the file to UTF-8 (iconv)")
            ) from None
        text = data.decode("utf-8", "replace")
        replaced = text.count(REPLACEMENT) - data.count(REPLACEMENT.encode())
    if "\0" in text:
        if on_error == "fail":
            raise DataError(_bad_byte_message(path, offset + data.index(b"\0"), "a NUL byte"))
        replaced += text.count("\0")
        text = text.replace("\0", REPLACEMENT)
    return text, replaced


def split_lines(text: str) -> list[str]:
    """Return the sentences of `text`, not yet split into words."""
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    lines = text.split("\n")
    if not lines[-1]:
        lines.pop()
    return lines


def has_wide_spaces(data: bytes) -> bool:
    """Return whether UTF-8 has a character beyond ASCII that `str.split` takes as a space."""
    return not data.isascii() and _WIDE_SPACE.search(data) is not None


def count_lines(data: bytes) -> int:
    """Return the number of sentences in `data`, which must begin at the start of a line and end with a line or file."""
    lines = data.count(b"\n")
    if b"\r" in data:
        lines += data.count(b"\r") - data.count(b"\r\n")
    return lines + (not data.endswith((b"\n", b"\r")) and len(data) > 0)


def line_number(path: str, offset: int) -> int:
    """Return the number of the line of byte `offset` of `path`, counted from 1. Reads the file up to there."""
    lines, position, previous = 0, 0, b""
    with storage.open_read(path) as file:
        while position < offset:
            data = previous + file.read(min(_READ_BYTES, offset - position))
            if len(data) == len(previous):
                break
            position += len(data) - len(previous)
            # A \r at the end may be half of a \r\n, so it is counted with the next piece.
            previous = b"\r" if data.endswith(b"\r") else b""
            data = data[: len(data) - len(previous)]
            lines += data.count(b"\n") + data.count(b"\r") - data.count(b"\r\n")
        if previous and file.read(1) != b"\n":
            lines += 1
    return lines + 1


def line_start(file: BinaryIO, position: int, size: int) -> int:
    """Return the byte at which the first line at or after `position` starts, or `size` (the file's end) for none."""
    if position <= 0 or position >= size:
        return min(max(position, 0), size)
    file.seek(position - 1)
    base, data = position - 1, b""
    while base + len(data) < size:
        data += file.read(_READ_BYTES + 1)
        end = _first_line_end(data, base + len(data) >= size)
        if end:
            return base + end
        # A \r at the end is kept: it can still become part of a line end.
        base, data = base + len(data) - 1, data[-1:]
        _check_line(file.name, position, base - position)
    return size


def cut_blocks(
    file: BinaryIO, start: int, end: int, block_bytes: int, ends: npt.NDArray[np.int64] | None = None
) -> Iterator[tuple[int, bytes]]:
    """Yield (offset, bytes) of the line-aligned blocks that tile [start, end) of `file`.

    `start` and `end` are starts of lines or the end of the file. A block has at most `block_bytes` bytes unless it is a
    single longer line. ends: bytes at which documents end, rising; a block ends with the last of them that it can hold,
    and within a document only where this is longer than a block. Raises DataError for a line over MAX_LINE_BYTES and
    for a file that became shorter.
    """
    while start < end:
        whole = end - start <= block_bytes
        file.seek(start)
        data = file.read(end - start if whole else block_bytes + 1)
        if len(data) < min(end - start, block_bytes + 1):
            raise _became_shorter(file)
        if not whole:
            cut = _last_document_end(ends, start, block_bytes) or _last_line_end(data, block_bytes)
            while not cut:
                _check_line(file.name, start, len(data))
                more = file.read(min(max(len(data), _READ_BYTES), end - start - len(data)))
                if not more and start + len(data) < end:
                    raise _became_shorter(file)
                # The search begins one byte earlier, for a \r\n that the reads have cut in two.
                found = _first_line_end(data[-1:] + more, start + len(data) + len(more) >= end)
                cut = len(data) - 1 + found if found else 0
                data += more
            data = data[:cut]
        yield start, data
        start += len(data)


def file_status(path: str) -> storage.Status | os.stat_result:
    """Return the status of a file: its size in bytes, its times. Raises DataError when there is no access to it."""
    try:
        return storage.status(path)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; has the file been moved since it was listed?") from None


def _first_line_end(data: bytes, is_last: bool) -> int:
    """Return the offset just after the first line end in `data`, or 0 for none.

    A \\r at the very end counts only if `is_last`. With `is_last` and no line end, the end of `data` ends the line.
    """
    newline = data.find(b"\n")
    carriage = data.find(b"\r", 0, newline if newline >= 0 else len(data))
    if carriage >= 0 and carriage + 1 != newline and (is_last or carriage + 1 < len(data)):
        return carriage + 1
    if newline >= 0:
        return newline + 1
    return len(data) if is_last else 0


def _last_document_end(ends: npt.NDArray[np.int64] | None, start: int, limit: int) -> int:
    """Return the offset from `start`, at most `limit`, of the last end of a document; 0 for none."""
    if ends is None:
        return 0
    place = int(np.searchsorted(ends, start + limit, "right")) - 1
    return max(0, int(ends[place]) - start) if place >= 0 else 0


def _last_line_end(data: bytes, limit: int) -> int:
    """Return the offset, at most `limit`, just after the last line end; 0 for none. `data` goes on beyond `limit`."""
    newline = data.rfind(b"\n", 0, limit)
    carriage = data.rfind(b"\r", newline + 1, limit)
    if carriage == limit - 1 and data[limit : limit + 1] == b"\n":
        carriage = data.rfind(b"\r", newline + 1, carriage)
    return max(newline, carriage) + 1


def _check_line(path: str, offset: int, length: int) -> None:
    """Raise DataError when `length` bytes of one line, which begins at `offset`, are over the limit."""
    if length > MAX_LINE_BYTES:
        line = line_number(path, offset)
        raise DataError(f"{path}, line {line}: longer than {MAX_LINE_BYTES >> 20} MiB; write one sentence a line")


def _became_shorter(file: BinaryIO) -> DataError:
    return DataError(f"{file.name}: became shorter while it was read; run prepare again")


def _bad_byte_message(path: str, offset: int, problem: str, cure: str = "correct the file") -> str:
    where = f"{path}, line {line_number(path, offset)}" if storage.exists(path) else path
    return f"{where}: {problem}; {cure}, or where only a few bytes are damaged, set data.on_error=replace"
