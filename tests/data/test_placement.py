"""Where text is encoded: a node without free CPUs beside its workers gets its blocks from a node that only encodes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.ray_clusters import NO_DASHBOARD
from helpers.tiny_runs import sentences, write_corpus

from elmo_ray.data.corpus import Corpus
from elmo_ray.data.scan import index_shard
from elmo_ray.data.vocabulary import Vocabulary

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def encode_all(index: str, words: str, sha256: str) -> int:
    from elmo_ray.data.ray_source import ray_source

    source = ray_source(Corpus.load(index).blocks(), words, sha256, max_characters=16, group_bytes=1 << 16)
    try:
        return sum(block.positions for block in source)
    finally:
        source.close()


def main(index: str, words: str) -> None:
    """A process of its own: the session's Ray is another cluster."""
    import ray
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 0, "object_store_memory": 100_000_000, **NO_DASHBOARD}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        # one worker takes all CPUs of its node, as cluster.cpus_per_worker can say
        cluster.add_node(num_cpus=1, resources={"worker": 1}, object_store_memory=100_000_000)
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        worker = ray.remote(encode_all).options(num_cpus=1, resources={"worker": 1})
        result = worker.remote(index, words, Vocabulary.read(words).sha256)
        waiting = ray.wait([result], timeout=15)[1]
        cluster.add_node(num_cpus=1, object_store_memory=100_000_000)
        print(len(waiting), ray.get(result, timeout=90))
    finally:
        ray.shutdown()
        cluster.shutdown()


def test_a_node_that_only_encodes(tmp_path: Path) -> None:
    _, words = write_corpus(tmp_path, [10])
    text = tmp_path / "text.txt"
    text.write_text("".join(line + "\n" for line in sentences(3000)), encoding="utf-8")
    corpus = Corpus.from_shards([index_shard(str(text), 4096)])
    corpus.save(tmp_path / "text.npz")
    environment = {**os.environ, "RAY_worker_niceness": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("RAY_ADDRESS", None)
    command = [sys.executable, __file__, str(tmp_path / "text.npz"), str(words)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    waited, positions = map(int, done.stdout.split()[-2:])
    assert waited == 1, "there was no CPU to encode on"
    assert positions == corpus.positions


if __name__ == "__main__":
    main(*sys.argv[1:])
