"""Whether a policy answers one observation with all of its right actions, or with their mean.

`measure_modes` compares sampled chunks with the modes, the few right chunks; `draw_modes` shows
them; `ModesCallback` does both at every validation of a run in the detour world (sim/detour.py),
where the modes are known. All three only look: training is the same without them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from rich import get_console

from act_lightning.batch import Observation
from act_lightning.callbacks import RolloutCallback
from act_lightning.module import ACTModule
from act_lightning.nets.chunk_net import ChunkNet
from act_lightning.new_file import write_file
from act_lightning.sim import detour
from act_lightning.sim.env import EnvConfig, make_env

Array = NDArray[np.floating[Any]]

NUM_DRAWN = 100
"""Samples in a picture; more of them hide each other."""


@dataclass(frozen=True, kw_only=True)
class ModeMetrics:
    """How sampled chunks lie about the modes.

    The distance of a chunk from a mode is the root mean square, over the steps, of how far the
    chunk's action is from the mode's; in the unit of the actions.
    """

    distance: float
    """Mean distance of a sample from its nearest mode."""
    within_tolerance: float
    """Share of the samples no farther than the tolerance from a mode."""
    shares: tuple[float, ...]
    """(M,) share of each mode among the samples within tolerance; zeros if there are none."""
    coverage: float
    """Share of the modes that are found: at least 1 / (4 M) of all samples, a quarter of what a
    mode would get if all got the same, lie within tolerance of it."""

    def as_dict(self) -> dict[str, float]:
        """As plain numbers by name, the shares as share_0, share_1, ..."""
        return {
            "coverage": self.coverage,
            "within_tolerance": self.within_tolerance,
            "distance": self.distance,
            **{f"share_{i}": share for i, share in enumerate(self.shares)},
        }


def measure_modes(samples: Array, modes: Array, tolerance: float) -> ModeMetrics:
    """Compares sampled chunks with the modes.

    Args:
        samples: (N, K, A) chunks, in the unit of the actions.
        modes: (M, K, A) right chunks, same unit.
        tolerance: farthest distance that counts as being of a mode, same unit; sensible values are
            above the demonstrations' own noise and far below the distance between modes.

    Raises:
        ValueError: the shapes do not fit together, or the tolerance is not positive and less than
            half of the smallest distance between modes, where it would say nothing.
    """
    if samples.ndim != 3 or len(samples) == 0 or samples.shape[1:] != modes.shape[1:]:
        raise ValueError(
            f"samples {samples.shape} and modes {modes.shape} must be (N, K, A) and (M, K, A), "
            "with one sample or more"
        )
    between = chunk_distances(modes, modes)[~np.eye(len(modes), dtype=bool)]
    limit = between.min(initial=np.inf) / 2
    if not 0 < tolerance < limit:
        raise ValueError(
            f"tolerance={tolerance}: give more than 0 and less than half of the smallest distance "
            f"between modes, {limit:.3g}"
        )
    distances = chunk_distances(samples, modes)
    nearest, distance = distances.argmin(axis=1), distances.min(axis=1)
    within = distance <= tolerance
    counts = np.bincount(nearest[within], minlength=len(modes))
    return ModeMetrics(
        distance=float(distance.mean()),
        within_tolerance=float(within.mean()),
        shares=tuple((counts / max(1, counts.sum())).tolist()),
        coverage=float((counts * 4 * len(modes) >= len(samples)).mean()),
    )


def chunk_distances(first: Array, second: Array) -> NDArray[np.float64]:
    """(N, M) distances of chunks (N, K, A) from chunks (M, K, A), as `ModeMetrics` defines them."""
    difference = first[:, None].astype(np.float64) - second[None].astype(np.float64)
    return np.asarray(np.sqrt(np.square(difference).sum(axis=-1).mean(axis=-1)))


def draw_modes(axes: Axes, samples: Array, modes: Array, title: str) -> None:
    """Draws the first samples as thin lines, and the modes as thick dashed ones.

    Args:
        axes: where to draw.
        samples: (N, K, A >= 2) chunks; the first two action values are x and y.
        modes: (M, K, A) right chunks.
        title: written above.
    """
    for chunk in samples[:NUM_DRAWN]:
        axes.plot(chunk[:, 0], chunk[:, 1], color="tab:blue", alpha=0.2, linewidth=0.8)
    for mode in modes:
        axes.plot(mode[:, 0], mode[:, 1], color="black", linestyle="--", linewidth=1.2)
    axes.set_title(title, fontsize=9)
    axes.set_aspect("equal")
    axes.tick_params(labelsize=7)


def sample_chunks(net: ChunkNet, env: EnvConfig, num_samples: int) -> NDArray[np.float32]:
    """(N, K, A) chunks at the first observation of an episode, with the seeds 0, 1, 2, ...

    Args:
        net: in evaluation mode.
        env: the world.
        num_samples: N.
    """
    world = make_env(env)
    first, _ = world.reset(seed=0)
    world.close()
    observation = Observation(
        **{name: torch.from_numpy(np.stack([value] * num_samples)) for name, value in first.items()}
    )
    device = net.normalizer.qpos_mean.device
    chunks = net.predict_chunk(observation.to(device), torch.arange(num_samples))
    array: NDArray[np.float32] = chunks.float().cpu().numpy()
    return array


class ModesCallback(Callback):
    """Measures and draws, at every validation, what the policy answers to the first observation.

    Logs val/modes/*, puts a picture into TensorBoard and media/, prints the last measures at the
    end and writes them to `modes.json`. Every rank draws the same samples; rank 0 keeps the files.
    With `EMAWeightAveraging`, stand behind it in trainer.callbacks, to see the averaged weights.

    Args:
        num_samples: chunks drawn at a validation.
        tolerance: in m, see `measure_modes`; the default is twice the noise of the demonstrations
            and a twelfth of the distance between the two modes of one obstacle.
    """

    def __init__(self, num_samples: int = 500, tolerance: float = 0.05) -> None:
        if num_samples < 1:
            raise ValueError(f"ModesCallback: num_samples={num_samples}; give 1 or more")
        self.num_samples = num_samples
        self.tolerance = tolerance
        self._report: dict[str, float] = {}

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Finds out now whether the world has modes that are known, and whether chunks fit them.

        Raises:
            ValueError: they do not.
        """
        self._env = _played_world(trainer)
        if self._env.task != detour.ENV_ID:
            raise ValueError(f"ModesCallback knows the modes of {detour.ENV_ID} only: set env.task")
        self._modes = detour.mode_paths(**self._env.make_kwargs)
        assert isinstance(pl_module, ACTModule)
        chunk_size = pl_module.net.config.chunk_size
        if chunk_size != detour.NUM_STEPS:
            raise ValueError(
                f"ModesCallback: model.net.chunk_size={chunk_size}; the modes are chunks of "
                f"{detour.NUM_STEPS} actions, a whole episode"
            )
        measure_modes(self._modes, self._modes, self.tolerance)  # the tolerance fits, or it says so

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Samples, measures, logs and draws."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        assert isinstance(pl_module, ACTModule)
        samples = sample_chunks(pl_module.net, self._env, self.num_samples)
        metrics = measure_modes(samples, self._modes, self.tolerance).as_dict()
        self._report = {"step": trainer.global_step, **metrics}
        logged = {f"val/modes/{name}": value for name, value in metrics.items()}
        pl_module.log_dict(logged, reduce_fx="max", sync_dist=True)
        if trainer.is_global_zero and isinstance(trainer.logger, TensorBoardLogger):
            self._keep_picture(trainer, samples, metrics)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Prints the last validation's measures, and writes them to `modes.json`."""
        log_dir = trainer.log_dir  # every rank has to ask
        if not trainer.is_global_zero or not self._report:
            return
        shares = [value for name, value in self._report.items() if name.startswith("share_")]
        get_console().print(
            f"modes at step {self._report['step']}: {self._report['within_tolerance']:.1%} of "
            f"{self.num_samples} samples within {self.tolerance:g} m of a mode, coverage "
            f"{self._report['coverage']:.0%}, shares {' '.join(f'{x:.0%}' for x in shares)}, "
            f"mean distance {self._report['distance']:.3f} m",
            highlight=False,
            soft_wrap=True,
        )
        if log_dir:
            report = {
                **self._report,
                "num_samples": self.num_samples,
                "tolerance": self.tolerance,
                "num_modes": len(self._modes),
            }
            write_file(Path(log_dir, "modes.json"), json.dumps(report, indent=1).encode())

    def _keep_picture(
        self, trainer: L.Trainer, samples: NDArray[np.float32], metrics: dict[str, float]
    ) -> None:
        assert isinstance(trainer.logger, TensorBoardLogger)
        figure = Figure(figsize=(5, 4), dpi=100, layout="constrained")
        title = f"step {trainer.global_step}: {metrics['within_tolerance']:.0%} within tolerance"
        draw_modes(figure.subplots(), samples, self._modes, title)
        media = Path(trainer.logger.log_dir, "media")
        media.mkdir(parents=True, exist_ok=True)
        path = media / f"step_{trainer.global_step:06}_modes.png"
        figure.savefig(path)
        picture = np.asarray(Image.open(path).convert("RGB"))
        trainer.logger.experiment.add_image(
            "val/modes", picture, trainer.global_step, dataformats="HWC"
        )


def _played_world(trainer: L.Trainer) -> EnvConfig:
    """The world of the rollouts, so that it is set in one place only."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, RolloutCallback):
            return callback.env
    raise ValueError("ModesCallback: there is no RolloutCallback to say which world is played")
