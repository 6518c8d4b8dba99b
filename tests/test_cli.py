"""The command line: every experiment parses, linked settings agree, mistakes end in one message."""

import os
import subprocess
import sys
from ctypes.util import find_library
from pathlib import Path

import pytest
import yaml

from act_lightning import cli
from act_lightning.main import main
from act_lightning.sim.record import settings

ROOT = Path(__file__).parent.parent
BASE = ROOT / "experiments" / "base.yaml"
EXPERIMENTS = sorted(
    path
    for path in (ROOT / "experiments").rglob("*.yaml")
    if "studies" not in path.parts and path.name != "executions.yaml"
)


def configs(path):
    return ["--config", str(BASE), "--config", str(path)]


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_experiment_parses(path):
    reader = cli.ConfigReader(configs(path))
    assert reader.config.experiment in str(path)
    assert reader.config_init.rollout.env == reader.config_init.env
    assert set(reader.config_init.rollout.executions) <= {"chunked", "ensembled"}


def test_an_experiment_file_names_its_own_run():
    names = [yaml.safe_load(path.read_text())["experiment"] for path in EXPERIMENTS]
    assert len(set(names)) == len(names)


def test_experiments_that_share_a_store_record_the_same_into_it():
    recorded = {}
    for path in EXPERIMENTS:
        sections = cli.ConfigReader(configs(path)).config_init
        what = (sections.demonstrations.episodes, settings(sections.demonstrations, sections.env))
        assert recorded.setdefault(sections.demonstrations.path, what) == what


def test_the_network_is_chosen_by_its_class():
    bc = "act_lightning.nets.bc.BCConfig"
    reader = cli.ConfigReader([*configs(BASE), f"--model.net={bc}", "--model.net.dim_hidden=9"])
    assert reader.config.model.net.class_path == bc
    assert reader.config.model.net.init_args.dim_hidden == 9
    assert reader.config.data.chunk_size == 50, "what both classes have keeps its value"
    act = cli.ConfigReader([*configs(BASE), "--model.net.kl_schedule.weight=0.5"]).config.model.net
    assert act.class_path == "act_lightning.nets.act.ACTConfig"
    assert act.init_args.kl_schedule.weight == 0.5


def test_what_must_agree_is_set_once():
    config = cli.ConfigReader(
        [*configs(ROOT / "experiments" / "insertion.yaml"), "--model.net.chunk_size=23"]
    ).config
    assert config.data.chunk_size == 23
    assert config.data.path == config.demonstrations.path
    assert list(config.data.cameras) == list(config.env.cameras)
    assert config.data.use_env_state == config.env.env_state
    assert config.trainer.logger["init_args"]["name"] == "insertion"


def test_later_files_win_over_earlier_ones(tmp_path):
    override = tmp_path / "x.yaml"
    override.write_text("trainer: {max_steps: 30}\n")
    config = cli.ConfigReader(
        [*configs(ROOT / "experiments" / "debug.yaml"), "--config", str(override)]
    ).config
    assert config.trainer.max_steps == 30
    assert config.trainer.val_check_interval == 10


@pytest.mark.parametrize(("max_steps", "interval"), [(5, 5), (10, 10), (40, 10)])
def test_training_ends_validated(max_steps, interval):
    arguments = [*configs(ROOT / "experiments" / "debug.yaml"), f"--trainer.max_steps={max_steps}"]
    assert cli.ConfigReader(arguments).config.trainer.val_check_interval == interval


def test_steps_after_the_last_validation_are_refused(capsys):
    arguments = [*configs(ROOT / "experiments" / "debug.yaml"), "--trainer.max_steps=25"]
    assert main(["fit", *arguments]) == 1
    assert "trainer.max_steps=25 is not a multiple" in capsys.readouterr().err


def test_missing_store_is_one_message(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = main(["fit", *configs(ROOT / "experiments" / "debug.yaml")])
    assert code == 1
    error = capsys.readouterr().err
    assert "data/debug.zarr" in error
    assert "make data" in error
    assert "Traceback" not in error


def test_missing_run_is_one_message(capsys):
    assert main(["evaluate", "runs/none/version_0"]) == 1
    assert "runs/none/version_0 does not exist" in capsys.readouterr().err


def test_unknown_verb_and_help(capsys):
    assert main(["flit"]) == 2
    assert main(["--help"]) == 0
    assert "record" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argument", "described"),
    [
        ("--help", "Decoupled weight decay"),
        ("--model.net.help=act_lightning.nets.act.ACTConfig", "Attention heads."),
    ],
)
def test_help_describes_the_settings(capsys, argument, described):
    with pytest.raises(SystemExit):
        main(["fit", argument])
    assert described in capsys.readouterr().out


def test_unknown_setting_is_bad_usage(capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["fit", "--config", str(BASE), "--model.net.chunks=3"])
    assert exit_info.value.code == 2
    assert "chunks" in capsys.readouterr().err


def test_precision_follows_the_hardware(monkeypatch):
    for has, expected in ((True, "bf16-mixed"), (False, "32-true")):
        monkeypatch.setattr(cli, "has_bfloat16", lambda accelerator, has=has: has)
        assert cli.ConfigReader(configs(BASE)).config.trainer.precision == expected
    config = cli.ConfigReader([*configs(BASE), "--trainer.precision=64-true"]).config
    assert config.trainer.precision == "64-true"


@pytest.mark.slow
@pytest.mark.skipif(find_library("OSMesa") is None, reason="needs OSMesa")
@pytest.mark.parametrize("verb", ["fit", "sweep", "watch"])
def test_verbs_that_train_and_simulate_start_where_mesa_draws(verb):
    """Mesa's LLVM and triton's do not get along when they are loaded in the wrong order."""
    process = subprocess.run(
        [sys.executable, "-m", "act_lightning", verb, "--help"],
        env=os.environ | {"MUJOCO_GL": "osmesa", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
