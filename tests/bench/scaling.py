"""What training costs, whether gradients cross in time, and how far training should scale.

    python tests/bench/scaling.py costs --json FILE [--stores DIR]
    python tests/bench/scaling.py predict FILE [--mfu 0.1] [--cores 16] [--rank-batch 64]
    python tests/bench/scaling.py overlap [--rounds 7] [--experiments insertion ...]
    python tests/bench/scaling.py check [--rounds 5]

`costs` measures each of EXPERIMENTS: operators and FLOPs of a step, parameters, when the buckets
of gradients are full, bytes and time of a sample, of a control step, of a checkpoint. It records
three demonstrations of each (minutes, for those at 480x640), or takes those in DIR.

`predict` puts them into scaling_model.py. Times on a GPU follow from the one step that was timed on
an H100 (H100_STEP_S): its host launches one operator after the other, and needs as long for each
of another experiment's.

`overlap` trains with DistributedDataParallel and gloo on two processes, a thread each: when each
bucket is sent, as a share of the backward pass; and a step of two processes that exchange gradients
against two that do not, and against one alone, in turns.

`check` compares the model of a step with measured ones of 1, 2 and 4 processes that exchange
gradients of `insertion`'s sizes through DistributedDataParallel. They sleep instead of computing,
as two cores cannot compute for four; each exchange is a real one, delayed to what the named network
would take. What is predicted uses what one process alone was measured to do.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from scaling_costs import SMALL_MB, measure_costs, record
from scaling_model import (
    GPU_FLOPS,
    NETWORKS,
    Assumptions,
    Costs,
    checkpoint_seconds,
    compute_seconds,
    exposed_seconds,
    first_read_seconds,
    ring_seconds,
    rollout_seconds,
    step_seconds,
    strong_efficiency,
    validation_seconds,
    weak_efficiency,
)
from scaling_ranks import Group, Link, Spent

EXPERIMENTS = ("insertion_state", "insertion", "paper/insertion")
H100_STEP_S = 0.038
"""paper/insertion, batch 8, one H100: experiments/LOG.md, 2026-11-23, "reading demonstrations"."""
RANKS = (1, 2, 4, 8, 16, 32, 64)
LINKS = (Link(0.2e-3, 400e6), Link(1e-3, 100e6), Link(1e-3, 50e6), Link(5e-3, 12.5e6))
"""Networks of `check`: from one that hides all of `insertion`'s gradients to one that bounds."""
CONTENDERS = ("alone", "apart", "together", "small buckets")
SHOWN: dict[str, Callable[[Costs], str]] = {
    "parameters, M": lambda c: f"{c.parameters / 1e6:.2f}",
    "gradients, float32, MB": lambda c: f"{c.gradient_bytes / 1e6:.1f}",
    "gradients, bfloat16, MB": lambda c: f"{c.gradient_bytes / 2e6:.1f}",
    "GFLOP a sample, training": lambda c: f"{c.flops / 1e9:.2f}",
    "operators of a step": lambda c: f"{c.step_operators}",
    "operators of a query": lambda c: f"{c.query_operators}",
    "operators of a batch of validation": lambda c: f"{c.evaluate_operators}",
    "backward, share of a step here": lambda c: f"{c.backward_share:.0%}",
    "buckets of 1 MB": lambda c: (
        f"{len(c.small_buckets)}, the first at {c.small_buckets[0][0]:.0%}"
    ),
    "buckets, MB": lambda c: ", ".join(f"{size / 1e6:.1f}" for _, size in c.buckets),
    "full after, of the backward pass": lambda c: ", ".join(f"{at:.0%}" for at, _ in c.buckets),
    "batch": lambda c: f"{c.batch_size}",
    "a step reads, compressed, MB": lambda c: f"{c.batch_size * c.stored_bytes / 1e6:.2f}",
    "a step to the GPU, MB": lambda c: f"{c.batch_size * c.delivered_bytes / 1e6:.2f}",
    "reading a sample, ms of a core": lambda c: f"{1e3 * c.read_s:.3f}",
    "simulating a control step, ms": lambda c: f"{1e3 * c.advance_s:.2f}",
    "drawing what the policy sees, ms": lambda c: f"{1e3 * c.observe_s:.2f}",
    "checkpoint, MB": lambda c: f"{c.checkpoint_bytes / 1e6:.1f}",
}
console = Console(width=140)


# ---- costs --------------------------------------------------------------------------------------


def run_costs(options: argparse.Namespace) -> None:
    """Measures all experiments, prints a table and writes the file that `predict` reads."""
    rows = []
    for experiment in EXPERIMENTS:
        store = options.stores / f"{experiment.replace('/', '_')}.zarr"
        record(experiment, store)
        rows.append(measure_costs(experiment, store))
    table = Table(title="costs")
    table.add_column("")
    for row in rows:
        table.add_column(row.name, justify="right")
    for name, text in SHOWN.items():
        table.add_row(name, *map(text, rows))
    console.print(table)
    options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


# ---- predict ------------------------------------------------------------------------------------


def run_predict(options: argparse.Namespace) -> None:
    """Prints what the model expects of 1 to 64 GPUs."""
    read = [Costs(**row) for row in json.loads(options.file.read_text())]
    timed = next(costs for costs in read if costs.name == "paper/insertion")
    machine = Assumptions(
        host_s=H100_STEP_S / timed.step_operators, mfu=options.mfu, cores=options.cores
    )
    console.print(f"host: {1e6 * machine.host_s:.1f} us an operator; {machine}")
    for costs in read:
        print_steps(costs, machine, options.rank_batch or costs.batch_size, options.accumulate)
        print_rest(costs, machine)


def print_steps(costs: Costs, machine: Assumptions, rank_batch: int, accumulate: int) -> None:
    """Efficiency of steps, on each network; at the end with halved gradients, or small buckets."""
    batch = costs.batch_size
    alone = compute_seconds(costs, batch, machine)
    grows = machine.mfu * GPU_FLOPS * costs.step_operators * machine.host_s / costs.flops
    console.print(
        f"\n{costs.name}: a step on one GPU {1e3 * alone:.1f} ms at batch {batch}; the GPU is "
        f"slower than the host from {grows:.0f} samples on"
    )
    table = Table()
    for heading in ("network", "batch", *map(str, RANKS), "64, bfloat16", "64, 1 MB"):
        table.add_column(heading, justify="right")
    for network in NETWORKS:
        weak = [weak_efficiency(costs, n, rank_batch, network, machine, accumulate) for n in RANKS]
        finer = replace(costs, buckets=costs.small_buckets)
        variants: list[tuple[Costs, int]] = [(costs, 2), (finer, 1)]
        for variant, compression in variants:
            step = step_seconds(
                variant, 64, rank_batch, network, machine,
                accumulate=accumulate, compression=compression,
            )  # fmt: skip
            weak.append(accumulate * compute_seconds(costs, rank_batch, machine) / step)
        table.add_row(network.name, f"{rank_batch} a rank", *(f"{e:.0%}" for e in weak))
        strong = [strong_efficiency(costs, n, batch, network, machine) for n in RANKS]
        table.add_row("", f"{batch} in all", *(f"{e:.1%}" if e else "-" for e in strong))
    console.print(table)


def print_rest(costs: Costs, machine: Assumptions) -> None:
    """Seconds of what interrupts training, and the share of training that all of it takes."""
    table = Table(title=f"{costs.name}, between two validations: {costs.interval_steps} steps, s")
    for heading in ("GPUs", "steps", "rollouts", "validation", "checkpoints", "not training"):
        table.add_column(heading, justify="right")
    for ranks in (1, 8, 64):
        network = NETWORKS[1]
        steps = costs.interval_steps * step_seconds(
            costs, ranks, costs.batch_size, network, machine
        )
        rest = (
            rollout_seconds(costs, ranks, machine),
            validation_seconds(costs, ranks, costs.batch_size, machine),
            checkpoint_seconds(costs, machine),
        )
        share = sum(rest) / (steps + sum(rest))
        table.add_row(str(ranks), f"{steps:.1f}", *(f"{s:.2f}" for s in rest), f"{share:.0%}")
    console.print(table)
    step = step_seconds(costs, 1, costs.batch_size, NETWORKS[1], machine)
    console.print(
        f"reading all frames once: {first_read_seconds(costs, 1, machine):.1f} s on one node, "
        f"{first_read_seconds(costs, 64, machine):.1f} s on 8; cold, 64 ranks would want "
        f"{64 * costs.batch_size * costs.stored_bytes / step / 1e9:.2f} GB/s; two threads read "
        f"{2 / costs.read_s:.0f} samples/s, a rank wants {costs.batch_size / step:.0f}"
    )
    print_intervals(costs, machine, ranks=8)


def print_intervals(costs: Costs, machine: Assumptions, ranks: int) -> None:
    """After how many steps rollouts take little of the time, and how many worlds cost no more."""
    step = step_seconds(costs, ranks, costs.batch_size, NETWORKS[1], machine)
    rollout = rollout_seconds(costs, ranks, machine)
    worlds = costs.episodes
    while rollout_seconds(replace(costs, episodes=worlds + 1), ranks, machine) <= rollout:
        worlds += 1
    console.print(
        f"on {ranks} GPUs rollouts take half of the time if they come every "
        f"{rollout / step:.0f} steps, a tenth every {9 * rollout / step:.0f}; {worlds} worlds take "
        f"no longer than {costs.episodes}"
    )


# ---- overlap ------------------------------------------------------------------------------------


def run_overlap(options: argparse.Namespace) -> None:
    """Prints when buckets are sent, and what exchanging gradients costs on two processes."""
    rows = []
    for experiment in options.experiments:
        store = options.stores / f"{experiment.replace('/', '_')}.zarr"
        record(experiment, store)
        batch = 2 if experiment.startswith("paper") else None
        with (
            Group(1, experiment, store, batch_size=batch) as one,
            Group(1, experiment, store, batch_size=batch) as other,
            Group(2, experiment, store, batch_size=batch) as both,
            Group(2, experiment, store, batch_size=batch, bucket_cap_mb=SMALL_MB) as small,
        ):
            for group in (one, other, both, small):
                group.run(3)
            taken: dict[str, list[Spent]] = {name: [] for name in CONTENDERS}
            for _ in range(options.rounds):
                taken["alone"] += one.run(options.steps)[0]
                other.start(options.steps)
                taken["apart"] += one.run(options.steps)[0]
                other.finish()
                taken["together"] += both.run(options.steps)[0]
                taken["small buckets"] += small.run(options.steps)[0]
        rows.append(_report(experiment, taken, options.rounds))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


def _report(experiment: str, taken: dict[str, list[Spent]], rounds: int) -> dict[str, Any]:
    alone_s = min(spent.step_s for spent in taken["alone"])
    console.print(f"\n{experiment}: a step alone {1e3 * alone_s:.0f} ms")
    row: dict[str, Any] = {"name": experiment, "alone_s": alone_s}
    for name in ("together", "small buckets"):
        spents = taken[name]
        buckets = _median_buckets(spents)
        left = [(spent.backward_s - spent.gradients_s) / spent.step_s for spent in spents]
        row[name] = {
            "buckets": buckets,
            "hidden": statistics.median(spent.hidden_share for spent in spents),
            "left": statistics.median(left),
        }
        sent = ", ".join(f"{size / 1e6:.1f} MB at {at:.0%}" for at, size in buckets)
        console.print(
            f"  {name}: sent {sent} of the backward pass; {row[name]['hidden']:.0%} of the "
            f"exchange before its end, then {row[name]['left']:.1%} of the step left waiting"
        )
    for name, base in zip(CONTENDERS[1:], ("alone", "apart", "apart"), strict=True):
        row[f"{name} / {base}"] = found = _compare_steps(taken[name], taken[base], rounds)
        low, middle, high = found["quartiles"]
        console.print(
            f"  {name} / {base}: median {middle:.2f} (quartiles {low:.2f} - {high:.2f}), of the "
            f"least {found['least']:.2f}, processor time {found['cpu']:.2f}"
        )
    return row


def _compare_steps(spents: list[Spent], base: list[Spent], rounds: int) -> dict[str, Any]:
    mine, theirs = (
        np.array([(s.step_s, s.cpu_s) for s in some]).reshape(rounds, -1, 2).min(axis=1)
        for some in (spents, base)
    )
    ratio, cpu_ratio = (mine / theirs).T
    return {
        "quartiles": np.quantile(ratio, [0.25, 0.5, 0.75]).tolist(),
        "least": float(mine[:, 0].min() / theirs[:, 0].min()),
        "cpu": float(np.median(cpu_ratio)),
    }


def _median_buckets(spents: Sequence[Spent]) -> list[tuple[float, int]]:
    return [
        (statistics.median(spent.buckets[i][0] for spent in spents), size)
        for i, (_, size) in enumerate(spents[0].buckets)
    ]


# ---- check --------------------------------------------------------------------------------------


def run_check(options: argparse.Namespace) -> None:
    """Prints predicted and measured steps of 1, 2 and 4 processes."""
    store = options.stores / "insertion.zarr"
    record("insertion", store)
    table = Table(title="a step, ms: predicted / median measured (quartiles)")
    for heading in ("buckets of", "processes", "link", "predicted", "measured", "error"):
        table.add_column(heading, justify="right")
    errors = []
    for cap in (None, SMALL_MB):
        groups = [
            Group(ranks, "insertion", store, asleep=True, bucket_cap_mb=cap) for ranks in (1, 2, 4)
        ]
        taken: dict[tuple[int, Link], list[Spent]] = {}
        try:
            for group in groups:
                group.run(4)
            for _ in range(options.rounds):
                for link in LINKS:
                    for group in groups:
                        spents = group.run(3, link)[0][1:]
                        taken.setdefault((group.ranks, link), []).extend(spents)
        finally:
            for group in groups:
                group.close()
        alone = [spent for (ranks, _), spents in taken.items() if ranks == 1 for spent in spents]
        for ranks in (2, 4):
            for link in LINKS:
                errors.append(_compare(table, cap, alone, taken[ranks, link], ranks, link))
    console.print(table)
    console.print(
        f"error: median {statistics.median(map(abs, errors)):.1%}, largest "
        f"{max(errors, key=abs):+.1%} of {len(errors)}"
    )


def _compare(
    table: Table,
    cap: int | None,
    alone: Sequence[Spent],
    found: Sequence[Spent],
    ranks: int,
    link: Link,
) -> float:
    compute = statistics.median(spent.step_s for spent in alone)
    backward = statistics.median(spent.gradients_s - spent.forward_s for spent in alone)
    buckets = _median_buckets(alone)
    predicted = compute + exposed_seconds(
        buckets, backward, lambda size: ring_seconds(size, ranks, link.hop_s, link.bytes_s)
    )
    low, middle, high = np.quantile([spent.step_s for spent in found], [0.25, 0.5, 0.75])
    error = float(predicted / middle - 1)
    table.add_row(
        f"{cap or '1 and 25'} MB: {len(buckets)}",
        str(ranks),
        f"{1e3 * link.hop_s:g} ms, {link.bytes_s / 1e6:g} MB/s",
        f"{1e3 * predicted:.1f}",
        f"{1e3 * middle:.1f} ({1e3 * low:.1f} - {1e3 * high:.1f})",
        f"{error:+.1%}",
    )
    return error


def main() -> None:
    """Parses the command line and runs the part that it names."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parts = parser.add_subparsers(required=True)
    costs = parts.add_parser("costs")
    costs.add_argument("--json", type=Path, required=True)
    costs.set_defaults(run=run_costs)
    predict = parts.add_parser("predict")
    predict.add_argument("file", type=Path)
    predict.add_argument("--mfu", type=float, default=0.1)
    predict.add_argument("--cores", type=int, default=16, help="CPU cores a GPU")
    predict.add_argument("--rank-batch", type=int, help="samples a rank; default the experiment's")
    predict.add_argument("--accumulate", type=int, default=1)
    predict.set_defaults(run=run_predict)
    overlap = parts.add_parser("overlap")
    overlap.add_argument("--rounds", type=int, default=7)
    overlap.add_argument("--steps", type=int, default=4)
    overlap.add_argument("--experiments", nargs="+", default=EXPERIMENTS, choices=EXPERIMENTS)
    overlap.add_argument("--json", type=Path)
    overlap.set_defaults(run=run_overlap)
    check = parts.add_parser("check")
    check.add_argument("--rounds", type=int, default=5)
    check.set_defaults(run=run_check)
    for part in (costs, overlap, check):
        part.add_argument("--stores", type=Path, help="folder of the demonstrations, kept")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        options.stores = getattr(options, "stores", None) or Path(folder)
        options.run(options)


if __name__ == "__main__":
    main()
