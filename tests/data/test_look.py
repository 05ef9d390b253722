"""What `prepare --look` shows of a text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from helpers.tiny_runs import tiny_values

from elmo_ray.prepare import main


def test_what_prepare_shows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [
        "the cat sat .",
        "the cat sat .",
        # Cyrillic, a composed and a decomposed letter, a soft hyphen, a sign that turns the line, an emoji
        "a \u043a\u043e\u0442 ran\u00e9 rane\u0301 ru\u00adn \u202e\u202en \U0001f600",
        *(f"w{number} the end ." for number in range(2000)),
    ]
    (tmp_path / "train.txt").write_text("\n".join(lines) + "\n")
    (tmp_path / "valid.txt").write_text("the dog sat .\n")
    values = tiny_values(
        run__storage_path=str(tmp_path / "runs"),
        data={"train": str(tmp_path / "train.txt"), "valid": str(tmp_path / "valid.txt"), "vocab": None},
    )
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(values))
    out = tmp_path / "out.json"
    assert main([str(tmp_path / "c.yaml"), "--look", "--json", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "data.train, a sample of 2,003 sentences; | stands after each word:\n  the|cat|sat|.|\n" in shown
    assert "sentences that stand more than once: 0.1 %" in shown
    found = shown.split("script: Latin; the commonest other characters: ")[1].splitlines()[0].split(", ")
    assert found[0] == "U+202E (2)" and set(found[1:]) == {
        "\u043a U+043A (1)", "\u043e U+043E (1)", "\u0442 U+0442 (1)", "\u25cc\u0301 U+0301 (1)", "U+00AD (1)",
        "\U0001f600 U+1F600 (1)",
    }  # fmt: skip
    look = json.loads(out.read_text())["look"]
    assert look["valid"]["unknown"][-1] == [2015, 0.25] and look["valid"]["sentences"] == ["the|dog|sat|.|"]
    # 997 words are in the first 1,000 lines, and each of the rarest is seen once
    assert look["train"]["unknown"][0] == [1000, pytest.approx((2012 - 997) / (2003 * 4 + 3))]
    assert look["train"]["lengths"] == [[5, 4], [50, 4], [95, 4], [99, 4]]
    # the page shows the same, with the words that the vocabulary lacks in red
    shown_page = Path(json.loads(out.read_text())["page"])
    assert shown_page == tmp_path / "runs" / "prepared" / "look.html" and f"page: {shown_page}\n" in shown
    page = shown_page.read_text(encoding="utf-8")
    assert "<span class=w>cat</span>" in page and "<span class=u>dog</span>" in page
    assert "<td>2,015</td><td class=n>25.00 %</td>" in page and "CYRILLIC SMALL LETTER KA" in page
    assert "http" not in page
    assert main([str(tmp_path / "c.yaml"), "--look", "--dry-run"]) == 2
    assert "--look reads the text that prepare makes, and --dry-run makes none" in capsys.readouterr().err
    assert main([str(tmp_path / "c.yaml"), "data.column=body"]) == 2
    assert f"data.column=body: {tmp_path / 'train.txt'} is text, which has no columns" in capsys.readouterr().err
