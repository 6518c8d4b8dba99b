"""Plays gym-aloha with LeRobot's rollout function, for bench/rollouts.py.

    .venv-lerobot/bin/python tests/bench/lerobot_rollouts.py POLICY_FOLDER STEPS

Orders are `num_envs` (1: SyncVectorEnv, more: AsyncVectorEnv, as LeRobot chooses) and
`ensemble_decay` (null: whole chunks). Answers each with `steps`, seconds of each control step of
the batch, and `reset`, those of what comes before.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import gym_aloha  # noqa: F401  registers the ids
import gymnasium
from lerobot.configs.policies import PreTrainedConfig
from lerobot.envs.configs import AlohaEnv
from lerobot.envs.factory import make_env
from lerobot.policies.act.modeling_act import ACTPolicy
from lerobot.policies.factory import make_pre_post_processors
from lerobot.processor import PolicyProcessorPipeline
from lerobot.processor.hil_processor import ImageCropResizeProcessorStep
from lerobot.scripts.lerobot_eval import rollout
from peers import Orders

# LeRobot asks every environment for it, and a worker of AsyncVectorEnv ends if there is none. The
# workers come from a process that has imported this file.
gymnasium.Env.task_description = "Insert the peg into the socket."


class Player:
    """LeRobot's policy and environments, each made once."""

    def __init__(self, folder: str, steps: int) -> None:
        self.folder = folder
        self.env_config = AlohaEnv(episode_length=steps)
        self.envs: dict[int, Any] = {}
        self.policies: dict[float | None, Any] = {}
        self.env_steps = self.env_config.get_env_processors()
        self.policy_steps = make_pre_post_processors(
            PreTrainedConfig.from_pretrained(folder), pretrained_path=folder
        )

    def play(self, num_envs: int, ensemble_decay: float | None) -> dict[str, Any]:
        """Plays one batch of episodes; returns how long its parts took, in s."""
        policy = self.policy(ensemble_decay)
        height, width = policy.config.input_features["observation.images.top"].shape[1:]
        # LeRobot's own, and averaging: its tensors are resized with antialiasing.
        shrink = ImageCropResizeProcessorStep(resize_size=(height, width))
        env = self.env(num_envs)
        marks = [time.perf_counter()]
        rollout(
            env,
            policy,
            PolicyProcessorPipeline(steps=[shrink]),
            self.env_steps[1],
            *self.policy_steps,
            seeds=list(range(num_envs)),
            render_callback=lambda _: marks.append(time.perf_counter()),
        )
        lengths = [after - before for before, after in zip(marks, marks[1:], strict=False)]
        return {"reset": lengths[0], "steps": lengths[1:]}

    def env(self, num_envs: int) -> Any:
        if num_envs not in self.envs:
            made = make_env(self.env_config, n_envs=num_envs, use_async_envs=True)
            self.envs[num_envs] = made["aloha"][0]
        return self.envs[num_envs]

    def policy(self, ensemble_decay: float | None) -> Any:
        if ensemble_decay not in self.policies:
            config = PreTrainedConfig.from_pretrained(self.folder)
            if ensemble_decay is not None:
                config.temporal_ensemble_coeff, config.n_action_steps = ensemble_decay, 1
            policy = ACTPolicy.from_pretrained(self.folder, config=config)
            self.policies[ensemble_decay] = policy.eval()
        return self.policies[ensemble_decay]


def main() -> None:
    """Serves until no order comes."""
    orders = Orders()
    player = Player(sys.argv[1], int(sys.argv[2]))
    while (order := orders.next()) is not None:
        orders.answer(player.play(**order))
    for env in player.envs.values():
        env.close()


if __name__ == "__main__":
    main()
