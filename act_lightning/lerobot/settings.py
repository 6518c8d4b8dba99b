"""LeRobot's `config.json` to our network's sizes and back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from act_lightning.batch import DataSpec
from act_lightning.lerobot.features import ACTION, ENV_STATE, IMAGES, QPOS
from act_lightning.nets.act import ACT, ACTConfig
from act_lightning.nets.backbone import RESNET18_WIDTH, BackboneConfig
from act_lightning.nets.losses import KLSchedule

# Field of LeRobot's config, field of ours, LeRobot's default.
SIZES: tuple[tuple[str, str, Any], ...] = (
    ("chunk_size", "chunk_size", 100),
    ("pre_norm", "pre_norm", False),
    ("dim_model", "dim_model", 512),
    ("n_heads", "num_heads", 8),
    ("dim_feedforward", "dim_feedforward", 3200),
    ("feedforward_activation", "activation", "relu"),
    ("n_encoder_layers", "num_obs_layers", 4),
    ("n_decoder_layers", "num_decoder_layers", 1),
    ("use_vae", "use_cvae", True),
    ("latent_dim", "dim_latent", 32),
    ("n_vae_encoder_layers", "num_cvae_layers", 4),
    ("dropout", "dropout", 0.1),
)


def read_config(config: Mapping[str, Any], path: Path) -> ACTConfig:
    """Sizes of the network that a LeRobot config describes.

    Args:
        config: content of `config.json`.
        path: of that file, for messages.

    Raises:
        ValueError: it is no ACT, or one that ours cannot be.
    """
    kind = config.get("type")
    if kind != "act":
        raise ValueError(f"{path}: type={kind!r}; only policies of type 'act' can be imported")
    unsupported: dict[str, tuple[Any, str]] = {
        "n_obs_steps": (1, "an ACT that sees one observation"),
        "use_peft": (False, "a policy whose adapter has been merged into its weights"),
    }
    if cameras_of(config, path):
        unsupported |= {
            "vision_backbone": ("resnet18", "a policy with a ResNet-18"),
            "replace_final_stride_with_dilation": (False, "a policy without dilation"),
        }
    for field, (expected, wanted) in unsupported.items():
        if config.get(field, expected) != expected:
            raise ValueError(
                f"{path}: {field}={config[field]!r}, only {expected!r} is supported; give {wanted}"
            )
    if config.get("feedforward_activation", "relu") not in ("relu", "gelu"):
        raise ValueError(
            f"{path}: feedforward_activation={config['feedforward_activation']!r}; only relu and "
            "gelu are supported"
        )
    for field, _, default in SIZES:
        value = config.get(field, default)
        # JSON may write a float without a point.
        if type(value) is not type(default) and (type(default), type(value)) != (float, int):
            raise ValueError(
                f"{path}: {field}={value!r} is no {type(default).__name__}; LeRobot's default is "
                f"{default!r}"
            )
    sizes = {ours: config.get(theirs, default) for theirs, ours, default in SIZES}
    try:
        return ACTConfig(
            **sizes,
            camera_embedding=False,
            kl_schedule=KLSchedule(weight=config.get("kl_weight", 10.0)),
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def read_spec(config: Mapping[str, Any], path: Path, task: str, fps: float) -> DataSpec:
    """What the policy observes and commands; LeRobot's config says neither task nor fps.

    Raises:
        ValueError: a feature is missing, or ours cannot have it.
    """
    cameras = cameras_of(config, path)
    sizes = {tuple(shape) for shape in cameras.values()}
    if len(sizes) > 1:
        raise ValueError(
            f"{path}: input_features: the cameras' shapes differ ("
            + ", ".join(f"{key} {shape}" for key, shape in cameras.items())
            + "); cameras must be of one size"
        )
    shape = sizes.pop() if sizes else (3, 0, 0)
    if len(shape) != 3 or shape[0] != 3:
        raise ValueError(
            f"{path}: input_features: images of shape {shape}; give a policy of (3, H, W) images"
        )
    names = [camera_name(key) for key in cameras]
    if len(set(names)) < len(names):
        raise ValueError(f"{path}: input_features: two cameras are called alike: {names}")
    inputs = config.get("input_features") or {}
    if QPOS not in inputs:
        raise ValueError(
            f"{path}: input_features has no {QPOS!r}; only policies that see the robot's state can "
            "be imported"
        )
    env_state = env_state_key(config, path)
    return DataSpec(
        task=task,
        fps=fps,
        dim_qpos=_size(inputs[QPOS], QPOS, path),
        dim_action=_size((config.get("output_features") or {}).get(ACTION), ACTION, path),
        dim_env_state=_size(inputs[env_state], env_state, path) if env_state else 0,
        cameras=tuple(names),
        image_size=(shape[1], shape[2]),
    )


def cameras_of(config: Mapping[str, Any], path: Path) -> dict[str, list[int]]:
    """Shape of each image feature by its key, in the policy's order."""
    return {key: feature["shape"] for key, feature in _features(config, path, "VISUAL")}


def env_state_key(config: Mapping[str, Any], path: Path) -> str | None:
    """The key of the environment's state among the inputs; LeRobot's ACT reads the first."""
    return next((key for key, _ in _features(config, path, "ENV")), None)


def camera_name(key: str) -> str:
    """`observation.images.top` is our camera `top`, and `observation.image` our `image`."""
    return key.removeprefix(IMAGES).removeprefix("observation.")


def write_config(net: ACT, *, n_action_steps: int | None = None) -> dict[str, Any]:
    """The network's `config.json`, with the fields of LeRobot 0.6.1 in their order.

    What LeRobot's config cannot say and inference does not need is left out: schedules of the KL
    weight (its final weight is written), free bits, other reconstruction losses. Backbone weights
    are null, because LeRobot would download those named here before it loads the policy's.

    Args:
        net: whatever LeRobot's ACT can be.
        n_action_steps: actions taken from a chunk before the next; default all.

    Raises:
        ValueError: LeRobot's ACT cannot be this network.
    """
    check_expressible(net)
    config, spec = net.config, net.spec
    sizes = {theirs: getattr(config, ours) for theirs, ours, _ in SIZES}
    inputs = {QPOS: {"type": "STATE", "shape": [spec.dim_qpos]}}
    if spec.dim_env_state:
        inputs[ENV_STATE] = {"type": "ENV", "shape": [spec.dim_env_state]}
    inputs |= {
        f"{IMAGES}{name}": {"type": "VISUAL", "shape": [3, *spec.image_size]}
        for name in spec.cameras
    }
    return {
        "type": "act",
        "n_obs_steps": 1,
        "input_features": inputs,
        "output_features": {ACTION: {"type": "ACTION", "shape": [spec.dim_action]}},
        "device": "cpu",
        "use_amp": False,
        "use_peft": False,
        "push_to_hub": True,
        "repo_id": None,
        "private": None,
        "tags": None,
        "license": None,
        "pretrained_path": None,
        "pretrained_revision": None,
        "chunk_size": sizes.pop("chunk_size"),
        "n_action_steps": n_action_steps or config.chunk_size,
        "normalization_mapping": dict.fromkeys(("VISUAL", "STATE", "ENV", "ACTION"), "MEAN_STD"),
        "vision_backbone": "resnet18",
        "pretrained_backbone_weights": None,
        "replace_final_stride_with_dilation": False,
        **{name: value for name, value in sizes.items() if name != "dropout"},
        "temporal_ensemble_coeff": None,
        "dropout": sizes["dropout"],
        "kl_weight": config.kl_schedule.weight,
        "optimizer_lr": 1e-5,
        "optimizer_weight_decay": 1e-4,
        "optimizer_lr_backbone": 1e-5,
    }


def check_expressible(net: ACT) -> None:
    """Refuses networks that LeRobot's ACT cannot be.

    Raises:
        ValueError: names the setting, its value, and what to train instead.
    """
    config, spec = net.config, net.spec
    if not spec.cameras and not spec.dim_env_state:
        raise ValueError(
            "this policy sees qpos only; LeRobot's ACT needs a camera or env_state: record with "
            "one of them"
        )
    needed: dict[str, Any] = {
        "cvae_encoder": "transformer",
        "qpos_encoder": "linear",
        "latent_at_inference": "zero",
    }
    if not config.use_cvae:
        needed.pop("cvae_encoder")  # there is none
    for field, expected in needed.items():
        _expect(f"model.net.{field}", getattr(config, field), expected)
    if config.num_obs_layers == 0:
        _expect("model.net.num_obs_layers", 0, "1 or more")
    if len(spec.cameras) > 1:
        _expect("model.net.camera_embedding", config.camera_embedding, False)
    if spec.cameras:
        _check_backbone(config.backbone, len(spec.cameras))


def _check_backbone(backbone: BackboneConfig, num_cameras: int) -> None:
    needed: dict[str, Any] = {"norm": "frozen_batch", "stages": 4, "width": RESNET18_WIDTH}
    if num_cameras > 1:
        needed["shared"] = True
    for field, expected in needed.items():
        _expect(f"model.net.backbone.{field}", getattr(backbone, field), expected)


def _expect(name: str, value: object, expected: object) -> None:
    if value != expected:
        raise ValueError(
            f"{name}={value} cannot be expressed as LeRobot's ACT, which has {expected}: train "
            "with that"
        )


def _features(config: Mapping[str, Any], path: Path, kind: str) -> list[tuple[str, dict[str, Any]]]:
    features = config.get("input_features")
    if not isinstance(features, dict) or not all(
        isinstance(feature, dict) and "type" in feature and isinstance(feature.get("shape"), list)
        for feature in features.values()
    ):
        raise ValueError(
            f"{path}: input_features={features!r} is not a table of features with type and shape; "
            "save the policy anew with LeRobot 0.2 to 0.6.1"
        )
    return [(key, feature) for key, feature in features.items() if feature["type"] == kind]


def _size(feature: Any, key: str, path: Path) -> int:
    shape = feature.get("shape") if isinstance(feature, dict) else None
    if not (isinstance(shape, list) and len(shape) == 1 and isinstance(shape[0], int)):
        raise ValueError(f"{path}: {key} has shape {shape}; expected one number, its size")
    return shape[0]
