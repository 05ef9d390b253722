"""Text on the Hugging Face Hub, `hf://datasets/OWNER/NAME/...`, against a stand-in on loopback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from helpers.hub import hub_of
from helpers.saved_models import random_model, save_checkpoint
from helpers.tiny_runs import sentences, tiny_config, tiny_values

from elmo_ray.data.vocabulary import SPECIAL_WORDS

WORDS = [*SPECIAL_WORDS, "the", "cat", "."]
SCRIPT = """
import sys
from elmo_ray import embed, prepare
arguments, *others = sys.argv[1:]
codes = [prepare.main(arguments.split()), embed.main([*others[:3], "embed.keep=id", "cluster.workers=0"])]
codes += [prepare.main([*arguments.split(), f"data.train={place}"]) for place in others[3:]]
print(codes)
"""


def test_text_of_the_hub(tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    data = tmp_path / "repository" / "data"
    data.mkdir(parents=True)
    lines = [line or "the cat ." for line in sentences(30, seed=2)]
    records = [{"id": n, "text": line} for n, line in enumerate(lines)]
    (data / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records[:20]))
    pq.write_table(pa.Table.from_pylist(records[20:]), data / "b.parquet")
    (data / "c.txt").write_text("the cat .\n")
    gated = tmp_path / "gated"
    gated.mkdir()
    (gated / "gated").touch()
    run = save_checkpoint(tmp_path / "checkpoint", tiny_config(), WORDS, random_model(tiny_config(), len(WORDS)))
    place = "hf://datasets/me/docs/data"
    values = tiny_values(run__storage_path=str(tmp_path / "runs"), data__train=f"{place}/*")
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(values))
    bad = [f"{place}/none.jsonl", "hf://datasets/me/none/*.jsonl", "hf://datasets/me/gated/a.jsonl"]
    with hub_of({"datasets/me/docs": data.parent, "datasets/me/gated": gated}) as (address, _):
        variables = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": ""}
        command = [sys.executable, "-c", SCRIPT, str(tmp_path / "c.yaml"), str(run), f"{place}/[ab]*"]
        done = subprocess.run(
            [*command, str(tmp_path / "out"), *bad],
            env={**os.environ, **variables}, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
    assert done.stdout.splitlines()[-1:] == ["[0, 0, 2, 2, 2]"], done.stderr
    result = json.loads((tmp_path / "runs" / "prepared" / "prepare.json").read_text())
    assert result["train"]["sentences"] == 31
    table = pq.read_table(tmp_path / "out")
    assert table["id"].to_pylist() == list(range(30))
    assert [" ".join(words) for words in table["words"].to_pylist()] == lines
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "data/none.jsonl: no object matches" in errors[0]
    missing = "no such repository, or one that is not open to all; correct the name, or set HF_TOKEN"
    assert all(line.endswith(missing) for line in errors[1:]) and len(errors) == 3
