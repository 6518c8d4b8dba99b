"""The verb `ingest`."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from act_lightning.ingest.formats import FORMATS, open_source
from act_lightning.main import VERBS


def ingest_verb(args: list[str]) -> None:
    """`ingest SOURCE STORE [options]`."""
    parser = _parser()
    options = parser.parse_args(args)
    # Late, because help and bad usage should not wait for these libraries.
    from rich import get_console

    from act_lightning.ingest.isolate import IsolatedSource
    from act_lightning.ingest.run import ingest, verify
    from act_lightning.ingest.source import IngestOptions

    chosen = IngestOptions(
        task=options.task,
        fps=options.fps,
        cameras=options.cameras,
        qpos=_keys(options.qpos),
        action=_keys(options.action),
        env_state=_keys(options.env_state) or (),
        image_size=None if options.image_size is None else tuple(options.image_size),
        swap_red_blue=options.swap_red_blue,
        episodes=options.episodes,
    )
    console = get_console()
    opener = partial(open_source, options.source, chosen, options.format)
    with IsolatedSource(opener, options.source) as source:
        spec = source.spec
        console.print(
            f"{options.source}: {source.format}, {len(source.ids)} episodes, {spec.fps:g} fps; "
            f"qpos {spec.dim_qpos} ({', '.join(source.provenance['source']['qpos'])}), "
            f"action {spec.dim_action}, env_state {spec.dim_env_state}, "
            f"cameras {', '.join(spec.cameras) or 'none'} {spec.image_size[0]}x{spec.image_size[1]}"
            f"\nnot taken: {', '.join(source.unused) or 'nothing'}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
        ingest(source, options.store, skip_bad=options.skip_bad)
        if options.verify:
            verify(source, options.store)
    checked = ", equal to the source" if options.verify else ""
    console.print(f"written to {options.store}{checked}", highlight=False, soft_wrap=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="act_lightning ingest",
        description=f"{VERBS['ingest'][1]} Run it again to go on after an interruption.",
    )
    parser.add_argument("source", metavar="SOURCE", type=Path, help="folder or file to read")
    parser.add_argument("store", metavar="STORE", help="store to make, as data/mine.zarr")
    parser.add_argument("--format", choices=("auto", *FORMATS), default="auto")
    parser.add_argument(
        "--cameras",
        type=_cameras,
        metavar="NAME=KEY,...",
        help="cameras to take, in order, and their names in the store; none: no images; "
        "default all, under their own names",
    )
    parser.add_argument("--fps", type=float, help="control steps a second; ALOHA's default is 50")
    parser.add_argument("--task", help="name of the task")
    for option, what in (("qpos", "qpos"), ("action", "the action"), ("env-state", "env_state")):
        parser.add_argument(
            f"--{option}",
            nargs="+",
            metavar="KEY",
            help=f"what is joined to {what}; columns as 'state[:2]'",
        )
    parser.add_argument(
        "--image-size", nargs=2, type=int, metavar=("H", "W"), help="resize, averaging over areas"
    )
    parser.add_argument("--episodes", metavar="NAME", help="robomimic's filter key, as train")
    parser.add_argument(
        "--swap-red-blue", action="store_true", help="for a source whose colours come out exchanged"
    )
    parser.add_argument(
        "--skip-bad", action="store_true", help="name bad episodes and leave them out"
    )
    parser.add_argument(
        "--verify", action="store_true", help="read everything again and compare with the store"
    )
    return parser


def _cameras(text: str) -> tuple[tuple[str, str], ...]:
    """(name in the store, name in the source) of each camera."""
    if text == "none":
        return ()
    pairs = [part.partition("=") for part in text.split(",")]
    if not all(name for name, _, _ in pairs):
        raise argparse.ArgumentTypeError(f"{text!r}: write NAME=KEY,NAME=KEY,... or NAME,NAME,...")
    return tuple((name, key or name) for name, _, key in pairs)


def _keys(keys: list[str] | None) -> tuple[str, ...] | None:
    return None if keys is None else tuple(keys)
