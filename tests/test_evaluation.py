"""Evaluations of a real, if untrained, run: what they write, in which worlds, and the pictures."""

import contextlib
import hashlib
import json
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import av
import pytest
from PIL import Image
from test_callbacks import DEBUG

from act_lightning.evaluation import read_executions
from act_lightning.execution import ExecutionConfig
from act_lightning.main import main
from act_lightning.policy import Policy
from act_lightning.sim.splits import SPLITS

RUN = "runs/debug/version_0"


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A folder with a run, trained for a few steps and not yet evaluated."""
    folder = tmp_path_factory.mktemp("evaluated")
    with contextlib.chdir(folder):
        short = [*DEBUG, "--env.max_episode_steps=30"]
        assert main(["record", *DEBUG, "--demonstrations.path=data/x.zarr"]) == 0
        arguments = ["--demonstrations.path=data/x.zarr", "--rollout.episodes=0"]
        assert main(["fit", *short, *arguments, "--rollout.final_episodes=0"]) == 0
    return folder


@pytest.fixture
def run(project, monkeypatch):
    monkeypatch.chdir(project)
    return project / RUN


def evaluate(*arguments):
    assert main(["evaluate", RUN, *arguments]) == 0


def test_results_say_what_was_played_and_how_it_went(run, capsys):
    evaluate("--episodes=3", "--no-media")
    results = json.loads((run / "results.json").read_text())
    assert results["split"] == "standard"
    assert results["config"]["env"]["max_episode_steps"] == 30
    assert results["config"]["executions"]["ensembled"]["ensemble_decay"] == 0.01
    assert (
        results["config_sha256"] == hashlib.sha256((run / "config.yaml").read_bytes()).hexdigest()
    )
    assert (
        results["checkpoint_sha256"] == Policy.from_checkpoint(run / "checkpoints/best.ckpt").sha256
    )
    for name in ("chunked", "ensembled"):
        summary = results["execution"][name]
        assert list(summary["stages"]) == ["touched", "lifted", "contact", "success"]
        assert summary["episodes"] == 3
        paths = [world[name]["smoothness"]["path_length"] for world in results["worlds"]]
        assert summary["smoothness"]["path_length"] == pytest.approx(sum(paths) / 3)
        assert min(paths) > 0
    assert not (run / "media").exists()
    assert "touched" in capsys.readouterr().out


def test_the_same_command_gives_the_same_worlds_and_outcomes(run):
    evaluate("--episodes=2", "--no-media")
    first = json.loads((run / "results.json").read_text())
    evaluate("--episodes=3", "--no-media")
    second = json.loads((run / "results.json").read_text())
    assert second["worlds"][:2] == first["worlds"]


@pytest.mark.slow
def test_ranks_grade_as_one_process_does(run):
    """A real fit with three ranks, of whose four worlds one rank plays two."""
    ranks = ["--trainer.devices=3", "--data.batch_size=9", "--experiment=ranks"]
    arguments = [*DEBUG, *ranks, "--demonstrations.path=data/x.zarr", "--env.max_episode_steps=30"]
    arguments.append("--data.val_fraction=0.5")
    subprocess.run(
        [sys.executable, "-m", "act_lightning", "fit", *arguments], check=True, timeout=250
    )
    path = run.parents[1] / "ranks" / "version_0" / "results.json"
    of_three = json.loads(path.read_text())
    assert main(["evaluate", str(path.parent), "--episodes=4", "--no-media"]) == 0
    assert json.loads(path.read_text()) == of_three
    assert len(of_three["worlds"]) == 4


@pytest.mark.parametrize("split", ["delay_2", "far"])
def test_a_split_is_graded_apart(run, split):
    evaluate("--episodes=2", "--no-media")
    standard = (run / "results.json").read_bytes()
    evaluate("--episodes=2", "--no-media", "--split", split)
    results = json.loads((run / f"results_{split}.json").read_text())
    assert results["split"] == split
    assert results["config"]["env"] != json.loads(standard)["config"]["env"]
    assert results["worlds"] != json.loads(standard)["worlds"]
    assert (run / "results.json").read_bytes() == standard


def test_executions_of_a_file(run, tmp_path):
    path = tmp_path / "ways.yaml"
    path.write_text("five: {n_action_steps: 5}\nnewest: {ensemble_decay: -0.1}\n")
    evaluate("--episodes=2", "--no-media", f"--executions={path}")
    results = json.loads((run / "results.json").read_text())
    assert list(results["execution"]) == ["five", "newest"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "names no way|does not hold"),
        ("{}", "names no way"),
        ("a/b: {}", "cannot be a name"),
        ("[1, 2]", "does not hold"),
        ("a: {decay: 1}", "decay"),
        ("a: {n_action_steps: 0}", "n_action_steps"),
        ("a: {", "does not hold"),
    ],
)
def test_a_file_without_executions_is_named(tmp_path, content, said):
    path = tmp_path / "ways.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=said) as raised:
        read_executions(path)
    assert str(path) in str(raised.value)


def test_the_shipped_executions_can_be_read():
    path = Path(__file__).parents[1] / "experiments" / "executions.yaml"
    executions = read_executions(path)
    assert executions["chunked"] == ExecutionConfig()
    assert len(executions) > 3


def test_pictures_of_a_grid(run):
    evaluate("--episodes=4", "--split=grid")
    media = run / "media"
    for name in ("chunked", "ensembled"):
        videos = list(media.glob(f"grid_{name}_failure_*.mp4"))
        assert len(videos) == 1
        with av.open(videos[0]) as video:
            frames = sum(1 for _ in video.decode(video=0))
        assert frames == 9  # of 30 steps: the first, every fourth, and the last
        for picture in (f"grid_{name}_heat_map.png", f"grid_{name}_failures.png"):
            with Image.open(BytesIO((media / picture).read_bytes())) as image:
                assert min(image.size) > 100
    assert len(list(media.glob("grid_commands_*.png"))) == 1


@pytest.mark.parametrize("arguments", [["--split=somewhere"], ["--episodes=0"]])
def test_bad_arguments(run, capsys, arguments):
    try:
        code = main(["evaluate", RUN, *arguments])
    except SystemExit as end:
        code = end.code
    assert code in (1, 2)
    assert arguments[0].split("=")[1] in capsys.readouterr().err
    assert set(SPLITS) >= {"far", "grid", "camera", "light", "delay_1", "delay_3", "noise"}
