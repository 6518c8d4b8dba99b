"""What a run says about its latent: measured right, kept in the checkpoint, said once."""

import json
import multiprocessing
from dataclasses import replace
from itertools import count

import numpy as np
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.distributions import Normal, kl_divergence

from act_lightning import evaluation
from act_lightning.batch import Batch, DataSpec, Observation
from act_lightning.execution import ExecutionConfig
from act_lightning.latent import LatentCallback, LatentStatistics, describe_latent
from act_lightning.module import ACTModule, OptimizerConfig
from act_lightning.nets.act import ACTConfig
from act_lightning.nets.losses import KLSchedule
from act_lightning.nets.normalize import Stats
from act_lightning.sim.config import EnvConfig
from act_lightning.sim.results import EpisodeResult

# ---- the statistics -----------------------------------------------------------------------------


def make_posteriors(rows, scales=(1.0, 0.5, 0.0), seed=0):
    """Means whose standard deviations over the data are about `scales`."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.tensor(scales)
    mu = 3.0 + scale * torch.randn(rows, len(scales), generator=generator)
    return mu, torch.randn(rows, len(scales), generator=generator)


def measure(mu, logvar, batches):
    statistics = LatentStatistics(mu.shape[1])
    for part in batches:
        statistics.update(mu[part], logvar[part])
    return statistics.compute()


def test_statistics_of_unequal_batches_are_those_of_all_rows():
    mu, logvar = make_posteriors(11)
    report = measure(mu, logvar, [slice(0, 4), slice(4, 10), slice(10, 11)])
    posterior = Normal(mu.double(), (0.5 * logvar.double()).exp())
    kl = kl_divergence(posterior, Normal(0.0, 1.0)).mean(dim=0)
    torch.testing.assert_close(report.kl_per_dim, kl, rtol=1e-9, atol=0)
    assert report.kl.item() == pytest.approx(kl.sum().item())
    np.testing.assert_allclose(report.variance, np.var(mu.double().numpy(), axis=0), atol=1e-12)
    assert report.active_units == 2


def test_units_are_active_above_a_hundredth_of_variance():
    # A mean of +-sd has variance sd^2.
    signs = torch.tensor([-1.0, 1.0, 1.0, -1.0])[:, None]
    mu = signs * torch.tensor([0.0101, 0.0099, 0.5, 0.0]).sqrt()
    assert measure(mu, torch.zeros_like(mu), [slice(0, 4)]).active_units == 2


def test_a_mean_far_from_zero_does_not_hide_or_feign_variance():
    """In float32, where 1000^2 has a spacing of 0.06, both would be noise."""
    signs = torch.tensor([-1.0, 1.0]).repeat(500)[:, None]
    mu = 1000.0 + signs * torch.tensor([0.125, 0.0625])
    report = measure(mu, torch.zeros_like(mu), [slice(i, i + 100) for i in range(0, 1000, 100)])
    np.testing.assert_allclose(report.variance, [0.125**2, 0.0625**2], rtol=1e-6)
    assert report.active_units == 1


def test_a_constant_posterior_is_inactive_however_far_from_the_prior():
    mu = torch.full((7, 2), 3.1)
    report = measure(mu, torch.full((7, 2), -2.0), [slice(0, 3), slice(3, 7)])
    assert report.active_units == 0
    assert (report.variance >= 0).all()
    assert (report.kl_per_dim > 1).all()


def test_half_precision_is_accumulated_exactly():
    mu = make_posteriors(64)[0].bfloat16()
    report = measure(mu, torch.zeros_like(mu), [slice(0, 64)])
    np.testing.assert_allclose(report.variance, np.var(mu.double().numpy(), axis=0), rtol=1e-9)


# 3 rows on one rank and 8 on the other: a mean over the ranks' means would be wrong.
SHARES = (slice(0, 3), slice(3, 11))


def test_ranks_add_up():
    """What synchronising does with two ranks' states, without a second process."""
    mu, logvar = make_posteriors(11)
    ranks = [LatentStatistics(mu.shape[1]) for _ in SHARES]
    for rank, rows in zip(ranks, SHARES, strict=True):
        rank.update(mu[rows], logvar[rows])
    names = iter(["num_rows", "sum_kl", "sum_mu", "sum_squares"])

    def gather(state, group):
        gathered = [getattr(rank, name) for name in [next(names)] for rank in ranks]
        assert torch.equal(gathered[0], state)
        return gathered

    expected = measure(mu, logvar, [slice(0, 11)])
    assert ranks[0].compute().active_units <= expected.active_units
    with ranks[0].sync_context(dist_sync_fn=gather, distributed_available=lambda: True):
        assert ranks[0].num_rows == 11
        torch.testing.assert_close(ranks[0].sum_mu, mu.double().sum(dim=0))
    assert ranks[0].num_rows == 3


def rank_report(rank, meeting_point):
    """What one of two processes computes from its share of the rows."""
    dist.init_process_group("gloo", init_method=f"file://{meeting_point}", rank=rank, world_size=2)
    mu, logvar = make_posteriors(11)
    report = measure(mu, logvar, [SHARES[rank]])
    dist.destroy_process_group()
    return tuple(report)


@pytest.mark.slow
def test_two_ranks_compute_what_one_does(tmp_path):
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        arguments = [(rank, tmp_path / "meeting_point") for rank in (0, 1)]
        reports = pool.starmap(rank_report, arguments, chunksize=1)
    mu, logvar = make_posteriors(11)
    for report in reports:
        for ours, whole in zip(report, measure(mu, logvar, [slice(0, 11)]), strict=True):
            torch.testing.assert_close(ours, whole, rtol=1e-12, atol=1e-12)


# ---- runs ---------------------------------------------------------------------------------------

SPEC = DataSpec(task="t", fps=50, dim_qpos=3, dim_action=2)
NET = ACTConfig(
    chunk_size=4,
    dim_model=16,
    num_heads=2,
    dim_feedforward=32,
    dropout=0.0,
    num_cvae_layers=1,
    num_obs_layers=1,
    dim_latent=4,
)
ALIVE = replace(NET, kl_schedule=KLSchedule(weight=0.0))
COLLAPSING = replace(NET, kl_schedule=KLSchedule(weight=100.0))
WITHOUT = replace(NET, use_cvae=False)


def make_batch(seed):
    generator = torch.Generator().manual_seed(seed)
    return Batch(
        observation=Observation(qpos=torch.randn(8, 3, generator=generator)),
        actions=torch.randn(8, 4, 2, generator=generator),
        is_pad=torch.zeros(8, 4, dtype=torch.bool),
    )


class EndlessBatches:
    def __iter__(self):
        return map(make_batch, count())


class Validation:
    """Not a list, which Lightning takes for several loaders."""

    def __iter__(self):
        return map(make_batch, (1000, 1001))


def fit(folder, net, steps=60, ckpt_path=None, **arguments):
    """Trains a tiny network as the command line does: same loggers, same kinds of checkpoint."""
    torch.manual_seed(0)
    module = ACTModule(net, SPEC, Stats.identity(SPEC), OptimizerConfig(lr=1e-2))
    callback = LatentCallback()
    best = ModelCheckpoint(
        folder / "checkpoints", "best", monitor="val/l1_prior", save_on_train_epoch_end=False
    )
    trainer = Trainer(
        **{
            "accelerator": "cpu",
            "max_steps": steps,
            "max_epochs": -1,
            "val_check_interval": steps // 2,
            "check_val_every_n_epoch": None,
            "num_sanity_val_steps": 2,
            "log_every_n_steps": 5,
            "logger": TensorBoardLogger(folder, name="", version=""),
            # The checkpoint first: Lightning must move it behind what it is to contain.
            "callbacks": [best, callback],
            "enable_progress_bar": False,
            "enable_model_summary": False,
        }
        | arguments
    )
    trainer.fit(module, EndlessBatches(), Validation(), ckpt_path=ckpt_path, weights_only=True)
    return trainer, module, callback


def load(path):
    return torch.load(path, weights_only=True)["act_lightning"]


def test_a_live_latent_is_measured_and_nothing_is_said(tmp_path, capsys):
    trainer, module, callback = fit(tmp_path, ALIVE)
    assert "collapsed" not in capsys.readouterr().out
    summary = callback.summary
    module.eval()
    with torch.no_grad():
        posteriors = [
            module.net.posterior(b.observation, b.actions, b.is_pad) for b in Validation()
        ]
    mu, logvar = (torch.cat(values) for values in zip(*posteriors, strict=True))
    variance = mu.var(dim=0, correction=0)
    kl = kl_divergence(Normal(mu, (0.5 * logvar).exp()), Normal(0.0, 1.0)).mean(dim=0)
    assert summary["active_units"] == (variance > 0.01).sum() > 0
    assert summary["collapsed"] is False
    assert summary["kl"] == pytest.approx(kl.sum().item(), rel=1e-4)
    assert summary["kl_max_dim"] == pytest.approx(kl.max().item(), rel=1e-4)
    assert (summary["dim_latent"], summary["step"]) == (4, 60)
    for name in ("l1_prior", "l1_posterior", "l1_sampled"):
        assert summary[name] == float(trainer.callback_metrics[f"val/{name}"])
    assert trainer.callback_metrics["val/active_units"] == summary["active_units"]
    assert trainer.callback_metrics["val/kl"] == pytest.approx(summary["kl"], rel=1e-4)


def test_histograms_are_of_the_validations_alone(tmp_path):
    """One at each of the two, none at the sanity check before training."""
    callback = fit(tmp_path, ALIVE)[2]
    events = EventAccumulator(str(tmp_path), size_guidance={"histograms": 0}).Reload()
    histograms = events.Histograms("val/kl_per_dim")
    assert [event.step for event in histograms] == [30, 60]
    last = histograms[-1].histogram_value
    assert last.num == 4
    assert last.sum == pytest.approx(callback.summary["kl"])
    assert last.max == pytest.approx(callback.summary["kl_max_dim"])
    for name in ("val/active_units", "val/kl_max_dim"):
        assert len(events.Scalars(name)) == 2


def test_a_collapsed_latent_is_told_once_and_what_to_do(tmp_path, capsys):
    summary = fit(tmp_path, COLLAPSING)[2].summary
    assert (summary["collapsed"], summary["active_units"]) == (True, 0)
    assert summary["kl"] < 0.1
    assert summary["l1_posterior"] == pytest.approx(summary["l1_prior"], rel=0.02)
    output = capsys.readouterr().out
    assert output.count("collapsed") == 1
    for part in ("behaviour cloning", "kl_schedule.weight", "free_bits", "use_cvae=false"):
        assert part in output
    assert f"{summary['l1_prior']:.4f} with z = 0" in output


def test_without_a_latent_there_is_nothing_to_say(tmp_path, capsys):
    trainer, _, callback = fit(tmp_path, WITHOUT, steps=4)
    assert callback.summary is None
    assert "collapsed" not in capsys.readouterr().out
    assert not {"val/active_units", "val/kl_max_dim"} & set(trainer.callback_metrics)
    assert "val/kl_per_dim" not in EventAccumulator(str(tmp_path)).Reload().Tags()["histograms"]
    assert "latent" not in load(tmp_path / "checkpoints" / "best.ckpt")


def test_a_latent_of_one_dimension(tmp_path):
    summary = fit(tmp_path, replace(ALIVE, dim_latent=1), steps=4)[2].summary
    assert summary["dim_latent"] == 1
    assert summary["kl"] == summary["kl_max_dim"]


def test_a_checkpoint_holds_what_its_validation_found(tmp_path):
    trainer, _, callback = fit(tmp_path, ALIVE, steps=4)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    end, best = load(tmp_path / "end.ckpt"), load(tmp_path / "checkpoints" / "best.ckpt")
    assert end["latent"] == callback.summary
    assert {"net", "spec", "version", "train_seconds"} <= end.keys()
    step = torch.load(tmp_path / "checkpoints" / "best.ckpt", weights_only=True)["global_step"]
    assert best["latent"]["step"] == step
    assert all(type(value) in (int, float, bool) for value in best["latent"].values())


def test_a_resumed_run_knows_what_was_measured_before(tmp_path):
    trainer, _, callback = fit(tmp_path / "first", ALIVE, steps=4)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    resumed = fit(
        tmp_path / "second", ALIVE, steps=5, ckpt_path=tmp_path / "end.ckpt", limit_val_batches=0
    )[2]
    assert resumed.summary == callback.summary


@pytest.mark.parametrize("net", [COLLAPSING, WITHOUT])
def test_results_json_says_what_the_latent_does(tmp_path, capsys, monkeypatch, net):
    fit(tmp_path, net, steps=4)
    result = EpisodeResult(
        execution="chunked", seed=1, success=False, max_reward=0.0, total_reward=0.0, steps=300
    )
    monkeypatch.setattr(evaluation, "rollout", lambda *_, **__: [result])
    capsys.readouterr()
    (tmp_path / "config.yaml").touch()
    executions = {"chunked": ExecutionConfig()}
    report = evaluation.evaluate_run(tmp_path, EnvConfig(), executions, episodes=1, media=False)
    assert json.loads((tmp_path / "results.json").read_text()) == report
    line = next((x for x in capsys.readouterr().out.splitlines() if x.startswith("latent")), None)
    if net is WITHOUT:
        assert "latent" not in report
        assert line is None
    else:
        assert report["latent"] == load(tmp_path / "checkpoints" / "best.ckpt")["latent"]
        assert line == describe_latent(report["latent"])


def test_line_of_a_report():
    summary = {"dim_latent": 8, "active_units": 3, "kl": 1.25, "l1_posterior": 0.1, "l1_prior": 0.5}
    assert describe_latent(summary) == (
        "latent: 3 of 8 units active, KL 1.2500 nats; "
        "validation L1 0.1000 with the posterior's z, 0.5000 with z = 0"
    )
    bare = {"dim_latent": 8, "active_units": 0, "kl": 0.0}
    assert describe_latent(bare) == "latent: 0 of 8 units active, KL 0.0000 nats"
