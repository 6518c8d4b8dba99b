"""The verb `compare`, end to end on made-up evaluations."""

import json
import re
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from act_lightning.execution import ExecutionConfig
from act_lightning.main import main
from act_lightning.sim.config import EnvConfig
from act_lightning.sim.results import wilson_interval
from act_lightning.study.comparison import compare_groups, compare_runs, conclusions
from act_lightning.study.graded import results_path
from act_lightning.study.statistics import hierarchical_bootstrap, holm, mcnemar_exact

ROOT = Path(__file__).parent.parent
EXECUTIONS = {
    "chunked": asdict(ExecutionConfig()),
    "ensembled": asdict(ExecutionConfig(ensemble_decay=0.01)),
}


def outcomes(rate, seed=0, worlds=200):
    return np.random.default_rng(seed).random(worlds) < rate


def write_run(
    folder, chunked, ensembled=None, *, split="standard", first_seed=1_000_000, **changes
):
    """An evaluation as `evaluate` writes it; without `config` if that is given as None."""
    played = {"chunked": chunked} | ({} if ensembled is None else {"ensembled": ensembled})
    worlds = [
        {"seed": first_seed + i}
        | {
            name: {"success": bool(values[i]), "max_reward": 4.0, "steps": 9}
            for name, values in played.items()
        }
        for i in range(len(chunked))
    ]
    report = {
        "task": "insertion",
        "split": split,
        "checkpoint": "best",
        "checkpoint_sha256": str(folder),
        "step": 100,
        "execution": {name: {"episodes": len(chunked)} for name in played},
        "worlds": worlds,
        "config": {"env": asdict(EnvConfig()), "executions": EXECUTIONS},
        "versions": {"torch": "2", "mujoco": "3"},
    } | changes
    if report["config"] is None:
        del report["config"]
    if split == "standard" and changes.get("config", 0) is None:
        del report["split"]
    folder.mkdir(parents=True)
    results_path(folder, split).write_text(json.dumps(report))
    return folder


def settings(**changes):
    return {"env": asdict(EnvConfig(**changes)), "executions": EXECUTIONS}


def printed(capsys, *args):
    """What the verb prints, with one space where there are several."""
    assert main(["compare", *map(str, args)]) == 0
    return re.sub(r"[ \n]+", " ", capsys.readouterr().out)


def refused(capsys, *args):
    assert main(["compare", *map(str, args)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


def test_two_runs(tmp_path, capsys):
    worse, better = outcomes(0.6, 1), outcomes(0.9, 2)
    runs = [write_run(tmp_path / "worse", worse), write_run(tmp_path / "better", better)]
    text = printed(capsys, *runs)
    test = mcnemar_exact(better, worse)
    low, high = test.interval
    assert (
        f"chunked: B is better than A by {100 * test.difference:.1f} points "
        f"[{100 * low:.1f}, {100 * high:.1f}]; p < 0.001."
    ) in text
    low, high = wilson_interval(int(worse.sum()), 200)
    assert f"{worse.mean():.1%} [{100 * low:.1f}, {100 * high:.1f}] {worse.sum()}/200" in text
    assert f" {test.only_second} {test.only_first} {test.p_value:.2g} " in text


def test_each_way_of_executing_is_compared_and_p_values_are_adjusted(tmp_path, capsys):
    alike = outcomes(0.9, 1)
    few = alike.copy()
    few[np.flatnonzero(alike)[:7]] = False  # p = 0.016 alone, 0.094 among six comparisons
    runs = [
        write_run(tmp_path / name, chunked, alike)
        for name, chunked in {"a": alike, "b": few, "c": alike}.items()
    ]
    comparison = compare_runs(runs)
    assert [(p.first, p.second, p.execution) for p in comparison.pairs] == [
        (first, second, name)
        for name in ("chunked", "ensembled")
        for first, second in ("AB", "AC", "BC")
    ]
    pair = comparison.pairs[0]
    assert pair.test.p_value == pytest.approx(2 / 2**7)
    assert pair.p_holm == pytest.approx(6 * 2 / 2**7)
    assert conclusions(comparison)[0].startswith("chunked: no difference between A and B was shown")
    # Of six p-values the smallest has to be below 0.05 / 6, which eight worlds to one side give.
    assert comparison.pairs[1].least_difference == pytest.approx(8 / 200)
    alone = compare_runs(runs[:2], execution="chunked")
    assert [pair.p_holm for pair in alone.pairs] == [pair.test.p_value]
    assert conclusions(alone)[0].startswith("chunked: A is better than B by 3.5 points")
    assert "adjusted for 6 comparisons" in printed(capsys, *runs)


def test_no_difference_says_what_could_not_have_been_seen(tmp_path, capsys):
    alike = outcomes(0.9)
    runs = [write_run(tmp_path / "a", alike), write_run(tmp_path / "b", alike)]
    assert (
        "no difference between A and B was shown in 200 worlds: +0.0 points [-1.9, +1.9]; p = 1. "
        "Differences below about 3.0 points could not have been shown."
    ) in printed(capsys, *runs)


def test_ways_of_executing_of_one_run(tmp_path, capsys):
    run = write_run(tmp_path / "a", outcomes(0.6, 1), outcomes(0.9, 2))
    text = printed(capsys, run)
    assert re.search(
        r"ensembled is better than chunked by \d\d\.\d points \[.*\]; p < 0\.001\.", text
    )
    assert "chunked - ensembled -" in text


def test_one_run_with_one_way_of_executing_is_refused(tmp_path, capsys):
    run = write_run(tmp_path / "a", outcomes(0.5))
    assert "name another run" in refused(capsys, run)


def test_worlds_are_matched_by_seed_not_by_place(tmp_path):
    first = write_run(tmp_path / "a", outcomes(0.5, 1))
    second = write_run(tmp_path / "b", outcomes(0.5, 2))
    before = compare_runs([first, second]).pairs
    path = results_path(second)
    report = json.loads(path.read_text())
    report["worlds"].reverse()
    path.write_text(json.dumps(report))
    assert compare_runs([first, second]).pairs == before


def test_groups_of_training_seeds(tmp_path, capsys):
    ours = [outcomes(rate, seed) for seed, rate in enumerate((0.9, 0.92, 0.88))]
    theirs = [outcomes(rate, seed) for seed, rate in enumerate((0.5, 0.55, 0.6, 0.52), start=10)]
    first = [write_run(tmp_path / f"a{i}", values) for i, values in enumerate(ours)]
    second = [write_run(tmp_path / f"b{i}", values) for i, values in enumerate(theirs)]
    expected = hierarchical_bootstrap(ours, theirs)
    groups = {group.name: group for group in compare_groups(first, second).groups}
    assert groups["A - B"].result == expected
    assert groups["A"].result == hierarchical_bootstrap(ours)
    assert groups["B"].result == hierarchical_bootstrap(theirs)
    low, high = expected.interval
    text = printed(capsys, *first, "--against", *second)
    assert (
        f"chunked: A is better than B by {100 * expected.mean:.1f} points "
        f"[{100 * low:.1f}, {100 * high:.1f}], over 3 and 4 training seeds in 200 worlds; "
        "p < 0.001."
    ) in text
    swapped = printed(capsys, *second, "--against", *first)
    assert "chunked: B is better than A" in swapped


def test_groups_are_adjusted_for_the_ways_of_executing(tmp_path, capsys):
    # Of these, chunked alone has a p-value below 0.05, and above half of that.
    rates = {"A": (0.9, 0.85, 0.95), "B": (0.7, 0.6, 0.78)}
    folders = {name: [tmp_path / f"{name}{i}" for i in range(3)] for name in rates}
    for name, seed in (("A", 0), ("B", 10)):
        for i, (folder, rate) in enumerate(zip(folders[name], rates[name], strict=True)):
            write_run(folder, outcomes(rate, seed + i), outcomes(0.5, 20 + seed + i))
    comparison = compare_groups(folders["A"], folders["B"])
    chunked, ensembled = (group for group in comparison.groups if len(group.runs) == 2)
    p_values = [chunked.result.p_value, ensembled.result.p_value]
    assert 0.025 < p_values[0] < 0.05
    assert [chunked.p_holm, ensembled.p_holm] == holm(p_values)
    sentence = conclusions(comparison)[0]
    assert sentence.startswith("chunked: no difference between A and B was shown")
    assert sentence.endswith(f"p = {chunked.p_holm:.2g} (adjusted for 2 comparisons).")
    text = printed(capsys, *folders["A"], "--against", *folders["B"])
    assert f" {chunked.result.p_value:.2g} {chunked.p_holm:.2g} " in text
    (alone,) = conclusions(compare_groups(folders["A"], folders["B"], execution="chunked"))
    assert alone.startswith("chunked: A is better than B")


def test_groups_that_overlap_show_no_difference(tmp_path):
    runs = [
        write_run(tmp_path / f"{i}", outcomes(rate, i))
        for i, rate in enumerate((0.6, 0.9, 0.75, 0.65, 0.85, 0.8))
    ]
    (sentence,) = conclusions(compare_groups(runs[:3], runs[3:]))
    assert sentence.startswith("chunked: no difference between A and B was shown over 3 and 3")


def test_a_group_of_one_run_is_refused(tmp_path, capsys):
    runs = [write_run(tmp_path / f"{i}", outcomes(0.5, i)) for i in range(3)]
    assert "2 alone does not show" in refused(capsys, *runs[:2], "--against", runs[2])


def test_json(tmp_path, capsys):
    runs = [write_run(tmp_path / f"{i}", outcomes(0.5 + 0.1 * i, i)) for i in range(4)]
    assert main(["compare", *map(str, runs[:2]), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    expected = compare_runs(runs[:2])
    assert document["pairs"][0]["test"]["p_value"] == expected.pairs[0].test.p_value
    assert document["conclusions"] == conclusions(expected)
    assert [rate["folder"] for rate in document["rates"]] == [str(run) for run in runs[:2]]
    arguments = [*map(str, runs[:2]), "--against", *map(str, runs[2:]), "--json"]
    assert main(["compare", *arguments]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [group["name"] for group in document["groups"]] == ["A", "B", "A - B"]


def test_splits_have_files_of_their_own(tmp_path, capsys):
    standard = [write_run(tmp_path / name, outcomes(0.9)) for name in "ab"]
    assert "evaluate" in refused(capsys, *standard, "--split", "far")
    far = settings(object_beyond=0.05)
    runs = [
        write_run(tmp_path / f"{i}", outcomes(0.1 + 0.8 * i, i), split="far", config=far)
        for i in range(2)
    ]
    text = printed(capsys, *runs, "--split", "far")
    assert "insertion, far worlds" in text
    assert "B is better than A" in text


DIFFERENT = [
    ({"task": "transfer_cube"}, "played other tasks: insertion and transfer_cube"),
    ({"config": settings(max_episode_steps=400)}, "max_episode_steps 300 and 400"),
    ({"config": settings(object_grid=8)}, "object_grid 0 and 8"),
    (
        {"config": settings(object_ranges={"peg": ((0, 0.1), (0.4, 0.5))})},
        "object_ranges.peg not set and [[0, 0.1], [0.4, 0.5]]",
    ),
    (
        {
            "config": settings()
            | {"executions": {"chunked": asdict(ExecutionConfig(n_action_steps=5))}}
        },
        "other ways of executing by chunked: n_action_steps null and 5",
    ),
    ({"first_seed": 1_000_001}, "200 and 200 worlds, of which 2 are not common to both, the first"),
]


@pytest.mark.parametrize(("changes", "message"), DIFFERENT)
def test_runs_that_played_something_else_are_refused(tmp_path, capsys, changes, message):
    first = write_run(tmp_path / "a", outcomes(0.5))
    second = write_run(tmp_path / "b", outcomes(0.5), **changes)
    error = refused(capsys, first, second)
    assert message in error
    assert f"{first} and {second}" in error


def test_fewer_worlds_are_refused(tmp_path, capsys):
    runs = [write_run(tmp_path / str(n), outcomes(0.5, worlds=n)) for n in (100, 200)]
    error = refused(capsys, *runs)
    assert "100 and 200 worlds, of which 100 are not common" in error
    assert "the first of them 1000100" in error


def test_other_settings_of_a_way_that_is_not_looked_at_do_not_matter(tmp_path, capsys):
    other = EXECUTIONS | {"ensembled": asdict(ExecutionConfig(ensemble_decay=-0.1))}
    config = settings() | {"executions": other}
    first = write_run(tmp_path / "a", outcomes(0.5), outcomes(0.5))
    second = write_run(tmp_path / "b", outcomes(0.9), outcomes(0.9), config=config)
    assert "ensemble_decay 0.01 and -0.1" in refused(capsys, first, second)
    assert "B is better than A" in printed(capsys, first, second, "--execution", "chunked")


def test_policies_may_observe_differently(tmp_path, capsys):
    config = settings(cameras=("top",))
    config["env"]["observation_keys"] = {"qpos": "agent_pos"}
    first = write_run(tmp_path / "a", outcomes(0.5, 1))
    second = write_run(tmp_path / "b", outcomes(0.9, 2), config=config)
    text = printed(capsys, first, second)
    assert "B is better than A" in text
    assert (
        'A and B observe differently: cameras [] and ["top"]; observation_keys.qpos not set and '
        '"agent_pos".'
    ) in text


def test_settings_younger_than_a_file_count_as_their_defaults(tmp_path, capsys):
    old = settings()
    del old["env"]["perturbation"], old["env"]["object_grid"]
    first = write_run(tmp_path / "a", outcomes(0.5, 1), config=old)
    second = write_run(tmp_path / "b", outcomes(0.9, 2))
    assert "B is better than A" in printed(capsys, first, second)
    other = write_run(tmp_path / "c", outcomes(0.9, 2), config=settings(object_grid=8))
    assert "object_grid 0 and 8" in refused(capsys, first, other)


def test_files_without_settings_are_compared_by_their_worlds(tmp_path, capsys):
    old = write_run(tmp_path / "old", outcomes(0.5, 1), config=None)
    new = write_run(tmp_path / "new", outcomes(0.9, 2))
    text = printed(capsys, old, new)
    assert "B is better than A" in text
    assert "Note: A: evaluated before the settings" in text
    # The new ones are still held against each other.
    other = write_run(tmp_path / "other", outcomes(0.9, 2), config=settings(object_grid=8))
    assert "object_grid" in refused(capsys, old, new, other)


def test_remarks(tmp_path, capsys):
    first = write_run(tmp_path / "a", outcomes(0.5, 1))
    versions = {"torch": "2", "mujoco": "3.1"}
    second = write_run(tmp_path / "b", outcomes(0.5, 2), checkpoint="last", versions=versions)
    path = results_path(second)
    report = json.loads(path.read_text())
    report["worlds"][3]["chunked"] |= {"success": False, "error": "NaN"}
    path.write_text(json.dumps(report))
    same = write_run(tmp_path / "c", outcomes(0.5, 1), checkpoint_sha256=str(first))
    third = write_run(tmp_path / "d", outcomes(0.5, 2), versions=versions,
                      checkpoint_sha256=str(second))  # fmt: skip
    text = printed(capsys, first, second, same, third)
    assert "A and B were chosen differently: best and last." in text
    assert 'A and B, D were played by other versions: mujoco "3" and "3.1".' in text
    assert "B: 1 chunked episodes were stopped and count as failed." in text
    assert "A and C are the same checkpoint." in text
    assert "B and D are the same checkpoint." in text


def test_what_cannot_be_read_is_named(tmp_path, capsys):
    good = write_run(tmp_path / "good", outcomes(0.5))
    (tmp_path / "empty").mkdir()
    assert "run missing does not exist" in refused(capsys, good, "missing")
    assert "has no results.json" in refused(capsys, good, tmp_path / "empty")
    assert "named twice" in refused(capsys, good, tmp_path / "empty" / ".." / "good")
    assert "--execution fast" in refused(capsys, good, "--execution", "fast")
    for damage in ("{", "[]", '{"task": "insertion", "execution": {}, "worlds": []}'):
        results_path(tmp_path / "empty").write_text(damage)
        error = refused(capsys, good, tmp_path / "empty")
        assert "is not the result of an evaluation, or is damaged" in error
    with pytest.raises(SystemExit) as exit_:
        main(["compare"])
    assert exit_.value.code == 2


def test_no_way_of_executing_in_common(tmp_path, capsys):
    first = write_run(tmp_path / "a", outcomes(0.5))
    second = write_run(tmp_path / "b", outcomes(0.5), outcomes(0.5))
    path = results_path(second)
    report = json.loads(path.read_text())
    del report["execution"]["chunked"]
    path.write_text(json.dumps(report))
    assert "no way of executing in common" in refused(capsys, first, second)
