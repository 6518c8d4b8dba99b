"""Rollouts are the same on any number of ranks, and no rank waits for one that cannot play.

Real processes run Lightning's fit over gloo (tests/rank_run.py), as a user would start them.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import rank_run
import torch

from act_lightning.nets.act import ACT
from act_lightning.sim import ranks
from act_lightning.sim.ranks import gather, play_share, share, together
from act_lightning.sim.results import EpisodeResult
from act_lightning.sim.rollout import RolloutError

SEEDS = [30, 10, 20, 40, 50]
WAYS = ("chunked", "ensembled")

# ---- without a second process -------------------------------------------------------------------


def make_result(execution, seed, **fields):
    played = {"success": True, "max_reward": 1.0, "total_reward": 1.0, "steps": 9}
    return EpisodeResult(execution=execution, seed=seed, **(played | fields))


def make_results(seeds):
    """What a rollout returns: by way of executing, then by seed."""
    return [make_result(execution, seed) for execution in WAYS for seed in sorted(seeds)]


@pytest.fixture
def as_rank(monkeypatch):
    """Makes this process one rank among others, of which it is known what they exchange."""

    def become(rank, others):
        monkeypatch.setattr(ranks, "rank", lambda: rank)
        monkeypatch.setattr(ranks, "num_ranks", lambda: len(others) + 1)
        monkeypatch.setattr(ranks, "exchange", lambda mine: [*others[:rank], mine, *others[rank:]])

    return become


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 7])
def test_every_world_is_played_once(as_rank, num_ranks):
    shares = []
    for rank in range(num_ranks):
        as_rank(rank, [None] * (num_ranks - 1))
        shares.append(share(SEEDS))
    assert sorted(sum(shares, [])) == sorted(SEEDS)
    lengths = [len(mine) for mine in shares]
    assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 7])
def test_gathered_results_are_in_the_order_of_one_process(as_rank, num_ranks):
    everyones = [make_results(SEEDS[rank::num_ranks]) for rank in range(num_ranks)]
    for rank in range(num_ranks):
        as_rank(rank, everyones[:rank] + everyones[rank + 1 :])
        assert gather(everyones[rank]) == make_results(SEEDS)


def test_gathered_results_have_lost_their_frames_only():
    commands = np.ones((9, 2), np.float32)
    result = make_result("chunked", 1, frames=np.zeros((3, 3, 4, 5), np.uint8), commands=commands)
    (gathered,) = gather([result])
    assert gathered.frames is None
    assert result.frames is not None
    assert gathered.commands is commands


def no_simulator(seeds):
    raise OSError("no simulator")


def test_alone_nothing_is_hidden():
    assert play_share(make_results, SEEDS, WAYS) == make_results(SEEDS)
    with pytest.raises(OSError, match="no simulator"):
        play_share(no_simulator, SEEDS, WAYS)
    with pytest.raises(KeyError), together():
        raise KeyError


def test_a_rank_that_cannot_play_reports_its_worlds_as_failed(as_rank):
    as_rank(1, [([30, 20, 50], None)])
    with pytest.warns(UserWarning, match="no simulator; its episodes in worlds 10, 40 count"):
        results = play_share(no_simulator, SEEDS, WAYS)
    assert [(r.execution, r.seed) for r in results] == [(w, s) for w in WAYS for s in (10, 40)]
    for result in results:
        assert not result.success
        assert result.error == "rank 1: OSError: no simulator"


def test_if_nobody_can_play_all_raise(as_rank):
    others = [([10, 40], "rank 1: OSError: no simulator"), ([], None)]
    as_rank(0, others)
    with pytest.raises(OSError, match="no simulator"):
        play_share(no_simulator, SEEDS, WAYS)
    as_rank(2, [([30, 20, 50], "rank 0: OSError: no simulator"), others[0]])
    with pytest.raises(RolloutError, match="rank 0: OSError: no simulator"):
        play_share(make_results, SEEDS[:2], WAYS)


def test_what_is_raised_on_one_rank_is_raised_on_all(as_rank):
    as_rank(0, [None, "rank 2: ValueError: no OpenGL"])
    with pytest.raises(RolloutError, match="rank 2: ValueError: no OpenGL"), together():
        pass
    with pytest.raises(KeyError, match="mine"), together():
        raise KeyError("mine")
    as_rank(0, [None, None])
    with together():
        pass


# ---- real processes -----------------------------------------------------------------------------

TIMES = ("rollout/seconds", "rollout/share")


def run(folder, expected_code=0, **settings):
    """Starts rank 0, which starts the others; returns what it printed."""
    script = Path(rank_run.__file__)
    paths = [str(script.parents[1]), *sys.path]
    process = subprocess.run(
        [sys.executable, script, folder, json.dumps(settings)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=250,
        start_new_session=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
    )
    assert process.returncode == expected_code, process.stdout
    return process.stdout


def read(folder, case):
    """Episodes of all ranks, and what was logged of them."""
    report = json.loads((folder / f"{case}.json").read_text())
    assert all(report["logged"].pop(name) > 0 for name in TIMES)
    return report


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    """Folder of runs in this process, and whether the policy then computed in bfloat16."""
    folder = tmp_path_factory.mktemp("one_rank")
    precisions, sample = {}, ACT.sample
    with pytest.MonkeyPatch.context() as patch:

        def look(net, *args):
            precisions.setdefault(net.spec.task, set()).add(torch.is_autocast_enabled("cpu"))
            return sample(net, *args)

        patch.setattr(ACT, "sample", look)
        for case in ("point", "aloha"):
            rank_run.play(case, folder, {"ranks": 1})
    return folder, precisions


def test_the_policy_computes_in_the_precision_of_training(one_rank):
    assert one_rank[1] == {"rank_world:RankWorld-v0": {False}, "insertion": {True}}


def test_runs_differ_enough_to_compare(one_rank):
    episodes = read(one_rank[0], "point")["episodes"]
    assert {episode["success"] for episode in episodes} == {False, True}
    assert len({episode["commands"] for episode in episodes}) == len(episodes) == 10
    episodes = read(one_rank[0], "aloha")["episodes"]
    assert len({episode["commands"] for episode in episodes}) == len(episodes) == 4
    assert {(episode["steps"], episode["error"]) for episode in episodes} == {(100, None)}


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_any_number_of_ranks_plays_the_episodes_of_one(one_rank, tmp_path, num_ranks):
    """Of three ranks one has no world of the second case."""
    output = run(tmp_path, ranks=num_ranks, cases=["point", "aloha"])
    assert output.count("rollouts took") == output.count("step 2: success") == 2
    for case in ("point", "aloha"):
        assert read(tmp_path, case) == read(one_rank[0], case)


def with_failures(episodes, worlds):
    """Episodes as they are if those in `worlds` are lost; their actions and errors apart."""
    lost = {"success": False, "max_reward": 0.0, "total_reward": 0.0, "steps": 0}
    return [
        {name: value for name, value in episode.items() if name not in ("error", "commands")}
        | (lost if episode["seed"] in worlds else {})
        for episode in episodes
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trouble", "lost", "reason"),
    [
        ("crash", [rank_run.TROUBLED_WORLD], "died"),
        ("hang", [rank_run.TROUBLED_WORLD], "no answer for 15 s"),
        ("start", [rank_run.TROUBLED_WORLD, rank_run.TROUBLED_WORLD + 2], "rank 1: RolloutError"),
    ],
)
def test_trouble_on_one_rank_costs_its_episodes_and_nothing_else(
    one_rank, tmp_path, trouble, lost, reason
):
    output = run(tmp_path, ranks=2, trouble=trouble, timeout_s=15)
    episodes = read(tmp_path, "point")["episodes"]
    healthy = read(one_rank[0], "point")["episodes"]
    assert with_failures(episodes, ()) == with_failures(healthy, lost)
    for episode in episodes:
        assert (episode["error"] is not None) == (episode["seed"] in lost)
        if episode["error"]:
            assert reason in episode["error"]
    assert reason in output
    assert all(str(world) in output for world in lost)


@pytest.mark.slow
def test_if_no_rank_can_start_its_simulators_the_run_ends(tmp_path):
    output = run(tmp_path, expected_code=1, ranks=2, trouble="start everywhere")
    assert "no such world anywhere" in output


@pytest.mark.slow
@pytest.mark.parametrize("how", [{"rank_zero_only": True}, {"sync_dist": False}])
def test_ranks_may_validate_unequally_and_log_alone(one_rank, tmp_path, how):
    run(tmp_path, ranks=2, val_batches=[3, 1], log=how)
    assert read(tmp_path, "point") == read(one_rank[0], "point")


@pytest.mark.slow
def test_what_only_one_rank_gathers_ends_in_time(tmp_path):
    """A mistake of a callback: the mean over ranks of what one of them has."""
    with pytest.raises(AssertionError, match="Timed out waiting 3000ms|Connection closed by peer"):
        run(tmp_path, ranks=2, log={"sync_dist": True}, timeout_min=0.05)
