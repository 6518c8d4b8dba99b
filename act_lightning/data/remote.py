"""A store's files in an object store that speaks S3, through boto3.

The objects below `s3://bucket/prefix` are listed once, when the store is opened: names, sizes and
ETags. Every later request asks for that ETag, so an object that changes during a run is an error
and never mixed data, and a missing file costs no request. boto3 takes endpoint, region and
credentials from the standard environment variables, files and profiles.

Every request is retried here as a whole, body included: boto3 itself does not retry once the body
has begun. Shards are also copied to local disk, see `mirror`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Lock
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

import boto3
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    PartialCredentialsError,
)
from botocore.exceptions import (
    ConnectionError as NoConnectionError,
)
from botocore.parsers import ResponseParserError
from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_exponential, wait_random
from zarr.abc.store import Store as ZarrStore

from act_lightning.data.files import LocalFiles
from act_lightning.data.mirror import Mirror, MirrorConfig
from act_lightning.data.zarr_files import ZarrFiles

ATTEMPTS = 8
"""Of each request; the pauses between them add up to 13 s."""
OPENING_ATTEMPTS = 3
"""Of the first request, so that a wrong endpoint is told at once."""
TIMEOUT = 10.0
"""Seconds of silence after which a request is tried again; half of it to connect."""
CONCURRENT = 32
"""Requests for a batch's frames at once."""

T = TypeVar("T")


class _Object(NamedTuple):
    size: int
    etag: str


@dataclass
class _Process:
    """What each process makes for itself, because it does not survive a fork."""

    client: Any
    pool: ThreadPoolExecutor
    lock: Lock = field(default_factory=Lock)
    mirror: Mirror | None = None
    copies: LocalFiles = field(init=False)
    """Of the mirror."""
    requests: int = 0
    """Reads over the network, those for copies apart."""
    busy: bool = True
    """Whether the last batch needed any."""


class S3Files:
    """Files below `s3://bucket/prefix`.

    Pickling sends the listing and the settings: a loader worker reads the version of the store that
    its parent opened.

    Args:
        url: `s3://bucket/prefix`.
        mirror: copies of shards on local disk; None: the default.

    Raises:
        ValueError: the URL names no bucket.
    """

    def __init__(self, url: str, mirror: MirrorConfig | None = None) -> None:
        parts = urlsplit(url)
        self.bucket, self.prefix = parts.netloc, parts.path.strip("/")
        if parts.scheme != "s3" or not self.bucket or parts.query or parts.fragment:
            raise ValueError(f"{url!r} is no object store; give s3://bucket/path/of/the/store")
        self.url = f"s3://{self.bucket}/{self.prefix}".rstrip("/")
        self.mirror = MirrorConfig() if mirror is None else mirror
        # Kept, as a process started by forkserver has the environment of the server's start.
        variables = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
        self._endpoint = next(filter(None, map(os.environ.get, variables)), None)
        self._region = os.environ.get("AWS_REGION")
        self._listing: dict[str, _Object] | None = None
        # By process, and those of the parent are kept: to collect them might wait for its threads.
        self._processes: dict[int, _Process] = {}

    def __str__(self) -> str:
        return self.url

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_processes": {}}

    def read(self, name: str) -> bytes:
        """A whole file, over the network: the small ones are read once."""
        size = self._object(name).size
        self._process.requests += 1
        return self._get(name, 0, size)

    def read_range(self, name: str, start: int, size: int) -> bytes:
        """`size` bytes from `start` on, fewer where the file ends; from its copy if there is one.

        Otherwise over the network, and its copy is begun.
        """
        self._object(name)
        process = self._process
        if (mirror := process.mirror or self._open_mirror(process)) and (copy := mirror.find(name)):
            try:
                return process.copies.read_range(copy, start, size)
            except OSError:
                mirror.forget(name)
        process.requests += 1
        return self._get(name, start, size)

    def read_tail(self, name: str, size: int) -> tuple[bytes, int]:
        """The last `size` bytes, fewer of a shorter file, and the file's length."""
        length = self._object(name).size
        start = max(0, length - size)
        return self.read_range(name, start, length - start), length

    def exists(self, name: str = "") -> bool:
        """Whether there is such a file or folder; without a name: anything at all."""
        folder = f"{name}/" if name else ""
        return name in self._objects or any(other.startswith(folder) for other in self._objects)

    def for_each(self, function: Callable[[T], None], items: Sequence[T]) -> None:
        """Calls `function`, which reads files, on every item, in threads while there is latency.

        After a batch that was served by the mirror alone, the next one is read in a plain loop:
        threads would cost more than they give.
        """
        process = self._process
        before = process.requests
        if process.busy:
            list(process.pool.map(function, items))
        else:
            for item in items:
                function(item)
        process.busy = process.requests > before

    def zarr_store(self) -> ZarrStore:
        """The same files for zarr-python, read-only."""
        return ZarrFiles(self)

    @property
    def _process(self) -> _Process:
        process = self._processes.get(os.getpid())
        if process is None:
            new = _Process(self._connect(), ThreadPoolExecutor(CONCURRENT, "act-s3"))
            process = self._processes.setdefault(os.getpid(), new)  # another thread may be first
        return process

    @property
    def _objects(self) -> dict[str, _Object]:
        if self._listing is None:
            self._listing = self._request(self.url, self._list, OPENING_ATTEMPTS)
        return self._listing

    def _object(self, name: str) -> _Object:
        try:
            return self._objects[name]
        except KeyError:
            raise FileNotFoundError(f"{self.url}/{name}: there is no such object") from None

    def _connect(self) -> Any:
        config = Config(
            connect_timeout=TIMEOUT / 2,
            read_timeout=TIMEOUT,
            retries={"mode": "standard", "total_max_attempts": 1},
            max_pool_connections=CONCURRENT + 16,
            response_checksum_validation="when_required",
            tcp_keepalive=True,
        )
        try:
            # A session of its own: boto3's default one is not safe to use in several threads.
            session = boto3.session.Session(region_name=self._region)
            return session.client("s3", config=config, endpoint_url=self._endpoint)
        except PartialCredentialsError as error:
            raise PermissionError(
                f"{self.url}: {str(error).rstrip('.')}. {_CREDENTIALS}"
            ) from error
        except (BotoCoreError, ValueError) as error:
            raise OSError(
                f"{self.url}: the S3 client refuses its settings: {error}. Check AWS_ENDPOINT_URL, "
                "AWS_REGION and AWS_PROFILE"
            ) from error

    def _list(self) -> dict[str, _Object]:
        folder = f"{self.prefix}/" if self.prefix else ""
        pages = self._process.client.get_paginator("list_objects_v2")
        return {
            found["Key"].removeprefix(folder): _Object(found["Size"], found["ETag"])
            for page in pages.paginate(Bucket=self.bucket, Prefix=folder)
            for found in page.get("Contents", ())
        }

    def _get(self, name: str, start: int, size: int) -> bytes:
        """Bytes of an object, over the network."""
        found = self._object(name)
        size = min(size, found.size - start)
        if size <= 0:
            return b""
        where = {"Bucket": self.bucket, "Key": f"{self.prefix}/{name}".lstrip("/")}
        client = self._process.client

        def read() -> bytes:
            answer = client.get_object(
                **where, IfMatch=found.etag, Range=f"bytes={start}-{start + size - 1}"
            )
            if answer["ETag"] != found.etag:  # a server that ignores If-Match
                raise OSError(_CHANGED.format(f"{self.url}/{name}"))
            content: bytes = answer["Body"].read()
            if len(content) != size:
                raise IncompleteReadError(actual_bytes=len(content), expected_bytes=size)
            return content

        return self._request(f"{self.url}/{name}", read, ATTEMPTS)

    def _request(self, place: str, request: Callable[[], T], attempts: int) -> T:
        """Calls `request`, again while it fails in a way that may pass.

        Raises:
            OSError: it failed; the message says what, where, how often, and what to do.
        """
        retrying = Retrying(
            retry=retry_if_exception(_may_pass),
            stop=stop_after_attempt(attempts),
            wait=wait_exponential(multiplier=0.1, max=10) + wait_random(0, 0.1),
            reraise=True,
        )
        try:
            return retrying(request)
        except (BotoCoreError, ClientError) as error:
            tries = attempts if _may_pass(error) else 1
            raise self._explained(place, error, tries) from error

    def _explained(self, place: str, error: Exception, tries: int) -> OSError:
        """boto3's error as a built-in one whose message says what to do."""
        endpoint = self._process.client.meta.endpoint_url
        if isinstance(error, NoCredentialsError):
            return PermissionError(f"{place}: {str(error).rstrip('.')}. {_CREDENTIALS}")
        if not isinstance(error, ClientError):
            return OSError(
                f"{place}: no whole answer from {endpoint} in {tries} tries; the last: {error}. "
                "Check that the server runs, the network, and AWS_ENDPOINT_URL"
            )
        code = error.response.get("Error", {}).get("Code", "")
        status = _status(error)
        if code == "NoSuchBucket":
            return FileNotFoundError(
                f"{place}: {endpoint} has no bucket {self.bucket!r}. Check its name, and "
                "AWS_ENDPOINT_URL and AWS_REGION"
            )
        if status == 412:
            return OSError(_CHANGED.format(place))
        if status == 404:
            return OSError(f"{place} was there when the store was opened and is gone now")
        if status in (401, 403):
            return PermissionError(
                f"{place}: {endpoint} refuses access ({status} {code}). {_CREDENTIALS}; they need "
                f"s3:ListBucket and s3:GetObject for {self.url}"
            )
        return OSError(
            f"{place}: {endpoint} answered {status} {code} in {tries} of {tries} tries: {error}. "
            "Check the server, and AWS_ENDPOINT_URL and AWS_REGION"
        )

    def _open_mirror(self, process: _Process) -> Mirror | None:
        if self.mirror.max_gb == 0:
            return None
        with process.lock:
            if process.mirror is None:
                sizes = {name: found.size for name, found in self._objects.items()}
                mirror = Mirror(self.mirror, self._version(), sizes, self._get)
                process.copies = LocalFiles(mirror.folder)
                process.mirror = mirror
        return process.mirror

    def _version(self) -> str:
        """Names this version of the store: another if any object's name, size or ETag differs."""
        endpoint = self._process.client.meta.endpoint_url
        contents = repr((endpoint, self.url, sorted(self._objects.items())))
        return f"{self.bucket}-{hashlib.sha256(contents.encode()).hexdigest()[:32]}"


_CREDENTIALS = (
    "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (and AWS_SESSION_TOKEN if there is one), or "
    "AWS_PROFILE"
)
_CHANGED = (
    "{} was changed since the store was opened. Nothing may write to a store that is read; open it "
    "again for its new content"
)


def _may_pass(error: BaseException) -> bool:
    """Whether a request may succeed when tried again."""
    if isinstance(error, ClientError):
        code = error.response.get("Error", {}).get("Code", "")
        return _status(error) in (429, 500, 502, 503, 504) or code in ("SlowDown", "RequestTimeout")
    return isinstance(
        error, (NoConnectionError, HTTPClientError, IncompleteReadError, ResponseParserError)
    )


def _status(error: ClientError) -> int:
    status: int = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return status
