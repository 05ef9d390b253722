"""A golden file of bilm-tf's training steps as inputs of our step."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from elmo_ray.checkpoints.bilm_tf.options import from_options
from elmo_ray.checkpoints.bilm_tf.variables import from_variables, to_variables
from elmo_ray.config import PretrainConfig
from elmo_ray.model.bilm import BiLM
from elmo_ray.training.step_input import StepInput


class Case:
    """A golden file as the inputs of our step."""

    def __init__(self, path: Path):
        self.options = json.loads(path.with_suffix(".options.json").read_text())
        with np.load(path) as file:
            self.golden = {key: file[key] for key in file.files}
        model, softmax = from_options(self.options, str(path))
        self.config = PretrainConfig.from_dict(
            {
                "model": model.to_dict(),
                "softmax": softmax.to_dict(),
                "data": {"streams": self.options["batch_size"], "train": "unused"},
                "train": {"unroll": self.options["unroll_steps"], "dropout": self.options["dropout"], "reset": "never"},
                "optim": {"lr": self.options.get("learning_rate", 0.2), "clip_norm": self.options["all_clip_norm_val"]},
            }
        )
        self.model = BiLM(model, softmax, self.options["n_tokens_vocab"])
        init = {k.removeprefix("init/"): v for k, v in self.golden.items() if k.startswith("init/")}
        assert sorted(to_variables(self.model, dict(self.model.named_parameters()))) == sorted(init), "variables differ"
        self.model.load_state_dict(from_variables(self.model, init, path.name))
        self.tolerance = 1e-4 if path.stem.endswith("_scaled") else 1e-5

    def batch(self, step: int, rank: int, world: int) -> StepInput:
        d, g = self.model.directions, self.golden
        ways = ["", "_reverse"][:d]
        rows = slice(rank * self.options["batch_size"], (rank + 1) * self.options["batch_size"])
        all_targets = np.stack([g[f"batch{step}/next_token_id{w}"] for w in ways]).astype(np.int64)
        targets = all_targets[:, rows]
        n = targets[0].size
        if self.model.char_cnn is not None:
            characters = np.stack([g[f"batch{step}/tokens_characters{w}"][rows] for w in ways])
            types, places = np.unique(characters.reshape(d * n, -1), axis=0, return_inverse=True)
        else:
            all_inputs = np.stack([g[f"batch{step}/token_ids{w}"] for w in ways]).astype(np.int64)
            types, places = np.unique(all_inputs[:, rows], return_inverse=True)
        result = StepInput(
            step,
            torch.from_numpy(types),
            ((len(types), types.shape[-1]),),
            torch.from_numpy(places.reshape(targets.shape)),
            torch.from_numpy(targets),
            torch.full((targets.shape[1],), targets.shape[2]),
            torch.zeros(targets.shape[1], dtype=torch.bool),
            n * world,
        )
        if self.config.softmax.kind == "sampled":
            place = f"step{step}/gpu{rank}/dir{{}}/"
            sampled = [[g[f"step{step}/gpu{r}/dir{i}/sampled_ids"] for i in range(d)] for r in range(world)]
            touched = [all_targets.ravel(), *(ids for one in sampled for ids in one)]
            if self.model.word_embedding is not None:
                if self.model.tied:
                    touched.append(all_inputs.ravel())
                else:
                    result.input_rows = torch.from_numpy(np.unique(all_inputs))
            vocabulary_rows = np.unique(np.concatenate(touched))
            result.rows = torch.from_numpy(vocabulary_rows)
            if self.model.word_embedding is not None:
                table = vocabulary_rows if self.model.tied else np.unique(all_inputs)
                result.types = torch.from_numpy(np.searchsorted(table, types))
            counts = np.stack([g[place.format(i) + "true_expected_count"].reshape(targets.shape[1:]) for i in range(d)])
            result.target_rows = torch.from_numpy(np.searchsorted(vocabulary_rows, targets))
            result.target_log_count = torch.from_numpy(np.log(counts))
            result.negative_rows = torch.from_numpy(np.searchsorted(vocabulary_rows, np.stack(sampled[rank])))
            result.negative_log_count = torch.from_numpy(
                np.log(np.stack([g[place.format(i) + "sampled_expected_count"] for i in range(d)]))
            )
        return result
