"""The READMEs: the length of the front page, and that the files, links, settings and commands in them exist."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from elmo_ray import evaluate
from elmo_ray.config import EvaluateConfig, ExportConfig, PrepareConfig, PretrainConfig, ReportConfig
from elmo_ray.config.command_line import VERBS
from elmo_ray.config.finetune import FinetuneConfig
from elmo_ray.config.schema import Root, keys
from elmo_ray.embed.config import EmbedConfig
from elmo_ray.report.curves import table_cells
from elmo_ray.serve.config import ServeConfig
from elmo_ray.sweep.config import SweepConfig

REPOSITORY = Path(__file__).resolve().parents[1]
FOLDERS = (".", "configs", "cluster", "tests/benchmarks", "tests/notebook")
READMES = [REPOSITORY / folder / "README.md" for folder in FOLDERS]
LONGEST_FRONT_PAGE = 200

ROOTS: dict[str, type[Root]] = {
    "prepare": PrepareConfig,
    "pretrain": PretrainConfig,
    "finetune": FinetuneConfig,
    "sweep": SweepConfig,
    "evaluate": EvaluateConfig,
    "export": ExportConfig,
    "embed": EmbedConfig,
    "serve": ServeConfig,
    "report": ReportConfig,
}
KEYS = {verb: {key.name for key in keys(root)} for verb, root in ROOTS.items()}
ALL_KEYS = set().union(*KEYS.values())
SECTIONS = {name.rsplit(".", depth)[0] for name in ALL_KEYS for depth in range(1, name.count(".") + 1)}

FILES = (".py", ".yaml", ".json", ".csv", ".png")
"""Ends of names that are files and no settings, such as `sweep.yaml`."""

_PATH = re.compile(r"(?<![\w/.:-])(?:elmo_ray|tests|configs|cluster)/[\w./-]*")
_LINK = re.compile(r"\]\(([^)#\s]+)[^)]*\)")
_KEY = re.compile(r"([a-z_]+(?:\.[A-Za-z0-9_]+)+)(=.*)?")
_COMMAND = re.compile(r"python3? -m elmo_ray\.([a-z]+)(?= |$)([^`]*)")


def names(paths: list[Path]) -> list[str]:
    return [str(path.parent.relative_to(REPOSITORY)) for path in paths]


def code_spans(text: str) -> Iterator[str]:
    """What stands between backticks within a line, and each line of the code blocks."""
    in_block = False
    for line in text.splitlines():
        if line.startswith("```"):
            in_block = not in_block
        elif in_block:
            yield line
        else:
            yield from re.findall(r"`([^`]+)`", line)


def words(code: str) -> list[str]:
    try:
        return shlex.split(code, comments=True)
    except ValueError:  # a line of output with a quotation mark
        return code.split()


def wrong_keys(text: str) -> list[str]:
    """Names in code whose first word is a section of a configuration, and that are neither a setting nor a section."""
    found = []
    tops = {section.split(".")[0] for section in SECTIONS}
    for code in code_spans(text):
        for word in words(code):
            match = _KEY.fullmatch(word)
            name = match[1] if match else ""
            if name.split(".")[0] in tops and not name.endswith(FILES):
                if name not in ALL_KEYS | SECTIONS:
                    found.append(name)
    return found


def test_the_front_page_is_short() -> None:
    lines = (REPOSITORY / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= LONGEST_FRONT_PAGE


@pytest.mark.parametrize("path", READMES, ids=names(READMES))
def test_files_that_are_named_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    named = {match.rstrip(".") for match in _PATH.findall(text)}
    assert not sorted(name for name in named if not (REPOSITORY / name).exists())


@pytest.mark.parametrize("path", READMES, ids=names(READMES))
def test_links_lead_somewhere(path: Path) -> None:
    links = [link for link in _LINK.findall(path.read_text(encoding="utf-8")) if "://" not in link]
    assert not [link for link in links if not (path.parent / link).exists()]


@pytest.mark.parametrize("path", READMES, ids=names(READMES))
def test_settings_that_are_named_exist(path: Path) -> None:
    # The one key that a README shows on purpose, for the error message that it gives.
    assert set(wrong_keys(path.read_text(encoding="utf-8"))) <= {"optim.lrr"}


def test_tables_have_the_heads_that_are_printed() -> None:
    text = (REPOSITORY / "configs" / "README.md").read_text(encoding="utf-8")
    heads = ["text", "positions", "unknown", *(head for head, _, _ in evaluate._COLUMNS)]
    assert re.search(r"^" + r"\s+".join(map(re.escape, heads)) + "$", text, re.MULTILINE)
    described = re.search(r"\n\| column \| what it is \|\n(.*?)\n\n", text, re.DOTALL)
    assert described is not None
    named = re.findall(r"`([^`]+)`", " ".join(line.split("|")[1] for line in described[1].splitlines()))
    assert named == [head for head in table_cells(())[0] if head not in ("run", "step", "epoch")]


def test_a_wrong_key_is_found() -> None:
    text = "`train.unrol` and `optim.lr=0.1`, `lstm.0`, `evaluate.py`\n```\npython x data.strems=3 'run.nam=a b'\n```\n"
    assert wrong_keys(text) == ["train.unrol", "data.strems", "run.nam"]


@pytest.mark.parametrize("path", READMES, ids=names(READMES))
def test_commands_name_verbs_and_their_own_settings(path: Path) -> None:
    for code in code_spans(path.read_text(encoding="utf-8")):
        for verb, rest in _COMMAND.findall(code):
            assert verb in VERBS, code
            for word in words(rest.split("&&")[0]):
                match = _KEY.fullmatch(word)
                if match and match[2]:
                    assert match[1] in KEYS[verb] | {"optim.lrr"}, code
                elif word.startswith("--"):
                    assert word.removeprefix("--") in {*VERBS[verb].flags, "help", "version"}, code
