"""Tiny environments with our environments' surface, in a module that workers import fast."""

import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

NUM_ACTIONS = 2
MAX_STEPS = 40


class FakeEnv(gymnasium.Env[dict[str, Any], Any]):
    """A point driven by the actions; its path, rewards and length follow from its seed.

    Args:
        trouble: what goes wrong: at the start, or at step 9 of the world `seed`.
        seed: the world where it goes wrong.
        once: a file that is made at the first trouble; once it is there, all goes well.
    """

    observation_space = spaces.Dict(
        {
            "qpos": spaces.Box(-np.inf, np.inf, (NUM_ACTIONS,), np.float32),
            "images": spaces.Box(0, 255, (1, 3, 32, 32), np.uint8),
        }
    )
    action_space = spaces.Box(-np.inf, np.inf, (NUM_ACTIONS,), np.float32)
    stages = ("touched", "lifted", "contact")

    def __init__(self, trouble: str = "", seed: int = 4, once: Path | None = None) -> None:
        self.trouble, self.trouble_seed, self.once = trouble, seed, once
        if trouble == "start":
            raise ValueError("EnvConfig: no camera 'tpo'")
        if trouble == "kill at start":
            os.kill(os.getpid(), signal.SIGKILL)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[dict[str, Any], Any]:
        super().reset(seed=seed)
        self.seed = seed
        self.position = self.np_random.normal(size=NUM_ACTIONS).astype(np.float32)
        self.target = float(self.np_random.uniform(1.5, 5.0))
        self.steps = 0
        return self.observe(), {}

    def advance(self, action: Any) -> tuple[float, bool, bool]:
        if self.trouble and self.seed == self.trouble_seed and self.steps == 9:
            self.misbehave()
        self.position = (0.9 * self.position + 0.1 * action).astype(np.float32)
        self.steps += 1
        reward = float(min(4, int(4 * np.abs(self.position).sum() / self.target)))
        self.is_success = reward == 4
        return reward, self.is_success, self.steps >= MAX_STEPS

    def misbehave(self) -> None:
        if self.once is not None:
            if self.once.exists():
                return
            self.once.touch()
        if self.trouble == "raise":
            raise LookupError("the peg left the universe")
        if self.trouble == "diverge":
            raise FloatingPointError("the simulation diverged")
        if self.trouble == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.trouble == "hang":
            time.sleep(1000)

    def observe(self) -> dict[str, Any]:
        image = np.full((1, 3, 32, 32), self.steps % 256, np.uint8)
        return {"qpos": self.position.copy(), "images": image}

    def render(self) -> Any:
        return np.full((240, 320, 3), self.steps, np.uint8)


class BlindEnv(FakeEnv):
    """Can be played but not drawn."""

    def render(self) -> Any:
        raise RuntimeError("no display")


class BoundedEnv(FakeEnv):
    """Takes actions from -1 to 1 for the first value, any from 0 on for the second."""

    action_space = spaces.Box(
        np.array([-1.0, 0.0], np.float32), np.array([1.0, np.inf], np.float32), dtype=np.float32
    )

    def __init__(self, action_margin: float | None) -> None:
        super().__init__()
        self.config = SimpleNamespace(action_margin=action_margin)


class PatientEnv(FakeEnv):
    """Hangs in world 4 once; the other worlds go on until world 4 is played again."""

    def __init__(self, replayed: Path) -> None:
        super().__init__("hang", once=replayed.with_suffix(".hung"))
        self.replayed = replayed

    def advance(self, action: Any) -> tuple[float, bool, bool]:
        assert self.once is not None
        if self.seed == 4 and self.steps == 9 and self.once.exists():
            self.replayed.touch()
        super().advance(action)
        self.is_success = False
        return 0.0, False, self.steps >= MAX_STEPS and self.replayed.exists()


def make_fragile_env(broken: Path) -> FakeEnv:
    """Dies in world 4, and cannot be made any more from then on."""
    if broken.exists():
        raise OSError("no display")
    return FakeEnv("kill", once=broken)
