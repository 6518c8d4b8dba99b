"""Every mistake ends in one message that says what is wrong and what to do, and loses nothing."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
import zarr

from act_lightning.batch import DataSpec
from act_lightning.checkpoint import AtomicCheckpointIO
from act_lightning.data.episode import Episode
from act_lightning.data.store import Store
from act_lightning.data.writer import StoreWriter
from act_lightning.main import main
from act_lightning.sim.opengl import find_backend

ROOT = Path(__file__).parent.parent
STATE = [
    f"--config={ROOT / 'experiments' / 'base.yaml'}",
    f"--config={ROOT / 'experiments' / 'debug.yaml'}",
    "--env.cameras=[]",
    "--env.env_state=true",
    "--demonstrations.path=state.zarr",
    "--data.val_fraction=0.5",
    "--trainer.accelerator=cpu",
]
PIXELS = [*STATE, "--env.cameras=[top]", "--demonstrations.path=pixels.zarr"]
NUM_STEPS = 20


def write_store(path, cameras=(), **changes):
    """Two made-up demonstrations of insertion."""
    image_size = (60, 80) if cameras else (0, 0)
    sizes = {"dim_qpos": 14, "dim_action": 14, "dim_env_state": 14} | changes
    spec = DataSpec(task="insertion", fps=50.0, cameras=cameras, image_size=image_size, **sizes)
    rng = np.random.default_rng(0)
    with StoreWriter.create(path, spec, {}, expected_episodes=2) as writer:
        for seed in range(2):
            tables = {
                name: rng.normal(size=(NUM_STEPS, sizes[f"dim_{dim}"])).astype(np.float32)
                for name, dim in (("qpos", "qpos"), ("actions", "action"))
            }
            writer.append(
                Episode(
                    **tables,
                    env_state=rng.normal(size=(NUM_STEPS, 14)) if sizes["dim_env_state"] else None,
                    images=np.zeros((NUM_STEPS, 1, 3, 60, 80), np.uint8) if cameras else None,
                    id=seed,
                )
            )


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """Good stores, and one for each way of being bad."""
    folder = tmp_path_factory.mktemp("stores")
    write_store(folder / "state.zarr")
    write_store(folder / "pixels.zarr", cameras=("top",))
    write_store(folder / "blind.zarr", dim_env_state=0)
    write_store(folder / "half.zarr")
    document = json.loads((folder / "half.zarr" / "zarr.json").read_text())
    document["attributes"]["expected_episodes"] = 5
    (folder / "half.zarr" / "zarr.json").write_text(json.dumps(document))
    write_store(folder / "nan.zarr")
    zarr.open_array(folder / "nan.zarr" / "data" / "action", mode="r+")[23, 3] = np.nan
    (folder / "other.zarr").mkdir()
    (folder / "other.zarr" / "notes.txt").write_text("no store")
    (folder / "file.zarr").write_text("no folder")
    (folder / "garbage.ckpt").write_text("no checkpoint")
    (folder / "empty.ckpt").touch()
    torch.save({"state_dict": {}}, folder / "foreign.ckpt")
    return folder


@pytest.fixture
def inside(stores, tmp_path, monkeypatch):
    """A working directory of its own, with those stores."""
    for item in stores.iterdir():
        (tmp_path / item.name).symlink_to(item)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refusal(capsys, *args):
    """The message of a command that must fail at once: one, without a traceback."""
    assert main(list(args)) == 1
    error = capsys.readouterr().err
    assert error.count("error:") == 1, error
    assert "Traceback" not in error
    message = error[error.index("error:") :]
    assert len(message.strip().splitlines()) == 1, message
    return message


def has(message, *parts):
    for part in parts:
        assert part in message, message


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["--demonstrations.path=none.zarr"], ["none.zarr", "make data"]),
        (["--demonstrations.path=half.zarr"], ["half.zarr", "2 of 5 episodes", "make data"]),
        (["--demonstrations.path=other.zarr"], ["other.zarr is not a store", "move it away"]),
        (["--demonstrations.path=file.zarr"], ["file.zarr is not a store", "move it away"]),
        (
            ["--demonstrations.path=nan.zarr"],
            [
                "data/action is nan in episode 1 (id 1), step 3, dimension 3",
                "record or ingest the store",
            ],
        ),
        (
            ["--env.cameras=[tpo]", "--demonstrations.path=pixels.zarr"],
            ["env.cameras", "no camera ['tpo']", "['top']"],
        ),
        (["--demonstrations.path=blind.zarr"], ["no object poses", "env.env_state: true"]),
        (["--env.task=transfer_cube"], ["task=transfer_cube", "insertion", "demonstrations.path"]),
        (["--model.net.chunk_size=21"], ["chunk_size=21", "20 to 20 steps", "set model.net.chunk"]),
        (
            ["--rollout.executions.chunked.n_action_steps=11"],
            ["rollout.executions.chunked", "n_action_steps=11", "chunk_size=10"],
        ),
        (["--data.val_fraction=0.9"], ["val_fraction=0.9 of 2 episodes", "record more"]),
        (["--env.task=juggling"], ["task='juggling'", "insertion, transfer_cube"]),
        (["--model.net.dim_model=33"], ["dim_model=33", "multiple of 4"]),
        (["--ckpt_path=none.ckpt"], ["checkpoint none.ckpt does not exist"]),
        (["--ckpt_path=last"], ["--ckpt_path=last needs --run"]),
        (["--ckpt_path=garbage.ckpt"], ["garbage.ckpt is damaged", "best.ckpt or last.ckpt"]),
        (["--ckpt_path=empty.ckpt"], ["empty.ckpt is damaged"]),
        (["--ckpt_path=foreign.ckpt"], ["foreign.ckpt", "not a checkpoint of act_lightning"]),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_fit_refuses(inside, capsys, args, parts):
    has(refusal(capsys, "fit", *STATE, *args), *parts)


def test_a_network_that_was_never_trained_is_not_validated(inside, capsys):
    message = refusal(capsys, "validate", *STATE, "--run=typo", "--ckpt_path=last")
    has(message, "/typo has no checkpoint", "--experiment and --run of one that has")


def test_fit_refuses_images_of_another_size(inside, capsys):
    message = refusal(capsys, "fit", *PIXELS, "--env.image_size=[60,60]")
    has(message, "image_size=(60, 60)", "(60, 80)", "demonstrations.path")


@pytest.mark.parametrize(
    ("backbone", "parts"),
    [
        ({"weights": "imagenet", "norm": "group"}, ["weights='imagenet' with norm=group", "Use"]),
        (
            {"weights": "none.pth", "norm": "frozen_batch", "width": 64},
            ["'none.pth': no such file", "weights: none, norm: group"],
        ),
        (
            {"weights": "imagenet", "norm": "frozen_batch", "width": 64},
            ["not in the cache", "resnet18-f37072fd.pth", "weights: none, norm: group"],
        ),
    ],
    ids=["combination", "file", "offline"],
)
def test_fit_refuses_weights_it_cannot_have(inside, capsys, monkeypatch, backbone, parts):
    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setenv("TORCH_HOME", str(inside / "cache"))
    settings = [f"--model.net.backbone.{name}={value}" for name, value in backbone.items()]
    has(refusal(capsys, "fit", *PIXELS, *settings), *parts)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_an_accelerator_that_is_not_there_is_one_message(inside, capsys):
    has(refusal(capsys, "fit", *STATE, "--trainer.accelerator=gpu"), "gpu")


@pytest.mark.parametrize(
    ("args", "part"),
    [
        (["--trainer.max_steps=many"], "trainer.max_steps"),
        (["--env.image_size=3"], "env.image_size"),
        (["--model.net.chunks=3"], "'chunks' is not accepted"),
        (["--model.net.backbone.norm=batch"], "frozen_batch"),
        (["--config=none.yaml"], "none.yaml"),
        (["--rollout.executions={a: {n_actions: 3}}"], "'n_actions' is not accepted"),
        (["--trainer.precision=half"], "'bf16-mixed', '32-true'"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
@pytest.mark.parametrize("verb", ["fit", "record"])
def test_bad_usage_is_a_few_lines(inside, capsys, verb, args, part):
    with pytest.raises(SystemExit) as exit_info:
        main([verb, *STATE, *args])
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert part in error
    assert len(error.splitlines()) < 8


def test_a_setting_of_one_of_many_is_refused_by_name(inside, capsys):
    assert main(["record", *STATE, "--rollout.executions.chunked.n_action_steps=0"]) == 1
    error = capsys.readouterr().err
    has(error, "error: ExecutionConfig: n_action_steps=0 must be 1 or more", "null for the whole")
    assert "Union" not in error


@pytest.mark.parametrize("path", ["other.zarr", "file.zarr"])
def test_record_refuses_a_path_that_is_taken(inside, capsys, path):
    message = refusal(capsys, "record", *STATE, f"--demonstrations.path={path}")
    has(message, f"{path} is not a store", "move it away")


def test_record_refuses_an_unknown_camera(inside, capsys):
    new = "--demonstrations.path=new.zarr"
    has(refusal(capsys, "record", *STATE, new, "--env.cameras=[tpo]"), "'tpo'", "left_wrist")
    assert not Path("new.zarr").exists()


def test_record_refuses_a_world_without_demonstrator(inside, capsys):
    other = ["--env.task=CartPole-v1", '--env.observation_keys={"qpos": ""}']
    message = refusal(capsys, "record", *STATE, "--demonstrations.path=new.zarr", *other)
    has(message, "task='CartPole-v1'", "insertion", "demonstrations.expert.class_path")


@pytest.fixture
def no_opengl(monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "off")
    find_backend.cache_clear()
    yield
    find_backend.cache_clear()


def test_record_without_opengl(inside, capsys, no_opengl):
    message = refusal(capsys, "record", *PIXELS, "--demonstrations.path=new.zarr")
    has(message, "MUJOCO_GL=off", "egl or osmesa")
    assert not Path("new.zarr").exists()


def test_fit_without_opengl_is_refused_before_training(inside, capsys, no_opengl):
    has(refusal(capsys, "fit", *PIXELS), "MUJOCO_GL=off", "egl or osmesa")


@pytest.fixture(scope="module")
def run(stores):
    """The folder of a finished run that never saw a simulator."""
    before = Path.cwd()
    os.chdir(stores)
    try:
        rollouts = ["--rollout.episodes=0", "--rollout.final_episodes=0"]
        assert main(["fit", *STATE, *rollouts, "--experiment=good"]) == 0
    finally:
        os.chdir(before)
    return stores / "runs" / "good" / "version_0"


def test_a_checkpoint_of_another_network_is_refused_by_setting(run, inside, capsys):
    last = run / "checkpoints" / "last.ckpt"
    message = refusal(capsys, "fit", *STATE, f"--ckpt_path={last}", "--model.net.dim_model=64")
    has(message, "net.dim_model is 32 there and 64 now", "Set these back")


def test_evaluate_without_opengl(run, inside, capsys, monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "off")
    shutil.copytree(run, "blind")
    settings = yaml.safe_load(Path("blind/config.yaml").read_text())
    settings["env"]["cameras"] = ["top"]
    Path("blind/config.yaml").write_text(yaml.safe_dump(settings))
    has(refusal(capsys, "evaluate", "blind", "--episodes=1"), "MUJOCO_GL=off", "egl or osmesa")


@pytest.mark.parametrize(
    ("spoil", "part"),
    [
        (lambda run: shutil.rmtree(run), "run run does not exist"),
        (lambda run: shutil.rmtree(run / "checkpoints"), "best.ckpt does not exist"),
        (lambda run: (run / "config.yaml").unlink(), "config.yaml is not the configuration"),
        (lambda run: (run / "config.yaml").write_text(""), "config.yaml is not the configuration"),
        (lambda run: (run / "config.yaml").write_text("env: ["), "not the configuration"),
        (lambda run: (run / "checkpoints" / "best.ckpt").write_bytes(b"PK"), "best.ckpt is damage"),
    ],
    ids=["run", "checkpoints", "config", "empty config", "broken config", "damaged"],
)
def test_evaluate_refuses(run, inside, capsys, spoil, part):
    shutil.copytree(run, "run")
    spoil(Path("run"))
    has(refusal(capsys, "evaluate", "run"), part)


def test_a_full_disk_keeps_the_checkpoint_before(inside, capsys, monkeypatch):
    saved = []

    def save(checkpoint_io, checkpoint, path, storage_options=None):
        if checkpoint["global_step"] > 10:
            Path(path).write_bytes(b"half of it")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        saved.append(path)
        original(checkpoint_io, checkpoint, path, storage_options)

    parent = AtomicCheckpointIO.__mro__[1]
    original = parent.save_checkpoint
    monkeypatch.setattr(parent, "save_checkpoint", save)
    message = refusal(capsys, "fit", *STATE, "--rollout.episodes=0", "--experiment=full")
    has(message, "No space left on device", "Make room", "make resume")
    kept = Path("runs/full/version_0/checkpoints")
    assert saved
    assert torch.load(kept / "last.ckpt", weights_only=True)["global_step"] == 10
    names = sorted(path.name for path in kept.iterdir())
    assert names == ["best.ckpt", "last.ckpt", "previous.ckpt"]


def start(*args):
    return subprocess.Popen(
        [sys.executable, "-m", "act_lightning", *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


def children(pid):
    """Simulator processes of the program `pid`."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(status.read_text().rsplit(")", 1)[1].split()[1])
            command = (status.parent / "cmdline").read_text()
        except OSError:  # it has ended
            continue
        if parent == pid and ("spawn_main" in command or "run_worker" in command):
            found.append(int(status.parent.name))
    return found


def wait_until(condition, seconds=300.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def has_ended(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


def num_recorded(path):
    return Store.open(path, allow_incomplete=True).num_episodes if path.exists() else 0


@pytest.fixture
def recording(inside):
    """A recorder at work, and what it has recorded one episode into."""
    path = inside / "new.zarr"
    process = start(
        "record", *STATE, f"--demonstrations.path={path}", "--demonstrations.episodes=500"
    )
    try:
        wait_until(lambda: num_recorded(path) >= 1 or process.poll() is not None)
        yield process, path
    finally:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_a_recording_process_that_dies_ends_the_recording(recording):
    process, path = recording
    os.kill(children(process.pid)[0], signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    has(output, "error: a recording process died", "record again")
    assert "Traceback" not in output
    assert num_recorded(path) >= 1


@pytest.mark.slow
def test_recording_processes_end_with_a_recorder_that_is_killed(recording):
    process, path = recording
    workers = children(process.pid)
    assert workers
    process.kill()
    wait_until(lambda: all(map(has_ended, workers)), seconds=30.0)
    assert num_recorded(path) >= 1


@pytest.mark.slow
def test_ctrl_c_while_evaluating(run, inside):
    process = start("evaluate", str(run), "--episodes=5000")
    wait_until(lambda: len(children(process.pid)) > 0 or process.poll() is not None)
    time.sleep(2.0)
    workers = children(process.pid)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1, output
    assert "interrupted" in output
    assert "Traceback" not in output
    assert not (run / "results.json").exists()
    wait_until(lambda: all(map(has_ended, workers)), seconds=10.0)


@pytest.mark.slow
def test_ctrl_c_while_the_recorders_processes_start(inside):
    process = start("record", *STATE, "--demonstrations.path=new.zarr")
    wait_until(lambda: len(children(process.pid)) > 0 or process.poll() is not None)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1, output
    assert "interrupted" in output
    assert "Traceback" not in output


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small disk, which takes root")
def test_a_disk_that_is_full_keeps_what_was_recorded(inside):
    disk = inside / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=420k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this container may not mount")
    try:
        path = disk / "new.zarr"
        arguments = [*STATE, f"--demonstrations.path={path}", "--demonstrations.episodes=10"]
        process = start("record", *arguments)
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 1
        has(
            output,
            "No space left on device",
            "episodes before it are safe",
            "run the command again",
        )
        assert "Traceback" not in output
        before = num_recorded(path)
        assert before >= 1
        subprocess.run(["mount", "-o", "remount,size=10m", str(disk)], check=True)
        assert start("record", *arguments).wait(300) == 0
        assert Store.open(path).num_episodes == 10 > before
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
