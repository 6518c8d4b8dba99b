"""The verbs `import-lerobot`, `export-lerobot` and `export-dataset`.

Each imports what it does the work with when it is called: networks, or libraries for video.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from rich import get_console

from act_lightning.main import VERBS

if TYPE_CHECKING:
    from act_lightning.execution import ExecutionConfig
    from act_lightning.sim.config import EnvConfig


def import_verb(args: list[str]) -> None:
    """`import-lerobot DIR RUN [--config FILE ...] [--task T] [--fps F]`."""
    parser = argparse.ArgumentParser(
        prog="act_lightning import-lerobot",
        description=f"{VERBS['import-lerobot'][1]} With --config, `evaluate RUN` can play it; "
        "settings, as --env.cameras='[top]', may follow.",
    )
    parser.add_argument("folder", metavar="DIR", type=Path, help="LeRobot's policy folder")
    parser.add_argument("run", metavar="RUN", type=Path, help="folder to make, as runs/mine/theirs")
    parser.add_argument(
        "--config", action="append", default=[], help="configuration of the world; may be repeated"
    )
    parser.add_argument("--task", help="name of the task; default the environment's")
    parser.add_argument(
        "--fps", type=float, help="control steps a second; default the environment's"
    )
    options, settings = parser.parse_known_args(args)
    if settings and not options.config:
        parser.error(f"unrecognized arguments: {' '.join(settings)}")
    from act_lightning.lerobot.importing import import_lerobot

    env: EnvConfig | None = None
    executions: dict[str, ExecutionConfig] = {}
    if options.config:
        from act_lightning.cli import ConfigReader

        configs = [part for file in options.config for part in ("--config", file)]
        sections = ConfigReader([*configs, *settings]).config_init
        env, executions = sections.env, sections.rollout.executions
    path = import_lerobot(
        options.folder,
        options.run,
        task=options.task,
        fps=options.fps,
        env=env,
        executions=executions,
    )
    get_console().print(f"written to {path}", highlight=False, soft_wrap=True)


def export_verb(args: list[str]) -> None:
    """`export-lerobot RUN DIR [--checkpoint best]`."""
    parser = argparse.ArgumentParser(
        prog="act_lightning export-lerobot", description=VERBS["export-lerobot"][1]
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="a run's folder")
    parser.add_argument("folder", metavar="DIR", type=Path, help="folder to make")
    parser.add_argument(
        "--checkpoint", default="best", help="best, last, or the path of a checkpoint"
    )
    options = parser.parse_args(args)
    from act_lightning.lerobot.exporting import export_lerobot

    export_lerobot(options.run, options.folder, checkpoint=options.checkpoint)
    get_console().print(f"written to {options.folder}", highlight=False, soft_wrap=True)


def export_dataset_verb(args: list[str]) -> None:
    """`export-dataset STORE DIR [--video | --images] [--crf N]`."""
    parser = argparse.ArgumentParser(
        prog="act_lightning export-dataset",
        description=f"{VERBS['export-dataset'][1]} LeRobot is not needed; its class opens "
        "the folder with LeRobotDataset('name/of-your-choice', root=DIR).",
    )
    parser.add_argument("store", metavar="STORE", help="demonstrations, as data/insertion.zarr")
    parser.add_argument("folder", metavar="DIR", type=Path, help="folder to make")
    frames = parser.add_mutually_exclusive_group()
    frames.add_argument(
        "--video", action="store_true", help="frames as h264 video: small, not exact (default)"
    )
    frames.add_argument("--images", action="store_true", help="frames as PNG: exact")
    parser.add_argument(
        "--crf", type=int, default=18, help="quality of the video, 0 (best) to 51 (default 18)"
    )
    parser.add_argument(
        "--data-files-size-in-mb", type=float, default=100, help="of a table (default 100)"
    )
    parser.add_argument(
        "--video-files-size-in-mb", type=float, default=200, help="of a video (default 200)"
    )
    options = parser.parse_args(args)
    from act_lightning.lerobot.dataset_exporting import export_dataset

    export_dataset(
        options.store,
        options.folder,
        images=options.images,
        crf=options.crf,
        data_files_size_in_mb=options.data_files_size_in_mb,
        video_files_size_in_mb=options.video_files_size_in_mb,
    )
    get_console().print(f"written to {options.folder}", highlight=False, soft_wrap=True)
