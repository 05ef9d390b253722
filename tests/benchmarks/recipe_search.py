"""Is there a better recipe for the small biLM? A sweep for each optimizer, then the best recipes with several seeds.

    python tests/benchmarks/recipe_search.py CORPUS OUT [--trials 24] [--positions 480000] [--finalists 3]
        [--seeds 1 2 3] [--final 1920000] [--seconds 962] [--precision bf16]

CORPUS is a folder with train-*.txt, valid.txt and vocab.txt. The sweeps vary optimizer, schedule, rates, places of
dropout, streams and reset (`recipe_search.yaml`, and `SPACES` below) in short runs of `--positions`. The finalists are
the best recipes over all sweeps; each is trained with every seed for `--final` positions, and once more with the first
seed for `--seconds` on this machine (bilm-tf takes 962 s for its 3,000 steps on two cores at 1,995 positions/s).

The first 3,000 lines of valid.txt are what the last table reports, as in the README; what is chosen is chosen on the
rest. A run that is there is not made again, so the command can be repeated after a stop. OUT/table.json has the rows.
On two cores the defaults take some 12 hours; `--trials 2 --positions 6400 --final 12800 --seconds 5` tries it out.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

BASE = Path(__file__).with_suffix(".yaml")
REPORTED_LINES = 3000
SPACES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "adagrad": (
        {"lr": 0.2},
        {
            "optim.lr": {"loguniform": [0.05, 0.8]},
            "optim.schedule.kind": {"choice": ["constant", "linear", "cosine"]},
            "optim.initial_accumulator": {"choice": [0.1, 1.0]},
        },
    ),
    "adamw": (
        {"lr": 0.002, "table_lr": 0.2},
        {
            "optim.lr": {"loguniform": [0.0005, 0.01]},
            "optim.table_lr": {"loguniform": [0.05, 0.8]},
            "optim.schedule.kind": {"choice": ["linear", "cosine"]},
            "optim.schedule.warmup_steps": {"choice": [0, 100]},
        },
    ),
    "sgd": (
        {"lr": 0.5},
        {
            "optim.lr": {"loguniform": [0.05, 2.0]},
            "optim.schedule.kind": {"choice": ["constant", "linear", "plateau"]},
            "softmax.negatives": {"choice": [4096]},
        },
    ),
}
"""By the optimizer: its settings in trial 0, and what is varied beside what recipe_search.yaml varies."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("corpus", type=Path, metavar="CORPUS")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--optimizers", nargs="+", choices=SPACES, default=list(SPACES))
    parser.add_argument("--trials", type=int, default=24, help="of each optimizer")
    parser.add_argument("--positions", type=int, default=480_000)
    parser.add_argument("--finalists", type=int, default=3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--final", type=int, default=1_920_000)
    parser.add_argument("--seconds", type=float, default=962.0)
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16", help="fp32 where bf16 is slow")
    arguments = parser.parse_args(argv)
    arguments.out.mkdir(parents=True, exist_ok=True)
    data = texts(arguments.corpus, arguments.out)
    trials = [trial for name in arguments.optimizers for trial in search(arguments, data, name)]
    trials.sort(key=lambda trial: float(trial["best_perplexity"]))
    rows = []
    for place, trial in enumerate(trials[: arguments.finalists], start=1):
        recipe = {**trial["values"], "optim.name": trial["optimizer"]}
        print(json.dumps({"finalist": place, "short_run": trial["best_perplexity"], "recipe": recipe}), flush=True)
        for seed in arguments.seeds:
            rows.append(train(arguments, data, recipe, f"final-{place}-seed-{seed}", seed, arguments.final))
        for_time = int(rows[-len(arguments.seeds)]["positions_per_second"] * arguments.seconds)
        rows.append(train(arguments, data, recipe, f"final-{place}-time", arguments.seeds[0], for_time))
    (arguments.out / "table.json").write_text(json.dumps(rows, indent=1), "utf-8")
    return 0


def texts(corpus: Path, out: Path) -> dict[str, Any]:
    """Cut the held-out text in two; return the settings of `data`."""
    lines = (corpus / "valid.txt").read_text("utf-8").splitlines(keepends=True)
    reported, chosen_on = out / "reported.txt", out / "chosen-on.txt"
    reported.write_text("".join(lines[:REPORTED_LINES]), "utf-8")
    chosen_on.write_text("".join(lines[REPORTED_LINES:]), "utf-8")
    return {
        "train": str(corpus.absolute() / "train-*.txt"),
        "valid": str(chosen_on.absolute()),
        "vocab": str(corpus.absolute() / "vocab.txt"),
    }


def search(arguments: argparse.Namespace, data: dict[str, Any], optimizer: str) -> list[dict[str, Any]]:
    """Return the trials of an optimizer's sweep that were measured, each with its values and perplexity."""
    settings, space = SPACES[optimizer]
    values = yaml.safe_load(BASE.read_text("utf-8"))
    name = f"search-{optimizer}"
    values["run"] = {"name": name, "storage_path": str(arguments.out.absolute() / "runs"), "export": False}
    values["data"] |= data
    values["optim"] |= {"name": optimizer, **settings}
    every = f"{max(1, arguments.positions // 3)} positions"
    values["train"] |= {"duration": f"{arguments.positions} positions", "validate_every": every}
    values["train"]["precision"] = arguments.precision
    values["train"]["checkpoint_every"] = f"{arguments.positions} positions"
    values["sweep"]["trials"] = arguments.trials
    values["sweep"]["space"] |= space
    file = arguments.out / f"{name}.yaml"
    file.write_text(yaml.safe_dump(values, sort_keys=False), "utf-8")
    folder = arguments.out / "runs" / name
    if not (folder / "results.json").is_file():
        command("sweep", [str(file), *(["--resume"] if folder.is_dir() else [])], arguments.out / f"{name}.log")
    rows = json.loads((folder / "results.json").read_text("utf-8"))["trials"]
    return [{**row, "optimizer": optimizer} for row in rows if row["best_perplexity"] is not None]


def train(
    arguments: argparse.Namespace, data: dict[str, Any], recipe: dict[str, Any], name: str, seed: int, positions: int
) -> dict[str, Any]:
    """Train a recipe as a run of `pretrain`; return its row of the table, which is printed."""
    runs = arguments.out.absolute() / "runs"
    values = yaml.safe_load(BASE.read_text("utf-8"))
    del values["sweep"]
    values["run"] = {"name": name, "storage_path": str(runs), "seed": seed, "export": False}
    values["data"] |= {**data, "test": str(arguments.out.absolute() / "reported.txt")}
    values["train"] |= {"duration": f"{positions} positions", "validate_every": f"{max(1, positions // 10)} positions"}
    values["train"]["checkpoint_every"] = f"{max(1, positions // 3)} positions"
    values["train"]["precision"] = arguments.precision
    file = arguments.out / f"{name}.yaml"
    file.write_text(yaml.safe_dump(values, sort_keys=False), "utf-8")
    settings = [f"{key}={json.dumps(value)}" for key, value in recipe.items() if value is not None]
    result = runs / name / "result.json"
    if not result.is_file():
        more = ["--resume"] if (runs / name).is_dir() else []
        command("pretrain", [str(file), *settings, *more], arguments.out / f"{name}.log")
    found = json.loads(result.read_text("utf-8"))
    row = {
        "run": name,
        "seed": seed,
        "positions": found["positions"],
        "seconds": round(found["seconds"], 1),
        "positions_per_second": found["positions"] / found["seconds"],
        "held_out_perplexity": found["evaluation"]["perplexity"],
        "chosen_on_perplexity": found["best_perplexity"],
        "recipe": recipe,
    }
    print(json.dumps(row), flush=True)
    return row


def command(verb: str, given: Sequence[str], log: Path) -> None:
    """Run a command of the package; its output goes to `log`."""
    with open(log, "ab") as file:
        subprocess.run([sys.executable, "-m", f"elmo_ray.{verb}", *given], stdout=file, stderr=file, check=True)


if __name__ == "__main__":
    sys.exit(main())
