"""A tiny environment with our environments' surface, in a module that workers import fast."""

import os
import signal
import time
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

NUM_ACTIONS = 2
MAX_STEPS = 40


class FakeEnv(gymnasium.Env[dict[str, Any], Any]):
    """A point driven by the actions; its path, rewards and length follow from its seed."""

    observation_space = spaces.Dict(
        {
            "qpos": spaces.Box(-np.inf, np.inf, (NUM_ACTIONS,), np.float32),
            "images": spaces.Box(0, 255, (1, 3, 4, 5), np.uint8),
        }
    )
    action_space = spaces.Box(-np.inf, np.inf, (NUM_ACTIONS,), np.float32)

    def __init__(self, trouble: str = "", seed: int = 4) -> None:
        self.trouble, self.trouble_seed = trouble, seed
        if trouble == "start":
            raise ValueError("EnvConfig: no camera 'tpo'")

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
        if self.trouble == "raise":
            raise LookupError("the peg left the universe")
        if self.trouble == "diverge":
            raise FloatingPointError("the simulation diverged")
        if self.trouble == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.trouble == "hang":
            time.sleep(1000)

    def observe(self) -> dict[str, Any]:
        image = np.full((1, 3, 4, 5), self.steps, np.uint8)
        return {"qpos": self.position.copy(), "images": image}

    def render(self) -> Any:
        return np.full((240, 320, 3), self.steps, np.uint8)
