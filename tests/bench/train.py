"""A training step of ours against LeRobot's, and the memory that training takes.

    .venv-lerobot/bin/python tests/bench/train.py [--rounds 9] [--sizes full insertion]

`full`: the paper's sizes, batch 8, one 480x640 camera, dropout 0.1; LeRobot's defaults.
`insertion`: experiments/insertion.yaml; the same model is LeRobot's ACT with our small ResNet in
the place of its ResNet-18, which it has at one size only, and is shown too. A step is: pictures
normalised, loss, gradients, clipping, optimizer; the samples are in memory. Each contender has a
process of its own, and they take turns; only ours keeps freed memory, as our `fit` does
(act_lightning/memory.py).

First it is checked that both compute the same: loss and gradients in float32, dropout off, and what
bfloat16 changes of ours. LeRobot's processes also hold our package, which writes the policy that
they open.
"""

from __future__ import annotations

import sys
import tempfile
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from limits import Work, describe
from networks import LeRobot, Size
from numpy.typing import NDArray
from peers import Peer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from train_steps import CONTENDERS, SIZES
from turns import WIDTH, Goal, Spread, make_parser, print_goals, take_turns, write_report

from act_lightning.lerobot.names import lerobot_name, lerobot_shape
from act_lightning.nets.act import ACT

OURS = "ours, bf16"
LEROBOT, LEROBOT_BF16 = "LeRobot, float32", "LeRobot, bf16 autocast"
SAME, SAME_BF16 = "LeRobot with our ResNet, float32", "LeRobot with our ResNet, bf16 autocast"
TAKING_PART = {
    "full": [LEROBOT, LEROBOT_BF16, "ours, float32", OURS],
    "insertion": [LEROBOT, SAME, SAME_BF16, "ours, float32", OURS],
}
GOALS = {
    "cpu": {("full", LEROBOT): 4.5, ("full", LEROBOT_BF16): 2.2, ("insertion", SAME): 3.0},
    "cuda": {("full", LEROBOT): 3.0, ("full", LEROBOT_BF16): 2.0},
}
MOST_MEMORY = {"cpu": 1.0, "cuda": 0.7}
"""Of ours, by LeRobot's in float32, the same model."""
MOST_GPU_MS = 6.0
SAME_LOSS, SAME_GRADIENT = 1e-5, 1e-4
"""Largest relative difference from LeRobot's in float32."""
BFLOAT16_LOSS, BFLOAT16_GRADIENT = 0.02, 0.1
"""Largest relative difference that bfloat16 makes."""

console = Console(width=WIDTH)


class Result(NamedTuple):
    """Of a forward and a backward pass."""

    loss: float
    gradients: dict[str, Tensor]
    """By LeRobot's names, in its shapes."""

    def differences(self, other: Result) -> tuple[float, float]:
        """Relative, of the loss, and of all gradients as one vector."""
        squares = sum(
            ((self.gradients[name] - value).double().square().sum().item())
            for name, value in other.gradients.items()
        )
        size = sum(value.double().square().sum().item() for value in other.gradients.values())
        return abs(self.loss / other.loss - 1), float((squares / size) ** 0.5)


def compute(net: ACT, size: Size, bfloat16: bool) -> Result:
    """Ours, of two samples."""
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        loss = net.losses(size.batch(2), 0)["loss"]
    loss.backward()
    gradients = {}
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None
        gradients[lerobot_name(name)] = parameter.grad.reshape(lerobot_shape(name, parameter))
    return Result(loss.item(), gradients)


def compute_peer(net: ACT, size: Size) -> Result:
    """LeRobot's, of the same two samples."""
    peer = LeRobot(net)
    peer.policy.train()
    torch.manual_seed(1)
    loss, _ = peer.policy.forward(peer.before(LeRobot.samples(size.batch(2), size.spec.cameras)))
    loss.backward()
    gradients = {
        name: parameter.grad
        for name, parameter in peer.policy.named_parameters()
        if parameter.grad is not None
    }
    return Result(loss.item(), gradients)


def check(size: Size) -> dict[str, float]:
    """Compares ours with LeRobot's, and bfloat16 with float32, dropout off.

    Raises:
        SystemExit: they differ by more than is stated above.
    """
    plain = compute(size.build(dropout=0.0), size, False)
    reduced = compute(size.build(dropout=0.0), size, True)
    peer = compute_peer(size.build(dropout=0.0), size)
    found = {}
    for name, (one, other), limits in (
        ("LeRobot's", (plain, peer), (SAME_LOSS, SAME_GRADIENT)),
        ("bfloat16's", (reduced, plain), (BFLOAT16_LOSS, BFLOAT16_GRADIENT)),
    ):
        for what, value, limit in zip(
            ("loss", "gradient"), one.differences(other), limits, strict=True
        ):
            found[f"{name} {what}"] = value
            console.print(f"{name} {what} differs by {value:.1e} (at most {limit:g})")
            if not value <= limit:
                sys.exit(f"{name} {what} is another: nothing was timed")
    return found


def measure(size: str, rounds: int, device: str) -> dict[str, Any]:
    """Times and peaks of all that take part."""
    script = Path(__file__).with_name("train_steps.py")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        contenders: dict[str, Peer] = {}
        for name in TAKING_PART[size]:
            command = [sys.executable, script, name, size, f"--device={device}"]
            contenders[name] = stack.enter_context(Peer(command, folder / f"{name}.log"))
            contenders[name].receive()
        steps = {name: partial(contender.ask, {}) for name, contender in contenders.items()}
        seconds = take_turns(steps, rounds, warmup=2)
        peaks = {name: contender.ask({}) for name, contender in contenders.items()}
    memory = "peak_gpu" if device == "cuda" else "peak_rss"
    rows = [
        {
            "name": name,
            "ms": Spread.of(1000 * values)._asdict(),
            "times": Spread.of(values / seconds[OURS])._asdict(),
            "peak_bytes": peaks[name][memory],
        }
        for name, values in seconds.items()
    ]
    goals = _goals(size, seconds, {name: peak[memory] for name, peak in peaks.items()}, device)
    return {"size": size, "rows": rows, "goals": [goal.as_dict() for goal in goals]}


def _goals(
    size: str, seconds: dict[str, NDArray[Any]], peaks: dict[str, int], device: str
) -> list[Goal]:
    goals = [
        Goal(f"{size}: times {name}", Spread.of(seconds[name] / seconds[OURS]).median, wanted)
        for (where, name), wanted in GOALS[device].items()
        if where == size
    ]
    peer = SAME if SAME in peaks else LEROBOT
    memory = peaks[OURS] / peaks[peer]
    goals.append(Goal(f"{size}: memory by that of {peer}", memory, MOST_MEMORY[device], False))
    if device == "cuda" and size == "full":
        step_ms = 1000 * Spread.of(seconds[OURS]).median
        goals.append(Goal("full: ms a step", step_ms, MOST_GPU_MS, False))
    return goals


def find_limits(size: Size, ours_s: float, peer_s: float, peer: str) -> dict[str, Any]:
    """What bounds a step on the CPU.

    Args:
        size: of the network and its batch.
        ours_s: seconds of our step in bfloat16.
        peer_s: seconds of the peer's in float32.
        peer: its name.
    """
    ours = Work.of(CONTENDERS[OURS](size, "cpu")).limit(torch.bfloat16)
    theirs = Work.of(CONTENDERS[peer](size, "cpu")).limit(torch.float32)
    times = peer_s / ours["seconds"]
    console.print(
        f"{OURS}: {describe(ours, ours_s)}\n{peer}: {describe(theirs, peer_s)}\n"
        f"At its limit ours would be {times:.1f} times {peer}.",
        soft_wrap=True,
    )
    return {"ours": ours, "peer": theirs, "times_at_limit": times}


def print_rows(result: dict[str, Any]) -> None:
    """Prints one size for people."""
    table = Table(title=f"{result['size']}: a training step")
    for heading in ("", "ms (quartiles)", "times ours (quartiles)", "peak memory, MB"):
        table.add_column(heading, justify="right" if heading else "left")
    for row in result["rows"]:
        table.add_row(
            row["name"],
            Spread(**row["ms"]).text(0),
            Spread(**row["times"]).text(),
            f"{row['peak_bytes'] / 1e6:,.0f}",
        )
    console.print(table)


def main() -> None:
    """Parses the command line, checks, measures, prints."""
    parser = make_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=9, help="how often all take their turn")
    parser.add_argument("--sizes", nargs="+", default=["full", "insertion"], choices=SIZES)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    arguments = parser.parse_args()
    report: dict[str, Any] = {"sizes": []}
    differences = {name: check(SIZES[name]) for name in arguments.sizes}
    goals: list[Goal] = []
    for name in arguments.sizes:
        rounds = arguments.rounds if name == "full" else 3 * arguments.rounds
        result = measure(name, rounds, arguments.device) | {"differences": differences[name]}
        print_rows(result)
        if arguments.device == "cpu":
            medians = {row["name"]: row["ms"]["median"] / 1000 for row in result["rows"]}
            peer = LEROBOT if name == "full" else SAME
            result["limits"] = find_limits(SIZES[name], medians[OURS], medians[peer], peer)
        report["sizes"].append(result)
        goals += [Goal(**{key: goal[key] for key in Goal._fields}) for goal in result["goals"]]
    print_goals(goals, console)
    write_report(arguments.json, report)


if __name__ == "__main__":
    main()
