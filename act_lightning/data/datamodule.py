"""Lightning's view of a store: endless training batches, fixed validation, an exact position.

The training loader has no length and never ends: steps, not epochs, are the budget, so the Trainer
wants `max_steps`, `max_epochs: -1`, an integer `val_check_interval` and `check_val_every_n_epoch:
null`. The position is counted from the batches that the trainer has finished, not from those handed
out, because Lightning fetches one batch ahead of the loader's end and threads, or loader processes,
read further ones. It is kept in the checkpoint as a number of samples over all ranks, so that a run
may go on with another number of ranks, or another way of reading.
"""

from __future__ import annotations

import warnings
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from numpy.typing import NDArray

from act_lightning.batch import Batch, DataSpec
from act_lightning.data.loader import StartMethod
from act_lightning.data.mirror import MirrorConfig
from act_lightning.data.order import (
    EpisodeSampling,
    FrameSampling,
    SampleOrder,
    Sampling,
    frames_of,
    split_episodes,
)
from act_lightning.data.store import Store
from act_lightning.data.stream import (
    BatchReader,
    FixedBatches,
    TrainingStream,
    count_batches,
    spread,
)
from act_lightning.nets.normalize import Stats


class ACTDataModule(LightningDataModule):
    """Demonstrations of a store as training and validation batches.

    Args:
        path: folder of the store, made by `make data`, or `s3://bucket/prefix`.
        batch_size: samples a step over all ranks; each takes its part, so that the number of
            devices and nodes changes nothing but speed.
        batch_size_per_rank: samples a step on each rank; null divides `batch_size`. If given,
            `optimizer.scaling` may raise the learning rates as the step exceeds `batch_size`.
        chunk_size: K, actions a sample; at most the longest training demonstration's steps.
        cameras: cameras to read, in this order; null reads all of the store's, [] none.
        use_env_state: whether observations hold object poses.
        num_episodes: train on the first so many training demonstrations only; null trains on all.
            The validation demonstrations do not depend on it.
        val_fraction: share of the demonstrations kept for validation; 0 validates nothing.
        max_val_frames: at most so many frames, at equal distances, make up a validation.
        seed: decides the split into training and validation, and the order of training.
        sampling: what is drawn once a pass over the demonstrations: each frame, or of each episode
            one frame, so that short episodes count as much as long ones.
        prefetch: batches read ahead, each by a thread; 0 reads in the training thread. With loader
            processes: batches that each of them reads ahead, at least 1.
        num_workers: loader processes on each device; 0 reads in threads, which is faster for stores
            of this program's own layout. The batches are the same.
        start_method: how loader processes are started.
        mirror: keeps the shards of a store far away, as at `s3://`, on local disk.

    Raises:
        ValueError: a setting is out of its range; when the store is opened: it does not have what
            is asked for.
    """

    def __init__(
        self,
        *,
        path: str,
        batch_size: int,
        chunk_size: int,
        batch_size_per_rank: int | None = None,
        cameras: tuple[str, ...] | None = None,
        use_env_state: bool = False,
        num_episodes: int | None = None,
        val_fraction: float = 0.1,
        max_val_frames: int = 1024,
        seed: int = 0,
        sampling: Literal["frame", "episode"] = "frame",
        prefetch: int = 2,
        num_workers: int = 0,
        start_method: StartMethod = "forkserver",
        mirror: MirrorConfig = MirrorConfig(),
    ) -> None:
        super().__init__()
        lowest = {"batch_size": 1, "chunk_size": 1, "max_val_frames": 1, "seed": 0}
        lowest |= {"num_workers": 0, "prefetch": 1 if num_workers > 0 else 0}
        given = locals()
        for name, low in lowest.items():
            if given[name] < low:
                raise ValueError(f"data.{name}={given[name]}; give {low} or more")
        if not 0 <= val_fraction < 1:
            raise ValueError(f"data.val_fraction={val_fraction}; give 0 or more, and less than 1")
        if batch_size_per_rank is not None and batch_size_per_rank < 1:
            raise ValueError(
                f"data.batch_size_per_rank={batch_size_per_rank}; give 1 or more, or null to "
                "divide data.batch_size"
            )
        if num_episodes is not None and num_episodes < 1:
            raise ValueError(f"data.num_episodes={num_episodes}; give 1 or more, or null for all")
        self.path = path
        self.batch_size = batch_size
        self.batch_size_per_rank = batch_size_per_rank
        self.chunk_size = chunk_size
        self.cameras = None if cameras is None else tuple(cameras)
        self.use_env_state = use_env_state
        self.num_episodes = num_episodes
        self.val_fraction = val_fraction
        self.max_val_frames = max_val_frames
        self.seed = seed
        self.sampling = sampling
        self.prefetch = prefetch
        self.num_workers = num_workers
        self.start_method: StartMethod = start_method
        self.mirror = mirror
        self._stream: TrainingStream | None = None
        self._restored: dict[str, Any] | None = None
        self._origin = 0

    @cached_property
    def store(self) -> Store:
        """The opened store, checked against these settings."""
        store = Store.open(self.path, mirror=self.mirror)
        if unknown := sorted(set(self.cameras or ()) - set(store.spec.cameras)):
            raise ValueError(
                f"env.cameras (data.cameras): {self.path} has no camera {unknown}; it has "
                f"{list(store.spec.cameras)}. Choose among these, or record with others"
            )
        if self.cameras is not None and len(set(self.cameras)) < len(self.cameras):
            raise ValueError(f"data.cameras={list(self.cameras)} names a camera twice")
        if self.use_env_state and store.env_state is None:
            raise ValueError(
                f"data.use_env_state=true, but {self.path} holds no object poses; record with "
                "`env.env_state: true`, or train from cameras"
            )
        return store

    @cached_property
    def spec(self) -> DataSpec:
        """What the batches hold: the chosen cameras, and object poses only if used."""
        spec = self.store.spec
        cameras = spec.cameras if self.cameras is None else self.cameras
        return DataSpec(
            task=spec.task,
            fps=spec.fps,
            dim_qpos=spec.dim_qpos,
            dim_action=spec.dim_action,
            dim_env_state=spec.dim_env_state if self.use_env_state else 0,
            cameras=cameras,
            image_size=spec.image_size if cameras else (0, 0),
        )

    @cached_property
    def stats(self) -> Stats:
        """Mean and standard deviation over the training demonstrations."""
        frames = frames_of(self.store, self.train_episodes)
        env_state = self.store.env_state
        return Stats.from_arrays(
            qpos=self.store.qpos[frames],
            actions=self.store.actions[frames],
            env_state=env_state[frames] if self.use_env_state and env_state is not None else None,
        )

    @cached_property
    def train_episodes(self) -> NDArray[np.int64]:
        """Numbers of the demonstrations trained on, increasing."""
        episodes = self._split[0]
        if self.num_episodes is not None and self.num_episodes > len(episodes):
            raise ValueError(
                f"data.num_episodes={self.num_episodes}, but {self.path} has {len(episodes)} "
                f"training demonstrations ({self.store.num_episodes} less "
                f"val_fraction={self.val_fraction}); record more, or lower it"
            )
        episodes = episodes[: self.num_episodes]
        lengths = (self.store.episode_ends - self.store.episode_starts)[episodes]
        if self.chunk_size > lengths.max():
            raise ValueError(
                f"chunk_size={self.chunk_size} is longer than every training demonstration in "
                f"{self.path}: they have {lengths.min()} to {lengths.max()} steps; "
                "set model.net.chunk_size lower"
            )
        return episodes

    @cached_property
    def val_episodes(self) -> NDArray[np.int64]:
        """Numbers of the demonstrations kept for validation, increasing."""
        return self._split[1]

    @property
    def rank_batch_size(self) -> int:
        """Samples a step on each rank.

        Raises:
            ValueError: the batch cannot be divided by the number of ranks.
        """
        if self.batch_size_per_rank is not None:
            return self.batch_size_per_rank
        ranks = self._rank()[1]
        size, rest = divmod(self.batch_size, ranks)
        if rest:
            below, above = self.batch_size - rest, self.batch_size - rest + ranks
            raise ValueError(
                f"data.batch_size={self.batch_size} cannot be divided among {ranks} ranks; give "
                f"{f'{below} or ' if below else ''}{above}, or data.batch_size_per_rank"
            )
        return size

    @property
    def global_batch_size(self) -> int:
        """Samples a step over all ranks."""
        return self.rank_batch_size * self._rank()[1]

    def setup(self, stage: str) -> None:
        """Opens the store; a fit starts at position 0 unless a checkpoint says otherwise."""
        self.store  # noqa: B018  (opened, and checked, now)
        if stage == "fit":
            self._restored, self._stream, self._origin = None, None, 0

    def train_dataloader(self) -> TrainingStream:
        """Endless batches of this rank, from the position of the checkpoint on."""
        order = SampleOrder(self._make_sampling())
        if self._restored is not None:
            self._check_restored(order.num_samples)
            self._origin = self._restored["samples"] - self._samples_done()
            self._restored = None
        rank, world_size = self._rank()
        self._stream = TrainingStream(
            reader=self._reader(),
            order=order,
            batch_size=self.rank_batch_size,
            start=self._origin + self._samples_done(),
            rank=rank,
            world_size=world_size,
            prefetch=self.prefetch,
            num_workers=self.num_workers,
            start_method=self.start_method,
        )
        return self._stream

    def val_dataloader(self) -> FixedBatches | list[Batch]:
        """The same frames of the validation demonstrations each time; none without any."""
        if len(self.val_episodes) == 0:
            return []
        frames = frames_of(self.store, self.val_episodes)
        rank, world_size = self._rank()
        num_frames = min(len(frames), self.max_val_frames)
        start, frames = spread(frames, num_frames, rank, world_size)
        return FixedBatches(
            reader=self._reader(),
            frames=frames,
            num_batches=count_batches(num_frames, self.rank_batch_size, world_size),
            start=start,
        )

    def transfer_batch_to_device(
        self, batch: Batch, device: torch.device, dataloader_idx: int
    ) -> Batch:
        """Copies without waiting where the memory is page-locked."""
        return batch.to(device, non_blocking=device.type == "cuda")

    def on_exception(self, exception: BaseException) -> None:
        """Ends the threads, or processes, that read ahead."""
        if self._stream is not None:
            self._stream.close()

    def teardown(self, stage: str) -> None:
        """Ends the threads, or processes, that read ahead."""
        if self._stream is not None:
            self._stream.close()

    def state_dict(self) -> dict[str, Any]:
        """The position, as samples over all ranks, and what makes the order."""
        return {
            "samples": self._origin + self._samples_done(),
            "seed": self.seed,
            "sampling": self.sampling,
            "num_samples": 0 if self._stream is None else self._stream.order.num_samples,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the position from a checkpoint."""
        self._restored = state_dict

    @cached_property
    def _split(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        return split_episodes(self.store.num_episodes, self.val_fraction, self.seed)

    def _make_sampling(self) -> Sampling:
        if self.sampling == "frame":
            frames = frames_of(self.store, self.train_episodes)
            return FrameSampling(seed=self.seed, frames=frames)
        return EpisodeSampling(
            seed=self.seed,
            starts=self.store.episode_starts[self.train_episodes],
            ends=self.store.episode_ends[self.train_episodes],
        )

    def _reader(self) -> BatchReader:
        on_gpu = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        return BatchReader(
            store=self.store,
            chunk_size=self.chunk_size,
            cameras=self.spec.cameras,
            use_env_state=self.use_env_state,
            pin_memory=on_gpu,
        )

    def _rank(self) -> tuple[int, int]:
        if self.trainer is None:
            return 0, 1
        return self.trainer.global_rank, self.trainer.world_size

    def _samples_done(self) -> int:
        """Samples of all ranks in the batches that this trainer has finished.

        "Processed" is counted right after the optimizer's step, before any callback may save.
        """
        if self.trainer is None:
            return 0
        progress = self.trainer.fit_loop.epoch_loop.batch_progress.total
        batches: int = progress.processed  # type: ignore[attr-defined]
        return batches * self.global_batch_size

    def _check_restored(self, num_samples: int) -> None:
        assert self._restored is not None
        # Checkpoints older than the setting were trained on frames.
        before = {"sampling": "frame"} | self._restored
        now = {"seed": self.seed, "sampling": self.sampling, "num_samples": num_samples}
        for name, value in now.items():
            if before[name] != value:
                warnings.warn(
                    f"the checkpoint was trained with {name}={before[name]}, now it is "
                    f"{value}: the run goes on, but with another order of samples",
                    stacklevel=2,
                )
