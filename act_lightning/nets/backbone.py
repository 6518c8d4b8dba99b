"""ResNet-18 as a source of spatial feature tokens.

Source: He et al. 2016, built from torchvision's BasicBlock with torchvision's parameter names, so
that its weights load unchanged. Departures, all optional: later stages can be left out (finer and
cheaper tokens for small images), the width can be changed, and GroupNorm replaces the frozen
batch-norm when training from scratch, because a batch-norm that is frozen before it has seen any
data normalises nothing.
"""

from __future__ import annotations

import logging
import math
import pickle
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import ResNet18_Weights
from torchvision.models.resnet import BasicBlock
from torchvision.ops import FrozenBatchNorm2d

WEIGHTS_FILE = "resnet18-f37072fd.pth"
RESNET18_WIDTH = 64
CHANNELS_PER_GROUP = 16
DOWNLOAD_TIMEOUT = 10.0
"""Seconds without an answer before a download is given up."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """What turns images into features."""

    weights: str = "imagenet"
    """Where training starts: `imagenet` (torchvision's ResNet-18 weights, from torch hub's cache or
    the network), `none` (random), or the path of a file holding torchvision's resnet18
    state_dict."""
    norm: Literal["frozen_batch", "group"] = "frozen_batch"
    """frozen_batch: batch-norm as it was after pre-training, constant (needs weights); group:
    GroupNorm with 16 channels a group, trained (needs `weights: none`)."""
    shared: bool = True
    """One backbone for all cameras; false gives each camera its own."""
    stages: int = 4
    """ResNet stages in use, 1 to 4: 4 gives 512 channels at stride 32, 3 gives 256 channels at
    stride 16."""
    width: int = RESNET18_WIDTH
    """Channels of the first stage, doubled by each later one. 64 is ResNet-18; other widths train
    from scratch."""

    def __post_init__(self) -> None:
        if self.norm not in ("frozen_batch", "group"):
            raise ValueError(f"BackboneConfig: norm={self.norm!r}; choose frozen_batch or group")
        if not self.weights:
            raise ValueError(
                "BackboneConfig: weights is empty; give imagenet, none or the path of a file"
            )
        if (self.weights == "none") != (self.norm == "group"):
            raise ValueError(
                f"BackboneConfig: weights={self.weights!r} with norm={self.norm}; pre-trained "
                "weights and a frozen batch-norm need each other. Use `weights: imagenet, "
                "norm: frozen_batch` or `weights: none, norm: group`"
            )
        if not 1 <= self.stages <= 4:
            raise ValueError(f"BackboneConfig: stages={self.stages}; ResNet-18 has 1 to 4")
        if self.width < 1 or self.width % CHANNELS_PER_GROUP:
            raise ValueError(
                f"BackboneConfig: width={self.width}; give a multiple of {CHANNELS_PER_GROUP}"
            )
        if self.weights != "none" and self.width != RESNET18_WIDTH:
            raise ValueError(
                f"BackboneConfig: width={self.width} with weights={self.weights!r}; those are "
                f"{RESNET18_WIDTH} wide. Use that width, or `weights: none, norm: group`"
            )

    @property
    def dim_features(self) -> int:
        """Channels of the feature map."""
        return int(self.width * 2 ** (self.stages - 1))

    def feature_size(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """(rows, columns) of the feature map of an (H, W) image."""
        stride = 2 ** (self.stages + 1)
        return math.ceil(image_size[0] / stride), math.ceil(image_size[1] / stride)


class Backbone(nn.Module):
    """Images of N cameras to feature tokens, in one call when the cameras share a backbone."""

    def __init__(
        self, config: BackboneConfig, num_cameras: int, *, pretrained: bool = True
    ) -> None:
        """Builds the networks and loads their weights.

        Args:
            config: settings.
            num_cameras: N.
            pretrained: False when a state_dict is loaded next: then no weights file is read.

        Raises:
            FileNotFoundError: if the weights are neither on disk nor to be had from the network.
            ValueError: if the weights are not a ResNet-18's.
        """
        super().__init__()
        self.resnets = nn.ModuleList(
            ResNet18(config) for _ in range(1 if config.shared else num_cameras)
        )
        if pretrained and config.weights != "none":
            weights = read_weights(config.weights)
            for resnet in self.resnets:
                load_weights(resnet, weights, config.weights)
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        """(B, N, 3, H, W) normalised images to (B, N, rows * columns, channels) feature tokens."""
        # A shared backbone takes all cameras as one batch; else each takes its own.
        groups = images.chunk(len(self.resnets), dim=1)
        tokens = []
        for resnet, group in zip(self.resnets, groups, strict=True):
            features = resnet(group.flatten(0, 1)).permute(0, 2, 3, 1)
            tokens.append(features.reshape(*group.shape[:2], -1, features.shape[-1]))
        return torch.cat(tokens, dim=1)


class ResNet18(nn.Module):
    """ResNet-18 without its classifier, up to the last stage in use."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        norm: Callable[[int], nn.Module] = (
            FrozenBatchNorm2d if config.norm == "frozen_batch" else group_norm
        )
        width = config.width
        self.conv1 = nn.Conv2d(3, width, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = norm(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        for stage in range(1, config.stages + 1):
            dim_in = width * 2 ** max(stage - 2, 0)
            dim_out = width * 2 ** (stage - 1)
            self.add_module(f"layer{stage}", _stage(dim_in, dim_out, norm))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # torchvision's initialisation
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """(M, 3, H, W) to (M, channels, rows, columns)."""
        # Pooled first, of which torchvision does the reverse: the same, with a quarter to rectify.
        x: Tensor = self.relu(self.maxpool(conv_norm(images, self.conv1, self.bn1)))
        for stage in list(self.children())[4:]:
            x = stage(x)
        return x


class Block(BasicBlock):  # type: ignore[misc]  # torchvision has no types
    """torchvision's residual block, by `conv_norm`."""

    def forward(self, x: Tensor) -> Tensor:
        """(M, channels, rows, columns), before and after."""
        shortcut = x if self.downsample is None else conv_norm(x, *self.downsample)
        hidden = self.relu(conv_norm(x, self.conv1, self.bn1))
        out: Tensor = self.relu(conv_norm(hidden, self.conv2, self.bn2).add_(shortcut))
        return out


def conv_norm(x: Tensor, conv: nn.Conv2d, norm: nn.Module) -> Tensor:
    """`norm(conv(x))`.

    A frozen norm is a scale and a shift for each channel: as weights and bias of the convolution
    they save three passes over its result, which mixed precision would take in float32. So in mixed
    precision what follows, the residual sums too, is bfloat16.
    """
    if not isinstance(norm, FrozenBatchNorm2d):
        out: Tensor = norm(conv(x))
        return out
    return F.conv2d(x, *folded(conv, norm), conv.stride, conv.padding)


def folded(conv: nn.Conv2d, norm: FrozenBatchNorm2d) -> tuple[Tensor, Tensor]:
    """Weights and bias of the convolution that does what one without a bias and a norm do."""
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    return conv.weight * scale[:, None, None, None], norm.bias - norm.running_mean * scale


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm with 16 channels a group (Wu & He 2018), as diffusion_policy trains its ResNets."""
    return nn.GroupNorm(channels // CHANNELS_PER_GROUP, channels)


def read_weights(weights: str) -> Mapping[str, Tensor]:
    """Reads a ResNet-18 state_dict.

    Args:
        weights: `imagenet` or a path. `imagenet` looks in torch hub's cache first, then tries to
            download.

    Raises:
        FileNotFoundError: if there is no such file, or the download failed.
        ValueError: if the file holds something else.
    """
    path = Path(weights).expanduser()
    if weights == "imagenet":
        path = Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS_FILE
        if not path.is_file():
            return _download(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"backbone.weights={weights!r}: no such file. Give the path of torchvision's "
            f"{WEIGHTS_FILE}, or `weights: imagenet`, or train from scratch with "
            "`weights: none, norm: group`"
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"backbone.weights={weights!r}: {path} is not a PyTorch state_dict; "
            f"fetch {WEIGHTS_FILE} anew"
        ) from error
    if not isinstance(content, Mapping):
        raise ValueError(
            f"backbone.weights={weights!r}: {path} holds a {type(content).__name__}, "
            "not a state_dict"
        )
    return content


def load_weights(resnet: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Copies into `resnet` what it needs of torchvision's resnet18 state_dict.

    Raises:
        ValueError: if a parameter is missing or has another shape; `source` names the weights in
            the message.
    """
    needed = resnet.state_dict()
    for name, value in needed.items():
        found = weights.get(name)
        shape = tuple(found.shape) if isinstance(found, Tensor) else "missing"
        if shape != tuple(value.shape):
            raise ValueError(
                f"backbone.weights={source!r}: not torchvision's resnet18: {name} is {shape}, "
                f"expected {tuple(value.shape)}"
            )
    resnet.load_state_dict({name: weights[name] for name in needed})


def _download(path: Path) -> Mapping[str, Tensor]:
    log.warning("downloading ResNet-18's ImageNet weights (45 MB) to %s", path)
    previous_timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)  # torch hub sets none and would wait for minutes
    try:
        weights: Mapping[str, Tensor] = ResNet18_Weights.IMAGENET1K_V1.get_state_dict(
            progress=True, check_hash=True
        )
    except (OSError, RuntimeError) as error:
        raise FileNotFoundError(
            "backbone.weights='imagenet': not in the cache, and the download failed "
            f"({error}). Either put {WEIGHTS_FILE} at {path} (or give its path as `weights`), "
            "or train from scratch with `weights: none, norm: group`"
        ) from error
    finally:
        socket.setdefaulttimeout(previous_timeout)
    return weights


def _stage(dim_in: int, dim_out: int, norm: Callable[[int], nn.Module]) -> nn.Sequential:
    if dim_in == dim_out:
        first = Block(dim_in, dim_out, norm_layer=norm)
    else:
        shortcut = nn.Sequential(
            nn.Conv2d(dim_in, dim_out, kernel_size=1, stride=2, bias=False), norm(dim_out)
        )
        first = Block(dim_in, dim_out, stride=2, downsample=shortcut, norm_layer=norm)
    return nn.Sequential(first, Block(dim_out, dim_out, norm_layer=norm))
