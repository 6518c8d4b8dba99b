"""What the KL weight does to ACT on the multimodality test: trains, tables and draws a sweep.

    .venv/bin/python experiments/multimodal/sweep.py            two modes
    .venv/bin/python experiments/multimodal/sweep.py --four     four modes

Runs are kept in runs/multimodal/sweep/<name>; those that are finished are not trained again.
The picture goes to experiments/results/multimodal_sweep.png (or multimodal_four_sweep.png).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from act_lightning.cli import build_world, read_world
from act_lightning.main import main
from act_lightning.policy import Policy
from act_lightning.sim.detour import mode_paths
from act_lightning.study.modes import draw_modes, sample_chunks

EXPERIMENTS = Path(__file__).parent.parent
BETAS = ("0.001", "0.01", "0.1", "0.3", "1", "10", "100")
COLUMNS = {
    "KL (nats)": "{kl:.2f}",
    "active units": "{active_units:.0f}",
    "L1, posterior's z": "{l1_posterior:.3f}",
    "L1, z = 0": "{l1_prior:.3f}",
    "L1, z sampled": "{l1_sampled:.3f}",
    "within tolerance": "{within_tolerance:.1%}",
    "shares": "{shares}",
    "coverage": "{coverage:.0%}",
    "rollout success": "{success:.1%}",
}


def sweep(folder: str) -> None:
    """Trains whatever is missing, prints the table, draws the picture."""
    config = f"--config={EXPERIMENTS / folder}"
    weight = "--model.net.init_args.kl_schedule.weight"
    runs = {f"β = {beta}": [f"{config}/act.yaml", f"{weight}={beta}"] for beta in BETAS}
    error = "--model.net.init_args.reconstruction"
    runs |= {
        "β = 100, squared error": [f"{config}/act.yaml", f"{weight}=100", f"{error}=mse"],
        "BC, squared error": [f"{config}/bc.yaml"],
        "BC, absolute error": [f"{config}/bc.yaml", f"{error}=l1"],
    }
    table = [f"| | {' | '.join(COLUMNS)} |", f"|{' --- |' * (1 + len(COLUMNS))}"]
    figure = Figure(figsize=(10, 4), dpi=100, layout="constrained")
    panels = figure.subplots(2, len(runs) // 2, sharex=True, sharey=True).flat
    for panel, (name, arguments) in zip(panels, runs.items(), strict=True):
        run = _train(f"{folder}/sweep/{_file_name(name)}", arguments)
        env = build_world(read_world(run / "config.yaml")).rollout.env
        samples = sample_chunks(Policy.from_checkpoint(run / "checkpoints/last.ckpt").net, env, 100)
        draw_modes(panel, samples, mode_paths(**env.make_kwargs), name)
        table.append(f"| {name} | {' | '.join(_cells(run))} |")
    results = EXPERIMENTS / "results"
    results.mkdir(exist_ok=True)
    figure.savefig(results / f"{folder}_sweep.png", pil_kwargs={"optimize": True})
    print("\n".join(table))


def _file_name(name: str) -> str:
    return name.replace("β = ", "beta_").replace(", ", "_").replace(" ", "_")


def _train(experiment: str, arguments: list[str]) -> Path:
    """Folder of the run, which is trained now if it is not there."""
    run = Path("runs", experiment, "version_0")
    if not (run / "results.json").is_file():
        arguments = [f"--config={EXPERIMENTS / 'base.yaml'}", *arguments]
        assert main(["record", *arguments]) == 0
        arguments = [*arguments, f"--experiment={experiment}", "--run=version_0"]
        assert main(["fit", *arguments]) == 0
    return run


def _cells(run: Path) -> list[str]:
    """A row of the table: what the last validation and the evaluation say."""
    events = EventAccumulator(str(run)).Reload()
    values: dict[str, Any] = {
        tag.removeprefix("val/"): events.Scalars(tag)[-1].value
        for tag in events.Tags()["scalars"]
        if tag.startswith("val/")
    }
    values |= json.loads((run / "modes.json").read_text())
    shares = [value for name, value in values.items() if name.startswith("share_")]
    values["shares"] = " / ".join(f"{share:.0%}" for share in shares)
    results = json.loads((run / "results.json").read_text())
    values["success"] = np.mean([x["success_rate"] for x in results["execution"].values()])
    cells = []
    for template in COLUMNS.values():
        try:
            cells.append(template.format(**values))
        except KeyError:  # BC has no latent
            cells.append("-")
    return cells


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Sweep the KL weight on the multimodality test.")
    parser.add_argument("--four", action="store_true", help="four modes instead of two")
    sweep("multimodal_four" if parser.parse_args().four else "multimodal")
