"""Rollouts while training: how well the policy does, logged, and which checkpoint is the best."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from rich import get_console

from act_lightning.data.datamodule import ACTDataModule
from act_lightning.execution import ExecutionConfig
from act_lightning.module import ACTModule
from act_lightning.policy import Policy
from act_lightning.sim import num_cpus
from act_lightning.sim.config import EnvConfig
from act_lightning.sim.env import data_spec
from act_lightning.sim.opengl import find_backend
from act_lightning.sim.record import FIRST_VALIDATION_SEED
from act_lightning.sim.results import EpisodeResult, film_strip, summarize
from act_lightning.sim.rollout import RolloutPool

NUM_PICTURED = 8
"""Worlds whose pictures are kept at each validation, to show a success and a failure."""


class RolloutCallback(Callback):
    """Plays the policy in fixed worlds at every validation, and logs how well it does.

    Runs inside the validation loop, after `EMAWeightAveraging` has put its weights in place, so
    what is played is what the checkpoint will hold. The worlds are the same at every validation and
    for every run, and differ from those that grade the finished run: these choose the checkpoint.

    Args:
        executions: ways of executing a chunk, by name.
        env: the world, and what is observed of it.
        episodes: worlds played at each validation, in each way of executing; 0 for no rollouts.
        final_episodes: evaluation worlds that grade the best checkpoint when training ends.
        num_workers: simulator processes; default one a core.
    """

    def __init__(
        self,
        executions: dict[str, ExecutionConfig],
        env: EnvConfig | None = None,
        episodes: int = 20,
        final_episodes: int = 100,
        num_workers: int | None = None,
    ) -> None:
        # Optional only for the command line, which links it from the section of the same name.
        if env is None:
            raise ValueError("RolloutCallback: give env, the world to play in")
        if episodes < 0 or final_episodes < 0:
            raise ValueError(
                f"rollout.episodes={episodes} and rollout.final_episodes={final_episodes} "
                "must not be negative"
            )
        self.env = env
        self.episodes = episodes
        self.final_episodes = final_episodes
        self.executions = executions
        self.num_workers = num_workers
        self._pool: RolloutPool | None = None

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Finds out now, not at the first rollout, whether the policy fits the world.

        Raises:
            ValueError: the demonstrations show something else than the world does, a way of
                executing takes more than the chunk, or there is no validation, at which rollouts
                happen.
            OpenGLNotFoundError: nothing can be drawn here.
        """
        if self.episodes == 0 and self.final_episodes == 0:
            return
        if self.env.is_aloha:
            find_backend()
        assert isinstance(pl_module, ACTModule)
        world, shown = data_spec(self.env), pl_module.net.spec
        for name in ("task", "cameras", "image_size", "dim_qpos", "dim_action", "dim_env_state"):
            if getattr(world, name) != getattr(shown, name):
                raise ValueError(
                    f"env gives {name}={getattr(world, name)}, the demonstrations "
                    f"{getattr(shown, name)}; set env as it was when they were recorded, or record "
                    "into another demonstrations.path"
                )
        for name, execution in self.executions.items():
            try:
                execution.build(1, pl_module.net.config.chunk_size, shown.dim_action)
            except ValueError as error:
                raise ValueError(f"rollout.executions.{name}: {error}") from error
        if self.episodes == 0:
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        if isinstance(data, ACTDataModule) and len(data.val_episodes) == 0:
            raise ValueError(
                f"data.val_fraction={data.val_fraction} leaves no validation, at which rollouts "
                "happen; raise it, or set rollout.episodes=0"
            )
        # Its processes start up while the first steps train.
        self._pool = self._make_pool(trainer)

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Plays this rank's share of the worlds, gathers all results and logs them."""
        if trainer.sanity_checking or self.episodes == 0:
            return
        start = time.perf_counter()
        if self._pool is None:
            self._pool = self._make_pool(trainer)
        seeds = [FIRST_VALIDATION_SEED + i for i in range(self.episodes)]
        mine = seeds[trainer.global_rank :: trainer.world_size]
        assert isinstance(pl_module, ACTModule)
        results = self._pool.rollout(
            Policy(pl_module.net),
            mine,
            self.executions,
            device=pl_module.device,
            record=mine[:NUM_PICTURED] if trainer.is_global_zero else (),
        )
        summaries = summarize(_gather(results))
        seconds = time.perf_counter() - start
        # "step" puts the values of this validation at the steps taken, not at the batch's index.
        metrics = {"step": float(trainer.global_step)}
        pl_module.log_dict(metrics | _metrics(summaries, trainer.global_step, seconds))
        if trainer.is_global_zero:
            _log_film_strips(trainer, results)
            _print_summaries(trainer.global_step, summaries, seconds)

    def _make_pool(self, trainer: L.Trainer) -> RolloutPool:
        """Simulator processes of this rank: its share of the cores, and no more than episodes."""
        share = num_cpus() // trainer.num_devices
        episodes = self.episodes * len(self.executions)
        workers = self.num_workers or max(1, min(share, episodes))
        return RolloutPool(self.env, num_workers=workers)

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Ends the simulator processes; Lightning then skips `teardown`."""
        self._close_pool()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Ends the simulator processes."""
        self._close_pool()

    def _close_pool(self) -> None:
        if self._pool is not None:
            self._pool.close()
            self._pool = None


def selection_score(summaries: Mapping[str, Mapping[str, Any]], step: int) -> float:
    """What the best checkpoint is chosen by: success, then stages reached, then the later step.

    Args:
        summaries: of the rollouts, by way of executing.
        step: optimizer steps taken.

    Returns:
        The mean success rate over the ways of executing, with a hundredth of it given to the stages
        reached on the way, and ties between equal rates broken in favour of the later step.
    """
    success = _mean(summary["success_rate"] for summary in summaries.values())
    stages = _mean(_mean(summary["stages"].values()) for summary in summaries.values())
    return 0.99 * success + 0.01 * stages + 1e-4 * (1 - 1 / (1 + step / 1e5))


def _metrics(
    summaries: Mapping[str, Mapping[str, Any]], step: int, seconds: float
) -> dict[str, float]:
    metrics = {
        "rollout/success_rate": _mean(s["success_rate"] for s in summaries.values()),
        "rollout/score": selection_score(summaries, step),
        "rollout/seconds": seconds,
    }
    for name, summary in summaries.items():
        low, high = summary["wilson_95"]
        metrics |= {
            f"rollout/{name}/episodes": summary["episodes"],
            f"rollout/{name}/successes": summary["successes"],
            f"rollout/{name}/success_rate": summary["success_rate"],
            f"rollout/{name}/success_low": low,
            f"rollout/{name}/success_high": high,
            f"rollout/{name}/mean_return": summary["mean_return"],
        }
        metrics |= {
            f"rollout/{name}/{stage}": rate
            for stage, rate in summary["stages"].items()
            if stage != "success"
        }
    return metrics


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)


def _gather(results: list[EpisodeResult]) -> list[EpisodeResult]:
    """Results of all ranks, without their pictures; every rank gets the same list."""
    if not (dist.is_available() and dist.is_initialized()):
        return results
    everyones: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, [replace(result, frames=None) for result in results])
    return [result for ranks in everyones for result in ranks]


def _log_film_strips(trainer: L.Trainer, results: Sequence[EpisodeResult]) -> None:
    """Adds pictures of a success and a failure of each way to TensorBoard and to media/."""
    if not isinstance(trainer.logger, TensorBoardLogger):
        return
    media = Path(trainer.logger.log_dir, "media")
    media.mkdir(parents=True, exist_ok=True)
    shown = set()
    for result in results:
        outcome = "success" if result.success else "failure"
        tag = f"rollout/{result.execution}/{outcome}"
        if tag not in shown and result.frames is not None:
            shown.add(tag)
            strip = film_strip(result)
            trainer.logger.experiment.add_image(tag, strip, trainer.global_step)
            name = f"step_{trainer.global_step:06}_{result.execution}_{outcome}.png"
            Image.fromarray(strip.transpose(1, 2, 0)).save(media / name)


def _print_summaries(step: int, summaries: Mapping[str, Mapping[str, Any]], seconds: float) -> None:
    parts = []
    for name, summary in summaries.items():
        low, high = summary["wilson_95"]
        parts.append(
            f"{name} {summary['successes']}/{summary['episodes']} = {summary['success_rate']:.0%} "
            f"[{low:.0%}, {high:.0%}]"
        )
    get_console().print(
        f"step {step}: success {', '.join(parts)} ({seconds:.0f} s)",
        highlight=False,
        soft_wrap=True,
    )
