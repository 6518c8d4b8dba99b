"""What a batch that several ranks share needs to have one loss: that of the whole batch.

Ranks average gradients. That is the gradient of the whole batch only if every rank's loss counts
for as much as its part of the batch does; a mean over real actions, of which some ranks have fewer,
does not, and neither does a function of a mean over the batch. In a process of its own everything
here leaves things as they are. LeRobot and tonyzhaozh/act average the ranks' means.

To be called by every rank in every training step, and not in validation, where ranks may have
different numbers of batches.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.nn.functional import all_reduce


def weight_of_rank(is_pad: Tensor) -> Tensor | float:
    """What this rank's mean over real actions has to be multiplied with.

    Args:
        is_pad: (B, K) bool, True past the episode's end.

    Returns:
        Its number of real actions by the mean number of all ranks: (), float32.
    """
    if not _are_several():
        return 1.0
    mine = (~is_pad).sum(dtype=torch.float32)
    total = mine.clone()
    dist.all_reduce(total)
    return mine * dist.get_world_size() / total


def mean_over_ranks(value: Tensor) -> Tensor:
    """The mean of a tensor over the ranks, through which gradients flow to all of them."""
    if not _are_several():
        return value
    total: Tensor = all_reduce(value)  # type: ignore[no-untyped-call]
    return total / dist.get_world_size()


def _are_several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
