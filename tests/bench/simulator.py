"""Control steps a second of our environments against stock gym-aloha's, in one interleaved run.

    python tests/bench/simulator.py [--rounds 20] [--steps 3] [--json FILE]

Every round each contender takes a few steps, so that a load on the machine meets all of them;
the ratio of a round is taken within it, and the median over rounds is reported. Stock gym-aloha
always renders three cameras of 480x640, whatever is asked for.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
from rich.console import Console
from rich.table import Table
from turns import make_parser, write_report

from act_lightning.sim.env import EnvConfig, make_env
from act_lightning.sim.opengl import draw_one_pixel, find_backend

STOCK = "stock gym-aloha, 480x640"
GOALS = {"fast, top 480x640": 20.0, "full, top 480x640": 3.0}
REST = np.array([0, -0.96, 1.16, 0, -0.3, 0, 0.1] * 2, dtype=np.float32)


def make_contenders() -> dict[str, Callable[[int], None]]:
    """Functions that take a number of steps in an environment of their own, by name."""
    # dm_control chooses its OpenGL when imported; both sides shall use the same.
    os.environ.setdefault("MUJOCO_GL", find_backend())
    import gym_aloha  # noqa: F401  registers the ids

    envs: dict[str, gymnasium.Env[Any, Any]] = {
        STOCK: gymnasium.make("gym_aloha/AlohaInsertion-v0", obs_type="pixels_agent_pos")
    }
    for quality in ("fast", "full"):
        for size in ((480, 640), (120, 160)):
            config = EnvConfig(cameras=("top",), image_size=size, render_quality=quality)
            envs[f"{quality}, top {size[0]}x{size[1]}"] = make_env(config)
    two = EnvConfig(cameras=("left_wrist", "right_wrist"))
    envs["fast, two wrists 120x160"] = make_env(two)
    envs["state only"] = make_env(EnvConfig())
    for env in envs.values():
        env.reset(seed=0)
    return {name: make_stepper(env) for name, env in envs.items()}


def make_stepper(env: gymnasium.Env[Any, Any]) -> Callable[[int], None]:
    """A function that steps `env` around its rest position."""
    rng = np.random.default_rng(0)

    def take(num_steps: int) -> None:
        for _ in range(num_steps):
            env.step(REST + rng.normal(0, 0.02, 14).astype(np.float32))

    return take


def measure(rounds: int, steps: int) -> dict[str, list[float]]:
    """Seconds a step, by contender and round."""
    contenders = make_contenders()
    for take in contenders.values():
        take(1)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, take in contenders.items():
            # Quick contenders take more steps, or the clock and the caches would be measured.
            count = steps if name == STOCK else 3 * steps
            start = time.perf_counter()
            take(count)
            seconds[name].append((time.perf_counter() - start) / count)
    return seconds


def summarise(seconds: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Median time and ratio of each contender."""
    stock = np.array(seconds[STOCK])
    rows = []
    for name, values in seconds.items():
        ratios = stock / np.array(values)
        rows.append(
            {
                "name": name,
                "ms_per_step": 1e3 * float(np.median(values)),
                "steps_per_second": 1 / float(np.median(values)),
                "ratio": float(np.median(ratios)),
                "ratio_quartiles": np.quantile(ratios, [0.25, 0.75]).tolist(),
                "goal": GOALS.get(name),
            }
        )
    return rows


def print_table(rows: list[dict[str, Any]], title: str) -> None:
    """Prints the rows for people."""
    table = Table(title=title)
    for heading in ("environment", "ms a step", "steps/s", "times stock", "quartiles", "goal"):
        table.add_column(heading, justify="left" if heading == "environment" else "right")
    for row in rows:
        low, high = row["ratio_quartiles"]
        table.add_row(
            row["name"],
            f"{row['ms_per_step']:.2f}",
            f"{row['steps_per_second']:.1f}",
            f"{row['ratio']:.1f}",
            f"{low:.1f} - {high:.1f}",
            "" if row["goal"] is None else f"{row['goal']:.0f}",
        )
    Console().print(table)


def main() -> None:
    """Parses the command line, measures, prints."""
    parser = make_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=20, help="how often all take their turn")
    parser.add_argument("--steps", type=int, default=3, help="stock gym-aloha's steps a round")
    arguments = parser.parse_args()
    opengl = draw_one_pixel()
    rows = summarise(measure(arguments.rounds, arguments.steps))
    print_table(rows, f"insertion, one environment each, {opengl}")
    write_report(arguments.json, {"opengl": opengl, "rows": rows})


if __name__ == "__main__":
    main()
