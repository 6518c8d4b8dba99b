"""Pictures of an evaluation: a success and a failure as videos, every failure at a glance, plots.

Nothing is filmed while worlds are graded. An episode is a function of policy, world and way of
executing, so those to be seen are played again, and whether they went as before is checked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich import get_console

from act_lightning.execution import ExecutionConfig
from act_lightning.new_file import write_file
from act_lightning.policy import Policy
from act_lightning.sim.config import EnvConfig
from act_lightning.sim.film import Film
from act_lightning.sim.opengl import OpenGLNotFoundError, find_backend
from act_lightning.sim.results import EpisodeResult
from act_lightning.sim.rollout import RolloutPool
from act_lightning.sim.splits import STANDARD
from act_lightning.study.draw_commands import COLOURS, draw_commands
from act_lightning.study.heat_map import draw_heat_map
from act_lightning.study.smoothness import arm_values
from act_lightning.study.videos import write_contact_sheets, write_video

VIDEO = Film(interval=4, size=(240, 320), overlay=True)
GALLERY_FRAMES = 6
"""Frames of each failure in the gallery."""


@dataclass(frozen=True, kw_only=True)
class Media:
    """Where an evaluation's pictures go, and what they show."""

    folder: Path
    """Pictures are written here, each named `<split>_...`."""
    split: str
    """Which worlds."""
    env: EnvConfig
    """The world."""
    executions: Mapping[str, ExecutionConfig]
    """Ways of executing, by name."""
    fps: float
    """Control steps a second."""

    def write(
        self, policy: Policy, results: Sequence[EpisodeResult], num_workers: int | None = None
    ) -> list[str]:
        """Writes all pictures.

        Args:
            policy: what played.
            results: of the evaluation, without frames.
            num_workers: simulator processes; default one a core.

        Returns:
            What there is to say about it, in lines.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._plot_commands(results)
        if self.env.is_aloha and self.split != STANDARD:
            self._draw_heat_maps(results)
        lines = [f"pictures in {self.folder}"]
        try:
            if self.env.is_aloha:
                find_backend()
        except OpenGLNotFoundError as error:
            return [*lines, f"no videos: {error}"]
        with RolloutPool(self.env, num_workers=num_workers) as pool:
            for name in self.executions:
                mine = [result for result in results if result.execution == name]
                lines += self._film(pool, policy, name, mine)
        return lines

    def _film(
        self, pool: RolloutPool, policy: Policy, name: str, results: Sequence[EpisodeResult]
    ) -> list[str]:
        """Plays the failures and the first success of one way of executing again, on film."""
        failed = [result for result in results if not result.success]
        chosen = failed + [result for result in results if result.success][:1]
        interval = -(-self.env.max_episode_steps // (GALLERY_FRAMES - 1))
        films = {result.seed: Film(interval=interval, overlay=True) for result in failed}
        films |= {result.seed: VIDEO for result in (*failed[:1], *chosen[len(failed) :])}
        with get_console().status(f"filming {len(chosen)} episodes ({name})"):
            filmed = pool.rollout(
                policy,
                list(films),
                {name: self.executions[name]},
                device=policy.device,
                record=films,
            )
        for old in self.folder.glob(f"{self.split}_{name}_*.mp4"):  # of an earlier evaluation
            old.unlink()
        for result in filmed:
            if films[result.seed] is VIDEO and result.frames is not None:
                outcome = "success" if result.success else "failure"
                path = self.folder / f"{self.split}_{name}_{outcome}_{result.seed}.mp4"
                write_video(result.frames, path, self.fps / VIDEO.interval)
        seeds = {result.seed for result in failed}
        gallery = [result for result in filmed if result.seed in seeds]
        write_contact_sheets(gallery, self.folder, f"{self.split}_{name}_failures")
        before = {result.seed: result for result in chosen}
        return [
            f"world {result.seed} ({name}) went differently when it was played again for its "
            f"picture: success {before[result.seed].success}, then {result.success}"
            for result in filmed
            # An error may name the worker, which is another one now.
            if replace(result, error=None) != replace(before[result.seed], error=None)
        ]

    def _plot_commands(self, results: Sequence[EpisodeResult]) -> None:
        """Plots the commanded joints of the first world, one colour a way of executing."""
        seed = results[0].seed
        episodes = {
            result.execution: (result.commands, result.queries)
            for result in results
            if result.seed == seed and result.commands is not None
        }
        episodes = dict(list(episodes.items())[: len(COLOURS)])
        if not episodes:
            return
        title = f"{self.env.task}, world {seed} ({self.split})"
        dim_action = next(iter(episodes.values()))[0].shape[1]
        picture = draw_commands(
            episodes,
            self.fps,
            title,
            values=arm_values(self.env, dim_action),
            unit="rad" if self.env.is_aloha else "",
        )
        write_file(self.folder / f"{self.split}_commands_{seed}.png", picture)

    def _draw_heat_maps(self, results: Sequence[EpisodeResult]) -> None:
        for name in self.executions:
            outcomes = [(r.seed, r.success) for r in results if r.execution == name]
            title = f"{self.env.task}, {name}"
            path = self.folder / f"{self.split}_{name}_heat_map.png"
            write_file(path, draw_heat_map(self.env, outcomes, title))
