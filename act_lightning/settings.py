"""Nested settings by dotted name, as on the command line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def flatten(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by dotted name; lists and empty mappings are values.

    Args:
        settings: nested, as in a configuration file.
    """
    return dict(_flat(settings, ""))


def _flat(settings: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
