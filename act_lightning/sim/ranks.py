"""Shares rollouts out among the processes of a distributed run, and gathers what came of them.

Rank r of R plays every R-th world from the r-th on. An episode depends on its world, the policy and
the way of executing alone, so the number of ranks changes no result. Ranks meet in collective calls
only, in which those without a world take part too, and what goes wrong on one rank is told to the
others there: none is left waiting for a rank that has given up. In a process of its own, without
`torch.distributed`, everything here is as if there were nobody to meet.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeVar

import torch.distributed as dist

from act_lightning.sim.results import EpisodeResult
from act_lightning.sim.rollout import RolloutError

T = TypeVar("T")


class ElsewhereError(RolloutError):
    """Something went wrong on another rank, which says more about it."""


def share(seeds: Sequence[int]) -> list[int]:
    """Those of `seeds` that this rank is to play; with more ranks than worlds there may be none."""
    return list(seeds[rank() :: num_ranks()])


def gather(results: Sequence[EpisodeResult]) -> list[EpisodeResult]:
    """Results of all ranks in the order in which one process would return them, without frames.

    To be called by every rank, also with no results; every rank gets the same list.
    """
    everyones = exchange([replace(result, frames=None) for result in results])
    all_results = [result for results in everyones for result in results]
    executions = list(dict.fromkeys(result.execution for result in all_results))
    return sorted(all_results, key=lambda result: (executions.index(result.execution), result.seed))


def play_share(
    play: Callable[[list[int]], list[EpisodeResult]],
    seeds: Sequence[int],
    executions: Iterable[str],
) -> list[EpisodeResult]:
    """Plays this rank's share of the worlds; a rank that cannot reports its episodes as failed.

    To be called by every rank. The results of the others stand, and a training goes on: what
    befell one rank, such as a full memory, may be over by the next rollouts.

    Args:
        play: plays the worlds it is given, in each way of executing.
        seeds: worlds of all ranks.
        executions: names of the ways of executing.

    Returns:
        This rank's results. If `play` raised, each of its episodes counts as failed, with what was
        raised as `error`, and a warning names the worlds.

    Raises:
        Exception: what `play` raised, if it did on every rank that had worlds to play; so, always,
            in a process of its own.
    """
    mine = share(seeds)
    results: list[EpisodeResult] = []
    failure: Exception | None = None
    try:
        if mine:
            results = play(mine)
    except Exception as error:
        failure = error
    told = [message for worlds, message in exchange((mine, _describe(failure))) if worlds]
    if told and all(told):
        raise failure or ElsewhereError(told[0])
    if failure is None:
        return results
    message = _describe(failure) or ""
    warnings.warn(
        f"{message}; its episodes in worlds {', '.join(map(str, mine))} count as failed",
        stacklevel=2,
    )
    return [
        EpisodeResult.lost(execution, seed, message)
        for execution in executions
        for seed in sorted(mine)
    ]


@contextmanager
def together() -> Iterator[None]:
    """Raises on every rank what is raised on one of them in the block, which all have to enter."""
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    told = exchange(_describe(failure))
    if failure is not None:
        raise failure
    for message in filter(None, told):
        raise ElsewhereError(message)


def exchange(mine: T) -> list[T]:
    """What every rank gave, in the order of ranks; to be called by all of them."""
    if not _is_distributed():
        return [mine]
    everyones: list[T] = [mine] * num_ranks()
    dist.all_gather_object(everyones, mine)
    return everyones


def rank() -> int:
    """Number of this process among those of the run."""
    return dist.get_rank() if _is_distributed() else 0


def num_ranks() -> int:
    """Number of processes of the run."""
    return dist.get_world_size() if _is_distributed() else 1


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _describe(failure: Exception | None) -> str | None:
    return None if failure is None else f"rank {rank()}: {type(failure).__name__}: {failure}"
