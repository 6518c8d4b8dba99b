"""Prediction: latency and throughput of ours against LeRobot's, and what speed costs in success.

    python tests/bench/policy.py [--parts latency insertion throughput] [--rounds 20] [--json FILE]
    python tests/bench/policy.py --parts success --run RUN [--episodes 50]

`latency` (batch 1) and `throughput` (batch 32) are of the full-size ACT with one camera at 480x640,
with the same weights and samples. LeRobot predicts as shipped: its preprocessor, which gets float
pictures from 0 to 1 as its data sets give them, `predict_action_chunk`, its postprocessor. Ours
gets what a store or a simulator gives, uint8. That all predict the same is checked first.
`insertion` is the network of experiments/insertion.yaml; LeRobot's ACT has our small ResNet in the
place of its own there. There is no goal for it.

Each round each contender takes its turn; ratios are taken within a round. LeRobot's has a process
of its own: ours keeps freed memory once a policy is optimized. The 99th percentile is of calls in a
row of the fastest, as a robot makes them. Where a goal is missed, limits.py says what is possible.

`success` plays the evaluation worlds of a trained run with every way of predicting.

Wants an idle machine, and the environment of `make lerobot-env`; `success` does without LeRobot.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from limits import Work, describe
from numpy.typing import NDArray
from peers import PEER_PYTHON, Peer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from train_steps import SIZES
from turns import WIDTH, Goal, Spread, make_parser, print_goals, take_turns, write_report

from act_lightning.cli import build_world, read_world
from act_lightning.evaluation import find_checkpoint
from act_lightning.policy import Policy
from act_lightning.sim.config import FIRST_EVALUATION_SEED
from act_lightning.sim.results import summarize
from act_lightning.sim.rollout import rollout

PEER, PEER_BF16 = "LeRobot, float32", "LeRobot, bf16 autocast"
PLAIN, FLOAT32, FLOAT32_COMPILED = "ours, plain", "ours, float32", "ours, float32, compiled"
BFLOAT16, FASTEST = "ours, bf16", "ours, bf16, compiled"
TOLERANCES = {
    PEER: 1e-4,
    PEER_BF16: 3e-2,
    PLAIN: 1e-5,
    FLOAT32: 1e-5,
    FLOAT32_COMPILED: 1e-5,
    BFLOAT16: 3e-2,
    FASTEST: 3e-2,
}
"""Largest difference to ours, plain, in standard deviations of the actions."""
GOAL_LATENCY, GOAL_THROUGHPUT, GOAL_P99 = 7.0, 4.0, 1.5
CALLS_IN_A_ROW = 300

console = Console(width=WIDTH)


def make_ours(policy: Policy, *, compile: bool) -> dict[str, Policy]:
    """Every way in which ours predicts."""
    made = {
        PLAIN: policy,
        FLOAT32: policy.optimized(),
        BFLOAT16: policy.optimized("bfloat16"),
    }
    if compile:
        made[FLOAT32_COMPILED] = policy.optimized(compile=True)
        made[FASTEST] = policy.optimized("bfloat16", compile=True)
    return made


class Contenders:
    """All ways to predict the same chunks, in physical units.

    Args:
        size: name of the network, see train_steps.py.
        rows: observations of a batch.
        peer: LeRobot's process.
        compile: whether there are compiled ones.

    Attributes:
        calls: by name; LeRobot's return nothing.
        chunks: the same, and all return the chunks.
    """

    def __init__(self, size: str, rows: int, peer: Peer, *, compile: bool) -> None:
        self.calls: dict[str, Callable[[], object]] = {}
        self.chunks: dict[str, Callable[[], Tensor]] = {}
        for name, bfloat16 in ((PEER, False), (PEER_BF16, True)):
            order = {"bfloat16": bfloat16}
            self.calls[name] = partial(peer.ask, order)
            self.chunks[name] = lambda order=order: torch.tensor(
                peer.ask(order | {"show": True})["chunks"]
            )
        observation = SIZES[size].batch(rows).observation
        policies = make_ours(Policy(SIZES[size].build()), compile=compile)
        for name, policy in policies.items():
            self.calls[name] = self.chunks[name] = partial(policy.predict_chunk, observation)


def check(chunks: dict[str, Callable[[], Tensor]]) -> dict[str, float]:
    """Largest difference of each to the plain prediction.

    Raises:
        SystemExit: it is not what is promised.
    """
    expected = chunks[PLAIN]()
    errors = {}
    for name, predict in chunks.items():
        errors[name] = float((predict().float() - expected).abs().max())
        if not errors[name] <= TOLERANCES[name]:
            raise SystemExit(f"{name}: differs by {errors[name]:.1e}, not {TOLERANCES[name]:.0e}")
    return errors


def measure(
    title: str, size: str, rows: int, rounds: int, *, compile: bool, tail: bool = False
) -> dict[str, Any]:
    """Times all contenders in turn, prints a table, and says what bounds ours.

    Args:
        title: of the table.
        size: name of the network.
        rows: observations of a batch.
        rounds: in which all take their turn.
        compile: whether there are compiled ones.
        tail: whether the fastest is also called many times in a row.
    """
    torch.compiler.reset()
    script = Path(__file__).with_name("policy_lerobot.py")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        command = [PEER_PYTHON, script, size, f"{rows}"]
        peer = stack.enter_context(Peer(command, folder / "LeRobot.log"))
        peer.receive()
        contenders = Contenders(size, rows, peer, compile=compile)
        errors = check(contenders.chunks)
        seconds = take_turns(contenders.calls, rounds)
    rows_of_table = _print_times(title, seconds, errors)
    report: dict[str, Any] = {"rows": rows_of_table}
    fastest = FASTEST if compile else BFLOAT16
    if tail:
        report["tail"] = measure_tail(fastest, contenders.calls[fastest])
    report["limits"] = find_limits(contenders.calls, seconds)
    return report


def _print_times(
    title: str, seconds: dict[str, NDArray[np.float64]], errors: dict[str, float]
) -> dict[str, Any]:
    table = Table("", "ms", "times LeRobot, float32", "times LeRobot, bf16", "error", title=title)
    report = {}
    for name, values in seconds.items():
        spreads = [Spread.of(1000 * values)]
        spreads += [Spread.of(seconds[one] / values) for one in (PEER, PEER_BF16)]
        ms, times, times_bf16 = spreads
        table.add_row(name, ms.text(1), times.text(), times_bf16.text(), f"{errors[name]:.1e}")
        report[name] = {
            "milliseconds": ms._asdict(),
            "times_lerobot": times._asdict(),
            "times_lerobot_bf16": times_bf16._asdict(),
            "error": errors[name],
        }
    console.print(table)
    return report


def measure_tail(name: str, predict: Callable[[], object]) -> dict[str, float]:
    """Median and 99th percentile of calls in a row, in s."""
    seconds = take_turns({"": predict}, CALLS_IN_A_ROW, warmup=10)[""]
    median, p99 = np.quantile(seconds, [0.5, 0.99]).tolist()
    console.print(
        f"{name}, {CALLS_IN_A_ROW} calls in a row: median {1000 * median:.1f} ms, "
        f"99th percentile {1000 * p99:.1f} ms",
        highlight=False,
    )
    return {"median": median, "p99": p99}


def find_limits(
    contenders: dict[str, Callable[[], object]], seconds: dict[str, NDArray[np.float64]]
) -> dict[str, Any]:
    """What bounds a prediction, and the ratio to LeRobot's float32 that it would have there.

    Counted is the work of what is not compiled; compilation may save bytes.

    Args:
        contenders: by name.
        seconds: of all of them.
    """
    report: dict[str, Any] = {}
    for name, dtype in ((FLOAT32, torch.float32), (BFLOAT16, torch.bfloat16)):
        limit = Work.of(contenders[name]).limit(dtype)
        times = float(np.median(seconds[PEER])) / limit["seconds"]
        compiled = f"{name}, compiled"
        fastest = compiled if compiled in seconds else name
        text = describe(limit, float(np.median(seconds[fastest])))
        console.print(
            f"{fastest}: {text}. At the limit {times:.2f} times LeRobot's float32.",
            highlight=False,
            soft_wrap=True,
        )
        report[fastest] = limit | {"times_lerobot": times}
    return report


def measure_success(run: Path, episodes: int, *, compile: bool) -> dict[str, Any]:
    """Plays the same worlds with every way of predicting.

    The policy gets one observation at a time, as on a robot.
    """
    world = build_world(read_world(run / "config.yaml")).rollout
    seeds = range(FIRST_EVALUATION_SEED, FIRST_EVALUATION_SEED + episodes)
    policies = make_ours(Policy.from_checkpoint(find_checkpoint(run, "best")), compile=compile)
    outcomes: dict[str, dict[tuple[str, int], bool]] = {}
    report: dict[str, Any] = {}
    table = Table("", "execution", "successes", "worlds that end otherwise", title=str(run))
    for name, policy in policies.items():
        results = rollout(policy, world.env, seeds, world.executions, policy_batch=1)
        outcomes[name] = {(r.execution, r.seed): r.success for r in results}
        report[name] = {}
        for execution, summary in summarize(results).items():
            changed = sum(
                outcomes[PLAIN][execution, seed] != outcomes[name][execution, seed]
                for seed in seeds
            )
            report[name][execution] = {"successes": summary["successes"], "changed": changed}
            successes = f"{summary['successes']}/{episodes}"
            table.add_row(name, execution, successes, str(changed))
    console.print(table)
    return {"episodes": episodes, "successes": report}


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = make_parser(__doc__)
    parts = ("latency", "insertion", "throughput", "success")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts[:3])
    parser.add_argument("--rounds", type=int, default=20, help="of batch 1")
    parser.add_argument("--batch-rounds", type=int, default=5, help="of batch 32")
    parser.add_argument("--no-compile", action="store_true", help="leave out what is compiled")
    parser.add_argument("--run", type=Path, help="a run's folder, for `success`")
    parser.add_argument("--episodes", type=int, default=50, help="worlds of `success`")
    arguments = parser.parse_args()
    if "success" in arguments.parts and arguments.run is None:
        parser.error("--parts success needs --run RUN")
    return arguments


def main() -> None:
    """Parses the command line, measures, prints."""
    arguments = parse_arguments()
    compile = not arguments.no_compile
    fastest = FASTEST if compile else BFLOAT16
    report: dict[str, Any] = {}
    goals = []
    if "latency" in arguments.parts:
        title = "full size, 480x640, batch 1"
        found = measure(title, "full", 1, arguments.rounds, compile=compile, tail=True)
        report["latency"], tail = found, found["tail"]
        times = found["rows"][fastest]["times_lerobot"]["median"]
        goals += [
            Goal("latency, batch 1, times LeRobot float32", times, GOAL_LATENCY),
            Goal("99th percentile / median", tail["p99"] / tail["median"], GOAL_P99, False),
        ]
    if "insertion" in arguments.parts:
        title = "insertion, 120x160, batch 1 (LeRobot with our ResNet)"
        report["insertion"] = measure(title, "insertion", 1, arguments.rounds, compile=compile)
    if "throughput" in arguments.parts:
        title = "full size, 480x640, batch 32"
        found = measure(title, "full", 32, arguments.batch_rounds, compile=compile)
        report["throughput"] = found
        times = found["rows"][fastest]["times_lerobot"]["median"]
        goals.append(Goal("throughput, batch 32, times LeRobot float32", times, GOAL_THROUGHPUT))
    if "success" in arguments.parts:
        report["success"] = measure_success(arguments.run, arguments.episodes, compile=compile)
    if goals:
        print_goals(goals, console)
    write_report(arguments.json, report | {"goals": [goal.as_dict() for goal in goals]})


if __name__ == "__main__":
    main()
