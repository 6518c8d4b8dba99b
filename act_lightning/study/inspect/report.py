"""What an inspection says of a store: plain frozen data, for the table, the picture and JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Limits:
    """From where on something is called odd. Damage (NaN, unreadable data) needs no limit."""

    jump: float = 8.0
    """A change from one step to the next is a jump above so many times what 99% of the
    dimension's changes stay below, changes of zero not counted, and above a twentieth of the
    dimension's range. A switch, whose changes are all of one size, never jumps by this rule."""
    clipped: float = 0.002
    """A dimension is clipped if at least this share of its steps lies exactly at its smallest or
    largest value, in two or more visits of three or more steps each that are arrived at without
    slowing down: of the three changes up to the extreme the last is cut short, and the second is
    at least 3/4 of the first, and half of the dimension's median change. A joint that comes to
    rest slows down before, and a switch has no change before. A gripper, which spends more than
    half of all steps at its two extremes and at least a tenth at each, is not clipped either."""
    length: float = 3.0
    """An episode is much longer or shorter than the rest if it differs from the median length by
    more than this factor, in a store of three or more episodes."""
    outside: float = 1.0
    """An action is far outside of the range of its joint by more than so many times that range."""
    moved: float = 0.05
    """The robot has moved if a joint is elsewhere by this share of its range: the same picture
    cannot show both. From one step to the next, it has also moved if a joint changes by as much of
    its range as in half of the steps at which the picture changes."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not value > 0:
                raise ValueError(f"limit {name}={value}; give more than 0")
        if self.length <= 1 or self.jump <= 1:
            raise ValueError(f"limits length={self.length}, jump={self.jump}; give more than 1")


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where something was found: an episode, or some of its steps."""

    episode: int | None = None
    """Number of the episode; None: the whole store."""
    id: int | None = None
    """Its id in the store."""
    step: int | None = None
    """First step; None: the whole episode."""
    last_step: int | None = None
    """Last step; equal to `step` if there is one only."""
    detail: str = ""
    """What is there."""

    def __str__(self) -> str:
        parts = [] if self.episode is None else [f"episode {self.episode} (id {self.id})"]
        if self.step is not None:
            several = self.last_step != self.step
            parts.append(
                f"steps {self.step} to {self.last_step}" if several else f"step {self.step}"
            )
        where = ", ".join(parts)
        return f"{where}: {self.detail}" if where and self.detail else where or self.detail


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One kind of trouble in one array, with all its places."""

    kind: str
    """One word for programs, as "jump"."""
    subject: str
    """What has it, as "data/qpos" or "camera top"."""
    damaged: bool
    """Whether the data cannot be used as it is; otherwise it is odd, and for a person to judge."""
    title: str
    """One line."""
    rule: str = ""
    """How it was decided, where that is not plain."""
    places: tuple[Place, ...] = ()
    """In the order of time."""


@dataclass(frozen=True, kw_only=True)
class Dimension:
    """Finite values of one dimension of a low-dimensional array; None where there are none."""

    min: float | None
    max: float | None
    mean: float | None
    std: float | None
    remarks: tuple[str, ...] = ()
    """Of "constant", "clipped at min", "clipped at max", "jumps", "not finite"."""


@dataclass(frozen=True, kw_only=True)
class ActionFit:
    """How the actions follow the joints, for stores where both have the same dimensions."""

    comparable: tuple[int, ...]
    """Dimensions in which action and qpos correlate at some lag, so that they mean one joint."""
    lag: int | None
    """Steps by which the joints follow the actions, the median over `comparable`."""


@dataclass(frozen=True, kw_only=True)
class ArraySize:
    """Bytes of one array."""

    name: str
    raw: int
    """Of its values in memory."""
    stored: int | None
    """Of its files; None if the place of the store cannot tell."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything an inspection found."""

    location: str
    version: int
    task: str
    fps: float
    complete: bool
    expected_episodes: int | None
    frames: int
    lengths: tuple[int, ...]
    """Steps of every episode."""
    cameras: tuple[str, ...]
    image_size: tuple[int, int]
    successes: int
    failures: int
    unknown: int
    """Episodes of which nobody said whether they succeeded."""
    skipped: int
    """Episodes that were tried and not stored."""
    units: dict[str, str]
    dimensions: dict[str, tuple[Dimension, ...]]
    """By name of the array."""
    action_fit: ActionFit | None
    arrays: tuple[ArraySize, ...]
    pictures: int
    """Camera frames that were read and checked."""
    quick: bool
    """Only the first, middle and last frames of each episode were read."""
    limits: Limits
    findings: tuple[Finding, ...]
    """Damage first."""

    @property
    def damaged(self) -> bool:
        """Whether anything makes the store unusable as it is."""
        return any(finding.damaged for finding in self.findings)

    @property
    def seconds(self) -> float:
        """Duration of all episodes together."""
        return self.frames / self.fps

    def as_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return {"damaged": self.damaged, "seconds": self.seconds, **asdict(self)}
