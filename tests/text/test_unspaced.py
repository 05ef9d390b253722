"""Five scripts through `prepare` and `embed`: sentences by rules, and what is said of text without spaces."""

from __future__ import annotations

import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from helpers.saved_models import random_model, save_checkpoint
from helpers.tiny_runs import tiny_config, tiny_values

from elmo_ray import embed
from elmo_ray.data.vocabulary import SPECIAL_WORDS
from elmo_ray.prepare import main
from elmo_ray.text.unspaced import find_unspaced

SPACED = {
    "de": ("Die Katze schläft. Wo ist z.B. der Hund?", ["Die Katze schläft .", "Wo ist z.B. der Hund ?"], "Latin"),
    "ru": ("Кошка спит. Где собака?", ["Кошка спит .", "Где собака ?"], "Cyrillic"),
    "hi": ("बिल्ली सो रही है। कुत्ता कहाँ है?", ["बिल्ली सो रही है ।", "कुत्ता कहाँ है ?"], "Devanagari"),
    "ar": ("القطة نائمة. أين الكلب؟", ["القطة نائمة .", "أين الكلب ؟"], "Arabic"),
}
THAI = "แมวนอนหลับอยู่บนเก้าอี้ใกล้หน้าต่าง สุนัขวิ่งเล่นในสวนหลังบ้านทุกวัน"
THAI_WORDS = "แมว นอนหลับ อยู่ บน เก้าอี้ ใกล้ หน้าต่าง สุนัข วิ่ง เล่น ใน สวน หลัง บ้าน ทุก วัน"
CHINESE = "今天天气很好。我们去公园散步，孩子们很高兴！你明天来吗？", "他昨天买了一本新书。他非常喜欢读书。"
JAPANESE_WORDS = "猫 は インターネット の そば の コンピューター で 静か に 眠っ て いる 。"
JAPANESE = "猫は窓のそばの椅子の上で静かに眠っている。犬は毎日裏庭で元気に走り回っている。"
CHINESE_WORDS = "猫 在 窗户 旁边 的 椅子 上 睡觉 。 狗 每天 在 后院 里 跑来跑去 。"


def jsonl(path: Path, *texts: str) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def test_which_text_has_no_spaces() -> None:
    def of(*texts: str) -> str | None:
        found = find_unspaced(Counter(" ".join(texts).split()))
        return None if found is None else found[0]

    assert of(THAI) == "Thai" and of(JAPANESE) == "Chinese or Japanese"
    assert of(*CHINESE) == "Chinese or Japanese", "clauses that are no longer than a long word"
    assert of(THAI_WORDS * 9) is None and of(CHINESE_WORDS * 9) is None and of(JAPANESE_WORDS * 9) is None
    assert of(*(text for text, _, _ in SPACED.values())) is None
    # a quotation in a text of another language
    assert of("The cat sleeps on the chair near the window . " * 9, THAI) is None


def test_scripts_with_spaces_and_one_without(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("spacy")

    def prepare(source: Path, **data: Any) -> int:
        values = tiny_values(run__storage_path=str(tmp_path / source.stem), data={"train": str(source), **data})
        (tmp_path / "c.yaml").write_text(yaml.safe_dump(values))
        capsys.readouterr()
        return main([str(tmp_path / "c.yaml"), "--look"])

    for language, (text, sentences, script) in SPACED.items():
        assert prepare(jsonl(tmp_path / f"{language}.jsonl", text), tokenizer="spacy", language=language) == 0
        shown = capsys.readouterr().out
        assert all(f"  {line.replace(' ', '|')}|\n" in shown for line in sentences), shown
        assert f"script: {script}; the commonest other characters: none" in shown
        assert "without spaces" not in shown
    thai, japanese = jsonl(tmp_path / "th.jsonl", THAI), jsonl(tmp_path / "ja.jsonl", JAPANESE)
    for source, writing in ((thai, "Thai"), (japanese, "Chinese or Japanese")):
        assert prepare(source) == 2
        error = capsys.readouterr().err
        assert f"its documents are written without spaces ({writing}, such as" in error
        assert "data.tokenizer=package.module:function that calls a segmenter" in error
    # rules of another language are advised against, as is raw text that is taken as tokenised
    caplog.clear()
    assert prepare(thai, tokenizer="spacy", language="xx") == 0
    shown = capsys.readouterr().out
    assert "script: Thai" in shown and "not divided into words: Thai is written without spaces" in shown
    assert "data.train: Thai is written without spaces, and its words are not separated" in caplog.text
    page = (tmp_path / "th" / "prepared" / "look.html").read_text()
    assert "not divided into words: Thai" in page
    (tmp_path / "ja.txt").write_text(JAPANESE + "\n")
    assert prepare(tmp_path / "ja.txt") == 0
    assert "script: CJK; the commonest other characters: none" in capsys.readouterr().out
    assert "data.train: Chinese or Japanese is written without spaces" in caplog.text
    # what a segmenter has divided is taken as it is
    caplog.clear()
    assert prepare(jsonl(tmp_path / "divided.jsonl", THAI_WORDS)) == 0 and "without spaces" not in caplog.text


def test_embed_says_it_too(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [*SPECIAL_WORDS, "the"]
    run = save_checkpoint(tmp_path / "checkpoint", tiny_config(), words, random_model(tiny_config(), len(words)))
    source = jsonl(tmp_path / "th.jsonl", THAI)
    arguments = [str(run), str(source), "cluster.workers=0", "embed.layers=top"]
    assert embed.main([*arguments, str(tmp_path / "out")]) == 2
    assert "its documents are written without spaces (Thai" in capsys.readouterr().err
    assert embed.main([*arguments, str(tmp_path / "out"), "data.tokenizer=spacy", "data.language=th"]) == 2
    assert "data.language=th: Thai is written without spaces" in capsys.readouterr().err
    if pytest.importorskip("spacy"):
        assert embed.main([*arguments, str(tmp_path / "rules"), "data.tokenizer=spacy", "data.language=xx"]) == 0
        assert "Thai is written without spaces, and rules do not find its words" in caplog.text
    (tmp_path / "segmenter.py").write_text(
        f"WORDS = {THAI_WORDS.split()!r}\n"
        "def cut(documents):\n"
        "    return [[[word for word in WORDS if word in text]] for text in documents]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    caplog.clear()
    caplog.set_level(logging.INFO, logger="elmo_ray")
    assert embed.main([*arguments, str(tmp_path / "own"), "data.tokenizer=segmenter:cut"]) == 0
    assert pq.read_table(tmp_path / "own")["words"].to_pylist() == [THAI_WORDS.split()]
    assert "without spaces" not in caplog.text
