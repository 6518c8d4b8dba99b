"""Sweeps: what they start, leave alone, take up again, stop and show.

Most tests put a program in the place of Python that behaves like `fit` as far as the launcher sees:
it leaves a configuration, checkpoints and results, or fails, or dies. The slow ones train.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import chdir, suppress
from functools import cache, partial
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from rich.console import Console
from torch.utils.tensorboard import SummaryWriter

from act_lightning.main import main
from act_lightning.sim.config import EnvConfig
from act_lightning.sim.record import RecordConfig
from act_lightning.study import sweep
from act_lightning.study.resolve import Resolved, resolve_study
from act_lightning.study.run_state import RunFiles, State, environment_of_slot
from act_lightning.study.study import read_study
from act_lightning.study.sweep_table import Watcher

ROOT = Path(__file__).parent.parent
STUDY = Path("experiments/studies/tiny.yaml")
RUNS = Path("runs/studies/tiny")
BC = {
    "experiment": "tiny",
    "env": {
        "task": "act_lightning/Detour-v0",
        "observation_keys": {"qpos": "time"},
        "env_state": False,
        "max_episode_steps": 20,
        "make_kwargs": {"num_obstacles": 1},
    },
    "demonstrations": {"path": "data/tiny.zarr", "episodes": 4, "expert": {"style": "style"}},
    "data": {"batch_size": 8, "val_fraction": 0.25, "prefetch": 0},
    "model": {
        "net": {
            "class_path": "act_lightning.nets.bc.BCConfig",
            "init_args": {"chunk_size": 20, "dim_hidden": 8, "num_layers": 1},
        },
    },
    "rollout": {
        "executions": {"chunked": {"n_action_steps": None}},
        "episodes": 0,
        "final_episodes": 2,
        "final_media": False,
        "num_workers": 1,
    },
    "trainer": {"accelerator": "cpu", "precision": "32-true", "deterministic": True},
}

FIT = """\
    #!{python} -SE
    import json, os, signal, sys, time
    from pathlib import Path

    settings = dict(word[2:].split("=", 1) for word in sys.argv[4:] if "=" in word)
    name = settings["experiment"].rpartition("/")[2] + "/" + settings["run"]
    run = Path("runs", settings["experiment"], settings["run"])
    told = json.loads(Path("behaviour.json").read_text())
    behaviour = told.get(name, "train")
    (run / "checkpoints").mkdir(parents=True, exist_ok=True)
    max_steps = settings["trainer.max_steps"]
    (run / "config.yaml").write_text("trainer: {{max_steps: " + max_steps + "}}")

    def stop(number, frame):
        (run / "checkpoints" / "last.ckpt").touch()
        print("interrupted; go on with make resume")
        sys.exit(1)

    if behaviour == "wait" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, stop)
    call = {{
        "name": name,
        "pid": os.getpid(),
        "resumes": settings.get("ckpt_path"),
        "cores": sorted(os.sched_getaffinity(0)),
        "found": sorted(path.name for path in run.iterdir()),
    }}
    with open("calls", "a") as calls:
        calls.write(json.dumps(call) + "\\n")
    if behaviour == "fail":
        print("some output\\n\\nerror: there is [no] disk")
        sys.exit(1)
    if behaviour == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if behaviour == "forget":
        sys.exit(0)
    deadline = time.monotonic() + 30
    if behaviour == "wait":
        while not Path("go_on").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
    if behaviour == "meet":
        while len(Path("calls").read_text().splitlines()) < 2:
            time.sleep(0.01)
            if time.monotonic() > deadline:
                sys.exit(1)
    rates = {{"chunked": 0.25, "other": 0.5}}
    report = {{name: {{"success_rate": rate}} for name, rate in rates.items()}}
    (run / "results.json").write_text(json.dumps({{"execution": report}}))
    (run / "run.part").write_text('{{"arguments": [], "finished": true}}')
    os.replace(run / "run.part", run / "run.json")
"""


def write_study(**changes):
    content = {
        "title": "Tiny",
        "question": "Does it run?",
        "experiment": "tiny",
        "settings": {"trainer.max_steps": 4, "trainer.val_check_interval": 2},
        "seeds": [0, 1],
    }
    STUDY.parent.mkdir(parents=True, exist_ok=True)
    STUDY.write_text(yaml.safe_dump(content | changes))


def start_project(folder):
    (folder / "experiments").mkdir(parents=True)
    (folder / "experiments/base.yaml").symlink_to(ROOT / "experiments/base.yaml")
    (folder / "experiments/tiny.yaml").write_text(yaml.safe_dump(BC))


@cache
def resolve(study_file):
    """Resolved once for all tests, as that takes a second."""
    return resolve_study(read_study(STUDY))


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A study, a program in place of `fit`, and a list of what was recorded."""
    start_project(tmp_path)
    monkeypatch.chdir(tmp_path)
    write_study()
    program = tmp_path / "python"
    program.write_text(textwrap.dedent(FIT).format(python=sys.executable))
    program.chmod(0o755)
    monkeypatch.setattr("act_lightning.study.run_state.sys.executable", str(program))
    monkeypatch.setattr(sweep, "POLL_S", 0.02)
    monkeypatch.setattr(sweep, "resolve_study", lambda study: resolve(STUDY.read_text()))
    recorded = []
    monkeypatch.setattr(
        "act_lightning.sim.record.record", lambda config, env: recorded.append(config.path)
    )
    behave()
    yield recorded
    Path("go_on").touch()  # for those that a failed test has left


def behave(**by_seed):
    told = {f"all/{seed}": behaviour for seed, behaviour in by_seed.items()}
    Path("behaviour.json").write_text(json.dumps(told))


def calls():
    path = Path("calls")
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def called():
    return [call["name"].removeprefix("all/") for call in calls()]


def run_sweep(*arguments):
    return main(["sweep", str(STUDY), *arguments])


def planned():
    return [RunFiles(run) for run in read_study(STUDY).runs()]


def states():
    return [file.state() for file in planned()]


def within(seconds, condition):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.02)


def modified():
    return {path: path.stat().st_mtime_ns for path in RUNS.rglob("seed_*/**/*")}


def test_runs_are_made_once_and_then_left_alone(project, capsys):
    assert run_sweep() == 0
    assert called() == ["seed_0", "seed_1"]
    assert project == ["data/tiny.zarr"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["all/seed_0 started", "all/seed_0 finished (step 4/4, success 38%)"]
    assert any("all/seed_1" in line and "finished" in line and "38%" in line for line in lines)
    assert any("2 finished" in line for line in lines)
    before = modified()
    assert run_sweep("--retry") == 0
    assert called() == ["seed_0", "seed_1"]
    assert modified() == before
    assert project == ["data/tiny.zarr"]


def test_what_failed_is_reported_and_tried_again_on_request(project, capsys):
    write_study(seeds=[0, 1, 2, 3])
    behave(seed_0="fail", seed_1="die", seed_2="forget")
    assert run_sweep() == 1
    out, error = capsys.readouterr()
    assert "all/seed_0 failed: there is [no] disk (see " in out
    assert "all/seed_1 failed: killed by signal 9 (see " in out
    assert "all/seed_2 failed: it was not evaluated: rollout.final_episodes is 0" in out
    assert "3 of 4 runs have failed" in error
    assert "the same command with --retry (make: in ARGS) tries them again" in error
    assert states() == [State.FAILED] * 3 + [State.FINISHED]
    assert run_sweep() == 1
    assert "there is [no] disk" in capsys.readouterr().out
    assert called() == [f"seed_{i}" for i in range(4)]
    behave()
    assert run_sweep("--retry") == 0
    assert called()[4:] == [f"seed_{i}" for i in range(3)]
    assert states() == [State.FINISHED] * 4


def test_interrupted_runs_go_on_and_others_start_anew(project):
    first, second = planned()
    first.last_checkpoint.parent.mkdir(parents=True)
    first.last_checkpoint.touch()
    (first.run.folder / "config.yaml").write_text("trainer: {max_steps: 4}")
    second.run.folder.mkdir(parents=True)
    (second.run.folder / "events.out.tfevents.1").touch()
    assert states() == [State.INTERRUPTED, State.WAITING]
    assert run_sweep() == 0
    assert [call["resumes"] for call in calls()] == ["last", None]
    assert "events.out.tfevents.1" not in calls()[1]["found"]


def test_other_settings_than_those_of_a_run_are_refused(project, capsys):
    behave(seed_1="fail")
    assert run_sweep() == 1
    write_study(settings={"trainer.max_steps": 6, "trainer.val_check_interval": 2})
    capsys.readouterr()
    assert run_sweep() == 1
    message = capsys.readouterr().err
    assert "seed_0 was trained with other settings: trainer.max_steps 4 there and 6 now" in message
    shutil.rmtree(RUNS / "all" / "seed_0")
    assert run_sweep() == 1  # seed_1 has failed, which is no reason to refuse
    assert states() == [State.FINISHED, State.FAILED]
    (RUNS / "all/seed_1/checkpoints/last.ckpt").touch()
    assert run_sweep("--retry") == 1  # but not to be gone on with
    assert "seed_1 was trained with other settings" in capsys.readouterr().err
    assert called() == ["seed_0", "seed_1", "seed_0"]


def test_two_at_once_on_cores_of_their_own(project):
    behave(seed_0="meet", seed_1="meet")
    assert run_sweep("--jobs=2") == 0
    mine = sorted(os.sched_getaffinity(0))
    cores = [call["cores"] for call in calls()]
    assert sorted(cores[0] + cores[1]) == (mine if len(mine) > 1 else mine * 2)
    assert os.sched_getaffinity(0) == set(mine)


@pytest.mark.parametrize(
    ("number", "in_background"),
    [(signal.SIGINT, False), (signal.SIGTERM, False), (signal.SIGTERM, True)],
)
def test_ctrl_c_and_sigterm_stop_every_run(project, capsys, number, in_background):
    """What a shell starts in the background ignores Ctrl-C, and so would what it starts."""
    behave(seed_0="wait", seed_1="wait")
    before = signal.getsignal(signal.SIGINT)
    if in_background:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:

        def interrupt():
            within(20, lambda: len(calls()) == 2)
            os.kill(os.getpid(), number)

        thread = threading.Thread(target=interrupt)
        thread.start()
        assert run_sweep("--jobs=2") == 1
        thread.join()
    finally:
        signal.signal(signal.SIGINT, before)
    assert "interrupted" in capsys.readouterr().err
    assert not any(psutil.pid_exists(call["pid"]) for call in calls())
    assert states() == [State.INTERRUPTED] * 2
    behave()
    assert run_sweep() == 0
    assert all(call["resumes"] for call in calls()[2:])


def test_what_another_sweep_runs_is_waited_for(project):
    behave(seed_0="wait")
    other = planned()[0].start(os.environ)
    within(20, lambda: called() == ["seed_0"])
    assert states() == [State.RUNNING, State.WAITING]
    threading.Timer(2.0, lambda: (Path("go_on").touch(), other.wait())).start()
    assert run_sweep() == 0
    assert called() == ["seed_0", "seed_1"]


def test_two_recordings_into_one_store_are_refused(project):
    def resolved(**changes):
        return Resolved(
            settings={},
            max_steps=1,
            executions=(),
            demonstrations=RecordConfig(path="a.zarr", **changes),
            recorded_env=EnvConfig(),
        )

    study = read_study(STUDY)
    sweep.record_demonstrations(study, {"a": resolved(), "b": resolved()})
    assert project == ["a.zarr"]
    with pytest.raises(ValueError, match="study tiny: a and b record different .* a.zarr; set"):
        sweep.record_demonstrations(study, {"a": resolved(), "b": resolved(hold_steps=3)})


def test_the_gpus_are_shared_out(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "all")

    def of_slot(slot, num_slots, gpus):
        made = environment_of_slot(slot, num_slots, gpus, [4, 5])
        return made["CUDA_VISIBLE_DEVICES"], made.get("OMP_NUM_THREADS")

    assert [of_slot(i, 3, ["2", "GPU-7"]) for i in range(3)] == [
        ("2", "2"),
        ("GPU-7", "2"),
        ("2", "2"),
    ]
    assert of_slot(0, 1, ["2", "GPU-7"]) == ("all", None)
    assert of_slot(0, 2, []) == ("all", "2")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-7")
    assert sweep._gpus() == ["2", "GPU-7"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert sweep._gpus() == []


def test_the_table_shows_how_far_a_run_is(project):
    file, other = planned()
    watcher = Watcher([file, other], {"all": 400})
    watcher.set(file, State.RUNNING)

    def shown():
        console = Console(record=True, width=100, file=open(os.devnull, "w"))  # noqa: SIM115
        console.print(watcher.table("Tiny"))
        text = console.export_text()
        return text.splitlines()[0].strip(), next(
            line.split() for line in text.splitlines() if file.name in line
        )

    assert shown() == ("Tiny: 1 running, 1 waiting", ["all/seed_0", "running"])
    with SummaryWriter(file.run.folder) as writer:
        writer.add_scalar("train/loss", 1.0, 100, walltime=1000.0)
        writer.add_scalar("train/loss", 1.0, 200, walltime=1060.0)
        writer.add_scalar("rollout/success_rate", 0.125, 200, walltime=1060.0)
    assert shown()[1] == ["all/seed_0", "running"]  # read a moment ago
    watcher._read_at.clear()
    assert shown()[1] == ["all/seed_0", "running", "200/400", "12%", "0:02:00"]
    file.results.write_text('{"execution": {"chunked": {"success_rate": 0.5}}}')
    watcher.set(file, State.FINISHED)
    assert shown() == (
        "Tiny: 1 finished, 1 waiting",
        ["all/seed_0", "finished", "400/400", "50%"],
    )


# --- with real training ---


def launch(*arguments):
    """A sweep as a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "act_lightning", "sweep", str(STUDY), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )


def outcome(run):
    """Weights and worlds, by which two trainings are compared."""
    results = json.loads((run / "results.json").read_text())
    checkpoints = [
        torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)
        for name in ("best", "last")
    ]
    return results["worlds"], [
        (checkpoint["global_step"], list(checkpoint["state_dict"].items()))
        for checkpoint in checkpoints
    ]


def assert_same(first, second):
    (worlds, checkpoints), (other_worlds, others) = outcome(first), outcome(second)
    assert worlds == other_worlds
    for (step, weights), (other_step, other) in zip(checkpoints, others, strict=True):
        assert step == other_step
        for (name, value), (other_name, other_value) in zip(weights, other, strict=True):
            assert name == other_name
            assert torch.equal(value, other_value), name


def fits():
    """Living processes of `fit` whose working directory is this one."""
    here = os.getcwd()
    found = {}
    for process in psutil.process_iter():
        try:
            words = process.cmdline()
            if "act_lightning" in words and "fit" in words and process.cwd() == here:
                found[process.pid] = process, process.ppid()
        except psutil.Error:
            continue
    # What one of them starts looks like it for a moment.
    return [process for process, parent in found.values() if parent not in found]


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.usefixtures("none_left")
def test_killed_sweeps_end_as_those_left_alone(tmp_path, monkeypatch):
    """The launcher is killed alone, and with its runs; each time the same command goes on."""
    settings = {
        "trainer.max_steps": 3000,
        "trainer.val_check_interval": 500,
        "trainer.log_every_n_steps": 500,
    }
    folders = [tmp_path / name for name in ("straight", "orphaned", "killed")]
    for folder in folders:
        start_project(folder)
        with chdir(folder):
            write_study(settings=settings)

    monkeypatch.chdir(folders[0])
    assert "recording data/tiny.zarr" in finished(launch("--jobs=2"))
    for folder in folders[1:]:
        shutil.copytree("data", folder / "data")

    monkeypatch.chdir(folders[1])
    process = launch("--jobs=2")
    within(200, lambda: len(fits()) == 2)
    process.kill()
    process.communicate()
    orphans = {fit.pid for fit in fits()}
    process = launch("--jobs=2")
    while process.poll() is None:
        assert {fit.pid for fit in fits()} <= orphans
        time.sleep(0.2)
    finished(process)
    assert len(orphans) == 2
    assert not any("resumed" in read_json(path) for path in RUNS.glob("all/*/run.json"))

    monkeypatch.chdir(folders[2])
    process = launch("--jobs=2")
    within(200, lambda: list(RUNS.glob("all/*/checkpoints/last.ckpt")))
    process.kill()
    process.communicate()
    left = fits()
    for fit in left:
        fit.kill()
    psutil.wait_procs(left, timeout=20)
    assert State.INTERRUPTED in states()
    finished(launch("--jobs=2"))
    assert not fits()
    assert any("resumed" in read_json(path) for path in RUNS.glob("all/*/run.json"))

    for folder in folders[1:]:
        for seed in range(2):
            run = RUNS / "all" / f"seed_{seed}"
            assert_same(folders[0] / run, folder / run)


def read_json(path):
    return json.loads(path.read_text())


def finished(process):
    """Output of a sweep that has to end well."""
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    return output


@pytest.fixture
def none_left(tmp_path):
    """Ends what a test that failed has left: its runs have sessions of their own."""
    yield
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if "act_lightning" in process.cmdline() and tmp_path in Path(process.cwd()).parents:
                process.kill()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("none_left")
def test_a_stopped_sweep_saves_and_leaves_no_process(tmp_path, monkeypatch):
    start_project(tmp_path / "stopped")
    monkeypatch.chdir(tmp_path / "stopped")
    write_study(settings={"trainer.max_steps": 1_000_000, "trainer.val_check_interval": 500})
    saved = [RUNS / "all" / f"seed_{i}" / "checkpoints" / "best.ckpt" for i in range(2)]

    def have_saved_since(start):
        return all(path.is_file() and path.stat().st_mtime > start for path in saved)

    for number in (signal.SIGTERM, signal.SIGINT):
        process, start = launch("--jobs=2"), time.time()
        within(200, partial(have_saved_since, start))
        family = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(number)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 1
        assert "interrupted" in output
        assert not psutil.wait_procs(family, timeout=10)[1]
        assert states() == [State.INTERRUPTED] * 2
    for i in range(2):
        last = torch.load(RUNS / f"all/seed_{i}/checkpoints/last.ckpt", weights_only=True)
        assert last["global_step"] > 500
        assert len(json.loads((RUNS / f"all/seed_{i}/run.json").read_text())["resumed"]) == 1
