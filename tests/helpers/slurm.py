"""A real Slurm on test hosts: munge, a controller on the first host, and a daemon on each."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from helpers.hosts import Host, Hosts, wait_for

_CGROUPS = """mount -t tmpfs tmpfs /sys/fs/cgroup
for c in freezer cpuset memory devices cpuacct cpu; do
    mkdir -p "/sys/fs/cgroup/$c" && mount -t cgroup -o "$c" none "/sys/fs/cgroup/$c" || true
done 2>/dev/null
exec "$@"
"""


def need_slurm() -> None:
    """Skip the test, with the reason, where Slurm is not installed."""
    for program in ("slurmctld", "slurmd", "munged"):
        if shutil.which(program) is None and not Path("/usr/sbin", program).exists():
            pytest.skip(f"{program} is not installed (Debian: apt-get install slurm-wlm munge)")


class Slurm:
    """Slurm of some hosts, in a folder of its own; it ends with the hosts. cpus: the number of CPUs of each host."""

    def __init__(self, hosts: Hosts, cpus: Sequence[int] = (2, 2), task_plugin: str = "task/none") -> None:
        self.hosts, self.folder = hosts, hosts.folder / "slurm"
        for name in ("state", "run", *(f"spool/{host.name}" for host in hosts.all)):
            (self.folder / name).mkdir(parents=True)
        head = hosts.all[0]
        nodes = "".join(
            f"NodeName={host.name} NodeAddr={host.address} CPUs={count} RealMemory=4000 State=UNKNOWN\n"
            for host, count in zip(hosts.all, cpus, strict=True)
        )
        settings = f"""ClusterName=test
SlurmctldHost={head.name}({head.address})
SlurmUser=root
AuthInfo=socket={self.folder}/run/munge.socket
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin={task_plugin}
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=20
MinJobAge=3600
SlurmctldPidFile={self.folder}/run/slurmctld.pid
SlurmdPidFile={self.folder}/run/slurmd.%n.pid
SlurmdSpoolDir={self.folder}/spool/%n
StateSaveLocation={self.folder}/state
SlurmctldLogFile={self.folder}/slurmctld.log
SlurmdLogFile={self.folder}/slurmd.%n.log
SchedulerType=sched/backfill
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
{nodes}PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
        (self.folder / "slurm.conf").write_text(settings)
        (self.folder / "cgroup.conf").write_text(
            "CgroupPlugin=cgroup/v1\nCgroupMountpoint=/sys/fs/cgroup\nConstrainCores=no\n"
        )
        hosts.environment["SLURM_CONF"] = str(self.folder / "slurm.conf")
        self._munge()
        head.start("bash", "-c", _CGROUPS, "slurm", "slurmctld", "-D")
        for host in hosts.all:
            host.start("bash", "-c", _CGROUPS, "slurm", "slurmd", "-D", "-N", host.name)
        wait_for(
            lambda: self.command("sinfo", "-h", "-o", "%D %t").strip() == f"{len(hosts.all)} idle", "idle nodes", 60
        )

    def _munge(self) -> None:
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        run = self.folder / "run"
        # the daemon wants folders that nobody else writes to; as root it needs no other user
        for folder in (self.folder, run):
            folder.chmod(0o711)
        files = [f"--key-file={key}", f"--socket={run}/munge.socket", f"--pid-file={run}/munged.pid"]
        files += [f"--log-file={self.folder}/munged.log", f"--seed-file={self.folder}/munged.seed", "--force"]
        self.hosts.all[0].run("munged", *files, timeout_s=30)
        wait_for((run / "munge.socket").exists, f"munged: {self.folder}/munged.log", 30)

    def command(self, *arguments: str, host: Host | None = None) -> str:
        """Run a command of Slurm and return what it wrote."""
        done = (host or self.hosts.all[0]).run(*arguments, timeout_s=60)
        return done.stdout + done.stderr

    def submit(self, *arguments: str, folder: Path) -> int:
        """Submit a job by sbatch with these arguments from the repository; its output goes to FOLDER/job.log."""
        written = self.command("sbatch", f"--output={folder}/job.log", *arguments)
        match = re.search(r"Submitted batch job (\d+)", written)
        assert match, written
        return int(match[1])

    def job(self, number: int) -> dict[str, str]:
        """Return the fields of `scontrol show job`."""
        return dict(re.findall(r"(\w+)=(\S*)", self.command("scontrol", "show", "job", str(number))))

    def wait(self, number: int, *states: str, timeout_s: float = 240.0) -> dict[str, str]:
        """Wait until a job is in one of the states and return its fields."""
        wait_for(
            lambda: self.job(number).get("JobState") in states,
            lambda: f"job {number} {' or '.join(states)}: {self.state(number)}",
            timeout_s,
        )
        return self.job(number)

    def state(self, number: int) -> str:
        """Return what tells why a job does not go on: the nodes, its fields, and the end of its output."""
        job = self.job(number)
        output = Path(job.get("StdOut", ""))
        written = output.read_text(errors="replace")[-3000:] if output.is_file() else "no output"
        return f"{self.command('sinfo', '-N', '-l')}\n{job}\n{written}"
