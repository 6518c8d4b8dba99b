"""A store's files for zarr-python, wherever they are: read-only, nothing listed.

Works with zarr 3.0.8 to 3.1, whose abstract methods differ.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import Any, NoReturn

from zarr.abc.store import (
    ByteRequest,
    OffsetByteRequest,
    RangeByteRequest,
    Store,
    SuffixByteRequest,
)
from zarr.core.buffer import Buffer, BufferPrototype, default_buffer_prototype

from act_lightning.data.files import Files


class ZarrFiles(Store):
    """What zarr-python asks for is read through `Files`; several requests run at once."""

    supports_writes = False
    supports_deletes = False
    supports_partial_writes = False
    supports_listing = False

    def __init__(self, files: Files) -> None:
        super().__init__(read_only=True)
        self._files = files

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ZarrFiles) and self._files == other._files

    def __str__(self) -> str:
        return str(self._files)

    async def get(
        self,
        key: str,
        prototype: BufferPrototype | None = None,
        byte_range: ByteRequest | None = None,
    ) -> Buffer | None:
        """A file, or some of its bytes; None if it does not exist, which zarr-python fills."""
        prototype = default_buffer_prototype() if prototype is None else prototype
        try:
            content = await asyncio.to_thread(self._read, key, byte_range)
        except FileNotFoundError:
            return None
        return prototype.buffer.from_bytes(content)

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        """Several of these."""
        return list(await asyncio.gather(*(self.get(key, prototype, r) for key, r in key_ranges)))

    async def exists(self, key: str) -> bool:
        """Whether there is such a file."""
        return await asyncio.to_thread(self._files.exists, key)

    async def set(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused, like all that writes."""
        raise NotImplementedError(f"{self}: stores are not written in place")

    delete = set_partial_values = set

    async def list(self) -> AsyncIterator[str]:
        """Refused: readers know the names."""
        raise NotImplementedError(f"{self}: files are not listed")
        yield

    def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        """Refused, as `list`."""
        return self.list()

    list_dir = list_prefix

    def _read(self, name: str, byte_range: ByteRequest | None) -> bytes:
        match byte_range:
            case RangeByteRequest(start, end):
                return self._files.read_range(name, start, end - start)
            case SuffixByteRequest(size):
                return self._files.read_tail(name, size)[0]
            case OffsetByteRequest(start):
                return self._files.read(name)[start:]
            case _:
                return self._files.read(name)
