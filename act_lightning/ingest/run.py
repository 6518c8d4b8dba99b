"""Fills a store from a data set of another format, one episode at a time.

Each episode is wholly in the store or not at all, so an ingest that was stopped or killed goes on
after the last one, and ends in the same store as an uninterrupted one. Should the source's episodes
have been numbered anew in between, that is refused.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import zarr
from rich import get_console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from act_lightning.data.layout import StoreError
from act_lightning.data.store import Store
from act_lightning.data.writer import StoreWriter
from act_lightning.ingest.source import Source, SourceError


def ingest(source: Source, location: str, *, skip_bad: bool = False) -> None:
    """Fills the store at `location`, or goes on filling it.

    Args:
        source: what to read.
        location: folder of the store.
        skip_bad: leaves out, and names, episodes that cannot be read; the store remembers them.

    Raises:
        SourceError: an episode cannot be read, or the store goes on from another source; what was
            complete before is kept.
        StoreMismatchError: a store of other settings is there.
        StoreError: the disk is full, or nothing was good.
    """
    if Path(location).exists():
        writer = StoreWriter.resume(location, source.spec, source.provenance)
    else:
        writer = StoreWriter.create(location, source.spec, source.provenance, units=source.units)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[skipped]} skipped"),
        TimeRemainingColumn(),
    )
    with writer, Progress(*columns, console=get_console()) as progress:
        if writer.num_episodes:
            _check_last(writer, source)
        pending = [id for id in source.ids if id >= writer.next_id]
        bar = progress.add_task(
            f"ingesting {location}",
            total=len(source.ids),
            completed=len(source.ids) - len(pending),
            skipped=writer.num_skipped,
        )
        for id in pending:
            try:
                _append(writer, source, id)
            except SourceError as error:
                if not skip_bad:
                    raise SourceError(
                        f"{source.name(id)} is bad. {error}. The {writer.num_episodes} episodes "
                        "before it are kept; mend it and run the command again, or leave such "
                        "episodes out with --skip-bad"
                    ) from error
                writer.skip(id)
                progress.console.print(
                    f"skipped {source.name(id)}: {error}", highlight=False, markup=False
                )
            progress.update(bar, advance=1, skipped=writer.num_skipped)
        if not writer.complete:
            writer.finalize()


def _append(writer: StoreWriter, source: Source, id: int) -> None:
    """Adds one episode.

    Raises:
        SourceError: it is bad.
        StoreError: writing failed.
    """
    try:
        writer.append(source.read(id))
    except (StoreError, SourceError):
        raise
    except ValueError as error:  # of the writer, which checks every episode
        raise SourceError(str(error)) from error


def _check_last(writer: StoreWriter, source: Source) -> None:
    """Sees that the store's last episode is still the one of that number in the source.

    Raises:
        SourceError: it is not, so that more episodes would repeat or leave out some.
    """
    group = zarr.open_group(writer.path, mode="r")
    ids, ends, qpos, actions = (
        array
        for name in ("meta/episode_id", "meta/episode_ends", "data/qpos", "data/action")
        if isinstance(array := group[name], zarr.Array)
    )
    id, start = int(np.asarray(ids[-1:])[0]), int(np.asarray(ends[-2:-1]).sum())
    if id in source.ids:
        episode = source.read(id)
        if all(
            np.array_equal(theirs.astype(np.float32), np.asarray(ours[start:]))
            for theirs, ours in ((episode.qpos, qpos), (episode.actions, actions))
        ):
            return
    raise SourceError(
        f"{writer.path}: its last episode, of id {id}, is not that of the source any more, which "
        "was changed since; ingest into another path, or move this store away"
    )


def verify(source: Source, location: str) -> None:
    """Reads the source once more and compares it with the store, value by value.

    Raises:
        SourceError: they differ; the message names episode, field and step.
    """
    store = Store.open(location)
    ids = store.episode_ids.tolist()
    if sorted([*ids, *store.skipped]) != source.ids:
        raise SourceError(f"{location} holds other episodes than the source; ingest again")
    for episode_number, id in enumerate(ids):
        start, stop = store.episode_starts[episode_number], store.episode_ends[episode_number]
        episode = source.read(id)
        tables = {"qpos": (episode.qpos, store.qpos), "action": (episode.actions, store.actions)}
        if episode.env_state is not None and store.env_state is not None:
            tables["env_state"] = (episode.env_state, store.env_state)
        for name, (theirs, ours) in tables.items():
            if not np.array_equal(theirs.astype(np.float32), ours[start:stop]):
                raise SourceError(f"{location}: {name} of {source.name(id)} differs")
        if episode.frames is None:
            continue
        frame = np.empty((*store.spec.image_size, 3), np.uint8)
        block = max(1, 2**26 // frame.nbytes)
        for number, camera in enumerate(store.spec.cameras):
            for first in range(0, stop - start, block):
                last = min(first + block, stop - start)
                for step, theirs in enumerate(episode.frames.read(number, first, last), first):
                    store.cameras[camera].read_into(int(start + step), frame)
                    if not np.array_equal(frame, theirs):
                        raise SourceError(
                            f"{location}: camera {camera} of {source.name(id)} differs at {step}"
                        )
