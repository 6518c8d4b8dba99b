"""Sweeps as a Slurm job array: options, what is submitted, and what a task does with its run.

Tasks run for real, as processes of submitit's own scheduler for one machine. What stands for Slurm
where its answers matter are programs named sbatch and squeue.
"""

import contextlib
import os
import shutil
import signal
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest
import submitit

from act_lightning.main import main
from act_lightning.slurm_config import SlurmConfig, read_config
from act_lightning.study import slurm, slurm_task
from act_lightning.study.run_state import RunFiles, State
from act_lightning.study.slurm import SlurmQueue
from act_lightning.study.slurm_task import Training
from act_lightning.study.study import Study, Variant
from act_lightning.study.sweep_table import Watcher

FIT = """\
    #!{python} -SE
    import os, signal, sys, time
    from pathlib import Path

    settings = dict(word[2:].split("=", 1) for word in sys.argv if "=" in word)
    run = Path("runs", settings["experiment"], settings["run"])
    checkpoint = run / "checkpoints" / "last.ckpt"
    checkpoint.parent.mkdir(parents=True, exist_ok=True)

    def stop(number, frame):
        checkpoint.touch()
        sys.exit(75)

    signal.signal(signal.SIGTERM, stop)
    masked = signal.SIGUSR2 in signal.pthread_sigmask(signal.SIG_BLOCK, [])
    print("masked" if masked else "unmasked", flush=True)
    behaviour = settings["behaviour"]
    if behaviour == "fail":
        print("error: no disk", flush=True)
        sys.exit(1)
    if behaviour == "wait" and "ckpt_path" not in settings:
        (run / "started").touch()
        time.sleep(60)
    (run / "results.json").write_text('{{"execution": {{"chunked": {{"success_rate": 1.0}}}}}}')
    (run / "run.part").write_text('{{"arguments": [], "finished": true}}')
    os.replace(run / "run.part", run / "run.json")
"""

SQUEUE = """\
    #!/bin/sh
    echo "squeue $*" >> calls
    [ -f busy ] && {{ echo "slurm_load_jobs error: Socket timed out" >&2; exit 1; }}
    cat queue
    [ -f last ] && : > queue
    exit 0
"""

SBATCH = """\
    #!/bin/sh
    cat "$1" >> submitted
    echo "Submitted batch job 12"
    printf '12_0 PENDING\\n12_1 RUNNING\\n' > queue
"""


@pytest.fixture
def study(tmp_path, monkeypatch):
    """Two runs of a program that stands for `fit`, in a folder of their own."""
    monkeypatch.chdir(tmp_path)
    program = write_program(tmp_path / "python", FIT)
    # The tasks' own Python reads this when it starts; the program does not (-SE).
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.executable = {str(program)!r}\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return make_study()


def write_program(path, text):
    path.write_text(textwrap.dedent(text).format(python=sys.executable))
    path.chmod(0o755)
    return path


def make_study(**behaviours):
    behaviours = behaviours or {"a": "train", "b": "train"}
    return Study(
        name="tiny",
        title="Tiny",
        question="Does it run?",
        variants=tuple(
            Variant(name=name, experiment="tiny", settings={"behaviour": behaviour})
            for name, behaviour in behaviours.items()
        ),
        seeds=(0,),
        settings={},
        record={},
        reference=None,
    )


def files_of(study):
    return [RunFiles(run) for run in study.runs()]


@pytest.fixture
def cluster(study, tmp_path, monkeypatch):
    """Slurm, as far as a sweep sees it; its queue is a file."""
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    write_program(bin_folder / "squeue", SQUEUE)
    write_program(bin_folder / "sbatch", SBATCH)
    write_program(bin_folder / "srun", "#!/bin/sh\n")
    monkeypatch.setenv("PATH", f"{bin_folder}:{os.environ['PATH']}")
    monkeypatch.setattr(slurm, "ASK_S", 0.05)
    monkeypatch.setattr(slurm, "LOOK_S", 0.01)
    Path("queue").touch()
    return study


def queue_of(study, **config):
    watcher = Watcher(files_of(study), dict.fromkeys("ab", 10))
    return SlurmQueue(study, watcher, SlurmConfig(**config))


def submit(queue):
    """Submits all runs, and does not watch them."""
    queue._submit(queue.watcher.files, len(queue.watcher.files))


def within(seconds, condition):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.02)


def test_options_are_read_with_their_types(cluster):
    config = read_config(
        ["partition=gpu", "gpus_per_node=1", "mem_gb=1.5", 'setup=["module load x"]']
    )
    assert (config.partition, config.gpus_per_node, config.mem_gb) == ("gpu", 1, 1.5)
    assert config.setup == ["module load x"]
    assert config.timeout_min == 240
    assert read_config([]) == SlurmConfig()
    assert read_config(["additional_parameters={reservation: x}"]).additional_parameters == {
        "reservation": "x"
    }


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("partitoin=gpu", "--slurm partitoin=gpu: give key=value, with a key of partition, "),
        ("partition", "--slurm partition: give key=value"),
        ("nodes=2", "--slurm nodes=2: give key=value"),  # a run is one task on one node
        ("timeout_min=long", 'slurm.timeout_min".*'),
        ("timeout_min=0", "timeout_min=0; give more than 0"),
        ("mem_gb=-1", "mem_gb=-1.0; give more than 0"),
        ("timeout_min=1", "signal_delay_s=120 leaves nothing of timeout_min=1"),
    ],
)
def test_wrong_options_are_named(cluster, option, message):
    with pytest.raises(ValueError, match=message):
        read_config([option])


def test_without_slurm_nothing_is_begun(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["sweep", "experiments/studies/tiny.yaml", "--slurm", "partition=gpu"]) == 1
    assert (
        "error: sbatch is not found here; call sweep where jobs are submitted"
        in capsys.readouterr().err
    )
    assert not any(tmp_path.iterdir())


def test_runs_are_submitted_as_one_array(cluster):
    queue = queue_of(cluster, partition="gpu", cpus_per_task=8, mem_gb=1.5, timeout_min=30)
    Path("last").touch()
    assert queue.run(queue.watcher.files, jobs=1)
    script = Path("submitted").read_text()
    assert script.count("#SBATCH --array=0-1%1\n") == 1
    for line in ("partition=gpu", "time=30", "mem=1536MB", "job-name=tiny", "signal=USR2@120"):
        assert f"#SBATCH --{line}\n" in script
    assert "#SBATCH --requeue\n" in script
    # From Slurm 22.05 on, srun gives a task one core unless it is told.
    assert "#SBATCH --cpus-per-task=8\n" in script
    assert "--cpus-per-task=8 " in script.split("\nsrun ")[1]
    assert "--name=tiny" in Path("calls").read_text()


def test_runs_that_slurm_has_are_not_submitted_again(cluster, capsys):
    queue = queue_of(cluster)
    submit(queue)
    queue = queue_of(cluster)
    assert [queue.watcher.state(file) for file in queue.watcher.files] == [
        State.QUEUED,
        State.RUNNING,
    ]
    Path("last").touch()
    assert queue.run(queue.watcher.files[1:], jobs=None)
    assert Path("submitted").read_text().count("#SBATCH --array") == 1
    # Slurm has dropped both: their output is named, and the next sweep takes them.
    out = capsys.readouterr().out
    assert "a/seed_0: Slurm has ended its job 12_0 (see " in out
    assert "12_0_0_log.err" in out
    assert [queue.watcher.state(file) for file in queue.watcher.files] == [State.WAITING] * 2
    submit(queue_of(cluster))
    assert Path("submitted").read_text().count("#SBATCH --array") == 2


def test_a_finished_run_is_finished_whatever_slurm_says(cluster):
    queue = queue_of(cluster)
    submit(queue)
    first = queue.watcher.files[0]
    first.results.parent.mkdir(parents=True)
    first.results.write_text('{"execution": {"chunked": {"success_rate": 1.0}}}')
    (first.run.folder / "run.json").write_text('{"arguments": [], "finished": true}')
    queue = queue_of(cluster)
    assert queue.watcher.state(queue.watcher.files[0]) == State.FINISHED
    assert queue._open_jobs() == ["12_1"]


def test_slurm_that_is_busy_is_asked_again_but_not_guessed_at(cluster, capsys):
    queue = queue_of(cluster)
    submit(queue)
    Path("busy").touch()
    with pytest.raises(RuntimeError, match="squeue: slurm_load_jobs error: Socket timed out"):
        queue_of(cluster)
    queue._ask_again()
    assert queue._open_jobs() == ["12_0", "12_1"]
    assert "Socket timed out; asking again" in capsys.readouterr().out


def test_ctrl_c_leaves_the_jobs_alone(cluster, capsys, monkeypatch):
    queue = queue_of(cluster)
    looks = iter([None, None])

    def sleep(seconds):
        if next(looks, "interrupt") == "interrupt":
            raise KeyboardInterrupt

    monkeypatch.setattr(slurm.time, "sleep", sleep)
    assert not queue.run(queue.watcher.files, jobs=None)
    assert "the jobs go on, without being watched" in (out := capsys.readouterr().out)
    assert "scancel 12 cancels them" in out


def test_a_job_that_slurm_refuses_is_an_error(cluster, tmp_path):
    write_program(tmp_path / "bin/sbatch", "#!/bin/sh\necho 'invalid partition' >&2\nexit 1\n")
    queue = queue_of(cluster)
    with pytest.raises(RuntimeError, match="sbatch refused the runs: .*invalid partition"):
        queue.run(queue.watcher.files, jobs=None)
    assert not Path("runs/studies/tiny/sweep/slurm.json").exists()


def submit_here(study, save_s=30.0):
    """Runs the tasks of a study as processes on this machine."""
    executor = submitit.LocalExecutor("jobs")
    executor.update_parameters(timeout_min=5)
    return executor.submit_array([Training(file.run, save_s) for file in files_of(study)])


def task_of(job):
    """The process of a job that runs the task."""
    tasks = psutil.Process(int(job.job_id)).children()
    return next(task for task in tasks if "submitit.core._submit" in task.cmdline())


@pytest.fixture
def no_job_left():
    jobs = []
    yield jobs
    for job in jobs:
        with contextlib.suppress(psutil.NoSuchProcess):
            controller = psutil.Process(int(job.job_id))
            for process in [controller, *controller.children(recursive=True)]:
                process.kill()


@pytest.mark.slow
def test_an_array_of_tasks_trains_fails_and_goes_on(study, no_job_left):
    study = make_study(trained="train", failed="fail", preempted="wait", cancelled="wait")
    trained, failed, preempted, cancelled = files_of(study)
    jobs = submit_here(study)
    no_job_left += jobs
    for file in (preempted, cancelled):
        within(60, (file.run.folder / "started").exists)
    assert preempted.state() == State.RUNNING
    task_of(jobs[2]).send_signal(signal.SIGUSR2)
    task_of(jobs[3]).send_signal(signal.SIGTERM)
    within(60, cancelled.last_checkpoint.exists)
    within(10, lambda: cancelled.state() != State.RUNNING)

    assert jobs[0].result() == State.FINISHED
    assert jobs[2].result() == State.FINISHED
    assert preempted.log.read_text().splitlines() == ["masked", "masked"]
    with pytest.raises(Exception, match="failed/seed_0 failed: no disk"):
        jobs[1].result()
    assert [file.state() for file in (trained, failed, preempted)] == [
        State.FINISHED,
        State.FAILED,
        State.FINISHED,
    ]
    assert failed.failure() == "no disk"
    # What was cancelled waits for the end that Slurm makes, and has not failed.
    assert task_of(jobs[3]).is_running()
    assert cancelled.state() == State.INTERRUPTED


def test_a_fit_that_does_not_save_in_time_is_killed(study):
    Path("python").write_text(
        f"#!{sys.executable} -SE\nimport signal, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint('started', flush=True)\n"
        "time.sleep(60)\n"
    )
    file = files_of(study)[0]
    task = Training(file.run, save_s=0.3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("act_lightning.study.run_state.sys.executable", str(Path("python").resolve()))
        task._process = slurm_task._start(file)
    within(10, lambda: file.log.read_text() == "started\n")
    process = task._process
    assert task.checkpoint().function is task
    assert process.wait() == -signal.SIGKILL
    assert file.state() == State.WAITING
    assert file.failure() == ""


def test_a_task_leaves_a_run_to_the_process_that_has_it(study, monkeypatch):
    monkeypatch.setattr(slurm_task, "LOCK_S", 0.2)
    monkeypatch.setattr(slurm_task.signal, "signal", lambda number, handler: None)
    file = files_of(study)[0]
    lock = file._claim()
    assert Training(file.run, 1.0)() == State.RUNNING
    assert not file.log.exists()
    lock.close()
    file.results.parent.mkdir(parents=True)
    file.results.touch()
    (file.run.folder / "run.json").write_text('{"arguments": [], "finished": true}')
    assert Training(file.run, 1.0)() == State.FINISHED
    assert not file.log.exists()
    shutil.rmtree(file.run.folder)
