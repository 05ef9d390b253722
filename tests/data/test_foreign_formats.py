"""Other formats that are given as text are refused, and text is not."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from elmo_ray.data.foreign_formats import HEAD_BYTES, check_text
from elmo_ray.errors import DataError

ROWS = [{"id": number, "text": f"the cat sees {number} dogs ."} for number in range(9)]


def parquet() -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table({"text": [row["text"] for row in ROWS]}), file)
    return file.getvalue()


def tar() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        member = tarfile.TarInfo("text.txt")
        member.size = 6
        archive.addfile(member, io.BytesIO(b"a cat\n"))
    return file.getvalue()


OTHERS = {
    "Parquet": (parquet(), "is a Parquet file; "),
    "tar": (tar(), "is a tar archive; unpack it first"),
    "PDF": (b"%PDF-1.7\n%\xe2\xe3\n", "is a PDF file; "),
    "JSON lines": ("".join(json.dumps(row) + "\n" for row in ROWS).encode(), "is JSON; "),
    "JSON lines with a mark": (b"\xef\xbb\xbf" + json.dumps(ROWS[0]).encode(), "is JSON; "),
    "one long JSON line": (json.dumps({"text": "a cat " * 20_000}).encode(), "is JSON; "),
    "indented JSON": (json.dumps(ROWS, indent=2).encode(), "is JSON; "),
    "JSON lists": (b'["a", "cat"]\n["the", "dog"]\n', "is JSON; "),
    "CoNLL-U": (b"# text = a\n" + b"1\ta\ta\tDET\tDT\t_\t2\tdet\t_\t_\n" * 3 + b"\n", "is a CoNLL-U file; "),
    "three columns": (b"the\tDET\tDT\ncat\tNOUN\tNN\n\nsat\tVERB\tVB\n", "has 3 columns with tabs between them"),
    "word and tag": (b"the\tDET\ncat\tNOUN\n" * 3, "has 2 columns with tabs between them"),
    "CoNLL 2003": (b"-DOCSTART- -X- -X- O\n\nEU NNP B-NP B-ORG\n", "is a CoNLL file with a word a line; "),
    "XML": (b'<?xml version="1.0"?>\n<text>\n', "is XML or HTML; "),
    "UTF-16 without a mark": ("the cat sees a dog .\n".encode("utf-16-le"), "is UTF-16 or UTF-32, or no text, by its"),
    "a word and its tags": (b"the DT O\ncat NN O\n\n" * 12, "has 3 columns with blanks between them in every line; "),
    "WikiExtractor": (
        b'<doc id="1" url="x">\nthe cat\n</doc>\n',
        'has a line <doc id="1" url="x"> before each document',
    ),
    "fastText labels": (b"__label__a the cat\n" * 3, "begins every line with a label (__label__); take"),
    "a vocabulary": (b"<S>\n</S>\n<UNK>\nthe\n", "is a vocabulary "),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_formats_are_refused(name: str) -> None:
    data, expected = OTHERS[name]
    with pytest.raises(DataError) as caught:
        check_text(data[:HEAD_BYTES], "corpus.txt")
    assert str(caught.value).startswith(f"corpus.txt: {expected}")


TEXTS = {
    "empty": "",
    "empty lines": "\n\n\n",
    "braces": "{ the cat } sees .\n{ } .\nthe dog .\n",
    "quotes and brackets": '" the cat " , he said .\n[ the dog ] : " no " .\n',
    "a name with PAR1": "PAR1 is a gene .\nBZh is none .\n",
    "tabs between words": "the\tcat\tsees .\nthe\tdog .\n\tthe ship sinks\t.\n",
    "Chinese": "今天 天气 很 好 。\n我们 去 公园 。\n" * 5,
    "Thai": "วันนี้ อากาศ ดี\nเรา ไป สวน\n" * 5,
    "a few zero bytes": "the cat\0 sees .\n" * 9,
    "lines of two words": "the cat\na dog\n" * 30,
    "a mark in a sentence": "the <doc> is a mark .\n<doc> too\n" * 5,
    "words of a list": "the\ncat\nsees\n",
}


@pytest.mark.parametrize("name", TEXTS)
def test_text_is_taken(name: str) -> None:
    check_text(TEXTS[name].encode(), "corpus.txt")


def test_a_name_that_says_json_is_believed(tmp_path: Path) -> None:
    check_text(b"the cat sees .\n", "corpus.json")
    with pytest.raises(DataError, match="is JSON"):
        check_text(b"[1, 2,\n 3]\n", "corpus.json.gz")


def test_csv_by_name_and_header() -> None:
    for head in (b"id,text\n0,the cat sees\n", b'\xef\xbb\xbf"text";"label"\n"a cat";1\n'):
        for name in ("corpus.csv", "corpus.csv.gz"):
            with pytest.raises(DataError, match=f"^{name}: is a CSV file; write its sentences to a text file, one a"):
                check_text(head, name)
        check_text(head, "corpus.txt")
    # Sentences in a file of this name, as bilm-tf takes them.
    check_text(b"the cat , the dog\nyes,no maybe\n", "corpus.csv")
