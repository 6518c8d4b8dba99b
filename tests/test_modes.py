"""Measures and pictures of sampled modes, and the callback that makes them in a run."""

import json
from dataclasses import dataclass
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from act_lightning.batch import Observation
from act_lightning.callbacks import RolloutCallback
from act_lightning.main import main
from act_lightning.module import ACTModule
from act_lightning.nets.chunk_net import ChunkNet, ChunkNetConfig, Evaluation
from act_lightning.sim.config import EnvConfig
from act_lightning.sim.detour import ENV_ID, NUM_STEPS, mode_paths
from act_lightning.sim.env import data_spec
from act_lightning.study.modes import (
    ModesCallback,
    chunk_distances,
    draw_modes,
    measure_modes,
    sample_chunks,
)

ROOT = Path(__file__).parent.parent
TWO, FOUR = mode_paths(1), mode_paths(2)
ENV = EnvConfig(
    task=ENV_ID,
    observation_keys={"qpos": "time"},
    env_state=False,
    max_episode_steps=NUM_STEPS,
    make_kwargs={"num_obstacles": 1},
)


def repeated(modes, counts):
    return np.repeat(modes, counts, axis=0)


def test_distance_is_the_root_mean_square_over_the_steps():
    first = np.array([[[0.0, 0.0], [0.0, 0.0]]])
    second = np.array([[[3.0, 4.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 1.0]]])
    assert np.allclose(chunk_distances(first, second), [[5 / np.sqrt(2), 1 / np.sqrt(2)]])


def test_all_in_one_mode():
    metrics = measure_modes(repeated(TWO, [10, 0]), TWO, 0.05)
    assert metrics.as_dict() == {
        "coverage": 0.5,
        "within_tolerance": 1.0,
        "distance": 0.0,
        "share_0": 1.0,
        "share_1": 0.0,
    }


def test_averaged_samples_are_of_no_mode():
    samples = repeated(TWO.mean(axis=0, keepdims=True), 10)
    metrics = measure_modes(samples, TWO, 0.05)
    half = chunk_distances(TWO[:1], TWO[1:]).item() / 2
    assert metrics.within_tolerance == metrics.coverage == 0
    assert metrics.shares == (0.0, 0.0)
    assert metrics.distance == pytest.approx(half)
    assert half > 5 * 0.05


def test_half_and_half():
    metrics = measure_modes(repeated(TWO, [6, 4]), TWO, 0.05)
    assert metrics.shares == (0.6, 0.4)
    assert metrics.within_tolerance == metrics.coverage == 1


def test_four_modes_and_samples_between_them():
    between = FOUR[:2].mean(axis=0, keepdims=True)
    samples = np.concatenate([repeated(FOUR, [4, 2, 1, 1]), repeated(between, 2)])
    metrics = measure_modes(samples, FOUR, 0.05)
    assert metrics.within_tolerance == pytest.approx(0.8)
    assert metrics.shares == (0.5, 0.25, 0.125, 0.125)
    assert metrics.coverage == 1


def test_a_mode_counts_as_found_from_a_quarter_of_its_even_part_on():
    """Of 160 samples 10 are 1 / (4 * 4); among all samples, not among those within tolerance."""
    assert measure_modes(repeated(FOUR, [50, 50, 50, 10]), FOUR, 0.05).coverage == 1
    assert measure_modes(repeated(FOUR, [50, 50, 51, 9]), FOUR, 0.05).coverage == 0.75
    far = repeated(FOUR[:1] + 1.0, 151)
    few = np.concatenate([far, repeated(FOUR, [0, 0, 0, 9])])
    assert measure_modes(few, FOUR, 0.05).coverage == 0


def test_border_of_the_tolerance():
    offset = np.zeros_like(TWO[0])
    offset[:, 1] = 0.0625  # exact in binary, and the distance of every step
    samples = TWO + offset
    assert measure_modes(samples, np.zeros((1, NUM_STEPS, 2)), 100.0).within_tolerance == 1
    zeros = np.zeros((1, NUM_STEPS, 2))
    assert measure_modes(zeros + offset, zeros, 0.0625).within_tolerance == 1
    assert measure_modes(zeros + offset, zeros, 0.0624).within_tolerance == 0


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"samples \(0, 20, 2\)"):
        measure_modes(TWO[:0], TWO, 0.05)
    with pytest.raises(ValueError, match=r"samples \(2, 10, 2\) and modes \(2, 20, 2\)"):
        measure_modes(TWO[:, :10], TWO, 0.05)
    with pytest.raises(ValueError, match=r"tolerance=0: give more than 0"):
        measure_modes(TWO, TWO, 0)
    with pytest.raises(ValueError, match=r"tolerance=0.31.*less than half.*0.306"):
        measure_modes(TWO, TWO, 0.31)
    with pytest.raises(ValueError, match="num_samples=0"):
        ModesCallback(num_samples=0)


def test_figure_shows_samples_and_modes(tmp_path):
    figure = Figure(figsize=(3, 2), dpi=50)
    axes = figure.subplots()
    draw_modes(axes, repeated(TWO, [3, 2]), TWO, "title")
    assert len(axes.lines) == 5 + 2
    assert axes.get_title() == "title"
    figure.savefig(tmp_path / "modes.png")
    with Image.open(tmp_path / "modes.png") as picture:
        assert picture.size == (150, 100)
        assert np.asarray(picture).std() > 0


# --- the callback, on a net that answers as it is told ---


@dataclass(frozen=True, kw_only=True)
class ToldConfig(ChunkNetConfig):
    """A quarter of the seeds gets the mean of the modes; the others a mode each, in turn."""

    def build(self, spec, stats=None, *, pretrained=True):
        return Told(self, spec, stats)


class Told(ChunkNet):
    def __init__(self, config, spec, stats):
        super().__init__(config, spec, stats)
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def losses(self, batch, step, noise=None):
        return {"loss": self.weight**2}

    def evaluate(self, batch, seeds):
        chunk = torch.zeros_like(batch.actions)
        return Evaluation({"l1_prior": self.weight.detach()}, {}, chunk)

    def sample(self, observation, seeds=None):
        assert seeds is not None
        assert (observation.qpos == 0).all(), "not the first observation of an episode"
        modes = torch.from_numpy(mode_paths()).float()
        answers = torch.stack([modes[0], modes[1], modes[0], modes.mean(dim=0)])
        return answers[seeds % 4]


def fit(tmp_path, callback, env=ENV, chunk_size=NUM_STEPS, **arguments):
    spec = data_spec(ENV)
    module = ACTModule(net=ToldConfig(chunk_size=chunk_size), spec=spec)
    world = RolloutCallback({}, env, episodes=0, final_episodes=0)
    batch = Observation(qpos=torch.zeros(1, 1))
    trainer = L.Trainer(
        accelerator="cpu",
        default_root_dir=tmp_path,
        max_steps=4,
        max_epochs=-1,
        val_check_interval=2,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[world, callback],
        **arguments,
    )
    trainer.fit(module, Batches(batch), Batches(batch, 1))
    return trainer


class Batches:
    """The same observation again and again; `number` of times, or without end."""

    def __init__(self, observation, number=10**9):
        self.observation, self.number = observation, number

    def __iter__(self):
        from act_lightning.batch import Batch

        actions, is_pad = torch.zeros(1, NUM_STEPS, 2), torch.zeros(1, NUM_STEPS, dtype=torch.bool)
        for _ in range(self.number):
            yield Batch(observation=self.observation, actions=actions, is_pad=is_pad)


def test_callback_logs_draws_prints_and_writes(tmp_path, capsys):
    logger = L.pytorch.loggers.TensorBoardLogger(tmp_path, name="run", version="v")
    fit(tmp_path, ModesCallback(num_samples=40), logger=logger)
    run = tmp_path / "run" / "v"
    expected = {
        "step": 4,
        "coverage": 1.0,
        "within_tolerance": 0.75,
        "share_0": pytest.approx(2 / 3),
        "share_1": pytest.approx(1 / 3),
        "distance": pytest.approx(0.25 * chunk_distances(TWO[:1], TWO[1:]).item() / 2, rel=1e-5),
        "num_samples": 40,
        "tolerance": 0.05,
        "num_modes": 2,
    }
    assert json.loads((run / "modes.json").read_text()) == expected
    assert "75.0% of 40 samples within 0.05 m" in capsys.readouterr().out
    events = EventAccumulator(str(run)).Reload()
    assert [event.step for event in events.Scalars("val/modes/share_0")] == [2, 4]
    assert events.Scalars("val/modes/within_tolerance")[0].value == 0.75
    assert [event.step for event in events.Images("val/modes")] == [2, 4]
    pictures = sorted(path.name for path in (run / "media").iterdir())
    assert pictures == ["step_000002_modes.png", "step_000004_modes.png"]


def test_samples_are_the_same_at_every_look():
    net = ToldConfig(chunk_size=NUM_STEPS).build(data_spec(ENV)).eval()
    first, second = (sample_chunks(net, ENV, 8) for _ in range(2))
    assert first.shape == (8, NUM_STEPS, 2)
    assert np.array_equal(first, second)


def test_other_ranks_keep_no_files(tmp_path, monkeypatch):
    logger = L.pytorch.loggers.TensorBoardLogger(tmp_path, name="run", version="v")
    monkeypatch.setattr(L.Trainer, "is_global_zero", False)
    fit(tmp_path, ModesCallback(num_samples=8), logger=logger)
    assert not list(tmp_path.rglob("*modes*"))


def test_callback_refuses_what_it_knows_no_modes_of(tmp_path):
    with pytest.raises(ValueError, match=f"{ENV_ID} only"):
        fit(tmp_path, ModesCallback(), env=EnvConfig(task="insertion"))
    with pytest.raises(ValueError, match=r"chunk_size=10; the modes are chunks of 20"):
        fit(tmp_path, ModesCallback(), chunk_size=10)
    with pytest.raises(ValueError, match="tolerance=0.5"):
        fit(tmp_path, ModesCallback(tolerance=0.5))
    callback = ModesCallback()
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    with pytest.raises(ValueError, match="no RolloutCallback"):
        callback.on_fit_start(trainer, ACTModule(net=ToldConfig(), spec=data_spec(ENV)))


# --- the shipped experiments, whole ---


def test_modes_are_logged_beside_rollouts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = [ROOT / "experiments" / name for name in ("base.yaml", "multimodal/act.yaml")]
    arguments = [*(f"--config={path}" for path in files), "--demonstrations.episodes=10"]
    assert main(["record", *arguments]) == 0
    arguments += ["--trainer.max_steps=2", "--rollout.episodes=2", "--rollout.final_episodes=0"]
    assert main(["fit", *arguments]) == 0
    events = EventAccumulator("runs/multimodal/act/version_0").Reload()
    for name in ("val/modes/within_tolerance", "rollout/success_rate"):
        assert [event.step for event in events.Scalars(name)] == [2]


def train_whole(folder, name):
    """Trains a shipped experiment; returns what it says of modes, and the success rate."""
    files = [ROOT / "experiments" / "base.yaml", ROOT / "experiments" / folder / f"{name}.yaml"]
    arguments = [f"--config={path}" for path in files]
    assert main(["record", *arguments]) == 0
    assert main(["fit", *arguments]) == 0
    run = Path("runs", folder, name, "version_0")
    results = json.loads((run / "results.json").read_text())
    assert list((run / "media").glob("*_modes.png"))
    return json.loads((run / "modes.json").read_text()) | {
        "success": results["execution"]["chunked"]["success_rate"]
    }


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_act_finds_both_modes(tmp_path, monkeypatch):
    """Four take twice as long to train: `make train EXP=multimodal_four`, experiments/LOG.md."""
    monkeypatch.chdir(tmp_path)
    act = train_whole("multimodal", "act")
    assert act["num_modes"] == 2
    assert act["within_tolerance"] >= 0.95
    assert act["coverage"] == 1
    assert all(0.35 <= act[f"share_{i}"] <= 0.65 for i in range(2))
    assert act["success"] > 0.9


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_behaviour_cloning_finds_the_mean_of_two_modes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bc = train_whole("multimodal", "bc")
    assert bc["within_tolerance"] < 0.05
    assert bc["success"] < 0.05
