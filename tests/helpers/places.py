"""The same on plain paths and in an object store: what tests do to files behind the back of the program."""

from __future__ import annotations

import hashlib
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from elmo_ray import storage
from elmo_ray.checkpoints.stores import store_of

KINDS = ["folder", "store"]
"""Where checkpoints are: below a temporary folder, or in fsspec's object store in this process's memory."""

BUCKET = "s3://elmo-test"


def place_of(kind: str, folder: Path) -> str:
    """A place of this kind for a folder of pytest's, whose path is nobody else's."""
    return str(folder) if kind == "folder" else f"memory://{folder.as_posix().strip('/')}"


def contents(root: storage.Place) -> dict[str, str]:
    """Name -> sha256 of all files below a place."""
    if storage.is_uri(root):
        names = list(storage.listing(root))
    else:
        names = [path.relative_to(root).as_posix() for path in Path(root).rglob("*") if path.is_file()]
    return {name: hashlib.sha256(storage.read_bytes(storage.join(root, name))).hexdigest() for name in names}


def copy_tree(source: storage.Place, target: storage.Place) -> None:
    for name in contents(source):
        storage.write_bytes(storage.join(target, name), storage.read_bytes(storage.join(source, name)))


def remove(place: storage.Place) -> None:
    store_of(place).remove(str(place))


def s3_server() -> Iterator[str]:
    """A bucket of moto's S3 server, which only this machine reaches."""
    import logging

    import fsspec

    pytest.importorskip("s3fs")
    server_module = pytest.importorskip("moto.server")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        logging.getLogger("werkzeug").setLevel(logging.WARNING)
        server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
        server.start()
        host, port = server.get_host_and_port()
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        # moto's buckets outlive a server of the same process
        urllib.request.urlopen(f"http://{host}:{port}/moto-api/reset", data=b"", timeout=30).close()
        # fsspec keeps file systems by their arguments, and one of an earlier server has that one's address
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        fsspec.filesystem("s3").mkdir(BUCKET)
        yield BUCKET
        server.stop()
