"""A real Slurm for tests: slurmctld and virtual nodes on this machine, from Debian's packages, removed afterwards.

    with running_cluster(folder, nodes=2, cpus=4) as cluster:
        job = cluster.run("sbatch", "--parsable", "--nodes=2", "--mem=100", "job.sh")
        cluster.wait(job, "RUNNING")
        cluster.power_off("n2")

Each node has its own processes, hostname and /etc/hosts, but the network and the disks are this machine's, so a node
that is powered off still closes its connections. Partitions: `main` (the default), whose jobs those of `high` preempt
by requeueing, and `cheap`, whose jobs they cancel at once. A requeued job starts again after about ten seconds. There
is no accounting: sacct does not work, but scontrol knows all jobs to the end. A job without --mem takes whole nodes.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

BOOT_SECONDS = 30
COMMAND_SECONDS = 60
GRACE_SECONDS, KILL_SECONDS = 8, 5
MAX_PATH_LENGTH = 70
"""Slurm adds to it for the sockets of job steps, whose paths have at most 107 characters."""
NAMESPACES = ("--mount", "--uts", "--pid", "--mount-proc")


def missing() -> str | None:
    """Why no cluster can run here."""
    if absent := [name for name in ("slurmctld", "slurmd", "sbatch", "munged", "unshare") if not shutil.which(name)]:
        return f"{', '.join(absent)} not found: apt-get install slurm-wlm munge (and have /usr/sbin on the PATH)"
    if os.getuid() != 0:
        return "virtual nodes are namespaces, which take root"
    trial = ["unshare", *NAMESPACES, "--fork", "sh", "-c", "mount --bind /etc/hosts /etc/hosts && hostname n1"]
    tried = subprocess.run(trial, capture_output=True, text=True)
    return f"root may not make namespaces here: {tried.stderr.strip()}" if tried.returncode else None


class Machine:
    """Namespaces whose first process is a shell that reads what to start from our pipe.

    The shell ends with the pipe, also when we are killed, and the kernel then kills all processes of the namespace.
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
        """Processes of this name that the shell started."""
        started = [child for shell in _children(self._process.pid) for child in _children(shell)]
        return [pid for pid in started if _read(pid, "comm") == f"{program}\n".encode()]

    @property
    def is_on(self) -> bool:
        return self._process.poll() is None

    def power_off(self) -> None:
        """Returns when nothing runs in the namespace: the kernel ends its first process last."""
        assert self._process.stdin is not None
        if not self._process.stdin.closed:
            self._process.stdin.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:  # a fork of this process holds the pipe
            self._process.kill()
            self._process.wait()


class Cluster:
    """Made by `running_cluster`. Nodes are named n1, n2, ...; job ids are what sbatch says."""

    def __init__(self, folder: Path, nodes: int, cpus: int) -> None:
        self.folder = folder.resolve()
        self.nodes = [f"n{number}" for number in range(1, nodes + 1)]
        if len(str(self.folder)) > MAX_PATH_LENGTH:
            raise ValueError(f"{self.folder}: too long for sockets; use a path of at most {MAX_PATH_LENGTH} characters")
        for name in ("log", "run", "spool", "state"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        foreign = re.compile(r"(SLURM|SLURMD|SBATCH|SALLOC|SRUN|SQUEUE|SINFO|SCANCEL|SCONTROL)_")
        self.environment = {name: value for name, value in os.environ.items() if not foreign.match(name)}
        self.environment["SLURM_CONF"] = str(self.folder / "slurm.conf")
        self._machines: dict[str, Machine] = {}
        self._configure(cpus)

    def _configure(self, cpus: int) -> None:
        folder, (control_port, *node_ports) = self.folder, _free_ports(1 + len(self.nodes))
        addresses = {node: f"127.0.9.{number}" for number, node in enumerate(self.nodes, 1)}
        hosts = "".join(f"{address} {node}\n" for node, address in addresses.items()) + "127.0.0.1 head munge\n"
        (folder / "hosts").write_text(hosts + Path("/etc/hosts").read_text())
        (folder / "munge.key").write_bytes(os.urandom(1024))
        (folder / "munge.key").chmod(0o400)
        settings: dict[str, object] = {
            "ClusterName": "throwaway",
            "SlurmctldHost": "head(127.0.0.1)",
            "SlurmctldPort": control_port,
            "SlurmUser": "root",
            "SlurmdUser": "root",
            "AuthInfo": f"socket={folder}/run/munge.sock,cred_expire=5",  # the wait of a requeued job
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
            "SlurmdParameters": "config_overrides",  # more CPUs than the machine has
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
        lines = [f"{key}={value}" for key, value in settings.items()]
        for node, port in zip(self.nodes, node_ports, strict=True):
            address = f"NodeHostname={node} NodeAddr={addresses[node]} Port={port}"
            lines.append(f"NodeName={node} {address} CPUs={cpus} RealMemory=4000")
        preempted = f"PreemptMode=REQUEUE GraceTime={GRACE_SECONDS} MaxTime=3-0"
        lines.append(f"PartitionName=main Nodes=ALL Default=YES PriorityTier=1 {preempted}")
        lines.append("PartitionName=high Nodes=ALL PriorityTier=10")
        lines.append("PartitionName=cheap Nodes=ALL PriorityTier=1 PreemptMode=CANCEL")
        (folder / "slurm.conf").write_text("\n".join(lines) + "\n")

    def _machine(self, name: str) -> Machine:
        log = self.folder / "log" / f"{name}.out"
        self._machines[name] = Machine(name, self.folder / "hosts", log, self.environment)
        return self._machines[name]

    def _boot(self) -> None:
        self.run("scontrol", "show", "hostnames", "n1")  # reports errors in slurm.conf, where daemons just end
        run = self.folder / "run"
        places = f"--socket={run}/munge.sock --pid-file={run}/munged.pid --seed-file={run}/munged.seed"
        places += f" --key-file={self.folder}/munge.key --log-file={self.folder}/log/munged.log"
        # --force: munged objects to the permissions of pytest's folders
        self._machine("munge").start("munged --foreground --force", places)
        self._until((run / "munge.sock").exists, "munged made no socket")
        self._machine("head").start("slurmctld -D -c")
        for node in self.nodes:
            self.start_node(node)
        self.nodes_idle(len(self.nodes))

    def _end(self) -> None:
        """Powers all machines off, slurmctld's first, then kills clients that still wait."""
        for name in ["head", *self.nodes, "munge"]:
            if name in self._machines:
                self._machines[name].power_off()
        for pid in processes(self.folder):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._until(lambda: not processes(self.folder), "processes remain", 10)
        if mounts := [line for line in Path("/proc/self/mounts").read_text().splitlines() if str(self.folder) in line]:
            raise RuntimeError(f"still mounted after the cluster's end: {mounts}")

    def run(self, *command: object) -> str:
        """The output of a client command such as sbatch, scontrol or squeue, without the last newline."""
        words = list(map(str, command))
        done = subprocess.run(
            words, env=self.environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=COMMAND_SECONDS,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"{' '.join(words)}: exit status {done.returncode}: {done.stderr.strip()}")
        return done.stdout.removesuffix("\n")

    def job(self, job_id: str | int) -> dict[str, str]:
        """Slurm's record of a job: JobState, Reason, Restarts, ExitCode, NodeList, ..."""
        record = self.run("scontrol", "-o", "show", "job", job_id)
        return dict(re.findall(r"(\S+?)=(.*?)(?=\s+[A-Z][\w:/]*=|\s*$)", record))

    def state(self, job_id: str | int) -> str:
        return self.job(job_id)["JobState"]

    def wait(self, job_id: str | int, *states: str, seconds: float = 120) -> dict[str, str]:
        """Waits until the job is in one of these states; returns its record."""
        record: dict[str, str] = {}

        def reached() -> bool:
            record.update(self.job(job_id))
            return record["JobState"] in states

        self._until(reached, f"job {job_id} is not {' or '.join(states)}", seconds, lambda: f"it is {record}")
        return record

    def nodes_idle(self, count: int, seconds: float = BOOT_SECONDS) -> None:
        """Waits until `count` nodes are idle; slurmctld may not listen yet."""
        ask = ["sinfo", "--noheader", "--Node", "--partition=main", "--format=%N %T"]

        def states() -> str:
            return subprocess.run(
                ask, env=self.environment, capture_output=True, text=True, timeout=COMMAND_SECONDS
            ).stdout

        self._until(lambda: states().split().count("idle") >= count, f"fewer than {count} idle nodes", seconds, states)

    def start_node(self, node: str) -> None:
        """After kill_slurmd or power_off."""
        machine = self._machines.get(node)
        if machine is None or not machine.is_on:
            machine = self._machine(node)
        machine.start("slurmd -D -N", node)

    def slurmd(self, node: str) -> int:
        """The process of its daemon."""
        (pid,) = self._machines[node].running("slurmd")
        return pid

    def kill_slurmd(self, node: str) -> None:
        """Only the daemon: the ranks of its jobs live on."""
        machine = self._machines[node]
        for pid in machine.running("slurmd"):
            os.kill(pid, signal.SIGKILL)
        self._until(lambda: not machine.running("slurmd"), f"slurmd of {node} is alive", 10)

    def power_off(self, node: str) -> None:
        """Kills everything on the node at once."""
        self._machines[node].power_off()

    def _until(
        self,
        condition: Callable[[], bool],
        problem: str,
        seconds: float = BOOT_SECONDS,
        details: Callable[[], str] = str,
    ) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                living = [f"{pid}: {command}" for pid, command in processes(self.folder).items()]
                logs = [f"{log}:\n" + log.read_text(errors="replace")[-1000:] for log in self.folder.glob("log/*")]
                raise TimeoutError("\n".join([f"{problem} after {seconds:g} s", details(), *living, *logs]))
            time.sleep(0.05)


@contextmanager
def running_cluster(folder: Path, nodes: int = 2, cpus: int = 4) -> Iterator[Cluster]:
    """A cluster in a new or empty folder, with `cpus` CPUs on each node; several can run side by side."""
    cluster = Cluster(folder, nodes, cpus)
    try:
        cluster._boot()
        yield cluster
    finally:
        cluster._end()


def processes(folder: Path) -> dict[int, str]:
    """A cluster's daemons, job steps and clients by pid: all processes with its slurm.conf in their environment."""
    variable = f"SLURM_CONF={folder.resolve()}/slurm.conf\0".encode()
    pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    ours = [pid for pid in pids if variable in _read(pid, "environ") and pid != os.getpid()]
    return {pid: _read(pid, "cmdline").replace(b"\0", b" ").decode(errors="replace") for pid in ours}


def _free_ports(count: int) -> list[int]:
    """Below the kernel's ephemeral range, so that a node that is started again gets its old one."""
    found: list[int] = []
    while len(found) < count:
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port := random.SystemRandom().randrange(10000, 20000)))
            found.append(port)
    return found


def _children(pid: int) -> list[int]:
    return [int(child) for child in _read(pid, f"task/{pid}/children").split()]


def _read(pid: int, what: str) -> bytes:
    """Empty of a process that has ended or is not ours."""
    try:
        return Path(f"/proc/{pid}/{what}").read_bytes()
    except OSError:
        return b""
