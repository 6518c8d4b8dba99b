"""Films of rollouts while training: a success and a failure of each way of executing, if there are.

Of each there are an animation and a strip of pictures in TensorBoard, and a video and the strip as
files, all made of the same frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image

from act_lightning.sim.film import Film
from act_lightning.sim.results import EpisodeResult, film_strip
from act_lightning.study.videos import add_gif, write_video

NUM_FILMED = 2
"""Worlds filmed at each validation: drawing costs time, also where the policy sees no images."""
FILM = Film(interval=10, size=(120, 160), overlay=True)
"""How they are filmed."""


def show_films(
    logger: TensorBoardLogger, results: Sequence[EpisodeResult], step: int, fps: float
) -> None:
    """Adds films of a success and a failure of each way to TensorBoard and to the run's media/.

    Args:
        logger: of the run.
        results: some with frames, filmed as `FILM` says.
        step: optimizer steps taken.
        fps: control steps a second.
    """
    media = Path(logger.log_dir, "media")
    media.mkdir(parents=True, exist_ok=True)
    shown = set()
    for result in results:
        outcome = "success" if result.success else "failure"
        tag = f"rollout/{result.execution}/{outcome}"
        if tag in shown or result.frames is None:
            continue
        shown.add(tag)
        strip = film_strip(result)
        logger.experiment.add_image(tag, strip, step)
        add_gif(logger.experiment, f"{tag}_film", result.frames, fps / FILM.interval, step)
        name = f"step_{step:06}_{result.execution}_{outcome}"
        Image.fromarray(strip.transpose(1, 2, 0)).save(media / f"{name}.png")
        write_video(result.frames, media / f"{name}.mp4", fps / FILM.interval)
