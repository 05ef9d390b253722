"""Hosts of the workers: what they must have in common, compared before training begins.

A host that lacks a file, or has another version of a package, would otherwise fail later, in other words, or not at
all: with another result.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import socket
import tempfile
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from elmo_ray import storage
from elmo_ray.data.corpus import Corpus
from elmo_ray.data.vocabulary import Vocabulary
from elmo_ray.errors import ConfigError, ElmoRayError, one_line

LATEST_CLOCK_S = 60.0
"""Seconds by which the clocks of two hosts may differ."""

_SMALLEST_DISK = 1 << 30
_SHARED_MEMORY = "/dev/shm"


class Facts(NamedTuple):
    """Facts that a host tells of itself. problem: a line about what it does not see, or None. versions: by name. bf16:
    whether its CPU has bf16 products. clock: seconds since 1970. warnings: lines."""

    host: str
    problem: str | None
    versions: dict[str, str]
    bf16: bool
    clock: float
    warnings: list[str]


def versions() -> dict[str, str]:
    """Return the versions of what must be equal on all hosts."""
    import ray

    import elmo_ray

    return {
        "elmo_ray": elmo_ray.__version__,
        "torch": torch.__version__,
        "ray": ray.__version__,
        "python": platform.python_version(),
    }


class RunFiles(NamedTuple):
    """Paths or URIs of what all hosts must see: the run's folder, the index of the text, and the vocabulary."""

    run_dir: str
    corpus_path: str
    vocabulary_path: str

    def marks(self) -> dict[str, str]:
        """Return a mark of the contents of each, by its path, and check that the text is what was indexed.

        Raises OSError or DataError where a file is not there.
        """
        corpus = Corpus.load(self.corpus_path)
        corpus.check_files()
        if not storage.exists(self.run_dir):
            raise FileNotFoundError(f"{self.run_dir}: no such folder")
        settings = storage.join(self.run_dir, "config.yaml")
        found = {settings: hashlib.sha256(storage.read_bytes(settings)).hexdigest()} if storage.exists(settings) else {}
        vocabulary = Vocabulary.read(self.vocabulary_path).sha256
        return {**found, self.corpus_path: corpus.fingerprint, self.vocabulary_path: vocabulary}


def facts(node: str, files: RunFiles, expected: dict[str, str]) -> Facts:
    """Return the facts of this host.

    node: the address by which Ray knows it. expected: `files.marks()` of the driver.
    """
    host = f"{socket.gethostname()} ({node})"
    problem = None
    try:
        found = files.marks()
        others = [path for path, mark in expected.items() if found.get(path) != mark]
        if others:
            problem = f"{others[0]}: host {host} sees another file there than the driver"
    except (OSError, ElmoRayError) as error:
        problem = f"host {host} does not see what the driver sees: {one_line(str(error))}"
    if problem is not None:
        problem += "; put the run, the text and the vocabulary on a file system that all hosts share, or in a store"
    elif not storage.is_uri(files.run_dir):
        problem = _write_problem(host, files.run_dir)
    bf16 = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return Facts(host, problem, versions(), bf16, time.time(), _warnings(host))


def _write_problem(host: str, run_dir: str) -> str | None:
    """Return what is wrong if this process cannot write a file to the run's folder."""
    try:
        with tempfile.TemporaryFile(dir=run_dir) as file:
            file.write(b"elmo_ray")
    except OSError as error:
        return (
            f"host {host} cannot write to {run_dir}: {error.strerror}; each worker writes its part of a checkpoint "
            "there: mount it for writing, and let the user that runs Ray write to it"
        )
    return None


def compare(found: Sequence[Facts], here: dict[str, str], asked_at: float, answered_at: float) -> list[str]:
    """Return warnings of hosts that differ. Raises ConfigError, naming a host, where training cannot begin.

    here: the driver's versions. asked_at, answered_at: the time here, in seconds since 1970, between which the hosts
    answered.
    """
    warnings: list[str] = []
    for each in found:
        if each.problem is not None:
            raise ConfigError(each.problem)
        for name, version in each.versions.items():
            if version != here[name]:
                raise ConfigError(
                    f"host {each.host} has {name} {version}, the driver has {here[name]}; install the same versions on "
                    "all hosts"
                )
    with_bf16 = [each.host for each in found if each.bf16]
    without = [each.host for each in found if not each.bf16]
    if with_bf16 and without:
        warnings.append(
            f"host {without[0]} has a CPU without bf16 products and host {with_bf16[0]} one with them: with "
            "train.precision=bf16 the slowest host sets the pace, and a run resumed on others gives other bits"
        )
    for each in found:
        late = asked_at - each.clock if each.clock < asked_at else each.clock - answered_at
        if late > LATEST_CLOCK_S:
            side = "behind" if each.clock < asked_at else "ahead of"
            warnings.append(
                f"the clock of host {each.host} is {late:.0f} s {side} that of the run's controller: times in logs and "
                "metrics will not agree; set it by NTP"
            )
        warnings.extend(each.warnings)
    return list(dict.fromkeys(warnings))


def _warnings(host: str) -> list[str]:
    import ray

    warnings = []
    context: Any = ray.get_runtime_context()
    mine: dict[str, Any] = next((n for n in ray.nodes() if n["NodeID"] == context.get_node_id()), {"Resources": {}})
    store = mine["Resources"].get("object_store_memory", 0.0)
    if os.path.isdir(_SHARED_MEMORY) and (size := shutil.disk_usage(_SHARED_MEMORY).total) < store:
        warnings.append(
            f"{_SHARED_MEMORY} of host {host} has {size / 1e6:.0f} MB, less than Ray's object store of "
            f"{store / 1e6:.0f} MB: Ray then uses the disk, which is slow; give the container more (docker run "
            "--shm-size)"
        )
    temporary = os.environ.get("RAY_TMPDIR") or "/tmp"
    if os.path.isdir(temporary):
        usage = shutil.disk_usage(temporary)
        if usage.free < _SMALLEST_DISK or usage.free < 0.05 * usage.total:
            warnings.append(
                f"{temporary} of host {host} has {usage.free / 1e9:.1f} GB free: Ray stores nothing more where 95 % of "
                "the disk is used; free some of it, or start Ray with --temp-dir on another disk"
            )
    return warnings
