"""LeRobot's normalisation to ours and back.

All of LeRobot's modes are affine, so each is some mean and standard deviation:

    MEAN_STD            (x - mean) / (std + eps)
    MIN_MAX, QUANTILES  2 (x - low) / (high - low) - 1    mean (low + high) / 2, std half the width
    IDENTITY            x                                 mean 0, std 1

Since LeRobot 0.4 they stand in the processor files beside the weights; before, in buffers among the
weights. Departure from LeRobot, which leaves a feature without statistics un-normalised without a
word: here that is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from act_lightning.lerobot.features import ACTION, QPOS
from act_lightning.lerobot.folder import (
    MODEL,
    POSTPROCESSOR,
    PREPROCESSOR,
    read_json,
    read_tensors,
)
from act_lightning.lerobot.settings import camera_name, cameras_of, env_state_key
from act_lightning.nets.normalize import Stats

NORMALIZER = "normalizer_processor"
UNNORMALIZER = "unnormalizer_processor"
HARMLESS_STEPS = ("rename_observations_processor", "to_batch_processor", "device_processor")
"""Steps that change no value of what the network gets or gives."""
EPS = 1e-8
"""LeRobot's default, added to every standard deviation it divides by."""
BUFFERS = ("normalize_inputs.", "normalize_targets.", "unnormalize_outputs.")
"""How the names of statistics begin where they stand among the weights."""

DEFAULT_MODES = dict.fromkeys(("VISUAL", "STATE", "ACTION"), "MEAN_STD")
"""Of LeRobot's ACT, where its config says nothing."""
RANGES = {"MIN_MAX": ("min", "max"), "QUANTILES": ("q01", "q99"), "QUANTILE10": ("q10", "q90")}


class Affine(NamedTuple):
    """x is normalised to (x - mean) / std."""

    mean: Tensor
    """float64."""
    std: Tensor
    """float64, positive."""


@dataclass(frozen=True, kw_only=True)
class Normalization:
    """What LeRobot does to the inputs, or to the actions."""

    path: Path
    """The file the statistics are from, for messages."""
    modes: Mapping[str, str]
    """Mode by kind of feature: STATE, ENV, VISUAL, ACTION. Those left out are not normalised."""
    stats: Mapping[str, Mapping[str, Tensor]]
    """Statistics by feature and name (mean, std, min, ...)."""
    eps: float = EPS
    """Added to standard deviations."""
    only: frozenset[str] | None = None
    """Features that are normalised; None: all."""

    def affine(self, key: str, kind: str, size: int, *, inverse: bool = False) -> Affine:
        """How feature `key` is normalised; `inverse`: what undoes the normalisation.

        Raises:
            ValueError: a statistic is missing, not finite or of another size; the mode is unknown.
        """
        mode = self.modes.get(kind, "IDENTITY")
        if mode == "IDENTITY" or (self.only is not None and key not in self.only):
            return Affine(
                torch.zeros(size, dtype=torch.float64), torch.ones(size, dtype=torch.float64)
            )
        if mode == "MEAN_STD":
            mean, std = (self._read(key, name, size) for name in ("mean", "std"))
            # LeRobot adds eps where it divides, and not where it multiplies.
            std = std.clamp(min=self.eps) if inverse else std + self.eps
            if not bool((std > 0).all()):
                raise ValueError(f"{self.path}: {key}.std must be positive, but is {std.tolist()}")
            return Affine(mean, std)
        if mode not in RANGES:
            raise ValueError(
                f"{self.path}: normalisation of {kind} is {mode!r}; "
                f"{', '.join(('IDENTITY', 'MEAN_STD', *RANGES))} can be imported"
            )
        low, high = (self._read(key, name, size) for name in RANGES[mode])
        return _range(low, high, self.eps, inverse=inverse)

    def _read(self, key: str, name: str, size: int) -> Tensor:
        values = self.stats.get(key, {}).get(name)
        if values is None:
            raise ValueError(
                f"{self.path} has no statistic {name!r} of {key!r}; save the policy's processors "
                "with the statistics of its data set, or set its normalisation to IDENTITY if it "
                "was trained without"
            )
        if values.numel() != size:
            raise ValueError(
                f"{self.path}: {key}.{name} has shape {tuple(values.shape)}, the feature {size} "
                "values; the statistics are of another data set"
            )
        if not bool(values.isfinite().all()):
            raise ValueError(
                f"{self.path}: {key}.{name} is not finite; the policy was saved without the "
                "statistics of its data set"
            )
        return values.flatten().double()


def _range(low: Tensor, high: Tensor, eps: float, *, inverse: bool) -> Affine:
    width = high - low
    if inverse:
        width = width.where(width != 0, eps)
        return Affine(low + width / 2, width / 2)
    # LeRobot maps the only value of a constant dimension to -1 and any other to about 1e8. This
    # maps the former to -1, exactly, and stays moderate for the latter.
    step = low.abs().where(low != 0, 1.0)
    constant = width == 0
    return Affine(
        torch.where(constant, low + step, low + width / 2), torch.where(constant, step, width / 2)
    )


def read_normalization(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[Normalization, Normalization]:
    """Reads how inputs are normalised, and how actions are un-normalised.

    Args:
        folder: the policy's.
        config: content of its `config.json`.
        tensors: content of its `model.safetensors`.

    Raises:
        FileNotFoundError: neither processor files nor statistics among the weights.
        ValueError: the processors do something else besides.
    """
    if not (folder / f"{PREPROCESSOR}.json").is_file():
        buffers = _read_buffers(folder / MODEL, config, tensors)
        if buffers is not None:
            return buffers
    return (
        _read_processor(folder, PREPROCESSOR, NORMALIZER),
        _read_processor(folder, POSTPROCESSOR, UNNORMALIZER),
    )


def _read_processor(folder: Path, name: str, kind: str) -> Normalization:
    path = folder / f"{name}.json"
    steps = read_json(path).get("steps")
    if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
        raise ValueError(f"{path}: steps={steps!r} is not a list of processing steps")
    found: list[dict[str, Any]] = []
    for step in steps:
        settings = step.get("config") or {}
        what = step.get("registry_name", step.get("class"))
        if what == kind:
            found.append(step)
        elif what not in HARMLESS_STEPS:
            raise ValueError(
                f"{path}: steps has {what!r}, which changes what the policy sees or does; only "
                f"{', '.join((*HARMLESS_STEPS, kind))} can be imported"
            )
        elif settings.get("float_dtype") not in (None, "float32", "float"):
            raise ValueError(
                f"{path}: float_dtype={settings['float_dtype']!r}; only float32 can be imported"
            )
    if len(found) != 1:
        raise ValueError(f"{path}: steps has {len(found)} of {kind!r}; expected one")
    return _read_step(folder, path, found[0])


def _read_step(folder: Path, path: Path, step: dict[str, Any]) -> Normalization:
    settings, state_file = step.get("config") or {}, step.get("state_file")
    for field in ("features", "norm_map"):
        if not isinstance(settings.get(field), dict):
            raise ValueError(
                f"{path}: {step['registry_name']}: {field}={settings.get(field)!r} is not a table; "
                "save the policy's processors anew"
            )
    stats: dict[str, dict[str, Tensor]] = {}
    if state_file:
        path = folder / state_file
        for name, values in read_tensors(path).items():
            key, _, statistic = name.rpartition(".")
            stats.setdefault(key, {})[statistic] = values
    # LeRobot normalises the features listed here; where there is a second list, those in both.
    only = set(settings["features"])
    if settings.get("normalize_observation_keys") is not None:
        only &= {ACTION, *settings["normalize_observation_keys"]}
    return Normalization(
        path=path,
        modes=settings["norm_map"],
        stats=stats,
        eps=float(settings.get("eps", EPS)),
        only=frozenset(only),
    )


def _read_buffers(
    path: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[Normalization, Normalization] | None:
    """Statistics among the weights, as LeRobot kept them before 0.4; None where there are none."""
    if not any(name.startswith(BUFFERS) for name in tensors):
        return None
    features = [*(config.get("input_features") or {}), ACTION]
    sides = []
    for module in ("normalize_inputs", "unnormalize_outputs"):
        stats = {
            key: {
                name.rpartition(".")[2]: values
                for name, values in tensors.items()
                if name.startswith(f"{module}.buffer_{key.replace('.', '_')}.")
            }
            for key in features
        }
        modes = config.get("normalization_mapping", DEFAULT_MODES)
        sides.append(Normalization(path=path, modes=modes, stats=stats))
    return sides[0], sides[1]


def read_stats(
    inputs: Normalization,
    outputs: Normalization,
    config: Mapping[str, Any],
    path: Path,
    sizes: tuple[int, int, int],
) -> tuple[Stats, Affine | None]:
    """Our statistics, and those of images (3 channels), which all cameras must share.

    Args:
        inputs: how observations are normalised.
        outputs: how actions are un-normalised.
        config: content of `config.json`.
        path: of that file.
        sizes: of qpos, action and env_state, 0 without env_state.

    Raises:
        ValueError: a statistic is missing or of another size, or cameras differ in theirs.
    """
    dim_qpos, dim_action, dim_env_state = sizes
    qpos = inputs.affine(QPOS, "STATE", dim_qpos)
    action = outputs.affine(ACTION, "ACTION", dim_action, inverse=True)
    key = env_state_key(config, path)
    env_state = inputs.affine(key, "ENV", dim_env_state) if key else None
    stats = Stats(
        qpos_mean=qpos.mean.float(),
        qpos_std=qpos.std.float(),
        action_mean=action.mean.float(),
        action_std=action.std.float(),
        env_state_mean=env_state.mean.float() if env_state else None,
        env_state_std=env_state.std.float() if env_state else None,
    )
    cameras = {key: inputs.affine(key, "VISUAL", 3) for key in cameras_of(config, path)}
    images = next(iter(cameras.values()), None)
    for key, other in cameras.items():
        if images and not all(map(torch.equal, other, images)):
            raise ValueError(
                f"{inputs.path}: images of {camera_name(key)} are normalised otherwise than those "
                f"of {camera_name(next(iter(cameras)))}; only one normalisation for all cameras "
                "can be imported"
            )
    return stats, images
