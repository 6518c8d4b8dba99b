"""The baseline network, and that the seam carries it: trained, saved, rebuilt like ACT."""

from dataclasses import replace

import pytest
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from act_lightning.batch import Batch, DataSpec, Observation
from act_lightning.module import ACTModule, OptimizerConfig
from act_lightning.nets.backbone import BackboneConfig
from act_lightning.nets.bc import BCConfig
from act_lightning.nets.losses import masked_l1, masked_mse
from act_lightning.nets.normalize import Stats
from act_lightning.policy import Policy

B, D, A, E = 6, 5, 3, 4
TINY = BCConfig(
    dim_hidden=32,
    num_layers=2,
    backbone=BackboneConfig(weights="none", norm="group", stages=1, width=16),
)


def data_spec(cameras=0):
    return DataSpec(
        task="t",
        fps=50,
        dim_qpos=D,
        dim_action=A,
        dim_env_state=E,
        cameras=tuple(f"cam{i}" for i in range(cameras)),
        image_size=(24, 32) if cameras else (0, 0),
    )


def make_batch(spec, chunk_size):
    shape = (B, len(spec.cameras), 3, *spec.image_size)
    is_pad = torch.zeros(B, chunk_size, dtype=torch.bool)
    is_pad[0, 1:] = True
    return Batch(
        observation=Observation(
            qpos=torch.randn(B, D),
            env_state=torch.randn(B, E),
            images=torch.randint(0, 256, shape, dtype=torch.uint8) if spec.cameras else None,
        ),
        actions=5 * torch.randn(B, chunk_size, A) + 2,
        is_pad=is_pad,
    )


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("cameras", [0, 2])
@pytest.mark.parametrize("chunk_size", [1, 7])
def test_every_parameter_gets_a_gradient(cameras, chunk_size):
    spec = data_spec(cameras)
    net = replace(TINY, chunk_size=chunk_size).build(spec)
    net.losses(make_batch(spec, chunk_size), 0)["loss"].backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize(("name", "error"), [("l1", masked_l1), ("mse", masked_mse)])
def test_loss_counts_real_actions_in_standard_deviations(name, error):
    spec = data_spec()
    stats = Stats.from_arrays(
        qpos=torch.randn(50, D), actions=5 * torch.randn(50, A) + 2, env_state=torch.randn(50, E)
    )
    net = replace(TINY, chunk_size=4, reconstruction=name).build(spec, stats)
    batch = make_batch(spec, 4)
    losses = net.losses(batch, 0)
    chunk = net.sample(batch.observation)
    target = (batch.actions - stats.action_mean) / stats.action_std
    torch.testing.assert_close(losses["loss"], error(chunk, target, batch.is_pad))
    assert set(losses) == {"loss", name}
    evaluation = net.evaluate(batch, torch.arange(B))
    torch.testing.assert_close(
        evaluation.errors["l1_prior"], masked_l1(chunk, target, batch.is_pad)
    )
    assert evaluation.posterior is None
    net.eval()
    torch.testing.assert_close(
        net.predict_chunk(batch.observation), chunk * stats.action_std + stats.action_mean
    )


def test_trains_and_comes_back_from_its_checkpoint(tmp_path):
    spec = data_spec(1)
    net = replace(TINY, chunk_size=4)
    module = ACTModule(net, spec, optimizer=OptimizerConfig(lr=1e-3, backbone_lr=1e-3))
    batches = [make_batch(spec, 4)] * 30
    trainer = Trainer(
        accelerator="cpu",
        max_steps=30,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    before = module.net.losses(batches[0], 0)["loss"].item()
    trainer.fit(module, DataLoader(batches, batch_size=None))
    assert module.net.losses(batches[0], 30)["loss"].item() < before
    trainer.save_checkpoint(tmp_path / "bc.ckpt")
    policy = Policy.from_checkpoint(tmp_path / "bc.ckpt")
    assert policy.net.config == net
    assert policy.chunk_size == 4
    assert policy.latent is None
    module.eval()
    observation = batches[0].observation
    assert torch.equal(policy.predict_chunk(observation), module.net.predict_chunk(observation))


@pytest.mark.parametrize(
    "settings",
    [
        {"chunk_size": 0},
        {"dim_hidden": 0},
        {"num_layers": -1},
        {"dropout": 1.0},
        {"reconstruction": "huber"},
    ],
)
def test_bad_settings_are_named(settings):
    with pytest.raises(ValueError, match=f"BCConfig: {next(iter(settings))}="):
        BCConfig(**settings)


def test_observations_of_another_robot_are_refused():
    net = TINY.build(data_spec()).eval()
    observation = make_batch(data_spec(), 1).observation
    with pytest.raises(ValueError, match="BC: observation.env_state is None"):
        net.predict_chunk(replace(observation, env_state=None))
