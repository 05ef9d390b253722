"""The tour of the calls from Python: its page shows the script as it is, and it runs, alone and as a notebook."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SCRIPT = HERE / "tour.py"
MISSING = [name for name in ("jupytext", "nbconvert", "ipykernel") if importlib.util.find_spec(name) is None]


def cells() -> list[tuple[str, str]]:
    """Kind, `code` or `markdown`, and text of each cell of the script."""
    found = []
    for part in re.split(r"^# %%", SCRIPT.read_text("utf-8"), flags=re.MULTILINE)[1:]:
        head, _, text = part.partition("\n")
        if "markdown" in head:
            found.append(("markdown", re.sub(r"^# ?", "", text.strip(), flags=re.MULTILINE)))
        else:
            found.append(("code", text.strip()))
    return found


def run(command: list[str], folder: Path) -> str:
    """Run a command whose temporary files go to a folder of their own; return what it prints on stdout."""
    temporary = folder / "temporary"
    temporary.mkdir()
    environment = {**os.environ, "TMPDIR": str(temporary), "PYTHONPATH": str(HERE.parents[1])}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not list(temporary.glob("tmp*")), "the tour removes its folder"
    return done.stdout


def test_the_page_shows_the_script() -> None:
    page = (HERE / "README.md").read_text("utf-8")
    place = 0
    for kind, text in cells():
        shown = f"```python\n{text}\n```" if kind == "code" else text
        assert shown in page[place:], f"not on the page, or not at this place: {text}; make the page again"
        place = page.index(shown, place) + len(shown)
    assert page.count("```python") == sum(kind == "code" for kind, _ in cells())


@pytest.mark.slow
def test_the_script_runs_alone(tmp_path: Path) -> None:
    printed = run([sys.executable, str(SCRIPT)], tmp_path)
    page = re.sub(r"```.*?```", "", (HERE / "README.md").read_text("utf-8"), flags=re.DOTALL)
    shown = [line[4:] for line in page.splitlines() if line.startswith("    ")]
    # The numbers of a training differ from machine to machine, and so do the words that it expects (six lines).
    assert [re.sub(r"[\d.,]+", "#", line) for line in printed.splitlines()[:-6]] == [
        re.sub(r"[\d.,]+", "#", line) for line in shown[:-6]
    ]
    assert os.listdir(tmp_path) == ["temporary"]


@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)} (pip install 'elmo-ray[notebook]')")
def test_it_becomes_a_notebook_with_results(tmp_path: Path) -> None:
    (command,) = re.findall(r"^jupytext (.*)$", "\n".join(text for _, text in cells()), flags=re.MULTILINE)
    words = command.replace(str(SCRIPT.relative_to(HERE.parents[1])), str(SCRIPT)).split()
    run([sys.executable, "-m", "jupytext", *words], tmp_path)
    notebook = json.loads((tmp_path / "tour.ipynb").read_text("utf-8"))
    assert [cell["cell_type"] for cell in notebook["cells"]] == [kind for kind, _ in cells()]
    printed = ["".join(output.get("text", "")) for cell in notebook["cells"] for output in cell.get("outputs", [])]
    assert any("13 words of 2 sentences" in text for text in printed)
