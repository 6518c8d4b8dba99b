"""The verb `watch`: videos without a display, and live play with a window that a test can hold."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
import yaml
from drawing import needs_opengl

from act_lightning import watch
from act_lightning.execution import ExecutionConfig
from act_lightning.nets.bc import BCConfig
from act_lightning.policy import Policy, bare_checkpoint
from act_lightning.sim import window
from act_lightning.sim.config import FIRST_EVALUATION_SEED, EnvConfig
from act_lightning.sim.env import data_spec, make_env
from act_lightning.sim.rollout import rollout
from act_lightning.sim.worker import Episode
from act_lightning.watch import LivePolicy, watch_verb

CHUNK_SIZE = 8
EXECUTIONS = {"chunked": {"n_action_steps": 6}, "ensembled": {"ensemble_decay": 0.01}}
DETOUR = {
    "task": "act_lightning/Detour-v0",
    "observation_keys": {"qpos": "time"},
    "env_state": False,
    "max_episode_steps": 20,
}


def make_run(folder: Path, env: dict[str, Any]) -> Path:
    """A run whose best checkpoint is an untrained network."""
    torch.manual_seed(0)
    spec = data_spec(EnvConfig(**env))
    net = BCConfig(chunk_size=CHUNK_SIZE, dim_hidden=8, num_layers=1).build(spec)
    (folder / "checkpoints").mkdir(parents=True)
    torch.save(bare_checkpoint(net), folder / "checkpoints" / "best.ckpt")
    config = {"env": env, "rollout": {"executions": EXECUTIONS}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run in the detour world, on a machine without a display."""
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    return make_run(tmp_path / "run", DETOUR)


def num_frames(path: Path) -> int:
    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


# --- videos ---


def test_without_a_display_every_episode_becomes_a_video(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    watch_verb([str(run), "--world", "5", "--episodes", "2", "--execution", "ensembled"])
    printed = capsys.readouterr().out
    for seed in (FIRST_EVALUATION_SEED + 5, FIRST_EVALUATION_SEED + 6):
        path = run / "media" / f"watch_ensembled_{seed}.mp4"
        assert num_frames(path) == 21  # 20 steps a second: every one of them is shown
        assert str(path) in printed
        assert f"world {seed}, 20 steps, highest reward 0 (ensembled)" in printed


def test_worlds_of_a_split_have_videos_of_their_own(run: Path) -> None:
    watch_verb([str(run), "--split", "delay_2"])
    assert [path.name for path in (run / "media").iterdir()] == [
        "watch_delay_2_chunked_1000000.mp4"
    ]


def test_out_names_the_video_and_is_written_despite_a_display(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISPLAY", ":0")
    watch_verb([str(run), "--seed", "3", "--out", str(tmp_path / "new" / "a.mp4")])
    assert num_frames(tmp_path / "new" / "a.mp4") == 21
    assert not (run / "media").exists()


@needs_opengl
def test_a_video_of_an_aloha_task_has_the_full_size_at_half_the_control_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    run = make_run(
        tmp_path / "run", {"task": "transfer_cube", "max_episode_steps": 11, "action_margin": None}
    )
    watch_verb([str(run), "--split", "far", "--out", str(tmp_path / "a.mp4")])
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.height, stream.width) == watch.VIDEO_SIZE
        assert stream.average_rate == 25
        assert sum(1 for _ in container.decode(stream)) == 7  # steps 0, 2, ..., 10 and 11


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--execution", "chnked"], "--execution chnked: .* has chunked, ensembled"),
        (["--episodes", "0"], "--episodes 0; give 1 or more"),
        (["--episodes", "2", "--out", "a.mp4"], "--out names one video"),
        (["--split", "grid"], "no objects"),
    ],
)
def test_what_cannot_be_watched_is_said(run: Path, args: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        watch_verb([str(run), *args])


# --- live ---


class HeldWindow(window.HumanWindow):
    """A window that keeps what it shows, and that somebody closes after some of it."""

    def __init__(self, env: Any, num_shown: int = 1000) -> None:
        super().__init__(env)
        self.num_shown = num_shown
        self.plans: list[np.ndarray] = []
        self.texts: list[str] = []
        self.actions: list[np.ndarray] = []
        self.advance, env.advance = env.advance, self.record

    def record(self, action: Any) -> tuple[float, bool, bool]:
        self.actions.append(action)
        return self.advance(action)

    @property
    def is_open(self) -> bool:
        return len(self.plans) < self.num_shown

    def show(self, chunk: Any, text: str) -> None:
        self.plans.append(chunk.copy())
        self.texts.append(text)


@pytest.fixture
def held(run: Path, monkeypatch: pytest.MonkeyPatch) -> HeldWindow:
    """The window that `watch` opens on the run's world, with a display and no patience."""
    found = HeldWindow(make_env(EnvConfig(**DETOUR)))

    @contextmanager
    def open_window(config: EnvConfig) -> Iterator[HeldWindow]:
        yield found

    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr(watch, "open_window", open_window)
    monkeypatch.setattr(watch, "LAST_SECONDS", 0.0)
    return found


def test_live_play_acts_as_the_rollout_does(
    run: Path, held: HeldWindow, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = Policy.from_checkpoint(run / "checkpoints" / "best.ckpt")
    executions = {name: ExecutionConfig(**fields) for name, fields in EXECUTIONS.items()}
    expected = rollout(policy, EnvConfig(**DETOUR), [8], executions, num_workers=1)
    for result in expected:
        held.actions.clear()
        watch_verb([str(run), "--seed", "8", "--execution", result.execution])
        np.testing.assert_allclose(held.actions, result.commands, atol=1e-6)
        assert (
            f"world 8, 20 steps, highest reward 0 ({result.execution})" in capsys.readouterr().out
        )


def test_the_plan_shown_begins_with_the_coming_action(run: Path, held: HeldWindow) -> None:
    watch_verb([str(run), "--seed", "8"])
    assert [len(plan) for plan in held.plans] == [8, 7, 6, 5, 4, 3] * 3 + [8, 7, 0]
    for plan, action in zip(held.plans, held.actions, strict=False):
        assert (plan[0] == action).all()
    assert held.texts[0] == "step 0  reward 0"
    assert held.texts[-1] == "step 20  reward 0"


def test_a_closed_window_ends_it(
    run: Path, held: HeldWindow, capsys: pytest.CaptureFixture[str]
) -> None:
    held.num_shown = 4
    watch_verb([str(run), "--episodes", "3"])
    assert len(held.actions) == 3
    assert "the window was closed" in capsys.readouterr().out


def test_live_play_keeps_the_control_rate(
    run: Path, held: HeldWindow, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, shown = [0.0], []
    monkeypatch.setattr(watch.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(watch.time, "sleep", lambda s: now.__setitem__(0, now[0] + s))
    slow = iter([0.0] * 5 + [0.5] + [0.01] * 14)

    def timed(action: Any) -> tuple[float, bool, bool]:
        shown.append(now[0])
        now[0] += next(slow)
        return held.record(action)

    monkeypatch.setattr(held.env, "advance", timed)
    watch_verb([str(run)])
    # 20 Hz; what one slow step costs is not made up for by haste.
    np.testing.assert_allclose(np.diff(shown)[:5], 0.05)
    np.testing.assert_allclose(np.diff(shown)[5], 0.5)
    np.testing.assert_allclose(np.diff(shown)[6:], 0.05)


def test_live_play_stops_at_an_action_that_is_no_number(
    run: Path, held: HeldWindow, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    act = LivePolicy.act

    def fail(self: LivePolicy, observation: Any) -> torch.Tensor:
        action = act(self, observation)
        return action * float("nan") if len(held.actions) == 4 else action

    monkeypatch.setattr(LivePolicy, "act", fail)
    watch_verb([str(run), "--seed", "8"])
    printed = capsys.readouterr().out
    assert "world 8, 4 steps" in printed
    assert "action nan from the policy at step 4" in printed


@pytest.mark.filterwarnings("ignore:.*Failed to open display")
def test_a_display_that_is_not_there_is_an_error_with_a_remedy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DISPLAY", ":4711")
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    with (
        pytest.raises(OSError, match="DISPLAY=:4711; write a video with --out"),
        window.open_window(EnvConfig(task="insertion")),
    ):
        pass


@pytest.mark.filterwarnings("ignore:.*human", "ignore:pkg_resources")
def test_a_foreign_environment_opens_a_window_that_can_be_closed(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pygame = pytest.importorskip("pygame")
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")  # pygame's windows without a display
    monkeypatch.setattr(watch, "LAST_SECONDS", 0.0)
    seen = []
    play = Episode.play

    def playing(self: Episode, *args: Any) -> Any:
        seen.append(pygame.display.get_surface().get_size())
        if len(seen) == 25:
            pygame.event.post(pygame.event.Event(pygame.QUIT))
        return play(self, *args)

    monkeypatch.setattr(Episode, "play", playing)
    watch_verb([str(run), "--episodes", "3"])
    assert seen == [(160, 120)] * 25
    printed = capsys.readouterr().out
    assert "world 1000000, 20 steps" in printed
    assert "world 1000001" not in printed
    assert "the window was closed" in printed
    assert not pygame.display.get_init()
