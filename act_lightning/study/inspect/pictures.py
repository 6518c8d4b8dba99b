"""Looks at camera frames: each is read and decoded, so damage shows; then a digest of it is kept.

Digests are compared in the end, so that memory is 8 bytes a frame; frames are read in blocks, by
threads, as decoding leaves Python free.
"""

from __future__ import annotations

import itertools
import re
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from act_lightning.data.images import FrameReader
from act_lightning.data.layout import REMEDY, StoreError
from act_lightning.study.inspect.opening import Opened
from act_lightning.study.inspect.report import Finding, Limits

BLOCK_FRAMES = 32
ROUND_BLOCKS = 256
"""Blocks handed to the threads at once, as each waits in memory."""
NUM_THREADS = 4
BLANK_LEVELS = 4
"""A picture is of one colour if each channel varies by no more than so many of 255 levels."""
BLACK_LEVEL = 16
"""A picture of one colour is black if no value is above."""
NOISE_SHARE = 0.1
"""A joint whose median change is at least this share of its range rests, and only trembles."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Pictures:
    """What was seen of the frames of one camera."""

    frames: NDArray[np.int64]
    """(n,) which were looked at, increasing."""
    digests: NDArray[np.uint64]
    """(n,) equal for equal pictures; 0 where `shown` is false."""
    shown: NDArray[np.bool_]
    """(n,) whether the frame could be read, and shows something."""
    errors: dict[int, str]
    """Why a frame could not be read, by its number."""
    blank: dict[int, str]
    """Colour of the frames of one colour, by their number."""


def choose_frames(opened: Opened, quick: bool) -> NDArray[np.int64]:
    """All frames, or the first, middle and last of each episode."""
    if not quick:
        return np.arange(opened.num_frames)
    starts, lasts = (edge[opened.ends > opened.starts] for edge in (opened.starts, opened.ends - 1))
    return np.unique(np.concatenate([starts, (starts + lasts) // 2, lasts]))


def read_pictures(
    reader: FrameReader,
    frames: NDArray[np.int64],
    image_size: tuple[int, int],
    advance: Callable[[int], None],
) -> Pictures:
    """Reads and checks frames of one camera.

    Args:
        reader: of the camera.
        frames: (n,) increasing.
        image_size: (H, W).
        advance: is told how many more were read, now and then.
    """
    digests = np.zeros(len(frames), np.uint64)
    errors: dict[int, str] = {}
    blank: dict[int, str] = {}

    def look(start: int) -> int:
        picture = np.empty((*image_size, 3), np.uint8)
        block = frames[start : start + BLOCK_FRAMES].tolist()
        for row, frame in enumerate(block, start):
            try:
                reader.read_into(frame, picture)
            except (StoreError, OSError) as error:
                errors[frame] = _cause(error)
                continue
            if colour := one_colour(picture):
                blank[frame] = colour
            else:
                digests[row] = _digest(picture)
        return len(block)

    with ThreadPoolExecutor(NUM_THREADS) as pool:
        starts = range(0, len(frames), BLOCK_FRAMES)
        for first in range(0, len(starts), ROUND_BLOCKS):
            for count in pool.map(look, starts[first : first + ROUND_BLOCKS]):
                advance(count)
    shown = ~np.isin(frames, list(errors.keys() | blank.keys()))
    return Pictures(frames=frames, digests=digests, shown=shown, errors=errors, blank=blank)


def one_colour(picture: NDArray[np.uint8]) -> str:
    """Says which, of a picture that is black or of one colour; an empty string of any other.

    Args:
        picture: (H, W, 3).
    """
    rows = picture.reshape(len(picture), -1)  # whole rows, as numpy is slow on an axis of three
    low = rows.min(axis=0).reshape(-1, 3).min(axis=0)
    high = rows.max(axis=0).reshape(-1, 3).max(axis=0)
    if np.any(high - low > BLANK_LEVELS):
        return ""
    if high.max() <= BLACK_LEVEL:
        return "black"
    return f"of one colour, RGB {' '.join(str(value) for value in high.tolist())}"


def find_in_pictures(
    opened: Opened, camera: str, pictures: Pictures, limits: Limits, *, quick: bool
) -> list[Finding]:
    """Finds what is unreadable, blank, or shows the same again although the robot has moved."""
    subject = f"camera {camera}"
    findings = []
    if pictures.errors:
        here = f"{opened.files}/"
        errors = {frame: error.replace(here, "") for frame, error in pictures.errors.items()}
        places = opened.places(errors.items())
        title = "frames cannot be read"
        findings.append(
            Finding(kind="unreadable", subject=subject, damaged=True, title=title, places=places)
        )
    if pictures.blank:
        places = opened.places(pictures.blank.items())
        title = "frames show nothing"
        rule = f"every channel varies by at most {BLANK_LEVELS} of 255 levels"
        findings.append(
            Finding(
                kind="blank", subject=subject, damaged=False, title=title, rule=rule, places=places
            )
        )
    if not quick:
        findings += _frozen(opened, subject, pictures, limits)
    findings += _shown_again(opened, subject, pictures, limits)
    return findings


def find_same_cameras(pictures: dict[str, Pictures]) -> list[Finding]:
    """Finds pairs of cameras that show the same."""
    findings = []
    for first, second in itertools.combinations(pictures, 2):
        one, other = pictures[first], pictures[second]
        both = one.shown & other.shown
        same = both & (one.digests == other.digests)
        if same.sum() > both.sum() / 2:
            findings.append(
                Finding(
                    kind="same_cameras",
                    subject=f"cameras {first} and {second}",
                    damaged=False,
                    title=f"{same.sum()} of {both.sum()} pictures are the same in both",
                )
            )
    return findings


def _frozen(opened: Opened, subject: str, pictures: Pictures, limits: Limits) -> list[Finding]:
    """Frames equal to the one before, while the robot moved."""
    qpos, is_start = _shares(opened), opened.is_start
    motion = np.abs(np.diff(qpos, axis=0, prepend=qpos[:1])).max(axis=1)
    motion[is_start] = 0
    comparable = pictures.shown & np.roll(pictures.shown, 1) & ~is_start
    repeated = comparable & (pictures.digests == np.roll(pictures.digests, 1))
    changing = motion[comparable & ~repeated]
    usual = max(float(np.median(changing)), 1e-9) if len(changing) else np.inf
    found: list[tuple[int, int]] = []
    for frame in np.flatnonzero(repeated & ~np.append(False, repeated[:-1])).tolist():
        stop = frame + 1
        while stop < len(repeated) and repeated[stop]:
            stop += 1
        span = np.ptp(qpos[frame - 1 : stop], axis=0).max()
        if motion[frame:stop].max() >= usual or span >= limits.moved:
            found.append((frame, stop - 1))
    if not found:
        return []
    count = sum(last - first + 1 for first, last in found)
    rule = f"identical pictures while a joint moves by {limits.moved:.0%} of its range"
    if len(changing):
        rule += (
            f", or by {usual:.2%} in one step, as in half of the steps where the picture changes"
        )
    return [
        Finding(
            kind="frozen",
            subject=subject,
            damaged=False,
            title=f"{count} frames repeat the one before although the robot moves "
            f"({count / max(1, len(repeated)):.1%})",
            rule=rule,
            places=tuple(opened.place(first, last=last) for first, last in found),
        )
    ]


def _shown_again(opened: Opened, subject: str, pictures: Pictures, limits: Limits) -> list[Finding]:
    """Pictures that stand at several places, where joints differ; the first place is not given."""
    qpos, is_start = _shares(opened), opened.is_start
    rows = np.flatnonzero(pictures.shown)
    order = rows[np.argsort(pictures.digests[rows], kind="stable")]
    frames, digests = pictures.frames[order], pictures.digests[order]
    bounds = np.flatnonzero(np.diff(digests, prepend=0, append=0))
    found: list[tuple[int, str]] = []
    for begin, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        if end - begin < 2:
            continue
        first, *others = frames[begin:end].tolist()
        before = first
        for frame in others:
            follows = frame == before + 1 and not is_start[frame]
            before = frame
            if not follows and np.abs(qpos[frame] - qpos[first]).max() >= limits.moved:
                found.append((frame, f"the same picture as in {opened.place(first)}"))
    if not found:
        return []
    return [
        Finding(
            kind="shown_again",
            subject=subject,
            damaged=False,
            title="pictures stand at several places although the robot is elsewhere",
            rule=f"identical pictures, and a joint differs by {limits.moved:.0%} of its range",
            places=opened.places(found),
        )
    ]


def _shares(opened: Opened) -> NDArray[np.float32]:
    """(T, D) qpos as shares of each joint's range; 0 of joints that show no motion.

    The range leaves out the outermost 1%, so that a wild value does not hide all other motion.
    """
    qpos, is_start = opened.tables["qpos"], opened.is_start
    shares = np.zeros_like(qpos)
    for joint in range(qpos.shape[1]):
        column = np.nan_to_num(qpos[:, joint], posinf=0.0, neginf=0.0)
        low, high = np.quantile(column, (0.005, 0.995)) if len(column) else (0.0, 0.0)
        if high == low:
            continue
        share = (column - low) / (high - low)
        change = np.abs(np.diff(share))[~is_start[1:]]
        if len(change) == 0 or np.median(change) < NOISE_SHARE:
            shares[:, joint] = share
    return shares


def _digest(picture: NDArray[np.uint8]) -> np.uint64:
    """Two independent checksums: quicker than a hash against forgery, which nobody attempts."""
    content = picture.tobytes()
    return np.uint64(google_crc32c.value(content) << 32 | zlib.crc32(content))


def _cause(error: Exception) -> str:
    """The message without the frame's number, so that neighbours with one cause are one place."""
    text = str(error).removesuffix(f"; {REMEDY}")
    return re.sub(r"\bframe \d+ cannot be read: ", "", text)
