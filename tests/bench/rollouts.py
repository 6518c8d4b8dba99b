"""Episodes a minute of the rollout pool, in one interleaved run.

    python tests/bench/rollouts.py [--rounds 3] [--parts scaling peer] [--json FILE]

`scaling`: the pool on all cores against the sum of what each core steps alone, while the others
rest: a process pinned to it takes the same actions in one environment and observes as often, but
has no policy and talks to nobody. "at once": all cores do so together, which is what the hardware
leaves. The trivial policy gives a constant; `base` is the network of experiments/base.yaml, which
the pool has to run on the same cores, so that it has no goal.

`peer`: against LeRobot's rollout function on stock gym-aloha (three cameras of 480x640 a step),
with the same policy, an ACT with a ResNet-18 that sees one camera at 120x160. LeRobot's images are
resized by LeRobot. It plays one environment, its default on two cores, and one a core; its better
is the one to compare with. Needs `make lerobot-env` with Python 3.12, the newest that dm-control
installs on. Its episodes are broken off after `--peer-steps`, of which the reset, the mean step and
the last say how long 300 take.

Each round each contender takes its turn; ratios are taken within a round, and the median over
rounds is reported. Episodes a minute are of 300 steps, also where shorter ones were played, because
a step is slow. Wants an idle machine: where something else runs, "alone" finds a free core and the
pool does not, and "at once" is far below "alone".
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from peers import PEER_PYTHON, Peer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from turns import make_parser, write_report

from act_lightning.batch import DataSpec, Observation
from act_lightning.execution import ExecutionConfig
from act_lightning.lerobot.exporting import export_lerobot
from act_lightning.policy import Policy, bare_checkpoint, build_net
from act_lightning.sim.env import EnvConfig, make_env
from act_lightning.sim.opengl import draw_one_pixel, find_backend
from act_lightning.sim.rollout import ChunkPolicy, RolloutPool

ROOT = Path(__file__).parents[2]
GOAL_SHARE = 0.85
GOAL_TIMES = 25.0
EPISODE_STEPS = 300
WIDTH = 100
"""Columns of the tables."""
CHUNK_SIZE = 50
EXECUTIONS = {"chunked": ExecutionConfig(), "ensembled": ExecutionConfig(ensemble_decay=0.01)}
REST = np.array([0, -0.96, 1.16, 0, -0.3, 0, 0.1] * 2, dtype=np.float32)
RESNET18 = {"weights": "imagenet", "norm": "frozen_batch"}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A rollout to be measured."""

    cameras: tuple[str, ...]
    execution: str
    policy: str = "trivial"
    steps: int = EPISODE_STEPS
    """Control steps an episode; fewer where a step is slow."""
    episodes: int = 16
    """Episodes a core and round."""

    @property
    def env(self) -> EnvConfig:
        return EnvConfig(
            cameras=self.cameras, env_state=not self.cameras, max_episode_steps=self.steps
        )

    @property
    def name(self) -> str:
        return f"{'top' if self.cameras else 'state'}, {self.execution}"


CASES = [
    Case(cameras=(), execution="chunked"),
    Case(cameras=(), execution="ensembled"),
    Case(cameras=("top",), execution="chunked"),
    Case(cameras=("top",), execution="ensembled", steps=100, episodes=8),
    Case(cameras=(), execution="chunked", policy="base"),
    Case(cameras=(), execution="ensembled", policy="base", steps=100, episodes=8),
    Case(cameras=("top",), execution="chunked", policy="base", episodes=8),
    Case(cameras=("top",), execution="ensembled", policy="base", steps=50, episodes=8),
]


class TrivialPolicy:
    """Gives the same chunk whatever it sees: the arms swing about their rest position."""

    def __init__(self) -> None:
        phase = np.arange(14) + 2 * np.pi * np.arange(CHUNK_SIZE)[:, None] / CHUNK_SIZE
        self.chunk = torch.from_numpy(REST + 0.05 * np.sin(phase).astype(np.float32))

    def predict_chunk(self, observation: Observation, seeds: Tensor | None = None) -> Tensor:
        return self.chunk.expand(len(observation), *self.chunk.shape)

    def blocks(self, execution: ExecutionConfig, num_steps: int) -> list[NDArray[np.float32]]:
        """The actions of an episode, a (S, A) block for each time the policy is asked."""
        executor, row = execution.build(1, *self.chunk.shape), torch.tensor([0])
        blocks: list[NDArray[np.float32]] = []
        while sum(map(len, blocks)) < num_steps:
            executor.push(row, self.chunk.unsqueeze(0))
            blocks.append(executor.pop_block(row)[0].numpy())
        return blocks


def make_policy(cameras: tuple[str, ...], backbone: dict[str, Any] | None = None) -> Policy:
    """The network of experiments/base.yaml, untrained, made to stay near the rest position."""
    net = yaml.safe_load((ROOT / "experiments" / "base.yaml").read_text())["model"]["net"]
    if backbone is not None:
        net["init_args"]["backbone"] = backbone
    spec = DataSpec(
        task="insertion",
        fps=50,
        dim_qpos=14,
        dim_action=14,
        dim_env_state=0 if cameras else 14,
        cameras=cameras,
        image_size=(120, 160) if cameras else (0, 0),
    )
    torch.manual_seed(0)
    policy = Policy(build_net({"net": net, "spec": asdict(spec)}))
    assert policy.chunk_size == CHUNK_SIZE
    normalizer = policy.net.get_submodule("normalizer")
    normalizer.get_buffer("action_mean").copy_(torch.from_numpy(REST))
    normalizer.get_buffer("action_std").fill_(0.02)
    return policy


# ---- scaling ------------------------------------------------------------------------------------


class LoneCore:
    """A process that steps one environment on one core."""

    def __init__(self, core: int) -> None:
        context = get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=serve_core, args=(theirs, core), daemon=True)
        self._process.start()

    def begin(self, case: Case, episodes: int) -> None:
        blocks = TrivialPolicy().blocks(EXECUTIONS[case.execution], case.steps)
        self._connection.send((case.env, list(range(episodes)), blocks))

    def finish(self) -> float:
        """Steps a second of what `begin` began."""
        rate: float = self._connection.recv()
        return rate

    def close(self) -> None:
        self._connection.close()
        self._process.join()


def serve_core(connection: Connection, core: int) -> None:
    """The process of a LoneCore; ends when the other side closes the connection."""
    os.sched_setaffinity(0, {core})
    os.environ["LP_NUM_THREADS"] = "0"  # As the pool's workers draw: Mesa reads it later.
    envs: dict[str, gymnasium.Env[Any, Any]] = {}
    while True:
        try:
            config, seeds, blocks = connection.recv()
        except EOFError:
            return
        env = envs.get(repr(config)) or envs.setdefault(repr(config), make_env(config))
        start = time.perf_counter()
        steps = sum(play_alone(env, seed, blocks) for seed in seeds)
        connection.send(steps / (time.perf_counter() - start))


def play_alone(env: gymnasium.Env[Any, Any], seed: int, blocks: list[NDArray[np.float32]]) -> int:
    """Steps one episode as a worker of the pool does; returns its length."""
    env.reset(seed=seed)
    world: Any = env.unwrapped
    steps = 0
    while True:
        for block in blocks:
            for action in block:
                _, terminated, truncated = world.advance(action)
                steps += 1
                if terminated or truncated:
                    return steps
            world.observe()


def measure_scaling(rounds: int, cases: list[Case]) -> list[dict[str, Any]]:
    """Steps a second by case and contender, a list over rounds each."""
    cores = sorted(os.sched_getaffinity(0))
    rates: list[dict[str, list[float]]] = [{} for _ in cases]
    with ExitStack() as stack:
        lone = [LoneCore(core) for core in cores]
        for one in lone:
            stack.callback(one.close)
        pools: dict[str, RolloutPool] = {}
        for case in cases:
            if repr(case.env) not in pools:
                pools[repr(case.env)] = stack.enter_context(RolloutPool(case.env))
        contenders = [scaling_contenders(case, lone, pools[repr(case.env)]) for case in cases]
        for by_name in contenders:
            by_name["at once"](1)
            by_name["pool"](8)  # Every slot makes its environment.
        for _ in range(rounds):
            for case, by_name, collected in zip(cases, contenders, rates, strict=True):
                for name, play in by_name.items():
                    collected.setdefault(name, []).append(play(case.episodes))
    return [scaling_row(*pair) for pair in zip(cases, rates, strict=True)]


def scaling_contenders(
    case: Case, lone: list[LoneCore], pool: RolloutPool
) -> dict[str, Callable[[int], float]]:
    """Functions that play a number of episodes a core; they return steps a second."""
    policy = make_policy(case.cameras) if case.policy == "base" else TrivialPolicy()

    def alone(episodes: int) -> float:
        return sum(at_once([one], episodes) for one in lone)

    def at_once(cores: list[LoneCore], episodes: int) -> float:
        for one in cores:
            one.begin(case, episodes)
        return sum(one.finish() for one in cores)

    return {
        "alone": alone,
        "at once": lambda episodes: at_once(lone, episodes),
        "pool": lambda episodes: play_pool(case, pool, policy, episodes * len(lone)),
    }


def play_pool(case: Case, pool: RolloutPool, policy: ChunkPolicy, episodes: int) -> float:
    """Steps a second of a rollout."""
    start = time.perf_counter()
    results = pool.rollout(policy, range(episodes), {case.execution: EXECUTIONS[case.execution]})
    seconds = time.perf_counter() - start
    wrong = [r for r in results if r.steps != case.steps or r.error]
    assert not wrong, f"{case.name}: an episode did not run its {case.steps} steps: {wrong[0]}"
    return episodes * case.steps / seconds


def scaling_row(case: Case, rates: dict[str, list[float]]) -> dict[str, Any]:
    """Medians of one case."""
    shares = np.array(rates["pool"]) / rates["alone"]
    return {
        "name": case.name,
        "policy": case.policy,
        "steps_per_second": {name: float(np.median(values)) for name, values in rates.items()},
        "episodes_per_minute": 60 / EPISODE_STEPS * float(np.median(rates["pool"])),
        "share": float(np.median(shares)),
        "share_range": [float(shares.min()), float(shares.max())],
        "share_of_at_once": float(np.median(np.array(rates["pool"]) / rates["at once"])),
        "goal": GOAL_SHARE if case.policy == "trivial" else None,
    }


def print_scaling(rows: list[dict[str, Any]]) -> None:
    """Prints the rows for people."""
    table = Table(title="steps a second; episodes of the pool a minute; share of the cores alone")
    headings = (
        "rollout",
        "policy",
        "alone",
        "at once",
        "pool",
        "per min",
        "share",
        "range",
        "goal",
    )
    for heading in headings:
        table.add_column(heading, justify="left" if heading in headings[:2] else "right")
    for row in rows:
        table.add_row(
            row["name"],
            row["policy"],
            *(f"{row['steps_per_second'][name]:.0f}" for name in ("alone", "at once", "pool")),
            f"{row['episodes_per_minute']:.0f}",
            f"{row['share']:.2f}",
            "{:.2f}-{:.2f}".format(*row["share_range"]),
            "" if row["goal"] is None else f"{row['goal']:.2f}",
        )
    Console(width=WIDTH).print(table)


# ---- against LeRobot ----------------------------------------------------------------------------


def play_peer(peer: Peer, num_envs: int, execution: ExecutionConfig) -> float:
    """Episodes a minute of LeRobot's."""
    order = {"num_envs": num_envs, "ensemble_decay": execution.ensemble_decay}
    seconds = peer.ask(order)
    *steps, last = seconds["steps"]
    episode: float = seconds["reset"] + (EPISODE_STEPS - 1) * float(np.mean(steps)) + last
    return 60 * num_envs / episode


@contextmanager
def start_peer(policy: Policy, steps: int) -> Iterator[Peer]:
    """Exports the policy as `export-lerobot` does, and starts LeRobot with it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "run" / "checkpoints").mkdir(parents=True)
        torch.save(bare_checkpoint(policy.net), folder / "run" / "checkpoints" / "best.ckpt")
        export_lerobot(folder / "run", folder / "policy")
        script = Path(__file__).with_name("lerobot_rollouts.py")
        command = [PEER_PYTHON, script, folder / "policy", f"{steps}"]
        settings = {"MUJOCO_GL": find_backend(), "HF_HUB_OFFLINE": "1"}
        with Peer(command, folder / "LeRobot.log", **settings) as peer:
            yield peer


def measure_peer(rounds: int, peer_steps: int) -> list[dict[str, Any]]:
    """Episodes a minute by way of executing and contender, a list over rounds each."""
    policy = make_policy(("top",), RESNET18)
    num_cores = len(os.sched_getaffinity(0))
    cases = [
        Case(cameras=("top",), execution="chunked"),
        Case(cameras=("top",), execution="ensembled", steps=50, episodes=8),
    ]
    rates: dict[str, dict[str, list[float]]] = {case.execution: {} for case in cases}
    with ExitStack() as stack:
        pools = [stack.enter_context(RolloutPool(case.env)) for case in cases]
        peer = stack.enter_context(start_peer(policy, peer_steps))
        for case, pool in zip(cases, pools, strict=True):
            play_pool(case, pool, policy, 8 * num_cores)
        for _ in range(rounds):
            for case, pool in zip(cases, pools, strict=True):
                collected = rates[case.execution]
                for num_envs in dict.fromkeys((1, num_cores)):
                    rate = play_peer(peer, num_envs, EXECUTIONS[case.execution])
                    collected.setdefault(f"LeRobot, {num_envs}", []).append(rate)
                steps = play_pool(case, pool, policy, case.episodes * num_cores)
                collected.setdefault("ours", []).append(60 / EPISODE_STEPS * steps)
    return [peer_row(execution, by_name) for execution, by_name in rates.items()]


def peer_row(execution: str, rates: dict[str, list[float]]) -> dict[str, Any]:
    """Medians of one way of executing."""
    theirs = np.array([values for name, values in rates.items() if name != "ours"])
    times = np.array(rates["ours"]) / theirs.max(axis=0)
    return {
        "execution": execution,
        "episodes_per_minute": {name: float(np.median(values)) for name, values in rates.items()},
        "times": float(np.median(times)),
        "times_range": [float(times.min()), float(times.max())],
        "goal": GOAL_TIMES,
    }


def print_peer(rows: list[dict[str, Any]]) -> None:
    """Prints the rows for people."""
    table = Table(title="episodes a minute from one camera, the same policy")
    names = list(rows[0]["episodes_per_minute"])
    for heading in ("", *names, "times LeRobot", "range", "goal"):
        table.add_column(heading, justify="right" if heading else "left")
    for row in rows:
        table.add_row(
            row["execution"],
            *(f"{row['episodes_per_minute'][name]:.2f}" for name in names),
            f"{row['times']:.1f}",
            "{:.1f} - {:.1f}".format(*row["times_range"]),
            f"{row['goal']:.0f}",
        )
    Console(width=WIDTH).print(table)


def main() -> None:
    """Parses the command line, measures, prints."""
    parser = make_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="how often all take their turn")
    parser.add_argument("--parts", nargs="+", default=["scaling", "peer"], help="what to measure")
    parser.add_argument("--peer-steps", type=int, default=50, help="LeRobot's steps an episode")
    arguments = parser.parse_args()
    if "peer" in arguments.parts and not PEER_PYTHON.is_file():
        sys.exit(f"{PEER_PYTHON} does not exist: make lerobot-env, or give --parts scaling")
    report: dict[str, Any] = {"opengl": draw_one_pixel()}
    if "scaling" in arguments.parts:
        report["scaling"] = measure_scaling(arguments.rounds, CASES)
        print_scaling(report["scaling"])
    if "peer" in arguments.parts:
        report["peer"] = measure_peer(arguments.rounds, arguments.peer_steps)
        print_peer(report["peer"])
    write_report(arguments.json, report)


if __name__ == "__main__":
    main()
