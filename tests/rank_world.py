"""A world that a rank can fail in: a point to be held near the origin, and troubles on the way.

`rank_world:RankWorld-v0` is what gymnasium calls it; workers import this module, so it is light.
"""

import os
import signal
import sys
import time
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces


class RankWorld(gymnasium.Env[dict[str, Any], Any]):
    """How hard a world is follows from its seed; `trouble` comes up in `trouble_seed` alone."""

    observation_space = spaces.Dict({"place": spaces.Box(-np.inf, np.inf, (3,), np.float32)})
    action_space = spaces.Box(-9.0, 9.0, (2,), np.float32)
    metadata = {"render_modes": ["rgb_array"], "render_fps": 50}

    def __init__(self, trouble: str = "", trouble_seed: int = 0, render_mode: Any = None) -> None:
        self.trouble, self.trouble_seed, self.render_mode = trouble, trouble_seed, render_mode
        # Workers are started with "-c"; the rank's own process looks at the world before.
        in_a_worker_of_rank_1 = sys.argv[0] == "-c" and os.environ.get("LOCAL_RANK") == "1"
        if trouble == "start" and in_a_worker_of_rank_1:
            raise ValueError("no such world on this machine")
        if trouble == "start everywhere" and sys.argv[0] == "-c":
            raise ValueError("no such world anywhere")

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[dict[str, Any], Any]:
        super().reset(seed=seed)
        self.seed, self.steps = seed, 0
        self.position = self.np_random.normal(size=2)
        self.wind = self.np_random.normal(size=2)
        return self.look(), {}

    def step(self, action: Any) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        if self.steps == 9 and self.seed == self.trouble_seed:
            if self.trouble == "crash":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.trouble == "hang":
                time.sleep(1000)
        self.position = 0.9 * self.position + 0.1 * (self.wind + action)
        self.steps += 1
        distance = float(np.abs(self.position).sum())
        success = self.steps > 12 and distance < 1.6
        return self.look(), -distance, success, self.steps == 40, {"is_success": success}

    def look(self) -> dict[str, Any]:
        return {"place": np.array([*self.position, self.steps / 40], np.float32)}

    def render(self) -> Any:
        return np.full((240, 320, 3), self.steps, np.uint8)


gymnasium.register(id="RankWorld-v0", entry_point=RankWorld)
