"""The same ACT as ours and as LeRobot's, with the same weights, fed with the same samples."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from act_lightning.batch import Batch, DataSpec, Observation
from act_lightning.lerobot.exporting import write_policy
from act_lightning.lerobot.names import POSITIONS, to_lerobot
from act_lightning.nets.act import ACT, ACTConfig
from act_lightning.nets.backbone import BackboneConfig, ResNet18

IMAGENET = BackboneConfig()
SCRATCH = BackboneConfig(weights="none", norm="group", stages=3, width=32)


@dataclass(frozen=True, kw_only=True)
class Size:
    """A network and what it is fed with."""

    config: ACTConfig
    image_size: tuple[int, int]
    batch_size: int
    cameras: int = 1

    @property
    def spec(self) -> DataSpec:
        return DataSpec(
            task="insertion",
            fps=50,
            dim_qpos=14,
            dim_action=14,
            cameras=tuple(f"camera_{i}" for i in range(self.cameras)),
            image_size=self.image_size,
        )

    def build(self, **changes: Any) -> ACT:
        """Our network with random weights, the same each time."""
        torch.manual_seed(0)
        net = ACT(replace(self.config, **changes), self.spec, pretrained=False)
        _calibrate(net)
        return net

    def batch(self, rows: int | None = None, seed: int = 0) -> Batch:
        """Random samples, in memory as our loader lays them out."""
        rows = rows or self.batch_size
        generator = torch.Generator().manual_seed(seed)
        chunk_size, spec = self.config.chunk_size, self.spec
        height, width = self.image_size
        shape = (rows, self.cameras, height, width, 3)
        pictures = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        lengths = torch.randint(chunk_size // 2, 2 * chunk_size, (rows, 1), generator=generator)
        return Batch(
            observation=Observation(
                qpos=torch.randn(rows, spec.dim_qpos, generator=generator),
                images=pictures.permute(0, 1, 4, 2, 3),
            ),
            actions=torch.randn(rows, chunk_size, spec.dim_action, generator=generator),
            is_pad=torch.arange(chunk_size) >= lengths,
        )


FULL = Size(
    config=ACTConfig(camera_embedding=False, backbone=IMAGENET),
    image_size=(480, 640),
    batch_size=8,
)
"""experiments/paper: the paper's sizes, LeRobot's defaults."""
INSERTION = Size(
    config=ACTConfig(
        chunk_size=50,
        dim_model=128,
        num_heads=4,
        dim_feedforward=512,
        dropout=0.0,
        num_cvae_layers=1,
        num_obs_layers=2,
        camera_embedding=False,
        backbone=SCRATCH,
    ),
    image_size=(120, 160),
    batch_size=32,
)
"""experiments/insertion.yaml."""


@dataclass(frozen=True, kw_only=True)
class StateSize(Size):
    """A network that sees object poses and no pictures."""

    @property
    def spec(self) -> DataSpec:
        return replace(super().spec, dim_env_state=14)

    def batch(self, rows: int | None = None, seed: int = 0) -> Batch:
        batch = super().batch(rows, seed)
        generator = torch.Generator().manual_seed(seed + 1)
        env_state = torch.randn(len(batch), self.spec.dim_env_state, generator=generator)
        return replace(
            batch, observation=replace(batch.observation, images=None, env_state=env_state)
        )


INSERTION_STATE = StateSize(config=INSERTION.config, image_size=(0, 0), batch_size=64, cameras=0)
"""experiments/insertion_state.yaml."""


class LeRobot:
    """LeRobot's policy, its processors, and samples as its data set delivers them."""

    def __init__(self, net: ACT, device: str = "cpu") -> None:
        """Opens an export of `net` with LeRobot's own loader.

        LeRobot has torchvision's ResNets only. Where `net` sees through another, that takes the
        place of LeRobot's, and the projection of what it sees that of LeRobot's projection.
        """
        os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported
        from lerobot.policies.act.modeling_act import ACTPolicy
        from lerobot.policies.factory import make_pre_post_processors

        has_its_own = net.backbone is None or net.config.backbone == IMAGENET
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name) / "policy"
            config = replace(net.config, backbone=IMAGENET)
            write_policy(net if has_its_own else ACT(config, net.spec, pretrained=False), folder)
            self.policy = ACTPolicy.from_pretrained(folder)
            self.before, self.after = make_pre_post_processors(
                self.policy.config,
                pretrained_path=str(folder),
                preprocessor_overrides={"device_processor": {"device": device}},
            )
        if not has_its_own:
            backbone, dim_model = net.config.backbone, net.config.dim_model
            self.policy.model.backbone = _FeatureMap(backbone)
            projection = nn.Conv2d(backbone.dim_features, dim_model, kernel_size=1)
            self.policy.model.encoder_img_feat_input_proj = projection
            position_table = {POSITIONS: self.policy.state_dict()[POSITIONS]}
            self.policy.load_state_dict(to_lerobot(net) | position_table)
        self.policy.to(device)

    @staticmethod
    def samples(batch: Batch, cameras: tuple[str, ...]) -> dict[str, Tensor]:
        """Float pictures from 0 to 1, as LeRobot's data sets give."""
        observation = batch.observation
        given = {
            "observation.state": observation.qpos,
            "action": batch.actions,
            "action_is_pad": batch.is_pad,
        }
        if observation.images is not None:
            for i, name in enumerate(cameras):
                picture = observation.images[:, i].contiguous().float() / 255
                given[f"observation.images.{name}"] = picture
        return given


class _FeatureMap(ResNet18):
    """Our ResNet in the form of LeRobot's backbone."""

    def forward(self, images: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        return {"feature_map": super().forward(images)}


def move(samples: dict[str, Tensor], device: str) -> dict[str, Tensor]:
    """Samples on a device."""
    return {name: value.to(device) for name, value in samples.items()}


@torch.no_grad()
def _calibrate(net: ACT) -> None:
    """Gives frozen norms without weights the statistics of random pictures."""
    if net.backbone is None or net.config.backbone.norm != "frozen_batch":
        return

    def measure(module: Any, inputs: tuple[Tensor, ...]) -> None:
        (x,) = inputs
        module.running_mean.copy_(x.mean((0, 2, 3)))
        module.running_var.copy_(x.var((0, 2, 3)) + 1e-5)

    from torchvision.ops import FrozenBatchNorm2d

    hooks = [
        module.register_forward_pre_hook(measure)
        for module in net.backbone.modules()
        if isinstance(module, FrozenBatchNorm2d)
    ]
    net.backbone(torch.randn(2, len(net.spec.cameras), 3, 120, 160))
    for hook in hooks:
        hook.remove()
