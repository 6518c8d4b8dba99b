"""A trained network, made to predict faster: the same chunks, or the same within bfloat16.

What is constant once training is over is computed once:
- a frozen batch-norm becomes weights and bias of the convolution before it;
- weights are kept in the type they are multiplied in;
- what only training uses, ACT's CVAE encoder, is left out;
- on demand, torch.compile fuses what is left, packs the weights as the processor's kernels read
  them, and folds constants (the decoder's first self-attention sees nothing but its queries).

In bfloat16 products and what lies between them are rounded, the ResNet's residual sums too; those
of the transformer, norms, and the layers between physical quantities and tokens (`Float32Linear`)
are as mixed precision leaves them in training, in float32 or a mixture.
"""

from __future__ import annotations

import copy
import logging
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from act_lightning.batch import DataSpec, Observation
from act_lightning.nets.act import ACT
from act_lightning.nets.backbone import folded
from act_lightning.nets.chunk_net import ChunkNet
from act_lightning.nets.transformer import Float32Linear

Precision = Literal["float32", "bfloat16"]

log = logging.getLogger(__name__)


class InferenceNet:
    """Predicts what a trained network does, faster.

    Against the network itself, in standard deviations of the actions: float32 is within 1e-5 on a
    CPU, bfloat16 within 3e-2 (8 significant bits; the full-size ACT with random weights is off by
    2e-2 at most, where actions reach 0.8). Not tested on GPUs.

    Linear layers and convolutions, `Float32Linear` apart, are taken to compute under autocast.
    """

    def __init__(
        self, net: ChunkNet, precision: Precision = "float32", *, compiled: bool = False
    ) -> None:
        """Copies the network, which stays as it is.

        Args:
            net: trained, on the device where it is to predict.
            precision: of the products. `bfloat16` is faster where `multiplies_bfloat16` says so.
            compiled: compile with torch.compile, for observations of batch size 1: takes a minute
                or two at full size. Every other batch size takes that long again at its first
                prediction, and so do seeds where the network samples its latent.

        Raises:
            RuntimeError: the network cannot be compiled here.
            ValueError: there is no such precision.
        """
        if precision not in ("float32", "bfloat16"):
            raise ValueError(f"precision={precision!r}; choose float32 or bfloat16")
        self.net = copy.deepcopy(net).eval().requires_grad_(False)
        self.device = self.net.normalizer.qpos_mean.device
        if isinstance(self.net, ACT):
            self.net.cvae_encoder = None
        fold_norms(self.net)
        self.autocast = precision == "bfloat16"
        if self.autocast:
            if not multiplies_bfloat16(self.device):
                log.warning("bfloat16 is emulated on this %s; float32 is faster", self.device.type)
            round_weights(self.net)
        self.net.to(memory_format=torch.channels_last)
        self._sample = self.net.sample
        if compiled:
            self._compile()

    @torch.inference_mode()
    def predict_chunk(self, observation: Observation, seeds: Tensor | None = None) -> Tensor:
        """Predicts (B, K, A) float32 actions in physical units; see `ChunkNet.sample`.

        Raises:
            ValueError: if the observation does not fit the network's `spec`.
        """
        self.net.check(observation)
        observation = laid_out(observation.to(self.device, non_blocking=True))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            chunk = self._sample(observation, seeds)
        return self.net.normalizer.unnormalize_actions(chunk.float())

    def _compile(self) -> None:
        if self.device.type == "cpu":
            self._sample = torch.compile(self.net.sample, dynamic=False, options={"freezing": True})
        else:
            self._sample = torch.compile(self.net.sample, dynamic=False, mode="reduce-overhead")
        observation = blank_observation(self.net.spec)
        try:
            for _ in range(3):  # CUDA graphs are recorded in the second
                self.predict_chunk(observation)
        except Exception as error:  # torch raises many types, with long texts
            reason = str(error).partition("\n")[0]
            raise RuntimeError(
                f"torch.compile failed ({type(error).__name__}: {reason}); it needs a C++ compiler "
                "and Python's headers (Debian, Ubuntu: apt install g++ python3-dev); all else does "
                "without"
            ) from error


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 in hardware."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


@torch.no_grad()
def fold_norms(net: nn.Module) -> None:
    """Makes every frozen batch-norm part of the convolution that is its elder sibling."""
    for parent in net.modules():
        for (before, conv), (name, norm) in pairwise(list(parent.named_children())):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, FrozenBatchNorm2d):
                setattr(parent, before, fold(conv, norm))
                setattr(parent, name, nn.Identity())


def fold(conv: nn.Conv2d, norm: FrozenBatchNorm2d) -> nn.Conv2d:
    """One convolution that does what a convolution without a bias and the norm behind it do."""
    weight, bias = folded(conv, norm)
    one = copy.deepcopy(conv)
    one.weight = nn.Parameter(weight, requires_grad=False)
    one.bias = nn.Parameter(bias, requires_grad=False)
    return one


def round_weights(net: nn.Module) -> None:
    """Keeps in bfloat16 the weights that autocast would round in every call."""
    for module in net.modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and not isinstance(module, Float32Linear):
            module.to(torch.bfloat16)


def laid_out(observation: Observation) -> Observation:
    """A copy as torch.compile has seen it before, which compiles anew for other strides.

    Pictures are channels-last, as convolutions read them.
    """
    images = observation.images
    if images is not None:
        last = images.permute(0, 1, 3, 4, 2).clone(memory_format=torch.contiguous_format)
        images = last.permute(0, 1, 4, 2, 3)
    return Observation(
        qpos=observation.qpos.clone(memory_format=torch.contiguous_format),
        images=images,
        env_state=None
        if observation.env_state is None
        else observation.env_state.clone(memory_format=torch.contiguous_format),
    )


def blank_observation(spec: DataSpec) -> Observation:
    """A batch of one of zeros."""
    shape = (1, len(spec.cameras), 3, *spec.image_size)
    return Observation(
        qpos=torch.zeros(1, spec.dim_qpos),
        images=torch.zeros(shape, dtype=torch.uint8) if spec.cameras else None,
        env_state=torch.zeros(1, spec.dim_env_state) if spec.dim_env_state else None,
    )
