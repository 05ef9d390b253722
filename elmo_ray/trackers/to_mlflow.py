"""A run in MLflow. MLFLOW_TRACKING_URI is its server, MLFLOW_EXPERIMENT_NAME the experiment (elmo_ray)."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from elmo_ray import __version__
from elmo_ray.errors import DataError
from elmo_ray.trackers.tracker import EVALUATION_COLUMNS, Memory, evaluation_rows, numbers, without_secrets
from elmo_ray.training.metrics import Record, read_metrics

_KEY_TAG = "elmo_ray.key"
_TABLE = "evaluation.json"
_STATES = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
_PARAMETERS_AT_ONCE, _LONGEST_VALUE = 100, 500


class MlflowTracker:
    """Tracker of the MLflow server, through its client."""

    def __init__(self, run_dir: Path, name: str) -> None:
        # MLflow's own patience is minutes for a request, and a Sender tries again by itself
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
        from mlflow import MlflowClient

        self.address = without_secrets(os.environ["MLFLOW_TRACKING_URI"])
        self._run_dir, self._name = run_dir, name
        self._client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
        self._run = ""

    def open(self, memory: Memory) -> str:
        self._run = memory.run = self._find(memory) or self._make(memory)
        # the server decides: a request that timed out may have been done, or a backup of it brought back
        memory.steps = {}
        for kind in ("train", "valid"):
            if history := self._client.get_metric_history(self._run, f"{kind}/positions"):
                memory.steps[kind] = max(metric.step for metric in history)
        experiment = self._client.get_run(self._run).info.experiment_id
        return f"{self.address.rstrip('/')}/#/experiments/{experiment}/runs/{self._run}"

    def _find(self, memory: Memory) -> str | None:
        from mlflow import MlflowException

        if memory.run is not None:
            try:
                run = self._client.get_run(memory.run)
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                memory.files = {}  # the server has lost its runs and gets this one anew
            else:
                if run.info.lifecycle_stage != "active":
                    raise ValueError(f"run {memory.run} is deleted there; restore it, or choose another run.name")
                self._client.update_run(memory.run, status="RUNNING")
                return memory.run
        # it may have been made by a request whose answer was lost
        found = self._client.search_runs([self._experiment()], f"tags.`{_KEY_TAG}` = '{memory.key}'", max_results=1)
        return str(found[0].info.run_id) if found else None

    def _make(self, memory: Memory) -> str:
        tags = {_KEY_TAG: memory.key, "elmo_ray.version": __version__}
        begin, _ = self._times()
        return str(self._client.create_run(self._experiment(), begin, tags, self._name).info.run_id)

    def _times(self) -> tuple[int | None, int | None]:
        """Return when the run began and when it last recorded something, in milliseconds; None before its start.

        The run may be sent long after it was made, and MLflow shows the time between the two.
        """
        try:
            times = [record["time"] for record in read_metrics(self._run_dir)]
        except DataError:
            return None, None
        return (round(min(times) * 1000), round(max(times) * 1000)) if times else (None, None)

    def _experiment(self) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "elmo_ray")
        known = self._client.get_experiment_by_name(name)
        return str(known.experiment_id if known is not None else self._client.create_experiment(name))

    def write(self, records: Sequence[Record]) -> None:
        from mlflow.entities import Metric

        # one request is one transaction of the server; a number that it has with this step and time is not added again
        self._client.log_batch(
            self._run,
            metrics=[
                Metric(f"{record['kind']}/{name}", value, round(record["time"] * 1000), record["step"])
                for record in records
                for name, value in numbers(record).items()
            ],
        )

    def write_settings(self, settings: Mapping[str, Any]) -> None:
        from mlflow.entities import Param, RunTag

        # a parameter of MLflow never changes: a setting that a resumed run has changed becomes a tag beside it
        known = self._client.get_run(self._run).data.params
        values = {key: _text(value) for key, value in settings.items()}
        new = [Param(key, value) for key, value in values.items() if key not in known]
        for first in range(0, len(new), _PARAMETERS_AT_ONCE):
            self._client.log_batch(self._run, params=new[first : first + _PARAMETERS_AT_ONCE])
        changed = [RunTag(f"now {key}", text) for key, text in values.items() if known.get(key, text) != text]
        if changed:
            self._client.log_batch(self._run, tags=changed)

    def write_result(self, result: Mapping[str, Any]) -> None:
        from mlflow.entities import Metric

        evaluation, step = result.get("evaluation"), int(result.get("steps", 0))
        if not isinstance(evaluation, dict):
            return
        # MLflow's page shows files of this form and tag as tables; its log_table would add to a table that is there
        table = {"columns": list(EVALUATION_COLUMNS), "data": evaluation_rows(evaluation)}
        self._client.log_dict(self._run, table, _TABLE)
        tag = json.dumps([{"path": _TABLE, "type": "table"}])
        self._client.set_tag(self._run, "mlflow.loggedArtifacts", tag)
        measured = numbers({**evaluation, "unigram_perplexity": result.get("unigram_perplexity")})
        stamp = round((self._client.get_run(self._run).info.start_time or 0) + 1)
        metrics = [Metric(f"test/{name}", value, stamp, step) for name, value in measured.items()]
        self._client.log_batch(self._run, metrics=metrics)

    def write_file(self, path: Path) -> None:
        self._client.log_artifact(self._run, str(path))

    def close(self, outcome: str) -> None:
        self._client.set_terminated(self._run, _STATES[outcome], self._times()[1])


def _text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 3] + "..."
