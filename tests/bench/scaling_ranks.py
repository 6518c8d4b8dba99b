"""Processes of a bench that take training steps together, and say what each of them spent.

A `Group` is one world of `torch.distributed` over gloo, a thread a process. Its processes wait
until they are told to take steps, so that several groups can take turns in one run.
"""

import queue
import tempfile
import threading
import time
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from act_lightning.batch import Batch
from act_lightning.cli import ACTCLI
from act_lightning.data.datamodule import ACTDataModule
from act_lightning.launch import LaunchConfig, Ranks
from act_lightning.module import ACTModule

ROOT = Path(__file__).parents[2]
ASLEEP_S = 0.24
"""A step of processes that sleep: a third forward, the rest backward."""


class Link(NamedTuple):
    """A network to be imitated."""

    hop_s: float
    bytes_s: float


@dataclass(kw_only=True)
class Spent:
    """Seconds from the start of a step until ..."""

    forward_s: float
    gradients_s: float
    """The last gradient is computed."""
    backward_s: float
    """`backward` returns: all gradients have crossed."""
    step_s: float
    """The optimizer is done."""
    cpu_s: float
    """Of the processor, all threads: what others that use it change little."""
    buckets: list[tuple[float, int]]
    """Share of the backward pass after which each was sent, and its bytes."""
    hidden_share: float
    """Of the time in which any bucket was under way, before the last gradient."""


@dataclass(kw_only=True)
class Built:
    """An experiment, as `fit` would build it, without a trainer."""

    config: Any
    config_init: Any
    module: ACTModule
    data: ACTDataModule
    batch: Batch

    def make_optimizer(self) -> torch.optim.Optimizer:
        """AdamW as in training."""
        return torch.optim.AdamW(self.module.net.parameters(), lr=1e-5, fused=True)


class _CLI(ACTCLI):
    def instantiate_trainer(self, **kwargs: Any) -> Any:
        return None


def build(experiment: str, store: Path, batch_size: int | None = None) -> Built:
    """Builds network and data of an experiment, and reads one batch.

    Weights of ImageNet are neither needed nor loaded. With them come frozen batch norms, whose
    place random weights cannot fill, so group norms take it.
    """
    args = [f"--config={ROOT}/experiments/{name}.yaml" for name in ("base", experiment)]
    args.append(f"--demonstrations.path={store}")
    if experiment.startswith("paper/"):
        args += ["--model.net.backbone.weights=none", "--model.net.backbone.norm=group"]
    if batch_size is not None:
        args.append(f"--data.batch_size={batch_size}")
    cli = _CLI(args, run=False)
    cli.datamodule.setup("fit")
    stream = cli.datamodule.train_dataloader()
    batch = next(iter(stream))
    stream.close()
    return Built(
        config=cli.config,
        config_init=cli.config_init,
        module=cli.model,
        data=cli.datamodule,
        batch=batch,
    )


class _Training(nn.Module):
    """The loss of a batch, as a module that DistributedDataParallel can wrap."""

    def __init__(self, built: Built) -> None:
        super().__init__()
        self.net, self._batch = built.module.net, built.batch

    def forward(self) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.net.losses(self._batch, 0)["loss"]


class _Sleep(torch.autograd.Function):
    """Sleeps forward and backward, as long as was said; the parameter's gradient is 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, parameter: Tensor, seconds: float) -> Tensor:
        ctx.shape, ctx.seconds = parameter.shape, seconds
        time.sleep(seconds)
        return x + 1

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        time.sleep(2 * ctx.seconds)
        return gradient, torch.zeros(ctx.shape), None


class _Asleep(nn.Module):
    """Parameters of the same sizes, each with the same part of the step."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        sizes = [p.shape for p in net.parameters() if p.requires_grad]
        self.weights = nn.ParameterList(nn.Parameter(torch.zeros(size)) for size in sizes)
        self._seconds = ASLEEP_S / 3 / len(sizes)

    def forward(self) -> Tensor:
        x = torch.zeros((), requires_grad=True)
        for weight in self.weights:
            x = _Sleep.apply(x, weight, self._seconds)
        return x


class _Wire:
    """The hook that exchanges a bucket: as DistributedDataParallel would, or as slowly as a link.

    A bucket of a link arrives when its real exchange is done, and not before the bucket sent ahead
    of it plus what the ring takes. A thread waits for it, so the backward pass goes on.
    """

    def __init__(self) -> None:
        self.link: Link | None = None
        self.sent: list[tuple[float, int]] = []
        self.arrived: list[float] = []
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
        threading.Thread(target=self._deliver, daemon=True).start()

    def __call__(self, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        sent = time.perf_counter()
        tensor = bucket.buffer()
        self.sent.append((sent, tensor.nbytes))
        ranks = dist.get_world_size()
        work = dist.all_reduce(tensor.div_(ranks), async_op=True)
        assert work is not None
        done: torch.futures.Future[Tensor] = torch.futures.Future()
        link = self.link
        seconds = 0.0
        if link is not None and ranks > 1:
            seconds = 2 * (ranks - 1) * (link.hop_s + tensor.nbytes / ranks / link.bytes_s)
        self._queue.put((sent, seconds, work, tensor, done))
        return done

    def _deliver(self) -> None:
        free = 0.0
        while True:
            sent, seconds, work, tensor, done = self._queue.get()
            work.wait()
            free = max(sent, free) + seconds
            time.sleep(max(0.0, free - time.perf_counter()))
            self.arrived.append(time.perf_counter())
            done.set_result(tensor)


class Group:
    """Processes that take steps together.

    Args:
        ranks: how many.
        experiment: whose network they train.
        store: demonstrations of it.
        batch_size: samples a process; None: the experiment's.
        asleep: sleep instead of computing.
        bucket_cap_mb: of DistributedDataParallel; None: its defaults, 1 for the first and 25.
    """

    def __init__(
        self,
        ranks: int,
        experiment: str,
        store: Path,
        *,
        batch_size: int | None = None,
        asleep: bool = False,
        bucket_cap_mb: int | None = None,
    ) -> None:
        self.ranks = ranks
        context = get_context("forkserver")
        context.set_forkserver_preload(["act_lightning.cli", "act_lightning.launch"])
        self._folder = tempfile.TemporaryDirectory()
        meeting = Path(self._folder.name, "meeting")
        self._connections: list[Connection] = []
        self._processes = []
        for rank in range(ranks):
            ours, theirs = context.Pipe()
            what = (experiment, store, batch_size, asleep, bucket_cap_mb)
            process = context.Process(
                target=_serve, args=(theirs, rank, ranks, meeting, *what), daemon=True
            )
            process.start()
            theirs.close()
            self._connections.append(ours)
            self._processes.append(process)

    def run(self, steps: int, link: Link | None = None) -> list[list[Spent]]:
        """Takes steps, and returns what each process spent on each."""
        self.start(steps, link)
        return self.finish()

    def start(self, steps: int, link: Link | None = None) -> None:
        """Lets all take steps, without waiting for them."""
        for connection in self._connections:
            connection.send((steps, link))

    def finish(self) -> list[list[Spent]]:
        """Waits for the steps of `start`."""
        return [connection.recv() for connection in self._connections]

    def close(self) -> None:
        """Ends the processes."""
        for connection in self._connections:
            connection.send(None)
        for process in self._processes:
            process.join()
        self._folder.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()


def _serve(
    connection: Connection,
    rank: int,
    ranks: int,
    meeting: Path,
    experiment: str,
    store: Path,
    batch_size: int | None,
    asleep: bool,
    bucket_cap_mb: int | None,
) -> None:
    torch.set_num_threads(1)
    built = build(experiment, store, batch_size)
    dist.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=ranks)
    training = _Asleep(built.module.net) if asleep else _Training(built)
    ddp = DistributedDataParallel(
        training,
        **Ranks(LaunchConfig())._ddp_kwargs,
        bucket_cap_mb=bucket_cap_mb,
    )
    wire = _Wire()
    ddp.register_comm_hook(wire, _Wire.__call__)
    optimizer = None if asleep else built.make_optimizer()
    last_gradient = [0.0]
    for parameter in training.parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda _: last_gradient.__setitem__(0, time.perf_counter())
        )
    while (told := connection.recv()) is not None:
        steps, wire.link = told
        connection.send([_step(ddp, wire, optimizer, last_gradient) for _ in range(steps)])
    dist.barrier()
    dist.destroy_process_group()


def _step(
    ddp: DistributedDataParallel,
    wire: _Wire,
    optimizer: torch.optim.Optimizer | None,
    last_gradient: list[float],
) -> Spent:
    wire.sent, wire.arrived = [], []
    start, cpu = time.perf_counter(), time.process_time()
    loss = ddp()
    forward = time.perf_counter()
    loss.backward()
    backward = time.perf_counter()
    if optimizer is not None:
        nn.utils.clip_grad_norm_(ddp.parameters(), 1.0)
        optimizer.step()
    ddp.zero_grad(set_to_none=True)
    end = time.perf_counter()
    gradients = last_gradient[0]
    return Spent(
        forward_s=forward - start,
        gradients_s=gradients - start,
        backward_s=backward - start,
        step_s=end - start,
        cpu_s=time.process_time() - cpu,
        buckets=[((t - forward) / (gradients - forward), size) for t, size in wire.sent],
        hidden_share=_hidden_share([t for t, _ in wire.sent], wire.arrived, gradients),
    )


def _hidden_share(sent: list[float], arrived: list[float], gradients: float) -> float:
    """Share of the time in which a bucket was under way that lies before `gradients`."""
    busy = [(max(s, a0), a) for s, (a0, a) in zip(sent, pairwise([0.0, *arrived]), strict=True)]
    total = sum(end - start for start, end in busy)
    hidden = sum(max(0.0, min(end, gradients) - start) for start, end in busy)
    return hidden / total if total else 1.0
