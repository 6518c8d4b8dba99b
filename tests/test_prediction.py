"""The error of each step of the chunk: by hand, over ranks, and in whole runs."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from act_lightning.data.datamodule import ACTDataModule
from act_lightning.data.episode import Episode
from act_lightning.data.writer import StoreWriter
from act_lightning.main import main
from act_lightning.policy import Policy
from act_lightning.prediction import ErrorByHorizon, PredictionCallback
from act_lightning.sim.config import EnvConfig
from act_lightning.sim.detour import ENV_ID, NUM_STEPS
from act_lightning.sim.env import data_spec

ROOT = Path(__file__).parent.parent
CHUNK_SIZE, NUM_ACTIONS = 5, 3
NUM_EPISODES = 6
ENV = EnvConfig(
    task=ENV_ID,
    observation_keys={"qpos": "time"},
    env_state=False,
    max_episode_steps=NUM_STEPS,
    make_kwargs={"num_obstacles": 1},
)


def make_batches(*sizes):
    """Chunks, targets with rubbish where they are padded, and the padding; step 4 is never seen."""
    rng = np.random.default_rng(0)
    batches = []
    for size in sizes:
        chunk, target = rng.normal(size=(2, size, CHUNK_SIZE, NUM_ACTIONS)).astype(np.float32)
        ends = rng.integers(1, CHUNK_SIZE, size)
        is_pad = np.arange(CHUNK_SIZE) >= ends[:, None]
        target[is_pad] = np.nan
        target[0][is_pad[0]] = np.inf
        batches.append(tuple(map(torch.from_numpy, (chunk, target, is_pad))))
    return batches


def by_hand(batches):
    errors = [[] for _ in range(CHUNK_SIZE)]
    for chunk, target, is_pad in batches:
        for row in range(len(chunk)):
            for step in range(CHUNK_SIZE):
                if not is_pad[row, step]:
                    pairs = zip(chunk[row, step], target[row, step], strict=True)
                    errors[step].append(sum(abs(float(a - b)) for a, b in pairs) / NUM_ACTIONS)
    return [sum(found) / len(found) if found else float("nan") for found in errors]


def measured(batches):
    metric = ErrorByHorizon(CHUNK_SIZE)
    for batch in batches:
        metric.update(*batch)
    return metric


def test_errors_are_those_by_hand():
    batches = make_batches(7, 1, 4)
    expected = by_hand(batches)
    assert np.isnan(expected[-1])
    assert np.isfinite(expected[:-1]).all()
    computed = measured(batches).compute()
    assert computed.numpy() == pytest.approx(expected, rel=1e-6, nan_ok=True)


def test_ranks_count_by_what_they_saw():
    """One sees much, the other little: not the mean of their means."""
    batches = make_batches(9, 2)
    first, second = (measured([batch]) for batch in batches)
    others = iter((second.sum_error, second.num_actions))
    first.distributed_available_fn = lambda: True
    first.dist_sync_fn = lambda value, group=None: [value, next(others)]
    assert first.compute().numpy() == pytest.approx(by_hand(batches), rel=1e-6, nan_ok=True)


def test_a_step_that_no_demonstration_reaches_is_none():
    callback, logged = PredictionCallback(), {}
    callback._errors = measured(make_batches(6))
    module = SimpleNamespace(log_dict=lambda values, sync_dist: logged.update(values))
    callback.on_validation_epoch_end(SimpleNamespace(global_step=3), module)
    assert callback.summary["step"] == 3
    assert callback.summary["l1_by_horizon"][-1] is None
    assert None not in callback.summary["l1_by_horizon"][:-1]
    assert logged.keys() == {"val/l1_first"}
    json.dumps(callback.summary, allow_nan=False)


def test_without_a_validation_there_is_nothing():
    callback, checkpoint = PredictionCallback(), {}
    callback.on_validation_epoch_end(None, None)
    callback.on_save_checkpoint(None, None, checkpoint)
    assert (callback.summary, checkpoint) == (None, {})


# --- in a run ---


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prediction")
    rng = np.random.default_rng(0)
    spec = data_spec(ENV)
    with StoreWriter.create(folder / "data.zarr", spec, {}, NUM_EPISODES) as writer:
        for i in range(NUM_EPISODES):
            time = np.linspace(-1, 1, NUM_STEPS)[:, None]
            writer.append(Episode(qpos=time, actions=rng.normal(size=(NUM_STEPS, 2)), id=i))
    return folder


def arguments(net):
    files = [ROOT / "experiments" / name for name in ("base.yaml", f"multimodal/{net}.yaml")]
    return [
        *(f"--config={path}" for path in files),
        "--demonstrations.path=data.zarr",
        "--data.val_fraction=0.5",
        "--data.batch_size=16",
        "--trainer.max_steps=4",
        "--trainer.val_check_interval=2",
        "--trainer.callbacks=[]",
        "--rollout.episodes=0",
        "--rollout.final_episodes=1",
        "--rollout.final_media=false",
        "--rollout.num_workers=1",
        "--model.net.init_args.chunk_size=12",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("net", ["act", "bc"])
def test_results_say_the_errors_of_the_graded_checkpoint(project, monkeypatch, net):
    monkeypatch.chdir(project)
    zero = ["--model.net.init_args.latent_at_inference=zero"] if net == "act" else []
    assert main(["fit", *arguments(net), *zero]) == 0
    run = Path("runs/multimodal", net, "version_0")
    found = json.loads((run / "results.json").read_text())["prediction"]

    best = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    policy = Policy.from_checkpoint(run / "checkpoints" / "best.ckpt")
    data = ACTDataModule(path="data.zarr", batch_size=7, chunk_size=12, val_fraction=0.5)
    sums, counts = np.zeros(12), np.zeros(12)
    for batch in data.val_dataloader():
        chunk = policy.net.normalizer.normalize_actions(policy.predict_chunk(batch.observation))
        target = policy.net.normalizer.normalize_actions(batch.actions)
        error = (chunk - target).abs().mean(dim=2).numpy()
        is_real = ~batch.is_pad.numpy()
        sums += np.where(is_real, error, 0).sum(axis=0)
        counts += is_real.sum(axis=0)
    assert counts[0] == 3 * NUM_STEPS
    assert counts[-1] == 3 * (NUM_STEPS - 11)
    assert found["step"] == best["global_step"]
    assert found["l1_by_horizon"] == pytest.approx((sums / counts).tolist(), rel=1e-4)

    events = EventAccumulator(str(run)).Reload()
    for tag, end in (("val/l1_first", 0), ("val/l1_last", -1)):
        logged = [event.value for event in events.Scalars(tag)]
        assert len(logged) == 2
        assert logged[found["step"] // 2 - 1] == pytest.approx(found["l1_by_horizon"][end])
    assert [e.step for e in events.Scalars("val/l1_first")] == [
        e.step for e in events.Scalars("val/l1_prior")
    ]
