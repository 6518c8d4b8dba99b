"""`profile`: what it leaves behind, what it says, and that it is no training."""

import json
import os
import re
import signal
from itertools import pairwise

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from test_bad_input import PIXELS, STATE, has, refusal, write_store
from torch import nn
from torch.profiler import ProfilerActivity, profile

from act_lightning.main import main
from act_lightning.profiling import ProfileConfig, operator_table


@pytest.fixture(autouse=True)
def inside(tmp_path, monkeypatch):
    """A working directory of its own, with demonstrations."""
    write_store(tmp_path / "state.zarr")
    write_store(tmp_path / "pixels.zarr", cameras=("top",))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def rows(text):
    """Calls, own ms and share a step, by operator, in the order of the table."""
    found = re.findall(r"^ +(\S+) +([\d.]+) +([\d.]+) +([\d.]+)% +[\d.]+ *$", text, re.M)
    return {name: tuple(map(float, numbers)) for name, *numbers in found}


def test_profile_leaves_a_trace_and_a_table_and_nothing_that_looks_trained(inside, capsys):
    assert main(["profile", *PIXELS, "--steps=2", "--warmup", "1"]) == 0
    folder = inside / "runs/debug/profile"
    said = capsys.readouterr().out
    has(said, "runs/debug/profile/trace.json", "runs/debug/profile/operators.txt")

    text = (folder / "operators.txt").read_text()
    table = rows(text)
    assert text.startswith("2 steps of ")
    assert re.search(r"^ *[\d,]+ page faults a step", text, re.M)
    has(said, *list(table)[:5])
    times = [own for _, own, _ in table.values()]
    assert times == sorted(times, reverse=True)
    assert 50 < sum(share for *_, share in table.values()) <= 100.5

    trace = json.loads((folder / "trace.json").read_text())["traceEvents"]
    steps = sorted(e["ts"] for e in trace if e["name"].startswith("ProfilerStep#"))
    assert len(steps) == 2
    called = {name: sum(event["name"] == name for event in trace) for name in table}
    # Less where torch counts an operator that only calls itself as one.
    assert all(2 * calls <= called[name] for name, (calls, *_) in table.items())
    assert 2 * table["aten::addmm"][0] == called["aten::addmm"] > 0
    assert {"aten::convolution", "aten::_fused_adamw_"} <= {event["name"] for event in trace}
    for start, end in pairwise([*steps, float("inf")]):
        updates = [e for e in trace if e["name"] == "aten::_fused_adamw_"]
        assert sum(start <= e["ts"] < end for e in updates) == 2, "backbone and the rest"

    assert not list(inside.rglob("*.ckpt"))
    assert not list(inside.rglob("results.json"))
    assert (folder / "config.yaml").is_file(), "it says what was profiled"


def test_a_profile_takes_the_place_of_the_last_one_but_not_of_a_training(inside, capsys):
    arguments = ["profile", *STATE, "--steps=1", "--warmup=0", "--run=a"]
    for _ in range(2):
        assert main(arguments) == 0
    folder = inside / "runs/debug/a"
    before = (folder / "trace.json").read_bytes()
    (folder / "checkpoints").mkdir()
    has(refusal(capsys, *arguments), "runs/debug/a is a training's", "--run")
    assert (folder / "trace.json").read_bytes() == before


class Interrupt(Callback):
    """Ctrl-C in the second step."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 1:
            os.kill(os.getpid(), signal.SIGINT)


def test_a_profile_that_was_interrupted_saves_nothing_and_can_be_repeated(inside):
    arguments = ["profile", *STATE, "--steps=1", "--warmup=2"]
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit):
        main([*arguments, "--trainer.callbacks+=test_profile.Interrupt"])
    signal.signal(signal.SIGINT, handler)  # Lightning leaves it ignored
    folder = inside / "runs/debug/profile"
    assert folder.is_dir()
    assert not (folder / "checkpoints").exists()
    assert main(arguments) == 0
    assert (folder / "trace.json").is_file()


@pytest.mark.parametrize(
    ("argument", "parts"),
    [
        ("--steps=0", ("--steps=0", "1 or more")),
        ("--warmup=-1", ("--warmup=-1", "0 or more")),
        ("--trainer.max_steps=9", ("--trainer.max_steps", "--steps and --warmup")),
        ("--ckpt_path=last", ("--ckpt_path", "starts anew")),
        ("--trainer.max_epochs=0", ("ended before step 13", "trainer.max_epochs")),
    ],
)
def test_what_is_wrong_is_said(argument, parts, capsys):
    has(refusal(capsys, "profile", *STATE, argument), *parts)


def test_own_times_add_up_to_the_time_of_the_whole():
    """Against the profiler's own sum: no operator counts for another that it called."""
    net = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        for _ in range(4):
            net(torch.zeros(2, 8))
    averages = recorded.key_averages()
    table = operator_table(averages, steps=4, seconds=0.1)
    own = sum(float(cell) for cell in table.columns[2].cells)
    assert own == pytest.approx(averages.self_cpu_time_total / 4e3, abs=0.005)
    assert list(table.columns[0].cells).count("aten::linear") == 1
    assert (
        dict(zip(table.columns[0].cells, table.columns[1].cells, strict=True))["aten::addmm"] == "1"
    )


def test_by_default_a_step_that_logs_is_recorded():
    config = ProfileConfig()
    first = config.max_steps - config.steps
    assert first < 10 <= config.max_steps
