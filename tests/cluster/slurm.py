"""A real Slurm for tests: slurmctld and virtual nodes on this machine, from Debian's packages, gone afterwards.

    with running_cluster(folder, nodes=2, cpus=4) as cluster:
        job = cluster.run("sbatch", "--parsable", "--nodes=2", "--mem=100", "job.sh")
        cluster.wait(job, "RUNNING")
        cluster.power_off("n2")

`python -m tests.cluster.slurm FOLDER` opens a shell beside such a cluster.

Each node has its own processes, hostname and /etc/hosts, but the network and the disks are this machine's, so a node
that is powered off still closes its connections. Partitions: `main` (the default), whose jobs those of `high` preempt
by requeueing. A requeued job starts again after about ten seconds. There is no accounting: sacct does not work, but
scontrol knows all jobs to the end. A job without --mem takes whole nodes.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

BOOT_SECONDS = 30
COMMAND_SECONDS = 60
GRACE_SECONDS, KILL_SECONDS = 8, 5
LONGEST_FOLDER = 70
"""Sockets of job steps lie a little deeper, and the path of a socket has at most 107 characters."""
NAMESPACES = ("--mount", "--uts", "--pid", "--mount-proc")


def missing() -> str | None:
    """Why there can be no cluster here."""
    if absent := [name for name in ("slurmctld", "slurmd", "sbatch", "munged", "unshare") if not shutil.which(name)]:
        return f"{', '.join(absent)} not found: apt-get install slurm-wlm munge (and have /usr/sbin on the PATH)"
    if os.getuid() != 0:
        return "virtual nodes are namespaces, which take root"
    trial = ["unshare", *NAMESPACES, "--fork", "sh", "-c", "mount --bind /etc/hosts /etc/hosts && hostname n1"]
    tried = subprocess.run(trial, capture_output=True, text=True)
    return f"root may not make namespaces here: {tried.stderr.strip()}" if tried.returncode else None


class Machine:
    """Namespaces whose first process is a shell that reads what to start from our pipe.

    The shell ends with the pipe, and with it the kernel ends all that ever ran in there: also when we are killed.
    """

    def __init__(self, name: str, hosts: Path, log: Path, environment: Mapping[str, str]) -> None:
        script = f"mount --bind '{hosts}' /etc/hosts && hostname {name} && while read -r it; do eval \"$it &\"; done"
        command = ["unshare", *NAMESPACES, "--fork", "--kill-child", "bash", "-c", script]
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                command, env=environment, stdin=subprocess.PIPE, stdout=file, stderr=file, start_new_session=True
            )

    def start(self, *command: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(" ".join(map(str, command)).encode() + b"\n")
        self._process.stdin.flush()

    def running(self, program: str) -> list[int]:
        """The processes of this name that the shell started."""
        started = [child for shell in _children(self._process.pid) for child in _children(shell)]
        return [pid for pid in started if _read(pid, "comm") == f"{program}\n".encode()]

    @property
    def is_on(self) -> bool:
        return self._process.poll() is None

    def power_off(self) -> None:
        """Returns when nothing runs in there any more: the kernel ends a namespace's first process last."""
        assert self._process.stdin is not None
        if not self._process.stdin.closed:
            self._process.stdin.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:  # a forked child of ours holds the pipe
            self._process.kill()
            self._process.wait()


class Cluster:
    """Made by `running_cluster`. Nodes are named n1, n2, ...; job ids are what sbatch says."""

    def __init__(
        self, folder: Path, nodes: int, cpus: int, gpus: int, grace: int, options: Mapping[str, object]
    ) -> None:
        self.folder = folder.resolve()
        self.nodes = [f"n{number}" for number in range(1, nodes + 1)]
        if len(str(self.folder)) > LONGEST_FOLDER:
            raise ValueError(f"{self.folder}: too long for sockets, take a path of at most {LONGEST_FOLDER} characters")
        for name in ("dev", "log", "run", "spool", "state"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        foreign = re.compile(r"(SLURM|SLURMD|SBATCH|SALLOC|SRUN|SQUEUE|SINFO|SCANCEL|SCONTROL)_")
        self.environment = {name: value for name, value in os.environ.items() if not foreign.match(name)}
        self.environment["SLURM_CONF"] = str(self.folder / "slurm.conf")
        self._machines: dict[str, Machine] = {}
        self._configure(cpus, gpus, grace, options)

    def _configure(self, cpus: int, gpus: int, grace: int, options: Mapping[str, object]) -> None:
        folder, (control_port, *node_ports) = self.folder, _free_ports(1 + len(self.nodes))
        addresses = {node: f"127.0.9.{number}" for number, node in enumerate(self.nodes, 1)}
        ours = "".join(f"{address} {node}\n" for node, address in addresses.items()) + "127.0.0.1 head munge\n"
        (folder / "hosts").write_text(ours + Path("/etc/hosts").read_text())
        (folder / "munge.key").write_bytes(os.urandom(1024))
        (folder / "munge.key").chmod(0o400)
        settings: dict[str, object] = {
            "ClusterName": "throwaway",
            "SlurmctldHost": "head(127.0.0.1)",
            "SlurmctldPort": control_port,
            "SlurmUser": "root",
            "SlurmdUser": "root",
            "AuthInfo": f"socket={folder}/run/munge.sock,cred_expire=5",  # so long must a requeued job wait: else 120 s
            "StateSaveLocation": f"{folder}/state",
            "SlurmdSpoolDir": f"{folder}/spool/%n",
            "SlurmctldPidFile": f"{folder}/run/slurmctld.pid",
            "SlurmdPidFile": f"{folder}/run/slurmd.%n.pid",
            "SlurmctldLogFile": f"{folder}/log/slurmctld.log",
            "SlurmdLogFile": f"{folder}/log/slurmd.%n.log",
            "ProctrackType": "proctrack/linuxproc",  # the default needs cgroups
            "TaskPlugin": "task/none",
            "JobAcctGatherType": "jobacct_gather/none",
            "AccountingStorageType": "accounting_storage/none",
            "SelectType": "select/cons_tres",
            "SelectTypeParameters": "CR_Core_Memory",
            "SlurmdParameters": "config_overrides",  # more CPUs than there are
            "SchedulerParameters": "sched_min_interval=100000,bf_interval=1,batch_sched_delay=0",  # at once
            "ReturnToService": 2,
            "MinJobAge": 86400,
            "KillWait": KILL_SECONDS,
            "SlurmdTimeout": 10,
            "MessageTimeout": 5,
            "TCPTimeout": 2,
            "PreemptType": "preempt/partition_prio",
            "PreemptMode": "REQUEUE",
        }
        if gpus:
            settings["GresTypes"] = "gpu"
            for number in range(gpus):  # without devices of its own kind Slurm leaves CUDA_VISIBLE_DEVICES unset
                os.mknod(folder / f"dev/nvidia{number}", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
            devices = f"{folder}/dev/nvidia[0-{gpus - 1}]"
            (folder / "gres.conf").write_text(f"NodeName={','.join(self.nodes)} Name=gpu File={devices}\n")
        lines = [f"{key}={value}" for key, value in (settings | dict(options)).items()]
        for node, port in zip(self.nodes, node_ports, strict=True):
            place = f"NodeName={node} NodeHostname={node} NodeAddr={addresses[node]} Port={port}"
            lines.append(f"{place} CPUs={cpus} RealMemory=4000" + (f" Gres=gpu:{gpus}" if gpus else ""))
        lines.append(
            f"PartitionName=main Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace} MaxTime=3-0"
        )
        lines.append("PartitionName=high Nodes=ALL PriorityTier=10")
        (folder / "slurm.conf").write_text("\n".join(lines) + "\n")

    def _machine(self, name: str) -> Machine:
        log = self.folder / "log" / f"{name}.out"
        self._machines[name] = Machine(name, self.folder / "hosts", log, self.environment)
        return self._machines[name]

    def _boot(self) -> None:
        self.run("scontrol", "show", "hostnames", "n1")  # says what is wrong with the options, where daemons just end
        run = self.folder / "run"
        places = f"--socket={run}/munge.sock --pid-file={run}/munged.pid --seed-file={run}/munged.seed"
        places += f" --key-file={self.folder}/munge.key --log-file={self.folder}/log/munged.log"
        # by force: pytest's folders are nobody else's, which munged minds
        self._machine("munge").start("munged --foreground --force", places)
        self._until((run / "munge.sock").exists, "munged made no socket")
        self._machine("head").start("slurmctld -D -c")
        for node in self.nodes:
            self.start_node(node)
        self.nodes_idle(len(self.nodes))

    def _end(self) -> None:
        """Power is cut off, slurmctld's first, then clients that still wait are killed."""
        for name in ["head", *self.nodes, "munge"]:
            if name in self._machines:
                self._machines[name].power_off()
        for pid in processes(self.folder):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._until(lambda: not processes(self.folder), "processes are left", 10)
        if mounts := [line for line in Path("/proc/self/mounts").read_text().splitlines() if str(self.folder) in line]:
            raise RuntimeError(f"left mounted after the cluster's end: {mounts}")

    def run(self, *command: object) -> str:
        """What a client command such as sbatch, scontrol or squeue prints, without the last newline."""
        words = list(map(str, command))
        done = subprocess.run(
            words,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=COMMAND_SECONDS,
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(words)}: exit status {done.returncode}: {done.stderr.strip()}")
        return done.stdout.removesuffix("\n")

    def job(self, job_id: str | int) -> dict[str, str]:
        """What Slurm knows of a job: JobState, Reason, Restarts, ExitCode, NodeList, ..."""
        record = self.run("scontrol", "-o", "show", "job", job_id)
        return dict(re.findall(r"(\S+?)=(.*?)(?=\s+[A-Z][\w:/]*=|\s*$)", record))

    def state(self, job_id: str | int) -> str:
        return self.job(job_id)["JobState"]

    def wait(self, job_id: str | int, *states: str, seconds: float = 120) -> dict[str, str]:
        """Until the job is in one of these states; what Slurm then knew of it."""
        record: dict[str, str] = {}

        def reached() -> bool:
            record.update(self.job(job_id))
            return record["JobState"] in states

        self._until(reached, f"job {job_id} is not {' or '.join(states)}", seconds, lambda: f"it is {record}")
        return record

    def nodes_idle(self, count: int, seconds: float = BOOT_SECONDS) -> None:
        """Waits until so many nodes could take a job."""
        # slurmctld may not listen yet
        ask = ["sinfo", "--noheader", "--Node", "--partition=main", "--format=%N %T"]

        def states() -> str:
            return subprocess.run(
                ask, env=self.environment, capture_output=True, text=True, timeout=COMMAND_SECONDS
            ).stdout

        self._until(lambda: states().split().count("idle") >= count, f"fewer than {count} idle nodes", seconds, states)

    def node_state(self, node: str) -> str:
        """In lower case; with a star while the node does not answer."""
        return self.run("sinfo", "--noheader", "--Node", "--partition=main", f"--nodes={node}", "--format=%T")

    def start_node(self, node: str) -> None:
        """After kill_slurmd or power_off."""
        machine = self._machines.get(node)
        if machine is None or not machine.is_on:
            machine = self._machine(node)
        elif machine.running("slurmd"):
            raise ValueError(f"{node} is running: kill_slurmd or power_off first")
        machine.start("slurmd -D -N", node)

    def kill_slurmd(self, node: str) -> None:
        """The daemon alone: the ranks of its jobs live on."""
        machine = self._machines[node]
        if not (daemons := machine.running("slurmd")):
            raise ValueError(f"{node} runs no slurmd: start_node first")
        for pid in daemons:
            os.kill(pid, signal.SIGKILL)
        self._until(lambda: not machine.running("slurmd"), f"slurmd of {node} does not die", 10)

    def power_off(self, node: str) -> None:
        """Everything on the node dies at once."""
        self._machines[node].power_off()

    def _until(
        self,
        condition: Callable[[], bool],
        complaint: str,
        seconds: float = BOOT_SECONDS,
        more: Callable[[], str] = str,
    ) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                living = [f"{pid}: {command}" for pid, command in processes(self.folder).items()]
                logs = [f"{log}:\n" + log.read_text(errors="replace")[-1000:] for log in self.folder.glob("log/*")]
                raise TimeoutError("\n".join([f"{complaint} after {seconds:g} s", more(), *living, *logs]))
            time.sleep(0.05)


@contextmanager
def running_cluster(
    folder: Path,
    nodes: int = 2,
    cpus: int = 4,
    gpus: int = 0,
    grace: int = GRACE_SECONDS,
    options: Mapping[str, object] | None = None,
) -> Iterator[Cluster]:
    """A cluster in a new or empty folder; several can run side by side.

    Of each node's CPUs and GPUs (fake ones) as many as asked for; preempted jobs have `grace` seconds; `options` are
    further lines of slurm.conf, or others in place of ours.
    """
    cluster = Cluster(folder, nodes, cpus, gpus, grace, options or {})
    try:
        cluster._boot()
        yield cluster
    finally:
        cluster._end()


def processes(folder: Path) -> dict[int, str]:
    """A cluster's daemons, job steps and clients by pid: whatever has its slurm.conf in the environment."""
    mark = f"SLURM_CONF={folder.resolve()}/slurm.conf\0".encode()
    pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    with_mark = [pid for pid in pids if mark in _read(pid, "environ") and pid != os.getpid()]
    return {pid: _read(pid, "cmdline").replace(b"\0", b" ").decode(errors="replace") for pid in with_mark}


def _free_ports(count: int) -> list[int]:
    """Below those that the kernel gives to clients: a node that comes back needs the one it had."""
    found: list[int] = []
    while len(found) < count:
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port := random.SystemRandom().randrange(10000, 20000)))
            found.append(port)
    return found


def _children(pid: int) -> list[int]:
    return [int(child) for child in _read(pid, f"task/{pid}/children").split()]


def _read(pid: int, what: str) -> bytes:
    """Nothing of a process that has ended or is not ours."""
    try:
        return Path(f"/proc/{pid}/{what}").read_bytes()
    except OSError:
        return b""


if __name__ == "__main__":
    with running_cluster(Path(sys.argv[1])) as shell_cluster:
        subprocess.run([os.environ.get("SHELL", "bash")], env=shell_cluster.environment)
