"""A Slurm of two nodes on this machine: munged, slurmctld and two slurmd, all in one folder.

Each node is a slurmd with a port of its own and one core. Nothing outside the folder is read,
written or stopped. Needs root, as slurmd does to start jobs.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import psutil

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue")
NODES = ("n1", "n2")
# A requeued job waits for cred_expire, a silent node is down after SlurmdTimeout.
CONF = """\
ClusterName=small
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={slurmctld_port}
SlurmUser=root
SlurmdUser=root
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdPidFile={folder}/%n.pid
SlurmdLogFile={folder}/%n.log
SlurmdSpoolDir={folder}/%n
FirstJobId={first_job}
ProctrackType=proctrack/linuxproc
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
SlurmdParameters=config_overrides
SlurmdTimeout=10
KillWait=5
ReturnToService=2
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first_port}-{last_port}] CPUs=1
PartitionName=all Nodes=n[1-2] Default=YES MaxTime=60 State=UP
"""


def why_not():
    """What Slurm lacks to run here; empty if nothing."""
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        return (
            f"{', '.join(missing)} not found: apt-get install slurmctld slurmd slurm-client munge"
        )
    return "" if os.geteuid() == 0 else "slurmd starts jobs as root alone"


class SmallSlurm:
    """The four; `stop` ends those that `start` has brought up, and what their jobs have left.

    Args:
        folder: of everything; its path is short, as sockets lie in it.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        self.processes = {}

    def start(self):
        """Brings them up, and has Slurm's programs in this process's children ask them."""
        first = free_ports(3)
        conf = self.folder / "slurm.conf"
        conf.write_text(
            CONF.format(
                folder=self.folder,
                host=socket.gethostname().split(".")[0],
                slurmctld_port=first + 2,
                first_port=first,
                last_port=first + 1,
                first_job=first,
            )
        )
        (self.folder / "cgroup.conf").write_text("IgnoreSystemd=yes\n")
        os.environ["SLURM_CONF"] = str(conf)
        self._start_munged()
        self._start("slurmctld", "slurmctld", "-D", "-f", conf)
        for node in NODES:
            self.start_node(node)

    def start_node(self, node):
        """Starts a node's slurmd, and waits until it takes jobs."""
        self._start(node, "slurmd", "-D", "-N", node, "-f", self.folder / "slurm.conf")
        self.until(lambda: self.node_state(node) in ("IDLE", "MIXED", "ALLOCATED"), 30)

    def kill_node(self, node):
        """Ends a node as a loss of power would: its slurmd and all that it has started."""
        slurmd = psutil.Process(self.processes.pop(node).pid)
        family = [slurmd, *self._started_by(node)]
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(family, 10)

    def node_state(self, node):
        """Slurm's word for it."""
        return found(r"State=(\S+)", call("scontrol", "show", "node", node, check=False))

    def job(self, job):
        """What Slurm knows about a job: Slurm's names, and values."""
        return dict(re.findall(r"(\w+)=(\S*)", call("scontrol", "show", "job", job)))

    def until(self, condition, timeout_s=60.0):
        """Waits for `condition`; what the daemons said is shown if it does not come about."""
        deadline = time.monotonic() + timeout_s
        while not (value := condition()):
            if time.monotonic() > deadline:
                raise AssertionError(f"did not happen in {timeout_s:g} s\n{self.said()}")
            time.sleep(0.1)
        return value

    def said(self):
        """Ends of the daemons' logs."""
        logs = sorted(self.folder.glob("*.log"))
        return "\n".join(
            f"== {log.name}\n" + "\n".join(log.read_text(errors="replace").splitlines()[-30:])
            for log in logs
        )

    def stop(self):
        """Cancels all jobs, then ends the daemons, munged last."""
        if NODES[-1] in self.processes:
            with suppress(AssertionError, subprocess.SubprocessError):
                call("scancel", "--user=root", check=False)
                self.until(lambda: not call("squeue", "--noheader", check=False).strip(), 15)
        for node in NODES:
            if node in self.processes:
                self.kill_node(node)
        for process in reversed(list(self.processes.values())):
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
        os.environ.pop("SLURM_CONF", None)

    def _start_munged(self):
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        self.folder.chmod(0o755)
        names = {"key-file": "key", "socket": "socket", "pid-file": "pid", "seed-file": "seed"}
        files = [f"--{option}={self.folder}/munge.{name}" for option, name in names.items()]
        log = f"--log-file={self.folder}/munge.log"
        self._start("munged", "munged", "--foreground", "--force", *files, log)
        self.until((self.folder / "munge.socket").exists, 10)

    def _start(self, name, *command):
        with (self.folder / f"{name}.out.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                [str(word) for word in command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _started_by(self, node):
        """The jobs of a node: each slurmstepd that writes the node's log, and its children."""
        family = []
        for process in psutil.process_iter():
            with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                if process.name() == "slurmstepd" and any(
                    file.path == f"{self.folder}/{node}.log" for file in process.open_files()
                ):
                    family += [process, *process.children(recursive=True)]
        return family


def free_ports(number):
    """The first of several neighbouring ports that nobody has."""
    for first in range(20000 + os.getpid() % 5000, 32000, number):
        with suppress(OSError):
            for port in range(first, first + number):
                with socket.socket() as probe:
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    probe.bind(("", port))
            return first
    raise RuntimeError("no free ports")


def call(*command, check=True):
    """Output of a program of Slurm."""
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    if check and done.returncode:
        raise RuntimeError(f"{' '.join(words)}: {done.stderr}{done.stdout}")
    return done.stdout


def found(pattern, text):
    match = re.search(pattern, text)
    return match[1] if match else ""
