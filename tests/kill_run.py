"""Starts training runs that are to be killed, and says what is left of them.

    python tests/kill_run.py

is a process that has imported the trainer, which takes seconds, and forks a rank of a run for each
line of JSON that asks for one. `Starter` talks to it. A rank has a session of its own, and ends as
`python -m act_lightning` would.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "PYTHONFAULTHANDLER": "1",
    "PYTHONPATH": str(ROOT),
    "COLUMNS": "200",
}
TIMES = {"train_seconds", "cpu_seconds", "seconds"}
"""Of what a checkpoint holds, what no two runs have alike."""
TIME_TAGS = {"train/data_wait", "rollout/seconds", "rollout/share"}
"""Of what a run logs."""
OF_A_START = ("_hparams_/", "config/", "custom_scalars__config__")
"""Beginnings of tags that are written by every start of a run, not by its steps."""
ENDED = "ended"
"""In place of the exit code of a rank that only the rank that has started it knows."""
EVERYTHING = dict.fromkeys(("scalars", "images", "tensors", "histograms"), 0)


class Ranks:
    """Processes of one start of a run."""

    def __init__(self, pids, log):
        self.pids, self.log = pids, log

    def output(self):
        return self.log.read_text(errors="replace")

    def send(self, signum, pids=None):
        """Sends a signal to ranks; those that have ended do not mind."""
        for pid in self.pids if pids is None else pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signum)

    def send_to_group(self, signum):
        """Sends it as a terminal does: to the ranks and all they have started."""
        for pid in self.pids:
            with suppress(ProcessLookupError):
                os.killpg(pid, signum)


class Launched(Ranks):
    """A run started by its command line; Lightning starts the ranks after the first."""

    def __init__(self, folder, arguments, log):
        with log.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "act_lightning", *arguments],
                cwd=folder,
                env=os.environ | ENVIRONMENT,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        super().__init__([self.process.pid], log)

    def find_ranks(self):
        """Looks which ranks there are now."""
        try:
            family = psutil.Process(self.process.pid).children()
            ranks = [child.pid for child in family if "fit" in child.cmdline()]
        except psutil.NoSuchProcess:
            ranks = []
        self.pids = [self.process.pid, *ranks]

    def poll(self):
        """Exit code of the first rank, and ENDED for others; None while a rank runs."""
        return [self.process.poll(), *(None if is_alive(pid) else ENDED for pid in self.pids[1:])]

    def send_to_group(self, signum):
        """All ranks are in the first one's group."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signum)


class Forked(Ranks):
    """A run whose ranks were forked, as torchrun would start them."""

    def __init__(self, starter, pids, log):
        super().__init__(pids, log)
        self.starter, self.codes = starter, [None] * len(pids)

    def find_ranks(self):
        """They are known from the start."""

    def poll(self):
        """Exit codes; None while a rank runs, -9 if that signal ended it."""
        for rank, pid in enumerate(self.pids):
            if self.codes[rank] is None:
                self.codes[rank] = self.starter.ask(poll=pid)
        return self.codes


class Starter:
    """Starts runs; use it as a context manager."""

    def __enter__(self):
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | ENVIRONMENT,
            start_new_session=True,
        )
        assert self.process.stdout.readline() == "null\n"
        return self

    def __exit__(self, *exception):
        self.process.stdin.close()
        self.process.wait(10)

    def ask(self, **request):
        """One answer of the process."""
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(self, folder, arguments, ranks):
        """Starts all ranks of a run, in `folder`; what they say goes to a file there."""
        log = folder / "output.txt"
        log.write_text("")
        environment = {} if ranks == 1 else world(ranks)
        pids = []
        for rank in range(ranks):
            mine = environment and environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            settings = {"folder": str(folder), "log": str(log), "environment": mine}
            pids.append(self.ask(arguments=arguments, **settings))
        return Forked(self, pids, log)


def world(ranks):
    """What torchrun tells each process of one node."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": ranks,
        "LOCAL_WORLD_SIZE": ranks,
        "GROUP_RANK": 0,
        "GROUP_WORLD_SIZE": 1,
        "ROLE_RANK": 0,
        "TORCHELASTIC_RUN_ID": "kills",
        "TORCHELASTIC_RESTART_COUNT": 0,
        "TORCHELASTIC_MAX_RESTARTS": 0,
    }
    return {name: str(value) for name, value in settings.items()}


def is_alive(pid):
    """Whether a process runs; one that waits to be reaped does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait(run, seconds):
    """Waits until all ranks have ended.

    Returns:
        Their exit codes; None for those that had not ended.
    """
    end = time.monotonic() + seconds
    while None in run.poll() and time.monotonic() < end:
        time.sleep(0.01)
    return list(run.poll())


def end(run, seconds):
    """Waits for the ranks, and kills what is left of them and what they started.

    When one has failed, torchrun and Slurm end the others after a while. Those that hang write to
    the run's output where they do.

    Returns:
        Exit codes; None for those that had to be killed.
    """
    codes = wait(run, seconds)
    run.find_ranks()
    if None in codes:
        run.send(signal.SIGABRT)
        wait(run, 5)
    run.send(signal.SIGKILL)
    wait(run, 10)
    run.send_to_group(signal.SIGKILL)
    return codes


# ---- what is left of a run ----------------------------------------------------------------------


def read_checkpoint(path):
    """All that a checkpoint holds, by dotted name, without TIMES."""
    checkpoint = torch.load(path, weights_only=True)
    return {name: value for name, value in leaves(checkpoint) if TIMES.isdisjoint(name)}


def leaves(value, name=()):
    """(path of keys, value) of all that a nested value holds; tensors as bytes."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield from leaves(part, (*name, key))
    elif isinstance(value, (list, tuple)):
        yield (*name, "length"), len(value)
        for index, part in enumerate(value):
            yield from leaves(part, (*name, index))
    elif isinstance(value, torch.Tensor):
        yield name, (str(value.dtype), tuple(value.shape), value.numpy().tobytes())
    elif isinstance(value, float):
        yield name, value.hex()
    else:
        yield name, value


def read_events(folder):
    """All that stands in a run's event files, in their order: (kind, tag) to steps and values.

    Without TIME_TAGS, and without what every start writes. Nothing that TensorBoard would hide is
    hidden: what was logged twice is there twice.
    """
    events = EventAccumulator(str(folder), EVERYTHING, purge_orphaned_data=False).Reload()
    kinds = {
        "scalars": lambda event: float(event.value).hex(),
        "images": lambda event: event.encoded_image_string,
        "histograms": lambda event: event.histogram_value,
        "tensors": lambda event: event.tensor_proto.SerializeToString(),
    }
    return {
        (kind, tag): [
            (event.step, read(event)) for event in getattr(events, kind.capitalize())(tag)
        ]
        for kind, read in kinds.items()
        for tag in events.Tags()[kind]
        if tag not in TIME_TAGS and not tag.startswith(OF_A_START)
    }


def read_run(folder):
    """What a finished run has left."""
    results = folder / "results.json"
    return {
        "last": read_checkpoint(folder / "checkpoints/last.ckpt"),
        "best": read_checkpoint(folder / "checkpoints/best.ckpt"),
        "events": read_events(folder),
        "worlds": json.loads(results.read_text())["worlds"] if results.exists() else None,
        "parts": [str(path) for path in folder.rglob("*.part")],
    }


def differences(ours, theirs):
    """What two runs left differently, in words; [] if nothing."""
    found = []
    for part, mine in ours.items():
        other = theirs[part]
        if mine == other:
            continue
        if not isinstance(mine, dict):
            found.append(f"{part}: {mine} and {other}")
            continue
        for name in mine.keys() | other.keys():
            if mine.get(name) != other.get(name):
                found.append(f"{part} {name}: {brief(mine.get(name), other.get(name))}")
    return sorted(found)


def brief(mine, other):
    """Steps of logged values, or the values themselves."""
    if isinstance(mine, list) and isinstance(other, list):
        steps = [[step for step, _ in side] for side in (mine, other)]
        return f"steps {steps[0]} and {steps[1]}" if steps[0] != steps[1] else "values differ"
    return f"{str(mine)[:80]} and {str(other)[:80]}"


# ---- the process that forks ---------------------------------------------------------------------


def poll(pid):
    """Exit code of a child, or None."""
    ended, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if ended else None


def become_rank(arguments, folder, log, environment):
    """Turns a forked process into what a command line would have started."""
    os.setsid()
    os.chdir(folder)
    os.environ.update(environment)
    descriptors = os.open(os.devnull, os.O_RDONLY), os.open(log, os.O_WRONLY | os.O_APPEND)
    for old, new in zip((descriptors[0], descriptors[1], descriptors[1]), range(3), strict=True):
        os.dup2(old, new)
    sys.argv = ["act_lightning", *arguments]


def main():
    import act_lightning.cli  # noqa: F401  (that it is imported is what this process is for)
    from act_lightning.main import main as run_verb

    print("null", flush=True)
    while line := sys.stdin.readline():
        request = json.loads(line)
        if "poll" in request:
            print(json.dumps(poll(request["poll"])), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            become_rank(**request)
            sys.exit(run_verb(request["arguments"]))
        print(pid, flush=True)


if __name__ == "__main__":
    main()
