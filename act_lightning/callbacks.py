"""Rollouts while training: how well the policy does, logged, and which checkpoint is the best."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.trainer.states import TrainerFn
from rich import get_console
from torch import Tensor

from act_lightning.batch import Observation
from act_lightning.data.datamodule import ACTDataModule
from act_lightning.execution import ExecutionConfig, check_executions
from act_lightning.filming import FILM, NUM_FILMED, show_films
from act_lightning.module import ACTModule, float64_device
from act_lightning.nets.chunk_net import ChunkNet
from act_lightning.policy import Policy
from act_lightning.sim import num_cpus
from act_lightning.sim.config import FIRST_VALIDATION_SEED, EnvConfig
from act_lightning.sim.env import data_spec, make_env
from act_lightning.sim.metrics import RolloutMetrics
from act_lightning.sim.opengl import find_backend
from act_lightning.sim.ranks import play_share, share, together
from act_lightning.sim.results import EpisodeResult
from act_lightning.sim.rollout import RolloutPool


class RolloutCallback(Callback):
    """Plays the policy in fixed worlds at every validation, and logs how well it does.

    Runs inside the validation loop, after `EMAWeightAveraging` has put its weights in place, so
    what is played is what the checkpoint will hold. The worlds are the same at every validation and
    for every run, and differ from those that grade the finished run: these choose the checkpoint.
    Each rank plays its share of them. The policy computes in the precision of training, in which it
    is faster; the finished run is graded in float32.

    Args:
        executions: ways of executing a chunk, by name.
        env: the world, and what is observed of it.
        episodes: worlds played at each validation, in each way of executing; 0 for no rollouts.
        final_episodes: evaluation worlds that grade the best checkpoint when training ends.
        final_media: whether that leaves videos and pictures, for which worlds are played again.
        num_workers: simulator processes of each rank; default one a core.

    Attributes:
        results: of this rank's episodes at the latest validation.
    """

    def __init__(
        self,
        executions: dict[str, ExecutionConfig],
        env: EnvConfig | None = None,
        episodes: int = 20,
        final_episodes: int = 100,
        final_media: bool = True,
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
        self.final_media = final_media
        self.executions = executions
        self.num_workers = num_workers
        self.results: list[EpisodeResult] = []
        self._pool: RolloutPool | None = None
        self._stages: tuple[str, ...] | None = None
        self._rollouts = 0
        self._seconds = 0.0

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Finds out now, not at the first rollout, whether the policy fits the world.

        Raises:
            ValueError: the demonstrations show something else than the world does, a way of
                executing takes more than the chunk, or there is no validation, at which rollouts
                happen.
            OpenGLNotFoundError: nothing can be drawn here.
            RolloutError: something of this kind happened on another rank.
        """
        if self.episodes == 0 and self.final_episodes == 0:
            return
        with together():
            self._check(trainer, pl_module)
            # Its processes start up while the first steps train.
            if share(self._seeds):
                self._pool = self._make_pool(trainer)

    def _check(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
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
        try:
            check_executions(self.executions, pl_module.net.config.chunk_size)
        except ValueError as error:
            raise ValueError(f"rollout.{error}") from error
        if self.episodes == 0:
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        if isinstance(data, ACTDataModule) and len(data.val_episodes) == 0:
            raise ValueError(
                f"data.val_fraction={data.val_fraction} leaves no validation, at which rollouts "
                "happen; raise it, or set rollout.episodes=0"
            )

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Plays this rank's share of the worlds, adds up what came of all and logs it.

        Raises:
            Exception: of a rollout, if no rank could play.
        """
        if trainer.sanity_checking or self.episodes == 0:
            return
        start = time.perf_counter()
        assert isinstance(pl_module, ACTModule)
        self.results = self._play(trainer, pl_module)
        summaries = self._summarize(pl_module)
        with together():
            if trainer.is_global_zero and isinstance(trainer.logger, TensorBoardLogger):
                fps = pl_module.net.spec.fps
                show_films(trainer.logger, self.results, trainer.global_step, fps)
        seconds = time.perf_counter() - start
        self._rollouts += 1
        self._seconds += seconds
        metrics = _metrics(summaries, trainer.global_step, seconds)
        if trainer.state.fn == TrainerFn.FITTING:
            metrics["rollout/share"] = self._seconds / pl_module.train_seconds
        # All ranks have the same, except for times. A mean could differ from it in the last digit.
        pl_module.log_dict(metrics, reduce_fx="max", sync_dist=True)
        if trainer.is_global_zero:
            _print_summaries(trainer.global_step, summaries, seconds)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Says which share of training the rollouts took."""
        assert isinstance(pl_module, ACTModule)
        if self._rollouts and trainer.is_global_zero:
            seconds = pl_module.train_seconds
            get_console().print(
                f"rollouts took {self._seconds / seconds:.1%} of {seconds / 60:.1f} min of "
                f"training: {self._rollouts} of {self._seconds / self._rollouts:.1f} s",
                highlight=False,
                soft_wrap=True,
            )

    def state_dict(self) -> dict[str, Any]:
        """How many rollouts there were, and their seconds; a resumed run goes on counting."""
        return {"rollouts": self._rollouts, "seconds": self._seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on counting."""
        self._rollouts, self._seconds = state_dict["rollouts"], state_dict["seconds"]

    @property
    def _seeds(self) -> list[int]:
        return [FIRST_VALIDATION_SEED + i for i in range(self.episodes)]

    def _play(self, trainer: L.Trainer, pl_module: ACTModule) -> list[EpisodeResult]:
        films = trainer.is_global_zero and isinstance(trainer.logger, TensorBoardLogger)

        def play(seeds: list[int]) -> list[EpisodeResult]:
            if self._pool is None:
                self._pool = self._make_pool(trainer)
            try:
                return self._pool.rollout(
                    _PolicyInTraining(pl_module.net, trainer.precision_plugin),
                    seeds,
                    self.executions,
                    device=pl_module.device,
                    record=dict.fromkeys(seeds[:NUM_FILMED] if films else (), FILM),
                )
            except Exception:
                self._close_pool()  # The next validation tries with a new one.
                raise

        return play_share(play, self._seeds, self.executions)

    def _summarize(self, pl_module: ACTModule) -> dict[str, dict[str, Any]]:
        """Summaries of all ranks' results, by way of executing."""
        if self._stages is None:
            with together():
                env = make_env(self.env)
                self._stages = env.stages
                env.close()
        metrics = RolloutMetrics(self.executions, self._stages)
        metrics.to(float64_device(pl_module.device))
        metrics.update(self.results)
        summaries: dict[str, dict[str, Any]] = metrics.compute()
        return summaries

    def _make_pool(self, trainer: L.Trainer) -> RolloutPool:
        """Simulator processes of this rank: its part of the cores, and no more than episodes."""
        cores = num_cpus() // trainer.num_devices
        episodes = len(share(self._seeds)) * len(self.executions)
        workers = self.num_workers or max(1, min(cores, episodes))
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


class _PolicyInTraining(Policy):
    """A policy that computes in the precision of training.

    Only the network does: some precisions change the type of every tensor made meanwhile.
    """

    def __init__(self, net: ChunkNet, precision: Precision) -> None:
        super().__init__(net)
        self._precision = precision

    def predict_chunk(self, observation: Observation, seeds: Tensor | None = None) -> Tensor:
        """Predicts (B, K, A) actions in physical units."""
        with self._precision.forward_context():
            return super().predict_chunk(observation, seeds)


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
