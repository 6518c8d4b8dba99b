"""Time to 90% success on insertion_state: ours as shipped against LeRobot's ACT by its defaults.

    python tests/bench/success.py [--worlds 50] [--interval 250] [--limit 6] [--smoke] [--json FILE]

Both learn from the same demonstrations, which the experiment's own `record` makes once and
`export-dataset` writes for LeRobot (all of them are LeRobot's; ours holds a tenth out). Ours is
`python -m act_lightning fit` with experiments/insertion_state.yaml, its schedule included, but
validated more often. LeRobot's ACT is trained by its own parts and defaults (success_lerobot.py:
float32, 512 wide, chunks of 100, batches of 8, AdamW at 1e-5), with the default 4 loader processes
or none, whichever takes more steps when tried for a minute before.

They take turns on all cores: ours trains until its next validation and waits; LeRobot's then trains
for `--limit` times as long and waits. So both meet the same machine, and when ours is there,
LeRobot's has had `--limit` times its seconds. The clocks count everything from the start of the
process to the end of the turn, imports, data and (ours) validation losses and checkpoints included,
but for rollouts and what is saved only to be played.

Success is counted in the worlds of validation (seeds 2,000,000 + i), in the experiment's ways of
executing, the better of which counts: the time is that of the first turn after which it is 90% or
above. Ours are played by `fit` itself, in bfloat16 where it trains so. LeRobot's policy is taken
over by `read_policy`, compared with LeRobot's own predictions, and played in float32 by the same
rollout pool with the same horizons, ten worlds at a time until so many have failed that 90% is out
of reach, the last time all.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peers import PEER_PYTHON, ROOT, Peer
from rich.console import Console
from rich.table import Table
from turns import Goal, make_parser, print_goals, write_report

from act_lightning.batch import Observation
from act_lightning.cli import ConfigReader
from act_lightning.lerobot.dataset_exporting import export_dataset
from act_lightning.lerobot.importing import read_policy
from act_lightning.policy import Policy
from act_lightning.sim.config import FIRST_VALIDATION_SEED
from act_lightning.sim.env import data_spec
from act_lightning.sim.results import wilson_interval
from act_lightning.sim.rollout import RolloutPool

BENCH = Path(__file__).parent
CONFIGS = [
    part
    for name in ("base", "insertion_state")
    for part in ("--config", str(ROOT / "experiments" / f"{name}.yaml"))
]
OURS, LEROBOT = "ours", "LeRobot"
SUCCESS = 0.9
GOAL_TIMES = 5.0
TOLERANCE = 1e-4
"""Of an action of LeRobot's policy as ours, against LeRobot's own: rad, or openings of 0 to 1."""
WORLDS_AT_ONCE = 10
TRY_SECONDS = 15.0
"""A loader's turn, when it is found out which is the quicker."""
SMOKE = ["--demonstrations.episodes=12", "--trainer.max_steps=20"]

console = Console(width=110)


@dataclass(frozen=True, kw_only=True)
class Row:
    """A trained policy."""

    who: str
    seconds: float
    """Spent in training."""
    steps: int
    successes: dict[str, tuple[int, int]]
    """Worlds that succeeded, and worlds played, by way of executing."""

    def reaches(self, num_worlds: int) -> bool:
        """Whether one way of executing succeeds in 90% of all worlds."""
        return any(
            played == num_worlds and won >= SUCCESS * num_worlds
            for won, played in self.successes.values()
        )


class Trainee(Peer):
    """A process that trains in turns; `seconds` counts those of its turns."""

    def __init__(self, command: Sequence[str | Path], log: Path, **settings: str | Path) -> None:
        self.seconds = 0.0
        self._started = time.monotonic()
        super().__init__(command, log, cwd=log.parent, **settings)

    def turn(self, order: Mapping[str, Any] | None = None) -> Any:
        """Gives an order, waits for the answer, and adds up the seconds, rollouts left out."""
        # The first turn began with the process.
        start = self._started if self.seconds == 0 else time.monotonic()
        answer = self.receive() if order is None else self.ask(order)
        self.seconds += time.monotonic() - start - answer.get("rollout_seconds", 0.0)
        return answer


class Contest:
    """Both trainings of the same demonstrations, and the worlds in which they are played."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder = options, folder
        self.peer_machine: dict[str, Any] = {}
        changes = SMOKE if options.smoke else []
        name = f"success_{'smoke' if options.smoke else 'insertion_state'}"
        self.store = options.data_dir.resolve() / f"{name}.zarr"
        self.dataset = options.data_dir.resolve() / f"{name}_lerobot"
        self.settings = [*CONFIGS, *changes, f"--demonstrations.path={self.store}"]
        sections = ConfigReader(self.settings).config_init
        self.env, self.executions = sections.env, sections.rollout.executions

    def prepare(self) -> None:
        """Records, and exports, what is not there yet."""
        command = [sys.executable, "-m", "act_lightning", "record", *self.settings]
        if subprocess.run(command).returncode:  # it has said why
            sys.exit(1)
        if not self.dataset.exists():
            export_dataset(self.store, self.dataset)

    def ours(self) -> Trainee:
        """Starts our training, which goes on to its first validation."""
        options = [
            f"--trainer.val_check_interval={self.options.interval}",
            f"--rollout.episodes={self.options.worlds}",
            "--rollout.final_episodes=0",
            "--trainer.callbacks+=success_turns.Turns",
        ]
        command = [sys.executable, "-m", "act_lightning", "fit", *self.settings, *options]
        return Trainee(command, self.folder / "ours.log", PYTHONPATH=BENCH)

    def lerobot(self, num_workers: int) -> Trainee:
        """Starts LeRobot's training, which waits for an order."""
        command = [PEER_PYTHON, BENCH / "success_lerobot.py", self.dataset, str(num_workers)]
        log, hub = self.folder / "lerobot.log", self.options.data_dir.resolve() / "hub"
        return Trainee(command, log, HF_HUB_OFFLINE="1", HF_HOME=hub)

    def try_workers(self) -> dict[int, float]:
        """Steps a second of LeRobot's, by the number of loader processes."""
        with ExitStack() as stack:
            tried = {workers: stack.enter_context(self.lerobot(workers)) for workers in (4, 0)}
            seconds, rounds = (1.0, 1) if self.options.smoke else (TRY_SECONDS, 3)
            rates: dict[int, list[float]] = {workers: [] for workers in tried}
            for _ in range(rounds):
                for workers, trainee in tried.items():
                    # The first of a turn refills what the other's loader left empty.
                    before = trainee.turn({"until": time.monotonic()})["steps"]
                    start = time.monotonic()
                    after = trainee.turn({"until": start + seconds})["steps"]
                    rates[workers].append((after - before) / (time.monotonic() - start))
        return {workers: float(np.median(values)) for workers, values in rates.items()}

    def play_lerobot(self, trainee: Trainee, *, whole: bool) -> dict[str, tuple[int, int]]:
        """Plays what LeRobot has trained; `whole`: also when 90% is out of reach."""
        spec = data_spec(self.env)
        with tempfile.TemporaryDirectory(dir=self.folder) as name:
            self.peer_machine = trainee.ask({"save": name})["machine"]
            policy = Policy(read_policy(Path(name), spec.task, spec.fps))
            _check(policy, Path(name))
        return {name: self._play(policy, name, whole=whole) for name in self.executions}

    def _play(self, policy: Policy, execution: str, *, whole: bool) -> tuple[int, int]:
        num_worlds, won, played = self.options.worlds, 0, 0
        seeds = [FIRST_VALIDATION_SEED + i for i in range(num_worlds)]
        with RolloutPool(self.env) as pool:
            while played < num_worlds:
                if not whole and num_worlds - (played - won) < SUCCESS * num_worlds:
                    break
                some = seeds[played : played + WORLDS_AT_ONCE]
                results = pool.rollout(policy, some, {execution: self.executions[execution]})
                won, played = won + sum(result.success for result in results), played + len(some)
        return won, played

    def take_turns(self, num_workers: int) -> list[Row]:
        """Trains ours until it succeeds, or ends, and LeRobot's meanwhile."""
        rows: list[Row] = []
        limit, num_worlds = self.options.limit, self.options.worlds
        theirs = None
        with ExitStack() as stack:
            ours = stack.enter_context(self.ours())
            answer = ours.turn()
            while True:
                played = {name: (won, of) for name, (won, of) in answer["successes"].items()}
                rows.append(
                    Row(who=OURS, seconds=ours.seconds, steps=answer["steps"], successes=played)
                )
                _say(rows[-1])
                is_last = rows[-1].reaches(num_worlds) or answer["last"]
                theirs = theirs or stack.enter_context(self.lerobot(num_workers))
                if not any(row.who == LEROBOT and row.reaches(num_worlds) for row in rows):
                    left = limit * ours.seconds - theirs.seconds
                    steps = theirs.turn({"until": time.monotonic() + left})["steps"]
                    played = self.play_lerobot(theirs, whole=is_last)
                    rows.append(
                        Row(who=LEROBOT, seconds=theirs.seconds, steps=steps, successes=played)
                    )
                    _say(rows[-1])
                if is_last:
                    return rows
                answer = ours.turn({})


def _check(policy: Policy, folder: Path) -> None:
    """Compares our form of LeRobot's policy with what LeRobot predicted.

    Raises:
        SystemExit: they differ.
    """
    saved = {name: torch.from_numpy(value) for name, value in np.load(folder / "check.npz").items()}
    actions = saved.pop("actions")
    error = float((policy.predict_chunk(Observation(images=None, **saved)) - actions).abs().max())
    if not error <= TOLERANCE:
        raise SystemExit(f"LeRobot's policy as ours is {error:.2g} off; at most {TOLERANCE:g}")


def summarise(rows: list[Row], num_worlds: int) -> tuple[list[Goal], dict[str, Any]]:
    """Seconds to 90% of each (null: not reached), and their ratio against the goal."""
    reached: dict[str, float | None] = {}
    for who in (OURS, LEROBOT):
        seconds = (row.seconds for row in rows if row.who == who and row.reaches(num_worlds))
        reached[who] = next(seconds, None)
    spent = max(row.seconds for row in rows if row.who == LEROBOT)
    ours, theirs = reached[OURS], reached[LEROBOT]
    name = "seconds to 90% success, LeRobot's over ours"
    if ours is None:
        name += " (ours did not reach it)"
    elif theirs is None:
        name += " (more than this: LeRobot did not reach it)"
    times = (theirs or spent) / ours if ours else 0.0
    return [Goal(name, times, GOAL_TIMES)], {"seconds_to_90": reached, "times": times}


def print_rows(rows: list[Row], executions: Sequence[str]) -> None:
    """Prints the rows for people."""
    table = Table(title="success by training time; in parentheses Wilson's 95% interval")
    for heading in ("who", "training, s", "steps", *executions):
        table.add_column(heading, justify="left" if heading == "who" else "right")
    for row in rows:
        rates = (_text(*row.successes[name]) for name in executions)
        table.add_row(row.who, f"{row.seconds:.0f}", f"{row.steps}", *rates)
    console.print(table)


def _text(won: int, played: int) -> str:
    low, high = wilson_interval(won, played)
    return f"{won}/{played} ({low:.0%} - {high:.0%})"


def _say(row: Row) -> None:
    rates = ", ".join(f"{name} {_text(*counts)}" for name, counts in row.successes.items())
    console.print(f"{row.who}, {row.seconds:.0f} s, step {row.steps}: {rates}", highlight=False)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = make_parser(__doc__, data_dir=True)
    parser.add_argument("--worlds", type=int, default=50, help="played at a time (50)")
    parser.add_argument("--interval", type=int, default=250, help="our steps a turn (250)")
    parser.add_argument("--limit", type=float, default=6.0, help="LeRobot's time over ours (6)")
    parser.add_argument("--workers", type=int, help="LeRobot's loader processes; default: try")
    parser.add_argument("--smoke", action="store_true", help="a minute: proves nothing")
    options = parser.parse_args()
    if options.smoke:
        options.worlds, options.interval, options.limit = 1, 10, 0.5
    return options


def main() -> None:
    """Parses the command line, trains both, prints."""
    options = parse_arguments()
    if not PEER_PYTHON.is_file():
        sys.exit(f"{PEER_PYTHON} does not exist: make lerobot-env")
    with tempfile.TemporaryDirectory() as name:
        contest = Contest(options, Path(name))
        contest.prepare()
        rates = {} if options.workers is not None else contest.try_workers()
        workers = max(rates, key=rates.__getitem__) if rates else options.workers
        tried = ", ".join(f"{rate:.2f} with {count}" for count, rate in rates.items())
        console.print(f"LeRobot: {workers} loader processes (steps a second: {tried or 'given'})")
        rows = contest.take_turns(workers)
    print_rows(rows, list(contest.executions))
    goals, figures = summarise(rows, options.worlds)
    print_goals(goals, console)
    report = {
        "settings": {
            "worlds": options.worlds,
            "interval": options.interval,
            "limit": options.limit,
        },
        "loader_processes": {"taken": workers, "steps_per_second": rates},
        "rows": [asdict(row) for row in rows],
        **figures,
        "goals": [goal.as_dict() for goal in goals],
        "machine_of_lerobot": contest.peer_machine,
    }
    write_report(options.json, report)


if __name__ == "__main__":
    main()
