"""An object store on a test host: the S3 server of `helpers.faulty_s3`, known to the others by the environment."""

from __future__ import annotations

import sys

from helpers.hosts import REPOSITORY, Host, wait_for

BUCKET = "s3://elmo-test"
_KEY = {
    "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}  # fmt: skip


class StoreHost:
    """The server on a host of its own. held: the file that it makes when it holds a request."""

    def __init__(self, host: Host) -> None:
        self.host, self.control = host, host.hosts.folder / "s3"
        self.held, ready = (host.hosts.folder / f"s3.{name}" for name in ("held", "ready"))
        self.tell("well")
        self.environment = {**_KEY, "AWS_ENDPOINT_URL": f"http://{host.address}:9000"}
        host.hosts.environment |= self.environment
        host.hosts.environment["PYTHONPATH"] += f":{REPOSITORY / 'tests'}"
        host.start(sys.executable, "-m", "helpers.faulty_s3", host.address, "9000", str(self.control))
        wait_for(ready.exists, f"the server: {host.log}", 120)

    def tell(self, word: str) -> None:
        """Change how the server behaves, see `helpers.faulty_s3`."""
        new = self.control.with_name("s3.new")
        new.write_text(word)
        new.rename(self.control)  # the server never reads half a word
