"""Draws what each variant of a study in the detour world answers to the first observation.

    make sweep STUDY=multimodal_kl
    .venv/bin/python experiments/multimodal/draw.py experiments/studies/multimodal_kl.yaml

The picture goes to experiments/results/<study>.png.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from matplotlib.figure import Figure

from act_lightning.cli import build_world, read_world
from act_lightning.policy import Policy
from act_lightning.sim.detour import mode_paths
from act_lightning.study.modes import draw_modes, sample_chunks
from act_lightning.study.study import read_study

RESULTS = Path(__file__).parents[1] / "results"


def draw(path: Path) -> None:
    """Draws one panel a variant, from the last checkpoint of its first seed."""
    study = read_study(path)
    figure = Figure(figsize=(10, 4), dpi=100, layout="constrained")
    columns = -(-len(study.variants) // 2)
    panels = figure.subplots(2, columns, sharex=True, sharey=True).flat
    for panel, variant in zip(panels, study.variants, strict=False):
        run = study.run(variant, study.seeds[0]).folder
        env = build_world(read_world(run / "config.yaml")).rollout.env
        net = Policy.from_checkpoint(run / "checkpoints" / "last.ckpt").net
        title = variant.name.replace("_", " ").replace("beta", "β =")
        draw_modes(panel, sample_chunks(net, env, 100), mode_paths(**env.make_kwargs), title)
    RESULTS.mkdir(exist_ok=True)
    figure.savefig(RESULTS / f"{study.name}.png", pil_kwargs={"optimize": True})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Draw the answers of a study's variants.")
    parser.add_argument("study", type=Path, help="as experiments/studies/multimodal_kl.yaml")
    draw(parser.parse_args().study)
