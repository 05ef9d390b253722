"""Corpora, runs and checkpoints in an object store: moto's S3 server on loopback, and s3fs as it is."""

from __future__ import annotations

import gzip
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from helpers.places import BUCKET, s3_server
from helpers.tiny_runs import everything, newest, progress_of, records, sentences, tiny_values

from elmo_ray import evaluate, export, finetune, pretrain, report, storage
from elmo_ray.checkpoints.read import newest_checkpoint, open_checkpoint
from elmo_ray.checkpoints.write import prune
from elmo_ray.errors import CheckpointError, ConfigError, DataError
from elmo_ray.storage import store_lock


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    yield from s3_server()


@pytest.fixture(scope="module")
def text(bucket: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus on the disk; the same under the bucket's corpus/, one of its files compressed."""
    folder = tmp_path_factory.mktemp("text")
    for name, count in {"train-0": 500, "train-1": 300, "valid": 60}.items():
        data = "".join(line + "\n" for line in sentences(count, seed=count)).encode()
        (folder / f"{name}.txt").write_bytes(data)
        packed = name == "train-1"
        storage.write_bytes(
            f"{bucket}/corpus/{name}.txt{'.gz' * packed}", gzip.compress(data, mtime=0) if packed else data
        )
    return folder


def config_file(folder: Path, place: str, text: str, **changes: object) -> Path:
    settings = {
        "run__name": "run",
        "run__storage_path": place,
        "data__train": f"{text}/train-*",
        "data__valid": f"{text}/valid.txt",
        "data__block_bytes": 4096,
        "train__duration": "60 steps",
        "train__validate_every": "20 steps",
        "train__checkpoint_every": "10 steps",
    }
    values = tiny_values(**{**settings, **changes})
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_a_store_is_read_and_written(bucket: str, tmp_path: Path) -> None:
    place = f"{bucket}/unit"
    storage.write_bytes(f"{place}/a/one.bin", bytes(range(200)))
    assert storage.read_range(f"{place}/a/one.bin", 10, 20) == bytes(range(10, 20))
    assert storage.read_range(f"{place}/a/one.bin", 190, 300) == bytes(range(190, 200))
    assert storage.read_range(f"{place}/a/one.bin", 200, 300) == b""
    with storage.open_read(f"{place}/a/one.bin") as file:
        file.seek(150)
        assert file.read(10) == bytes(range(150, 160)) and file.name == f"{place}/a/one.bin"
        before = storage.opened_status(file)
    storage.write_bytes(f"{place}/a/one.bin", bytes(200))
    after = storage.status(f"{place}/a/one.bin")
    assert before.st_size == after.st_size == 200 and before.st_mtime_ns != after.st_mtime_ns
    with pytest.raises(FileExistsError):
        storage.write_bytes(f"{place}/a/one.bin", b"", only_new=True)
    storage.write_bytes(f"{place}/b[1].txt", b"x")
    assert storage.listing(place).keys() == {"a/one.bin", "b[1].txt"} and storage.folders(place) == ["a"]
    assert storage.matches(f"{place}/*/*.bin") == [f"{place}/a/one.bin"]
    storage.download(f"{place}/a/one.bin", tmp_path / "sub" / "one")
    assert (tmp_path / "sub" / "one").read_bytes() == bytes(200)
    storage.remove(f"{place}/a/one.bin")
    storage.remove(f"{place}/a/one.bin")
    assert not storage.exists(f"{place}/a/one.bin")
    assert storage.absolute("file:///a/b") == "/a/b" and storage.absolute(f"{place}/") == place


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ("s3://no-such-bucket/*.txt", "no object matches|no such object or bucket"),
        ("s3://", "no URI of a store"),
        ("s4://a/b.txt", "s4"),
        (f"{BUCKET}/corpus/none-*.txt", "no object matches"),
        ("az://a/b.txt", "is not installed"),
    ],
)
def test_a_wrong_uri_is_one_line(
    bucket: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], train: str, message: str
) -> None:
    path = config_file(tmp_path, str(tmp_path / "runs"), "unused")
    assert pretrain.main([str(path), f"data.train={train}"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len([line for line in lines if line.startswith("error:")]) == 1
    assert re.search(message, lines[-1]) and "data.train" in lines[-1], lines
    assert not (tmp_path / "runs" / "run").exists()


def test_wrong_credentials_are_one_line(
    bucket: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = config_file(tmp_path, f"{bucket}/denied", str(text))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    environment |= {"AWS_EC2_METADATA_DISABLED": "true", "HOME": str(tmp_path)}
    command = [sys.executable, "-m", "elmo_ray.pretrain", str(path)]
    # no credentials at all: nothing is asked of any server
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: ") and "redentials" in done.stderr


@pytest.mark.slow
def test_a_run_in_a_store_is_killed_and_goes_on(
    bucket: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Text, index, run and checkpoints in the store; another process, which has none of the first one's files, goes on,
    and ends in the bits of a run on plain paths."""
    there = config_file(tmp_path / "there", f"{bucket}/runs", f"{bucket}/corpus", run__export=True)
    (tmp_path / "tmp").mkdir()
    command = [sys.executable, "-m", "elmo_ray.pretrain", str(there), "train.duration=1000000 steps"]
    with open(tmp_path / "log.txt", "wb") as log:
        first = subprocess.Popen(
            command, env={**os.environ, "TMPDIR": str(tmp_path / "tmp")}, stdout=log, stderr=subprocess.STDOUT
        )
    deadline = time.monotonic() + 300
    while len(storage.folders(f"{bucket}/runs/run/checkpoints")) < 3:
        assert first.poll() is None and time.monotonic() < deadline, (tmp_path / "log.txt").read_text()
        time.sleep(0.1)
    first.kill()
    first.wait()
    kept = storage.folders(f"{bucket}/runs/run/checkpoints")
    whole = [n for n in kept if storage.exists(f"{bucket}/runs/run/checkpoints/{n}/manifest.json")]
    steps = 10 * (int(max(whole).split("-")[1]) // 10) + 20

    monkeypatch.setattr(store_lock, "VALID_S", 1.0)
    end = [f"train.duration={steps} steps"]
    assert pretrain.main([str(there), *end]) == 2, "a used name needs --resume"
    capsys.readouterr()
    assert pretrain.main([str(there), *end, "--resume", "run.seed=9"]) == 2
    assert "run.seed is 9, but step-" in capsys.readouterr().err
    assert pretrain.main([str(there), *end, "--resume"]) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    assert f"run: {bucket}/runs/run   export: {bucket}/runs/run/export" in out

    here = config_file(tmp_path / "here", str(tmp_path / "runs"), str(text), run__export=False)
    assert pretrain.main([str(here), *end]) == 0
    plain = newest(tmp_path / "runs" / "run")
    folder = f"{bucket}/runs/run"
    stored = newest_checkpoint(f"{folder}/checkpoints")
    assert stored is not None and stored.step == steps
    ours, theirs = everything(stored), everything(plain)
    assert [name for name in theirs if not bool((ours[name] == theirs[name]).all())] == []
    assert progress_of(stored) == progress_of(plain)
    copy = tmp_path / "copy"
    for name in storage.listing(f"{folder}/metrics"):
        storage.download(f"{folder}/metrics/{name}", copy / "metrics" / name)
    ours, theirs = ([{k: v for k, v in r.items() if k != "total_steps"} for r in records(p)]
                    for p in (copy, tmp_path / "runs" / "run"))  # fmt: skip
    assert ours == theirs
    names = set(storage.listing(folder))
    assert {"config.yaml", "vocab.txt", "train.npz", "result.json", "curve.png", "export/weights.hdf5"} <= names
    assert len(storage.folders(f"{folder}/checkpoints")) == 3
    assert not storage.exists(f"{bucket}/runs/.run.lock") and not storage.exists(f"{folder}/stop")
    assert any(name.startswith("text/train-1") for name in storage.listing(f"{bucket}/runs/prepared"))

    # a second start finds everything prepared; the other verbs take the URI
    assert pretrain.main([str(there), *end, "--resume"]) == 0
    assert "finished at step" in capsys.readouterr().out
    for n, (place, corpus) in enumerate([(folder, f"{bucket}/corpus"), (f"{tmp_path}/runs/run", text)]):
        how = [f"run.storage_path={tmp_path}/runs", "evaluate.streams=2", "cluster.workers=0"]
        assert evaluate.main([place, f"data.test={corpus}/valid.txt", *how, "--json", str(tmp_path / f"{n}.json")]) == 0
    first_values, second_values = (yaml.safe_load((tmp_path / f"{n}.json").read_text()) for n in range(2))
    assert first_values["perplexity"] == second_values["perplexity"]
    assert export.main([folder, f"{bucket}/weights", "cluster.workers=0"]) == 0
    assert storage.read_bytes(f"{bucket}/weights/weights.hdf5") == storage.read_bytes(f"{folder}/export/weights.hdf5")
    assert export.main([f"{bucket}/weights", str(tmp_path / "again"), "cluster.workers=0"]) == 0
    tuned = tmp_path / "tuned.yaml"
    tuned.write_text(
        "run: {name: tuned, export: false}\ncluster: {workers: 0}\ntrain: {duration: 4 steps, unroll: 6}\n"
        "data: {streams: 4}\nsoftmax: {negatives: 20}\n"
    )
    texts = [f"data.train={bucket}/corpus/train-0*", f"data.valid={bucket}/corpus/valid.txt"]
    tune = [str(tuned), f"init.from={folder}", f"run.storage_path={bucket}/tuned", *texts]
    assert finetune.main(tune) == 0, capsys.readouterr().err
    assert finetune.main([*tune, "train.duration=6 steps", "--resume"]) == 0, capsys.readouterr().err
    again = newest_checkpoint(f"{bucket}/tuned/tuned/checkpoints")
    assert again is not None and again.step == 6

    assert report.main([folder]) == 0 and "report.html" in storage.listing(folder)


@pytest.mark.slow
def test_damage_in_a_store_is_found_and_walked_past(bucket: str, text: Path, tmp_path: Path) -> None:
    path = config_file(tmp_path, f"{bucket}/damage", str(text), run__export=False, train__duration="30 steps")
    assert pretrain.main([str(path)]) == 0
    folder = f"{bucket}/damage/run/checkpoints"
    names = storage.folders(folder)
    assert len(names) == 3
    victim = f"{folder}/{names[-1]}/model.safetensors"
    data = bytearray(storage.read_bytes(victim))
    data[len(data) // 2] ^= 1
    storage.write_bytes(victim, bytes(data))
    damaged: list = []
    found = newest_checkpoint(folder, damaged=damaged)
    assert found is not None and found.place == f"{folder}/{names[-2]}" and damaged == [f"{folder}/{names[-1]}"]
    storage.remove(f"{folder}/{names[-2]}/manifest.json")  # never finished
    found = newest_checkpoint(folder)
    assert found is not None and found.step == 10
    prune(folder, 1, damaged=damaged)
    assert storage.folders(folder) == names, "what is newer than the newest whole one may be being written"
    with pytest.raises(CheckpointError, match="no manifest"):
        open_checkpoint(f"{folder}/nothing")
    with pytest.raises(DataError):
        report.RunCurve.read(f"{bucket}/none")


def test_two_starts_of_a_run_in_a_store(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_lock, "RENEW_S", 0.2)
    monkeypatch.setattr(store_lock, "VALID_S", 2.0)
    place = f"{bucket}/locks/run"
    with store_lock.store_lock(place):
        with pytest.raises(ConfigError, match="another process is running it"):
            with store_lock.store_lock(place):
                pass
    storage.write_bytes(f"{bucket}/locks/.run.lock", b"of one that was killed")
    start = time.monotonic()
    with store_lock.store_lock(place):
        assert time.monotonic() - start >= 2.0
    assert not storage.exists(f"{bucket}/locks/.run.lock")


@pytest.mark.ray
@pytest.mark.slow
def test_two_workers_share_nothing_but_the_store(bucket: str, text: Path, tmp_path: Path) -> None:
    """On Ray; the driver sees what the workers record by the store alone, and SIGTERM reaches them by it."""
    path = config_file(
        tmp_path, f"{bucket}/ray", f"{bucket}/corpus", run__export=False,
        cluster={"workers": 2, "cpus_per_worker": 0.5, "data_cpus": 0.25},
    )  # fmt: skip
    log = tmp_path / "log.txt"
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_worker_niceness": "0"}
    environment.pop("RAY_ADDRESS", None)
    command = [sys.executable, "-m", "elmo_ray.pretrain", str(path), "train.duration=1000000 steps"]
    with open(log, "wb") as output:
        driver = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 420
        while not (storage.folders(f"{bucket}/ray/run/checkpoints") and "positions/s" in log.read_text()):
            assert driver.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.3)
        driver.send_signal(signal.SIGTERM)
        assert driver.wait(90) == 0, log.read_text()
    finally:
        driver.kill()
    assert "go on with the same command and --resume" in log.read_text()
    last = newest_checkpoint(f"{bucket}/ray/run/checkpoints")
    assert last is not None and last.manifest["world"] == 2
    assert re.search(rf"stopped at step {last.step:,} of", log.read_text()), log.read_text()
