"""A thousand episodes in one pool: does memory stay flat, and is anything left behind?

    python tests/bench/soak.py [--episodes 1000] [--cameras top] [--json FILE]

Short episodes of insertion, chunked and ensembled in turn, some of them filmed. Memory is what a
process has to itself (USS), in MB, of this process and of the workers together, after a warm-up in
which every slot films, and at the end. Then: is a process, a descriptor or a piece of shared memory
left when the pool is closed, when Ctrl-C or kill -9 ends the process that plays, and when a worker
is killed (kill -9) while it plays? Ends with exit code 1 if so, if an episode was lost, or if
memory grew by more than `--bound`. A leak of one picture an episode would be 60 MB.
"""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table
from rollouts import EXECUTIONS, TrivialPolicy
from turns import make_parser, write_report

from act_lightning.sim.env import EnvConfig
from act_lightning.sim.film import Film
from act_lightning.sim.rollout import EpisodeResult, RolloutPool

NUM_ROUNDS = 10
NUM_WARM_UP = 64
FILMED = 20
"""One world in so many is filmed."""
PATIENCE_S = 20.0
"""How long processes may take to end."""


def config_of(cameras: list[str]) -> EnvConfig:
    """The world that is played: an episode has 60 steps, or 20 with cameras."""
    steps = 20 if cameras else 60
    return EnvConfig(
        cameras=tuple(cameras), env_state=not cameras, max_episode_steps=steps, action_margin=None
    )


def play(pool: RolloutPool, first: int, worlds: int, filmed: int = FILMED) -> list[EpisodeResult]:
    """Plays the worlds from seed `first` on, each chunked and ensembled."""
    seeds = range(first, first + worlds)
    films = {seed: Film() for seed in seeds if seed % filmed == 0}
    return pool.rollout(TrivialPolicy(), seeds, EXECUTIONS, record=films)


def workers() -> list[psutil.Process]:
    """Living children of this process."""
    children = psutil.Process().children(recursive=True)
    return [child for child in children if child.status() != psutil.STATUS_ZOMBIE]


def memory() -> dict[str, float]:
    """USS in MB of this process and, together, of the workers."""
    gc.collect()
    own = psutil.Process().memory_full_info().uss
    return {
        "parent": own / 1e6,
        "workers": sum(worker.memory_full_info().uss for worker in workers()) / 1e6,
    }


def holdings() -> dict[str, set[str]]:
    """What this process holds, and what lies in the system's shared memory."""
    gc.collect()
    shared = Path("/dev/shm")
    maps = Path("/proc/self/maps").read_text().splitlines()
    return {
        "processes": {str(worker.pid) for worker in workers()},
        "descriptors": set(os.listdir("/proc/self/fd")),
        "memory maps": {line for line in maps if "memfd:" in line},
        "files in /dev/shm": {file.name for file in shared.iterdir()} if shared.is_dir() else set(),
    }


def left_over(before: dict[str, set[str]]) -> dict[str, int]:
    """How much there is that was not there `before`, once it had time to go."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        more = {name: len(held - before[name]) for name, held in holdings().items()}
        if not any(more.values()) or time.monotonic() > deadline:
            return more
        time.sleep(0.1)


def soak(env: EnvConfig, episodes: int) -> dict[str, Any]:
    """Plays them all in one pool and closes it."""
    before = holdings()
    worlds = episodes // (NUM_ROUNDS * len(EXECUTIONS))
    course: list[dict[str, float]] = []
    lost = 0
    with RolloutPool(env) as pool:
        # Each slot makes its environment, and the renderer of its films.
        play(pool, 0, NUM_WARM_UP, filmed=1)
        course.append(memory())
        for number in range(NUM_ROUNDS):
            results = play(pool, number * worlds, worlds)
            lost += sum(result.error is not None for result in results)
            del results
            course.append(memory())
    return {
        "episodes": NUM_ROUNDS * worlds * len(EXECUTIONS),
        "lost": lost,
        "memory_mb": course,
        "grown_mb": {name: course[-1][name] - course[0][name] for name in course[0]},
        "left_over": left_over(before),
    }


def kill_worker(env: EnvConfig, worlds: int) -> dict[str, Any]:
    """Kills a worker while it plays; its episodes must be played again."""
    before = holdings()
    with RolloutPool(env) as pool, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        play(pool, 0, 8)
        timer = threading.Timer(0.3, workers()[0].kill)
        timer.start()
        results = play(pool, 0, worlds)
        timer.join()
    return {
        "episodes": len(results),
        "lost": sum(result.error is not None for result in results),
        "warnings": [str(warning.message) for warning in caught],
        "left_over": left_over(before),
    }


def end_player(cameras: list[str], number: signal.Signals) -> dict[str, Any]:
    """Ends a process that plays by a signal; its workers must end too."""
    before = holdings()
    command = [sys.executable, __file__, "--play", *(["--cameras", *cameras] if cameras else [])]
    player = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
    )
    assert player.stdout is not None
    player.stdout.readline()  # It has played once.
    time.sleep(0.5)
    pids = [child.pid for child in psutil.Process(player.pid).children(recursive=True)]
    # To the group, as a terminal does.
    os.killpg(player.pid, number)
    player.wait()  # Not for the end of its output, which workers share.
    player.stdout.close()
    deadline = time.monotonic() + PATIENCE_S
    while any(map(is_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.1)
    more = left_over(before)
    return {
        "workers": len(pids),
        "left_over": more | {"processes": sum(map(is_alive, pids))},
        "exit_code": player.returncode,
    }


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and that nobody waits for does not."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def play_for_ever(env: EnvConfig) -> None:
    """Plays until a signal ends it; says so after the first rollout."""
    with RolloutPool(env) as pool:
        while True:
            play(pool, 0, 16)
            print("playing", flush=True)


def problems(report: dict[str, Any], bound_mb: float) -> list[str]:
    """What is not as it should be."""
    found = []
    for name, grown in report["soak"]["grown_mb"].items():
        if grown > bound_mb:
            found.append(f"memory of {name} grew by {grown:.1f} MB, more than {bound_mb:g}")
    for event in ("soak", "a worker killed", "Ctrl-C", "kill -9"):
        outcome = report[event]
        found += [f"{event}: {n} {what} left" for what, n in outcome["left_over"].items() if n]
        if outcome.get("lost"):
            found.append(f"{event}: {outcome['lost']} of {outcome['episodes']} episodes were lost")
        if outcome.get("workers") == 0:
            found.append(f"{event}: there was no worker to be left")
    if not report["a worker killed"]["warnings"]:
        found.append("a worker killed: nobody noticed")
    return found


def print_report(report: dict[str, Any]) -> None:
    """Prints the figures for people."""
    course = report["soak"]["memory_mb"]
    table = Table(title=f"{report['soak']['episodes']} episodes in one pool: USS in MB")
    for heading in ("", "at first", "at the end", "most", "grown"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, grown in report["soak"]["grown_mb"].items():
        values = [mark[name] for mark in course]
        figures = (values[0], values[-1], max(values), grown)
        table.add_row(name, *(f"{figure:.1f}" for figure in figures))
    Console().print(table)
    table = Table(title="left behind")
    kinds = list(report["soak"]["left_over"])
    for heading in ("after", *kinds):
        table.add_column(heading, justify="left" if heading == "after" else "right")
    for event in ("soak", "a worker killed", "Ctrl-C", "kill -9"):
        counts = (str(report[event]["left_over"][kind]) for kind in kinds)
        table.add_row("close" if event == "soak" else event, *counts)
    Console().print(table)


def main() -> int:
    """Parses the command line, plays, prints; the exit code says whether all was well."""
    parser = make_parser(__doc__)
    parser.add_argument("--episodes", type=int, default=1000, help="episodes in one pool")
    parser.add_argument("--cameras", nargs="*", default=[], help="cameras to observe")
    parser.add_argument("--bound", type=float, default=20.0, help="growth allowed, in MB")
    parser.add_argument("--play", action="store_true", help="only play, until a signal comes")
    arguments = parser.parse_args()
    env = config_of(arguments.cameras)
    if arguments.play:
        play_for_ever(env)
    report: dict[str, Any] = {
        "soak": soak(env, arguments.episodes),
        "a worker killed": kill_worker(env, worlds=32),
        "Ctrl-C": end_player(arguments.cameras, signal.SIGINT),
        "kill -9": end_player(arguments.cameras, signal.SIGKILL),
    }
    print_report(report)
    report["problems"] = problems(report, arguments.bound)
    for problem in report["problems"]:
        print(problem)
    write_report(arguments.json, report)
    return 1 if report["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
