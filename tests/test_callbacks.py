"""Rollouts while training, and runs as a user starts them: whole, resumed, interrupted."""

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from act_lightning.callbacks import RolloutCallback, selection_score
from act_lightning.main import main
from act_lightning.policy import Policy
from act_lightning.sim.config import EnvConfig
from act_lightning.sim.rollout import RolloutPool

ROOT = Path(__file__).parent.parent
DEBUG = [
    f"--config={ROOT / 'experiments' / 'base.yaml'}",
    f"--config={ROOT / 'experiments' / 'debug.yaml'}",
    "--env.cameras=[]",
    "--env.env_state=true",
    "--demonstrations.episodes=2",
    "--data.val_fraction=0.5",
    "--trainer.accelerator=cpu",
]


def summary(success, touched=1.0):
    return {"success_rate": success, "stages": {"touched": touched, "success": success}}


def test_the_best_checkpoint_has_most_success_then_stages_then_steps():
    def score(chunked, ensembled, touched=1.0, step=1000):
        summaries = {"a": summary(chunked, touched), "b": summary(ensembled, touched)}
        return selection_score(summaries, step)

    assert score(0.5, 0.6) > score(0.5, 0.5)
    assert score(0.5, 0.5, touched=0.0) > score(0.45, 0.5, touched=1.0)
    assert score(0.0, 0.0, touched=0.2) > score(0.0, 0.0, touched=0.1)
    assert score(1.0, 1.0, step=2000) > score(1.0, 1.0, step=1000)
    assert score(0.505, 0.5, step=10) > score(0.5, 0.5, step=10**9)


def test_rollouts_need_a_world_and_a_number_of_episodes():
    with pytest.raises(ValueError, match="give env"):
        RolloutCallback({})
    with pytest.raises(ValueError, match=r"rollout.episodes=-1"):
        RolloutCallback({}, EnvConfig(), episodes=-1)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A folder with recorded demonstrations and one finished run."""
    folder = tmp_path_factory.mktemp("project")
    with contextlib.chdir(folder):
        assert main(["record", *DEBUG]) == 0
        assert main(["fit", *DEBUG]) == 0
    return folder


@pytest.fixture
def inside(project, monkeypatch):
    monkeypatch.chdir(project)
    return project / "runs" / "debug" / "version_0"


def test_a_run_leaves_what_its_readers_rely_on(inside):
    for name in ("config.yaml", "results.json", "checkpoints/best.ckpt", "checkpoints/last.ckpt"):
        assert (inside / name).is_file(), name
    results = json.loads((inside / "results.json").read_text())
    assert (
        results["checkpoint_sha256"]
        == Policy.from_checkpoint(inside / "checkpoints" / "best.ckpt").sha256
    )
    for execution in ("chunked", "ensembled"):
        played = results["execution"][execution]
        assert played["episodes"] == 4
        worlds = [world[execution]["success"] for world in results["worlds"]]
        assert played["successes"] == sum(worlds)
        low, high = played["wilson_95"]
        assert low <= played["success_rate"] <= high
    assert [world["seed"] for world in results["worlds"]] == [1_000_000 + i for i in range(4)]


def test_what_is_logged(inside):
    events = EventAccumulator(str(inside)).Reload()
    scalars = set(events.Tags()["scalars"])
    assert {
        "train/loss",
        "train/l1",
        "train/kl",
        "train/kl_weight",
        "val/l1_prior",
        "val/l1_posterior",
        "val/l1_sampled",
        "val/active_units",
        "rollout/success_rate",
        "rollout/chunked/success_low",
        "rollout/ensembled/success_rate",
        "rollout/ensembled/lifted",
        "rollout/ensembled/mean_return",
        "rollout/share",
    } <= scalars
    assert "val/kl_per_dim" in events.Tags()["histograms"]
    assert [event.step for event in events.Scalars("rollout/success_rate")] == [10, 20]
    shares = [event.value for event in events.Scalars("rollout/share")]
    seconds = [event.value for event in events.Scalars("rollout/seconds")]
    assert 0 < min(shares) <= max(shares) < 1
    # The second share is of all the time until then, the first rollout included.
    assert seconds[0] / shares[0] + seconds[1] < sum(seconds) / shares[1]


def test_a_failure_is_seen_as_strip_animation_and_video(inside):
    """All of the same frames: one each ten steps, and the last."""
    events = EventAccumulator(str(inside), size_guidance={"images": 0}).Reload()
    for execution in ("chunked", "ensembled"):
        shown = {
            tag: [event.step for event in events.Images(tag)]
            for tag in events.Tags()["images"]
            if execution in tag
        }
        tag = f"rollout/{execution}/failure"
        assert shown == {tag: [10, 20], f"{tag}_film": [10, 20]}
        with Image.open(io.BytesIO(events.Images(f"{tag}_film")[-1].encoded_image_string)) as gif:
            assert (gif.format, gif.size) == ("GIF", (160, 120))
            num_frames = gif.n_frames
        name = inside / "media" / f"step_000020_{execution}_failure"
        with Image.open(name.with_suffix(".png")) as strip:
            assert strip.size == (10 * 160, 120)
        with av.open(name.with_suffix(".mp4")) as video:
            frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
        assert len(frames) >= num_frames > 10
        strip_ends = np.split(np.asarray(Image.open(name.with_suffix(".png"))), 10, axis=1)
        for frame, picture in ((frames[0], strip_ends[0]), (frames[-1], strip_ends[-1])):
            assert np.abs(frame.astype(float) - picture).mean() < 8  # what compression loses


def test_resume_goes_on_in_the_same_folder(inside, capsys):
    code = main(
        [
            "fit",
            f"--config={inside / 'config.yaml'}",
            "--run=version_0",
            f"--ckpt_path={inside / 'checkpoints' / 'last.ckpt'}",
            "--trainer.max_steps=30",
            "--rollout.final_episodes=0",
        ]
    )
    assert code == 0
    # Two rollouts were before.
    assert re.search(
        r"rollouts took [\d.]+% of [\d.]+ min of training: 3 of", capsys.readouterr().out
    )
    assert torch.load(inside / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 30
    assert [path.name for path in inside.parent.iterdir()] == ["version_0"]


def weights(experiment):
    path = Path("runs", experiment, "version_0", "checkpoints", "last.ckpt")
    checkpoint = torch.load(path, weights_only=True)
    return checkpoint["global_step"], checkpoint["state_dict"]


@pytest.mark.slow
def test_the_saved_configuration_repeats_the_run(inside):
    """Also after a resume, which must not leave its own checkpoint or folder in it."""
    assert main(["fit", *DEBUG, "--experiment=again", "--rollout.final_episodes=0"]) == 0
    config = Path("runs/again/version_0/config.yaml")
    last = config.parent / "checkpoints" / "last.ckpt"
    step, first = weights("again")
    resume = ["--run=version_0", f"--ckpt_path={last}", "--trainer.max_steps=20"]
    assert main(["fit", f"--config={config}", *resume]) == 0
    assert main(["fit", f"--config={config}", "--experiment=repeated"]) == 0
    repeated_step, repeated = weights("repeated")
    assert step == repeated_step == 20
    assert all(torch.equal(first[name], repeated[name]) for name in first)


def test_evaluate_grades_any_checkpoint(inside, capsys):
    assert main(["evaluate", str(inside), "--episodes=3", "--checkpoint=last", "--no-media"]) == 0
    assert "0/3" in capsys.readouterr().out
    results = json.loads((inside / "results.json").read_text())
    assert (results["checkpoint"], len(results["worlds"])) == ("last", 3)
    assert results["train_seconds"] > 0


def test_world_unlike_the_demonstrations_is_refused_before_training(inside, capsys):
    assert main(["fit", *DEBUG, "--env.cameras=[top]", "--data.prefetch=0"]) == 1
    assert "camera" in capsys.readouterr().err


def test_rollouts_without_validation_are_refused(inside, capsys):
    assert main(["fit", *DEBUG, "--data.val_fraction=0"]) == 1
    assert "data.val_fraction=0" in capsys.readouterr().err


def test_rollouts_play_the_averaged_weights_that_the_checkpoint_holds(inside, monkeypatch):
    played = []

    def play(pool, policy, *args, **kwargs):
        played.append(policy.net.chunk_decoder.queries.detach().clone())
        return original(pool, policy, *args, **kwargs)

    original = RolloutPool.rollout
    monkeypatch.setattr(RolloutPool, "rollout", play)
    ema = "[{class_path: lightning.pytorch.callbacks.EMAWeightAveraging, init_args: {decay: 0.9}}]"
    arguments = ["--experiment=ema", f"--trainer.callbacks={ema}", "--trainer.max_steps=10"]
    assert main(["fit", *DEBUG, *arguments, "--rollout.final_episodes=0"]) == 0
    saved = torch.load("runs/ema/version_0/checkpoints/best.ckpt", weights_only=True)
    averaged = saved["state_dict"]["net.chunk_decoder.queries"]
    assert torch.equal(played[0], averaged)
    assert not torch.equal(averaged, saved["current_model_state"]["net.chunk_decoder.queries"])


def test_ctrl_c_while_training_saves_and_says_how_to_go_on(inside):
    """A real process and a real signal; the checkpoint is of the step it was stopped at."""
    arguments = [*DEBUG, "--experiment=stopped", "--trainer.max_steps=100000"]
    arguments += ["--trainer.val_check_interval=500", "--rollout.episodes=0"]
    process = subprocess.Popen(
        [sys.executable, "-m", "act_lightning", "fit", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    checkpoints = Path("runs/stopped/version_0/checkpoints")
    best, last = checkpoints / "best.ckpt", checkpoints / "last.ckpt"
    deadline = time.monotonic() + 200
    while not best.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(3.0)  # Training goes on after the validation at step 500.
    stopped = time.time()
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1, output
    assert "make resume RUN=runs/stopped/version_0" in output
    assert "Traceback" not in output
    assert last.stat().st_mtime > stopped
    assert torch.load(last, weights_only=True)["global_step"] > 500
