"""Files of other formats that are given as text: Parquet, JSON, columns, archives, and what else holds text inside.

Most of them are valid UTF-8, or become so with data.on_error=replace, and would be trained on as if
they were words, without an error.
"""

from __future__ import annotations

import json
import re

from elmo_ray.errors import DataError, short

# Bytes of a file's start that `check_text` looks at.
HEAD_BYTES = 1 << 16

_UNPACK, _TAKE_OUT = "unpack it", "write its sentences to a text file, one a line,"
_PARQUET = b"PAR1\x15"
# The first bytes of a file, what it is, and the cure.
MAGIC = {
    b"\xfd7zXZ\0": ("is an xz file", _UNPACK),
    b"BZh": ("is a bzip2 file", _UNPACK),
    b"PK\x03\x04": ("is a zip file", _UNPACK),
    b"7z\xbc\xaf\x27\x1c": ("is a 7-Zip file", _UNPACK),
    b"Rar!\x1a\x07": ("is a RAR file", _UNPACK),
    b"\x04\x22\x4d\x18": ("is an LZ4 file", _UNPACK),
    b"\xff\xfe": ("is UTF-16 or UTF-32", "convert it to UTF-8"),
    b"\xfe\xff": ("is UTF-16 or UTF-32", "convert it to UTF-8"),
    b"\0\0\xfe\xff": ("is UTF-32", "convert it to UTF-8"),
    # After its magic every Parquet file goes on with the first field of a Thrift structure.
    _PARQUET: ("is a Parquet file", _TAKE_OUT),
    b"ARROW1\0": ("is an Arrow file", _TAKE_OUT),
    b"Obj\x01": ("is an Avro file", _TAKE_OUT),
    b"\x89HDF\r\n\x1a\n": ("is an HDF5 file", _TAKE_OUT),
    b"\x93NUMPY": ("is a NumPy file", _TAKE_OUT),
    b"SQLite form": ("is an SQLite file", _TAKE_OUT),
    b"%PDF-": ("is a PDF file", _TAKE_OUT),
    b"{\\rtf": ("is an RTF file", _TAKE_OUT),
    b"\xd0\xcf\x11\xe0": ("is a file of Microsoft Office", _TAKE_OUT),
    b"WARC/": ("is a WARC file", _TAKE_OUT),
}
# After its header a bzip2 file goes on with the first block or the end of the stream.
_BZIP2_BLOCKS = (b"1AY&SY", b"\x17rE8P\x90")
# A tar file has this at byte 257.
_TAR = b"ustar"
_MARKUP = (b"<?xml", b"<!doctype html", b"<html")
_JSON_NAMES = (".json", ".jsonl", ".ndjson")
_JSON_OBJECT = re.compile(rb"\{\s*([\"'])[^\"'\n]{0,200}\1\s*:|\{\s*\}$")
_JSON_OPEN = (b"{", b"[", b"[{")
_SPECIAL_WORDS = {b"<S>", b"</S>", b"<UNK>"}
_FASTTEXT_LABEL = b"__label__"
# The names of columns, as in `id,"text"`: no blanks, so that no sentence with commas looks so.
_CSV_HEADER = re.compile(rb"\"?\w+\"?(?:[,;]\"?\w+\"?)+")
_CHECKED_LINES = 50
# Fewer lines with the same tabs may be chance.
_LINES_OF_TWO_COLUMNS, _LINES_OF_COLUMNS, _LINES_OF_BLANK_COLUMNS = 5, 3, 20
_DOCUMENT = re.compile(rb"<doc( [^<>]*)?>")
_ZERO_SHARE = 5


def check_magic(head: bytes, name: str) -> None:
    """Raise DataError if the first bytes (10 or more) of the file `name` are those of another format."""
    for magic, (what, cure) in MAGIC.items():
        # A text may begin with "BZh"; a bzip2 file goes on with a digit and one of _BZIP2_BLOCKS.
        if head.startswith(magic) and (magic != b"BZh" or head[4:10] in _BZIP2_BLOCKS):
            raise DataError(f"{name}: {what}; {cure} first")


def check_parquet(head: bytes, name: str) -> None:
    """Raise DataError, with the setting that reads it, if the first bytes of a text are those of a Parquet file."""
    if head.startswith(_PARQUET):
        raise DataError(f"{name}: is a Parquet file; name it .parquet or set data.format=parquet")


def check_text(head: bytes, name: str) -> None:
    """Raise DataError if `head`, the first HEAD_BYTES of a text or all of it, is another format than sentences.

    name: of the file, for the error and for its ending, with or without .gz or .zst.
    """
    check_parquet(head, name)
    check_magic(head, name)
    if head[257:262] == _TAR:
        raise DataError(f"{name}: is a tar archive; unpack it first")
    head = head.removeprefix(b"\xef\xbb\xbf")
    # Letters of Latin and Cyrillic scripts have a zero byte or a few high ones in UTF-16.
    if _ZERO_SHARE * head.count(b"\0") > len(head):
        raise DataError(f"{name}: is UTF-16 or UTF-32, or no text, by its zero bytes; convert it to UTF-8 first")
    if head.lstrip().lower().startswith(_MARKUP):
        raise DataError(f"{name}: is XML or HTML; {_TAKE_OUT} first")
    lines = head.splitlines()
    if len(head) >= HEAD_BYTES - 3 and len(lines) > 1:
        lines.pop()  # It may be cut.
    full = [line for line in lines if line.strip()][:_CHECKED_LINES]
    if {line.strip() for line in full[:3]} == _SPECIAL_WORDS:
        raise DataError(f"{name}: is a vocabulary (it begins with <S>, </S> and <UNK>); take it out of the text")
    if _is_json([line.strip() for line in full], name):
        raise DataError(f"{name}: is JSON; with an object in each line, name it .jsonl or set data.format=jsonl")
    _check_csv(full, name)
    if len(full) >= _LINES_OF_COLUMNS and all(line.startswith(_FASTTEXT_LABEL) for line in full):
        raise DataError(
            f"{name}: begins every line with a label ({_FASTTEXT_LABEL.decode()}); take the labels out first"
        )
    if len(full) >= _LINES_OF_COLUMNS and _DOCUMENT.fullmatch(full[0].strip()):
        raise DataError(
            f"{name}: has a line {short(full[0].strip().decode('utf-8', 'replace'), 40)} before each document, as "
            "WikiExtractor writes; take these lines out first"
        )
    if any(not line.strip() for line in lines):
        _check_blank_columns(full, name)
    _check_columns([line for line in full if not line.startswith(b"#")], name)


def _is_json(lines: list[bytes], name: str) -> bool:
    if not lines:
        return False
    if name.removesuffix(".gz").removesuffix(".zst").endswith(_JSON_NAMES) and lines[0][:1] in (b"{", b"["):
        return True
    if all(map(_JSON_OBJECT.match, lines)) or all(map(_is_json_list, lines)):
        return True
    # JSON over several lines: {, then "key": or another {.
    opened = [line for line in lines[:3] if line not in _JSON_OPEN]
    return lines[0] in _JSON_OPEN and bool(opened) and (_JSON_OBJECT.match(b"{" + opened[0]) is not None)


def _is_json_list(line: bytes) -> bool:
    if not line.startswith(b'["'):
        return False
    try:
        return isinstance(json.loads(line), list)
    except (ValueError, RecursionError):
        return False


def _check_csv(lines: list[bytes], name: str) -> None:
    """Raise DataError for a file that is CSV by its name and its first line."""
    is_csv = name.removesuffix(".gz").removesuffix(".zst").lower().endswith(".csv")
    if is_csv and lines and _CSV_HEADER.fullmatch(lines[0].strip()):
        raise DataError(f"{name}: is a CSV file; {_TAKE_OUT} first")


def _check_blank_columns(lines: list[bytes], name: str) -> None:
    """Raise DataError if all lines of a file with empty lines have as many words, as a word and its tags have."""
    counts = {len(line.split()) for line in lines}
    if len(lines) >= _LINES_OF_BLANK_COLUMNS and len(counts) == 1 and 2 <= (count := counts.pop()) <= 10:
        raise DataError(f"{name}: has {count} columns with blanks between them in every line; {_TAKE_OUT} first")


def _check_columns(lines: list[bytes], name: str) -> None:
    """Raise DataError if all lines have the same number of tabs, as CoNLL-U and tables have."""
    if lines and lines[0].startswith(b"-DOCSTART-"):
        raise DataError(f"{name}: is a CoNLL file with a word a line; {_TAKE_OUT} first")
    tabs = {line.count(b"\t") for line in lines}
    if len(tabs) != 1 or tabs == {0}:
        return
    count = tabs.pop()
    if len(lines) >= (_LINES_OF_TWO_COLUMNS if count == 1 else _LINES_OF_COLUMNS):
        what = "is a CoNLL-U file" if count == 9 else f"has {count + 1} columns with tabs between them in every line"
        raise DataError(f"{name}: {what}; {_TAKE_OUT} first")
