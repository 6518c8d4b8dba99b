"""How many ranks there are, how they meet, and what one of them says when it ends."""

import os
import signal
from pathlib import Path

import pytest
import torch.distributed as dist
from jsonargparse import Namespace
from lightning.fabric.plugins.environments import (
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from act_lightning import cli, launch, rank_process
from act_lightning.launch import LaunchConfig, Ranks, World, launched_world, settle
from act_lightning.main import EXIT_PREEMPTED, main
from act_lightning.rank_process import EXIT_FAILED, as_rank
from act_lightning.sim.ranks import ElsewhereError

TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "none",
    "WORLD_SIZE": "6",
    "LOCAL_WORLD_SIZE": "3",
    "GROUP_WORLD_SIZE": "2",
    "GROUP_RANK": "1",
    "RANK": "5",
    "LOCAL_RANK": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}
"""The last of three ranks on the second of two nodes."""
BATCH_SCRIPT = {"SLURM_NTASKS": "6", "SLURM_NTASKS_PER_NODE": "3", "SLURM_PROCID": "0"}
SRUN = BATCH_SCRIPT | {
    "SLURM_STEP_NUM_TASKS": "6",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_TASKS_PER_NODE": "3(x2)",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "2",
    "SLURM_NODEID": "1",
    "SLURM_NNODES": "2",
    "SLURM_JOB_ID": "7",
}
CHILD = {
    rank_process.LAUNCHER: "1",
    "LOCAL_WORLD_SIZE": "3",
    "WORLD_SIZE": "6",
    "NODE_RANK": "1",
    "LOCAL_RANK": "2",
}
"""Of a rank that the first rank of its node has started."""
ROOT = Path(__file__).parents[1]
EXPERIMENT = [f"--config={ROOT / 'experiments' / name}.yaml" for name in ("base", "debug")]


@pytest.fixture
def variables(monkeypatch):
    """The environment variables, of which none is known to a launcher."""
    started = ("SLURM", "TORCHELASTIC", "LOCAL_", "WORLD_", "GROUP_", "RANK", "MASTER_", "NODE_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(started)}
    monkeypatch.setattr(os, "environ", kept)
    # A trainer of several ranks leaves its rank there, and loggers of the next test would be mute.
    monkeypatch.setattr(rank_zero_only, "rank", 0)
    return kept


def trainer_settings(**changes):
    """Those of base.yaml, as far as they matter here."""
    settings = {"accelerator": "cpu", "devices": 1, "num_nodes": 1, "strategy": "auto"}
    settings |= {"plugins": None, "callbacks": None, "accumulate_grad_batches": 1}
    return Namespace(**(settings | changes))


def settled(*arguments, **changes):
    trainer = trainer_settings(**changes)
    settle(trainer, ["fit", *arguments], LaunchConfig())
    return trainer


# ---- the number of ranks ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("started", "world"),
    [
        ({}, None),
        (TORCHRUN, World(launcher="torchrun", num_nodes=2, devices=3)),
        (SRUN, World(launcher="srun", num_nodes=2, devices=3)),
        (BATCH_SCRIPT, None),
        (SRUN | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NUM_NODES": "1"}, None),
    ],
)
def test_the_launcher_says_how_many_ranks_there_are(variables, started, world):
    variables.update(started)
    assert launched_world() == world


@pytest.mark.parametrize(
    "started",
    [
        TORCHRUN | {"WORLD_SIZE": "5"},
        SRUN | {"SLURM_STEP_NUM_TASKS": "5"},
        SRUN | {"SLURM_STEP_TASKS_PER_NODE": "4,2"},
    ],
)
def test_nodes_with_different_numbers_of_ranks_are_refused(variables, started):
    variables.update(started)
    with pytest.raises(ValueError, match="has started [56] ranks, not the same number on each"):
        launched_world()


@pytest.mark.parametrize("started", [TORCHRUN, SRUN])
def test_settings_of_files_give_way_to_the_launcher(variables, started):
    variables.update(started)
    for given in ({}, {"devices": 8, "num_nodes": 4}, {"devices": "auto"}, {"devices": [0, 1]}):
        trainer = settled(**given)
        assert (trainer.devices, trainer.num_nodes) == (3, 2)
    for argument, devices in (("3", 3), ("auto", "auto"), ("-1", -1)):
        assert settled(f"--trainer.devices={argument}", devices=devices).devices == 3
    assert settled("--trainer.devices", "4,5,6", devices="4,5,6").devices == 3
    assert settled("--trainer.devices=[4,5,6]", devices=[4, 5, 6]).devices == [4, 5, 6]
    assert settled(devices=[4, 5, 6]).devices == [4, 5, 6]


@pytest.mark.parametrize("started", [TORCHRUN, SRUN])
@pytest.mark.parametrize(
    ("name", "value"), [("devices", 2), ("devices", "0,1"), ("devices", [0]), ("num_nodes", 1)]
)
def test_an_argument_that_contradicts_the_launcher_is_refused(variables, started, name, value):
    variables.update(started)
    message = rf"--trainer.{name}=.*has started 3 ranks on each of 2 nodes.*leave the argument out"
    with pytest.raises(ValueError, match=message):
        settled(f"--trainer.{name}={value}", **{name: value})


def test_lightning_sees_the_same_ranks(variables):
    for started, environment in ((TORCHRUN, TorchElasticEnvironment), (SRUN, SLURMEnvironment)):
        variables.update(started)
        settings = settled().as_dict()
        trainer = Trainer(**settings, logger=False, enable_checkpointing=False)
        seen = trainer.world_size, trainer.global_rank, trainer.local_rank, trainer.node_rank
        assert seen == (6, 5, 2, 1)
        found = trainer._accelerator_connector.cluster_environment
        assert isinstance(found, environment)
        found.validate_settings(trainer.num_devices, trainer.num_nodes)
        for name in started:
            del variables[name]
    assert not found.auto_requeue  # of Slurm: Lightning would requeue the job by itself


def test_srun_need_not_name_the_tasks_of_a_node(variables):
    variables.update(SRUN)
    del variables["SLURM_NTASKS_PER_NODE"]
    settled().plugins[0].validate_settings(3, 2)


def test_the_script_of_a_batch_job_is_a_process_by_itself(variables):
    variables.update(BATCH_SCRIPT)
    trainer = settled()
    assert (trainer.devices, trainer.num_nodes, trainer.strategy) == (1, 1, "auto")
    assert isinstance(trainer.plugins[0], LightningEnvironment)


# ---- how they work together ---------------------------------------------------------------------


def test_one_process_is_left_as_it_is(variables):
    before = dict(variables)
    assert settled() == trainer_settings()
    assert settled(devices="auto") == trainer_settings(devices="auto")  # one on a CPU
    assert variables == before


def test_ranks_started_here_average_gradients_while_they_compute(variables):
    strategy = settled(devices=2).strategy
    assert isinstance(strategy, Ranks)
    wanted = {"static_graph": True, "gradient_as_bucket_view": True}
    wanted |= {"find_unused_parameters": False, launch.SYNC_BUFFERS: False}
    assert strategy._ddp_kwargs == wanted
    assert variables[rank_process.LAUNCHER] == str(os.getpid())
    assert isinstance(settled(num_nodes=2).strategy, Ranks)


@pytest.mark.parametrize(
    "changes",
    [{"accumulate_grad_batches": 2}, {"callbacks": [GradientAccumulationScheduler({0: 1, 4: 2})]}],
)
def test_no_static_graph_where_gradients_are_accumulated(variables, changes):
    assert not settled(devices=2, **changes).strategy._ddp_kwargs["static_graph"]


def test_a_strategy_or_environment_of_the_users_stays(variables):
    own = DDPStrategy(cluster_environment=LightningEnvironment())
    for strategy in ("ddp", "fsdp", own):
        assert settled(devices=2, strategy=strategy).strategy is strategy
    variables.update(SRUN)
    assert settled(strategy=own).plugins is None
    environment = LightningEnvironment()
    assert settled(plugins=[environment]).plugins == [environment]


@pytest.mark.parametrize("name", ["start_timeout_s", "timeout_min"])
def test_no_wait_is_endless(name):
    with pytest.raises(ValueError, match=rf"launch.{name}=0"):
        LaunchConfig(**{name: 0})


# ---- what a rank says when it ends --------------------------------------------------------------

GONE = [
    RuntimeError(
        "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:561] Connection closed by peer "
        "[127.0.0.1]:10402. This is typically caused by a remote worker crashing."
    ),
    RuntimeError("[pair.cc:545] Read error [127.0.0.1]:18326: Connection reset by peer. This is"),
    RuntimeError("Application timeout caused pair closure"),
    dist.DistNetworkError("Failed to recv, got 0 bytes. Connection was likely closed. Did the"),
    dist.DistBackendError("NCCL error: remote process exited or there was a network error"),
]
"""What the libraries have been seen to raise."""
LATE = "[unbound_buffer.cc:78] Timed out waiting 8000ms for recv operation to complete"


def told(error, capsys, monkeypatch):
    """What a rank prints that ends of `error`, with an exit code that srun returns if it failed."""
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    monkeypatch.setattr(rank_process, "GRACE_S", 0.0)
    monkeypatch.setattr(rank_process.socket, "gethostname", lambda: "node7")
    monkeypatch.setattr(rank_process, "_launcher", lambda: None)
    with as_rank():
        raise error
    text = capsys.readouterr().err.strip()
    highest = text.startswith("error") and "SLURM_STEP_NUM_TASKS" in os.environ
    assert codes == [EXIT_FAILED if highest else 1]
    assert EXIT_FAILED > EXIT_PREEMPTED
    return text


@pytest.mark.parametrize("started", [TORCHRUN, SRUN, CHILD])
def test_an_error_names_its_rank(variables, capsys, monkeypatch, started):
    variables.update(started)
    text = told(FileNotFoundError("data/a.zarr is missing"), capsys, monkeypatch)
    assert text == "error on rank 5 of 6 (node7): data/a.zarr is missing"


def test_a_fault_of_the_program_shows_where_it_happened(variables, capsys, monkeypatch):
    variables.update(TORCHRUN)
    first, second, *_ = told(KeyError("qpos"), capsys, monkeypatch).splitlines()
    assert first == "error on rank 5 of 6 (node7): 'qpos'"
    assert second.startswith("Traceback")


def test_torchrun_is_told_the_error_too(variables, capsys, monkeypatch, tmp_path):
    variables.update(TORCHRUN, TORCHELASTIC_ERROR_FILE=str(tmp_path / "error.json"))
    told(GONE[0], capsys, monkeypatch)
    assert not any(tmp_path.iterdir())  # it shows the first one that it is told
    told(ValueError("no such thing"), capsys, monkeypatch)
    assert "no such thing" in (tmp_path / "error.json").read_text()


@pytest.mark.parametrize("error", GONE, ids=str)
def test_a_rank_that_sees_another_gone_says_so_in_one_line(variables, capsys, monkeypatch, error):
    variables.update(SRUN)
    text = told(error, capsys, monkeypatch)
    assert text.startswith("rank 5 of 6 (node7) stopped, because another rank ended")
    assert "\n" not in text


def test_a_rank_that_hears_of_an_error_says_where_it_was(variables, capsys, monkeypatch):
    variables.update(SRUN)
    text = told(ElsewhereError("rank 2: OSError: disk full"), capsys, monkeypatch)
    assert text == (
        "rank 5 of 6 (node7) stopped, because another rank failed: rank 2: OSError: disk full"
    )


def test_a_rank_that_does_not_come_is_an_error(variables, capsys, monkeypatch):
    variables.update(SRUN)
    text = told(RuntimeError(LATE), capsys, monkeypatch)
    assert text.startswith("error on rank 5 of 6 (node7): another rank did not come")
    assert "launch.timeout_min" in text


@pytest.mark.parametrize(
    "error",
    [
        ConnectionResetError("s3://a: Connection reset by peer"),
        RuntimeError("a loader process ended unexpectedly (Connection reset by peer)"),
    ],
)
def test_an_error_that_only_sounds_like_it_is_told_in_full(variables, capsys, monkeypatch, error):
    variables.update(SRUN)
    text = told(error, capsys, monkeypatch)
    assert text == f"error on rank 5 of 6 (node7): {error}"


def test_a_process_by_itself_ends_as_ever(variables, capsys):
    with pytest.raises(ValueError, match="as ever"), as_rank():
        raise ValueError("as ever")
    assert main(["fit", *EXPERIMENT, "--trainer.devices=bad"]) == 1
    error = capsys.readouterr().err
    assert "error: trainer.devices=bad; give a number of devices" in error
    assert "on rank" not in error


@pytest.mark.parametrize(
    ("number", "error", "code"),
    [
        (signal.SIGTERM, GONE[0], EXIT_PREEMPTED),
        (signal.SIGINT, GONE[0], 1),
        (signal.SIGTERM, RuntimeError("no such world"), None),
        (None, GONE[0], None),
    ],
)
def test_a_rank_that_was_asked_to_end_and_then_loses_another(monkeypatch, number, error, code):
    def train(args, stop):
        stop.signal = number
        raise error

    monkeypatch.setattr(cli, "ACTCLI", train)
    if code is None:
        with pytest.raises(RuntimeError):
            cli.fit_verb([])
    else:
        with pytest.raises(SystemExit) as end:
            cli.fit_verb([])
        assert end.value.code == code
