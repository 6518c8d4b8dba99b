"""Which reader reads a source."""

from __future__ import annotations

import importlib
from pathlib import Path

from act_lightning.ingest.source import IngestOptions, Source, SourceError

FORMATS = ("lerobot", "diffusion_policy", "robomimic", "aloha")
"""Names of the reader modules, in the order in which `auto` tries them."""


def open_source(path: Path, options: IngestOptions, format: str = "auto") -> Source:
    """Opens a data set.

    Args:
        path: the source.
        options: what to take of it.
        format: one of `FORMATS`, or "auto": the first whose reader recognises it.

    Raises:
        SourceError: nothing is there, no reader recognises it, or the reader refuses it.
    """
    if not path.exists():
        raise SourceError(f"{path} is not there; give the data set's folder or file")
    for name in FORMATS if format == "auto" else (format,):
        reader = importlib.import_module(f"act_lightning.ingest.{name}")
        if format != "auto" or reader.matches(path):
            source: Source = reader.open_source(path, options)
            return source
    raise SourceError(
        f"{path} is not recognised as {', '.join(FORMATS[:-1])} or {FORMATS[-1]}; "
        "if it is one, say so with --format"
    )
