"""Trackers: MLflow and Weights & Biases show the metrics, settings and results of a run.

A process for each tracker stands beside the driver and follows the files of the run (`beside`, `__main__`). So training
does not wait for a tracker, and goes on without it if its library fails. What has been sent is remembered in
RUN/trackers/NAME.json (`sender`); a resumed run goes on in the same run of the tracker. `report RUN to=NAME` sends what
is missing. TensorBoard needs none of this: it reads files that worker 0 writes (`training.metrics`).
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable

from elmo_ray.errors import ConfigError


def check_trackers(names: Iterable[str] | None, key: str = "run.report_to") -> None:
    """Raise ConfigError if the package of a tracker is not installed here, or its address is not known.

    key: the setting that names the trackers. None: they are not named, and TensorBoard is used where it is installed.
    """
    for name in names or ():
        spec = importlib.util.find_spec(name)
        # a folder of that name in the working folder, as W&B makes one, is found as a package without a file
        if spec is None or spec.origin is None:
            raise ConfigError(f"{key}={name}: {name} is not installed: pip install 'elmo-ray[{name}]'")
        if name == "mlflow" and not os.environ.get("MLFLOW_TRACKING_URI"):
            # without it MLflow writes to the working folder
            raise ConfigError(f"{key}=mlflow: set MLFLOW_TRACKING_URI to the server, such as http://localhost:5000")
