"""Page of `prepare --look`: what the texts of a training look like."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path

from elmo_ray.data.look import Look, shown_character
from elmo_ray.report.html import escape, table, write_html

_MOST_WORDS = 200


def write_look(path: Path, looks: Mapping[str, Look], sizes: Sequence[Sequence[str]]) -> None:
    """Write the page as one file. Raises DataError if it cannot be written.

    looks: by the names train, valid and test. sizes: a table of the texts, with its head.
    """
    body = ["<h1>Texts as they are trained on</h1>", table(sizes)]
    for name, look in looks.items():
        body += _text(f"data.{name}", look)
    write_html(path, "Texts as they are trained on", body)


def _text(name: str, look: Look) -> list[str]:
    body = [f"<h2>{escape(name)}</h2>", *(f"<p><b>{escape(line)}</b></p>" for line in look.warnings())]
    body.append(
        f'<p class="note">Some of a sample of {look.sampled:,} sentences. Each word has a frame; those that the '
        "vocabulary lacks are red.</p>"
    )
    unknown = set(look.unknown_words)
    body += [_sentence(words, unknown) for words in look.sentences]
    unknown_rows = [[f"{lines:,}", f"{100 * share:.2f} %"] for lines, share in look.unknown]
    body.append(table([["size of the vocabulary", "unknown words"], *unknown_rows]))
    lengths = [[f"{part} %", f"{words:,}"] for part, words in look.lengths]
    body.append(table([["part of the sentences", "words of a sentence, at most"], *lengths]))
    body.append(f"<p>Sentences that stand more than once: {100 * look.repeated:.1f} %.</p>")
    body.append(f"<p>Script of most letters: {escape(look.script)}.</p>")
    if look.foreign:
        rows = [
            [f"{shown_character(character)} {unicodedata.name(character, '')}", f"{count:,}"]
            for character, count in look.foreign
        ]
        body.append(table([["commonest other characters", "how often"], *rows]))
    return body


def _sentence(words: Sequence[str], unknown: set[str]) -> str:
    shown = "".join(f"<span class={'u' if w in unknown else 'w'}>{escape(w)}</span> " for w in words[:_MOST_WORDS])
    return f"<p dir=auto>{shown}{'...' if len(words) > _MOST_WORDS else ''}</p>"
