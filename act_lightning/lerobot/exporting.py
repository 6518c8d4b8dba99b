"""`export_lerobot`: a policy folder that LeRobot's own loader opens, from a run of ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from act_lightning.evaluation import find_checkpoint
from act_lightning.lerobot.features import ACTION, ENV_STATE, IMAGES, QPOS
from act_lightning.lerobot.folder import CONFIG, MODEL, POSTPROCESSOR, PREPROCESSOR
from act_lightning.lerobot.names import POSITIONS, to_lerobot
from act_lightning.lerobot.new_folder import new_folder
from act_lightning.lerobot.normalization import NORMALIZER, UNNORMALIZER
from act_lightning.lerobot.settings import write_config
from act_lightning.nets.act import ACT
from act_lightning.nets.transformer import sinusoid_table
from act_lightning.policy import Policy


def export_lerobot(run: Path, folder: Path, *, checkpoint: str = "best") -> None:
    """Writes a run's policy as LeRobot 0.6.1's `save_pretrained` would.

    `ACTPolicy.from_pretrained(folder)` and `make_pre_post_processors(..., pretrained_path=folder)`
    open it. Images go in as LeRobot has them: float, RGB, 0 to 1, (3, H, W).

    Args:
        run: a run's folder.
        folder: to be made; it must not exist.
        checkpoint: `best`, `last`, or the path of a checkpoint.

    Raises:
        FileExistsError: there is something in `folder`.
        FileNotFoundError: the run or the checkpoint does not exist.
        ValueError: the network is none that LeRobot's ACT can be.
    """
    path = find_checkpoint(run, checkpoint)
    net = Policy.from_checkpoint(path).net
    try:
        if not isinstance(net, ACT):
            raise ValueError(f"it holds a {type(net).__name__}, not an ACT")
        write_policy(net, folder)
    except ValueError as error:
        raise ValueError(f"{path} cannot be exported to LeRobot: {error}") from error


def write_policy(net: ACT, folder: Path) -> None:
    """Writes the network's policy folder; errors as above."""
    config = write_config(net)
    weights = to_lerobot(net)
    if net.config.use_cvae:
        table = sinusoid_table(2 + net.config.chunk_size, net.config.dim_model)
        weights[POSITIONS] = table.unsqueeze(0)
    stats = lerobot_stats(net)
    steps = processor_steps(config)
    with new_folder(folder) as part:
        (part / CONFIG).write_text(json.dumps(config, indent=4))
        save_file(weights, part / MODEL)
        for name, entries in steps.items():
            document = {"name": name, "steps": entries}
            (part / f"{name}.json").write_text(json.dumps(document, indent=2))
            for state_file in (step["state_file"] for step in entries if "state_file" in step):
                save_file(stats, part / state_file)


def lerobot_stats(net: ACT) -> dict[str, Tensor]:
    """Mean and standard deviation of every feature; of images a (3, 1, 1) one a camera."""
    buffers = dict(net.normalizer.named_buffers())
    features = {QPOS: "qpos", ACTION: "action"}
    if net.spec.dim_env_state:
        features[ENV_STATE] = "env_state"
    features |= {f"{IMAGES}{name}": "image" for name in net.spec.cameras}
    # Copies: one tensor under two names is something that safetensors refuses.
    return {
        f"{key}.{kind}": buffers[f"{ours}_{kind}"]
        .clone()
        .reshape((3, 1, 1) if ours == "image" else (-1,))
        for key, ours in features.items()
        for kind in ("mean", "std")
    }


def processor_steps(config: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The steps of the processors before and behind the policy.

    eps is 0, because LeRobot adds it to standard deviations, and these are positive as they are.
    """
    device = {
        "registry_name": "device_processor",
        "config": {"device": config["device"], "float_dtype": None},
    }

    def normalizer(
        pipeline: str, index: int, kind: str, features: dict[str, Any]
    ) -> dict[str, Any]:
        return {
            "registry_name": kind,
            "config": {
                "eps": 0.0,
                "features": features,
                "norm_map": config["normalization_mapping"],
            },
            "state_file": f"{pipeline}_step_{index}_{kind}.safetensors",
        }

    outputs = config["output_features"]
    both = config["input_features"] | outputs
    return {
        PREPROCESSOR: [
            {"registry_name": "rename_observations_processor", "config": {"rename_map": {}}},
            {"registry_name": "to_batch_processor", "config": {}},
            device,
            normalizer(PREPROCESSOR, 3, NORMALIZER, both),
        ],
        POSTPROCESSOR: [normalizer(POSTPROCESSOR, 0, UNNORMALIZER, outputs), device],
    }
