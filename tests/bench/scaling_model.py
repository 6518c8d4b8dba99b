"""What a training step should cost on 1 to 64 GPUs: arithmetic alone, without measuring anything.

A step computes, and its gradients cross the network in buckets, each from the moment the backward
pass has filled it, one after the other. What is still under way when the backward pass ends is the
step's loss to the network. An all-reduce takes NCCL's own estimate for a ring (its
src/graph/tuning.cc): a base, a latency for each of the 2(N-1) hops, and 2(N-1)/N times the bytes by
the bandwidth, in the quicker of two protocols. Trees, which NCCL may choose instead, and NVLink
SHARP are left out, so latencies are upper bounds.

Not in it: ranks that are slower than others, other users of the network, and the launch of a run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

GPUS_PER_NODE = 8
GPU_FLOPS = 989e12
"""Dense bfloat16 multiply-adds of an H100 SXM, times two, a second (its data sheet)."""
NVLINK_BYTES_S = 360e9
"""Of a GPU, each way: 80% of the data sheet's 450 GB/s. The 80% is assumed."""
THREADS = 2
"""Threads of a rank that read batches (`data.prefetch`)."""


@dataclass(frozen=True, kw_only=True)
class Network:
    """What joins the nodes."""

    name: str
    node_bytes_s: float
    """What a node sends, through all of its cards."""
    hop_s: tuple[float, float]
    """Latency of a hop between nodes: protocol Simple, protocol LL."""


RDMA_HOP_S = (9.6e-6, 2.7e-6)
TCP_HOP_S = (40e-6, 40e-6)
"""8 bytes to a neighbour over sockets: 38 to 46 us (github.com/NVIDIA/nccl-tests/issues/82)."""
NETWORKS = (
    Network(name="InfiniBand 8 x 400 Gb/s", node_bytes_s=8 * 48e9, hop_s=RDMA_HOP_S),
    Network(name="InfiniBand 200 Gb/s", node_bytes_s=24e9, hop_s=RDMA_HOP_S),
    Network(name="RoCE 100 Gb/s", node_bytes_s=12e9, hop_s=RDMA_HOP_S),
    Network(name="Ethernet 25 Gb/s", node_bytes_s=0.9 * 25e9 / 8, hop_s=TCP_HOP_S),
    Network(name="Ethernet 10 Gb/s", node_bytes_s=0.9 * 10e9 / 8, hop_s=TCP_HOP_S),
)
"""24 GB/s a card of 200 Gb/s, 12 of 100, is NVIDIA's rule (nccl-tests/issues/119), 48 of 400 its
continuation; 90% of an Ethernet's line is assumed."""


@dataclass(frozen=True)
class Protocol:
    """One of NCCL's, for a ring over NVLink."""

    base_s: float
    """To start."""
    hop_s: float
    """Within the node."""
    share: float
    """Of the bandwidth."""


SIMPLE = Protocol(8.4e-6, 3.4e-6, 1.0)
LL = Protocol(3.6e-6, 0.47e-6, 0.25)


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """What has to be assumed of a machine."""

    host_s: float
    """The host's time for one operator of a step, which it launches one by one."""
    mfu: float = 0.1
    """Share of `GPU_FLOPS` that the step's operators reach where the GPU is the slower one."""
    cores: int = 16
    """CPU cores a GPU."""
    store_bytes_s: float = 1e9
    """What the shared disk or object store gives to all nodes together."""
    disk_bytes_s: float = 1e9
    """At which a checkpoint is written."""


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What an experiment costs, as measured by `scaling.py costs`."""

    name: str
    batch_size: int
    parameters: int
    flops: float
    """Of a training step, a sample."""
    step_operators: int
    """Kernels of a training step: forward, backward, optimizer."""
    query_operators: int
    """Of asking the policy for a chunk."""
    evaluate_operators: int
    """Of a batch of validation."""
    backward_share: float
    """Of the time of a step."""
    buckets: tuple[tuple[float, int], ...]
    """In order: share of the backward pass after which it is full, bytes in float32."""
    small_buckets: tuple[tuple[float, int], ...]
    """The same with `bucket_cap_mb=1`."""
    stored_bytes: float
    """Of a frame with all its cameras, compressed."""
    delivered_bytes: int
    """Of a sample, as it goes to the GPU."""
    read_s: float
    """Reading and decoding a sample in one thread."""
    train_frames: int
    val_frames: int
    interval_steps: int
    """Steps between validations."""
    episodes: int
    """Of a rollout, in each way of executing."""
    episode_steps: int
    chunk_size: int
    advance_s: float
    """Simulating a control step on one core."""
    observe_s: float
    """Drawing what the policy sees, on one core."""
    checkpoint_bytes: int

    @property
    def gradient_bytes(self) -> int:
        """Of a step, in float32."""
        return 4 * self.parameters


def ring_seconds(num_bytes: float, ranks: int, hop_s: float, bytes_s: float) -> float:
    """The alpha-beta model of a ring all-reduce of `num_bytes`."""
    return 2 * (ranks - 1) * (hop_s + num_bytes / ranks / bytes_s)


def all_reduce_seconds(num_bytes: float, ranks: int, network: Network) -> float:
    """An all-reduce over nodes of 8 GPUs each, in the quicker of NCCL's two protocols."""
    if ranks == 1:
        return 0.0
    nodes = math.ceil(ranks / GPUS_PER_NODE)
    bytes_s = NVLINK_BYTES_S if nodes == 1 else min(NVLINK_BYTES_S, network.node_bytes_s)
    between = 2 * (nodes - 1)
    within = 2 * (ranks - 1) - between
    far_simple, far_ll = network.hop_s
    simple = SIMPLE.base_s + within * SIMPLE.hop_s + between * far_simple
    if nodes > 1 and num_bytes >= 4096 * ranks:
        simple *= 1.9
    ll = LL.base_s + within * LL.hop_s * (1.8 if nodes > 1 else 1) + between * far_ll
    return min(
        latency + ring_seconds(num_bytes, ranks, 0, protocol.share * bytes_s)
        for protocol, latency in ((SIMPLE, simple), (LL, ll))
    )


def exposed_seconds(
    buckets: Sequence[tuple[float, int]], backward_s: float, reduce_s: Callable[[float], float]
) -> float:
    """How long after the backward pass the last bucket arrives; they cross one after the other."""
    end = 0.0
    for ready, num_bytes in buckets:
        end = max(end, ready * backward_s) + reduce_s(num_bytes)
    return max(0.0, end - backward_s)


def compute_seconds(costs: Costs, rank_batch: float, machine: Assumptions) -> float:
    """A step without network: what the host needs to launch it, or the GPU to carry it out."""
    launch = costs.step_operators * machine.host_s
    return max(launch, rank_batch * costs.flops / (machine.mfu * GPU_FLOPS))


def step_seconds(
    costs: Costs,
    ranks: int,
    rank_batch: float,
    network: Network,
    machine: Assumptions,
    *,
    accumulate: int = 1,
    compression: int = 1,
) -> float:
    """A training step of `accumulate` batches on `ranks` GPUs.

    A scalar crosses before each backward pass: how many actions of the batch are real
    (nets/across_ranks.py). Gradients cross in the last, with `compression` 2 in bfloat16. Reading
    overlaps with all of it.
    """
    compute = compute_seconds(costs, rank_batch, machine)
    exposed = exposed_seconds(
        costs.buckets,
        costs.backward_share * compute,
        lambda size: all_reduce_seconds(size / compression, ranks, network),
    )
    step = accumulate * (compute + all_reduce_seconds(4, ranks, network)) + exposed
    return max(step, accumulate * rank_batch * costs.read_s / THREADS)


def weak_efficiency(
    costs: Costs,
    ranks: int,
    rank_batch: float,
    network: Network,
    machine: Assumptions,
    accumulate: int = 1,
) -> float:
    """Samples a second and GPU by those of one GPU, the batch of a rank fixed."""
    alone, step = (
        step_seconds(costs, n, rank_batch, network, machine, accumulate=accumulate)
        for n in (1, ranks)
    )
    return alone / step


def strong_efficiency(
    costs: Costs, ranks: int, batch: int, network: Network, machine: Assumptions
) -> float:
    """The same, the batch of all ranks together fixed; 0 with more ranks than samples."""
    if batch % ranks:
        return 0.0
    alone = step_seconds(costs, 1, batch, network, machine)
    return alone / ranks / step_seconds(costs, ranks, batch // ranks, network, machine)


def rollout_seconds(costs: Costs, ranks: int, machine: Assumptions) -> float:
    """A rollout, chunked and ensembled, in which every episode lasts to its end.

    Each rank plays its share on its cores. The longest episode bounds it: an ensembled one, which
    draws and asks at every step, 32 episodes at a time on a GPU.
    """
    if costs.episodes == 0:
        return 0.0
    share = math.ceil(costs.episodes / ranks)
    steps = costs.episode_steps
    queries = math.ceil(steps / costs.chunk_size)
    work = share * (2 * steps * costs.advance_s + (steps + queries) * costs.observe_s)
    query_s = costs.query_operators * machine.host_s
    longest = steps * (costs.advance_s + costs.observe_s + math.ceil(share / 32) * query_s)
    return max(work / min(machine.cores, 2 * share), longest)


def validation_seconds(costs: Costs, ranks: int, rank_batch: int, machine: Assumptions) -> float:
    """The held-out frames, divided among the ranks."""
    batches = math.ceil(math.ceil(costs.val_frames / ranks) / rank_batch)
    forward = rank_batch * costs.flops / 3 / (machine.mfu * GPU_FLOPS)
    return batches * max(costs.evaluate_operators * machine.host_s, forward)


def checkpoint_seconds(costs: Costs, machine: Assumptions) -> float:
    """Rank 0 writes last.ckpt before and after a validation, and best.ckpt; the others wait."""
    return 3 * costs.checkpoint_bytes / machine.disk_bytes_s


def first_read_seconds(costs: Costs, ranks: int, machine: Assumptions) -> float:
    """All nodes fetch all frames once; from then on they are in memory or in the mirror."""
    nodes = math.ceil(ranks / GPUS_PER_NODE)
    return nodes * costs.train_frames * costs.stored_bytes / machine.store_bytes_s
