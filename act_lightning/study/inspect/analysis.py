"""The inspection of a store: a function from an opened store to a report."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np

from act_lightning.study.inspect.actions import compare_actions
from act_lightning.study.inspect.opening import Opened, measure_arrays
from act_lightning.study.inspect.pictures import (
    Pictures,
    choose_frames,
    find_in_pictures,
    find_same_cameras,
    read_pictures,
)
from act_lightning.study.inspect.report import Finding, Limits, Report
from act_lightning.study.inspect.tables import look_at_table


def inspect_store(
    opened: Opened,
    limits: Limits | None = None,
    *,
    quick: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Looks at everything in a store.

    Args:
        opened: the store, however damaged.
        limits: from where on something is odd.
        quick: read only the first, middle and last frames of each episode.
        on_progress: is told how many camera frames were read, and how many there are to read.
    """
    limits = limits or Limits()
    findings = [*opened.findings]
    dimensions = {}
    for name in opened.tables:
        dimensions[name], found = look_at_table(opened, name, limits)
        findings += found
    action_fit, found = compare_actions(opened, limits)
    findings += found
    findings += _length_findings(opened, limits) + _repeated_episodes(opened)
    found, num_pictures = _look_at_pictures(opened, limits, quick, on_progress)
    findings += found
    lengths = opened.ends - opened.starts
    return Report(
        location=str(opened.files),
        version=opened.version,
        task=opened.spec.task,
        fps=opened.spec.fps,
        complete=opened.complete,
        expected_episodes=opened.expected_episodes,
        frames=opened.num_frames,
        lengths=tuple(lengths.tolist()),
        cameras=opened.spec.cameras,
        image_size=opened.spec.image_size,
        successes=int((opened.success == 1).sum()),
        failures=int((opened.success == 0).sum()),
        unknown=int((opened.success == -1).sum()),
        skipped=opened.skipped,
        units=opened.units,
        dimensions=dimensions,
        action_fit=action_fit,
        arrays=measure_arrays(opened),
        pictures=num_pictures,
        quick=quick,
        limits=limits,
        findings=tuple(sorted(findings, key=lambda finding: not finding.damaged)),
    )


def _look_at_pictures(
    opened: Opened,
    limits: Limits,
    quick: bool,
    on_progress: Callable[[int, int], None] | None,
) -> tuple[list[Finding], int]:
    """Findings of all cameras, and the number of frames read."""
    frames = choose_frames(opened, quick)
    total, done = len(frames) * len(opened.cameras), 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if on_progress is not None:
            on_progress(done, total)

    findings: list[Finding] = []
    pictures: dict[str, Pictures] = {}
    for camera, reader in opened.cameras.items():
        pictures[camera] = read_pictures(reader, frames, opened.spec.image_size, advance)
        findings += find_in_pictures(opened, camera, pictures[camera], limits, quick=quick)
    return [*findings, *find_same_cameras(pictures)], done


def _length_findings(opened: Opened, limits: Limits) -> list[Finding]:
    """Episodes of one step, and much shorter or longer ones than the rest."""
    lengths = opened.ends - opened.starts
    findings = []
    single = np.flatnonzero(lengths == 1).tolist()
    if single:
        places = tuple(opened.episode_place(episode) for episode in single)
        title = "episodes have one step only"
        findings.append(
            Finding(
                kind="single_step", subject="episodes", damaged=False, title=title, places=places
            )
        )
    if len(lengths) < 3:
        return findings
    median = float(np.median(lengths))
    far = (lengths * limits.length < median) | (lengths > median * limits.length)
    odd = np.flatnonzero(far & (lengths > 1)).tolist()
    if odd:
        findings.append(
            Finding(
                kind="length",
                subject="episodes",
                damaged=False,
                title=f"episodes are much shorter or longer than the rest (median {median:g})",
                rule=f"by more than a factor of {limits.length:g}",
                places=tuple(opened.episode_place(i, f"{lengths[i]} steps") for i in odd),
            )
        )
    return findings


def _repeated_episodes(opened: Opened) -> list[Finding]:
    """Episodes with the same joints and actions, step by step, as an earlier one."""
    seen: dict[bytes, int] = {}
    places = []
    for episode, (start, end) in enumerate(
        zip(opened.starts.tolist(), opened.ends.tolist(), strict=True)
    ):
        if end == start or any(lost[start:end].any() for lost in opened.lost.values()):
            continue
        digest = hashlib.sha256()
        for name in ("qpos", "action"):
            digest.update(opened.tables[name][start:end].tobytes())
        first = seen.setdefault(digest.digest(), episode)
        if first != episode:
            detail = f"the same as {opened.episode_place(first)}"
            places.append(opened.episode_place(episode, detail))
    if not places:
        return []
    title = "episodes are repeated: joints and actions of every step are those of an earlier one"
    return [
        Finding(
            kind="repeated",
            subject="episodes",
            damaged=False,
            title=title,
            places=tuple(places),
        )
    ]
