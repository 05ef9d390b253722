"""Wheels for a machine that has PyTorch and no network, some 50 MB, for `gpu_check.py` there. Not a benchmark itself.

    python tests/benchmarks/make_wheels.py [--into .whl] [--python 3.12] [--also PACKAGE ...]

Ray and the few packages that machines with PyTorch and the usual scientific ones lack, by pip, in the versions of
constraints.txt where it names them; PACKAGE is what else is missing there. Their dependencies do not come with them.
Ray's wheel is packed anew, without the folders that nothing here uses: Java, the dashboard's pages, RLlib, language
models. The folder is emptied of other wheels first.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

PACKAGES = (
    ["ray", "jsonschema", "jsonschema-specifications", "referencing", "rpds-py", "tensorboardX"]
    + ["pydantic", "pydantic-core", "annotated-types", "typing-inspection"]
    + ["plotext", "zstandard"]
)
"""Ray and what it needs, Pydantic and what it needs, and two more."""

PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")

LEFT_OUT = ("ray/jars/", "ray/dashboard/client/", "ray/rllib/", "ray/llm/")


def download(packages: list[str], python: str, folder: Path) -> None:
    options = ["--no-deps", "--only-binary=:all:", "--python-version", python, "--implementation", "cp"]
    for platform in PLATFORMS:
        options += ["--platform", platform]
    options += ["--constraint", str(ROOT / "constraints.txt"), "--dest", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", *options, *packages], check=True)


def packed_anew(wheel: Path, folder: Path, left_out: tuple[str, ...]) -> None:
    """The wheel without these folders, and without their files in its own list of files."""
    with (
        zipfile.ZipFile(wheel) as old,
        zipfile.ZipFile(folder / wheel.name, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as new,
    ):
        for member in old.infolist():
            if member.filename.startswith(left_out):
                continue
            content = old.read(member)
            if member.filename.endswith(".dist-info/RECORD"):
                lines = content.decode().splitlines(keepends=True)
                content = "".join(line for line in lines if not line.startswith(left_out)).encode()
            # by the old member, which says whether a file is a program
            new.writestr(member, content, zipfile.ZIP_DEFLATED, 9)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--into", type=Path, default=ROOT / ".whl", metavar="FOLDER")
    parser.add_argument("--python", default="3.12", help="version of Python there")
    parser.add_argument("--also", nargs="+", default=[], metavar="PACKAGE")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        download([*PACKAGES, *arguments.also], arguments.python, folder)
        arguments.into.mkdir(parents=True, exist_ok=True)
        for wheel in arguments.into.glob("*.whl"):
            wheel.unlink()
        for wheel in sorted(folder.glob("*.whl")):
            packed_anew(wheel, arguments.into, LEFT_OUT if wheel.name.startswith("ray-") else ())
    for wheel in sorted(arguments.into.glob("*.whl")):
        print(f"{wheel.stat().st_size / 1e6:7.2f} MB  {wheel.name}")


if __name__ == "__main__":
    main()
