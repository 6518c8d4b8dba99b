"""What plays the worlds that are recorded: the seam between the recorder and its demonstrators.

The demonstrator of the ALOHA tasks (expert.py) is one; those of other worlds (fetch.py, pusht.py)
are others: a config and a player in a file of their own, chosen in YAML by the config's
`class_path` at `demonstrations.expert`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Protocol

import gymnasium
import numpy as np
from numpy.typing import NDArray


class Demonstrator(Protocol):
    """What the recorder needs: `reset`, then `act` and `perturb` once a control step."""

    def reset(self, env: gymnasium.Env[Any, Any], seed: int) -> None:
        """Starts an episode in a freshly reset environment.

        Args:
            env: made by `make_env`. Of another id than ours, its `unwrapped.foreign` and
                `unwrapped.foreign_observation` are what there is to act upon.
            seed: draws whatever is random.
        """

    def act(self) -> NDArray[np.float32]:
        """The action now, (A,), which is what to record."""

    def perturb(self, action: NDArray[np.float32]) -> NDArray[np.float32]:
        """What to execute instead of `action`, (A,)."""


@dataclass(frozen=True, kw_only=True)
class DemonstratorConfig(ABC):
    """Settings of a demonstrator; the subclass says which."""

    @abstractmethod
    def build(self, task: str) -> Demonstrator:
        """Makes the demonstrator of a task.

        Raises:
            ValueError: it does not know `task`, or cannot do there what the settings ask.
        """
