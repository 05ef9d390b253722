"""What a terminal shows while a run trains, and what a pipe does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from helpers.terminal import shown_in_terminal
from helpers.tiny_runs import sentences, tiny_values

pytest.importorskip("tqdm")


def command(folder: Path) -> list[str]:
    text = "".join(line + "\n" for line in sentences(200))
    (folder / "train.txt").write_text(text, encoding="utf-8")
    values = tiny_values(
        run__name="shown", run__storage_path=str(folder / "runs"), run__export=False,
        data__train=str(folder / "train.txt"), train__duration="400 steps",
    )  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    return [sys.executable, "-m", "elmo_ray.pretrain", str(folder / "config.yaml"), "--fresh"]


@pytest.mark.slow
def test_a_bar_in_a_terminal_and_lines_elsewhere(tmp_path: Path) -> None:
    arguments = command(tmp_path)
    shown = shown_in_terminal(arguments)
    bar = [part for part in shown.split(b"\r") if b"/400 [" in part]
    assert bar, shown.decode(errors="replace")
    assert b"positions/s" in shown and b"perplexity" in bar[-1]
    assert b"start: fresh" in shown and b"step   4/400" not in shown

    done = subprocess.run(arguments, capture_output=True, timeout=120, check=True)
    assert b"\r" not in done.stderr and b"step   4/400" in done.stderr
